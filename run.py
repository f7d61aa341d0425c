"""How a run is set up and kept: its settings, its command line, its files, and the one loop that all stages share.

Nothing here knows what a stage learns. What it sees to is that a run can be killed at any moment and goes on to the
same result, bit for bit: whatever a step draws at random is seeded by (seed, stage, step), every file is written to a
temporary name and then renamed, and a checkpoint made with other settings is refused (but for the number of processes
and threads, with which the result is as good and not the same). Checkpoints are loaded with
weights_only, which executes nothing in them.
"""
import dataclasses
import difflib
import io
import json
import math
import os
import random
import signal
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args, get_origin

import torch

from model import GPT, GPTConfig
from parallel import broadcast, rank

PRETRAIN_PRINT = 20  # pretraining steps between lines on the terminal; log.jsonl has them all


class Fault(Exception):
    """What the user can mend: printed as one line, exit code 2."""


@dataclass
class Config:
    """Every setting of a run. A number may be 0 only where its comment says so."""
    seed: int = 0                     # may be 0; weights, corpus, problems, samples and test problems follow from it
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"        # auto: a GPU if there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"        # of the matrix products; auto: the quicker, measured
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto: on a CPU with a C++ compiler
    processes: int = 1                # each with a share of every batch
    threads: int = 0                  # of each process, on the CPU; 0: as many as torch takes, divided among them
    micro_batch: int = 4_096          # tokens that a process computes at a time in training, which bounds its memory
    save_every: float = 20.0          # seconds between checkpoints inside a stage; 0: every step
    # the task: see data/arithmetic.py and data/countdown.py; or your own problems and text, see data/own.py
    task: Literal["arithmetic", "countdown"] = "arithmetic"
    max_ops: int = 4                  # most operations of a problem of RL and of "test"; "hard" has one or two more
    max_number: int = 20              # largest number that is added or subtracted
    max_factor: int = 9               # largest factor
    parentheses: bool = False
    worked_share: float = 1.0         # may be 0; of the authors who show working; the others of them blurt
    wait_share: float = 1.0           # may be 0; of the authors who look again; the others of them do not
    problems: str = ""                # a file of them, for RL and evaluation; none: the built-in ones
    corpus: str = ""                  # a file of text for both bases to read; none: the built-in corpus
    corpus_share: float = 1.0         # of what they read; the rest is the built-in corpus
    # the teacher's shape
    block_size: int = 128             # longest sequence, in tokens
    n_layer: int = 4
    n_head: int = 3
    n_embd: int = 96
    # base: pretraining
    base_tokens: int = 6_500_000      # each read once
    base_batch: int = 32              # rows of block_size tokens
    base_muon_lr: float = 0.02        # of the student's base too
    base_adam_lr: float = 3e-3
    # zero: GRPO
    rl_steps: int = 200               # rollouts
    rl_prompts: int = 64              # P, a rollout's problems
    rl_samples: int = 8               # G, completions of each
    rl_minibatches: int = 2           # updates a rollout
    rl_max_new_tokens: int = 80       # the generation budget; evaluation has the same
    rl_lr: float = 3e-4               # of AdamW
    accuracy_weight: float = 1.0      # may be 0; reward = accuracy_weight * accuracy + format_weight * format
    format_weight: float = 1.0        # may be 0; R1 weighs them equally
    shuffle_rewards: bool = False     # a control: each group's rewards are dealt out to its completions at random
    baseline: Literal["group", "batch"] = "group"   # what a reward is compared with; batch: all of the rollout's
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coef: float = 0.0              # may be 0: then there is no reference
    ref_every: int = 0                # steps after which the reference becomes the policy; 0: it stays the base
    normalize: Literal["sequence", "token", "constant"] = "token"
    scale: Literal["std", "none"] = "std"
    # student
    student_n_layer: int = 3
    student_n_head: int = 2
    student_n_embd: int = 44
    student_base_tokens: int = 6_000_000
    student_base_batch: int = 32
    distill_steps: int = 50
    distill_prompts: int = 512        # a step's problems, one completion each
    distill_minibatches: int = 8      # updates in a pass over them
    distill_epochs: int = 3           # passes
    distill_muon_lr: float = 7e-3
    distill_adam_lr: float = 1.5e-3
    divergence: Literal["forward", "reverse", "jsd", "sft"] = "forward"
    distill_temperature: float = 2.0
    on_policy: bool = False           # the student's own samples instead of the teacher's
    student_rl: bool = False          # also train the control
    # evaluation
    eval_problems: int = 256          # of the test and of the hard side each
    eval_greedy: bool = False         # also the accuracy of greedy decoding


