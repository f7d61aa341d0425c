"""The command line: rejected flags, parsed values, printed text, and the order of the stages."""
import io
import json
import os
import re
import runpy
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

import train
from engine.arguments import Program
from engine.command import default_folder, prepare, run_command
from engine.settings import settings_of
from engine.tasks import make_task
from tests.conftest import NAMES, PROGRAM, QUICK, ROOT, copy, main, parse

ALL = [f"{name}.pt" for name in NAMES] + ["log.jsonl", "results.json"]


# Errors


@pytest.mark.parametrize("args, words", [
    ("--rl_step=3", "did you mean --rl_steps"), ("--zzz=3", "unknown argument"), ("rl_steps=3", "unknown argument"),
    ("--on_pol=True", "did you mean --on_policy"), ("--rl_steps", "expected one argument"),
    ("--rl_steps=1.5", "whole number"), ("--rl_steps=1e-3", "whole number"), ("--rl_steps=1e999", "whole number"),
    ("--rl_steps=0", "argument --rl_steps: must be a whole number above 0, not '0'"), ("--kl_coef=nan", "a number"),
    ("--kl_coef=-1", "0 or more"), ("--normalize=mean", "'sequence', 'token', 'constant'"),
    ("--on_policy=yes", "'True', 'False'"),
    ("--stage=rl", "'base', 'zero', 'student"), ("--preset=huge", "'tiny'"), ("--rl_samples=1", "2 or more"),
    ("--max_ops=1", "2 or more"), ("--max_factor=1", "2 or more"), ("--max_number=1000", "at most 999"),
    ("--corpus_share=1.5", "at most 1"), ("--corpus_share=-1", "above 0"), ("--clip_low=1.1", "at most 1"),
    ("--wait_share=0.5", "unknown argument"), ("--student_rl=True", "unknown argument"),
    ("--eval_problems=100000000", "at most 10000"), ("--n_embd=63", "n_embd"), ("--block_size=100", "multiple of 8"),
    ("--rl_max_new_tokens=1000", "do not fit"), ("--max_ops=60", "do not fit --block_size=128"),
    ("--base_tokens=100", "one batch"), ("--student_base_tokens=4095", "one batch"),
    ("--corpus_share=0.5", "needs a --corpus"),
    ("--accuracy_weight=0 --format_weight=0", "both"), ("--kl_coef=0 --ref_every=3", "--kl_coef"),
    ("--on_policy=True --divergence=sft", "--on_policy"), ("--task=countdown --max_ops=5", "--task=countdown"),
    ("--task=countdown --max_number=100", "at most 99"), ("--problems=nowhere.jsonl", "nowhere.jsonl"),
    ("--corpus=nowhere.txt", "nowhere.txt"), ("--ask=8*7", "no model"), ("--ask=hello", "no model"),
    # A task so easy that its test side has too few problems: the search for them must end, before pretraining.
    ("--max_ops=2 --max_number=1 --max_factor=2", "fewer than 256 test problems"),
])
def test_bad_input(tmp_path, capsys, args, words):
    """A mistake must end in one clear line. It must not end in a traceback, be ignored, disable another setting, or
    start a run."""
    out = tmp_path / "out"
    assert main([*args.split(), f"--out={out}"]) == 2
    printed = capsys.readouterr()
    assert words in printed.err and printed.err.count("\n") == 1 and not printed.out
    assert not re.search(r" -\d", printed.err), "a bound that is a negative number helps nobody"
    assert not out.exists()


def test_exit_codes(quick, tmp_path, monkeypatch):
    """If main() returns 2, the process must not end with 0."""
    assert as_script(monkeypatch, "utf-8", "--rl_steps=0", f"--out={tmp_path / 'out'}")[0] == 2
    assert as_script(monkeypatch, "utf-8", *QUICK, "--seed=3", f"--out={quick}")[0] == 2
    assert as_script(monkeypatch, "utf-8", "--help")[0] == 0


# Values


@pytest.mark.parametrize("arg, expected", [
    ("--rl_steps=1e1", 10), ("--base_tokens=4e4", 40_000), ("--base_tokens=6.5e6", 6_500_000), ("--rl_steps=7", 7),
    ("--seed=0", 0)])
def test_whole_numbers_may_be_written_with_an_exponent(arg, expected):
    """1e6 must be accepted, and must not stay a float: range() would raise an error for it hours later."""
    cfg, _ = parse([arg])
    found = getattr(cfg, arg[2:].partition("=")[0])
    assert found == expected and type(found) is int


def test_values_arrive_in_their_types():
    """bool("False") is True, so a bool must be parsed in another way. A preset must not replace a value that is given
    beside it."""
    cfg, options = parse(["--preset=tiny", "--on_policy=False", "--rl_lr=2", "--task=countdown", "--rl_steps=9"])
    assert cfg.on_policy is False and cfg.rl_lr == 2.0 and cfg.task == "countdown" and cfg.rl_steps == 9
    assert cfg.n_embd == 64 and options.preset == "tiny" and options.stage is options.ask is options.out is None


