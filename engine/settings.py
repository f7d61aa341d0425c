"""Settings: the engine's own groups, the presets, and which settings shape which stage.

A group is a dataclass, and a setting is one of its fields. A group stands in the file that reads it: GRPOConfig in
grpo.py, DistillConfig in distill.py, the sizes of the models in train.py, those of R1's further stages in r1.py, the
rest here. The comment behind a field is its help text. A program's Config inherits the groups. Its table of stages
names the groups that shape each stage.

A checkpoint is refused if a setting that shaped it, or a stage that it starts from, has changed. Machine, Files and
micro_batch shape no weights: a run from a GPU can go on on a laptop. EVALUATION shapes the figures in results.json.
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
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where the run computes; auto: a GPU if there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # compute dtype; auto: bfloat16 if it is native
    compile: Literal["auto", "on", "off"] = "auto"          # torch.compile, or CUDA graphs on a GPU; auto: if it works
    threads: int = 0                                        # CPU threads of each process; 0: torch's default


@dataclass
class Files:
    save_every: float = 20.0  # seconds between checkpoints within a stage; 0: save every step
    eval_every: int = 0       # RL steps between two quick evaluations on held-out problems; 0: never


@dataclass
class Task:
    seed: int = 0              # random seed of weights, corpus, problems and samples
    task: Literal["arithmetic", "countdown", "bilingual"] = "arithmetic"  # built-in problems and corpus
    max_ops: int = 4           # most operations of a problem in RL and in "test"; "hard" has 1 or 2 more
    max_number: int = 20       # largest number that is added or subtracted
    max_factor: int = 9        # largest factor
    init: str = ""             # folder of a pretrained model, which becomes the base


@dataclass
class Text:
    corpus: str = ""           # text file that both bases are trained on in place of the built-in corpus
    corpus_share: float = 1.0  # share of that text in the corpus; the rest is the built-in corpus


@dataclass
class Questions:
    problems: str = ""          # JSONL file of problems in place of the built-in ones
    instruction: str = R1_ZERO  # with --init: text before the questions
    shots: int = 0              # with --init: solved examples before each question
    template: Literal["auto", "plain"] = "auto"  # with --init: the model's chat template if it has one, or none


@dataclass
class Evaluation:
    eval_problems: int = 256    # evaluated problems of each held-out kind


EVALUATION = (Task, Questions, Evaluation, "rl_max_new_tokens")  # these shape the figures in results.json
SHAPE_NOTHING = ("micro_batch",)
# The least value of a number. Numbers that are not listed must be above 0.
AT_LEAST = {"max_ops": 2, "max_factor": 2, "rl_samples": 2} | dict.fromkeys(
    "threads micro_batch save_every eval_every seed shots base_tokens student_base_tokens base_muon_lr ref_every "
    "kl_coef accuracy_weight format_weight distill_muon_lr sft_muon_lr language_weight everyday_share".split(), 0)
AT_MOST = {"max_number": 999, "max_factor": 999, "corpus_share": 1, "clip_low": 1, "everyday_share": 1,
           "eval_problems": 10_000}

PRESETS = {
    # A smoke test. Its teacher gives too few correct answers to learn from, so distillation is on policy.
    "tiny": dict(dtype="float32", compile="off", save_every=0.5, n_layer=2, n_head=1, n_embd=64, base_tokens=300_000,
                 base_batch=16, rl_steps=12, rl_prompts=16, rl_samples=8, rl_lr=1e-3, student_n_layer=1,
                 student_n_head=1, student_n_embd=32, student_base_tokens=300_000, student_base_batch=16,
                 distill_steps=8, distill_prompts=128, eval_problems=32, on_policy=True),
}
# The defaults with --init: a pretrained model needs small updates, and each of its samples is expensive.
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
    settings, owner = {}, {}
    for group in config.__mro__[:-1]:
        help = comments(group)
        for name, kind in inspect.get_annotations(group).items():
            if name not in settings:
                choices = ("True", "False") if kind is bool else get_args(kind)
                settings[name] = Setting(kind, getattr(config, name), help[name], choices)
                owner[name] = group
            elif not issubclass(owner[name], group):
                raise TypeError(f"{name} is declared twice, in {owner[name].__name__} and in {group.__name__}")
    return settings


def comments(group: type) -> dict[str, str]:
    """The comment behind each field that a class declares, or "" if the source code is missing. Raises TypeError if a
    field has no comment."""
    declared = inspect.get_annotations(group)  # Python 3.14 creates __annotations__ late
    try:
        source = inspect.getsource(group)
    except (OSError, TypeError):  # there are only .pyc files, or the code comes from python -c
        return dict.fromkeys(declared, "")
    helps = dict(re.findall(r"^ +(\w+): .*?  # *(.+)$", source, re.MULTILINE))
    missing = declared.keys() - helps.keys()
    if missing:
        raise TypeError(f"{group.__name__}.{min(missing)} has no comment: write one behind it, as its help")
    return helps


# Which settings shape what


def shaped_by(stages: dict, name: str) -> list[str]:
    """The settings that shape a stage's weights: its own, and those of the stages that it starts from."""
    inherited = [field for start in stages[name].starts for field in shaped_by(stages, start)]
    return list(dict.fromkeys(inherited + names_of(stages[name].settings)))


