"""Settings, command line, files, the lock, and the loop that survives being killed; in subprocesses where that matters."""
import contextlib
import dataclasses
import io
import json
import os
import pickle
import random
import re
import resource
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import pytest
import torch

import run
from model import generate, token_logprobs
from run import Config, change, compiled, lr_schedule, parse_args, seeded, settle, shaped_by
from tests.conftest import NAMES, QUICK, ROOT, copy, results, rows, weights_equal
from train import main

ALL = [f"{name}.pt" for name in NAMES] + ["log.jsonl", "results.json"]
FIVE = "base zero student_base student student_rl"

# Which checkpoints a change of each field must refuse (and "evaluation": which figures it makes stale), by hand.
SHAPES = {
    "device dtype compile threads micro_batch save_every student_rl eval_every": "",
    "seed task max_ops max_number max_factor parentheses init": f"{FIVE} evaluation",
    "worked_share wait_share corpus corpus_share block_size base_muon_lr base_adam_lr": FIVE,
    "n_layer n_head n_embd base_tokens base_batch": "base zero student",
    "student_n_layer student_n_head student_n_embd student_base_tokens student_base_batch "
    "student_init":
        "student_base student student_rl",
    "rl_steps rl_prompts": "zero student",
    "problems rl_max_new_tokens instruction shots": "zero student student_rl evaluation",
    "rl_samples rl_minibatches rl_lr accuracy_weight format_weight shuffle_rewards baseline clip_low clip_high kl_coef "
    "skip_no_signal ref_every normalize scale": "zero student student_rl",
    "distill_longer distill_steps distill_prompts distill_minibatches distill_epochs": "student student_rl",
    "distill_muon_lr distill_adam_lr divergence distill_temperature on_policy": "student",
    "language_weight cold_start cold_steps cold_prompts cold_epochs sft_steps sft_epochs sft_muon_lr sft_adam_lr dev2_steps "
    "r1_steps everyday_share": "",  # see r1.py
    "eval_problems": "evaluation",
}


# Settings


def changed(name):
    """The default settings with another value for one field."""
    old, choices = getattr(Config(), name), get_args(run.FIELDS[name].type)
    new = choices[choices.index(old) - 1] if choices else f"{old}x" if isinstance(old, str) else not old \
        if isinstance(old, bool) else old + 1
    return dataclasses.replace(Config(), **{name: new})


def test_a_change_is_refused_where_it_shaped_something():
    """A field that declares too few stages lets a run go on from a checkpoint that was made otherwise; one that declares
    too many refuses a checkpoint that is as good as before."""
    by_hand = {name: set(stages.split()) for names, stages in SHAPES.items() for name in names.split()}
    assert by_hand.keys() == vars(Config()).keys(), "a new field needs a line in SHAPES"
    stored = dataclasses.asdict(Config())
    for name, expected in by_hand.items():
        found = {stage for stage in (*run.DEPENDS, run.EVALUATION) if change(changed(name), stored, stage)}
        assert found == expected, name
        assert found == {stage for stage in (*run.DEPENDS, run.EVALUATION) if name in shaped_by(stage)}, name
    assert not any(change(Config(), stored, stage) for stage in (*run.DEPENDS, run.EVALUATION))


def test_other_settings_are_refused(quick, refused):
    """Stages of one run that were made with different settings: results.json would describe neither."""
    before = {path: path.read_bytes() for path in quick.iterdir()}
    line = refused(*QUICK, "--kl_coef=0.5", f"--out={quick}")
    assert "zero.pt was made with kl_coef=0.001, not 0.5" in line and "another --out" in line
    assert "base.pt was made with seed=0, not 7" in refused(*QUICK, "--seed=7", f"--out={quick}")
    assert before == {path: path.read_bytes() for path in quick.iterdir()}


