"""The controls. Each must make its one change and no other, and train.py must not use a control as its own model."""
import copy
import doctest
import random
import re
import zlib
from types import SimpleNamespace

import pytest
import torch

import controls
import train
from controls import (CONTROLS, FORUMS, NoWait, NoWorking, all_completions, batch_baseline, make_task_of,
                      run_grpo_with, shuffled, usual, without)
from data import countdown
from data.arithmetic import WORKED, Arithmetic, parse
from data.countdown import Countdown
from data.tokenizer import get_tokenizer
from engine.command import run_command
from engine.corpus import MADE
from engine.loop import Step
from grpo import group_advantages
from tests.conftest import NAMES, PROGRAM, QUICK, main, results, rows, weights_equal
from tests.conftest import copy as copy_files

QUESTIONS = ("1+2", "3*4", "20-7")


@pytest.fixture(scope="module")
def with_shuffled(quick, tmp_path_factory):
    """A quick run to which the control "shuffled" was added. No test changes it."""
    out = tmp_path_factory.mktemp("shuffled")
    copy_files(quick, out, *(f"{name}.pt" for name in NAMES), "log.jsonl", "results.json", "samples.jsonl")
    assert controls.main(["shuffled", *QUICK, f"--out={out}"]) == 0
    return out


@pytest.fixture
def refused(capfd):
    """refused(*args): controls.py ends with exit code 2 and one line on stderr, which is returned."""
    def check(*args):
        capfd.readouterr()
        assert controls.main(list(args)) == 2
        line = capfd.readouterr().err
        assert line.count("\n") == 1, line
        return line
    return check


class Bench:
    """A run without files. It has the attributes that run_grpo_with uses, and keeps the metrics of each step."""

    def __init__(self, reward, questions=QUESTIONS, **settings):
        self.cfg = train.Config(**{"rl_prompts": len(questions), "rl_samples": 8, "rl_minibatches": 1, "rl_lr": 0.01,
                                   "rl_max_new_tokens": 6, "kl_coef": 0.0, "micro_batch": 4096} | settings)
        self.task = SimpleNamespace(
            encode_prompt=Arithmetic().encode_prompt, encoding=Arithmetic.encoding, stop_ids=Arithmetic.stop_ids,
            reward=reward, make_problem=lambda rng: parse(questions[rng.randrange(len(questions))]))
        self.metrics = []

    frozen = staticmethod(copy.deepcopy)

    def fast(self, model, training, sampling):
        return model

    def steps(self, n, hold, watch, **parts):
        for number in range(1, n + 1):
            step = Step(number, number == n, random.Random(number), torch.Generator().manual_seed(number), 1.0)
            yield step
            self.metrics.append(step.metrics)


# Other advantages


def advantages_of(function, rewards, scale="std", generator=None):
    """The advantages (P, G) that a control's function gives a rollout with these rewards (P, G)."""
    rollout = SimpleNamespace(column={"reward": rewards.flatten()}.get)
    cfg = SimpleNamespace(rl_samples=rewards.size(1), scale=scale)
    return function(rollout, cfg, generator).view(rewards.shape)


def test_shuffling_keeps_each_groups_rewards():
    """If the control moved rewards between prompts, other groups would have a signal, and the control would test
    something else."""
    rewards = torch.arange(40.0).view(5, 8) ** 2  # each group has its own mean and standard deviation
    honest = group_advantages(rewards, "std")

    def shuffle(rewards, scale="std", seed=0):
        return advantages_of(shuffled, rewards, scale, torch.Generator().manual_seed(seed))

    adv = shuffle(rewards)
    order = adv.argsort(dim=1)
    assert torch.allclose(adv.sort(dim=1).values, honest, atol=1e-6)  # without shuffling, advantages rise in each group
    assert not (order == torch.arange(8)).all(dim=1).any()
    assert len({tuple(row) for row in order.tolist()}) == 5, "each group has its own order"
    assert torch.equal(shuffle(rewards), adv) and not torch.equal(shuffle(rewards, seed=1), adv)
    assert torch.allclose(shuffle(rewards, "none").sort(dim=1).values, group_advantages(rewards, "none"))
    assert torch.equal(rewards, torch.arange(40.0).view(5, 8) ** 2)
    assert not shuffle(torch.ones(5, 8)).any()


