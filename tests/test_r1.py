"""The world of two languages, its reward, and the further stages of R1."""
import random
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

import r1
from data.arithmetic import is_test
from data.bilingual import STEPS, Bilingual, Everyday, Problem, everyday, everyday_answer, in_symbols, in_words
from data.tokenizer import END_OF_TEXT, get_tokenizer
from rewards import language_reward, rule_rewards
from run import Config
from tests.conftest import QUICK, ROOT, results, rows, weights_equal

TASK = Bilingual()
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
    """A thought without steps, with two languages in one step or with one step over and over is paid."""
    for problem, share in ((SYMBOLS, symbols), (WORDS, words)):
        assert language_reward(complete(thought), problem.in_language) == pytest.approx(share)


def test_what_stands_outside_the_thought_has_no_language():
    """The other language in the answer costs the reward, or the right one there earns it."""
    for answer in ("37", "56 minus 19 is 37", "56-19=37"):
        assert language_reward(complete("8*7=56", answer), SYMBOLS.in_language) == 1
        assert language_reward(complete("so", answer), SYMBOLS.in_language) == 0


@pytest.mark.parametrize("completion", ("8*7=56", "<think>8*7=56</think>", complete("8*7=56") + ".", "",
                                        complete("8*7=56").replace("</think>", ""), complete("8*7=56") * 2))
def test_what_is_not_well_formed_earns_nothing_for_its_language(completion):
    """The language is paid without the format, so that a policy need not close its thought."""
    assert language_reward(completion, SYMBOLS.in_language) == 0


@pytest.mark.parametrize("piece", ("8*7=56, ", "8", "8,", ",", "-", "8*", "8 times ", "=56, wait, "))
def test_the_time_is_linear(piece):
    """A hostile thought takes quadratic time."""
    def seconds(n):
        began = time.process_time()
        language_reward(complete(piece * n), WORDS.in_language)
        return time.process_time() - began
    small, large = (min(seconds(n) for _ in range(5)) for n in (1_000, 10_000))
    assert large < 60 * small + 0.01


def test_everyday_answers():
    """A thought or tags around an everyday answer are punished; or anything beside the answer is accepted."""
    problem = everyday("larger 37 52")
    for completion, right in (("52", 1), ("<answer>52</answer>", 1), (complete("37, 52", "52"), 1), ("37", 0), ("", 0),
                              (" 52 ", 1), ("52 37", 0), ("<think>52", 0), ("<think>52</think>", 0), ("052", 0),
                              ("37</think><answer>52</answer>", 0), (complete("37", "52") + "37", 0)):
        scores = TASK.reward(completion, problem)
        assert (scores["accuracy"], scores["reward"]) == (right, 3 * right), completion
        assert scores.keys() == TASK.reward(completion, SYMBOLS).keys() | {"reward"}
    assert everyday_answer("<think>" * 50_000) == ""


# The world


def test_languages_translate_back():
    """A minus sign becomes "minus" where it is no operation, or a step in words is not recognised."""
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
    """A test question stands in the corpus in the other language, or is asked in RL."""
    corpus = TASK.encoding.decode(TASK.make_corpus(300_000, 0).tolist()).split(END_OF_TEXT)
    asked = {text.split("\n")[0].removeprefix("User: ") for text in corpus if text.startswith("User: ")}
    assert len(asked) > 3000 and not any(is_test(in_symbols(question)) for question in asked)
    for kind in TASK.held_out:
        problems = TASK.heldout_problems(100, kind, 0)
        assert len({p.question for p in problems}) == 100 and all(is_test(in_symbols(p.question)) for p in problems)
        assert kind == "everyday" or 30 < sum(p.words for p in problems) < 70
    rng = random.Random(0)
    assert not any(is_test(TASK.make_everyday(rng).question) for _ in range(300))


def test_the_authors_are_as_described():
    """The corpus has another share of languages, everyday questions or slips than the file says."""
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
    """The words of this task change the tokens of the others."""
    assert TASK.encoding.n_vocab == get_tokenizer().n_vocab + 4
    assert TASK.encoding.encode_ordinary("3 times 4") != get_tokenizer().encode_ordinary("3 times 4")


