"""The task with two languages, its reward, and the further stages of R1."""
import random
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

import r1
from data.arithmetic import is_test
from data.bilingual import (STEPS, Bilingual, Everyday, Problem, everyday, everyday_answer, in_symbols, in_words,
                            language_reward)
from data.tokenizer import END_OF_TEXT, get_tokenizer
from engine.arguments import Program, parse_args
from engine.command import run_command
from engine.settings import settings_of, shaped_by
from engine.tasks import make_task
from r1 import Config
from rewards import rule_rewards
from tests.conftest import QUICK, ROOT, results, rows, weights_equal

TASK = Bilingual()
PROGRAM = Program(r1.STAGES, Config, r1.__doc__, make_task, "r1.py")
SYMBOLS, WORDS = (Problem("8*7-19", "37", words=False), Problem("8 times 7 minus 19", "37", words=True))


def complete(thought: str, answer: str = "37") -> str:
    return f"<think>{thought}</think><answer>{answer}</answer>"


# The reward


@pytest.mark.parametrize("thought, symbols, words", (
    ("8*7=56, 56-19=37", 1, 0), ("8 times 7 is 56, 56 minus 19 is 37", 0, 1), ("8*7=56, 56 minus 19 is 37", 0.5, 0.5),
    ("8*7=54, wait, 8*7=56, 56-19=37", 1, 0), ("3-10=-7, -7*2=-14", 1, 0), ("3 minus 10 is -7", 0, 1),
    ("8*7 is 56", 0, 0), ("8 times 7=56", 0, 0), ("8*7=56 is 56", 0, 0), ("8*7=56 56-19=37", 0, 0),  # both in one step
    ("so", 0, 0), (", , ,", 0, 0), ("wait, hmm, wait", 0, 0),  # no steps
    ("8*7=56, " * 1000, 0, 0), ("8*7=56, 8*7=56, 8*7=56", 0, 0), ("8*7=56, 8*7=56", 1, 0),  # repetition
    ("8*7=56, 7, 56-19=37", 2 / 3, 0), ("٨*٧=٥٦", 0, 0), ("8*7=56, eight times seven", 1, 0),
    ("8*7=56\n, 56-19=37 ", 1, 0), ("8*7=", 0, 0), ("=56", 0, 0), ("--8*7=56", 0, 0), ("8+-7=1", 1, 0),
))
def test_the_share_of_steps_in_the_questions_language(thought, symbols, words):
    """A thought must not be paid if it has no steps, two languages in one step, or one step over and over."""
    for problem, share in ((SYMBOLS, symbols), (WORDS, words)):
        assert language_reward(complete(thought), problem.in_language) == pytest.approx(share)


def test_what_stands_outside_the_thought_has_no_language():
    """The other language in the answer must not cost the reward, and the correct language there must not earn it."""
    for answer in ("37", "56 minus 19 is 37", "56-19=37"):
        assert language_reward(complete("8*7=56", answer), SYMBOLS.in_language) == 1
        assert language_reward(complete("so", answer), SYMBOLS.in_language) == 0


@pytest.mark.parametrize("completion", ("8*7=56", "<think>8*7=56</think>", complete("8*7=56") + ".", "",
                                        complete("8*7=56").replace("</think>", ""), complete("8*7=56") * 2))
def test_what_is_not_well_formed_earns_nothing_for_its_language(completion):
    """If the language were paid without the format, a policy would not need to close its thought."""
    assert language_reward(completion, SYMBOLS.in_language) == 0


@pytest.mark.parametrize("piece", ("8*7=56, ", "8", "8,", ",", "-", "8*", "8 times ", "=56, wait, "))
def test_the_time_is_linear(piece):
    """A hostile thought must not take quadratic time."""
    def seconds(n):
        began = time.process_time()
        language_reward(complete(piece * n), WORDS.in_language)
        return time.process_time() - began
    small, large = (min(seconds(n) for _ in range(5)) for n in (1_000, 10_000))
    assert large < 60 * small + 0.01