def test_each_program_has_a_folder_of_its_own():
    """Two programs must not share a default folder, and a pretrained model must not get the folder of the default
    run."""
    def folder(name, *args):
        cfg, options = parse(list(args))
        return str(default_folder(PROGRAM._replace(name=name), cfg, options.preset))

    assert [folder("train.py"), folder("train.py", "--preset=tiny"), folder("train.py", "--init=/models/small")] == [
        "out", "out/tiny", "out/small"]
    assert [folder("r1.py"), folder("r1.py", "--preset=tiny")] == ["out/r1", "out/r1/tiny"]


# Output


def test_help_lists_every_field(capsys, monkeypatch):
    """If --help left out a setting, nobody would find it."""
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "python train.py" in printed and "torchrun" in printed
    for name, setting in settings_of(train.Config).items():
        assert setting.help
        assert re.search(rf"--{name} [^ ]+ {re.escape(setting.help)} \(default: ", printed), name
    options = ("preset", "stage", "ask", "samples", "temperature", "evaluate", "out")
    assert all(f"--{name} " in printed for name in options)


def test_help_may_hold_a_percent_sign(capsys):
    """argparse would read a percent sign in a help text as a format, and end in a traceback."""
    @dataclass
    class Config(train.Config):
        part: str = "5 %"  # 100 %d is all

    with pytest.raises(SystemExit):
        run_command(Program(train.STAGES, Config, "", make_task, "mine.py"), ["--help"])
    assert "100 %d is all (default: 5 %)" in " ".join(capsys.readouterr().out.split())


def as_script(monkeypatch, encoding, *args):
    """Run `python train.py` with a terminal of this encoding -> (exit code, output in bytes)."""
    with monkeypatch.context() as patch:
        stdout, stderr = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
        patch.setattr(sys, "argv", ["train.py", *args])
        patch.setattr(sys, "stdout", stdout), patch.setattr(sys, "stderr", stderr)
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    stdout.flush(), stderr.flush()
    return stop.value.code, stdout.buffer.getvalue() + stderr.buffer.getvalue()


