"""The variants of GRPO. Each must be what its paper says, and each must learn."""
import ast
import collections
import doctest
import functools
import importlib
import inspect
import math
import textwrap
from types import SimpleNamespace

import pytest
import torch

import cells
import tables
import train
import variants
from data.arithmetic import Arithmetic, parse
from engine.command import run_command
from grpo import Rollout, group_advantages, grpo_loss, token_weights
from tests.conftest import PROGRAM, QUICK, main, results, weights_equal
from tests.conftest import copy as copy_files
from tests.test_controls import Bench
from variants import VARIANTS, Variant, train_variant

LENGTHS = torch.tensor([3, 1, 4, 2, 5, 2])
ROW = torch.arange(len(LENGTHS)).repeat_interleave(LENGTHS)


def random_batch(normalize, seed=0, off_policy=0.4):
    """A batch of six completions, in float64, and logp."""
    generator = torch.Generator().manual_seed(seed)

    def noise(n=len(ROW)):
        return torch.randn(n, generator=generator, dtype=torch.float64)

    logp = (-1 + 0.3 * noise()).requires_grad_()
    weight = token_weights(LENGTHS, normalize, 8).double()
    batch = SimpleNamespace(row=ROW, adv=noise(len(LENGTHS))[ROW], weight=weight[ROW],
                            logp_old=logp.detach() - off_policy * noise(), logp_ref=logp.detach() + 0.2 * noise())
    return logp, batch


def gradient(loss, logp):
    return torch.autograd.grad(loss, logp, retain_graph=True)[0]


def settings(name, **others):
    """The settings of a variant, as its losses see them."""
    return SimpleNamespace(**vars(train.Config()) | {"kl_coef": variants.LOGGED} | VARIANTS[name].settings | others)


def rollout_of(rewards, **columns):
    """A rollout with these rewards (P, G), and the settings for it."""
    scores = [{"reward": float(r), **{k: float(v.flatten()[i]) for k, v in columns.items()}}
              for i, r in enumerate(rewards.flatten())]
    n = len(scores)
    rollout = Rollout([[1]] * n, [[1]] * n, [[0.0]] * n, [""] * n, [False] * n, scores)
    return rollout, SimpleNamespace(**vars(train.Config()) | {"rl_samples": rewards.size(1)})


# Losses


@pytest.mark.parametrize("name", [name for name in VARIANTS if VARIANTS[name].loss_fn is not variants.token_loss])
def test_on_policy_all_losses_have_the_policy_gradient(name):
    """On policy, the ratio is 1 and nothing is clipped. Then the gradient of each loss is -w A for each token, without
    the KL penalty. A loss with a wrong sign or a lost weight has another one."""
    logp, batch = random_batch("sequence", off_policy=0.0)
    loss, sums = VARIANTS[name].loss_fn(logp, batch, settings(name, kl_coef=0.0))
    assert torch.allclose(gradient(loss, logp), gspo_mean(-batch.weight * batch.adv, name))
    assert sums["kl"] > 0


def gspo_mean(gradient, name):
    """GSPO divides the gradient of a completion evenly among its tokens. Here they have equal gradients already."""
    assert name != "gspo" or torch.allclose(variants.row_means(gradient, ROW), gradient)
    return gradient


def test_gspo_has_one_ratio_for_a_completion():
    """The ratio must be the geometric mean over the tokens of its own completion. So the clip hits a completion."""
    logp, batch = random_batch("sequence")
    loss, sums = variants.gspo_loss(logp, batch, settings("gspo"))
    expected = 0.0
    for i, n in enumerate(LENGTHS):
        mine = ROW == i
        s = (logp[mine].sum() - batch.logp_old[mine].sum()).div(n).exp()
        adv = batch.adv[mine][0]
        expected = expected - torch.min(s * adv, s.clamp(1 - 0.03, 1 + 0.04) * adv) / len(LENGTHS)
    assert torch.allclose(loss, expected)
    assert torch.allclose(gradient(loss, logp), gradient(expected, logp))
    clipped = gradient(loss, logp) == 0
    assert 0 < clipped.sum() < len(ROW)
    assert all(clipped[ROW == i].all() or not clipped[ROW == i].any() for i in range(len(LENGTHS)))
    assert sums["clip_fraction_low"] + sums["clip_fraction_high"] == clipped.sum()