def test_everyday_answers():
    """A thought or tags around an everyday answer must not be punished. Any other text beside the answer must not be
    accepted."""
    problem = everyday("larger 37 52")
    for completion, right in (("52", 1), ("<answer>52</answer>", 1), (complete("37, 52", "52"), 1), ("37", 0), ("", 0),
                              (" 52 ", 1), ("52 37", 0), ("<think>52", 0), ("<think>52</think>", 0), ("052", 0),
                              ("37</think><answer>52</answer>", 0), (complete("37", "52") + "37", 0)):
        scores = TASK.reward(completion, problem)
        assert (scores["accuracy"], scores["reward"]) == (right, 3 * right), completion
        assert scores.keys() == TASK.reward(completion, SYMBOLS).keys() | {"reward"}
    assert everyday_answer("<think>" * 50_000) == ""


# The task


def test_languages_translate_back():
    """A minus sign must become "minus" only where it is an operation, and every step in words must be recognised."""
    rng = random.Random(0)
    for _ in range(500):
        problem = TASK.make_problem(rng, longer=True)
        assert in_words(in_symbols(problem.question)) == (problem.question if problem.words else
                                                          in_words(problem.question))
        assert in_symbols(in_words(problem.working)) == in_symbols(problem.working)
        assert TASK.reward(complete(problem.working, problem.answer), problem) == {
            "accuracy": 1, "format": 1, "reflection": 0, "language": 1, "consistent": 1}
        assert TASK.parse(problem.question) == problem
        assert TASK.encoding.decode(TASK.encode_prompt(problem)) == problem.prompt
        assert len(TASK.encode_prompt(problem)) <= TASK.max_prompt_tokens


def test_held_out_problems_are_in_no_corpus():
    """A test question must not stand in the corpus in the other language, and RL must not use it."""
    corpus = TASK.encoding.decode(TASK.make_corpus(300_000, 0).tolist()).split(END_OF_TEXT)
    asked = {text.split("\n")[0].removeprefix("User: ") for text in corpus if text.startswith("User: ")}
    assert len(asked) > 3000 and not any(is_test(in_symbols(question)) for question in asked)
    for kind in TASK.held_out:
        problems = TASK.heldout_problems(100, kind, 0)
        assert len({p.question for p in problems}) == 100 and all(is_test(in_symbols(p.question)) for p in problems)
        assert kind == "everyday" or 30 < sum(p.words for p in problems) < 70
    rng = random.Random(0)
    assert not any(is_test(TASK.make_everyday(rng).question) for _ in range(300))


@pytest.mark.parametrize("text", ("say 100", "say 07", "say", "larger 37", "larger 0 5", "reverse 37", "8 times",
                                  "8*7 is 56", "8 times 7" + " minus 19" * 6, "say 37; 1"))
def test_what_is_no_problem_is_refused(text):
    """--ask must refuse a text that is not a question of this task, without a traceback."""
    with pytest.raises(ValueError, match="is no e"):
        TASK.parse(text)


def test_too_many_everyday_questions_are_refused(monkeypatch):
    """An evaluation must not silently have fewer problems than asked for, or search for more of them forever."""
    monkeypatch.setattr(Bilingual, "make_everyday", lambda self, rng, test: everyday(f"say {rng.randint(1, 3)}"))
    assert len(TASK.heldout_problems(3, "everyday", 0)) == 3
    with pytest.raises(ValueError, match="fewer than 4 everyday problems"):
        TASK.heldout_problems(4, "everyday", 0)


def test_the_authors_are_as_described():
    """The corpus must have the shares of languages, everyday questions and wrong steps that data/bilingual.py
    states."""
    rng, kinds, wrong, steps = random.Random(0), {"own": 0, "other": 0, "both": 0}, [0, 0], [0, 0]
    n, n_everyday = 12_000, 0
    for _ in range(n):
        text, style, right = TASK.write_thread(rng)
        question, answer = text.removeprefix("User: ").split("\nAssistant: ")
        if style == "everyday":
            n_everyday += 1
            assert right == (everyday(question).answer == answer)
        elif style in ("worked", "plain working"):
            thought = answer.removeprefix("<think>").partition("</think>")[0].partition(", so ")[0].split(", ")
            words = [STEPS[True].fullmatch(step) is not None for step in thought]
            assert all(STEPS[w].fullmatch(step) for w, step in zip(words, thought))
            for w, step in zip(words, thought):
                left, value = in_symbols(step).split("=")
                steps[w] += 1
                wrong[w] += eval(left) != int(value)
            if len(thought) > 3:
                in_it = {w == TASK.parse(question).words for w in words}
                kinds["both" if len(in_it) == 2 else "own" if in_it == {True} else "other"] += 1
    assert n_everyday / n == pytest.approx(0.15, abs=0.01)
    shares = {kind: count / sum(kinds.values()) for kind, count in kinds.items()}
    assert shares == pytest.approx({"own": 0.51, "other": 0.26, "both": 0.23}, abs=0.04)  # of four steps or more
    assert [w / s for w, s in zip(wrong, steps)] == pytest.approx([0.03, 0.06], abs=0.01)


