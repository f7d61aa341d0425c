"""nanoR1: random weights -> base -> zero -> student, in one command.

    base          next-token prediction on the corpus of the task, in data/, or your own text (Muon and AdamW)
    zero          GRPO on the base, from rule-based rewards alone: no supervised fine-tuning
    student_base  a base of its own for a smaller GPT, on the same corpus
    student       the RL teacher distilled into it
    student_rl    the control, if asked for: GRPO on student_base with the student's number of updates and completions

    python train.py                            everything, then the report
    python train.py --stage=base|zero|student  one stage, on the earlier ones' checkpoints
    python train.py --student_rl=True          the control too; a finished run may gain it
    python train.py --preset=tiny              the same in seconds: does it run at all?
    python train.py --ask="8*7-19"             what each model answers
    python train.py --seed=1 --out=out/seed1   --key=value sets any field of Config
    torchrun --standalone --nproc_per_node=2 train.py    in several processes (or --processes=2; see parallel.py)

It writes into --out (out/, or out/PRESET): NAME.pt for each finished stage, resume.pt for the stage under way,
log.jsonl (a row a step), results.json, report.md. Started again with the same settings it goes on from the last
checkpoint, to the same result bit for bit: whatever a step draws at random is seeded by (seed, stage, step). With other
numbers of processes or threads it goes on too, to a result that is as good and not the same. This file, run.py, which
keeps the files, and parallel.py are the only ones with side effects.
"""
import dataclasses
import functools
import inspect
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.arithmetic import Arithmetic
from data.countdown import LARGEST, Countdown
from data.own import OwnCorpus, OwnProblems, Problem, fingerprint, path_of
from data.tokenizer import get_tokenizer
from distill import distill_step
from grpo import grpo_step, sample_rollout
from model import GPT, GPTConfig, Optimizer, generate
from parallel import Lost, add_up, broadcast, end, join, launched, leave, rank, share, start
from rewards import accuracy_reward, extract_answer, format_reward, reflects
from run import (EVALUATED_BY, SHAPED_BY, STAGES, Config, Fault, Run, build_model, draws, load_checkpoint, lr_scale,
                 parse_args, refuse_changes, train_stage, write_file)

EVAL_SAMPLES = 16  # completions of each evaluated problem: maj@16, pass@16


# Settings that depend on the machine or the task


def make_task(cfg: Config):
    """The problems and the corpus that the settings ask for; a fork's own task takes its place here. Raises Fault for a
    file that is not as it should be, and if there are too few problems or they do not fit."""
    if cfg.task == "countdown":
        task = Countdown(cfg.max_number, cfg.worked_share, cfg.wait_share)
    else:
        task = Arithmetic(cfg.max_ops, cfg.max_number, cfg.max_factor, cfg.parentheses, cfg.worked_share,
                          cfg.wait_share)
    try:
        if cfg.problems:
            answer = cfg.rl_max_new_tokens - 6  # less the tags, a thought of one token, and the end
            task = OwnProblems(task, path_of(cfg.problems), cfg.block_size - cfg.rl_max_new_tokens, answer)
        if cfg.corpus:
            task = OwnCorpus(task, path_of(cfg.corpus), cfg.corpus_share)
            times = max(cfg.base_tokens, cfg.student_base_tokens) * cfg.corpus_share / task.n_tokens
            task.notes += [f"{path_of(cfg.corpus)}: read about {times:.1f} times"] * (times > 1)
        for kind in task.held_out:
            task.heldout_problems(cfg.eval_problems, kind, cfg.seed)
    except ValueError as error:
        raise Fault(str(error)) from None
    room = cfg.block_size - task.max_prompt_tokens
    if cfg.rl_max_new_tokens > room:
        raise Fault(f"--rl_max_new_tokens must be at most {room}: block_size less a prompt")
    return task


