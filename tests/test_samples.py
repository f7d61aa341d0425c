"""The samples that a run keeps, and how they are shown."""
import json
import math
from types import SimpleNamespace

import pytest
import torch

import engine.progress
import engine.samples
import samples
from data.arithmetic import Arithmetic
from data.tokenizer import get_tokenizer
from engine.samples import likeliest_tokens, token_text
from grpo import Rollout, group_advantages
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
        keys = ("completions", "advantages", "logprobs", "tokens", "likeliest")
        assert row.keys() == {"stage", "step", "model", "question", "rewards", *keys}
        assert [len(row[key]) for key in keys] == [8] * 5
        for i, text in enumerate(row["completions"]):
            found = {key: values[i] for key, values in row["rewards"].items()}
            assert {key: found[key] for key in ("accuracy", "format")} == {
                key: value for key, value in TASK.reward(text, problem).items() if key != "reflection"}
            assert all(logp <= 0 for logp in row["logprobs"][i])
            check_tokens(text, row["tokens"][i], row["logprobs"][i], row["likeliest"][i])
        rewards = torch.tensor([row["rewards"]["reward"]])
        assert torch.allclose(torch.tensor([row["advantages"]]), group_advantages(rewards), atol=1e-4)


def check_tokens(text, tokens, logprobs, likeliest):
    """The tokens must be those of the completion, and the probabilities those that the sampler drew from."""
    end = tokens[-1] == "<|endoftext|>"
    if not any("\\x" in token for token in tokens):  # bytes that are no text by themselves
        assert "".join(tokens[:-1] if end else tokens) == text
    assert end or len(tokens) == 40
    for token, logp, top in zip(tokens, logprobs, likeliest, strict=True):
        assert len(top) == 5 and [*top.values()] == sorted(top.values(), reverse=True) and sum(top.values()) < 1.003
        assert abs(top.get(token, 0) - math.exp(logp)) < 0.002 or math.exp(logp) < min(top.values()) + 0.002


@pytest.mark.parametrize("max_tokens, logits_at_a_time", ((0, 2**24), (40, 2**24), (0, 50), (40, 1)))
def test_the_likeliest_tokens(make_gpt, monkeypatch, max_tokens, logits_at_a_time):
    """The pieces must not mix up positions or answers. The faster methods of a run must not be called: they remember
    sizes, so looking at samples would change how training is rounded."""
    model = make_gpt(vocab_size=256)
    monkeypatch.setattr(engine.samples, "LOGITS_AT_A_TIME", logits_at_a_time)
    expected = []
    prompts, completions = [[1, 2], [3], [4, 5, 6, 7]], [[65], [66, 67, 68, 200, 5], [69, 70]]
    for prompt, completion in zip(prompts, completions):
        logits = model(torch.tensor([prompt + completion]))[0, len(prompt) - 1:-1]
        expected.append([dict(zip(map(chr, ids), p)) for p, ids in ((each.values.tolist(), each.indices.tolist())
                         for each in map(lambda row: row.softmax(-1).topk(5), logits))])
    for name in ("hidden", "logits", "logprobs", "generate"):
        monkeypatch.setattr(model, name, None)
    rollout = Rollout(prompts, completions, [[0.0] * len(each) for each in completions], [], [], [])
    found = likeliest_tokens(model, rollout, SimpleNamespace(decode=lambda ids, errors: chr(ids[0])), max_tokens)
    assert [[[*top] for top in each] for each in found] == [[[*top] for top in each] for each in expected]
    assert all(abs(p - q) < 0.001 for each, others in zip(found, expected) for top, other in zip(each, others)
               for p, q in zip(top.values(), other.values()))


def test_each_token_has_a_text_of_its_own():
    """Half of an "é" is no text. If it were shown as the replacement character, other bytes would be, too."""
    encoding = get_tokenizer()
    texts = [token_text(encoding, i) for i in range(encoding.n_vocab)]
    assert len(set(texts)) == encoding.n_vocab
    assert [token_text(encoding, i) for i in encoding.encode_ordinary("é<think>")] == ["\\xc3", "\\xa9", "<think>"]


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
