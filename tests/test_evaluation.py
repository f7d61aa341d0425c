"""The evaluation on held-out problems, the report, --ask and --evaluate."""
import json
import re
import statistics
from types import SimpleNamespace

import pytest
import torch

from data import arithmetic
from data.arithmetic import Arithmetic
from data.countdown import parse as parse_countdown
from data.tokenizer import get_tokenizer
from engine import evaluation
from engine.evaluation import QUICK_PROBLEMS, QUICK_SAMPLES, evaluate, heldout_accuracy, majority, majority_is_correct
from engine.files import build_model, load_checkpoint
from engine.report import report
from engine.speed.sampler import Sampler
from rewards import accuracy_reward, extract_answer, format_reward, reflects
from tests.conftest import NAMES, QUICK, copy, main, results
from train import STAGES, Config

ENCODING = get_tokenizer()


def model_of(out, name):
    """The model of a finished stage, with the sampler that a run gives it."""
    model = build_model(load_checkpoint(out / f"{name}.pt"))
    model.generate = Sampler(model)
    return model


# Evaluation


@pytest.mark.parametrize("answers, expected", [
    (["7", "3", "3"], "3"), (["7", "3", "3", "7"], "7"), ([None, None, None, "3"], "3"), ([None, None], None),
    ([], None)])
def test_majority(answers, expected):
    """Answers that cannot be parsed must not win the vote, and in a tie the first answer must win."""
    assert majority(answers) == expected


def test_a_majority_is_one_of_equal_answers():
    """Equal answers in different spellings must not split their votes, and the vote must not be compared as text."""
    problem = parse_countdown("3 4 7 = 25")
    answers = ["3*7+4"] * 2 + ["4+7*3"] * 2 + ["3+4+7"] * 3
    texts = [f"<think>?</think><answer>{answer}</answer>" for answer in answers] + ["3+4+7"] * 9
    assert majority_is_correct(problem, texts) and not majority_is_correct(problem, texts[3:])
    assert not majority_is_correct(problem, ["3*7+4"])


class Lenient(arithmetic.Problem):
    """A problem for which an answer is correct if it is even or odd as it should be. The small model of the quick run
    is never exactly correct, but it is sometimes correct in this way."""
    def check(self, answer):
        return answer[-1:] in ("02468" if self.answer in "02468" else "13579")


class Scripted:
    """A model whose answers vary so much that all metrics differ."""
    def generate(self, prompts, max_new_tokens, *, stop_ids, samples, generator):
        def draw(high, n):
            return torch.randint(high, (n,), generator=generator).tolist()

        completions = []
        for odd in draw(2, len(prompts)):  # a prompt gets mostly even answers, or mostly odd ones
            for thought, number, end in zip(draw(4, samples), draw(9, samples), draw(5, samples)):
                answer = 2 * number + odd if number < 6 else number
                text = f"<think>{('so', 'wait', 'so', '')[thought]}</think><answer>{answer}</answer>{'.' * (end == 4)}"
                if end == 3:
                    text = "12" * max_new_tokens  # cut off
                completions.append([*ENCODING.encode_ordinary(text), stop_ids[0]][:max_new_tokens])
        return completions, [[0.0] * len(completion) for completion in completions]


@pytest.mark.parametrize("author", ("zero", "scripted"))
def test_evaluation_counts_what_was_sampled(quick, author):
    """The standard error must not be over samples instead of problems, a vote must not be over the wrong rows, and the
    length must include the stop token. The test computes every metric again from the same samples."""
    model = model_of(quick, "zero") if author == "zero" else Scripted()

    def sample(problems, generator):
        completions, _ = model.generate([ENCODING.encode_ordinary(p.prompt) for p in problems], 40, samples=16,
                                        stop_ids=(ENCODING.eot_token,), generator=generator)
        return [(ENCODING.decode([t for t in row if t != ENCODING.eot_token]), len(row)) for row in completions]

    problems = [Lenient(f"{a}-{b}", str(b)) for a in range(1, 6) for b in range(1, 9)]  # more than one batch of 32
    found = evaluate(model, problems, Arithmetic(), max_new_tokens=40, generator=torch.Generator().manual_seed(3))

    generator = torch.Generator().manual_seed(3)
    texts, lengths = zip(*(sample(problems[:32], generator) + sample(problems[32:], generator)))
    groups = [texts[i:i + 16] for i in range(0, len(texts), 16)]
    right = [[accuracy_reward(text, problem) for text in group] for group, problem in zip(groups, problems)]
    means = [sum(row) / 16 for row in right]
    votes = 0
    for group, problem in zip(groups, problems):
        answers = [a for a in map(extract_answer, group) if a is not None]
        votes += bool(answers) and problem.check(max(answers, key=answers.count))
    assert len(texts) == 640 and len(set(texts)) > 50
    assert found == pytest.approx({
        "pass@1": statistics.mean(means), "pass@1_se": statistics.stdev(means) / 40**0.5, "maj@16": votes / 40,
        "pass@16": sum(map(any, right)) / 40, "format": statistics.mean(map(format_reward, texts)),
        "length": statistics.mean(lengths), "reflection": statistics.mean(map(reflects, texts)), "n_problems": 40})
    if author == "scripted":
        assert 0 < statistics.mean(means) < 1 and 0 < votes < 40
        kinds = [found[key] for key in ("pass@1", "maj@16", "pass@16", "format", "reflection")]
        assert len(set(kinds)) == 5 and all(0 < value for value in kinds)


