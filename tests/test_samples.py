"""The samples that a run keeps, and how they are shown."""
import json

import pytest
import torch

import engine.progress
import samples
from data.arithmetic import Arithmetic
from grpo import group_advantages
from tests.conftest import QUICK, copy, main, weights_equal

TASK = Arithmetic()


def kept(out):
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


def test_what_is_kept(quick):
    """The steps must be the stated ones, the problems must not change during a stage, and rewards must belong to their
    answers."""
    rows = kept(quick)
    assert sorted({(row["stage"], row["model"], row["step"]) for row in rows}) == [
        *(("student", "student", step) for step in (0, 1, 2, 5, 9)), ("student", "teacher", 0),
        *(("zero", "zero", step) for step in (0, 1, 2, 5))]
    for stage in ("zero", "student"):
        of = [row for row in rows if row["stage"] == stage]
        asked = [row["question"] for row in of[:4]]
        assert [row["question"] for row in of] == asked * (len(of) // 4)
    for row in rows:
        problem = TASK.parse(row["question"])
        assert [len(row[key]) for key in ("completions", "advantages", "logprobs")] == [8] * 3
        for i, text in enumerate(row["completions"]):
            found = {key: values[i] for key, values in row["rewards"].items()}
            assert {key: found[key] for key in ("accuracy", "format")} == {
                key: value for key, value in TASK.reward(text, problem).items() if key != "reflection"}
            assert all(logp <= 0 for logp in row["logprobs"][i])
        rewards = torch.tensor([row["rewards"]["reward"]])
        assert torch.allclose(torch.tensor([row["advantages"]]), group_advantages(rewards), atol=1e-4)


def test_a_killed_run_keeps_no_row_twice(quick, tmp_path, monkeypatch):
    """A resumed run must not keep the rows of its first attempt twice, or draw other samples. Keeping samples must not
    change the run."""
    copy(quick, tmp_path, "base.pt")
    steps = []

    def killed(path, content, save=engine.progress.save_checkpoint):
        save(path, content)
        steps.append(content["step"])
        if content["step"] == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(engine.progress, "save_checkpoint", killed)
    assert main([*QUICK, "--stage=zero", f"--out={tmp_path}"]) == 130
    monkeypatch.undo()
    rows = kept(tmp_path)
    later = [{**row, "step": 5} for row in rows if row["step"] == 2]  # as if from an attempt that got further
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows + later))
    assert main([*QUICK, "--stage=zero", f"--out={tmp_path}"]) == 0
    assert kept(tmp_path) == [row for row in kept(quick) if row["stage"] == "zero"]
    assert weights_equal(quick / "zero.pt", tmp_path / "zero.pt")


@pytest.mark.parametrize("terminal, no_color, coloured", ((True, "", True), (True, "1", False), (False, "", False)))
def test_what_is_printed(quick, capsys, monkeypatch, terminal, no_color, coloured):
    """A line must not be wider than a terminal, and a pipe must not get colours."""
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
    assert samples.main([f"--out={quick}", "--problem=2"]) == 0
    printed = capsys.readouterr().out
    assert ("\033[" in printed) == coloured
    question = kept(quick)[1]["question"]
    assert printed.startswith(question) and "zero step 0: mean reward" in printed and "zero step 5" in printed
    if not coloured:
        assert max(map(len, printed.splitlines())) <= 80


@pytest.mark.parametrize("args, words", (("--out=nowhere", "run python train.py first"), ("--problem=5", "at most 4"),
                                         ("--stage=base", "no such problem"), ("--answers=0", "above 0")))
def test_bad_input(quick, capsys, args, words):
    """A mistake must not end in a traceback."""
    assert samples.main([*([] if "out" in args else [f"--out={quick}"]), args]) == 2
    printed = capsys.readouterr()
    assert words in printed.err and printed.err.count("\n") == 1 and not printed.out