# The stages


def test_rewards_by_kind():
    """The language is not paid for, or an everyday question is paid for its format."""
    reward_fn = r1.language_reward_function(Config(language_weight=0.25), TASK)
    right, mixed = complete("8*7=56, 56-19=37"), complete("8*7=56, 56 minus 19 is 37")
    assert [reward_fn(text, SYMBOLS)["reward"] for text in (right, mixed)] == [2.25, 2.125]
    assert reward_fn(complete("so", "52"), everyday("larger 37 52"))["reward"] == 3
    accept = r1.good(Config(), TASK)
    assert accept(right, SYMBOLS).keys() == accept("52", everyday("larger 37 52")).keys()
    assert [accept(text, SYMBOLS)["accuracy"] for text in (right, mixed, complete("8*7=56", "38"))] == [1, 0, 0]
    assert accept("52", everyday("larger 37 52"))["format"] == 1


def test_everyday_questions_have_their_share():
    """r1 is asked arithmetic alone."""
    make = r1.mixed(SimpleNamespace(task=TASK, cfg=Config(everyday_share=0.25)), longer=False)
    rng = random.Random(0)
    assert sum(isinstance(make(rng), Everyday) for _ in range(2000)) / 2000 == pytest.approx(0.25, abs=0.04)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    out = tmp_path_factory.mktemp("r1")
    args = [sys.executable, "r1.py", *QUICK, "--cold_steps=2", "--cold_prompts=32", "--sft_steps=4", "--dev2_steps=2",
            "--r1_steps=2", "--distill_steps=2", "--eval_problems=4", f"--out={out}"]
    done = subprocess.run(args, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out, args, done.stdout


def test_the_pipeline_runs(pipeline):
    """A stage is missing, starts from the wrong model, or is not evaluated in what this task measures."""
    out, _, printed = pipeline
    found = results(out)["models"]
    assert list(found) == ["base", "zero", "dev1", "dev2", "dev3", "r1", "student_base", "student", "student_sft"]
    for model in found.values():
        assert {"language", "consistent"} <= model["test"].keys() and "pass@1" in model["everyday"]
    assert [row["stage"] for row in rows(out) if row["step"] == 2 and row["stage"].startswith(("dev", "r1"))] == [
        "dev1", "dev2", "dev3", "r1"]
    assert "|language|consistent" in printed and "\nr1 " in printed and f"python r1.py --out={out} --ask=" in printed
    asked = subprocess.run([sys.executable, "r1.py", f"--out={out}", "--ask=larger 37 52", "--samples=8"], cwd=ROOT,
                           capture_output=True, text=True).stdout.splitlines()
    assert asked[0] == "larger 37 52 = 52" and len(asked) == 1 + 9 * 8
    assert all((line[14:19] == "right") == (everyday_answer(line[21:]) == "52") for line in asked[1:])


def test_a_stage_that_is_made_again_is_the_same(pipeline):
    """A stage's samples hang on something else than seed, stage and step."""
    out, args, _ = pipeline
    for name in ("dev3", "student_sft"):
        (out / f"{name}.pt").rename(out / "before.pt")
        done = subprocess.run(args, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert weights_equal(out / "before.pt", out / f"{name}.pt")


def test_settings_of_later_stages_are_refused(pipeline):
    """A stage goes on from one that was made with another reward."""
    out, args, _ = pipeline
    done = subprocess.run([*args, "--language_weight=0.5"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "dev2.pt was made with language_weight=1.0, not 0.5" in done.stderr
    assert done.stderr.startswith("r1.py: ")


def test_train_does_not_know_the_pipeline(tmp_path):
    """A reader of R1-Zero alone meets R1's further stages, or an import goes in a circle."""
    code = "import sys, train; assert 'r1' not in sys.modules; print(list(train.STAGES))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "['base', 'zero', 'student_base', 'student', 'student_rl']"
    assert rule_rewards("", SYMBOLS).keys() == {"accuracy", "format", "reflection"}