def test_the_batch_as_baseline():
    """The mean and the standard deviation must not be those of the group, or the control would be the same as zero."""
    rewards = torch.tensor([[1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    assert advantages_of(batch_baseline, rewards, "none").tolist() == (rewards - 0.5).tolist()
    normed = (rewards - 0.5) / (rewards.flatten().std() + 1e-4)
    assert torch.allclose(advantages_of(batch_baseline, rewards), normed)
    solved = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    assert (advantages_of(batch_baseline, solved, "none")[0] == 0.25).all(), "an easy prompt has advantages, too"


@pytest.mark.parametrize("scale", ("std", "none"))
def test_all_completions_have_an_advantage(scale):
    """No completion may keep the advantage 0, because it would be skipped. The tiny advantage must not change the
    gradient or the other advantages."""
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5], [0.0, 1.0, 0.5, 0.5]])
    honest, adv = group_advantages(rewards, scale), advantages_of(all_completions, rewards, scale)
    assert adv.ne(0).all() and torch.equal(adv[honest != 0], honest[honest != 0]) and adv[honest == 0].max() < 1e-20


def test_the_penalty_acts_on_every_completion(make_gpt):
    """Rows with advantage 0 must not be skipped, because the penalty acts on all rows (Algorithm 1 of DeepSeekMath)."""
    def equal_rewards(text, problem):
        return {"reward": 0.1, "accuracy": 0.0, "format": 0.0}

    for advantages, share in ((all_completions, 1), (usual, 0)):
        run = Bench(equal_rewards, kl_coef=0.1, rl_steps=2)
        model = make_gpt(Arithmetic.encoding.n_vocab)
        before = copy.deepcopy(model.state_dict())
        run.frozen = lambda policy: make_gpt(Arithmetic.encoding.n_vocab, seed=1)
        run_grpo_with(run, run.cfg, model, advantages)
        for metrics in run.metrics:
            assert metrics.counts["kl"] == share * metrics.sums["tokens"] and metrics.means()["no_signal"] == 1
        assert torch.equal(before["embedding.weight"], model.embedding.weight) == (share == 0)
        if share:
            means = run.metrics[0].means()
            assert means["kl"] > 0 and means["ratio"] == 1
            assert means["loss"] == pytest.approx(0.1 * means["kl"], rel=1e-4)


@pytest.mark.parametrize("advantages, learns", ((batch_baseline, True), (all_completions, True), (shuffled, False)))
def test_bandit(make_gpt, advantages, learns):
    """The policy samples one token, and a letter is rewarded. A few steps must be enough to learn this. They are not if
    the gradient has the wrong sign, or if a row gets the reward of another row. With shuffled rewards, the policy must
    learn nothing."""
    encoding = Arithmetic.encoding
    model, prompt = make_gpt(encoding.n_vocab), Arithmetic().encode_prompt(parse("1+2"))

    def is_letter(text):
        return len(text) == 1 and text.isascii() and text.isalpha()

    def reward(text, problem):
        right = float(is_letter(text))
        return {"reward": right, "accuracy": right}

    def chance():
        with torch.no_grad():
            probs = model(torch.tensor([prompt]))[0, -1].softmax(-1)
        return sum(p for t, p in enumerate(probs.tolist()) if is_letter(encoding.decode([t])))

    before, run = chance(), Bench(reward, ("1+2",), rl_steps=12, rl_samples=64, rl_max_new_tokens=1)
    run_grpo_with(run, run.cfg, model, advantages)
    after = chance()
    assert 0.1 < before < 0.3 and (after > 0.9 if learns else after < 0.5), (before, after)


