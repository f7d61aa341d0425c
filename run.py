"""What a reader of the algorithm may skip: settings, command line, torch.compile, CUDA graphs, memory, files, the
samples that a run keeps, and the loop that all stages share.

A run can be interrupted or killed at any moment, and the same command goes on from the last checkpoint. Whatever a step
draws at random is seeded by (seed, stage, step, rank), so no generator's state is saved. Every file is written under a
temporary name and then renamed. Where nothing is compiled, the run goes on to the same result, bit for bit.

Settings. Each field of `Config` is declared once, with its default, its help and the stages whose weights it shapes. A
checkpoint holds the settings that it was made with, and is refused if one that shaped it, or a stage that it starts
from (`DEPENDS`), is another now. Settings that shape no weights (device, dtype, compile, threads, micro_batch) may
change: a run begun on a GPU goes on on a laptop. If a setting of the evaluation changes, the models are evaluated
again.

Checkpoints are loaded with weights_only=True, which executes nothing in them.
"""
import argparse
import copy
import ctypes
import dataclasses
import difflib
import json
import math
import os
import platform
import random
import shutil
import sqlite3
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, get_args

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from data.chat import R1_ZERO
from grpo import group_advantages, round_up, sample_rollout
from model import GPT, GPTConfig, KVCache, Muon, Optimizer, generate, token_logprobs
from parallel import barrier, check_launcher, rank

EVAL_SAMPLES = 16  # completions of each evaluated problem, for maj@16 and pass@16
LOOK_PROBLEMS, LOOK_SAMPLES = 32, 4  # what --eval_every asks a policy, and how often
DEEP = 12  # sampling by a model of more layers is not compiled: one step is all layers, at 3 s each
LAUNCH_BOUND = 4_000_000  # up to so many parameters, a GPU's kernels take less time to run than to start
PRETRAIN_PRINT = 20  # pretraining steps between lines on the terminal; log.jsonl has them all
SHOWN = ("heldout_accuracy", "reward", "accuracy", "accepted", "format", "length", "loss", "heldout_loss", "kl",
         "entropy", "no_signal", "reflection")  # the metrics on a terminal line, as many as fit; log.jsonl has them all


class UsageError(ValueError):
    """Something that the user can mend. It is printed as one line, with exit code 2."""


# Settings

BASE, ZERO, STUDENT_BASE, STUDENT, STUDENT_RL = "base", "zero", "student_base", "student", "student_rl"
DEV1, DEV2, DEV3, R1, STUDENT_SFT = "dev1", "dev2", "dev3", "r1", "student_sft"  # the further stages of r1.py
EVALUATION = "evaluation"  # no stage: what it shapes are the figures in results.json
# The stages in their order, each with the stages whose models it starts from.
DEPENDS = {BASE: [], ZERO: [BASE], STUDENT_BASE: [], STUDENT: [ZERO, STUDENT_BASE], STUDENT_RL: [STUDENT_BASE]}
BASES, RL, SFT = (BASE, STUDENT_BASE), (ZERO, DEV2, R1, STUDENT_RL), (DEV1, DEV3)
TAUGHT = (STUDENT, STUDENT_SFT)
TASK, SAMPLES = (*BASES, EVALUATION), (*RL, *SFT, *TAUGHT, EVALUATION)


def option(default, help: str, *stages: str, low: float | None = None, high: float | None = None, absent=None):
    """A field of Config: its default, its help, and the stages whose weights it shapes.

    A number must be above 0, or `low` or more, and at most `high`. A checkpoint from before the field existed stands
    for the value `absent`, by default the default.
    """
    return dataclasses.field(default=default, metadata={
        "help": help, "stages": stages, "low": low, "high": high, "absent": default if absent is None else absent})