def test_cispo_gives_every_token_a_gradient():
    """The factor must be limited, but it must not be differentiated, and no token may lose its gradient."""
    logp, batch = random_batch("token", off_policy=1.5)
    cfg = settings("cispo", clip_high=1.0)
    loss, sums = variants.cispo_loss(logp, batch, cfg)
    ratio = (logp - batch.logp_old).exp().detach()
    assert 0 < sums["clip_fraction_high"] == ((ratio > 2) & (batch.adv > 0)).sum()
    assert torch.allclose(gradient(loss, logp), -batch.weight * batch.adv * ratio.clamp(max=2))


def test_deepseek_v32_masks_what_is_off_policy_and_punished():
    """Only completions with a negative advantage may be left out, and only those that the policy has left. The KL term
    must keep its gradient through the ratio."""
    logp, batch = random_batch("token", seed=1, off_policy=1.0)
    cfg = settings("deepseek_v32", kl_coef=0.0)
    grad = gradient(variants.deepseek_v32_loss(logp, batch, cfg)[0], logp)
    usual = gradient(grpo_loss(logp, batch.logp_old, None, batch.adv, batch.weight, clip_low=0.2, clip_high=0.2,
                               kl_coef=0.0)[0], logp)
    left_out = 0
    for i in range(len(LENGTHS)):
        mine = ROW == i
        drift = (batch.logp_old - logp)[mine].mean()
        masked = batch.adv[mine][0] < 0 and drift > variants.DRIFT
        left_out += masked
        assert torch.equal(grad[mine], torch.zeros_like(grad[mine]) if masked else usual[mine])
    assert 0 < left_out < len(LENGTHS)
    batch.adv = torch.zeros_like(batch.adv)
    grad = gradient(variants.deepseek_v32_loss(logp, batch, settings("deepseek_v32", kl_coef=1.0))[0], logp)
    ratio = (logp - batch.logp_old).exp()
    expected = batch.weight * ratio * (logp - batch.logp_ref)  # d/dlogp of ratio (x - log x - 1), x = ref / theta
    assert torch.allclose(grad, expected.detach())


@pytest.mark.parametrize("name", ("reinforce", "rloo"))
def test_reinforce_has_no_ratio(name):
    """Off policy, the gradient must still be that of the log-probability, or the variant would be another one."""
    logp, batch = random_batch("constant", off_policy=1.0)
    loss, _ = VARIANTS[name].loss_fn(logp, batch, settings(name))
    assert torch.equal(gradient(loss, logp), -batch.weight * batch.adv)


# Advantages


def test_reinforce_has_a_running_mean():
    """The baseline must come from earlier steps alone, and it must be saved."""
    baseline = variants.RunningMean(decay=0.5)
    adv = [baseline(*rollout_of(torch.tensor([[r, r + 1]]))) for r in (0.0, 1.0, 1.0)]
    assert [a.tolist() for a in adv] == [[-0.5, 0.5], [0.5, 1.5], [0.0, 1.0]]
    other = variants.RunningMean(decay=0.5)
    other.load_state_dict(baseline.state_dict())
    assert other.mean == baseline.mean == 1.25


def test_rloo_is_centred_up_to_a_factor():
    """r - mean of the others is G / (G - 1) times r - mean of all. Groups without a signal must have advantages of
    exactly 0, because grpo_update skips them."""
    rewards = torch.tensor([[1.0, 0.0, 0.0, 2.0], [0.1, 0.1, 0.1, 0.1]])
    adv = variants.leave_one_out(*rollout_of(rewards)).view(2, 4)
    assert torch.allclose(adv, 4 / 3 * group_advantages(rewards, "none")) and not adv[1].any()


def test_maxrl_divides_by_the_mean():
    """Each reward must have its own mean, and a rarely solved prompt must count for more. A group in which nothing is
    rewarded must not divide by 0."""
    accuracy = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    form = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    rollout, cfg = rollout_of(accuracy + form, accuracy=accuracy, format=form)
    cfg.accuracy_weight = 2.0
    adv = variants.over_mean(rollout, cfg).view(3, 4)
    of_format = torch.tensor([[0.0] * 4, [1 / 3, 1 / 3, 1 / 3, -1], [0.0] * 4])
    assert torch.allclose(adv, 2 * torch.tensor([[3.0, -1, -1, -1], [1, 1, -1, -1], [0, 0, 0, 0]]) + of_format)