def test_a_begun_stage_keeps_its_settings(quick, tmp_path, refused):
    """A stage that goes on from resume.pt with other settings than it began with."""
    copy(quick, tmp_path, "base.pt")
    half = torch.load(quick / "zero.pt", weights_only=True) | {"step": 3}
    torch.save(half, tmp_path / "resume.pt")
    assert "resume.pt was made with rl_lr=0.001, not 0.5" in refused(*QUICK, "--rl_lr=0.5", f"--out={tmp_path}")


def test_a_field_that_a_checkpoint_lacks(quick, tmp_path, refused):
    """A checkpoint from before a field existed, taken as if it had been made with the field's new default."""
    copy(quick, tmp_path, *ALL)
    content = torch.load(quick / "student.pt", weights_only=True)
    del content["config"]["distill_epochs"]
    torch.save(content, tmp_path / "student.pt")
    line = refused(*QUICK, "--distill_epochs=3", f"--out={tmp_path}")
    assert "student.pt was made with distill_epochs=1, not 3" in line
    old = Config(distill_epochs=1, distill_longer=False, skip_no_signal=False)
    assert not change(old, {}, "student")
    for field in ("distill_epochs", "distill_longer", "skip_no_signal"):
        assert change(dataclasses.replace(old, **{field: getattr(Config(), field)}), {}, "student").startswith(field)


def test_a_run_moves_to_another_dtype(quick, tmp_path):
    """A base.pt that was copied to another --out is refused because a setting of the machine is another there."""
    copy(quick, tmp_path, "base.pt")
    few = [*QUICK, "--stage=zero", "--rl_steps=1", "--rl_prompts=2", "--eval_problems=2"]
    assert main([*few, "--dtype=bfloat16", "--micro_batch=500", "--save_every=9", f"--out={tmp_path}"]) == 0
    assert torch.load(tmp_path / "zero.pt", weights_only=True)["config"]["dtype"] == "bfloat16"
    assert results(tmp_path)["config"]["dtype"] == "bfloat16" and (tmp_path / "zero.pt").exists()