@dataclass
class Config:
    """Every setting of a run."""
    # the machine: these shape no weights
    device: Literal["auto", "cpu", "cuda", "mps"] = option("auto", "auto takes a GPU if there is one")
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "of matrix products; auto: bfloat16 if it is native")
    compile: Literal["auto", "on", "off"] = option("auto", "torch.compile; on a GPU, CUDA graphs; auto: if they work")
    threads: int = option(0, "CPU threads of a process; 0 takes torch's own choice", low=0)
    micro_batch: int = option(0, "tokens computed at a time in training, which bounds the memory; 0: 4,096 (65,536 on "
                              "a GPU), with --init 512 (16,384)", low=0)
    save_every: float = option(20.0, "seconds between checkpoints within a stage; 0 saves every step", low=0)
    student_rl: bool = option(False, "also train the control: RL on the student's base")
    eval_every: int = option(0, "RL steps between two looks at held-out problems; 0: never", low=0)
    # the task: see data/arithmetic.py and data/countdown.py, or data/own.py for files of your own
    seed: int = option(0, "decides weights, corpus, problems and samples", *TASK, low=0)
    task: Literal["arithmetic", "countdown", "bilingual"] = option("arithmetic", "built-in problems and corpus", *TASK)
    max_ops: int = option(4, "most operations of a problem in RL and in test; hard has 1 or 2 more", *TASK, low=2)
    max_number: int = option(20, "largest number that is added or subtracted", *TASK, high=999)
    max_factor: int = option(9, "largest factor", *TASK, low=2, high=999)
    parentheses: bool = option(False, "put a sum in parentheses in half of the problems", *TASK)
    worked_share: float = option(1.0, "share kept of the corpus's answers that show working", *BASES, low=0, high=1)
    wait_share: float = option(1.0, "share kept of the corpus's answers that recheck steps", *BASES, low=0, high=1)
    problems: str = option("", "a JSONL file of problems in place of the built-in ones", *SAMPLES)
    init: str = option("", "a folder with a model from elsewhere, which becomes the base", *TASK)
    instruction: str = option(R1_ZERO, "what stands before the questions of a model from --init", *SAMPLES)
    shots: int = option(0, "worked examples before each question of a model from --init", *SAMPLES, low=0)
    corpus: str = option("", "a file of text that the bases read in place of the built-in corpus", *BASES)
    corpus_share: float = option(1.0, "share of that text; the rest is the built-in corpus", *BASES, high=1)
    block_size: int = option(128, "longest sequence, in tokens", *BASES)
    # base: pretraining of the teacher
    n_layer: int = option(4, "layers of the teacher", BASE)
    n_head: int = option(3, "attention heads of the teacher", BASE)
    n_embd: int = option(96, "width of the teacher", BASE)
    base_tokens: int = option(6_500_000, "tokens that the base is trained on, each once", BASE, low=0)
    base_batch: int = option(32, "rows of block_size tokens in an update", BASE)
    base_muon_lr: float = option(0.02, "learning rate of Muon, for both bases; 0: AdamW alone", *BASES, low=0)
    base_adam_lr: float = option(3e-3, "learning rate of AdamW, for both bases", *BASES)
    # zero: GRPO
    rl_steps: int = option(200, "rollouts", ZERO)
    rl_prompts: int = option(64, "P, problems of a rollout", ZERO)
    rl_samples: int = option(8, "G, completions of each problem", *RL, low=2)
    rl_minibatches: int = option(2, "updates on a rollout", *RL)
    rl_max_new_tokens: int = option(80, "longest completion, in tokens, in every stage and in evaluation", *SAMPLES)
    rl_lr: float = option(3e-4, "learning rate of AdamW", *RL)
    accuracy_weight: float = option(1.0, "reward = accuracy_weight * accuracy + format_weight * format", *RL, low=0)
    format_weight: float = option(1.0, "R1 weighs both equally", *RL, low=0)
    shuffle_rewards: bool = option(False, "a control: deal each group's rewards out at random", *RL)
    baseline: Literal["group", "batch"] = option("group", "compare with the mean of the group or of the batch", *RL)
    clip_low: float = option(0.2, "the ratio is clipped at 1 - clip_low", *RL, high=1)
    clip_high: float = option(0.2, "the ratio is clipped at 1 + clip_high", *RL)
    kl_coef: float = option(0.001, "weight of the KL penalty; 0 does without the reference", *RL, low=0)
    skip_no_signal: bool = option(True, "do not compute completions of advantage 0: see grpo.py", *RL, absent=False)
    ref_every: int = option(0, "steps after which the policy becomes the reference; 0: never", *RL, low=0)
    normalize: Literal["sequence", "token", "constant"] = option("token", "average over tokens: see grpo.py", *RL)
    scale: Literal["std", "none"] = option("std", "what an advantage is divided by: see grpo.py", *RL)
    # student_base and student: distillation
    student_n_layer: int = option(3, "layers of the student", STUDENT_BASE)
    student_n_head: int = option(2, "attention heads of the student", STUDENT_BASE)
    student_n_embd: int = option(44, "width of the student", STUDENT_BASE)
    student_init: str = option("", "the student's base; by default every second layer of --init", STUDENT_BASE)
    student_base_tokens: int = option(6_000_000, "tokens that the student's base is trained on", STUDENT_BASE, low=0)
    student_base_batch: int = option(32, "rows of block_size tokens in an update", STUDENT_BASE)
    distill_longer: bool = option(True, "also ask problems longer than those of RL", *TAUGHT, STUDENT_RL, absent=False)
    distill_steps: int = option(50, "steps, each with new completions", *TAUGHT, STUDENT_RL)
    distill_prompts: int = option(512, "problems of a step, one completion each", *TAUGHT, STUDENT_RL)
    distill_minibatches: int = option(8, "updates in an epoch over a step's completions", *TAUGHT, STUDENT_RL)
    distill_epochs: int = option(3, "epochs over a step's completions", *TAUGHT, STUDENT_RL, absent=1)
    distill_muon_lr: float = option(7e-3, "learning rate of Muon; 0: AdamW alone", *TAUGHT, low=0)
    distill_adam_lr: float = option(1.5e-3, "learning rate of AdamW", *TAUGHT)
    divergence: Literal["forward", "reverse", "jsd", "sft"] = option("forward", "the loss: see distill.py", *TAUGHT)
    distill_temperature: float = option(2.0, "temperature at which both distributions are compared", *TAUGHT)
    on_policy: bool = option(False, "learn on the student's own completions, not the teacher's", *TAUGHT)
    # r1.py: R1's further stages
    language_weight: float = option(1.0, "the reward's part for a thought in the question's language", DEV2, R1, low=0)
    cold_start: bool = option(True, "RL begins from dev1; False: from the base", DEV2)
    cold_steps: int = option(4, "steps of the cold start", DEV1)
    cold_prompts: int = option(192, "problems of such a step, one completion of zero each", DEV1)
    cold_epochs: int = option(3, "epochs over a step's completions", DEV1)
    sft_steps: int = option(16, "steps of rejection sampling and fine-tuning", DEV3)
    sft_epochs: int = option(2, "epochs over a step's completions", DEV3)
    sft_muon_lr: float = option(2e-3, "learning rate of Muon in fine-tuning; 0: AdamW alone", *SFT, low=0)
    sft_adam_lr: float = option(1e-3, "learning rate of AdamW in fine-tuning", *SFT)
    dev2_steps: int = option(100, "rollouts", DEV2)
    r1_steps: int = option(60, "rollouts", R1)
    everyday_share: float = option(0.25, "share of everyday questions in r1's RL and its students", R1, low=0, high=1)
    # evaluation
    eval_problems: int = option(256, "problems of each held-out kind", EVALUATION, high=10_000)


