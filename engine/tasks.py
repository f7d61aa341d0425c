"""The task of a run: the problems, the corpus and the reward that the settings name."""
import math
import random
from pathlib import Path

from data.arithmetic import Arithmetic
from data.bilingual import Bilingual
from data.countdown import Countdown
from data.own import OwnCorpus, OwnProblems, path_of
from engine.pretrained.bpe import Encoding
from engine.pretrained.chat import Pretrained
from engine.terminal import UsageError

# The names of other metrics and columns, which a score would overwrite.
RESERVED = {"stage", "step", "seconds", "tokens", "tokens_per_s", "loss", "grad_norm", "length", "length_wrong",
            "truncated", "entropy", "ratio", "kl", "clip_fraction_low", "clip_fraction_high", "sampler_gap",
            "no_signal", "accepted", "heldout_accuracy", "heldout_loss", "pass@1", "pass@1_se", "maj@16", "pass@16",
            "n_problems"}
NOT_ANSWER = 6  # the least tokens of a well-formed completion besides its answer: four tags, a thought, the stop token


def make_task(cfg):
    """Make the task that the settings name. To add a task of your own, name it here, and in the choices of Task.task in
    engine/settings.py. Raises ValueError for a bad file, and if there are too few problems or they do not fit."""
    if cfg.task == "countdown":
        task = Countdown(cfg.max_number)
    else:
        task = {"arithmetic": Arithmetic, "bilingual": Bilingual}[cfg.task](cfg.max_ops, cfg.max_number, cfg.max_factor)
    if cfg.init:
        task = Pretrained(task, path_of(cfg.init), cfg.instruction, cfg.template)
        rng = random.Random(f"{cfg.seed}/shots")
        task.show([task.make_problem(rng) for _ in range(0 if cfg.problems else cfg.shots)])
        if cfg.student_init and Encoding(Path(path_of(cfg.student_init)), task.template or "") != task.encoding:
            raise ValueError(f"{path_of(cfg.student_init)} has another tokenizer than {path_of(cfg.init)}: "
                             "distillation needs the same one")
    if cfg.problems:  # "PATH", or "PATH (checksum)" in a resumed run; path_of returns the path
        task = OwnProblems(task, path_of(cfg.problems), cfg.block_size - cfg.rl_max_new_tokens,
                           cfg.rl_max_new_tokens - NOT_ANSWER, cfg.shots)
    if cfg.corpus:
        task = OwnCorpus(task, path_of(cfg.corpus), cfg.corpus_share)
    if cfg.rl_max_new_tokens + task.max_prompt_tokens > cfg.block_size:
        raise ValueError(f"prompts of up to {task.max_prompt_tokens} tokens and --rl_max_new_tokens="
                         f"{cfg.rl_max_new_tokens} do not fit --block_size={cfg.block_size}: change one of the two")
    for kind in task.held_out:
        task.heldout_problems(cfg.eval_problems, kind, cfg.seed)  # raises ValueError if there are too few
    return task


class Checked:
    """A task whose rewards are checked, because people write their own. Everything else is the wrapped task's."""

    def __init__(self, task):
        self.task, self.names = task, None  # the names of the scores

    __getattr__ = OwnProblems.__getattr__

    def __eq__(self, other) -> bool:
        return isinstance(other, Checked) and self.task == other.task

    def __hash__(self) -> int:
        return hash(self.task)

    def reward(self, completion: str, problem) -> dict[str, float]:
        """The task's scores as floats. Raises UsageError unless they are a dict of finite numbers with the same keys
        each time, and "accuracy" is 0 or 1."""
        scores = self.task.reward(completion, problem)
        shown = f"for the completion {completion[:60]!r}"
        if not isinstance(scores, dict) or "accuracy" not in scores:
            raise UsageError(f'the reward is {scores!r:.60}, not a dict with "accuracy", {shown}')
        for name in scores:
            if not isinstance(name, str) or name in RESERVED:
                raise UsageError(f"the reward has the key {name!r}: use a text that is not the name of another metric")
        names = set(scores) - {"reward"}  # which a task may leave to the weights of accuracy and format
        self.names = self.names or names
        if names != self.names:
            missing, added = self.names - names, names - self.names
            change = f"has no {min(missing)!r}" if missing else f"also has {min(added)!r}"
            raise UsageError(f"the reward {change} {shown}: it must have the same keys each time")
        numbers = {name: as_number(value) for name, value in scores.items()}
        for name, number in numbers.items():
            if number is None:
                raise UsageError(f"the reward's {name!r} is {scores[name]!r:.60}, not a finite number, {shown}")
        if numbers["accuracy"] not in (0, 1):
            raise UsageError(f"the reward's 'accuracy' is {numbers['accuracy']}, not 0 or 1, {shown}")
        return numbers

    def try_reward(self) -> None:
        """Call the reward on a few made-up completions of a training problem, before anything is trained."""
        problem = self.task.make_problem(random.Random(0))
        thought, answer = "<think>1+1=2</think>", f"<answer>{problem.answer}</answer>"
        for completion in ("", "1", problem.answer, thought + answer, thought, answer, thought + "<answer>x</answer>",
                           f"{thought} {answer} and more"):
            self.reward(completion, problem)


def as_number(value) -> float | None:
    """A bool, an int, a float, a numpy scalar or a tensor without dimensions as a float; None for anything else and for
    a number that is not finite."""
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    try:
        return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
    except OverflowError:  # an int of hundreds of digits
        return None
