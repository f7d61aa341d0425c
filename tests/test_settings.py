"""The settings: which stages each one shapes, what is refused, and what is read from the classes that declare them."""
import dataclasses
import importlib
import inspect
import py_compile
import sys
import types
from dataclasses import dataclass
from typing import Literal, get_args

import pytest
import torch

import r1
import train
from engine.command import run_command
from engine.settings import (AT_LEAST, AT_MOST, EVALUATION, OF_INIT, PRESETS, SHAPE_NOTHING, Evaluation, Task, change,
                             comments, names_of, settings_of, shaped_by)
from engine.terminal import UsageError
from tests.conftest import NAMES, PROGRAM, QUICK, copy, main, parse, results
from train import Config

SETTINGS = settings_of(Config)
FOUR = "base zero student_base student"

# The stages whose checkpoints a change of a setting must refuse, written by hand. "evaluation" stands for figures that
# the change makes stale.
SHAPES = {
    "device dtype compile threads micro_batch save_every eval_every": "",
    "seed task max_ops max_number max_factor init": f"{FOUR} evaluation",
    "corpus corpus_share block_size base_muon_lr base_adam_lr": FOUR,
    "n_layer n_head n_embd base_tokens base_batch base": "base zero student",
    "student_n_layer student_n_head student_n_embd student_base_tokens student_base_batch student_init":
        "student_base student",
    "problems rl_max_new_tokens instruction shots template": "zero student evaluation",
    "rl_steps rl_prompts rl_samples rl_minibatches rl_lr accuracy_weight format_weight clip_low clip_high kl_coef "
    "ref_every normalize scale": "zero student",
    "distill_steps distill_prompts distill_minibatches distill_epochs distill_muon_lr distill_adam_lr divergence "
    "distill_temperature on_policy": "student",
    "eval_problems": "evaluation",
}
# The same for r1.py.
STUDENTS = "student student_sft"
LATE = f"dev2 dev3 r1 {STUDENTS}"
ALL_OF_R1 = f"base zero dev1 {LATE} student_base"
SHAPES_OF_R1 = {
    "device dtype compile threads micro_batch save_every eval_every": "",
    "seed task max_ops max_number max_factor init": f"{ALL_OF_R1} evaluation",
    "corpus corpus_share block_size base_muon_lr base_adam_lr": ALL_OF_R1,
    "n_layer n_head n_embd base_tokens base_batch base": f"base zero dev1 {LATE}",
    "student_n_layer student_n_head student_n_embd student_base_tokens student_base_batch student_init":
        f"student_base {STUDENTS}",
    "problems rl_max_new_tokens instruction shots template": f"zero dev1 {LATE} evaluation",
    "rl_steps rl_prompts rl_samples rl_minibatches rl_lr accuracy_weight format_weight clip_low clip_high kl_coef "
    "ref_every normalize scale": f"zero dev1 {LATE}",
    "cold_steps cold_prompts cold_epochs sft_muon_lr sft_adam_lr": f"dev1 {LATE}",
    "dev2_steps language_weight cold_start": LATE,
    "sft_steps sft_epochs": f"dev3 r1 {STUDENTS}",
    "distill_prompts distill_minibatches": f"dev3 r1 {STUDENTS}",
    "r1_steps everyday_share": f"r1 {STUDENTS}",
    "distill_steps distill_epochs distill_muon_lr distill_adam_lr divergence distill_temperature on_policy": STUDENTS,
    "eval_problems": "evaluation",
}


# Changed settings


def changed(cfg, name, kind):
    """The settings with another value for one of them."""
    old, choices = getattr(cfg, name), get_args(kind)
    if len(choices) > 1:
        new = choices[choices.index(old) - 1]
    elif isinstance(old, str):
        new = f"{old}x"
    elif isinstance(old, bool):
        new = not old
    else:
        new = old + 1
    return dataclasses.replace(cfg, **{name: new})