PRESETS = {
    # For one data-centre GPU: 14 million parameters, problems of up to 8 operations with parentheses and two digits.
    "gpu": dict(max_ops=6, max_number=99, max_factor=20, parentheses=True, block_size=256,
                n_layer=8, n_head=6, n_embd=384, base_tokens=60_000_000, base_batch=256, rl_prompts=128, rl_samples=16,
                rl_max_new_tokens=160, rl_lr=2e-4, student_n_layer=4, student_n_embd=128,
                student_base_tokens=40_000_000, student_base_batch=128, distill_prompts=2048),
    # A smoke run. Its teacher is too rarely right to learn from off policy.
    "tiny": dict(dtype="float32", compile="off", save_every=0.5, n_layer=2, n_head=1, n_embd=64, base_tokens=300_000,
                 base_batch=16, rl_steps=12, rl_prompts=16, rl_samples=8, rl_lr=1e-3, student_n_layer=1,
                 student_n_head=1, student_n_embd=32, student_base_tokens=300_000, student_base_batch=16,
                 distill_steps=8, distill_prompts=128, eval_problems=32, on_policy=True),
}
# What --init brings with it: a published model learns in small steps, and each of its samples is dear.
OF_INIT = dict(save_every=120.0, block_size=1024, base_tokens=0, student_base_tokens=0,
               base_muon_lr=0.0, base_adam_lr=2e-5, rl_steps=50, rl_prompts=8, rl_minibatches=1, rl_max_new_tokens=64,
               rl_lr=1e-5, eval_every=10, eval_problems=64, distill_steps=25, distill_prompts=64,
               distill_minibatches=2, distill_epochs=1, distill_muon_lr=5e-3, distill_adam_lr=3e-4)
FIELDS = {field.name: field for field in dataclasses.fields(Config)}


def shaped_by(stage: str) -> list[str]:
    """The fields that shape a stage's weights, by itself or through a stage that it starts from; or the EVALUATION.

    >>> [name for name in shaped_by("base") if name in ("n_embd", "rl_lr", "seed")]
    ['seed', 'n_embd']
    >>> "rl_lr" in shaped_by("student"), "rl_lr" in shaped_by("student_base")
    (True, False)
    """
    starts = {name for start in DEPENDS.get(stage, ()) for name in shaped_by(start)}
    return [name for name, field in FIELDS.items() if stage in field.metadata["stages"] or name in starts]


def change(cfg: Config, stored: dict, stage: str) -> str:
    """The first field that shapes a stage and is set otherwise than stored, as "name=old, not new"; or ""."""
    for name in shaped_by(stage):
        old, new = stored.get(name, FIELDS[name].metadata["absent"]), getattr(cfg, name)
        if str(old).split(" (crc32 ")[-1] != str(new).split(" (crc32 ")[-1]:  # a file is compared by its content
            return f"{name}={old}, not {new}"
    return ""


def refuse_changes(cfg: Config, stored: dict, path: Path, stage: str) -> None:
    """Raises UsageError if a field that shaped a checkpoint is set otherwise now."""
    if changed := change(cfg, stored, stage):
        raise UsageError(f"{path} was made with {changed}: set it as it was, or start afresh with another --out")


def check(cfg: Config) -> None:
    """Raises ValueError where settings that are each right do not go together."""
    for prefix in ("", "student_"):
        GPTConfig(1, cfg.block_size, *(getattr(cfg, prefix + key) for key in ("n_layer", "n_head", "n_embd")))

    def changed(*names: str) -> bool:
        return any(getattr(cfg, name) != FIELDS[name].default for name in names)

    for wrong, line in (
        (cfg.task == "countdown" and changed("max_ops", "max_factor", "parentheses"),
         "--max_ops, --max_factor and --parentheses are not settings of --task=countdown"),
        (not cfg.accuracy_weight and not cfg.format_weight, "--accuracy_weight and --format_weight cannot both be 0"),
        (cfg.corpus_share < 1 and not cfg.corpus, "--corpus_share needs a --corpus"),
        (cfg.block_size % 8, "--block_size must be a multiple of 8, as the lengths of micro-batches are"),
        (cfg.ref_every and not cfg.kl_coef, "--ref_every refreshes the reference, which only a --kl_coef above 0 has"),
        (cfg.on_policy and cfg.divergence == "sft", "--divergence=sft learns the teacher's samples: not --on_policy"),
        (any(tokens // batch < cfg.block_size and not (cfg.init and tokens == 0) for tokens, batch in (
            (cfg.base_tokens, cfg.base_batch), (cfg.student_base_tokens, cfg.student_base_batch))),
         "--base_tokens and --student_base_tokens must be one batch at least"),
        (not cfg.init and changed("student_init", "instruction", "shots"),
         "--student_init, --instruction and --shots need an --init"),
        (cfg.init and changed(*(part + key for part in ("", "student_") for key in ("n_layer", "n_head", "n_embd"))),
         "--n_layer, --n_head and --n_embd are of models made here: the folders of --init have sizes of their own"),
        (cfg.device != "auto" and not has(cfg.device), f"--device={cfg.device}: torch sees no such GPU here"),
    ):
        if wrong:
            raise UsageError(line)


# The command line


def number(kind: type, low: float | None, high: float | None) -> Callable[[str], int | float]:
    """An argparse type: a finite number in a range. A whole number may be written as 1e6.

    >>> number(int, None, None)("1e6")
    1000000
    """
    def parse(text: str) -> int | float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if math.isfinite(value) and (value > 0 if low is None else value >= low) and (high is None or value <= high):
            if kind is float or value.is_integer():
                return kind(value)
        bounds = ("above 0" if low is None else f"of {low} or more") + (f" and at most {high}" if high else "")
        raise argparse.ArgumentTypeError(f"must be a {'whole ' * (kind is int)}number {bounds}, not {text!r}")
    return parse