PRESETS = {
    # For one data-centre GPU: 14 million parameters, and problems of up to 8 operations, parentheses and two digits.
    "gpu": dict(micro_batch=65_536, max_ops=6, max_number=99, max_factor=20, parentheses=True, block_size=256,
                n_layer=8, n_head=6, n_embd=384, base_tokens=60_000_000, base_batch=256, rl_prompts=128, rl_samples=16,
                rl_max_new_tokens=160, rl_lr=2e-4, student_n_layer=4, student_n_embd=128,
                student_base_tokens=40_000_000, student_base_batch=128, distill_prompts=2048),
    "tiny": dict(dtype="float32", compile="off", save_every=0.5, n_layer=2, n_head=1, n_embd=64, base_tokens=300_000,
                 base_batch=16, rl_steps=12, rl_prompts=16, rl_samples=8, rl_lr=1e-3, student_n_layer=1,
                 student_n_head=1, student_n_embd=32, student_base_tokens=300_000, student_base_batch=16,
                 distill_steps=8, distill_prompts=128, eval_problems=32,
                 on_policy=True),  # its teacher is too rarely right to learn from off policy
}
MAY_BE_ZERO = {"seed", "threads", "save_every", "worked_share", "wait_share", "accuracy_weight", "format_weight",
               "kl_coef", "ref_every"}

# Which fields shaped a stage's checkpoint (names, or beginnings of names that end in _): they may not change after it.
POSED = ("seed", "task", "max_ops", "max_number", "max_factor", "parentheses")
SHARED = POSED + ("device", "dtype", "compile", "micro_batch", "worked_share", "wait_share", "corpus", "corpus_share",
                  "block_size")
TEACHER = SHARED + ("problems", "n_", "base_", "rl_", "accuracy_weight", "format_weight", "shuffle_rewards", "baseline",
                    "clip_", "kl_coef", "ref_every", "normalize", "scale")
SHAPED_BY = {
    "base": SHARED + ("n_", "base_"),
    "zero": TEACHER,
    "student_base": SHARED + ("student_n_", "student_base_", "base_"),
    "student": TEACHER + ("student_n_", "student_base_", "distill_", "divergence", "on_policy"),
    "student_rl": TEACHER + ("student_n_", "student_base_", "distill_steps", "distill_prompts",
                   "distill_minibatches", "distill_epochs"),
}
EVALUATED_BY = POSED + ("problems", "eval_", "rl_max_new_tokens")
STAGES = {"base": ["base"], "zero": ["zero"], "student": ["student_base", "student", "student_rl"]}  # what --stage runs
SHOWN = ("loss", "heldout_loss", "reward", "accuracy", "format", "length", "reflection", "kl", "entropy", "no_signal",
         "accepted", "tokens_per_s")  # the metrics on a terminal line; log.jsonl has them all


# The command line


def one_of(name: str, text: str, choices) -> str:
    """The text, if it is one of the choices. Raises Fault if it is not."""
    if text not in choices:
        raise Fault(f"--{name} must be one of {', '.join(choices)}, not {text!r}")
    return text