@pytest.mark.parametrize("program, table", [(train, SHAPES), (r1, SHAPES_OF_R1)], ids=["train", "r1"])
def test_a_change_is_refused_where_it_shaped_something(program, table):
    """A stage that names too few settings would continue from a checkpoint that was made with other values. A stage
    that names too many would refuse a checkpoint that is still valid."""
    by_hand = {name: set(stages.split()) for names, stages in table.items() for name in names.split()}
    assert by_hand.keys() == vars(program.Config()).keys(), "a new setting needs a line in the table"
    shaping = {stage: shaped_by(program.STAGES, stage) for stage in program.STAGES}
    shaping["evaluation"] = names_of(EVALUATION)
    assert all(len(names) == len(set(names)) for names in shaping.values())
    stored, settings = dataclasses.asdict(program.Config()), settings_of(program.Config)
    for name, expected in by_hand.items():
        cfg = changed(program.Config(), name, settings[name].type)
        assert {stage for stage, names in shaping.items() if change(cfg, stored, names)} == expected, name
        assert {stage for stage, names in shaping.items() if name in names} == expected, name
    assert not any(change(program.Config(), stored, names) for names in shaping.values())


def test_other_settings_are_refused(quick, refused):
    """If the stages of one run were made with different settings, results.json would describe neither."""
    before = {path: path.read_bytes() for path in quick.iterdir()}
    line = refused(*QUICK, "--kl_coef=0.5", f"--out={quick}")
    assert "zero.pt was made with kl_coef=0.001, not 0.5" in line and "restore it, or start from it: --base=" in line
    assert "base.pt was made with seed=0, not 7" in refused(*QUICK, "--seed=7", f"--out={quick}")
    assert before == {path: path.read_bytes() for path in quick.iterdir()}


def test_a_begun_stage_keeps_its_settings(quick, tmp_path, refused):
    """A stage must not resume from resume.pt with other settings than it began with."""
    copy(quick, tmp_path, "base.pt")
    half = torch.load(quick / "zero.pt", weights_only=True) | {"step": 3}
    torch.save(half, tmp_path / "resume.pt")
    assert "resume.pt was made with rl_lr=0.001, not 0.5" in refused(*QUICK, "--rl_lr=0.5", f"--out={tmp_path}")


def test_a_setting_that_a_checkpoint_lacks(quick, tmp_path, refused):
    """A fork adds a setting. Its older checkpoints must not be refused if the setting has its default, and must be
    refused if it has another value."""
    files = [f"{name}.pt" for name in NAMES] + ["log.jsonl", "results.json"]
    copy(quick, tmp_path, *files)
    content = torch.load(quick / "zero.pt", weights_only=True)
    del content["config"]["clip_high"]
    torch.save(content, tmp_path / "zero.pt")
    before = results(tmp_path)["models"]
    assert main([*QUICK, f"--out={tmp_path}"]) == 0 and results(tmp_path)["models"] == before
    line = refused(*QUICK, "--clip_high=0.3", f"--out={tmp_path}")
    assert "zero.pt was made with clip_high=0.2, not 0.3" in line
    # The default is that of the program's own Config.
    assert change(r1.Config(), {}, ["task"]) == "" and change(Config(task="bilingual"), {}, ["task"])


def test_a_file_is_compared_by_its_content():
    """A run must not be refused because its file is in another folder, and must not continue with another file of the
    same name."""
    stored = {"corpus": "/home/me/text.txt (crc32 0000abcd)"}
    assert change(Config(corpus="../text.txt (crc32 0000abcd)"), stored, ["corpus"]) == ""
    assert change(Config(corpus="/home/me/text.txt (crc32 0000abce)"), stored, ["corpus"]).startswith("corpus=")