class Parser(argparse.ArgumentParser):
    """argparse with one line for an error, raised as UsageError."""

    def error(self, message: str):
        raise UsageError(message)


def parse_args(argv: list[str], description: str = "") -> tuple[Config, argparse.Namespace]:
    """--key=value arguments -> (Config, the options preset, stage, ask and out, None where not given).

    Raises UsageError for what is unknown, of the wrong type or out of range; --help prints and exits.

    >>> cfg, options = parse_args(["--seed=1", "--stage=zero"])
    >>> cfg.seed, options.stage
    (1, 'zero')
    """
    parser = Parser(prog="train.py", usage="python train.py [--key=value ...]", description=description,
                    formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--preset", choices=PRESETS, help="a set of values for the settings below")
    stages = [name for name in DEPENDS if name not in (STUDENT_BASE, STUDENT_RL)]
    parser.add_argument("--stage", choices=stages, help="train one stage alone")
    parser.add_argument("--ask", metavar="PROBLEM", help="print what each model in --out answers")
    parser.add_argument("--samples", type=number(int, None, None), default=1, metavar="N", help="answers to --ask")
    parser.add_argument("--temperature", type=number(float, 0, None), metavar="T",
                        help="at which they are sampled (default: 0, the likeliest tokens; 1 with several --samples)")
    parser.add_argument("--evaluate", metavar="FILE", help="evaluate what is in --out on a JSONL file of problems")
    parser.add_argument("--out", metavar="DIR", help="where the run writes; out/, or out/PRESET, by default")
    for name, field in FIELDS.items():
        choices = ("True", "False") if field.type is bool else get_args(field.type) or None
        kind = number(field.type, field.metadata["low"], field.metadata["high"]) if field.type in (int, float) else str
        parser.add_argument(f"--{name}", type=kind, choices=choices, metavar=None if choices else "VALUE",
                            help=f"{field.metadata['help']} (default: {field.default})")
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].partition("=")[0].lstrip("-"), FIELDS, n=1)
        raise UsageError(f"unknown argument {unknown[0]!r}: "
                         + (f"did you mean --{near[0]}=VALUE?" if near else "see --help"))
    if options.init and options.preset:
        raise UsageError("--init brings settings of its own, which a --preset does not go with")
    given = {name: value == "True" if FIELDS[name].type is bool else value
             for name, value in vars(options).items() if name in FIELDS and value is not None}
    return Config(**(OF_INIT if options.init else {}) | PRESETS.get(options.preset, {}) | given), options


# The machine


def has(device: str) -> bool:
    """Is this device here?"""
    return {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}[device]


def has_bfloat16(device: str) -> bool:
    """Does this device compute with bfloat16, instead of converting it first?"""
    if device == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def settle(cfg: Config, stored: dict) -> Config:
    """Replace what the settings leave open by what the run began with (`stored`), or else by what this machine has."""
    if not has(stored.get("device", "cpu")):
        stored = {}  # the run began on another machine
    settled = {key: stored[key] for key in ("device", "dtype") if getattr(cfg, key) == "auto" and key in stored}
    cfg = dataclasses.replace(cfg, **settled, threads=cfg.threads or torch.get_num_threads())
    if cfg.device == "auto":
        cfg.device = next(device for device in ("cuda", "mps", "cpu") if has(device))
    if cfg.dtype == "auto":
        cfg.dtype = "bfloat16" if has_bfloat16(cfg.device) else "float32"
    if cfg.compile == "auto":
        cfg.compile = "on" if cfg.device == "cuda" or cfg.device == "cpu" and can_compile() else "off"
    # subtle: the compiler writes other code for more than 4,096 tokens.
    small, large = (65_536, 16_384) if cfg.device == "cuda" else (4_096, 512)  # for a small model and a real one
    cfg.micro_batch = cfg.micro_batch or (large if cfg.init else small)
    return cfg


def tune_libraries() -> None:
    """Set what torch's libraries read from the environment. Call it before the first matrix product.

    oneDNN would keep its compiled kernels for 1,024 shapes, which costs memory; 256 cost no time. torch.compile is told
    to call its kernels from C++ instead of Python, and to believe the CPU about its vector units, which it would spend
    6 s on trying one by one. cuDNN's attention is off, because it plans anew for every length.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
    os.environ.setdefault("TORCHINDUCTOR_CPP_WRAPPER", "1")
    os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
    torch.backends.cuda.enable_cudnn_sdp(False)


def can_compile() -> bool:
    """Does torch.compile work here? On a CPU it needs a C++ compiler and Python's headers. Prints a line if not."""
    print("trying out torch.compile", flush=True)
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8))
    except RuntimeError as error:
        print(f"torch.compile does not work here, and the run goes without: {str(error).splitlines()[0]}")
        return False
    return True