def names_of(groups: tuple) -> list[str]:
    """The names of the settings in these groups. A group may also be the name of a single setting."""
    names = []
    for group in groups:
        names += [group] if isinstance(group, str) else [field.name for field in fields(group)]
    return [name for name in names if name not in SHAPE_NOTHING]


def change(cfg, stored: dict, names: list[str]) -> str:
    """The first of these settings that differs from its stored value, as "name=old, not new"; "" if none does."""
    for name in names:
        old, new = stored.get(name, getattr(type(cfg), name)), getattr(cfg, name)
        if str(old).split(" (crc32 ")[-1] != str(new).split(" (crc32 ")[-1]:  # a file is compared by its content
            return f"{name}={old}, not {new}"
    return ""


def refuse_changes(cfg, stored: dict, path: Path, names: list[str]) -> None:
    """Raises UsageError if a setting that shaped a checkpoint has changed."""
    changed = change(cfg, stored, names)
    if changed:
        raise UsageError(f"{path} was made with {changed}: restore it, or start from it: --base={path} --out=NEW")


def check(cfg) -> None:
    """Raises ValueError if settings that are allowed one by one do not fit together."""
    for prefix in ("", "student_"):
        GPTConfig(1, cfg.block_size, *(getattr(cfg, prefix + key) for key in ("n_layer", "n_head", "n_embd")))

    def changed(*names: str) -> bool:
        return any(getattr(cfg, name) != getattr(type(cfg), name) for name in names)

    def too_few(n_tokens: int, batch: int, pretrained: str) -> bool:
        return n_tokens < batch * cfg.block_size and not (pretrained and n_tokens == 0)

    for wrong, line in (
        (cfg.task == "countdown" and changed("max_ops", "max_factor"),
         "--max_ops and --max_factor have no effect on --task=countdown: leave them out"),
        (not cfg.accuracy_weight and not cfg.format_weight,
         "--accuracy_weight and --format_weight cannot both be 0, because nothing would be rewarded"),
        (cfg.corpus_share < 1 and not cfg.corpus, "--corpus_share needs a --corpus=FILE"),
        (cfg.block_size % 8, "--block_size must be a multiple of 8, as batches are padded to such lengths"),
        (cfg.ref_every and not cfg.kl_coef, "--ref_every needs a --kl_coef above 0, or there is no reference"),
        (cfg.on_policy and cfg.divergence == "sft", "--divergence=sft needs the teacher's samples: omit --on_policy"),
        (too_few(cfg.base_tokens, cfg.base_batch, cfg.init or cfg.base)
         or too_few(cfg.student_base_tokens, cfg.student_base_batch, cfg.init),
         "--base_tokens and --student_base_tokens must be at least one batch (its rows times --block_size)"),
        (not cfg.init and changed("student_init", "instruction", "shots", "template"),
         "--student_init, --instruction, --shots and --template need an --init=DIR"),
        (cfg.init and changed("n_layer", "n_head", "n_embd", "student_n_layer", "student_n_head", "student_n_embd"),
         "--n_layer, --n_head and --n_embd have no effect with --init: a pretrained model has its own sizes"),
        (cfg.device != "auto" and not has(cfg.device),
         f"--device={cfg.device}: torch sees no such GPU here; leave the choice to --device=auto"),
    ):
        if wrong:
            raise UsageError(line)