@pytest.mark.parametrize("flags", ([], ["--ref_every=2", "--kl_coef=0.5", "--rl_minibatches=3"]))
def test_the_loop_is_that_of_train_py(quick, tmp_path, flags):
    """A control must differ from zero only in its advantages, not in the learning rate, in the reference, or in the
    order of the random draws."""
    def train_zero(run, base):
        run_grpo_with(run, run.cfg, base, usual)

    program = PROGRAM._replace(stages=train.STAGES | {"zero": train.STAGES["zero"]._replace(train=train_zero)})
    made, own = tmp_path / "made", tmp_path / "own"
    for out in (made, own):
        copy_files(quick, out, "base.pt", "results.json")
    assert run_command(program, [*QUICK, *flags, "--stage=zero", f"--out={made}"]) == 0
    expected = quick
    if flags:
        expected = own
        assert main([*QUICK, *flags, "--stage=zero", f"--out={own}"]) == 0
    assert weights_equal(made / "zero.pt", expected / "zero.pt")
    assert not weights_equal(made / "zero.pt", quick / "base.pt")


def test_a_killed_control_goes_on_to_the_same_result(with_shuffled, tmp_path, monkeypatch):
    """The shuffling must use the generator of the step. With a generator whose state is lost, a resumed run would end
    in other weights."""
    copy_files(with_shuffled, tmp_path, "base.pt", "results.json")
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return grpo_update(*args)

    grpo_update = controls.grpo_update
    args = ["shuffled", *QUICK, f"--out={tmp_path}"]
    monkeypatch.setattr(controls, "grpo_update", interrupted)
    assert controls.main(args) == 130 and (tmp_path / "resume.pt").exists()
    assert controls.main(args) == 0 and len(calls) == 6
    assert weights_equal(tmp_path / "shuffled.pt", with_shuffled / "shuffled.pt")
    assert not weights_equal(tmp_path / "shuffled.pt", with_shuffled / "base.pt")


@pytest.mark.parametrize("name, advantages", (
    ("shuffled", shuffled), ("batch_baseline", batch_baseline), ("all_completions", all_completions)))
def test_each_name_has_its_advantages(monkeypatch, name, advantages):
    """Two controls must not be swapped."""
    used = []
    monkeypatch.setattr(controls, "run_grpo_with", lambda run, cfg, policy, advantages: used.append(advantages))
    CONTROLS[name].train(SimpleNamespace(cfg=None), None)
    assert used == [advantages] and CONTROLS[name].starts == ("base",)


# Another reward, other problems


def test_format_alone(monkeypatch):
    """The control must not reward correct answers, and must have as many steps as zero."""
    given, cfg = [], train.Config(accuracy_weight=5)
    monkeypatch.setattr(train, "run_grpo", lambda *args: given.append(args))
    run = SimpleNamespace(cfg=cfg, task=Arithmetic())
    CONTROLS["format_alone"].train(run, "base")
    (_, used, policy, n_steps, make_problem, reward_fn), = given
    assert (used, policy, n_steps, make_problem) == (cfg, "base", cfg.rl_steps, run.task.make_problem)
    right = "<think>8*7=56, 56-19=37</think><answer>37</answer>"
    wrong = right.replace(">37", ">38")
    for text, accuracy, well_formed in ((right, 1, 1), (right + ".", 1, 0), (wrong, 0, 1), ("37", 0, 0)):
        scores = reward_fn(text, parse("8*7-19"))
        assert (scores["accuracy"], scores["format"], scores["reward"]) == (accuracy, well_formed, well_formed)