def test_the_default_has_its_own_vocabulary():
    """The words of this task must not change the tokens of the other tasks."""
    assert TASK.encoding.n_vocab == get_tokenizer().n_vocab + 4
    assert TASK.encoding.encode_ordinary("3 times 4") != get_tokenizer().encode_ordinary("3 times 4")


# The stages


def made_with(**settings):
    """A run that has only what rewards and problems need."""
    return SimpleNamespace(task=TASK, cfg=Config(**settings))


def test_rewards_by_kind():
    """The language must be paid for. An everyday question must not be paid for its format."""
    reward_fn = r1.language_reward_function(made_with(language_weight=0.25))
    right, mixed = complete("8*7=56, 56-19=37"), complete("8*7=56, 56 minus 19 is 37")
    assert [reward_fn(text, SYMBOLS)["reward"] for text in (right, mixed)] == [2.25, 2.125]
    assert reward_fn(complete("so", "52"), everyday("larger 37 52"))["reward"] == 3
    accept = r1.good(made_with())
    assert accept(right, SYMBOLS).keys() == accept("52", everyday("larger 37 52")).keys()
    assert [accept(text, SYMBOLS)["accuracy"] for text in (right, mixed, complete("8*7=56", "38"))] == [1, 0, 0]
    assert accept("52", everyday("larger 37 52"))["format"] == 1


def test_everyday_questions_have_their_share():
    """r1 must not train on arithmetic alone, or on problems as long as the hard ones. Its students must train on both
    kinds, with such long problems."""
    for longer, most in ((False, 4), (True, 6)):
        make, rng = r1.mixed_problems(made_with(everyday_share=0.25), longer), random.Random(0)
        problems = [make(rng) for _ in range(2000)]
        assert sum(isinstance(p, Everyday) for p in problems) / 2000 == pytest.approx(0.25, abs=0.04)
        assert max(len(p.working.split(", ")) for p in problems) == most
    make, rng = r1.longer_problems(made_with()), random.Random(0)
    assert max(len(make(rng).working.split(", ")) for _ in range(500)) == 6


# The stages that a change of a setting must refuse, written by hand: all settings of r1.py, and some others.
LATE = "r1 student student_sft"
SHAPES = {
    "cold_steps cold_prompts cold_epochs sft_muon_lr sft_adam_lr": f"dev1 dev2 dev3 {LATE}",
    "dev2_steps language_weight cold_start": f"dev2 dev3 {LATE}",
    "sft_steps sft_epochs distill_prompts distill_minibatches": f"dev3 {LATE}",
    "r1_steps everyday_share": LATE,
    "distill_steps distill_epochs distill_muon_lr divergence on_policy": "student student_sft",
    "rl_lr rl_prompts kl_coef instruction problems rl_max_new_tokens": f"zero dev1 dev2 dev3 {LATE}",
    "seed block_size": f"base zero dev1 dev2 dev3 student_base {LATE}",
    "base_tokens": f"base zero dev1 dev2 dev3 {LATE}",
    "student_n_embd": "student_base student student_sft",
    "dtype save_every micro_batch eval_problems": "",
}


def test_which_settings_shape_which_stage():
    """A stage must not continue from one that was made with other settings. A stage that is still valid must not be
    refused."""
    by_hand = {name: set(stages.split()) for names, stages in SHAPES.items() for name in names.split()}
    own = [name for group in (r1.ColdStart, r1.Rejection, r1.Dev2, r1.FinalRL) for name in vars(group())]
    assert set(own) <= set(by_hand), "a new setting needs a line in SHAPES"
    for name, expected in by_hand.items():
        assert {stage for stage in r1.STAGES if name in shaped_by(r1.STAGES, stage)} == expected, name