def check(cfg: Config) -> None:
    """Raises Fault where settings that are each right do not go together."""
    try:
        shape(cfg, "base"), shape(cfg, "student")
    except ValueError as error:
        raise Fault(str(error)) from None
    for wrong, line in (
        (cfg.task == "countdown" and any(getattr(cfg, key) != getattr(Config, key)
                                         for key in ("max_ops", "max_factor", "parentheses")),
         "--max_ops, --max_factor and --parentheses are settings of --task=arithmetic"),
        (cfg.task == "countdown" and cfg.max_number > LARGEST, f"--max_number is at most {LARGEST} in countdown"),
        (cfg.max_ops < 2, "--max_ops must be 2 or more: test problems have at least two operations"),
        (cfg.max_factor < 2, "--max_factor must be 2 or more"),
        (max(cfg.max_number, cfg.max_factor) > 999, "--max_number and --max_factor are at most 999"),
        (max(cfg.corpus_share, cfg.worked_share, cfg.wait_share) > 1,
         "--corpus_share, --worked_share and --wait_share are at most 1"),
        (not cfg.accuracy_weight and not cfg.format_weight, "--accuracy_weight and --format_weight cannot both be 0"),
        (cfg.corpus_share < 1 and not cfg.corpus, "--corpus_share needs a --corpus"),
        (cfg.micro_batch < cfg.block_size, "--micro_batch must be --block_size at least: the longest row"),
        (cfg.block_size % 8, "--block_size must be a multiple of 8, as the lengths of micro-batches are"),
        (cfg.rl_samples < 2, "--rl_samples must be 2 or more: an advantage compares answers to one prompt"),
        (cfg.clip_low >= 1, "--clip_low must be under 1: the ratio's lower bound is 1 - clip_low"),
        (cfg.rl_max_new_tokens >= cfg.block_size, "--rl_max_new_tokens must be at most block_size less a prompt"),
        (cfg.rl_minibatches > cfg.rl_prompts * cfg.rl_samples, "--rl_minibatches is more than a rollout's completions"),
        (cfg.distill_minibatches > cfg.distill_prompts, "--distill_minibatches is more than --distill_prompts"),
        (cfg.ref_every and not cfg.kl_coef, "--ref_every refreshes the reference, which only a --kl_coef above 0 has"),
        (cfg.on_policy and cfg.divergence == "sft", "--divergence=sft learns the teacher's samples: not --on_policy"),
        (cfg.processes > min(cfg.base_batch, cfg.student_base_batch), "--processes is more than a batch's rows"),
        (cfg.base_tokens < cfg.base_batch * cfg.block_size, "--base_tokens is less than one batch"),
        (cfg.student_base_tokens < cfg.student_base_batch * cfg.block_size,
         "--student_base_tokens is less than one batch"),
        (cfg.device == "cuda" and not torch.cuda.is_available(), "--device=cuda: torch sees no CUDA GPU here"),
        (cfg.device == "mps" and not torch.backends.mps.is_available(), "--device=mps: torch sees no Apple GPU here"),
    ):
        if wrong:
            raise Fault(line)


def shape(cfg: Config, name: str) -> GPTConfig:
    """The shape of a stage's model."""
    prefix = "student_" if name.startswith("student") else ""
    n_layer, n_head, n_embd = (getattr(cfg, prefix + key) for key in ("n_layer", "n_head", "n_embd"))
    return GPTConfig(get_tokenizer().n_vocab, cfg.block_size, n_layer, n_head, n_embd)