def parse_value(field: dataclasses.Field, text: str):
    """The value of a field that the text states. Raises Fault if it is of the wrong type or range."""
    if get_origin(field.type) is Literal:
        return one_of(field.name, text, get_args(field.type))
    if field.type is bool:
        return one_of(field.name, text, ("True", "False")) == "True"
    if field.type is str:
        return text
    try:
        value = field.type(text)
    except ValueError:
        value = math.nan
    if math.isfinite(value) and (value > 0 or value == 0 and field.name in MAY_BE_ZERO):
        return value
    least = "of 0 or more" if field.name in MAY_BE_ZERO else "above 0"
    raise Fault(f"--{field.name} must be a {'whole ' * (field.type is int)}number {least}, not {text!r}")


def parse_args(argv: list[str]) -> tuple[Config, dict[str, str | None]]:
    """--key=value arguments -> (Config, {"preset", "stage", "ask", "out"}, None where not given).

    Raises Fault for what is unknown, of the wrong type or out of range.

    >>> cfg, options = parse_args(["--seed=1", "--stage=zero"])
    >>> cfg.seed, options["stage"]
    (1, 'zero')
    """
    fields = {field.name: field for field in dataclasses.fields(Config)}
    options, values = dict.fromkeys(("preset", "stage", "ask", "out")), {}
    for arg in argv:
        name, equals, text = arg.removeprefix("--").partition("=")
        if not arg.startswith("--") or name not in (*options, *fields):
            near = difflib.get_close_matches(name, [*options, *fields], n=1)
            raise Fault(f"unknown argument {arg!r}: " + (f"did you mean --{near[0]}=VALUE?" if near else "see --help"))
        if not equals:
            raise Fault(f"--{name} needs a value: --{name}=VALUE")
        if name in options:
            options[name] = one_of(name, text, {"preset": PRESETS, "stage": STAGES}.get(name, (text,)))
        else:
            values[name] = parse_value(fields[name], text)
    return Config(**PRESETS.get(options["preset"], {}) | values), options


# Files


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, if this is the first process. Raises Fault, with the old content intact, if it
    cannot be written."""
    if rank():
        return
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
    if rank():
        return
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_file(path, buffer.getvalue())


def load_checkpoint(path: Path, stage: str | None = None) -> dict:
    """A checkpoint's content, read without executing anything in it. Raises Fault if it is none of ours, or of another
    stage than the one named."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's lines about foreign pickles, beside the one of ours
            content = torch.load(path, map_location="cpu", weights_only=True)
        found = content["stage"] if content["nanor1"] == 1 else None
    except FileNotFoundError:
        raise Fault(f"{path} is missing: an earlier stage makes it (python train.py runs them all)") from None
    except Exception:  # torch.load raises a dozen kinds for what is cut off, foreign or malicious
        found = None
    if found is None:
        raise Fault(f"{path} is not a whole nanoR1 checkpoint: remove it to have it made again")
    if found != (stage or found):
        raise Fault(f"{path} is a checkpoint of {found}")
    return content


def build_model(content: dict) -> GPT:
    """The model of a checkpoint's content, on the CPU, computing in the type that it was trained in."""
    model = GPT(GPTConfig(**content["shape"]), getattr(torch, content["config"]["dtype"]))
    model.load_state_dict(content["model"])
    return model


def what_counts(value):
    """Of a setting: of a file its checksum, wherever it lies."""
    return value.rpartition(" (")[2] if isinstance(value, str) else value


def among(name: str, fields) -> bool:
    """Is a field one of these, which are names or, if they end in _, beginnings of names?

    >>> among("rl_steps", ("seed", "rl_")), among("seeds", ("seed", "rl_"))
    (True, False)
    """
    return any(name == f or f.endswith("_") and name.startswith(f) for f in fields)


def refuse_changes(cfg: Config, stored: dict, what: str, fields: tuple[str, ...]) -> None:
    """Raises Fault if a field that shaped `what` is set otherwise now."""
    for field in dataclasses.fields(cfg):
        if among(field.name, fields):
            old, new = stored.get(field.name, field.default), getattr(cfg, field.name)
            if what_counts(old) != what_counts(new):
                raise Fault(f"{what} was made with {field.name}={old}, not {new}: go on with --{field.name}={old}, or "
                            "start afresh with another --out")