def test_the_task_cannot_be_another(capsys):
    """With --task=arithmetic, r1.py would pretrain on the arithmetic of train.py, and fail at its first everyday
    question."""
    assert parse_args(PROGRAM, [])[0].task == "bilingual" and settings_of(Config)["task"].choices == ("bilingual",)
    assert run_command(PROGRAM, ["--task=arithmetic"]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("r1.py: argument --task: ") and printed.err.count("\n") == 1 and not printed.out


class Calls:
    """A run that does not train. It records the arguments with which each stage calls one of the three training
    functions."""

    def __init__(self, monkeypatch, **settings):
        self.run, self.made = made_with(**settings), []
        for name in ("run_grpo", "run_distillation", "fine_tune"):
            monkeypatch.setattr(r1, name, lambda run, *args, name=name: self.made.append((name, *args)))

    def of(self, stage):
        """The call of a stage. Each model that the stage starts from is replaced by the name of its stage."""
        self.made.clear()
        r1.STAGES[stage].train(self.run, *r1.STAGES[stage].starts)
        call, = self.made
        return call


def test_what_each_stage_is_made_of(monkeypatch):
    """A stage must not start from another model, learn from another teacher, or have another stage's settings or
    rewards."""
    calls = Calls(monkeypatch, cold_steps=2, cold_prompts=30, cold_epochs=5, dev2_steps=6, sft_steps=7, sft_epochs=8,
                  r1_steps=9, distill_steps=10, distill_epochs=11, distill_prompts=12, distill_minibatches=13,
                  everyday_share=1.0)
    rng, mixed = random.Random(0), complete("8*7=56, 56 minus 19 is 37")

    how, cfg, model, ((teacher, make_problem),), n_steps = calls.of("dev1")
    assert (how, model, teacher, n_steps) == ("fine_tune", "base", "zero", 2) and isinstance(make_problem(rng), Problem)
    assert (cfg.distill_prompts, cfg.distill_minibatches, cfg.distill_epochs) == (30, 4, 5)

    how, cfg, model, n_steps, make_problem, reward_fn = calls.of("dev2")
    assert (how, model, n_steps, cfg) == ("run_grpo", "dev1", 6, calls.run.cfg)
    assert isinstance(make_problem(rng), Problem) and reward_fn(mixed, SYMBOLS)["reward"] == 2.5

    how, cfg, model, turns, n_steps = calls.of("dev3")
    assert (how, model, n_steps) == ("fine_tune", "base", 7)
    assert (cfg.distill_prompts, cfg.distill_minibatches, cfg.distill_epochs) == (12, 13, 8)
    assert [teacher for teacher, _ in turns] == ["dev2", "dev2", "dev2", "base"]
    assert [isinstance(make_problem(rng), Everyday) for _, make_problem in turns] == [False, False, False, True]

    how, cfg, model, n_steps, make_problem, reward_fn = calls.of("r1")
    assert (how, model, n_steps, cfg) == ("run_grpo", "dev3", 9, calls.run.cfg)
    assert isinstance(make_problem(rng), Everyday) and reward_fn(mixed, SYMBOLS)["reward"] == 2.5

    for stage, divergence in (("student", "forward"), ("student_sft", "sft")):
        how, cfg, teacher, student, n_steps, make_problem, reward_fn = calls.of(stage)
        assert (how, teacher, student, n_steps) == ("run_distillation", "r1", "student_base", 10)
        assert (cfg.divergence, cfg.distill_epochs) == (divergence, 11) and isinstance(make_problem(rng), Everyday)
        assert reward_fn(mixed, SYMBOLS)["accuracy"] == 0, "the answer is in two languages"
    assert Calls(monkeypatch, cold_start=False).of("dev2")[2] == "base"
    assert Calls(monkeypatch, on_policy=True).of("student_sft")[1].on_policy is False


def test_fine_tuning_takes_turns(monkeypatch):
    """The steps must take turns between the teachers, a teacher must not get the other's problems, and the student must
    learn at the rates of this stage."""
    asked, made = [], []
    monkeypatch.setattr(r1, "Optimizer", lambda *args: made.append(args) or "optimizer")
    monkeypatch.setattr(r1, "distill_step", lambda model, teacher, optimizer, problems, reward_fn, task, cfg, *rest:
                        asked.append((model, teacher, optimizer, problems, cfg)))

    def steps(n_steps, watch, model, optimizer):
        assert (watch.make_problem, watch.teacher, model, optimizer) == ("sums", "first", "student", "optimizer")
        for number in range(1, n_steps + 1):
            yield SimpleNamespace(number=number, problems=lambda n, make_problem: (n, make_problem), generator=None,
                                  lr_scale=1.0, log=lambda metrics: None)

    fast = []
    run = made_with(divergence="forward", on_policy=True, sft_adam_lr=0.5, sft_muon_lr=0.25)
    run.steps, run.fast = steps, lambda model, **kinds: fast.append((model, kinds)) or model
    r1.fine_tune(run, run.cfg, "student", [("first", "sums")] * 3 + [("second", "talk")], n_steps=8)
    assert made == [("student", 0.5, 0.25)]
    assert fast == [("first", {"sampling": True}), ("second", {"sampling": True}), ("student", {"training": True})]
    assert [teacher for _, teacher, *_ in asked] == ["first", "first", "second", "first"] * 2
    for model, teacher, optimizer, (n, make_problem), cfg in asked:
        assert (model, optimizer, n) == ("student", "optimizer", run.cfg.distill_prompts)
        assert make_problem == {"first": "sums", "second": "talk"}[teacher]
        assert cfg.divergence == "sft" and not cfg.on_policy


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    out = tmp_path_factory.mktemp("r1")
    args = [sys.executable, "r1.py", *QUICK, "--cold_steps=2", "--cold_prompts=32", "--sft_steps=4", "--dev2_steps=2",
            "--r1_steps=2", "--distill_steps=2", "--eval_problems=4", f"--out={out}"]
    done = subprocess.run(args, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out, args, done.stdout


def test_the_pipeline_runs(pipeline, capsys):
    """Every stage must run and start from the correct model. Its evaluation must include the metrics of this task."""
    out, _, printed = pipeline
    found = results(out)["models"]
    assert list(found) == ["base", "zero", "dev1", "dev2", "dev3", "r1", "student_base", "student", "student_sft"]
    for model in found.values():
        assert {"language", "consistent"} <= model["test"].keys() and "pass@1" in model["everyday"]
    assert [row["stage"] for row in rows(out) if row["step"] == 2 and row["stage"].startswith(("dev", "r1"))] == [
        "dev1", "dev2", "dev3", "r1"]
    assert "|language|consistent" in printed and "\nr1 " in printed and f"python r1.py --out={out} --ask=" in printed
    assert run_command(PROGRAM, [f"--out={out}", "--ask=larger 37 52", "--samples=8"]) == 0
    asked = capsys.readouterr().out.splitlines()
    assert asked[0] == "larger 37 52 = 52" and len(asked) == 1 + 9 * 8
    assert all((line[14:19] == "right") == (everyday_answer(line[21:]) == "52") for line in asked[1:])


def test_a_stage_that_is_made_again_is_the_same(pipeline):
    """A stage's samples must depend only on seed, stage and step."""
    out, args, _ = pipeline
    again = ("dev3", "student_sft")
    for name in again:
        (out / f"{name}.pt").rename(out / f"before_{name}.pt")
    done = subprocess.run(args, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [name for name in r1.STAGES if f"\n{name}: stage " in done.stdout] == list(again)
    for name in again:
        assert weights_equal(out / f"before_{name}.pt", out / f"{name}.pt")
        (out / f"before_{name}.pt").unlink()


def test_settings_of_later_stages_are_refused(pipeline, capsys):
    """A stage must not continue from one that was made with another reward."""
    _, (_, _, *args), _ = pipeline
    assert run_command(PROGRAM, [*args, "--language_weight=0.5"]) == 2
    error = capsys.readouterr().err
    assert "dev2.pt was made with language_weight=1.0, not 0.5" in error
    assert error.startswith("r1.py: ") and error.count("\n") == 1


def test_train_does_not_know_the_pipeline(tmp_path):
    """A reader of R1-Zero alone must not need R1's further stages, and no import may be circular."""
    code = "import sys, train; assert 'r1' not in sys.modules; print(list(train.STAGES))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "['base', 'zero', 'student_base', 'student']"
    assert rule_rewards("", SYMBOLS).keys() == {"accuracy", "format", "reflection"}