def test_gdpo_tells_rewards_apart():
    """Of four answers, one is correct and two have the format. GRPO sees equal sums. GDPO must give the rarer reward
    more, respect the weights, and have the standard deviation 1."""
    accuracy = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    form = torch.tensor([[0.0, 1.0, 1.0, 0.0], [1.0, 0.0, 1.0, 0.0]])
    rollout, cfg = rollout_of(accuracy + form, accuracy=accuracy, format=form)
    usual = variants.usual(rollout, cfg).view(2, 4)
    adv = variants.each_reward(rollout, cfg).view(2, 4)
    assert usual[0, 0] == usual[0, 1] and adv[0, 0] > adv[0, 1] + 0.1
    parts = torch.tensor([[1.5 - 0.866, -0.5 + 0.866, -0.5 + 0.866, -0.5 - 0.866], [0.866, -0.866, 0.866, -0.866]])
    assert torch.allclose(adv, parts / parts.std(), atol=2e-3) and adv.std() == pytest.approx(1, abs=1e-3)
    cfg.format_weight = 0.0
    assert not variants.each_reward(rollout, cfg).view(2, 4)[1].any()


def test_dapo_shapes_what_is_nearly_too_long():
    """The penalty must begin at four fifths of the budget, and be 1 at its end."""
    rollout, cfg = rollout_of(torch.tensor([[1.0, 1.0, 1.0, 1.0]]))
    cfg.rl_max_new_tokens, cfg.scale = 100, "none"
    rollout.completions = [[1] * n for n in (10, 80, 90, 100)]
    assert torch.allclose(variants.overlong(rollout, cfg), torch.tensor([1.0, 1.0, 0.5, 0.0]) - 0.625)


def test_dapo_samples_until_all_groups_have_a_signal(make_gpt):
    """Groups of equal rewards must be replaced, completions must stay with their prompts, and there must be an end."""
    def letter(text, problem):
        right = float(text[:1].isalpha() and problem.question == "1+2")
        return {"reward": right, "accuracy": right}

    def sample(questions, reward=letter):
        run = Bench(reward, questions, rl_max_new_tokens=1, rl_prompts=4)
        step = next(run.steps(1, 0.0, None))
        rollout = variants.sample_with_signal(run, run.cfg, step, model)
        return rollout, step, variants.groups(rollout, run.cfg)

    model = make_gpt(Arithmetic.encoding.n_vocab)
    rollout, step, rewards = sample(("1+2", "3*4"))
    assert len(step.asked) == 4 and rewards.shape == (4, 8) and {p.question for p in step.asked} == {"1+2"}
    assert not (rewards == rewards[:, :1]).all(dim=1).any()
    prompts = [Arithmetic().encode_prompt(parse("1+2"))] * 32
    assert rollout.prompts == prompts and all(len(column) == 32 for column in vars(rollout).values())
    rollout, step, rewards = sample(("1+2",) + ("3*4",) * 11)  # fewer than four groups have a signal
    assert len(step.asked) == len(rewards) < 4 and {p.question for p in step.asked} == {"1+2"}
    assert [s["reward"] for s in rollout.scores] == [float(text[:1].isalpha()) for text in rollout.texts]
    _, step, rewards = sample(("3*4",))  # never a signal
    assert len(step.asked) == 4 and not rewards.any()


# Other implementations


@pytest.mark.parametrize("seed", (1, 2, 3))
@pytest.mark.parametrize("name", (
    "ours", "no_clip", "deepseekmath", "dr_grpo", "dapo", "gspo", "cispo", "deepseek_v32"))