def test_finished_run_may_gain_the_control(quick, tmp_path):
    """student_rl must start from student_base, and have as many updates as the student, each on as many completions. No
    other stage may be trained again."""
    copy_files(quick, tmp_path, *(f"{name}.pt" for name in NAMES), "log.jsonl", "results.json")
    assert controls.main(["student_rl", *QUICK, f"--out={tmp_path}"]) == 0
    config = results(tmp_path)["config"]
    control = [row for row in rows(tmp_path) if row["stage"] == "student_rl"]
    updates = config["distill_steps"] * config["distill_epochs"] * config["distill_minibatches"]
    assert len(control) == updates / config["rl_minibatches"]
    completions = config["distill_prompts"] / config["distill_minibatches"] * config["rl_minibatches"]
    assert all((row["format"] * completions).is_integer() for row in control)  # a share of a rollout's completions
    assert list(results(tmp_path)["models"]) == [*NAMES, "student_rl"]
    before = [row for row in rows(tmp_path) if row["stage"] != "student_rl"]
    assert before == rows(quick)
    for name in NAMES:
        assert (tmp_path / f"{name}.pt").read_bytes() == (quick / f"{name}.pt").read_bytes()
    assert "\nstudent_rl|test" in (tmp_path / "report.md").read_text().replace(" ", "")


def test_who_is_asked_longer_problems(quick, tmp_path, monkeypatch):
    """student_rl must train on as many problems as the student, of the same lengths. student_short must not
    train on longer problems."""
    asked = {}

    def recorded(step, model_of):
        def wrapper(model, other, optimizer, problems, *args):
            asked.setdefault(model_of, []).extend(len(re.findall("[-+*]", problem.question)) for problem in problems)
            return step(model, other, optimizer, problems, *args)
        return wrapper

    monkeypatch.setattr(train, "grpo_step", recorded(train.grpo_step, "RL"))
    monkeypatch.setattr(train, "distill_step", recorded(train.distill_step, "distillation"))
    copy_files(quick, tmp_path, "base.pt", "zero.pt", "student_base.pt", "results.json")
    few = [*QUICK, "--distill_steps=1", "--distill_epochs=4", f"--out={tmp_path}"]
    n = 4 * 64 // 8  # problems in RL: 4 epochs on 64 completions, with 8 completions of each problem
    expected = {"student_rl": ("RL", n, 6), "student_short": ("distillation", 64, 4)}
    for name, (how, n_problems, most) in expected.items():
        asked.clear()
        assert controls.main([name, *few]) == 0
        found = {key: (len(n_ops), min(n_ops), max(n_ops)) for key, n_ops in asked.items()}
        assert found == {how: (n_problems, 1, most)}


# Another corpus


def test_styles_without_some():
    """The corpus of a control must lack the answers that it should lack, and the shares of the styles must still add up
    to 1."""
    class NoWorkingCountdown(Countdown):
        styles = without(countdown.STYLES, countdown.WORKED, instead="blurt")

    for task, gone, instead in ((NoWorking(), WORKED, "blurt"), (NoWait(), ("rechecked",), "worked")):
        styles = type(task).__base__.styles
        assert abs(sum(task.styles.values()) - 1) < 1e-9 and list(task.styles) == list(styles)
        for style, share in task.styles.items():
            assert share == pytest.approx(0.0 if style in gone else styles[style] + (style == instead) * sum(
                styles[other] for other in gone))
    for task in (NoWait(), NoWorkingCountdown()):
        text = get_tokenizer().decode(task.make_corpus(200_000, seed=0).tolist())
        assert "wait" not in text
    assert "=" not in "".join(re.findall("Assistant: (.*?)<.endoftext", text, re.DOTALL))


@pytest.mark.parametrize("task, checksums", [
    (Arithmetic(), (1355343497, 3262133460, 3565092883)), (NoWorking(), (90315686, 3266770397, 2727052250)),
    (Countdown(), (2633002514, 3604116091, 4100066674)), (NoWait(), (2008780298, 2299350909, 1807971703))])
def test_corpora_are_those_of_the_figures(task, checksums):
    """A change of a corpus must be noticed: README and the findings on countdown are about these."""
    corpora = [task.make_corpus(20_000, seed, heldout) for seed, heldout in ((0, False), (1, False), (0, True))]
    assert tuple(zlib.crc32(corpus.tobytes()) for corpus in corpora) == checksums