def test_changed_evaluation_is_done_again(quick, tmp_path, capsys):
    """A setting of the evaluation alone must not refuse a finished run, or leave the figures of the former setting. A
    finished run must not be evaluated again without a reason."""
    copy(quick, tmp_path, *[f"{name}.pt" for name in NAMES], "log.jsonl", "results.json")
    trained = {path: path.read_bytes() for path in tmp_path.glob("*.pt")}
    assert main([*QUICK, "--eval_problems=2", f"--out={tmp_path}"]) == 0
    assert "evaluated with eval_problems=3, not 2" in capsys.readouterr().out
    assert list(results(tmp_path)["models"]) == NAMES
    assert all(found[kind]["n_problems"] == 2 for found in results(tmp_path)["models"].values()
               for kind in ("test", "hard"))
    assert trained == {path: path.read_bytes() for path in tmp_path.glob("*.pt")}
    before = results(tmp_path)
    assert main([*QUICK, "--eval_problems=2", f"--out={tmp_path}"]) == 0
    assert results(tmp_path) == before and " on test: " not in capsys.readouterr().out.split("again", 1)[-1]


# What is read from the classes


def test_a_setting_without_a_comment_is_an_error():
    """A setting must not have an empty help text, or the comment of another setting."""
    @dataclass
    class Explained:
        first: int = 1  # the first
        second: str = "# no comment"   # the second # of two
        third: str = "a:  b"      # a: the third  # and last

    @dataclass
    class Bare:
        first: int = 1  # the first
        second: int = 2

    @dataclass
    class Headed:
        first: int = 1
        # what follows is about something else
        second: int = 2  # the second

    assert comments(Explained) == {"first": "the first", "second": "the second # of two",
                                   "third": "a: the third  # and last"}
    with pytest.raises(TypeError, match="Bare.second has no comment"):
        settings_of(Bare)
    with pytest.raises(TypeError, match="Headed.first has no comment"):
        settings_of(Headed)


def test_a_setting_that_two_groups_declare_is_an_error():
    """If two groups used one name for two things, a value for one would silently set the other."""
    @dataclass
    class Mine:
        seed: int = 3  # another seed

    @dataclass
    class Both(Mine, Config):
        """Every setting."""

    with pytest.raises(TypeError, match="seed is declared twice, in Mine and in Task"):
        settings_of(Both)


def test_a_subclass_may_change_a_default():
    """A program with another default must not have to repeat a whole group, and its default must be used."""
    @dataclass
    class Longer(Config):
        rl_steps: int = 500  # more rollouts

    found = settings_of(Longer)
    assert found["rl_steps"].default == 500 == Longer().rl_steps and found["rl_steps"].help == "more rollouts"
    assert found.keys() == SETTINGS.keys()
    task = settings_of(r1.Config)["task"]
    assert task.default == r1.Config().task == "bilingual" and task.choices == ("bilingual",)
    assert SETTINGS["task"].default == "arithmetic"


def test_the_order_is_that_of_the_bases():
    """--help must not begin with the last group, as dataclasses.fields does, or tear a group apart."""
    budget = ["rl_max_new_tokens", "micro_batch"]  # of grpo.Budget, the base of two groups
    expected = [name for group in Config.__bases__ for name in inspect.get_annotations(group)]
    assert [name for name in SETTINGS if name not in budget] == expected
    assert SETTINGS.keys() == {field.name for field in dataclasses.fields(Config)} == {*expected, *budget}
    assert list(SETTINGS)[:4] == ["device", "dtype", "compile", "threads"] and list(SETTINGS)[-1] == "eval_problems"


def test_choices_are_those_of_the_type():
    """If there were a list of choices beside the type, each new choice would have to be added to both."""
    @dataclass
    class Colours:
        colour: Literal["red", "green"] = "red"  # of the lamp
        bright: bool = False  # how bright
        name: str = ""  # of the lamp

    found = settings_of(Colours)
    assert [found[name].choices for name in found] == [("red", "green"), ("True", "False"), ()]
    assert SETTINGS["normalize"].choices == ("sequence", "token", "constant")


SOURCE = '''
from dataclasses import dataclass
import train
@dataclass
class Group:
    depth: int = 3  # how deep
    way: bool = True
@dataclass
class Config(train.Config, Group):
    pass
'''