def test_what_a_reward_measures_besides_is_evaluated():
    """The evaluation must include the other scores that a task's reward returns, but not its "reward", which is not a
    metric."""
    class Counting(Arithmetic):
        def reward(self, completion, problem):
            return {"reward": 7.0, "accuracy": 0.0, "waits": float(completion.count("wait")), "reflection": 9.0}

    problems = [arithmetic.parse(f"{n}+1") for n in range(1, 6)]
    found = evaluate(Scripted(), problems, Counting(), max_new_tokens=40, generator=torch.Generator().manual_seed(0))
    assert set(found) == {"pass@1", "pass@1_se", "maj@16", "pass@16", "format", "length", "reflection", "waits",
                          "n_problems"}
    assert found["waits"] == found["reflection"] > 0, "reflection is read from the text"
    assert found["format"] > 0 == found["pass@1"]


def test_a_quick_evaluation_asks_other_problems_than_the_report(monkeypatch):
    """The quick evaluation chooses the model that NAME_best.pt keeps. It must not use the problems of the report, or so
    many problems that RL has to wait."""
    asked, task = [], Arithmetic()

    def sample(model, problems, reward_fn, task, samples, max_new_tokens, generator):
        asked.append((model, [problem.question for problem in problems], samples, max_new_tokens, generator))
        right = [float(i % 4 == 0) for i in range(len(problems) * samples)]
        return SimpleNamespace(column=lambda name: torch.tensor(right))

    monkeypatch.setattr(evaluation, "sample_rollout", sample)
    cfg = Config(seed=5)
    assert heldout_accuracy("policy", task, cfg, "generator") == 0.25
    assert heldout_accuracy("policy", task, Config(seed=5, eval_problems=3), "generator") == 0.25
    (*who, questions, samples, budget, generator), (_, few, *_) = ((m, q, s, n, g) for m, q, s, n, g in asked)
    assert (*who, samples, budget, generator) == ("policy", QUICK_SAMPLES, cfg.rl_max_new_tokens, "generator")
    assert len(questions) == QUICK_PROBLEMS and len(few) == 3
    reported = {problem.question for problem in task.heldout_problems(cfg.eval_problems, "test", cfg.seed)}
    assert len(set(questions) & reported) < QUICK_PROBLEMS / 2


@pytest.mark.parametrize("device, init, n_params, compiles, size", (
    ("cpu", "", 469_824, True, 32), ("cpu", "", 86_416, False, 32), ("cuda", "", 469_824, False, 256),
    ("cpu", "folder", 10**8, True, 8)))
def test_how_a_stage_is_evaluated(monkeypatch, device, init, n_params, compiles, size):
    """Compiling takes longer than the evaluation of a small model. Many problems at a time need more memory than a
    pretrained model leaves free, and few problems at a time do not use a GPU fully."""
    seen = []
    monkeypatch.setattr(evaluation, "make_fast", lambda model, cfg, sampling: seen.append(sampling) or model)
    monkeypatch.setattr(evaluation, "evaluate", lambda model, problems, task, *, max_new_tokens, generator, size:
                        seen.append((len(problems), max_new_tokens, generator, size)) or {"pass@1": 0.5, "format": 1.0})
    found = {"models": {}, "seconds": {}}
    run = SimpleNamespace(cfg=Config(device=device, init=init, eval_problems=7), task=Arithmetic(), results=found,
                          load_model=lambda name: SimpleNamespace(n_params=lambda: n_params), save_results=lambda: None,
                          seeded=lambda number, name: (None, f"{number} {name}"))
    evaluation.evaluate_stage(run, "zero")
    assert seen == [compiles, *((7, 80, f"0 evaluate zero {kind}", size) for kind in ("test", "hard"))]
    figures = {"pass@1": 0.5, "format": 1.0}
    assert found["models"] == {"zero": {"params": n_params, "test": figures, "hard": figures}}
    assert list(found["seconds"]) == ["evaluate zero"]