def settle(cfg: Config) -> Config:
    """Replace "auto" by what this machine has: a GPU before the CPU, bfloat16 only where it is quicker."""
    device, cores = cfg.device, torch.get_num_threads()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    threads = cfg.threads or (cores if launched() else max(1, cores // cfg.processes))  # torchrun has set them
    torch.set_num_threads(threads)
    cfg = dataclasses.replace(cfg, device=device, threads=threads)
    if cfg.processes > {"cpu": cfg.processes, "cuda": torch.cuda.device_count(), "mps": 1}[device]:
        raise Fault(f"--processes={cfg.processes} are more than there are GPUs: fewer, or --device=cpu")
    if cfg.dtype == "auto":
        cfg = dataclasses.replace(cfg, dtype=quicker_dtype(cfg))
    if cfg.compile == "auto":
        cfg = dataclasses.replace(cfg, compile="on" if device == "cpu" and can_compile() else "off")
    return cfg


def processors(cfg: Config) -> str:
    """In words.

    >>> processors(Config(processes=2, threads=1))
    '2 processes of 1 thread'
    """
    return f"{cfg.processes} process{'es' * (cfg.processes > 1)} of {cfg.threads} thread{'s' * (cfg.threads > 1)}"


def tune_libraries() -> None:
    """Set what torch's libraries read from the environment; call it before the first product.

    oneDNN keeps its compiled kernels for the last 256 shapes: it would keep a thousand, which is memory, and far fewer
    are compiled again and again. torch.compile calls its kernels from C++ instead of from Python, and takes the vector
    units that the CPU says it has: it would first spend 6 s on trying them one by one, where can_compile tries all at
    once.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
    os.environ.setdefault("TORCHINDUCTOR_CPP_WRAPPER", "1")
    os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")


def quicker_dtype(cfg: Config) -> str:
    """Time a pretraining step both ways, in turn. A CPU without bf16 matrix units is slower in bf16 than in fp32."""
    model = GPT(shape(cfg, "base")).to(cfg.device)
    idx = torch.zeros(cfg.base_batch, cfg.block_size, dtype=torch.long, device=cfg.device)
    seconds = {"float32": [], "bfloat16": []}
    for name in list(seconds) * 3:
        start, model.dtype = time.perf_counter(), getattr(torch, name)
        loss = model(idx).float().sum()
        loss.backward()
        loss.item(), model.embedding.weight.grad.sum().item()  # waits for a GPU
        seconds[name].append(time.perf_counter() - start)
    return min(seconds, key=lambda name: min(seconds[name][1:]))


def can_compile() -> bool:
    """Does torch.compile work here? On a CPU it needs a C++ compiler and Python's headers. Says so if not."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8))
    except RuntimeError as error:
        print(f"torch.compile does not work here, and the run goes without: {str(error).splitlines()[0]}")
        return False
    return True


def compiled(model: GPT, cfg: Config, training: bool = False, sampling: bool = False) -> GPT:
    """The model with its passes for training and for sampling compiled, if the run is to: once, for all sizes."""
    if cfg.compile == "on":
        # subtle: what was compiled for another size rounds differently. So all is compiled here, at a fixed size, and
        # nothing later, so that a run that was killed goes on to the same result; what does not fit (a batch of one
        # row) is run as it is. No other dimension has these sizes, or the compiler would take the two for one.
        torch.compiler.set_stance("default")
        torch._dynamo.config.specialize_float = True  # or it finds out on its own that no float varies: 3 s, twice
        if training:
            for block in model.blocks:
                block.compile(dynamic=True)
            # For more tokens than 4,096 it writes other code: why a micro-batch has at most as many by default.
            length = model.config.block_size - 3
            idx = torch.zeros(max(2, cfg.micro_batch // length - 1), length, dtype=torch.long, device=cfg.device)
            model(idx).float().sum().backward()
            model.zero_grad(set_to_none=True)
        if sampling:
            model.next_token = torch.compile(model.next_token, dynamic=True)
            generate(model, [[0] * 11], 3, eos_id=-1, samples=509)
        torch.compiler.set_stance("eager_on_recompile")
    return model


def open_run(cfg: Config, out: Path) -> Run:
    """Begin a run, or go on with the one in `out`. Raises Fault if that one was made with other settings."""
    if launched() and cfg.processes not in (Config.processes, launched()):
        raise Fault(f"--processes={cfg.processes}, but launched as {launched()}, which decides")
    cfg = dataclasses.replace(cfg, processes=launched() or cfg.processes)
    check(cfg)
    task = make_task(cfg)
    cfg = dataclasses.replace(cfg, **{key: fingerprint(path_of(getattr(cfg, key))) for key in ("problems", "corpus")})
    path, results = out / "results.json", {"config": {}, "seconds": {}, "models": {}}
    try:
        out.mkdir(parents=True, exist_ok=True)
        if path.exists():
            stored = json.loads(path.read_text())
            results = {key: stored[key] for key in results}
            keys = ["device", "dtype", "compile"] + ["threads"] * (cfg.processes == stored["config"].get("processes"))
            settled = {key: results["config"][key] for key in keys if getattr(cfg, key) == getattr(Config, key)}
            cfg = dataclasses.replace(cfg, **settled)
            check(cfg)
    except OSError as error:
        raise Fault(f"cannot write into {out}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise Fault(f"{path} is not a nanoR1 run's: use another --out") from None
    print("\n".join(task.notes), end="\n" * bool(task.notes))
    run = Run(settle(cfg), task, out, results)
    for name in SHAPED_BY:
        if run.path(name).exists():
            run.checkpoint(name)
    if results["models"]:
        refuse_changes(run.cfg, results["config"], str(path), EVALUATED_BY)
    results["config"] = dataclasses.asdict(run.cfg)
    run.save_results()
    return run


# The stages


@functools.lru_cache(maxsize=2)
def load_corpus(task, rows: int, seed: int, length: int, heldout: bool = False) -> tuple[Tensor, Tensor]:
    """The corpus and where to cut it -> (token ids (n,), starts (rows,) of rows of `length` tokens).

    A row starts where a document does, so that a prompt at position 0 is nothing new to the model; what the last
    document of a row has left over is not read, unless it fills a row of its own. More rows begin with the same ones.
    """
    n_tokens, starts = int(1.35 * rows * length), []
    while len(starts) < rows:
        corpus = task.make_corpus(n_tokens, seed, heldout)
        documents = np.append(0, np.flatnonzero(corpus == get_tokenizer().eot_token) + 1)  # where each starts
        starts, position = [], 0
        while position + length <= len(corpus):
            starts.append(position)
            position += length
            following = documents[documents.searchsorted(position):][:1]
            if len(following) and following[0] - position < length:
                position = int(following[0])
        n_tokens *= 2
    return torch.from_numpy(corpus.astype(np.int32)), torch.tensor(starts[:rows])


def pretrain(run: Run, name: str) -> None:
    """Next-token prediction: base, or student_base."""
    cfg, device = run.cfg, run.cfg.device
    length = cfg.block_size + 1
    prefix = "base_" if name == "base" else "student_base_"
    n_tokens, batch = getattr(cfg, prefix + "tokens"), getattr(cfg, prefix + "batch")
    steps = n_tokens // (batch * cfg.block_size)
    longest = max(cfg.base_tokens, cfg.student_base_tokens) // cfg.block_size  # one corpus for both, in rows
    torch.manual_seed(cfg.seed)
    with ThreadPoolExecutor(1) as pool:  # the corpus is made while torch.compile waits for the C++ compiler
        made = pool.submit(load_corpus, run.task, longest, cfg.seed, length)
        model = compiled(GPT(shape(cfg, name), getattr(torch, cfg.dtype)).to(device), cfg, training=True)
    corpus, starts = made.result()
    optimizer = Optimizer(model, cfg.base_adam_lr, cfg.base_muon_lr)
    heldout, heldout_starts = load_corpus(run.task, 2 * batch, cfg.seed, length, heldout=True)
    order = torch.randperm(steps * batch, generator=torch.Generator().manual_seed(cfg.seed))

    def loss_over(corpus: Tensor, starts: Tensor) -> float:
        """The mean over rows, a micro-batch of this process's share at a time, and its gradient if there is to be
        one."""
        mean = torch.zeros(())
        for part in share(starts).split(max(1, cfg.micro_batch // cfg.block_size)):
            idx = corpus[part[:, None] + torch.arange(length)].long().to(device)  # (B, T+1)
            loss = F.cross_entropy(model(idx[:, :-1]).float().flatten(0, 1), idx[:, 1:].flatten(), reduction="sum")
            loss = loss / (len(starts) * cfg.block_size)
            if torch.is_grad_enabled():
                loss.backward()
            mean += loss.detach().cpu()
        return add_up(mean).item()

    def step(number: int) -> dict:
        start = time.perf_counter()
        loss = loss_over(corpus, starts[order[(number - 1) * batch:number * batch]])
        metrics = {"loss": loss, "grad_norm": optimizer.step(lr_scale(number, steps))}
        metrics["tokens_per_s"] = batch * cfg.block_size / (time.perf_counter() - start)
        if number % 100 == 0 or number == steps:
            with torch.no_grad():
                metrics["heldout_loss"] = loss_over(heldout, heldout_starts)
        return metrics

    train_stage(run, name, steps, {"model": model, "optimizer": optimizer}, step)


def reward_function(cfg: Config) -> Callable:
    """What GRPO maximises, and what is counted beside it."""
    def reward(completion: str, problem) -> dict[str, float]:
        accuracy, well_formed = accuracy_reward(completion, problem), format_reward(completion)
        return {"reward": cfg.accuracy_weight * accuracy + cfg.format_weight * well_formed, "accuracy": accuracy,
                "format": well_formed, "reflection": float(reflects(completion))}
    return reward


def reinforce(run: Run, name: str, start: str, steps: int, prompts: int) -> None:
    """GRPO from a finished base, `steps` rollouts of `prompts` problems: zero, or the control student_rl."""
    cfg, encoding = run.cfg, get_tokenizer()
    policy = compiled(run.load_model(start), cfg, training=True, sampling=True)
    parts = {"model": policy, "optimizer": Optimizer(policy, cfg.rl_lr, beta2=0.999)}
    reference = run.load_model(start).requires_grad_(False) if cfg.kl_coef else None
    if reference:
        parts["reference"] = reference

    def step(number: int) -> dict:
        rng, generator = draws(run, name, number)
        problems = [run.task.make_problem(rng) for _ in range(prompts)]
        metrics, rollout = grpo_step(
            policy, reference, parts["optimizer"], problems, reward_function(cfg), encoding, samples=cfg.rl_samples,
            max_new_tokens=cfg.rl_max_new_tokens, minibatches=cfg.rl_minibatches, clip_low=cfg.clip_low,
            clip_high=cfg.clip_high, kl_coef=cfg.kl_coef, normalize=cfg.normalize, scale=cfg.scale,
            baseline=cfg.baseline, shuffle=cfg.shuffle_rewards,
            lr_scale=lr_scale(number, steps, hold=0.0), max_tokens=cfg.micro_batch, generator=generator)
        if cfg.ref_every and number % cfg.ref_every == 0:
            reference.load_state_dict(policy.state_dict())
        if number in (1, 5, 10) or number % 20 == 0:
            print(f"    {problems[0].question}  ->  {rollout.texts[0]}   reward {rollout.scores[0]['reward']:.1f}")
        return metrics

    train_stage(run, name, steps, parts, step)


def distil(run: Run) -> None:
    """The teacher into the student, from the student's own base."""
    cfg, name, encoding = run.cfg, "student", get_tokenizer()
    teacher = compiled(run.load_model("zero"), cfg, sampling=not cfg.on_policy)
    student = compiled(run.load_model("student_base"), cfg, training=True, sampling=cfg.on_policy)
    optimizer = Optimizer(student, cfg.distill_adam_lr, cfg.distill_muon_lr)

    def step(number: int) -> dict:
        rng, generator = draws(run, name, number)
        problems = [run.task.make_problem(rng) for _ in range(cfg.distill_prompts)]
        return distill_step(
            student, teacher, optimizer, problems, reward_function(cfg), encoding, divergence=cfg.divergence,
            on_policy=cfg.on_policy, max_new_tokens=cfg.rl_max_new_tokens, minibatches=cfg.distill_minibatches,
            epochs=cfg.distill_epochs, temperature=cfg.distill_temperature,
            lr_scale=lr_scale(number, cfg.distill_steps), max_tokens=cfg.micro_batch, generator=generator)

    train_stage(run, name, cfg.distill_steps, {"model": student, "optimizer": optimizer}, step)


def make(run: Run, name: str) -> None:
    """Train the model of a stage from those of the stages before it."""
    cfg, run.began = run.cfg, time.perf_counter()
    n_params = GPT(shape(cfg, name)).n_params()
    print(f"\n{name}: {n_params:,} parameters on {cfg.device}, {cfg.dtype}, {processors(cfg)}", flush=True)
    if name in ("base", "student_base"):
        pretrain(run, name)
    elif name == "zero":
        reinforce(run, name, "base", cfg.rl_steps, cfg.rl_prompts)
    elif name == "student":
        distil(run)
    else:
        # as many updates as the student had, each on as many completions
        steps = math.ceil(cfg.distill_steps * cfg.distill_epochs * cfg.distill_minibatches / cfg.rl_minibatches)
        completions = cfg.distill_prompts / cfg.distill_minibatches * cfg.rl_minibatches  # a rollout's
        reinforce(run, name, "student_base", steps, math.ceil(completions / cfg.rl_samples))


def measure(run: Run, name: str) -> None:
    """Evaluate a stage's model on the held-out problems, into results.json."""
    cfg, start = run.cfg, time.perf_counter()
    # A student's evaluation takes less time than compiling would; what a teacher compiles serves the next stages too.
    model = compiled(run.load_model(name), cfg, sampling=not name.startswith("student"))
    found = {"params": model.n_params()}
    for kind in run.task.held_out:
        problems = run.task.heldout_problems(cfg.eval_problems, kind, cfg.seed)
        found[kind] = evaluate(model, problems, reward_function(cfg), max_new_tokens=cfg.rl_max_new_tokens,
                               generator=draws(run, f"evaluate {name} {kind}", 0)[1], greedy=cfg.eval_greedy)
        print(f"{name} on {kind}: " + "  ".join(f"{key} {value:.3g}" for key, value in found[kind].items()), flush=True)
    run.results["models"][name] = found
    run.results["seconds"][f"evaluate {name}"] = round(time.perf_counter() - start, 1)
    run.save_results()


# Evaluation and the report


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased chance that one of k samples is right, from n samples of which c were: 1 - C(n-c, k) / C(n, k)
    (Chen et al., 2107.03374, eq. 1).

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def majority(answers: list[str | None]) -> str | None:
    """The most frequent answer; of equally frequent ones the first. None stands for no answer, and has no vote.

    >>> majority(["3", None, None, None, "5", "5", "3"])
    '3'
    """
    votes = Counter(answer for answer in answers if answer is not None)
    return votes.most_common(1)[0][0] if votes else None


def evaluate(model: GPT, problems: list, reward_fn: Callable, *, max_new_tokens: int, generator: torch.Generator,
             greedy: bool = False) -> dict[str, float]:
    """EVAL_SAMPLES completions of each problem at temperature 1 -> what results.json holds of a model and a side.

    pass@1 is the mean accuracy and pass@1_se its standard error over problems; maj@16 the accuracy of the majority's
    answer; format, length (tokens, end of text included) and reflection are means. greedy adds the accuracy of greedy
    decoding.
    """
    n, rows = EVAL_SAMPLES, []
    completions, texts = [], []
    for at in range(0, len(problems), 32):  # 32 * 16 rows of keys and values at a time
        rollout = sample_rollout(model, problems[at:at + 32], reward_fn, get_tokenizer(), samples=n,
                                 max_new_tokens=max_new_tokens, generator=generator)
        completions += rollout.completions
        texts += rollout.texts
        rows += rollout.scores
    mean = lambda name: sum(row[name] for row in rows) / len(rows)
    right = [int(sum(row["accuracy"] for row in rows[i:i + n])) for i in range(0, len(rows), n)]  # of n, a problem
    votes = []
    for i, problem in enumerate(problems):
        answers = [extract_answer(text) for text in texts[i * n:(i + 1) * n]]
        votes.append(majority([a if a is None else problem.canonical(a) for a in answers]))
    found = {
        "pass@1": mean("accuracy"),
        "pass@1_se": float(np.std([r / n for r in right], ddof=1) / len(problems) ** 0.5),
        f"maj@{n}": sum(v is not None and p.check(v) for v, p in zip(votes, problems)) / len(problems),
        f"pass@{n}": sum(pass_at_k(n, r, n) for r in right) / len(problems),
        "format": mean("format"),
        "length": sum(map(len, completions)) / len(completions),
        "reflection": mean("reflection"),
        "n_problems": len(problems),
    }
    if greedy:
        rollout = sample_rollout(model, problems, reward_fn, get_tokenizer(), samples=1, max_new_tokens=max_new_tokens,
                                 temperature=0.0)
        found["greedy"] = rollout.column("accuracy").double().mean().item()
    return found


def spark(values: list[float], width: int = 60) -> str:
    """A one-line chart.

    >>> spark([0, 1, 2, 3])
    '▁▃▆█'
    """
    values = [values[i * len(values) // min(width, len(values))] for i in range(min(width, len(values)))]
    low, high = min(values), max(values)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (v - low) / (high - low or 1))] for v in values)


def report(run: Run) -> str:
    """results.json and the RL stage's rows as Markdown."""
    models, seconds = run.results["models"], run.results["seconds"]
    lines = ["| model | parameters | problems | pass@1 | maj@16 | pass@16 | format | length | reflection |",
             "|---|---|---|---|---|---|---|---|---|"]
    for name, found in models.items():
        for kind in run.task.held_out:
            m = found[kind]
            lines.append(f"| {name} | {found['params']:,} | {kind} | {m['pass@1']:.1%} ± {m['pass@1_se']:.1%} | "
                         f"{m['maj@16']:.1%} | {m['pass@16']:.1%} | {m['format']:.1%} | {m['length']:.1f} | "
                         f"{m['reflection']:.1%} |")
    rows = [row for row in run.log_rows() if row["stage"] == "zero"]
    if rows:
        lines.append("")
        for key in ("accuracy", "length"):
            values = [row[key] for row in rows]
            lines.append(f"    {key:8} over {len(rows)} RL steps  {values[0]:5.2f} {spark(values)} {values[-1]:.2f}")
    lines += ["", "Seconds: " + ", ".join(f"{name} {s:.0f}" for name, s in seconds.items()) +
              f"; together {sum(seconds.values()) / 60:.1f} minutes on {run.cfg.device} in {run.cfg.dtype}, "
              f"{processors(run.cfg)}, seed {run.cfg.seed}."]
    return "\n".join(lines)


def ask(out: Path, text: str) -> str:
    """What each finished model in `out` answers, by greedy decoding."""
    found = {name: load_checkpoint(out / f"{name}.pt", name) for name in SHAPED_BY if (out / f"{name}.pt").exists()}
    config = [content["config"] for content in found.values()][-1] if found else {}
    cfg = Config(**{key: config[key] for key in vars(Config()) if key in config and key != "corpus"})
    try:
        known = not cfg.problems or fingerprint(path_of(cfg.problems)) == cfg.problems
    except OSError:
        known = False  # the file has gone: the models can be asked all the same
    try:
        problem = make_task(cfg).parse(text) if known else Problem(text.strip(), "")
    except ValueError as error:
        raise Fault(f"--ask: {error}") from None
    if not found:
        raise Fault(f"there is no model in {out}/ to ask: run python train.py first")
    encoding, lines = get_tokenizer(), [f"{problem.question} = {problem.answer or '?'}"]
    for name, content in found.items():
        model, prompt = build_model(content), encoding.encode_ordinary(problem.prompt)
        room = min(content["config"]["rl_max_new_tokens"], model.config.block_size - len(prompt))
        if room < 1:
            raise Fault(f"--ask: {len(prompt)} tokens are too long a prompt")
        ids, = generate(model, [prompt], room, temperature=0.0, eos_id=encoding.eot_token)
        text = encoding.decode([i for i in ids if i != encoding.eot_token])
        verdict = "right" if accuracy_reward(text, problem) else "wrong" if problem.answer else ""
        lines.append(f"{name:13} {verdict:5}  {' '.join(text.split())}")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Run the command line -> exit code."""
    others = []
    try:
        if "--help" in argv:
            print(__doc__ + "\n" + inspect.getsource(Config))
            return 0
        tune_libraries()
        cfg, options = parse_args(argv)
        stage, out = options["stage"], Path(options["out"] or f"out/{options['preset'] or ''}")
        if options["ask"] is not None:
            print(ask(out, options["ask"]))
            return 0
        if launched():
            join(int(os.environ["LOCAL_RANK"]))
        if rank():
            sys.stdout, run = open(os.devnull, "w"), None
        else:
            run = open_run(cfg, out)
            if run.cfg.processes > 1 and not launched():
                others = start(run.cfg.processes, [sys.executable, __file__, *argv])
        run = broadcast(run)
        torch.set_num_threads(run.cfg.threads)  # of those that did not open the run
        for name in STAGES[stage] if stage else SHAPED_BY:
            if name == "student_rl" and not cfg.student_rl:
                continue
            if not run.path(name).exists():
                run.results["models"].pop(name, None)
                make(run, name)
            if name not in run.results["models"]:
                measure(run, name)
        text = report(run)
        write_file(out / "report.md", (text + "\n").encode())
        print("\n" + text)
        return 0
    except (Fault, Lost, OSError) as fault:
        if not rank():
            print(f"train.py: {fault}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"\ntrain.py: interrupted{f', {stop}' if str(stop) else ''}; the same command goes on from there",
              file=sys.stderr)
        return 130
    finally:
        leave()
        for process in others:
            process.kill()


if __name__ == "__main__":
    end(main(sys.argv[1:]))
