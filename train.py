"""nanoR1: random weights -> base -> zero -> student, in one command.

    base          next-token prediction on the corpus of data/arithmetic.py (Muon and AdamW)
    zero          GRPO on the base, from rule-based rewards alone: no supervised fine-tuning
    student_base  a base of its own for a smaller GPT, on the same corpus
    student       the RL teacher distilled into it
    student_rl    the control, if asked for: GRPO on student_base with as many updates as the student had

    python train.py                            everything, then the report
    python train.py --stage=base|zero|student  one stage, on the earlier ones' checkpoints
    python train.py --student_rl=True          the control too; a finished run may gain it
    python train.py --preset=tiny              the same in seconds: does it run at all?
    python train.py --ask="8*7-19"             what each model answers
    python train.py --seed=1 --out=out/seed1   --key=value sets any field of Config

It writes into --out (out/, or out/PRESET): NAME.pt for each finished stage, resume.pt for the stage under way,
log.jsonl (a row a step), results.json, report.md. Started again with the same settings it goes on from the last
checkpoint, to the same result bit for bit: whatever a step draws at random is seeded by (seed, stage, step). This is
the only file with side effects.
"""
import dataclasses
import difflib
import functools
import io
import json
import math
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args, get_origin

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data import arithmetic as task
from data.tokenizer import get_tokenizer
from distill import distill_step
from grpo import grpo_step, sample_rollout
from model import GPT, GPTConfig, Optimizer, generate
from rewards import accuracy_reward, extract_answer, format_reward, reflects

EVAL_SAMPLES = 16       # completions of each evaluated problem: maj@16, pass@16
PRETRAIN_PRINT = 20     # pretraining steps between lines on the terminal; log.jsonl has them all


class Fault(Exception):
    """What the user can mend: printed as one line, exit code 2."""


@dataclass
class Config:
    """Every setting of a run. A number may be 0 only where its comment says so."""
    seed: int = 0                     # may be 0; weights, corpus, problems, samples and test problems follow from it
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"        # auto: a GPU if there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"        # of the matrix products; auto: the quicker, measured
    threads: int = 0                  # of the CPU; 0: as many as torch takes
    save_every: float = 30.0          # seconds between checkpoints inside a stage; 0: every step
    # the teacher's shape
    block_size: int = 128             # longest sequence, in tokens
    n_layer: int = 4
    n_head: int = 2
    n_embd: int = 128
    # base: pretraining, of the student's base too
    base_tokens: int = 6_500_000      # read once; the student's base reads as many
    base_batch: int = 64              # rows of block_size tokens
    base_muon_lr: float = 0.02
    base_adam_lr: float = 3e-3
    # zero: GRPO
    rl_steps: int = 100               # rollouts
    rl_prompts: int = 32              # P, a rollout's problems
    rl_samples: int = 16              # G, completions of each
    rl_minibatches: int = 2           # updates a rollout
    rl_max_new_tokens: int = 80       # the generation budget; evaluation has the same
    rl_muon_lr: float = 2e-3
    rl_adam_lr: float = 3e-4
    format_weight: float = 0.1        # may be 0; reward = accuracy + format_weight * format (R1 weighs them equally)
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coef: float = 1e-3             # may be 0: then no reference is kept
    ref_every: int = 0                # steps after which the reference becomes the policy; 0: it stays the base
    normalize: Literal["sequence", "token", "constant"] = "token"
    scale: Literal["std", "none"] = "std"
    # student
    student_n_layer: int = 3
    student_n_head: int = 1
    student_n_embd: int = 64
    distill_steps: int = 100
    distill_prompts: int = 64
    distill_samples: int = 4
    distill_minibatches: int = 4      # updates a step
    distill_muon_lr: float = 5e-3
    distill_adam_lr: float = 1e-3
    divergence: Literal["forward", "reverse", "jsd", "sft"] = "forward"
    distill_temperature: float = 1.0
    on_policy: bool = False           # the student's own samples instead of the teacher's
    student_rl: bool = False          # also train the control
    # evaluation
    eval_problems: int = 256          # of the test and of the hard side each
    eval_greedy: bool = False         # also the accuracy of greedy decoding


