"""Settings: the groups that no other file reads, and what the engine knows of all groups.

A setting is a field of a dataclass, a group. A group stands where it is read: GRPOConfig in grpo.py, DistillConfig in
distill.py, the sizes of the models in train.py, the rest here. The comment behind a field is its help. A program's
Config inherits the groups. Its table of stages says which groups shape the weights of which stage.

A checkpoint holds the settings that it was made with. It is refused if one of those that shaped it, or a stage that it
starts from, has changed. Machine, Files and micro_batch shape no weights and may change: a run that began on a GPU can
go on on a laptop. If a setting of EVALUATION changes, the models are evaluated again.
"""
import functools
import inspect
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from engine.machine import has
from engine.pretrained.chat import R1_ZERO
from engine.terminal import UsageError
from model import GPTConfig


@dataclass
class Machine:
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto takes a GPU if there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # compute dtype; auto: bfloat16 where it is native
    compile: Literal["auto", "on", "off"] = "auto"          # torch.compile; on a GPU, CUDA graphs; auto: if they work
    threads: int = 0                                        # CPU threads of a process; 0 takes torch's own choice


@dataclass
class Files:
    save_every: float = 20.0  # seconds between checkpoints within a stage; 0 saves every step
    eval_every: int = 0       # RL steps between two quick evaluations on held-out problems; 0: never


@dataclass
class Task:
    seed: int = 0              # decides weights, corpus, problems and samples
    task: Literal["arithmetic", "countdown", "bilingual"] = "arithmetic"  # built-in problems and corpus
    max_ops: int = 4           # most operations of a problem in RL and in test; hard has 1 or 2 more
    max_number: int = 20       # largest number that is added or subtracted
    max_factor: int = 9        # largest factor
    parentheses: bool = False  # put a sum in parentheses in half of the problems
    init: str = ""             # a folder with a pretrained model, which becomes the base


@dataclass
class Text:
    corpus: str = ""           # a file of text that the bases read in place of the built-in corpus
    corpus_share: float = 1.0  # share of that text; the rest is the built-in corpus


@dataclass
class Questions:
    problems: str = ""          # a JSONL file of problems in place of the built-in ones
    instruction: str = R1_ZERO  # the text before the questions to a model of --init
    shots: int = 0              # worked examples before each question to a model of --init


@dataclass
class Evaluation:
    eval_problems: int = 256    # problems of each held-out kind


EVALUATION = (Task, Questions, Evaluation, "rl_max_new_tokens")  # what shapes the figures in results.json
SHAPE_NOTHING = ("micro_batch",)
# A number must be above 0, except for these.
AT_LEAST = {"max_ops": 2, "max_factor": 2, "rl_samples": 2} | dict.fromkeys(
    "threads micro_batch save_every eval_every seed shots base_tokens student_base_tokens base_muon_lr ref_every "
    "kl_coef accuracy_weight format_weight distill_muon_lr sft_muon_lr language_weight everyday_share".split(), 0)
AT_MOST = {"max_number": 999, "max_factor": 999, "corpus_share": 1, "clip_low": 1, "everyday_share": 1,
           "eval_problems": 10_000}

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
# What --init brings with it: a published model learns in small steps, and each of its samples is expensive.
OF_INIT = dict(save_every=120.0, block_size=1024, base_tokens=0, student_base_tokens=0,
               base_muon_lr=0.0, base_adam_lr=2e-5, rl_steps=50, rl_prompts=8, rl_minibatches=1, rl_max_new_tokens=64,
               rl_lr=1e-5, eval_every=10, eval_problems=64, distill_steps=25, distill_prompts=64,
               distill_minibatches=2, distill_epochs=1, distill_muon_lr=5e-3, distill_adam_lr=3e-4)


class Setting(NamedTuple):
    """A field of a group."""
    type: type
    default: object
    help: str
    choices: tuple  # () for any value


@functools.cache  # reading the sources takes 25 ms
def settings_of(config: type) -> dict[str, Setting]:
    """All settings of a program's Config by name, group after group. (dataclasses.fields would begin with the last
    base.) A subclass may give an inherited setting another default. Raises TypeError if two groups declare the same
    name, or a field has no comment."""
    found, owner = {}, {}
    for group in config.__mro__[:-1]:
        help = comments(group)
        for name, kind in inspect.get_annotations(group).items():
            if name not in found:
                choices = ("True", "False") if kind is bool else get_args(kind)
                found[name] = Setting(kind, getattr(config, name), help[name], choices)
                owner[name] = group
            elif not issubclass(owner[name], group):
                raise TypeError(f"{name} is declared twice, in {owner[name].__name__} and in {group.__name__}")
    return found