def test_losses_are_trls(name, seed):
    """Loss and gradient must be those of TRL, an implementation that shares no line with this one."""
    version = pytest.importorskip("trl").__version__
    if not version.startswith("1.16."):
        pytest.skip(f"this test calls the internals of TRL 1.16, not those of {version}")
    trl = importlib.import_module("trl.trainer.grpo_trainer")
    variant = VARIANTS[name]
    logp, batch = random_batch(variant.settings.get("normalize", "token"), seed, off_policy=2.0)
    cfg = settings(name, rl_max_new_tokens=8, **{"kl_coef": 0.1} if name != "gspo" and name != "cispo" else {})
    loss, sums = variant.loss_fn(logp, batch, cfg)
    assert name != "cispo" or sums["clip_fraction_high"] > 0
    assert name != "deepseek_v32" or 0 < sums["masked"] < len(ROW)
    grad = gradient(loss, logp)

    mask = torch.arange(int(LENGTHS.max())) < LENGTHS[:, None]

    def padded(x):
        return torch.zeros(mask.shape, dtype=x.dtype).masked_scatter(mask, x)

    trainer = object.__new__(trl.GRPOTrainer)
    theirs = padded(logp.detach()).requires_grad_()
    kind = {"dr_grpo": "dr_grpo", "cispo": "cispo"}.get(name) or {"sequence": "grpo", "token": "dapo"}[cfg.normalize]
    vars(trainer).update(
        loss_type=kind, importance_sampling_level="sequence" if name == "gspo" else "token", beta=cfg.kl_coef,
        epsilon_low=cfg.clip_low, epsilon_high=1 + cfg.clip_high if name == "cispo" else cfg.clip_high,
        max_completion_length=8, off_policy_mask_threshold=variants.DRIFT if name == "deepseek_v32" else None,
        args=SimpleNamespace(use_bias_correction_kl=name == "deepseek_v32", delta=None, steps_per_generation=1),
        top_entropy_quantile=1.0, use_vllm=False, current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False,
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        model=SimpleNamespace(training=True),
        _metrics={"train": collections.defaultdict(list)}, aux_loss_enabled=False)
    adv = torch.stack([batch.adv[ROW == i][0] for i in range(len(LENGTHS))])
    inputs = {"prompt_ids": torch.zeros(6, 1).long(), "prompt_mask": torch.ones(6, 1).long(),
              "completion_ids": mask.long(), "completion_mask": mask.long(), "advantages": adv,
              "old_per_token_logps": padded(batch.logp_old), "ref_per_token_logps": padded(batch.logp_ref),
              "num_items_in_batch": mask.sum()}
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (theirs, torch.zeros_like(theirs), None)
    expected = trainer._compute_loss(trainer.model, inputs)
    assert torch.allclose(loss, expected, rtol=1e-6, atol=1e-7)  # the weights are float32
    assert torch.allclose(padded(grad), gradient(expected, theirs), rtol=1e-6, atol=1e-7)


# The runs


@pytest.mark.parametrize("name", VARIANTS)
def test_bandit(make_gpt, name):
    """The policy samples one token, and a letter is rewarded. Each variant must learn this in a few steps."""
    encoding = Arithmetic.encoding
    model, prompt = make_gpt(encoding.n_vocab), Arithmetic().encode_prompt(parse("1+2"))

    def is_letter(text):
        return float(len(text) == 1 and text.isascii() and text.isalpha())

    def reward(text, problem):
        return {"reward": is_letter(text), "accuracy": is_letter(text), "format": 1.0}

    def chance():
        with torch.no_grad():
            probs = model(torch.tensor([prompt]))[0, -1].softmax(-1)
        return sum(p for t, p in enumerate(probs.tolist()) if is_letter(encoding.decode([t])))

    before = chance()
    run = Bench(reward, ("1+2",), rl_steps=12, rl_samples=64, rl_max_new_tokens=1)
    train_variant(name, run, model)
    after = chance()
    assert 0.1 < before < 0.3 and after > 0.8, (before, after)
    assert run.metrics[0].means()["kl"] is not None, "the table has the largest KL of every variant"


def test_ours_is_zero(quick, tmp_path):
    """"ours" is what the other variants are compared with, so it must be train.py's zero without its penalty."""
    train_zero = functools.partial(train_variant, "ours")
    program = PROGRAM._replace(stages=train.STAGES | {"zero": train.STAGES["zero"]._replace(train=train_zero)})
    for out in (tmp_path / "ours", tmp_path / "zero"):
        copy_files(quick, out, "base.pt", "results.json")
    assert run_command(program, [*QUICK, "--stage=zero", f"--out={tmp_path / 'ours'}"]) == 0
    assert main([*QUICK, f"--kl_coef={variants.LOGGED}", "--stage=zero", f"--out={tmp_path / 'zero'}"]) == 0
    assert weights_equal(tmp_path / "ours" / "zero.pt", tmp_path / "zero" / "zero.pt")
    assert not weights_equal(tmp_path / "ours" / "zero.pt", tmp_path / "ours" / "base.pt")