# The report


def test_report_and_results(quick, tmp_path, capsys):
    """The report must show the numbers of results.json, and no documented key may be missing."""
    copy(quick, tmp_path, *(f"{name}.pt" for name in NAMES), "log.jsonl", "results.json")
    capsys.readouterr()
    assert main([*QUICK, f"--out={tmp_path}"]) == 0
    found, stdout = results(tmp_path), capsys.readouterr().out
    assert set(found) == {"config", "seconds", "models"}
    assert set(found["models"]) == set(NAMES) and set(NAMES) <= set(found["seconds"])
    assert found["config"].keys() == vars(Config()).keys()
    for model in found["models"].values():
        for kind in ("test", "hard"):
            assert set(model[kind]) == {"pass@1", "pass@1_se", "maj@16", "pass@16", "format", "length", "reflection",
                                        "n_problems"}
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert text in stdout
    for name, model in found["models"].items():
        for kind in ("test", "hard"):
            row, = (line for line in text.splitlines() if [x.strip() for x in line.split("|")][:2] == [name, kind])
            m = model[kind]
            assert [cell.strip() for cell in row.split("|")] == [
                name, kind, f"{m['pass@1']:.1%} ± {m['pass@1_se']:.1%}", f"{m['maj@16']:.1%}", f"{m['pass@16']:.1%}",
                f"{m['format']:.1%}", f"{m['length']:.1f}", f"{m['reflection']:.1%}"]
            assert f"{name} {model['params']:,}" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80  # or it wraps in a narrow terminal
    assert "accuracy over 5 RL steps" in text and "seed 0" in text
    assert found["models"]["student"]["params"] * 2 < found["models"]["zero"]["params"]