def test_without_sources_help_is_empty(tmp_path, monkeypatch, capsys):
    """The help texts come from the source. If only .pyc files were installed, or a class was typed in (python -c), the
    program must not end in a traceback over its help."""
    (tmp_path / "group.py").write_text(SOURCE)
    py_compile.compile(str(tmp_path / "group.py"), cfile=str(tmp_path / "without_sources.pyc"))
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    with pytest.raises(TypeError, match="Group.way has no comment"):
        settings_of(importlib.import_module("group").Group)
    (tmp_path / "group.py").unlink()
    compiled = importlib.import_module("without_sources")
    typed = types.ModuleType("typed_in")  # like python -c, such a module has no file
    monkeypatch.setitem(sys.modules, "typed_in", typed)
    exec(SOURCE, typed.__dict__)
    for module in (compiled, typed):
        found = settings_of(module.Group)
        assert [(name, setting.help, setting.default) for name, setting in found.items()] == [
            ("depth", "", 3), ("way", "", True)]
        with pytest.raises(SystemExit) as stop:
            run_command(PROGRAM._replace(config=module.Config), ["--help"])
        printed = " ".join(capsys.readouterr().out.split())
        assert stop.value.code == 0 and "--depth VALUE (default: 3) --way {True,False} (default: True)" in printed
        assert "--rl_steps VALUE steps of RL, each with a new rollout (default: 100)" in printed
    for name in ("group", "without_sources"):
        monkeypatch.delitem(sys.modules, name)


# What is allowed


def test_a_number_must_be_above_0_but_for_a_table():
    """A learning rate of 0 would silently train nothing. But 0 must not be refused where it means "without"."""
    at_least_0 = """threads micro_batch save_every eval_every seed shots base_tokens student_base_tokens base_muon_lr
                    ref_every kl_coef accuracy_weight format_weight distill_muon_lr""".split()
    at_least_2 = "max_ops max_factor rl_samples".split()
    numbers = [name for name, setting in SETTINGS.items() if setting.type in (int, float)]
    for name in numbers:
        least = 0 if name in at_least_0 else 2 if name in at_least_2 else None
        if least is None:
            with pytest.raises(UsageError, match=f"--{name}: must be a (whole )?number above 0"):
                parse([f"--{name}=0"])
        else:
            assert getattr(parse([f"--{name}={least}"])[0], name) == least
            with pytest.raises(UsageError, match=f"--{name}: must be a (whole )?number of {least} or more"):
                parse([f"--{name}={least - 1}"])
    every = settings_of(r1.Config)
    assert AT_LEAST.keys() <= every.keys() and AT_MOST.keys() <= every.keys(), "a setting that there is not"
    assert set(SHAPE_NOTHING) <= every.keys()


@pytest.mark.parametrize("values", [*PRESETS.values(), OF_INIT], ids=[*PRESETS, "init"])
def test_presets_hold_settings_of_the_right_types(values):
    """A preset must not have a misspelled name, or a value that the command line would refuse."""
    for name, value in values.items():
        setting = SETTINGS[name]
        assert type(value) is setting.type or value in setting.choices, name
        assert parse([f"--{name}={value}"])[0] == dataclasses.replace(Config(), **{name: value}), name


def test_defaults_are_allowed_and_fit_their_types():
    """The command line must not refuse a default."""
    for config in (Config, r1.Config):
        for name, setting in settings_of(config).items():
            assert type(setting.default) is setting.type or setting.default in setting.choices, name
    for name, setting in SETTINGS.items():
        assert parse([f"--{name}={setting.default}"])[0] == Config(), name


def test_names_of_groups_and_single_names():
    """A single setting that shapes a stage must not be left out, or be taken for a group."""
    assert names_of((Evaluation, "rl_max_new_tokens")) == ["eval_problems", "rl_max_new_tokens"]
    assert names_of((Task,))[0] == "seed" and names_of(()) == []
    assert not {"device", "save_every", "micro_batch"} & set(shaped_by(train.STAGES, "student"))