@dataclass
class Run:
    """A run under way: its settings and its task, where it writes, and what results.json holds."""
    cfg: Config
    task: object  # what train.make_task gives
    out: Path
    results: dict
    began: float = 0.0  # when the stage under way did, by time.perf_counter()

    def path(self, name: str) -> Path:
        return self.out / f"{name}.pt"

    def save_results(self) -> None:
        write_file(self.out / "results.json", json.dumps(self.results, indent=1).encode())

    def log_rows(self) -> list[dict]:
        """The rows of log.jsonl; a last line that a killed run left unfinished is not one."""
        path = self.out / "log.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        try:
            return [json.loads(line) for line in lines if line.endswith("\n")]
        except ValueError:
            raise Fault(f"{path} is not a nanoR1 log: remove it, or use another --out") from None

    def checkpoint(self, name: str) -> dict:
        """What a finished stage left. Raises Fault if it is not there, or not of this run."""
        content = load_checkpoint(self.path(name), name)
        refuse_changes(self.cfg, content["config"], str(self.path(name)), SHAPED_BY[name])
        self.results["seconds"][name] = round(content["seconds"], 1)
        return content

    def load_model(self, name: str) -> GPT:
        """The model that a finished stage left, on the run's device."""
        return build_model(self.checkpoint(name)).to(self.cfg.device)


# One loop for all stages


def draws(run: Run, name: str, step: int) -> tuple[random.Random, torch.Generator]:
    """What a step draws from: a pure function of (seed, stage, step), so that no generator's state need be saved."""
    rng = random.Random(f"{run.cfg.seed}/{name}/{step}")
    return rng, torch.Generator(run.cfg.device).manual_seed(rng.getrandbits(63))


def lr_scale(step: int, steps: int, hold: float = 0.4) -> float:
    """Factor of the learning rate at step 1..steps: up over the first twentieth, down to 3 % after a share `hold`.

    >>> [round(lr_scale(step, 100), 2) for step in (1, 5, 40, 70, 100)]
    [0.2, 1.0, 1.0, 0.53, 0.05]
    """
    return min(1.0, step / max(1, steps // 20)) * (0.03 + 0.97 * min(1.0, (steps + 1 - step) / (steps * (1 - hold))))


@contextmanager
def ctrl_c_noted():
    """Inside, Ctrl-C only adds to the list that this yields, so that a step is never torn in the middle."""
    pressed = []
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if rank() else lambda *_: pressed.append(True))
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
    broadcast(None)  # all have read resume.pt, which the first may now replace
    rows = [row for row in run.log_rows() if row["stage"] != name or row["step"] <= done]
    write_file(run.out / "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    started, resumed, saved_step = run.began - seconds, done, done
    looping = saved_at = time.perf_counter()
    with open(os.devnull if rank() else run.out / "log.jsonl", "a") as log, ctrl_c_noted() as pressed:
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
                eta = (steps - done) * (time.perf_counter() - looping) / (done - resumed)
                shown = "  ".join(f"{k} {metrics[k]:.4g}" for k in SHOWN if metrics.get(k) is not None)
                print(f"{name} {done}/{steps}  {shown}  eta {eta:.0f} s", flush=True)
            if pressed or time.perf_counter() - saved_at >= cfg.save_every:
                save_checkpoint(resume, content() | {"parts": {k: part.state_dict() for k, part in parts.items()}})
                saved_at, saved_step = time.perf_counter(), done
            if pressed:
                raise KeyboardInterrupt(f"saved {resume} at step {done} of {name}")
    save_checkpoint(run.path(name), content())
    if not rank():
        resume.unlink(missing_ok=True)
    broadcast(None)  # whoever reads NAME.pt next finds it