def finished(out, models, log):
    """A run for the report. `models` has the pass@1 of each model, and `log` has (stage, accuracy) for each row."""
    figures = dict.fromkeys(("pass@1_se", "maj@16", "pass@16", "format", "length", "reflection"), 0.5)
    rows = ({"stage": stage, "accuracy": accuracy, "length": 9, "no_signal": 0} for stage, accuracy in log)
    (out / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {"models": {name: {"params": 7, "test": {"pass@1": rate, **figures}} for name, rate in models.items()},
             "seconds": {"zero": 60.0}}
    return SimpleNamespace(results=found, stages=STAGES, out=out, task=SimpleNamespace(held_out=("test",)),
                           cfg=SimpleNamespace(device="cpu", dtype="float32", threads=1, seed=3))


def test_the_report_is_in_the_order_of_the_stages(tmp_path):
    """A model that was evaluated late must not come last, a model of another program must not be left out, and a run
    without RL must have a report."""
    text = report(finished(tmp_path, {"student": 0.3, "shuffled": 0.4, "zero": 0.2, "base": 0.1}, []))
    rates = re.findall(r"^(\w+) *\|test *\| *([0-9.]+)%", text, re.MULTILINE)
    assert rates == [("base", "10.0"), ("zero", "20.0"), ("student", "30.0"), ("shuffled", "40.0")]
    assert "Parameters: base 7, zero 7, student 7, shuffled 7." in text and "RL steps" not in text
    assert "together 1.0 minutes on cpu, float32, 1 x 1 threads, seed 3" in text


def test_the_curve_is_that_of_the_first_stage_of_rl(tmp_path):
    """The rows of several RL stages must not make one curve. A control must not take zero's place, even if zero was
    trained again and has its rows later in the log."""
    log = [("shuffled", 0.9), ("shuffled", 0.8), ("zero", 0.1), ("zero", 0.2), ("zero", 0.3)]
    text = report(finished(tmp_path, {"zero": 0.2}, log))
    assert re.search("accuracy over 3 RL steps +0.10 .* 0.30\n", text) and text.count("RL steps") == 2


# --ask and --evaluate


def test_ask_shows_models_side_by_side(quick, capsys):
    """--ask must not leave out a model, show the answer of another model, or accept a text that is not a problem."""
    assert main(["--ask=8*7-19", f"--out={quick}"]) == 0
    first, *others = capsys.readouterr().out.splitlines()
    assert first == "8*7-19 = 37" and [line.split()[0] for line in others] == NAMES
    for name, line in zip(NAMES, others):
        prompt = ENCODING.encode_ordinary("User: 8*7-19\nAssistant: ")
        (ids,), _ = build_model(load_checkpoint(quick / f"{name}.pt")).generate([prompt], 40, temperature=0,
                                                                                stop_ids=(ENCODING.eot_token,))
        text = ENCODING.decode([i for i in ids if i != ENCODING.eot_token])
        assert line.split()[1] == "wrong" and " ".join(text.split()) in line


@pytest.mark.parametrize("text", ("hello", "__import__('os')", "", "99**99", "8*7-19; 1"))
def test_ask_refuses_what_is_no_problem(quick, refused, text):
    """The text of --ask must not be executed, or end in a traceback."""
    assert "no expression" in refused(f"--ask={text}", f"--out={quick}")


def test_ask_says_what_is_right(quick, capsys, monkeypatch):
    """A correct answer must not be shown as wrong, or a wrong one as correct."""
    monkeypatch.setattr(Arithmetic, "reward", staticmethod(lambda text, problem: {"accuracy": problem.answer == "37"}))
    for question, verdict in (("8*7-19", "right"), ("8*7", "wrong")):
        assert main([f"--ask={question}", f"--out={quick}"]) == 0
        assert [line[14:19] for line in capsys.readouterr().out.splitlines()[1:]] == [verdict] * 4


def test_several_answers_are_sampled(quick, capsys):
    """--samples must not repeat the most likely answer, and --temperature must not be ignored."""
    def ask(*args):
        torch.manual_seed(0)
        assert main(["--ask=8*7-19", *args, f"--out={quick}"]) == 0
        return capsys.readouterr().out.splitlines()[1:]

    likeliest, several, cold = ask(), ask("--samples=3"), ask("--samples=3", "--temperature=0")
    assert [line.split()[0] for line in several] == [name for name in NAMES for _ in range(3)]
    assert all(len(set(several[i:i + 3])) > 1 for i in range(0, 12, 3))
    assert cold == [line for line in likeliest for _ in range(3)]
    assert ask("--temperature=1") != likeliest


def test_every_model_of_a_folder_answers(quick, tmp_path, capfd, refused):
    """--ask must show a control's model beside those of train.py, and must not use a file that is not a finished
    model."""
    copy(quick, tmp_path, "base.pt", "zero.pt")
    for name, stage in (("shuffled", "shuffled"), ("resume", "zero"), ("zero_best", "zero")):
        torch.save(load_checkpoint(quick / "zero.pt") | {"stage": stage}, tmp_path / f"{name}.pt")
    assert main(["--ask=8*7-19", f"--out={tmp_path}"]) == 0
    lines = capfd.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == ["base", "zero", "shuffled"]
    assert lines[1].removeprefix("zero") == lines[2].removeprefix("shuffled").rjust(len(lines[1]) - 4)
    (tmp_path / "base.pt").unlink(), (tmp_path / "zero.pt").unlink()
    assert main(["--ask=8*7-19", f"--out={tmp_path}"]) == 0, "a folder may hold a control alone"
    assert len(capfd.readouterr().out.splitlines()) == 2
    assert "no model" in refused("--ask=8*7-19", f"--out={tmp_path / 'nothing'}")


def test_evaluate_takes_other_problems_and_trains_nothing(quick, tmp_path, capfd, refused):
    """--evaluate must not change the run, count problems that do not fit, or leave out a model of the folder."""
    path, before = tmp_path / "sums.jsonl", {path: path.read_bytes() for path in quick.iterdir()}
    long = json.dumps({"prompt": "1" * 90, "answer": "1"})
    path.write_text("".join(json.dumps({"prompt": f"{n}+1", "answer": n + 1}) + "\n" for n in range(5)) + long)
    assert main([f"--evaluate={path}", f"--out={quick}"]) == 0
    first, left_out, _, *lines = capfd.readouterr().out.splitlines()
    assert first == f"{path}: 5 problems"
    assert left_out.startswith(f"{path}: 1 problems left out, the first in line 6: empty, repeated, over {128 - 40} ")
    assert [line.split("|")[0].strip() for line in lines] == ["model", "-" * 12, *NAMES]
    assert all(line.split("|")[1].strip() == "sums" for line in lines[2:])
    path.write_text(f'{{"prompt": "1+1", "answer": 2}}\n{long}')
    assert "at least 2 problems" in refused(f"--evaluate={path}", f"--out={quick}")
    path.write_text("1+1")
    assert "line 1: not JSON" in refused(f"--evaluate={path}", f"--out={quick}")
    assert "no model" in refused(f"--evaluate={path}", f"--out={tmp_path / 'nothing'}")
    assert before == {path: path.read_bytes() for path in quick.iterdir()}