PRESETS = {"tiny": {"dtype": "float32", "threads": 1}}
MAY_BE_ZERO = {"seed", "threads", "save_every", "format_weight", "kl_coef", "ref_every"}

# Which fields shaped a stage's checkpoint (names, or beginnings of names that end in _): they may not change after it.
SHARED = ("seed", "device", "dtype", "threads", "block_size")
TEACHER = SHARED + ("n_", "base_", "rl_", "format_weight", "clip_", "kl_coef", "ref_every", "normalize", "scale")
SHAPED_BY = {
    "base": SHARED + ("n_", "base_"),
    "zero": TEACHER,
    "student_base": SHARED + ("student_n_", "base_"),
    "student": TEACHER + ("student_n_", "distill_", "divergence", "on_policy"),
    "student_rl": TEACHER + ("student_n_", "distill_steps", "distill_minibatches"),
    "evaluation": ("eval_", "rl_max_new_tokens"),
}
STAGES = {"base": ["base"], "zero": ["zero"], "student": ["student_base", "student"]}  # what --stage runs
NEEDS = {"zero": ["base"], "student": ["zero", "student_base"], "student_rl": ["student_base"]}
SHOWN = ("loss", "heldout_loss", "reward", "accuracy", "format", "length", "reflection", "kl", "entropy", "no_signal",
         "accepted", "tokens_per_s")  # the metrics on a terminal line; log.jsonl has them all


# Settings


def parse_value(field: dataclasses.Field, text: str):
    """The value of a field that the text states. Raises Fault if it is of the wrong type or range."""
    if get_origin(field.type) is Literal:
        if text in get_args(field.type):
            return text
        raise Fault(f"--{field.name} must be one of {', '.join(get_args(field.type))}, not {text!r}")
    if field.type is bool:
        if text in ("True", "False"):
            return text == "True"
        raise Fault(f"--{field.name} must be True or False, not {text!r}")
    try:
        value = field.type(text)
    except ValueError:
        value = math.nan
    if math.isfinite(value) and (value > 0 or value == 0 and field.name in MAY_BE_ZERO):
        return value
    least = "of 0 or more" if field.name in MAY_BE_ZERO else "above 0"
    raise Fault(f"--{field.name} must be {'a whole number' if field.type is int else 'a number'} {least}, not {text!r}")


def parse_args(argv: list[str]) -> tuple[Config, Path, str | None, str | None]:
    """--key=value arguments -> (Config, output folder, stage or None for all, question to ask or None)."""
    options = {"preset": None, "out": None, "stage": None, "ask": None}
    fields, values = {f.name: f for f in dataclasses.fields(Config)}, {}
    for arg in argv:
        key, equals, text = arg.removeprefix("--").partition("=")
        if not arg.startswith("--") or key not in (*options, *fields):
            near = difflib.get_close_matches(key, [*options, *fields], n=1)
            raise Fault(f"unknown argument {arg!r}" + (f"; did you mean --{near[0]}=VALUE?" if near else
                                                       "; see the top of train.py for all of them"))
        if not equals:
            raise Fault(f"--{key} needs a value: --{key}=VALUE")
        if key in options:
            options[key] = text
        else:
            values[key] = parse_value(fields[key], text)
    preset, stage = options["preset"], options["stage"]
    if preset is not None and preset not in PRESETS:
        raise Fault(f"--preset must be one of {', '.join(PRESETS)}, not {preset!r}")
    if stage is not None and stage not in STAGES:
        raise Fault(f"--stage must be one of {', '.join(STAGES)}, not {stage!r}")
    cfg = Config(**{**(PRESETS[preset] if preset else {}), **values})
    check(cfg)
    return cfg, Path(options["out"] or (f"out/{preset}" if preset else "out")), stage, options["ask"]


