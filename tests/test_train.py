"""The command line, end to end in subprocesses: what a run leaves, what it refuses, and what it survives."""
import itertools
import json
import pickle
import random
import re
import resource
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from data import arithmetic
from data.tokenizer import get_tokenizer
from model import GPT, generate, token_logprobs
from rewards import accuracy_reward, extract_answer, format_reward, reflects
from run import Config, build_model, load_checkpoint, parse_args
from tests.conftest import QUICK
from train import check, compiled, evaluate, main, majority, make_task, pass_at_k, reward_function, settle

ROOT = Path(__file__).parent.parent
NAMES = ["base", "zero", "student_base", "student"]


def train(*args, **kwargs):
    return subprocess.run([sys.executable, "train.py", *args], cwd=ROOT, capture_output=True, text=True, **kwargs)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A finished quick run."""
    out = tmp_path_factory.mktemp("quick")
    assert main([*QUICK, f"--out={out}"]) == 0
    return out


@pytest.fixture(scope="module", autouse=True)
def tiny_under_way(request, tmp_path_factory):
    """Begins the README's smoke run beside the first tests of this file, if others want it."""
    if not any("tiny" in item.fixturenames for item in request.session.items):
        return (yield)
    out = tmp_path_factory.mktemp("tiny")
    process = subprocess.Popen([sys.executable, "train.py", "--preset=tiny", "--threads=1", f"--out={out}"], cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    yield out, process
    process.kill()


@pytest.fixture(scope="module")
def tiny(tiny_under_way):
    """The smoke run, finished: where it wrote, and what it printed."""
    out, process = tiny_under_way
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    return out, stdout


def results(out):
    return json.loads((out / "results.json").read_text())


def rows(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def copy(out, to, *names):
    """The part of a finished run that a test goes on from."""
    to.mkdir(exist_ok=True)
    for name in names:
        (to / name).write_bytes((out / name).read_bytes())


def weights_equal(path, other):
    """Are two checkpoints' weights equal, bit for bit?"""
    a, b = (torch.load(p, weights_only=True)["model"] for p in (path, other))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def refused(capfd):
    """refused(*args): the run ends with exit code 2 and one line on stderr, which is returned."""
    def check(*args):
        assert main(list(args)) == 2
        line = capfd.readouterr().err
        assert line.count("\n") == 1 and line.startswith("train.py: "), line
        return line
    return check


def test_same_seed_same_run(quick, tmp_path):
    """A draw from a generator that nobody seeded."""
    assert main([*QUICK, f"--out={tmp_path}"]) == 0
    for name in NAMES:
        assert weights_equal(quick / f"{name}.pt", tmp_path / f"{name}.pt")
    assert results(quick)["models"] == results(tmp_path)["models"]


def test_killed_run_goes_on(quick, tmp_path):
    """SIGKILL at a random moment of every stage of one run; it must end as if nothing had happened."""
    lengths = {name: sum(row["stage"] == name for row in rows(quick)) for name in NAMES}
    log, printed = tmp_path / "log.jsonl", ""
    for stage, steps in lengths.items():
        process = subprocess.Popen([sys.executable, "train.py", *QUICK, f"--out={tmp_path}"], cwd=ROOT,
                                   stdout=subprocess.PIPE, text=True)
        reached = f'{{"stage": "{stage}", "step": {random.randint(2, steps // 2)},'  # step 1 has been saved then
        while not (log.exists() and reached in log.read_text()):
            assert process.poll() is None, f"the run ended before it could be killed: {process.stdout.read()}"
            time.sleep(0.002)
        time.sleep(random.random() * 0.005)
        process.send_signal(signal.SIGKILL)
        printed += process.communicate()[0]
    done = train(*QUICK, f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    went_on = dict(re.findall("^([a-z_]+): going on after step ([0-9]+)", printed + done.stdout, re.MULTILINE))
    assert list(went_on) == NAMES and all(int(step) > 0 for step in went_on.values())
    for name in NAMES:
        assert weights_equal(quick / f"{name}.pt", tmp_path / f"{name}.pt"), name
    assert results(quick)["models"] == results(tmp_path)["models"]
    assert [(r["stage"], r["step"]) for r in rows(quick)] == [(r["stage"], r["step"]) for r in rows(tmp_path)]


def test_ctrl_c_saves(tmp_path):
    """An interrupted run that lost its steps, tore one in the middle, or left its second process behind (whose end
    closes what communicate() reads)."""
    args = [sys.executable, "train.py", *QUICK, "--processes=2", "--save_every=1000", f"--out={tmp_path}"]
    process = subprocess.Popen(args, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "base 1/" not in (line := process.stdout.readline()):
        assert line, process.stderr.read()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 130 and "the same command goes on" in stderr and stderr.count("\n") <= 2
    assert torch.load(tmp_path / "resume.pt", weights_only=True)["step"] >= 1


def test_one_stage_at_a_time(quick, tmp_path, refused):
    """--stage that trained something else on the way, or did not find what the stage before left."""
    assert "base.pt is missing" in refused(*QUICK, "--stage=zero", f"--out={tmp_path / 'empty'}")
    copy(quick, tmp_path, "base.pt")
    assert main([*QUICK, "--stage=zero", f"--out={tmp_path}"]) == 0
    assert (tmp_path / "zero.pt").exists() and not (tmp_path / "student_base.pt").exists()


def test_finished_run_may_gain_the_control(quick, tmp_path):
    """student_rl starts from student_base and has the student's number of updates, each on as many completions; nothing
    else is made again."""
    copy(quick, tmp_path, *(f"{name}.pt" for name in NAMES), "log.jsonl", "results.json")
    assert main([*QUICK, "--student_rl=True", f"--out={tmp_path}"]) == 0
    config = results(tmp_path)["config"]
    control = [row for row in rows(tmp_path) if row["stage"] == "student_rl"]
    updates = config["distill_steps"] * config["distill_epochs"] * config["distill_minibatches"]
    assert len(control) == updates / config["rl_minibatches"]
    completions = config["distill_prompts"] / config["distill_minibatches"] * config["rl_minibatches"]
    assert all((row["format"] * completions).is_integer() for row in control)  # a share of a rollout's completions
    assert "student_rl" in results(tmp_path)["models"]
    assert (tmp_path / "zero.pt").read_bytes() == (quick / "zero.pt").read_bytes()


def test_other_settings_are_refused(quick, refused):
    """Stages of one run made with different settings: results.json would describe neither."""
    before = (quick / "zero.pt").read_bytes()
    line = refused(*QUICK, "--kl_coef=0.5", f"--out={quick}")
    assert "kl_coef" in line and "another --out" in line
    refused(*QUICK, "--seed=7", f"--out={quick}")
    assert (quick / "zero.pt").read_bytes() == before


@pytest.mark.parametrize("args, words", [
    (["--task=countdown", "--max_ops=5"], "--task=arithmetic"),
    (["--task=countdown", "--max_number=100"], "at most 99"),
    (["--accuracy_weight=0", "--format_weight=0"], "both"),
])
def test_settings_that_do_not_go_together(tmp_path, refused, args, words):
    """A setting that another one silently makes void."""
    assert words in refused(*args, f"--out={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arg, words", [
    ("--rl_step=3", "did you mean --rl_steps"), ("--zzz=3", "unknown argument"), ("rl_steps=3", "unknown argument"),
    ("--rl_steps", "needs a value"), ("--rl_steps=1.5", "whole number"), ("--rl_steps=0", "above 0"),
    ("--kl_coef=nan", "a number"), ("--kl_coef=-1", "0 or more"), ("--normalize=mean", "sequence, token, constant"),
    ("--on_policy=yes", "True, False"), ("--stage=rl", "base, zero, student"), ("--preset=huge", "tiny"),
    ("--n_embd=63", "n_embd"), ("--rl_samples=1", "2 or more"), ("--rl_max_new_tokens=1000", "at most"),
    ("--block_size=100", "multiple of 8"), ("--max_ops=1", "2 or more"), ("--micro_batch=100", "longest row"),
    ("--max_number=1000", "at most 999"), ("--max_factor=1", "2 or more"), ("--max_ops=40", "at most"),
    ("--corpus_share=0.5", "needs a --corpus"), ("--wait_share=1.5", "at most 1"), ("--worked_share=-1", "0 or more"),
    ("--problems=nowhere.jsonl", "nowhere.jsonl"), ("--corpus=nowhere.txt", "nowhere.txt"), ("--parentheses=1", "True"),
    ("--processes=40", "more than a batch's rows"),
    ("--ask=hello", "no expression"), ("--ask=__import__('os')", "no expression"), ("--ask=8*7", "no model"),
])
def test_bad_input(tmp_path, capsys, arg, words):
    """A typing error that ends in a traceback, that is silently ignored, or that begins a run all the same."""
    out = tmp_path / "out"
    assert main([arg, f"--out={out}"]) == 2
    printed = capsys.readouterr()
    assert words in printed.err and printed.err.count("\n") == 1 and not printed.out
    assert not out.exists()


def test_too_few_problems_are_found_out_at_once(tmp_path, refused):
    """So easy a task that its test side lacks problems: found out after pretraining, or by a search without end."""
    easy = ["--max_ops=2", "--max_number=1", "--max_factor=2"]
    assert "fewer than 256 test problems" in refused(*easy, f"--out={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


def test_out_that_cannot_be_written(tmp_path, refused):
    """A file in the way of --out: a traceback, or the file overwritten."""
    (tmp_path / "file").write_text("precious")
    done = train("--preset=tiny", f"--out={tmp_path / 'file' / 'out'}")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "cannot write" in done.stderr, done
    refused("--preset=tiny", f"--out={tmp_path / 'file'}")
    assert (tmp_path / "file").read_text() == "precious"


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path(__file__).parent / "bomb_went_off",)


@pytest.mark.parametrize("kind", ["truncated", "text", "foreign", "malicious", "other stage"])
def test_foreign_checkpoints(quick, tmp_path, refused, kind):
    """A checkpoint is data from outside: never executed, never overwritten, one line."""
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


def test_full_disk(quick, tmp_path):
    """A write that fails half-way and takes the checkpoint before it along. The limit on a file's size stands in for a
    disk that is full: there is room for base.pt, not for what the next stage saves."""
    copy(quick, tmp_path, "base.pt", "log.jsonl", "results.json")
    room = (quick / "base.pt").stat().st_size
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    done = train(*QUICK, f"--out={tmp_path}", preexec_fn=limit)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "cannot write" in done.stderr, done.stderr
    assert not list(tmp_path.glob("*.tmp"))
    assert (tmp_path / "base.pt").read_bytes() == (quick / "base.pt").read_bytes()
    assert main([*QUICK, "--stage=zero", f"--out={tmp_path}"]) == 0
    assert weights_equal(quick / "zero.pt", tmp_path / "zero.pt")


def test_not_a_number_stops_the_run(tmp_path, refused):
    """A run that went on for hours on NaN. A learning rate that no model survives brings it about."""
    line = r"at step (\d+); the last good checkpoint is \S+resume.pt, step (\d+)"
    step, saved = re.search(line, refused(*QUICK, "--base_adam_lr=1e30", f"--out={tmp_path}")).groups()
    assert int(saved) == int(step) - 1 == torch.load(tmp_path / "resume.pt", weights_only=True)["step"]


def test_ask_shows_models_side_by_side(quick, capsys):
    """--ask that leaves out a model, or answers for the wrong one."""
    assert main(["--ask=8*7-19", f"--out={quick}"]) == 0
    first, *others = capsys.readouterr().out.splitlines()
    assert first == "8*7-19 = 37" and [line.split()[0] for line in others] == NAMES


def test_importing_has_no_side_effect(tmp_path):
    """A module that prints, warns or writes when a fork imports it."""
    modules = "train, run, distill, grpo, rewards, model, data.arithmetic"
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {modules}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == done.stderr == "" and not list(tmp_path.iterdir())


@pytest.mark.parametrize("slow, expected", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_auto_takes_the_quicker_dtype(monkeypatch, slow, expected):
    """bfloat16 by hope: a CPU without its matrix units is slower with it. One of the two is made to take its time."""
    forward = GPT.forward

    def slowed(model, idx):
        time.sleep(0.1 * (model.dtype == getattr(torch, slow)))
        return forward(model, idx)

    monkeypatch.setattr(GPT, "forward", slowed)
    cfg = Config(device="cpu", compile="off", threads=1, base_batch=1, n_layer=1, n_head=1, n_embd=16)
    assert settle(cfg).dtype == expected
    assert settle(Config(device="cpu", compile="off", threads=1, dtype=slow)).dtype == slow


def test_compiling_is_settled_by_trying(capsys):
    """A laptop without a C++ compiler: a traceback of a hundred lines in the middle of the run."""
    cfg = Config(device="cpu", dtype="float32", threads=1)
    with torch._inductor.config.patch("cpp.cxx", ("no-such-compiler",)):
        assert settle(cfg).compile == "off"
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and "goes without" in printed


def test_a_compiled_block_is_the_same_block(make_gpt):
    """A compiler's pass that differs from the one that samples, or that is compiled again for each size of a batch."""
    plain, model, cfg = make_gpt(), make_gpt(), Config(device="cpu", compile="on")
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
    """Another attention, padding or rotation in the compiled step than in training, weights from before an update, or a
    step that is compiled again for each batch size, length or model."""
    plain, cfg, prompts = make_gpt(), Config(device="cpu", compile="on"), [[1], [2, 3, 4], [5, 6]]
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


def test_tiny_learns(tiny):
    """A recipe in which some stage no longer learns would still run to its end."""
    out, _ = tiny
    log = rows(out)
    base = [row["loss"] for row in log if row["stage"] == "base"]
    assert sum(base[-5:]) / 5 < 0.5 * base[0]
    models = results(out)["models"]
    assert models["zero"]["test"]["format"] > models["base"]["test"]["format"] + 0.15
    assert models["student"]["test"]["format"] > models["student_base"]["test"]["format"] + 0.05


def test_report_and_results(tiny):
    """A figure that the report shows must be the one in results.json, and every promised key must be there."""
    out, stdout = tiny
    found = results(out)
    assert set(found["models"]) == set(NAMES) and set(NAMES) <= set(found["seconds"])
    for model in found["models"].values():
        for side in ("test", "hard"):
            assert set(model[side]) == {"pass@1", "pass@1_se", "maj@16", "pass@16", "format", "length", "reflection",
                                        "n_problems"}
    text = (out / "report.md").read_text()
    assert text in stdout
    assert f"{found['models']['zero']['test']['format']:.1%}" in text and "accuracy over" in text
    assert found["models"]["student"]["params"] * 2 < found["models"]["zero"]["params"]


def test_log_has_a_row_for_every_step(tiny):
    """A step without a row, a metric that the terminal shows and the log has not."""
    out, _ = tiny
    steps = {name: [row["step"] for row in rows(out) if row["stage"] == name] for name in NAMES}
    for found in steps.values():
        assert found == list(range(1, len(found) + 1))
    zero = next(row for row in rows(out) if row["stage"] == "zero")
    assert {"reward", "accuracy", "format", "length", "length_wrong", "kl", "clip_low", "clip_high", "entropy",
            "no_signal", "reflection", "truncated", "tokens_per_s"} <= set(zero)


def test_reference_is_refreshed(tiny, tmp_path):
    """--ref_every that never refreshes, or at the wrong steps: the KL to a reference as young as the policy is 0."""
    copy(tiny[0], tmp_path, "base.pt")
    done = train("--preset=tiny", "--threads=1", "--stage=zero", "--rl_steps=5", "--rl_minibatches=1",
                 "--kl_coef=0.001", "--eval_problems=2", "--ref_every=2", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    kl = [row["kl"] for row in rows(tmp_path) if row["stage"] == "zero"]
    assert [value == 0 for value in kl] == [True, False, True, False, True]


def test_the_gpu_preset_takes_its_steps(tmp_path):
    """A preset that nobody can try on a laptop: prompts that do not fit its rows, a shape that its heads do not divide.
    A few steps of each stage, on small batches for its full models."""
    few = ["--base_batch=1", "--base_tokens=512", "--student_base_batch=1", "--student_base_tokens=256",
           "--rl_steps=2", "--rl_prompts=2", "--rl_samples=2", "--distill_steps=1", "--distill_prompts=2",
           "--distill_minibatches=1", "--on_policy=True", "--eval_problems=2", "--rl_max_new_tokens=7"]
    cfg, _ = parse_args(["--preset=gpu"])
    check(cfg), make_task(cfg)
    args = ["--preset=gpu", "--device=cpu", "--dtype=float32", "--compile=off", "--threads=1", "--micro_batch=1024"]
    assert main([*args, *few, f"--out={tmp_path}"]) == 0
    params = {name: model["params"] for name, model in results(tmp_path)["models"].items()}
    assert 10e6 < params["zero"] < 30e6 and params["student"] * 5 < params["zero"]
    assert [row["stage"] for row in rows(tmp_path)] == ["base", "base", "zero", "zero", "student_base", "student"]


def test_countdown_passes_through_every_stage(tmp_path, capsys):
    """A task that only the default's stages fit; a model asked with the other task's parser."""
    assert main([*QUICK, "--task=countdown", f"--out={tmp_path}"]) == 0
    assert list(results(tmp_path)["models"]) == NAMES
    capsys.readouterr()
    assert main(["--ask=3 4 7 = 25", f"--out={tmp_path}"]) == 0
    assert capsys.readouterr().out.startswith("3 4 7 = 25 = 3*7+4\nbase")
    assert main(["--ask=8*7", f"--out={tmp_path}"]) == 2 and "no countdown" in capsys.readouterr().err


def test_a_log_of_something_else_is_kept(tmp_path, capsys):
    """A file that happens to be called log.jsonl, overwritten."""
    (tmp_path / "log.jsonl").write_text("dear diary\n")
    assert main([*QUICK, f"--out={tmp_path}"]) == 2 and "not a nanoR1 log" in capsys.readouterr().err
    assert (tmp_path / "log.jsonl").read_text() == "dear diary\n"


def test_results_of_something_else_are_kept(tmp_path, capsys):
    """The same for results.json."""
    (tmp_path / "results.json").write_text("[1, 2]")
    assert main([*QUICK, f"--out={tmp_path}"]) == 2 and "not a nanoR1 run's" in capsys.readouterr().err
    assert (tmp_path / "results.json").read_text() == "[1, 2]"


def test_help_lists_every_field(capsys):
    """A setting that nobody can find."""
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f" {name}: " in printed for name in vars(Config())) and "python train.py" in printed


# Evaluation


def test_pass_at_k_by_enumeration():
    """1 - (1 - c/n)^k, which is biased: the share of all k-subsets of n samples that hold one of the c right ones."""
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(itertools.combinations([i < c for i in range(n)], k))
                assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize("answers, expected", [
    (["7", "3", "3"], "3"), (["7", "3", "3", "7"], "7"), ([None, None, None, "3"], "3"), ([None, None], None),
    ([], None)])
def test_majority(answers, expected):
    """Answers that could not be read win the vote; a tie goes to the first of the answers."""
    assert majority(answers) == expected


class Lenient(arithmetic.Problem):
    """A model as small as the tiny preset's is never right; as to whether the answer is even, it is now and then."""
    def check(self, answer):
        return answer[-1:] in ("02468" if self.answer in "02468" else "13579")


def test_evaluation_counts_what_was_sampled(tiny):
    """A standard error over samples instead of problems, a vote over the wrong rows, a length without end of text:
    every figure again, by hand, from the same samples."""
    out, _ = tiny
    model, encoding = build_model(load_checkpoint(out / "zero.pt")), get_tokenizer()

    def sample(problems, generator=None, **options):
        rows = generate(model, [encoding.encode_ordinary(p.prompt) for p in problems], 40, eos_id=encoding.eot_token,
                        generator=generator, **options)
        return [(encoding.decode([t for t in row if t != encoding.eot_token]), len(row)) for row in rows]

    problems = [Lenient(f"{a}-{b}", str(b)) for a in range(1, 6) for b in range(1, 9)]  # more than one batch of 32
    found = evaluate(model, problems, reward_function(Config()), max_new_tokens=40,
                     generator=torch.Generator().manual_seed(3), greedy=True)

    generator = torch.Generator().manual_seed(3)
    rows = sample(problems[:32], generator, samples=16) + sample(problems[32:], generator, samples=16)
    texts, lengths = zip(*rows)
    groups = [texts[i:i + 16] for i in range(0, len(texts), 16)]
    right = [[accuracy_reward(text, problem) for text in group] for group, problem in zip(groups, problems)]
    means = [sum(row) / 16 for row in right]
    votes = 0
    for group, problem in zip(groups, problems):
        answers = [a for a in map(extract_answer, group) if a is not None]
        votes += bool(answers) and problem.check(max(answers, key=answers.count))
    assert len(texts) == 640 and 0 < statistics.mean(means) < 1 and 0 < votes < 40
    assert found == pytest.approx({
        "pass@1": statistics.mean(means), "pass@1_se": statistics.stdev(means) / 40**0.5, "maj@16": votes / 40,
        "pass@16": sum(map(any, right)) / 40, "format": statistics.mean(map(format_reward, texts)),
        "length": statistics.mean(lengths), "reflection": statistics.mean(map(reflects, texts)),
        "n_problems": 40, "greedy": found["greedy"]})
    likeliest, _ = zip(*sample(problems, temperature=0.0))
    assert found["greedy"] == statistics.mean(map(accuracy_reward, likeliest, problems))