def test_a_terminal_without_unicode(quick, tmp_path, monkeypatch):
    """Where a terminal shows ASCII or cp1252, the signs of the report must not end a finished run in a
    UnicodeEncodeError and exit code 1. The same holds for an answer of --ask."""
    (tmp_path / "own.jsonl").write_text("".join(
        json.dumps({"prompt": f"½ of {2 * i} is ▁?", "answer": str(i), "split": side}) + "\n"
        for i, side in enumerate(("train", "test", "test"))), encoding="utf-8")
    asked = torch.load(quick / "base.pt", weights_only=True)
    asked["config"]["problems"] = str(tmp_path / "own.jsonl")
    torch.save(asked, tmp_path / "base.pt")
    copy(quick, tmp_path / "out", *ALL)
    printed = {}
    for encoding in ("ascii", "cp1252"):
        code, printed[encoding] = as_script(monkeypatch, encoding, *QUICK, f"--out={tmp_path / 'out'}")
        assert code == 0
        code, answer = as_script(monkeypatch, encoding, "--ask=½ of 4 is ▁?", f"--out={tmp_path}")
        assert code == 0 and "½ of 4 is ▁? = 2".encode(encoding, errors="replace") + b"\nbase " in answer
    # A real process under the C locale also opens its files as ASCII.
    unset = {key: value for key, value in os.environ.items() if key != "PYTHONIOENCODING"}
    done = subprocess.run([sys.executable, "train.py", *QUICK, f"--out={tmp_path / 'out'}"], cwd=ROOT,
                          env=unset | {"LC_ALL": "C", "PYTHONUTF8": "0"}, capture_output=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    report = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "±" in report and any(bar in report for bar in "▁▂▃▄▅▆▇█")
    for encoding, text in (("ascii", done.stdout), *printed.items()):
        assert report.encode(encoding, errors="replace") in text


# The order of the stages


def test_one_stage_at_a_time(quick, tmp_path, refused):
    """--stage must not train other stages, and must find the checkpoint of the stage before it."""
    assert "base.pt is missing" in refused(*QUICK, "--stage=zero", f"--out={tmp_path / 'empty'}")
    copy(quick, tmp_path, "base.pt")
    few = ["--rl_steps=1", "--rl_prompts=2", "--eval_problems=2"]
    assert main([*QUICK, *few, "--stage=zero", f"--out={tmp_path}"]) == 0
    assert (tmp_path / "zero.pt").exists() and not (tmp_path / "student_base.pt").exists()


def test_ask_shows_the_models_of_other_programs(quick, tmp_path, capfd, refused):
    """--ask must include a control's model, and leave out the unfinished model of a stage in progress. A setting that
    only the other program has must not end in a traceback."""
    copy(quick, tmp_path, "base.pt", "zero.pt")
    zero = torch.load(quick / "zero.pt", weights_only=True)
    torch.save(zero | {"step": 2, "parts": {}}, tmp_path / "resume.pt")
    torch.save(zero, tmp_path / "zero_best.pt")
    others = zero["config"] | {"a_setting_of_controls": 3}
    torch.save(zero | {"stage": "shuffled", "config": others}, tmp_path / "shuffled.pt")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    capfd.readouterr()
    assert main(["--ask=8*7-19", f"--out={tmp_path}"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == "8*7-19 = 37" and [line.split()[0] for line in lines[1:]] == ["base", "zero", "shuffled"]
    assert lines[2].split()[1:] == lines[3].split()[1:]
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}
    # Without a model of this program, the settings are those of another program's model.
    (tmp_path / "base.pt").unlink(), (tmp_path / "zero.pt").unlink()
    assert main(["--ask=8*7-19", f"--out={tmp_path}"]) == 0
    assert capfd.readouterr().out.splitlines()[1].startswith("shuffled ")
    (tmp_path / "shuffled.pt").unlink()
    assert "no model" in refused("--ask=8*7-19", f"--out={tmp_path}")


def test_ask_leaves_out_what_is_no_finished_model(quick, tmp_path, capsys):
    """A copy of a model under another name, or a foreign file, must not stop --ask."""
    copy(quick, tmp_path, "base.pt")
    copy(quick, tmp_path / "others", "zero.pt")
    (tmp_path / "others" / "zero.pt").rename(tmp_path / "zero_of_monday.pt")
    torch.save({"model": {}}, tmp_path / "foreign.pt")
    (tmp_path / "text.pt").write_text("hello")
    assert main(["--ask=8*7-19", f"--out={tmp_path}"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["8*7-19", "base"]


def test_figures_of_other_programs_are_kept(quick, tmp_path, capsys):
    """train.py must keep the results that experiments/controls.py wrote into the same folder, and its report must be
    able to show them."""
    copy(quick, tmp_path, *ALL)
    found = json.loads((tmp_path / "results.json").read_text())
    found["models"] = {"shuffled": found["models"]["zero"]} | found["models"]
    found["seconds"]["shuffled"] = 7.0
    (tmp_path / "results.json").write_text(json.dumps(found))
    assert main([*QUICK, f"--out={tmp_path}"]) == 0
    again = json.loads((tmp_path / "results.json").read_text())
    assert again["models"] == found["models"] and again["seconds"]["shuffled"] == 7
    shown = re.findall(r"^(\w+) *\|test", capsys.readouterr().out, re.MULTILINE)
    assert shown == [*NAMES, "shuffled"], "this program's models come first, in the order of its stages"


def test_figures_of_a_removed_checkpoint_are_dropped_for_good(quick, tmp_path, monkeypatch):
    """A stage is trained again with other settings, and the run is killed before the evaluation. results.json must not
    keep the results of the removed model, because nobody would notice."""
    copy(quick, tmp_path, "base.pt", "student_base.pt", "results.json")
    few = [*QUICK, "--stage=zero", "--rl_steps=1", "--rl_prompts=2", f"--out={tmp_path}"]

    def killed(run, name):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("engine.command.evaluate_stage", killed)
        assert main(few) == 130
    found = json.loads((tmp_path / "results.json").read_text())["models"]
    assert (tmp_path / "zero.pt").exists() and "zero" not in found and "base" in found
    assert main(few) == 0 and "zero" in json.loads((tmp_path / "results.json").read_text())["models"]


@pytest.mark.parametrize("there, expected", [
    ([], ["teacher", "small"]), (["base"], ["small"]), (["base", "zero"], ["small"]),
    (["base", "zero", "student_base"], []), (["student_base"], [])])
def test_folders_are_tried_before_any_work(tmp_path, monkeypatch, there, expected):
    """A run must find out at its start that a folder of --init or --student_init cannot be loaded, and not hours later.
    A resumed run must not read gigabytes that it does not need."""
    for name in "teacher", "small":
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    for name in there:
        (tmp_path / f"{name}.pt").write_text("")
    tried = []
    monkeypatch.setattr("engine.command.load_model", lambda path, *args: tried.append(path))
    monkeypatch.setattr("engine.command.fingerprint", str)
    cfg = train.Config(init=str(tmp_path / "teacher"), student_init=str(tmp_path / "small"))
    task = SimpleNamespace(encoding=SimpleNamespace(n_tokens=100), reward=lambda *args: {"accuracy": 0},
                           make_problem=lambda rng: SimpleNamespace(answer="1"))
    prepare(PROGRAM._replace(make_task=lambda cfg: task), cfg, tmp_path)
    assert tried == [str(tmp_path / name) for name in expected]