def test_a_variant_in_a_folder(quick, tmp_path, capsys):
    """A variant must appear beside base in the results, refuse flags for its own settings and for those that it does
    not use."""
    copy_files(quick, tmp_path, "base.pt", "results.json")
    assert variants.main(["dapo", *QUICK, "--eval_every=2", f"--out={tmp_path}"]) == 0
    assert "dapo" in results(tmp_path)["models"]
    capsys.readouterr()
    assert variants.main(["dapo", "--clip_high=0.3", f"--out={tmp_path}"]) == 2
    assert capsys.readouterr().err == "variants.py: dapo sets clip_high=0.28 itself\n"
    assert variants.main(["gspo", "--kl_coef=0.1", f"--out={tmp_path}"]) == 2
    assert variants.main(["rloo", "--clip_low=0.1", f"--out={tmp_path}"]) == 2
    assert capsys.readouterr().err.endswith("variants.py: rloo does not use clip_low\n")
    assert variants.main(["nonsense"]) == 2


def test_reinforce_resumes_its_baseline(quick, tmp_path, monkeypatch):
    """The running mean must be saved, or a resumed run would go on with another baseline."""
    for name in ("whole", "cut"):
        copy_files(quick, tmp_path / name, "base.pt", "results.json")
        flags = ["reinforce", *QUICK, f"--out={tmp_path / name}"]
        if name == "cut":
            compute, calls = variants.RunningMean.__call__, []

            def interrupted(self, *args):
                calls.append(self)
                if len(calls) == 4:
                    raise KeyboardInterrupt
                return compute(self, *args)

            monkeypatch.setattr(variants.RunningMean, "__call__", interrupted)
            assert variants.main(flags) == 130
        assert variants.main(flags) == 0
    assert weights_equal(tmp_path / "whole" / "reinforce.pt", tmp_path / "cut" / "reinforce.pt")


def test_table_and_figure(tmp_path):
    """The table must say that a variant diverged, and in how many runs."""
    figures = {"pass@1": 0.9, "pass@1_se": 0.01, "format": 1.0, "length": 30.0}
    found = [{"models": {"zero": {"test": figures, "hard": figures}}, "seconds": 10.0,
              "rows": {"zero": {field: [None, 0.5, 0.25 * seed + 0.5] for field in cells.KEPT}}} for seed in range(3)]
    names = [f"stress {name}" for name in VARIANTS]
    k = tables.Known(dict.fromkeys(names, found) | {"stress gspo": [*found[:2], found[2] | {"models": {}}]})
    lines = tables.variants_table(k, "stress")
    assert len(lines) == len(VARIANTS) + 4
    assert lines[3].startswith("| `ours` | 90.0 ± 1.0 |  | 90.0 ± 1.0 | 100.0 ± 0.0 | never, never, 3 |")
    assert lines[4].startswith("| `no_clip` | 90.0 ± 1.0 | 0.0 ± 1.4 | 90.0 ± 1.0 |")
    assert "| `gspo` | diverged in 1 of 3 runs, after 3 steps |" in lines[3 + list(VARIANTS).index("gspo")]
    rows = found[0]["rows"]["zero"] | {"a": [None] * 3, "b": [0.1, None, 0.3]}
    assert tables.largest(rows, "b", "a") == 0.3 and tables.steps_to(rows["entropy"], 0.95) == math.inf
    pytest.importorskip("matplotlib")
    from plot import draw_variants
    curves = {name: {"default": [[None, 0.5]], "stress": [[0.1, None]]} for name in VARIANTS}
    draw_variants(curves, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_each_variant_is_short():
    """A variant is a function or two with at most 15 lines of code of their own, without signatures."""
    for name, variant in VARIANTS.items():
        parts = {variant.advantages, variant.loss_fn, variant.sample} - set(Variant({})[1:])
        code = sum(len(code_lines(part)) for part in parts)
        assert code <= 15, (name, code)


def code_lines(part) -> list[str]:
    """The lines of a function or class without its docstrings, blank lines and comments."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(part)))
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    lines = [line.strip() for line in ast.unparse(tree).splitlines()]
    return [line for line in lines if line and not line.startswith(("def ", "class "))]


def test_names():
    """--stage=NAME runs all stages whose names begin with NAME."""
    names = [*train.STAGES, *VARIANTS]
    assert not any(other != name and other.startswith(name) for name in VARIANTS for other in names)
    assert all(f"    {name} " in variants.__doc__ for name in VARIANTS)


def test_examples_in_the_docstrings():
    assert doctest.testmod(variants).failed == 0