def test_a_gpus_run_goes_on_without_a_gpu(quick, tmp_path, monkeypatch, refused):
    """A finished run of a GPU, copied to a laptop, is refused, or its evaluation ends in a traceback."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    copy(quick, tmp_path, *ALL)
    for name in NAMES:
        content = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        content["config"]["device"] = "cuda"
        torch.save(content, tmp_path / f"{name}.pt")
    found = results(tmp_path)
    found["config"]["device"] = "cuda"
    expected = found["models"].pop("student")
    (tmp_path / "results.json").write_text(json.dumps(found))
    settings = [arg for arg in QUICK if arg != "--device=cpu"]
    assert main([*settings, f"--out={tmp_path}"]) == 0
    assert results(tmp_path)["config"]["device"] == "cpu" and results(tmp_path)["models"]["student"] == expected
    assert main(["--ask=8*7-19", f"--out={tmp_path}"]) == 0
    assert "no such GPU" in refused(*settings, "--device=cuda", f"--out={tmp_path}")


def test_changed_evaluation_is_done_again(quick, tmp_path, capsys):
    """A setting of the evaluation alone that refuses a finished run, or leaves figures of the former setting; or a
    finished run that is evaluated again for nothing."""
    copy(quick, tmp_path, *ALL)
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


@pytest.mark.parametrize("stored, native, expected", [
    ({}, True, "bfloat16"), ({}, False, "float32"),
    ({"device": "cpu", "dtype": "float32"}, True, "float32"), ({"device": "cpu", "dtype": "bfloat16"}, False, "bfloat16"),
    ({"device": "cuda", "dtype": "bfloat16"}, False, "float32"),
])
def test_auto_dtype_is_a_rule(monkeypatch, stored, native, expected):
    """bfloat16 where the machine only emulates it; a run that changes its dtype half-way, or takes over the dtype of a
    device that is not here."""
    monkeypatch.setattr(run, "has_bfloat16", lambda device: native)
    monkeypatch.setattr(run, "has", lambda device: device == "cpu")
    found = settle(Config(compile="off"), stored)
    assert (found.device, found.dtype) == ("cpu", expected) and found.threads == torch.get_num_threads()
    assert settle(Config(compile="off", dtype="float32", threads=7), stored | {"dtype": "bfloat16"}).dtype == "float32"
    assert settle(Config(compile="off", dtype="float32", threads=7), stored).threads == 7


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="the flags of the CPU are read where Linux lists them")
def test_bfloat16_of_the_cpu_is_what_its_flags_say():
    """A CPU with bf16 units computes in float32, or one without them in an emulated bfloat16."""
    flags = set(re.findall(r"[a-z0-9_]+", Path("/proc/cpuinfo").read_text()))
    assert run.has_bfloat16("cpu") == bool({"avx512_bf16", "amx_bf16"} & flags)


# The command line


@pytest.mark.parametrize("args, words", [
    ("--rl_step=3", "did you mean --rl_steps"), ("--zzz=3", "unknown argument"), ("rl_steps=3", "unknown argument"),
    ("--on_pol=True", "did you mean --on_policy"), ("--rl_steps", "expected one argument"),
    ("--rl_steps=1.5", "whole number"), ("--rl_steps=1e-3", "whole number"), ("--rl_steps=1e999", "whole number"),
    ("--rl_steps=0", "argument --rl_steps: must be a whole number above 0, not '0'"), ("--kl_coef=nan", "a number"),
    ("--kl_coef=-1", "0 or more"), ("--normalize=mean", "'sequence', 'token', 'constant'"),
    ("--on_policy=yes", "'True', 'False'"), ("--parentheses=1", "'True', 'False'"),
    ("--stage=rl", "'base', 'zero', 'student'"), ("--preset=huge", "'gpu', 'tiny'"), ("--rl_samples=1", "2 or more"),
    ("--max_ops=1", "2 or more"), ("--max_factor=1", "2 or more"), ("--max_number=1000", "at most 999"),
    ("--wait_share=1.5", "at most 1"), ("--worked_share=-1", "0 or more"), ("--clip_low=1.1", "at most 1"),
    ("--eval_problems=100000000", "at most 10000"), ("--n_embd=63", "n_embd"), ("--block_size=100", "multiple of 8"),
    ("--rl_max_new_tokens=1000", "do not fit"), ("--max_ops=60", "do not fit --block_size=128"),
    ("--base_tokens=100", "one batch"), ("--corpus_share=0.5", "needs a --corpus"),
    ("--accuracy_weight=0 --format_weight=0", "both"), ("--kl_coef=0 --ref_every=3", "--kl_coef"),
    ("--on_policy=True --divergence=sft", "--on_policy"), ("--task=countdown --max_ops=5", "--task=countdown"),
    ("--task=countdown --max_number=100", "at most 99"), ("--problems=nowhere.jsonl", "nowhere.jsonl"),
    ("--corpus=nowhere.txt", "nowhere.txt"), ("--ask=8*7", "no model"), ("--ask=hello", "no model"),
    # So easy a task that its test side lacks problems: found out after pretraining, or by a search without end.
    ("--max_ops=2 --max_number=1 --max_factor=2", "fewer than 256 test problems"),
])
def test_bad_input(tmp_path, capsys, args, words):
    """A mistake ends in a traceback, is silently ignored, makes another setting void, or begins a run all the same."""
    out = tmp_path / "out"
    assert main([*args.split(), f"--out={out}"]) == 2
    printed = capsys.readouterr()
    assert words in printed.err and printed.err.count("\n") == 1 and not printed.out
    assert not re.search(r" -\d", printed.err), "a bound that is a negative number helps nobody"
    assert not out.exists()


@pytest.mark.parametrize("arg, expected", [
    ("--rl_steps=1e1", 10), ("--base_tokens=4e4", 40_000), ("--base_tokens=6.5e6", 6_500_000), ("--rl_steps=7", 7),
    ("--seed=0", 0)])
def test_whole_numbers_may_be_written_with_an_exponent(arg, expected):
    """1e6 is refused, or stays a float, over which range() stumbles hours later."""
    cfg, _ = parse_args([arg])
    found = getattr(cfg, arg[2:].partition("=")[0])
    assert found == expected and type(found) is int


def test_values_arrive_in_their_types():
    """bool("False") is True; a preset that beats what was given beside it."""
    cfg, options = parse_args(["--preset=tiny", "--on_policy=False", "--rl_lr=2", "--task=countdown", "--rl_steps=9"])
    assert cfg.on_policy is False and cfg.rl_lr == 2.0 and cfg.task == "countdown" and cfg.rl_steps == 9
    assert cfg.n_embd == 64 and options.preset == "tiny" and options.stage is options.ask is options.out is None


def test_help_lists_every_field(capsys, monkeypatch):
    """A setting that nobody can find."""
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "python train.py" in printed and "torchrun" in printed
    for name, field in run.FIELDS.items():
        assert re.search(rf"--{name} [^ ]+ {re.escape(field.metadata['help'])} \(default: ", printed), name
    assert all(f"--{name} " in printed for name in ("preset", "stage", "ask", "out"))


def as_script(monkeypatch, encoding, *args):
    """What `python train.py` does where the terminal has this encoding -> (exit code, its output in bytes)."""
    with monkeypatch.context() as patch:
        stdout, stderr = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
        patch.setattr(sys, "argv", ["train.py", *args])
        patch.setattr(sys, "stdout", stdout), patch.setattr(sys, "stderr", stderr)
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    stdout.flush(), stderr.flush()
    return stop.value.code, stdout.buffer.getvalue() + stderr.buffer.getvalue()


def test_a_terminal_without_unicode(quick, tmp_path, monkeypatch):
    """A finished run ends in a UnicodeEncodeError over the report's signs, and exit code 1, where the terminal shows
    ASCII or cp1252; so does an answer of --ask."""
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
    # A real process under the C locale opens its files as ASCII, too.
    unset = {key: value for key, value in os.environ.items() if key != "PYTHONIOENCODING"}
    done = subprocess.run([sys.executable, "train.py", *QUICK, f"--out={tmp_path / 'out'}"], cwd=ROOT,
                          env=unset | {"LC_ALL": "C", "PYTHONUTF8": "0"}, capture_output=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    report = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "±" in report and any(bar in report for bar in "▁▂▃▄▅▆▇█")
    for encoding, text in (("ascii", done.stdout), *printed.items()):
        assert report.encode(encoding, errors="replace") in text


def test_exit_codes(quick, tmp_path, monkeypatch):
    """main() returns 2, and the process ends with 0."""
    assert as_script(monkeypatch, "utf-8", "--rl_steps=0", f"--out={tmp_path / 'out'}")[0] == 2
    assert as_script(monkeypatch, "utf-8", *QUICK, "--seed=3", f"--out={quick}")[0] == 2
    assert as_script(monkeypatch, "utf-8", "--help")[0] == 0


# Files


def test_out_that_cannot_be_written(tmp_path, refused):
    """A file that is in the way of --out ends in a traceback, or is overwritten."""
    (tmp_path / "file").write_text("precious")
    assert "file" in refused("--preset=tiny", f"--out={tmp_path / 'file' / 'out'}")
    assert "file" in refused("--preset=tiny", f"--out={tmp_path / 'file'}")
    assert (tmp_path / "file").read_text() == "precious"


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path(__file__).parent / "bomb_went_off",)


@pytest.mark.parametrize("kind", ["truncated", "text", "foreign", "malicious", "other stage"])
def test_foreign_checkpoints(quick, tmp_path, refused, kind):
    """A checkpoint comes from outside: what is in it is executed, it is overwritten, or it ends in a traceback."""
    path = tmp_path / "base.pt"
    if kind == "truncated":
        path.write_bytes((quick / "base.pt").read_bytes()[:-1000])
    elif kind == "text":
        path.write_text("hello")
    elif kind == "foreign":
        torch.save({"model": {}}, path)
    elif kind == "malicious":
        path.write_bytes(pickle.dumps(Bomb()))
    else:
        path.write_bytes((quick / "student.pt").read_bytes())
    before = path.read_bytes()
    assert "base.pt" in refused(*QUICK, f"--out={tmp_path}")
    assert path.read_bytes() == before and not (Path(__file__).parent / "bomb_went_off").exists()


def test_full_disk(quick, tmp_path, refused):
    """A write that fails half-way takes the checkpoint before it along. The limit on a file's size stands in for a disk
    that is full: there is room for base.pt, but not for what the next stage saves."""
    copy(quick, tmp_path, "base.pt", "log.jsonl", "results.json")
    before, (_, hard) = (quick / "base.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before), hard))
    try:
        line = refused(*QUICK, "--stage=zero", f"--out={tmp_path}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert "cannot write" in line and "intact" in line
    assert not list(tmp_path.glob("*.tmp")) and (tmp_path / "base.pt").read_bytes() == before
    assert main([*QUICK, "--stage=zero", f"--out={tmp_path}"]) == 0
    assert weights_equal(quick / "zero.pt", tmp_path / "zero.pt")


def test_a_file_is_whole_or_as_before(tmp_path, monkeypatch):
    """A file that is written in place is half a file if the power fails meanwhile."""
    path, replace = tmp_path / "base.pt", os.replace
    path.write_bytes(b"before")
    seen = []
    monkeypatch.setattr(os, "replace", lambda *args: (seen.append(path.read_bytes()), replace(*args)))
    run.write_file(path, b"after")
    assert seen == [b"before"] and path.read_bytes() == b"after" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name, content, words", [
    ("log.jsonl", "dear diary\n", "not a nanoR1 log"), ("results.json", "[1, 2]", "not a nanoR1 run's"),
    ("results.json", '{"config": {', "not a nanoR1 run's")])
def test_foreign_files_are_kept(tmp_path, refused, name, content, words):
    """A file that happens to have the name of one of ours is overwritten."""
    (tmp_path / name).write_text(content)
    assert words in refused(*QUICK, f"--out={tmp_path}")
    assert (tmp_path / name).read_text() == content


# The lock


@contextlib.contextmanager
def paused_run(out, *args):
    """A run in a process of its own, stopped by SIGSTOP in the stage zero -> the process, which is killed at the end."""
    process = subprocess.Popen([sys.executable, "train.py", *args, f"--out={out}"], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        while not (out / "log.jsonl").exists() or not any(row["stage"] == "zero" for row in rows(out)):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.002)
        process.send_signal(signal.SIGSTOP)
        yield process
    finally:
        process.kill()
        process.communicate()


def test_two_runs_on_one_out(quick, tmp_path, refused, capfd):
    """Two runs that write over each other's files; a lock that keeps --ask or another --out waiting, or that a killed run
    leaves behind. The first run is stopped, so that nothing but a second one can change its files."""
    out, other = tmp_path / "out", tmp_path / "other"
    copy(quick, out, "base.pt")
    with paused_run(out, *QUICK) as process:
        before = {path: path.read_bytes() for path in out.iterdir()}
        assert "another run is writing" in refused(*QUICK, f"--out={out}")
        assert "another run is writing" in refused(*QUICK, "--stage=zero", "--rl_steps=4", f"--out={out}")
        assert before == {path: path.read_bytes() for path in out.iterdir()}
        copy(quick, other, "base.pt")
        assert main([*QUICK, "--stage=base", f"--out={other}"]) == 0
        capfd.readouterr()
        assert main(["--ask=8*7-19", f"--out={out}"]) == 0
        assert capfd.readouterr().out.startswith("8*7-19 = 37\nbase ")
        assert process.poll() is None and before == {path: path.read_bytes() for path in out.iterdir()}
        process.kill()
        process.wait()
        assert main([*QUICK, "--stage=zero", f"--out={out}"]) == 0
    assert weights_equal(quick / "zero.pt", out / "zero.pt")


# One loop for all stages


def test_every_step_and_rank_draws_its_own(monkeypatch):
    """Two steps, stages or ranks that sample the same: half of the work is then wasted, and nothing else shows it."""
    def draws(rank, name="zero", step=1, seed=0):
        monkeypatch.setattr(run, "rank", lambda: rank)
        rng, generator = seeded(Config(seed=seed, device="cpu"), name, step)
        return rng.random(), torch.rand(3, generator=generator).tolist()

    found = [draws(0), draws(1), draws(2), draws(0, step=2), draws(0, name="student"), draws(0, seed=1),
             draws(1, step=2)]
    assert len({numbers for numbers, _ in found}) == len({str(numbers) for _, numbers in found}) == len(found)
    assert draws(0) == found[0] and draws(1) == found[1]


def test_learning_rate_schedule():
    """A schedule that begins or ends at 0, which wastes a step, or that never reaches the rate that was set."""
    for steps in (1, 7, 100):
        for hold in (0.0, 0.4):
            found = [lr_schedule(step, steps, hold) for step in range(1, steps + 1)]
            assert all(0 < scale <= 1 for scale in found) and max(found) > 0.9 and found[-1] == min(found[steps // 2:])


def test_killed_run_goes_on(quick, tmp_path, capfd):
    """SIGKILL or Ctrl-C at a random moment of every stage of one run loses the optimizer's state, doubles rows of the
    log, or tears a file; or something draws from a generator that nobody seeded. The run must end as another one did
    that was left alone."""
    assert not weights_equal(quick / "base.pt", quick / "zero.pt"), "RL must have had something to learn"
    lengths = {name: sum(row["stage"] == name for row in rows(quick)) for name in NAMES}
    log, printed = tmp_path / "log.jsonl", ""
    for stage, steps in lengths.items():
        # A shell that starts the tests in the background has them ignore Ctrl-C, and so would the run.
        process = subprocess.Popen([sys.executable, "train.py", *QUICK, f"--out={tmp_path}"], cwd=ROOT, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        reached = f'{{"stage": "{stage}", "step": {random.randint(2, steps // 2)},'  # step 1 has been saved then
        while not (log.exists() and reached in log.read_text()):
            assert process.poll() is None, f"the run ended before it could be killed: {process.stderr.read()}"
            time.sleep(0.002)
        time.sleep(random.random() * 0.005)
        process.send_signal(signal.SIGINT if stage == "student_base" else signal.SIGKILL)
        stdout, stderr = process.communicate()
        printed += stdout
        if stage == "student_base":
            assert process.returncode == 130, stderr
            assert stderr == "\ntrain.py: interrupted; the same command goes on from the last checkpoint\n"
    capfd.readouterr()
    assert main([*QUICK, f"--out={tmp_path}"]) == 0
    printed += capfd.readouterr().out
    went_on = dict(re.findall("^([a-z_]+): going on after step ([0-9]+)", printed, re.MULTILINE))
    assert list(went_on) == NAMES and all(int(step) > 0 for step in went_on.values())
    for name in NAMES:
        assert weights_equal(quick / f"{name}.pt", tmp_path / f"{name}.pt"), name
    assert results(quick)["models"] == results(tmp_path)["models"]
    assert [(r["stage"], r["step"]) for r in rows(quick)] == [(r["stage"], r["step"]) for r in rows(tmp_path)]


def test_not_a_number_stops_the_run(tmp_path, refused):
    """A run that goes on for hours on NaN. A learning rate that no model survives brings it about."""
    line = r"at step (\d+); the last good checkpoint is \S+resume.pt, step (\d+)"
    step, saved = re.search(line, refused(*QUICK, "--base_adam_lr=1e30", f"--out={tmp_path}")).groups()
    assert int(saved) == int(step) - 1 == torch.load(tmp_path / "resume.pt", weights_only=True)["step"]


def test_one_stage_at_a_time(quick, tmp_path, refused):
    """--stage that trains something else on the way, or that does not find what the stage before left."""
    assert "base.pt is missing" in refused(*QUICK, "--stage=zero", f"--out={tmp_path / 'empty'}")
    copy(quick, tmp_path, "base.pt")
    assert main([*QUICK, "--stage=zero", f"--out={tmp_path}"]) == 0
    assert (tmp_path / "zero.pt").exists() and not (tmp_path / "student_base.pt").exists()


# The machine


def test_compiling_is_settled_by_trying(capsys):
    """A laptop without a C++ compiler: a traceback of a hundred lines in the middle of the run."""
    cfg = Config(device="cpu", dtype="float32", threads=1)
    with torch._inductor.config.patch("cpp.cxx", ("no-such-compiler",)):
        assert settle(cfg, {}).compile == "off"
    printed = capsys.readouterr().out
    assert printed.count("\n") == 2 and printed.startswith("trying out torch.compile\n") and "goes without" in printed


def test_a_compiled_block_is_the_same_block(make_gpt):
    """A compiler's pass that differs from the one that samples, or that is compiled again for each size of a batch."""
    plain, model, cfg = make_gpt(), make_gpt(), Config(device="cpu", compile="on", micro_batch=4_096)
    compiled(model, cfg, training=True)
    with torch.compiler.set_stance("fail_on_recompile"):
        for shape in ((3, 20), (85, 48), (2, 3)):
            idx = torch.randint(11, shape)
            for gpt in (plain, model):
                gpt.zero_grad()
                token_logprobs(gpt, idx).sum().backward()
            assert torch.allclose(model(idx), plain(idx), atol=1e-4)
            for p, expected in zip(model.parameters(), plain.parameters()):
                assert torch.allclose(p.grad, expected.grad, rtol=1e-3, atol=1e-3)