def test_a_control_makes_a_base_of_its_own_first(quick, tmp_path):
    """The base of the control must not be trained on train.py's corpus, which this process keeps from an earlier test.
    It must not replace train.py's base, and RL must start from it."""
    few = [*QUICK, "--base_tokens=10000", "--rl_steps=1", f"--out={tmp_path}"]
    assert controls.main(["zero_no_working", *few]) == 0
    assert {path.name for path in tmp_path.glob("*.pt")} == {"base_no_working.pt", "zero_no_working.pt"}
    assert list(results(tmp_path)["models"]) == ["base_no_working", "zero_no_working"]
    assert {type(task.task) for task, *_ in MADE if hasattr(task, "task")} >= {Arithmetic, NoWorking}
    assert list(dict.fromkeys(row["stage"] for row in rows(tmp_path))) == ["base_no_working", "zero_no_working"]
    assert controls.main(["zero_no_working", *few]) == 0 and len(rows(tmp_path)) == 20, "nothing is made again"


def test_what_a_control_starts_from():
    """A zero must start from its own base, and have the same corpus as this base."""
    for name, stage in CONTROLS.items():
        kind = name.partition("_")[2]
        if name.startswith("zero_"):
            assert stage.starts == (f"base_{kind}",) and FORUMS[name] is FORUMS[f"base_{kind}"]
        if name.startswith("base_"):
            assert stage == train.STAGES["base"]
        assert name not in train.STAGES and all(start in train.STAGES | CONTROLS for start in stage.starts)
    forums = {"no_working": NoWorking, "no_wait": NoWait}
    assert FORUMS == {f"{model}_{kind}": forum for kind, forum in forums.items() for model in ("base", "zero")}


def test_a_forum_inside_other_tasks(tmp_path):
    """With --corpus or --problems, the control must not use the corpus of train.py, or lose the problems of the
    file."""
    (tmp_path / "text.txt").write_text("A text.\n\n" * 5_000)
    (tmp_path / "problems.jsonl").write_text("".join(f'{{"prompt": "{n}", "answer": "1"}}\n' for n in range(50)))
    cfg = train.Config(corpus=str(tmp_path / "text.txt"), corpus_share=0.5, problems=str(tmp_path / "problems.jsonl"))
    task = make_task_of(NoWorking)(cfg)
    assert type(task.task.task) is NoWorking and task.make_problem(random.Random(0)).answer == "1"
    corpus = task.encoding.decode(task.make_corpus(100_000, 0).tolist())
    answers = re.findall("Assistant: (.*?)<.endof", corpus)
    assert "A text." in corpus and len(answers) > 100 and "=" not in "".join(answers)
    plain = make_task_of(NoWorking)(train.Config(max_ops=5))
    assert plain == NoWorking(max_ops=5) and plain != Arithmetic(max_ops=5), "a corpus is kept for tasks that are equal"


# Beside the models of train.py


def test_train_never_uses_a_control(quick, with_shuffled, tmp_path, capfd):
    """A student must not be distilled from a control, and a stage must not count as finished because a control is.
    --ask and --evaluate must show the controls."""
    kept = [name for name in NAMES if name != "student"]
    copy_files(quick, tmp_path, *(f"{name}.pt" for name in kept), "log.jsonl", "samples.jsonl")
    content = torch.load(with_shuffled / "shuffled.pt", weights_only=True)
    beside = ("base_no_wait", "shuffled", "student_rl", "student_short", "zero_no_wait")
    for name in beside:
        torch.save(content | {"stage": name}, tmp_path / f"{name}.pt")
    copy_files(with_shuffled, tmp_path, "results.json")
    assert main([*QUICK, "--stage=student", f"--out={tmp_path}"]) == 0
    assert weights_equal(tmp_path / "student.pt", quick / "student.pt")
    for name in kept:
        assert (tmp_path / f"{name}.pt").read_bytes() == (quick / f"{name}.pt").read_bytes()
    assert not weights_equal(tmp_path / "shuffled.pt", tmp_path / "zero.pt")
    assert list(results(tmp_path)["models"]) == [*NAMES[:3], "shuffled", "student"]
    assert "\nshuffled" in (tmp_path / "report.md").read_text()
    capfd.readouterr()
    assert main([f"--out={tmp_path}", "--ask=8*7-19"]) == 0
    assert [line.split()[0] for line in capfd.readouterr().out.splitlines()[1:]] == [*NAMES, *beside]
    (tmp_path / "problems.jsonl").write_text('{"prompt": "1+2", "answer": "3"}\n{"prompt": "2+2", "answer": "4"}\n')
    assert main([f"--out={tmp_path}", f"--evaluate={tmp_path / 'problems.jsonl'}"]) == 0
    assert set(beside) <= {line.split("|")[0].strip() for line in capfd.readouterr().out.splitlines()}