def check(cfg: Config) -> None:
    """Raises Fault where settings that are each right do not go together."""
    try:
        shape(cfg, "base"), shape(cfg, "student")
    except ValueError as error:
        raise Fault(str(error)) from None
    room = cfg.block_size - task.MAX_PROMPT_TOKENS
    for wrong, line in (
        (cfg.rl_samples < 2, "--rl_samples must be 2 or more: an advantage compares answers to one prompt"),
        (cfg.clip_low >= 1, "--clip_low must be under 1: the ratio's lower bound is 1 - clip_low"),
        (cfg.rl_max_new_tokens > room, f"--rl_max_new_tokens must be at most {room}, to fit block_size behind a prompt"),
        (cfg.rl_minibatches > cfg.rl_prompts * cfg.rl_samples, "--rl_minibatches is more than a rollout's completions"),
        (cfg.distill_minibatches > cfg.distill_prompts * cfg.distill_samples,
         "--distill_minibatches is more than a step's completions"),
        (cfg.on_policy and cfg.divergence == "sft", "--divergence=sft learns the teacher's samples: not --on_policy"),
        (cfg.base_tokens < cfg.base_batch * cfg.block_size, "--base_tokens is less than one batch"),
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
    device, threads = cfg.device, cfg.threads or torch.get_num_threads()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    cfg = dataclasses.replace(cfg, device=device, threads=threads)
    torch.set_num_threads(threads)
    return dataclasses.replace(cfg, dtype=quicker_dtype(cfg)) if cfg.dtype == "auto" else cfg


def quicker_dtype(cfg: Config) -> str:
    """Time a pretraining step both ways, in turn. A CPU without bf16 matrix units is slower in bf16 than in fp32."""
    model = GPT(shape(cfg, "base")).to(cfg.device)
    idx = torch.zeros(cfg.base_batch, cfg.block_size, dtype=torch.long, device=cfg.device)
    seconds = {"float32": [], "bfloat16": []}
    for dtype in list(seconds) * 3:
        start = time.perf_counter()
        with precision(dataclasses.replace(cfg, dtype=dtype)):
            loss = model(idx).float().sum()
        loss.backward()
        loss.item(), model.norm.weight.grad.sum().item()  # waits for a GPU
        seconds[dtype].append(time.perf_counter() - start)
    return min(seconds, key=lambda dtype: min(seconds[dtype][1:]))


def precision(cfg: Config):
    """The context in which models run: under bfloat16 autocast the weights stay float32, matrix products do not."""
    return torch.autocast(cfg.device, torch.bfloat16, enabled=cfg.dtype == "bfloat16")


# Files


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all. Raises Fault, with the old content intact, if it cannot be written."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise Fault(f"cannot write {path}: {error.strerror}; what was saved before is intact") from None


def save_checkpoint(path: Path, content: dict) -> None:
    """torch.save into memory first: into a full disk it would fail with an error of its own kind."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_file(path, buffer.getvalue())


def load_checkpoint(path: Path) -> dict:
    """A checkpoint's content, read without executing anything in it. Raises Fault if it is none of ours."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["nanor1"] == 1:
            return content
    except FileNotFoundError:
        raise Fault(f"{path} is missing: an earlier stage makes it (python train.py runs them all)") from None
    except Exception:  # torch.load raises a dozen kinds for what is cut off, foreign or malicious
        pass
    raise Fault(f"{path} is not a whole nanoR1 checkpoint: remove it to have it made again")


def refuse_changes(cfg: Config, stored: dict, what: str, fields: tuple[str, ...]) -> None:
    """Raises Fault if a field that shaped `what` is set otherwise now."""
    for field in dataclasses.fields(cfg):
        if any(field.name == f or f.endswith("_") and field.name.startswith(f) for f in fields):
            old, new = stored.get(field.name), getattr(cfg, field.name)
            if old != new:
                raise Fault(f"{what} was made with {field.name}={old}, not {new}: go on with --{field.name}={old}, or "
                            "start afresh with another --out")


@dataclass
class Run:
    """A run under way: its settings, where it writes, and what results.json holds."""
    cfg: Config
    out: Path
    results: dict

    def path(self, name: str) -> Path:
        return self.out / f"{name}.pt"

    def save_results(self) -> None:
        write_file(self.out / "results.json", json.dumps(self.results, indent=1).encode())

    def log_rows(self) -> list[dict]:
        """The rows of log.jsonl; a last line that a killed run left unfinished is not one."""
        path = self.out / "log.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def load_model(self, name: str, device: str | None = None) -> GPT:
        """The model that a finished stage left, on the run's device unless another is named. Raises Fault if it is not
        there, or not of this run."""
        content = load_checkpoint(self.path(name))
        if content["stage"] != name:
            raise Fault(f"{self.path(name)} is a checkpoint of {content['stage']}")
        refuse_changes(self.cfg, content["config"], str(self.path(name)), SHAPED_BY[name])
        model = GPT(GPTConfig(**content["shape"]))
        model.load_state_dict(content["model"])
        return model.to(device or self.cfg.device)


def open_run(cfg: Config, out: Path) -> Run:
    """Begin a run, or go on with the one in `out`. Raises Fault if that one was made with other settings."""
    path, results = out / "results.json", {"config": {}, "seconds": {}, "models": {}}
    try:
        out.mkdir(parents=True, exist_ok=True)
        if path.exists():
            results = json.loads(path.read_text())
            auto = {key: results["config"][key] for key in ("device", "dtype", "threads")
                    if getattr(cfg, key) == getattr(Config, key)}
            cfg = dataclasses.replace(cfg, **auto)
            check(cfg)
    except OSError as error:
        raise Fault(f"cannot write into {out}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise Fault(f"{path} is not a nanoR1 run's: use another --out") from None
    run = Run(settle(cfg), out, results)
    for name in SHAPED_BY:
        if run.path(name).exists():
            run.load_model(name)
    if results["models"]:
        refuse_changes(run.cfg, results["config"], str(path), SHAPED_BY["evaluation"])
    results["config"] = dataclasses.asdict(run.cfg)
    run.save_results()
    return run


# One loop for all stages


def draws(run: Run, name: str, step: int) -> tuple[random.Random, torch.Generator]:
    """What a step draws from: a pure function of (seed, stage, step), so that no generator's state need be saved."""
    rng = random.Random(f"{run.cfg.seed}/{name}/{step}")
    return rng, torch.Generator(run.cfg.device).manual_seed(rng.getrandbits(63))


def lr_scale(step: int, steps: int) -> float:
    """Factor of the learning rate at step 1..steps: up over the first twentieth, down to 3 % over the last 60 %.

    >>> [round(lr_scale(step, 100), 2) for step in (1, 5, 40, 70, 100)]
    [0.2, 1.0, 1.0, 0.53, 0.05]
    """
    return min(1.0, step / max(1, steps // 20)) * (0.03 + 0.97 * min(1.0, (steps + 1 - step) / (0.6 * steps)))


@contextmanager
def ctrl_c_noted():
    """Inside, Ctrl-C only adds to the list that this yields, so that a step is never torn in the middle."""
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def train_stage(run: Run, name: str, steps: int, parts: dict, train_step: Callable[[int], dict]) -> None:
    """Run train_step(1..steps) -> metrics, from resume.pt if it is this stage's, and leave NAME.pt.

    parts are the things with a state_dict that the steps change; parts["model"] is what the stage makes. Each step is
    logged; the state is saved every save_every seconds. Raises Fault if a metric is no longer finite, KeyboardInterrupt
    (after saving) on Ctrl-C.
    """
    cfg, resume = run.cfg, run.path("resume")
    done, seconds = 0, 0.0

    def content() -> dict:
        return {"nanor1": 1, "stage": name, "step": done, "seconds": seconds, "config": dataclasses.asdict(cfg),
                "shape": dataclasses.asdict(parts["model"].config), "model": parts["model"].state_dict()}

    if resume.exists() and (saved := load_checkpoint(resume))["stage"] == name:
        refuse_changes(cfg, saved["config"], str(resume), SHAPED_BY[name])
        done, seconds = saved["step"], saved["seconds"]
        for key, part in parts.items():
            part.load_state_dict(saved["parts"][key])
        print(f"{name}: going on after step {done}")
    rows = [row for row in run.log_rows() if row["stage"] != name or row["step"] <= done]
    write_file(run.out / "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    started, saved_at, saved_step = time.perf_counter() - seconds, time.perf_counter(), done
    with open(run.out / "log.jsonl", "a") as log, ctrl_c_noted() as pressed:
        while done < steps:
            metrics = train_step(done + 1)
            bad = [key for key, value in metrics.items() if value is not None and not math.isfinite(value)]
            if bad:
                raise Fault(f"{name}: {bad[0]} is {metrics[bad[0]]} at step {done + 1}; the last good checkpoint is "
                            + (f"{resume}, step {saved_step}" if saved_step else "the stage before's"))
            done += 1
            seconds = time.perf_counter() - started
            log.write(json.dumps({"stage": name, "step": done, "seconds": round(seconds, 2), **metrics}) + "\n")
            log.flush()
            if "reward" in metrics or done % PRETRAIN_PRINT == 0 or done in (1, steps):
                eta = (steps - done) * (seconds / done)
                shown = "  ".join(f"{k} {metrics[k]:.4g}" for k in SHOWN if metrics.get(k) is not None)
                print(f"{name} {done}/{steps}  {shown}  eta {eta:.0f} s", flush=True)
            if pressed or time.perf_counter() - saved_at >= cfg.save_every:
                save_checkpoint(resume, content() | {"parts": {k: part.state_dict() for k, part in parts.items()}})
                saved_at, saved_step = time.perf_counter(), done
            if pressed:
                raise KeyboardInterrupt(f"saved {resume} at step {done} of {name}")
    save_checkpoint(run.path(name), content())
    resume.unlink(missing_ok=True)
    run.results["seconds"][name] = round(seconds, 1)
    run.save_results()


# The stages


@functools.lru_cache(maxsize=2)
def load_corpus(n_tokens: int, seed: int, length: int) -> tuple[Tensor, Tensor]:
    """The corpus and where to cut it -> (token ids (n,), starts (rows,) of rows of `length` tokens).

    Every row starts where a document does, so that a prompt at position 0 is nothing new to the model; what the last
    document of a row has left over is not read.
    """
    corpus = task.make_corpus(n_tokens, seed)
    documents = np.append(0, np.flatnonzero(corpus == get_tokenizer().eot_token) + 1)  # where each starts
    starts, position = [], 0
    while (position := int(documents[np.searchsorted(documents, position)])) + length <= len(corpus):
        starts.append(position)
        position += length
        if position > documents[-1]:
            break
    return torch.from_numpy(corpus.astype(np.int32)), torch.tensor(starts)


def pretrain(run: Run, name: str) -> None:
    """Next-token prediction: base, or student_base."""
    cfg, device = run.cfg, run.cfg.device
    torch.manual_seed(cfg.seed)
    model = GPT(shape(cfg, name)).to(device)
    optimizer = Optimizer(model, cfg.base_muon_lr, cfg.base_adam_lr)
    length = cfg.block_size + 1
    corpus, starts = load_corpus(int(1.15 * cfg.base_tokens), cfg.seed, length)  # a row's end costs up to a document
    heldout, heldout_starts = load_corpus(256 * length, -1 - cfg.seed, length)
    steps = cfg.base_tokens // (cfg.base_batch * cfg.block_size)
    order = torch.randperm(len(starts), generator=torch.Generator().manual_seed(cfg.seed))

    def loss_of(corpus: Tensor, starts: Tensor) -> Tensor:
        rows = corpus[starts[:, None] + torch.arange(length)].long().to(device)  # (B, T+1)
        with precision(cfg):
            logits = model(rows[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())

    def step(number: int) -> dict:
        start = time.perf_counter()
        at = (number - 1) * cfg.base_batch
        loss = loss_of(corpus, starts[order[torch.arange(at, at + cfg.base_batch) % len(order)]])
        loss.backward()
        grad_norm = optimizer.step(lr_scale(number, steps))
        metrics = {"loss": loss.item(), "grad_norm": grad_norm}
        metrics["tokens_per_s"] = cfg.base_batch * cfg.block_size / (time.perf_counter() - start)
        if number % 100 == 0 or number == steps:
            with torch.no_grad():
                metrics["heldout_loss"] = loss_of(heldout, heldout_starts).item()
        return metrics

    train_stage(run, name, steps, {"model": model, "optimizer": optimizer}, step)


def reward_function(cfg: Config) -> Callable:
    """What GRPO maximises, and what is counted beside it."""
    def reward(completion: str, problem) -> dict[str, float]:
        accuracy, well_formed = accuracy_reward(completion, problem), format_reward(completion)
        return {"reward": accuracy + cfg.format_weight * well_formed, "accuracy": accuracy, "format": well_formed,
                "reflection": float(reflects(completion))}
    return reward


def reinforce(run: Run, name: str, start: str, steps: int) -> None:
    """GRPO from a finished base: zero, or the control student_rl."""
    cfg, encoding = run.cfg, get_tokenizer()
    policy = run.load_model(start)
    parts = {"model": policy, "optimizer": Optimizer(policy, cfg.rl_muon_lr, cfg.rl_adam_lr)}
    reference = run.load_model(start).requires_grad_(False) if cfg.kl_coef else None
    if reference is not None:
        parts["reference"] = reference

    def step(number: int) -> dict:
        rng, generator = draws(run, name, number)
        problems = [task.make_problem(rng) for _ in range(cfg.rl_prompts)]
        with precision(cfg):
            metrics, rollout = grpo_step(
                policy, reference, parts["optimizer"], problems, reward_function(cfg), encoding, samples=cfg.rl_samples,
                max_new_tokens=cfg.rl_max_new_tokens, minibatches=cfg.rl_minibatches, clip_low=cfg.clip_low,
                clip_high=cfg.clip_high, kl_coef=cfg.kl_coef, normalize=cfg.normalize, scale=cfg.scale,
                lr_scale=lr_scale(number, steps), generator=generator)
        if reference is not None and cfg.ref_every and number % cfg.ref_every == 0:
            reference.load_state_dict(policy.state_dict())
        if number in (1, 5, 10) or number % 20 == 0:
            print(f"    {problems[0].question}  ->  {rollout.texts[0]}   reward {rollout.scores[0]['reward']:.1f}")
        return metrics

    train_stage(run, name, steps, parts, step)


def distil(run: Run) -> None:
    """The teacher into the student, from the student's own base."""
    cfg, name, encoding = run.cfg, "student", get_tokenizer()
    teacher, student = run.load_model("zero").requires_grad_(False), run.load_model("student_base")
    optimizer = Optimizer(student, cfg.distill_muon_lr, cfg.distill_adam_lr)

    def step(number: int) -> dict:
        rng, generator = draws(run, name, number)
        problems = [task.make_problem(rng) for _ in range(cfg.distill_prompts)]
        with precision(cfg):
            return distill_step(
                student, teacher, optimizer, problems, reward_function(cfg), encoding, divergence=cfg.divergence,
                on_policy=cfg.on_policy, samples=cfg.distill_samples, max_new_tokens=cfg.rl_max_new_tokens,
                minibatches=cfg.distill_minibatches, temperature=cfg.distill_temperature,
                lr_scale=lr_scale(number, cfg.distill_steps), generator=generator)

    train_stage(run, name, cfg.distill_steps, {"model": student, "optimizer": optimizer}, step)


def run_stage(run: Run, name: str) -> None:
    """Make NAME.pt unless it is there, then measure the model unless that is done."""
    cfg, made = run.cfg, run.path(name).exists()
    if not made:
        for needed in NEEDS.get(name, []):
            run.load_model(needed)
        print(f"\n{name}: {GPT(shape(cfg, name)).n_params():,} parameters, {cfg.device}, {cfg.dtype}, "
              f"{cfg.threads} threads", flush=True)
        if name in ("base", "student_base"):
            pretrain(run, name)
        elif name == "zero":
            reinforce(run, name, "base", cfg.rl_steps)
        elif name == "student":
            distil(run)
        else:
            updates = cfg.distill_steps * cfg.distill_minibatches
            reinforce(run, name, "student_base", -(-updates // cfg.rl_minibatches))
    if made and name in run.results["models"]:
        print(f"{name}: finished already")
        return
    model, start = run.load_model(name), time.perf_counter()
    found = {"params": model.n_params()}
    for side, n_ops in (("test", task.TEST_OPS), ("hard", task.HARD_OPS)):
        problems = task.heldout_problems(cfg.eval_problems, n_ops, cfg.seed)
        with precision(cfg):
            found[side] = evaluate(model, problems, reward_function(cfg), max_new_tokens=cfg.rl_max_new_tokens,
                                   generator=draws(run, f"evaluate {name} {side}", 0)[1], greedy=cfg.eval_greedy)
        print(f"{name} on {side}: " + "  ".join(f"{key} {value:.3g}" for key, value in found[side].items()), flush=True)
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
    answer; format, length (tokens, end of text included) and reflection are means. greedy adds that decoding's accuracy.
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
    votes = [majority([extract_answer(text) for text in texts[i:i + n]]) for i in range(0, len(rows), n)]
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
        found["greedy"] = rollout.column("accuracy").mean().item()
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
        for side in ("test", "hard"):
            m = found[side]
            lines.append(f"| {name} | {found['params']:,} | {side} | {m['pass@1']:.1%} ± {m['pass@1_se']:.1%} | {m['maj@16']:.1%} | "
                         f"{m['pass@16']:.1%} | {m['format']:.1%} | {m['length']:.1f} | {m['reflection']:.1%} |")
    rows = [row for row in run.log_rows() if row["stage"] == "zero"]
    if rows:
        lines.append("")
        for key in ("accuracy", "length"):
            values = [row[key] for row in rows]
            lines.append(f"    {key:8} over {len(rows)} RL steps  {values[0]:5.2f} {spark(values)} {values[-1]:.2f}")
    lines += ["", "Seconds: " + ", ".join(f"{name} {s:.0f}" for name, s in seconds.items()) +
              f"; together {sum(seconds.values()) / 60:.1f} minutes on {run.cfg.device} in {run.cfg.dtype}, "
              f"{run.cfg.threads} threads, seed {run.cfg.seed}."]
    return "\n".join(lines)


def ask(out: Path, text: str) -> str:
    """What each finished model in `out` answers, by greedy decoding."""
    try:
        problem = task.parse(text)
    except ValueError as error:
        raise Fault(f"--ask: {error}") from None
    encoding, lines = get_tokenizer(), [f"{problem.question} = {problem.answer}"]
    for name in ("base", "zero", "student_base", "student", "student_rl"):
        path = out / f"{name}.pt"
        if path.exists():
            cfg = Config(**load_checkpoint(path)["config"])
            model = Run(cfg, out, {}).load_model(name, "cpu")
            ids, = generate(model, [encoding.encode_ordinary(problem.prompt)], cfg.rl_max_new_tokens, temperature=0.0,
                            eos_id=encoding.eot_token)
            text = encoding.decode([i for i in ids if i != encoding.eot_token])
            lines.append(f"{name:13} {'right' if accuracy_reward(text, problem) else 'wrong'}  {text}")
    if len(lines) == 1:
        raise Fault(f"there is no model in {out}/ to ask: run python train.py first")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Run the command line -> exit code."""
    try:
        cfg, out, stage, question = parse_args(argv)
        if question is not None:
            print(ask(out, question))
            return 0
        run = open_run(cfg, out)
        for name in STAGES[stage] if stage else sum(STAGES.values(), []):
            run_stage(run, name)
        if cfg.student_rl and stage in (None, "student"):
            run_stage(run, "student_rl")
        text = report(run)
        write_file(out / "report.md", (text + "\n").encode())
        print("\n" + text)
        return 0
    except (Fault, OSError) as fault:
        print(f"train.py: {fault}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"\ntrain.py: interrupted{f', {stop}' if str(stop) else ''}; the same command goes on from there",
              file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