def test_compiled_sampling_is_the_same_distribution(make_gpt):
    """The compiled step has another attention, padding or rotation than training, keeps the weights from before an
    update, or is compiled again for each batch size, length or model."""
    plain, cfg, prompts = make_gpt(), Config(device="cpu", compile="on", micro_batch=4_096), [[1], [2, 3, 4], [5, 6]]
    for model in (compiled(make_gpt(), cfg, sampling=True), compiled(make_gpt(seed=1), cfg, sampling=True)):
        with torch.no_grad():
            for p, other in zip(model.parameters(), plain.parameters()):
                p.copy_(other)
        for samples, new in ((5, 30), (100, 12)):
            with torch.compiler.set_stance("fail_on_recompile"):
                completions, logp = generate(model, prompts, new, eos_id=0, samples=samples, return_logprobs=True,
                                             generator=torch.Generator().manual_seed(0))
            assert len({len(c) for c in completions}) > 3, "rows must leave at different times"
            for i, (completion, found) in enumerate(zip(completions, logp)):
                prompt = prompts[i // samples]
                expected = token_logprobs(plain, torch.tensor([prompt + completion]))[0, len(prompt) - 1:]
                assert torch.allclose(torch.tensor(found), expected, atol=1e-4)
    greedy = [generate(gpt, prompts, 20, eos_id=0, temperature=0) for gpt in (model, plain)]
    assert greedy[0] == greedy[1]


def test_ctrl_c_while_saving_is_no_full_disk(tmp_path):
    """torch.save ends its file when it is interrupted, and fails at that, too: the run would say that it cannot write."""
    path = tmp_path / "base.pt"
    path.write_bytes(b"old")

    class Interrupting:
        """A stage's name that is interrupted while it is pickled."""
        def __reduce__(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.save_checkpoint(path, {"nanor1": 1, "stage": Interrupting()})

    def failing(content, file):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise RuntimeError("unexpected pos")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", failing)
        run.save_checkpoint(path, {})
    assert path.read_bytes() == b"old" and not list(tmp_path.glob("*.tmp"))
