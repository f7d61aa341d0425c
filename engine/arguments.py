"""The command line: every setting is a flag --key=value, and its type and range are checked here."""
import argparse
import difflib
import math
from collections.abc import Callable
from typing import NamedTuple

from engine.settings import AT_LEAST, AT_MOST, OF_INIT, PRESETS, settings_of
from engine.terminal import UsageError


class Program(NamedTuple):
    """What a command can train, its settings and its help."""
    stages: dict           # name -> engine.loop.Stage
    config: type           # its Config
    description: str       # the text of --help
    make_task: Callable    # make_task(cfg) -> the task
    name: str              # the file that was started


def number(kind: type, low: float | None, high: float | None) -> Callable[[str], int | float]:
    """An argparse type: a finite number from `low` to `high`. If low is None, the number must be above 0; if high is
    None, it has no upper bound. A whole number may be written as 1e6.

    >>> number(int, None, None)("1e6")
    1000000
    """
    def parse(text: str) -> int | float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        large_enough = value > 0 if low is None else value >= low
        small_enough = value <= (high or math.inf)
        right_kind = kind is float or value.is_integer()
        if math.isfinite(value) and large_enough and small_enough and right_kind:
            return kind(value)
        whole = "whole " if kind is int else ""
        least = "above 0" if low is None else f"of {low} or more"
        most = f" and at most {high}" if high else ""
        raise argparse.ArgumentTypeError(f"must be a {whole}number {least}{most}, not {text!r}")
    return parse


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line, raised as UsageError."""

    def error(self, message: str):
        raise UsageError(message)


def parse_args(program: Program, argv: list[str]) -> tuple:
    """Parse --key=value arguments -> (a Config, the other options: preset, stage, ask, out, ..., None if not given).

    Raises UsageError for an argument that is unknown, of the wrong type or out of range. --help prints and exits.
    """
    settings = settings_of(program.config)
    parser = Parser(prog=program.name, usage=f"python {program.name} [--key=value ...]", allow_abbrev=False,
                    description=program.description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, help="a named set of values for the settings below")
    parser.add_argument("--stage", choices=program.stages, help="train only the stages whose names begin with this")
    parser.add_argument("--ask", metavar="PROBLEM", help="print how each model in --out answers PROBLEM")
    parser.add_argument("--samples", type=number(int, None, None), default=1, metavar="N",
                        help="how many answers to --ask each model gives")
    parser.add_argument("--temperature", type=number(float, 0, None), metavar="T",
                        help="temperature of these answers (default: 0, the likeliest tokens; 1 for several samples)")
    parser.add_argument("--evaluate", metavar="FILE", help="evaluate the models in --out on a JSONL file of problems")
    parser.add_argument("--out", metavar="DIR", help="folder of the run (default: out, or out/PRESET)")
    for name, (kind, default, help, choices) in settings.items():
        numeric = kind in (int, float)
        parser.add_argument(f"--{name}", type=number(kind, AT_LEAST.get(name), AT_MOST.get(name)) if numeric else str,
                            choices=choices or None, metavar=None if choices else "VALUE",
                            help=f"{help} (default: {default})".replace("%", "%%"))
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].partition("=")[0].lstrip("-"), settings, n=1)
        raise UsageError(f"unknown argument {unknown[0]!r}: "
                         + (f"did you mean --{near[0]}=VALUE?" if near else "see --help"))
    if options.init and options.preset:
        raise UsageError("--init and --preset both change the defaults of other settings: give only one of them")
    given = {name: value for name, value in vars(options).items() if name in settings and value is not None}
    for name in given:
        if settings[name].type is bool:
            given[name] = given[name] == "True"
    defaults = PRESETS.get(options.preset, {})
    if options.base:  # its pretraining is done
        defaults = defaults | {"base_tokens": 0}
    if options.init:
        defaults = OF_INIT
    return program.config(**defaults | given), options