def test_changed_settings_are_refused(with_shuffled, tmp_path, refused):
    """If a control had other settings than the zero or the control beside it, they could not be compared."""
    copy_files(with_shuffled, tmp_path, "base.pt", "shuffled.pt", "results.json")
    here = f"--out={tmp_path}"
    assert "shuffled.pt was made with rl_steps=5, not 4" in refused("shuffled", *QUICK, "--rl_steps=4", here)
    assert "shuffled.pt was made with rl_steps=5, not 4" in refused("batch_baseline", *QUICK, "--rl_steps=4", here)
    assert "base.pt was made with base_tokens=40000" in refused("shuffled", *QUICK, "--base_tokens=50000", here)
    (tmp_path / "shuffled.pt").unlink()
    copy_files(with_shuffled, tmp_path, "zero.pt")
    assert "zero.pt was made with rl_lr=0.001, not 0.1" in refused("shuffled", *QUICK, "--rl_lr=0.1", here)
    assert not (tmp_path / "shuffled.pt").exists()
    (tmp_path / "zero.pt").unlink()
    copy_files(with_shuffled, tmp_path, "shuffled.pt", "log.jsonl")
    assert controls.main(["shuffled", *QUICK, "--micro_batch=512", here]) == 0, "this shapes nothing"
    assert (tmp_path / "shuffled.pt").read_bytes() == (with_shuffled / "shuffled.pt").read_bytes()


def test_bad_input(refused, tmp_path, capfd):
    """A misspelt name must not end in a traceback, or train something else."""
    for args in ([], ["shufled"], ["zero"], ["--out=out"]):
        line = refused(*args)
        assert line.startswith("controls.py: ") and all(name in line for name in CONTROLS)
    assert "--rl_lr" in refused("shuffled", "--rl_ls=1", f"--out={tmp_path}")
    assert "--task=countdown" in refused("zero_no_wait", *QUICK, f"--out={tmp_path / 'new'}")
    assert "--task=arithmetic" in refused("zero_no_working", *QUICK, "--task=bilingual", f"--out={tmp_path / 'new'}")
    assert not list(tmp_path.glob("**/*.pt"))


def test_help(capsys):
    """--help must not be read as the name of a control, and must list all controls."""
    assert controls.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in CONTROLS)
    with pytest.raises(SystemExit) as ended:
        controls.main(["shuffled", "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and "controls.py shuffled [--key=value" in text and "--rl_lr VALUE" in text


def test_no_name_begins_with_another_that_is_needed():
    """--stage=NAME runs all stages whose names begin with NAME. A control must not train a stage that it does not
    need."""
    for name in CONTROLS:
        needed = controls.needed(name, train.STAGES | CONTROLS)
        for stage in needed:
            others = {*train.STAGES, *needed} - {stage}
            assert not any(other.startswith(stage) for other in others), (name, stage)


def test_examples_in_the_docstrings():
    """An example in a docstring must not be wrong. pytest itself runs no doctests in experiments/."""
    assert doctest.testmod(controls).failed == 0