def comments(group: type) -> dict[str, str]:
    """The comment behind each field that a class declares, or "" without its source. Raises TypeError if a field has
    no comment."""
    declared = inspect.get_annotations(group)  # Python 3.14 makes __annotations__ late
    try:
        source = inspect.getsource(group)
    except (OSError, TypeError):  # only .pyc files are there, or python -c
        return dict.fromkeys(declared, "")
    found = dict(re.findall(r"^ +(\w+): .*?  # *(.+)$", source, re.MULTILINE))
    missing = declared.keys() - found.keys()
    if missing:
        raise TypeError(f"{group.__name__}.{min(missing)} has no comment, which would be its help")
    return found


# Which settings shape what


def shaped_by(stages: dict, name: str) -> list[str]:
    """The settings that shape a stage's weights, by itself or through a stage that it starts from."""
    inherited = [field for start in stages[name].starts for field in shaped_by(stages, start)]
    return list(dict.fromkeys(inherited + names_of(stages[name].settings)))


def names_of(groups: tuple) -> list[str]:
    """The settings of these groups, among which may be single names."""
    names = []
    for group in groups:
        names += [group] if isinstance(group, str) else [field.name for field in fields(group)]
    return [name for name in names if name not in SHAPE_NOTHING]


def change(cfg, stored: dict, names: list[str]) -> str:
    """The first of these settings that differs from the stored one, as "name=old, not new"; or ""."""
    for name in names:
        old, new = stored.get(name, getattr(type(cfg), name)), getattr(cfg, name)
        if str(old).split(" (crc32 ")[-1] != str(new).split(" (crc32 ")[-1]:  # a file is compared by its content
            return f"{name}={old}, not {new}"
    return ""


def refuse_changes(cfg, stored: dict, path: Path, names: list[str]) -> None:
    """Raises UsageError if a setting that shaped a checkpoint has changed."""
    changed = change(cfg, stored, names)
    if changed:
        raise UsageError(f"{path} was made with {changed}: set it as it was, or start afresh with another --out")


def check(cfg) -> None:
    """Raises ValueError where settings that are each allowed do not fit together."""
    for prefix in ("", "student_"):
        GPTConfig(1, cfg.block_size, *(getattr(cfg, prefix + key) for key in ("n_layer", "n_head", "n_embd")))

    def changed(*names: str) -> bool:
        return any(getattr(cfg, name) != getattr(type(cfg), name) for name in names)

    def too_few(n_tokens: int, batch: int) -> bool:
        return n_tokens < batch * cfg.block_size and not (cfg.init and n_tokens == 0)

    for wrong, line in (
        (cfg.task == "countdown" and changed("max_ops", "max_factor", "parentheses"),
         "--max_ops, --max_factor and --parentheses are not settings of --task=countdown"),
        (not cfg.accuracy_weight and not cfg.format_weight, "--accuracy_weight and --format_weight cannot both be 0"),
        (cfg.corpus_share < 1 and not cfg.corpus, "--corpus_share needs a --corpus"),
        (cfg.block_size % 8, "--block_size must be a multiple of 8, as the lengths of micro-batches are"),
        (cfg.ref_every and not cfg.kl_coef, "--ref_every refreshes the reference, which only a --kl_coef above 0 has"),
        (cfg.on_policy and cfg.divergence == "sft", "--divergence=sft learns the teacher's samples: not --on_policy"),
        (too_few(cfg.base_tokens, cfg.base_batch) or too_few(cfg.student_base_tokens, cfg.student_base_batch),
         "--base_tokens and --student_base_tokens must be one batch at least"),
        (not cfg.init and changed("student_init", "instruction", "shots"),
         "--student_init, --instruction and --shots need an --init"),
        (cfg.init and changed("n_layer", "n_head", "n_embd", "student_n_layer", "student_n_head", "student_n_embd"),
         "--n_layer, --n_head and --n_embd are of models made here: the folders of --init have sizes of their own"),
        (cfg.device != "auto" and not has(cfg.device), f"--device={cfg.device}: torch sees no such GPU here"),
    ):
        if wrong:
            raise UsageError(line)