def compiled(model: GPT, cfg: Config, training: bool = False, sampling: bool = False) -> GPT:
    """The model, with its passes for training and for sampling compiled if the run compiles: on a GPU as CUDA graphs,
    one for each size, else by torch.compile, once for all sizes."""
    if cfg.compile == "on" and cfg.device == "cuda":
        if training and model.n_params() <= LAUNCH_BOUND:
            model.hidden = GraphedTraining(model)
        if sampling:
            model.next_token = GraphedSampling(model)
    elif cfg.compile == "on":
        # subtle: code that was compiled for another size rounds differently. So everything is compiled here, at a fixed
        # size, and nothing later; what does not fit (a batch of one row) runs as it is. No other dimension has these
        # sizes, or the compiler would take the two for one.
        torch.compiler.set_stance("default")
        torch._dynamo.config.specialize_float = True  # no float varies; the compiler would find out by tracing twice
        if training:
            for block in model.blocks:
                block.compile(dynamic=True)
            length = min(model.config.block_size, cfg.micro_batch // 2) - 3
            idx = torch.zeros(max(2, cfg.micro_batch // length - 1), length, dtype=torch.long, device=cfg.device)
            model.hidden(idx).float().sum().backward()
            model.zero_grad(set_to_none=True)
        if sampling and model.config.n_layer <= DEEP:
            model.next_token = torch.compile(model.next_token, dynamic=True)
            generate(model, [[0] * 11], 3, eos_id=-1, samples=509)
        torch.compiler.set_stance("eager_on_recompile")
    return model


def frozen(model: GPT, cfg: Config) -> GPT:
    """A copy of the model that is never trained, such as GRPO's reference.

    Of a model from elsewhere it keeps the matrices in the type of the products, to which they would be cast at each
    use: the same values in half the memory. (A model made here keeps its type: its copy runs the code compiled for it.)
    """
    model = copy.deepcopy(model)
    for layer in model.modules():
        if cfg.init and isinstance(layer, nn.Linear):
            layer.weight.data = layer.weight.data.to(model.dtype)
    return compiled(model, cfg, training=True)


def return_memory(cfg: Config) -> None:
    """Give the memory that a large model's step has freed back to the system. glibc would keep it, in pieces that the
    next step's tensors do not fit into, so that the process grew from step to step."""
    if cfg.init and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


class Graph:
    """The kernels that `action` starts on a GPU, recorded without running them: a CUDA graph. replay() starts them
    together, on the memory that they were recorded with.

    The kernels of a small model run for a shorter time than it takes to start them one by one.
    """
    stream = None  # the stream that all graphs are recorded on

    def __init__(self, action: Callable[[], None], pool):
        Graph.stream = Graph.stream or torch.cuda.Stream()
        self.graph = torch.cuda.CUDAGraph()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            # subtle: `with torch.cuda.graph` would give all free memory back first, which takes longer than this.
            self.graph.capture_begin(pool=pool)
            action()
            self.graph.capture_end()
        torch.cuda.current_stream().wait_stream(self.stream)
        self.replay = self.graph.replay


class GraphedSampling:
    """GPT.next_token on a GPU, one graph for each size (rows, tokens in the cache), recorded the second time that it
    comes up. A graph works in fixed memory, so each new cache is moved there. It has room for `rows` rows of
    `columns` tokens."""

    def __init__(self, model: GPT):
        self.model, self.rows, self.columns, self.cache, self.pad = model, 0, 0, None, None
        self.seen, self.graphs, self.pool = set(), {}, torch.cuda.graph_pool_handle()

    def __call__(self, token: Tensor, cache: KVCache, temperature: float, u: Tensor) -> tuple[Tensor, Tensor]:
        n = len(token)
        if cache is not self.cache:
            self.move_in(cache)
        if cache.pad is not self.pad:  # rows have left: see KVCache.replace
            self.pads[:n], self.masks[:n, :cache.mask.size(1)] = cache.pad, cache.mask
            self.pad = cache.pad = self.pads[:n]
            cache.mask = self.masks[:n]
        self.token[:n], self.u[:n] = token, u

        def step() -> None:
            self.token[:n], self.logp[:n] = GPT.next_token(self.model, self.token[:n], cache, temperature, self.u[:n])

        size = n, cache.length, temperature
        if size not in self.seen:
            self.seen.add(size)
            step()
        else:
            if size not in self.graphs:
                self.graphs[size] = Graph(step, self.pool)
            cache.length = size[1] + 1
            self.graphs[size].replay()
        return self.token[:n], self.logp[:n]

    def move_in(self, cache: KVCache) -> None:
        """Move a cache to the memory that the graphs work in."""
        self.cache, self.pad, n = cache, None, len(cache.pad)
        if n > self.rows or cache.max_len > self.columns:
            self.rows, self.columns = max(n, self.rows), max(round_up(cache.max_len, 64), self.columns)
            self.seen.clear(), self.graphs.clear()
            self.weights, self.output = cache.weights, cache.output
            self.kv = {layer: [x.new_empty(self.rows, x.size(1), self.columns, x.size(3)) for x in pair]
                       for layer, pair in cache.kv.items()}
            self.masks, self.u = (cache.mask.new_zeros(self.rows, width) for width in (self.columns, 1))
            self.pads, self.token = (cache.pad.new_zeros(self.rows) for _ in range(2))
            self.logp = cache.mask.new_zeros(self.rows)
        else:  # the weights may have changed
            for mine, new in zip(self.weights, cache.weights):
                torch._foreach_copy_(list(mine), list(new))
            self.output.copy_(cache.output)
            cache.weights, cache.output = self.weights, self.output
        for mine, new in zip(self.kv.values(), cache.kv.values()):
            for i, x in enumerate(mine):
                x[:n, :, :cache.length] = new[i][:, :, :cache.length]
                new[i] = x[:n]


class GraphedTraining:
    """GPT.hidden on a GPU with its backward pass, two graphs for each size, recorded the second time that it comes up.
    Sizes are rounded up to a few. The backward graph itself adds the gradients to those of the parameters."""

    def __init__(self, model: GPT):
        self.model, self.seen, self.passes, self.pool = model, set(), {}, torch.cuda.graph_pool_handle()
        self.parameters = list(model.parameters())
        self.grads = [torch.zeros_like(p) for p in self.parameters]

    def __call__(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        if cache is not None:
            return GPT.hidden(self.model, idx, cache)
        if self.parameters[0].grad is None:  # an update begins
            torch._foreach_zero_(self.grads)
            for p, grad in zip(self.parameters, self.grads):
                p.grad = grad
        n, T = idx.shape
        size = round_up(n, 32), min(round_up(T, 32), self.model.config.block_size)
        idx = F.pad(idx, (0, size[1] - T, 0, size[0] - n))
        if size not in self.seen:
            self.seen.add(size)
            return GPT.hidden(self.model, idx)[:n, :T]
        if size not in self.passes:
            self.passes[size] = Passes(Twin(self.model), idx, self.grads, self.pool)
        return Replay.apply(self.passes[size], idx, self.parameters[0])[:n, :T]


class Twin(GPT):
    """A model in the memory of another. Autograd knows its parameters as others, because a recording may not meet what
    autograd keeps for those of the first: a loss that is still at hand ties them to another stream."""

    def __init__(self, model: GPT):
        with torch.device("meta"):
            super().__init__(model.config, model.dtype)
        self.load_state_dict(model.state_dict(), assign=True)
        self.cos, self.sin = model.cos, model.sin


class Passes:
    """The recorded forward and backward pass of a model on one size: idx -> out, and the gradient of `out` -> `grads`
    of the parameters, to which it is added."""

    def __init__(self, model: GPT, idx: Tensor, grads: list[Tensor], pool):
        self.idx = idx

        def forward() -> None:
            with torch.enable_grad():
                self.live = model.hidden(idx)

        def backward() -> None:
            found = torch.autograd.grad(self.live, list(model.parameters()), self.grad, allow_unused=True)
            torch._foreach_add_(*zip(*((grad, new) for grad, new in zip(grads, found) if new is not None)))

        self.forward = Graph(forward, pool)
        self.out, self.grad = self.live.detach(), torch.empty_like(self.live)
        self.backward = Graph(backward, pool)
        del self.live


class Replay(torch.autograd.Function):
    """How autograd meets recorded passes. `weight` is a parameter, without which it would see no need to go back."""

    @staticmethod
    def forward(ctx, passes: Passes, idx: Tensor, weight: Tensor) -> Tensor:
        ctx.passes = passes
        passes.idx.copy_(idx)
        passes.forward.replay()
        return passes.out.clone()  # the next replay writes over it

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, None, None]:
        ctx.passes.grad.copy_(grad)
        ctx.passes.backward.replay()
        return None, None, None


class GraphedMuon:
    """Muon.direction on a GPU, one graph for each shape, recorded the second time that it comes up."""

    def __init__(self, direction: Callable[[Tensor, Tensor], Tensor]):
        self.direction, self.graphs, self.pool = direction, {}, torch.cuda.graph_pool_handle()

    def __call__(self, grad: Tensor, average: Tensor) -> Tensor:
        if grad.shape not in self.graphs:
            self.graphs[grad.shape] = None
            return self.direction(grad, average)
        if self.graphs[grad.shape] is None:
            given, found = grad.clone(), []
            graph = Graph(lambda: found.append(self.direction(given, average)), self.pool)
            self.graphs[grad.shape] = graph, given, *found
        graph, given, update = self.graphs[grad.shape]
        given.copy_(grad)
        graph.replay()
        return update


def graphed(optimizer: Optimizer, cfg: Config) -> Optimizer:
    """The optimizer, with Muon's many small products as graphs, if the run records any."""
    for part in optimizer.parts:
        if isinstance(part, Muon) and cfg.compile == "on" and cfg.device == "cuda":
            part.direction = GraphedMuon(part.direction)
    return optimizer


def forecast(model: GPT, cfg: Config, task) -> str:
    """A line with the time and the disk that a run from this base may take, from two short trials."""
    prompt = task.encode_prompt(task.make_problem(random.Random(0)))
    length, rows = len(prompt) + cfg.rl_max_new_tokens, cfg.rl_prompts * cfg.rl_samples
    idx = torch.zeros(max(1, cfg.micro_batch // length), length, dtype=torch.long, device=cfg.device)

    def sample(n_tokens: int) -> None:
        generate(model, [prompt] * cfg.rl_prompts, n_tokens, eos_id=-1, samples=cfg.rl_samples)

    def update() -> None:
        token_logprobs(model, idx).sum().backward()
        model.zero_grad(set_to_none=True)

    def seconds(action, *args) -> float:
        action(*args)  # the first time is slower
        began = time.perf_counter()
        action(*args)
        return time.perf_counter() - began

    one, nine = seconds(sample, 1), seconds(sample, 9)
    sampling = (one + (nine - one) / 8 * cfg.rl_max_new_tokens) / rows  # seconds of a completion
    learning = seconds(update) / len(idx) * (4 / 3 if cfg.kl_coef else 1)  # the reference reads it too
    learnt = cfg.rl_steps * rows + cfg.distill_steps * cfg.distill_prompts * cfg.distill_epochs
    evaluated = 4 * cfg.eval_problems * EVAL_SAMPLES * len(task.held_out)
    evaluated += cfg.rl_steps // cfg.eval_every * LOOK_PROBLEMS * LOOK_SAMPLES if cfg.eval_every else 0
    minutes = (learnt * (sampling + learning) + evaluated * sampling) / 60
    # 4 bytes a weight in base, zero, zero_best, student_base and student, and three times in resume.pt
    return (f"{model.n_params():,} parameters: all stages take up to about {minutes:.0f} minutes here and "
            f"{8 * 4 * model.n_params() / 1e9:.1f} GB on disk")


# Files


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, whose content takes the place of `path` whole or not at all. Raises UsageError, with the old
    content intact, if it cannot be written."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a full disk
        temporary.unlink(missing_ok=True)
        if isinstance(error.__context__, KeyboardInterrupt):  # torch.save makes a RuntimeError of that, too
            raise KeyboardInterrupt from None
        raise UsageError(f"cannot write {path}: {error}; what was saved before is intact") from None


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, if this is rank 0."""
    if not rank():
        with whole_file(path) as file:
            file.write(content)


def save_checkpoint(path: Path, content: dict) -> None:
    """Write a checkpoint whole or not at all, if this is rank 0. It goes to the file piece by piece: in memory it would
    be a second copy of the model."""
    if not rank():
        with whole_file(path) as file:
            torch.save(content, file)


def load_checkpoint(path: Path, stage: str | None = None) -> dict:
    """A checkpoint's content, read without executing anything in it. Raises UsageError if the file is not a checkpoint
    of ours, or one of another stage than the one named."""
    if not path.exists():
        raise UsageError(f"{path} is missing: an earlier stage makes it (python train.py runs them all)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's lines about foreign pickles, beside the one of ours
            content = torch.load(path, map_location="cpu", weights_only=True)
        found = {1: content["stage"]}[content["nanor1"]]  # 1 is the format of these checkpoints
    except Exception:  # torch.load raises a dozen kinds for what is cut off, foreign or malicious
        raise UsageError(f"{path} is not a whole nanoR1 checkpoint: remove it to have it made again") from None
    if stage not in (None, found):
        raise UsageError(f"{path} is a checkpoint of {found}")
    return content


def build_model(content: dict) -> GPT:
    """The model of a checkpoint's content, on the CPU, with the type of matrix products that it was trained with."""
    model = GPT(GPTConfig(**content["shape"]), getattr(torch, content["config"]["dtype"]))
    model.load_state_dict(content["model"])
    return model


@contextmanager
def lock(out: Path) -> Iterator[None]:
    """Make a folder, and lock it until the `with` or this process ends, however it ends; rank 0 does so for all ranks.

    SQLite's locks are the operating system's, on every system. Raises UsageError if another run holds the lock.
    """
    if rank():
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(out / "lock", timeout=0)) as holder:
        try:
            holder.execute("BEGIN EXCLUSIVE")
        except sqlite3.Error:
            raise UsageError(f"cannot lock {out}: another run is writing into it; wait, or use another --out") from None
        yield


@dataclass
class Run:
    """A run under way: its settings and its task, where it writes, and what results.json holds."""
    cfg: Config
    task: object  # what train.make_task returns
    out: Path
    results: dict
    began: float = 0.0  # when the current stage began, by time.perf_counter()

    def path(self, name: str) -> Path:
        return self.out / f"{name}.pt"

    def save_results(self) -> None:
        write_file(self.out / "results.json", json.dumps(self.results, indent=1).encode())

    def log_rows(self) -> list[dict]:
        """The rows of log.jsonl, without a last line that a killed run left unfinished."""
        path = self.out / "log.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        try:
            return [json.loads(line) for line in lines if line.endswith("\n")]
        except ValueError:
            raise UsageError(f"{path} is not a nanoR1 log: remove it, or use another --out") from None

    def checkpoint(self, name: str) -> dict:
        """What a finished stage left. Raises UsageError if it is missing, or was made with other settings."""
        content = load_checkpoint(self.path(name), name)
        refuse_changes(self.cfg, content["config"], self.path(name), name)
        self.results["seconds"][name] = round(content["seconds"], 1)
        return content

    def load_model(self, name: str) -> GPT:
        """The model that a finished stage left, on the run's device and in its dtype."""
        model = build_model(self.checkpoint(name)).to(self.cfg.device)
        model.dtype = getattr(torch, self.cfg.dtype)
        return model


def open_run(cfg: Config, task, out: Path) -> Run:
    """Begin a run, or go on with the one in `out`. Raises UsageError if that one was made with other settings."""
    path, results = out / "results.json", {"config": {}, "seconds": {}, "models": {}}
    try:
        stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else results
        results = {key: dict(stored[key]) for key in results}
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{path} is not a nanoR1 run's: use another --out") from None
    run = Run(settle(cfg, results["config"]), task, out, results)
    for name in DEPENDS:
        if run.path(name).exists():
            run.checkpoint(name)
    if results["models"] and (changed := change(cfg, results["config"], EVALUATION)):
        print(f"the models were evaluated with {changed}: they are evaluated again")
        results["models"] = {}
    results["config"] = dataclasses.asdict(run.cfg)
    run.save_results()
    return run


# One loop for all stages


def seeded(cfg: Config, name: str, step: int) -> tuple[random.Random, torch.Generator]:
    """The generators of a step on this rank: a pure function of (seed, stage, step, rank). Rank 0 draws what one
    process draws."""
    rng = random.Random(f"{cfg.seed}/{name}/{step}" + f"/{rank()}" * (rank() > 0))
    return rng, torch.Generator(cfg.device).manual_seed(rng.getrandbits(63))


def keep_samples(run: Run, name: str, step: int, steps: int, models: dict[str, GPT], make_problem: Callable,
                 reward_fn: Callable) -> None:
    """At steps 0 (before the first), 1, 2, 5, 10, 20, 50, ... and the last, let the models answer the same four
    training problems eight times each, with the same random numbers, into samples.jsonl. A row is one model's answers
    to one problem: {"stage", "step", "model", "question", "completions", "rewards": {name: one a completion},
    "advantages", "logprobs": one a token}."""
    if rank() or not (step in (0, steps) or f"{step}".rstrip("0") in ("1", "2", "5")):
        return
    rows, (rng, _) = [], seeded(run.cfg, f"samples {name}", 0)
    problems = [make_problem(rng) for _ in range(4)]
    for model_name, model in models.items():
        _, generator = seeded(run.cfg, f"samples {name}", 0)
        found = sample_rollout(model, problems, reward_fn, run.task, samples=8, generator=generator,
                               max_new_tokens=run.cfg.rl_max_new_tokens)
        advantages = group_advantages(found.column("reward").view(-1, 8), run.cfg.scale).tolist()
        for i, problem in enumerate(problems):
            group = slice(8 * i, 8 * i + 8)
            rows.append({"stage": name, "step": step, "model": model_name, "question": problem.question,
                         "completions": found.texts[group], "advantages": advantages[i],
                         "rewards": {key: [score[key] for score in found.scores[group]] for key in found.scores[0]},
                         "logprobs": [[round(x, 4) for x in logp] for logp in found.sampler_logp[group]]})
    path = run.out / "samples.jsonl"
    kept = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    kept = [row for row in kept if row["stage"] != name or row["step"] < step]  # an attempt that was killed left more
    write_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept + rows).encode())


def lr_schedule(step: int, steps: int, hold: float = 0.4) -> float:
    """Factor of the learning rate at step 1..steps: it rises over the first twentieth, stays at 1 up to a share `hold`
    of the steps, and falls to 3 %.

    >>> [round(lr_schedule(step, 100), 2) for step in (1, 5, 40, 70, 100)]
    [0.2, 1.0, 1.0, 0.53, 0.05]
    """
    return min(1.0, step / max(1, steps // 20)) * (0.03 + 0.97 * min(1.0, (steps + 1 - step) / (steps * (1 - hold))))


def fitting(fields: list[str], last: str = "") -> str:
    """A line for the terminal: the fields in their order, without those that would make it wrap, and the last one.

    >>> fitting(["zero 1/200", "reward 0.459", "a longer field " * 9], "60 s to go")
    'zero 1/200  reward 0.459  60 s to go'
    """
    line, width = fields[0], shutil.get_terminal_size((120, 24)).columns
    for field in fields[1:]:
        line += f"  {field}" if len(line) + len(field) + len(last) + 4 <= width else ""
    return f"{line}  {last}".rstrip()


def clipped(text: str, room: int = 0) -> str:
    """The text, cut off where it would make a line of the terminal wrap, with `room` for what follows."""
    width = shutil.get_terminal_size((120, 24)).columns - room
    return text if len(text) <= width else text[:width - 3] + "..."


def train_stage(run: Run, name: str, steps: int, parts: dict, train_step: Callable[[int], dict]) -> None:
    """Run train_step(1..steps) -> metrics, from resume.pt if it is this stage's, and leave NAME.pt.

    parts are the objects with a state_dict that the steps change; parts["model"] is what the stage makes. Each step is
    logged, with tokens_per_s in place of its metric "tokens". The state is saved every save_every seconds, or as often
    as takes a twentieth of the time. NAME_best.pt is the model of the best heldout_accuracy so far, for RL that gets
    worse again. Raises UsageError if a metric is no longer finite.
    """
    resume, step, seconds, saved_step, save_seconds = run.path("resume"), 0, 0.0, 0, 0.0

    def save(path: Path, **more) -> None:
        save_checkpoint(path, {
            "nanor1": 1, "stage": name, "step": step, "seconds": seconds, "config": dataclasses.asdict(run.cfg),
            "shape": dataclasses.asdict(parts["model"].config), "model": parts["model"].state_dict(), **more})

    if resume.exists() and (saved := load_checkpoint(resume))["stage"] == name:
        refuse_changes(run.cfg, saved["config"], resume, name)
        step, seconds, saved_step = saved["step"], saved["seconds"], saved["step"]
        for key, part in parts.items():
            part.load_state_dict(saved["parts"][key])
        del saved  # a copy of the model
        print(f"{name}: going on after step {step}")
    elif not rank():
        run.path(f"{name}_best").unlink(missing_ok=True)  # of an earlier attempt
    barrier()  # all ranks have read resume.pt, which rank 0 may now replace
    rows = [row for row in run.log_rows() if row["stage"] != name or row["step"] <= step]
    write_file(run.out / "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    best = max([row.get("heldout_accuracy", 0.0) for row in rows if row["stage"] == name], default=0.0)
    began, first = run.began - seconds, step + 1  # the stage's seconds go on from those of the checkpoint
    looping = saved_at = time.perf_counter()
    with open(os.devnull if rank() else run.out / "log.jsonl", "a") as log:
        for step in range(first, steps + 1):
            check_launcher()
            step_began = time.perf_counter()
            metrics = train_step(step)
            metrics["tokens_per_s"] = metrics.pop("tokens") / (time.perf_counter() - step_began)
            return_memory(run.cfg)
            if wrong := [key for key, value in metrics.items() if value is not None and not math.isfinite(value)]:
                raise UsageError(f"{name}: {wrong[0]} is {metrics[wrong[0]]} at step {step}; the last good checkpoint "
                                 "is " + (f"{resume}, step {saved_step}" if saved_step else "the stage before's"))
            seconds = time.perf_counter() - began
            log.write(json.dumps({"stage": name, "step": step, "seconds": round(seconds, 2), **metrics}) + "\n")
            log.flush()
            if "reward" in metrics or step % PRETRAIN_PRINT == 0 or step in (1, steps):
                eta = (steps - step) * (time.perf_counter() - looping) / (step + 1 - first)
                shown = [f"{key} {metrics[key]:.3g}" for key in SHOWN if metrics.get(key) is not None]
                print(fitting([f"{name} {step}/{steps}", *shown], f"{eta:.0f} s to go"), flush=True)
            if metrics.get("heldout_accuracy", 0.0) > best:
                best = metrics["heldout_accuracy"]
                save(run.path(f"{name}_best"))
            pause = max(run.cfg.save_every, 19 * save_seconds) if run.cfg.save_every else 0.0  # 0 saves every step
            if time.perf_counter() - saved_at >= pause:
                began_saving = time.perf_counter()
                save(resume, parts={key: part.state_dict() for key, part in parts.items()})
                saved_at, saved_step, save_seconds = time.perf_counter(), step, time.perf_counter() - began_saving
    save(run.path(name))
    if not rank():
        resume.unlink(missing_ok=True)
    barrier()  # whoever reads NAME.pt next finds it
