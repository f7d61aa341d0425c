"""The task of a run: the problems, the corpus and the reward that the settings name."""
import random
from pathlib import Path

from data.arithmetic import Arithmetic
from data.bilingual import Bilingual
from data.countdown import Countdown
from data.own import OwnCorpus, OwnProblems, path_of
from engine.pretrained.bpe import Encoding
from engine.pretrained.chat import Pretrained


def make_task(cfg):
    """Make the task that the settings name. To add a task of your own, name it here, and in the choices of Task.task in
    engine/settings.py. Raises ValueError for a bad file, and if there are too few problems or they do not fit."""
    if cfg.task == "countdown":
        task = Countdown(cfg.max_number)
    else:
        task = {"arithmetic": Arithmetic, "bilingual": Bilingual}[cfg.task](
            cfg.max_ops, cfg.max_number, cfg.max_factor, cfg.parentheses)
    if cfg.init:
        task, rng = Pretrained(task, path_of(cfg.init), cfg.instruction), random.Random(f"{cfg.seed}/shots")
        task.show([task.make_problem(rng) for _ in range(0 if cfg.problems else cfg.shots)])
        if cfg.student_init and Encoding(Path(path_of(cfg.student_init)), task.template or "") != task.encoding:
            raise ValueError(f"{path_of(cfg.student_init)} has another tokenizer than {path_of(cfg.init)}: "
                             "distillation needs the same one")
    if cfg.problems:  # "PATH", or "PATH (checksum)" in a resumed run; path_of returns the path
        max_answer_tokens = cfg.rl_max_new_tokens - 6  # 6: four tags, a thought of one token, the stop token
        task = OwnProblems(task, path_of(cfg.problems), cfg.block_size - cfg.rl_max_new_tokens, max_answer_tokens,
                           cfg.shots)
    if cfg.corpus:
        task = OwnCorpus(task, path_of(cfg.corpus), cfg.corpus_share)
    if cfg.rl_max_new_tokens + task.max_prompt_tokens > cfg.block_size:
        raise ValueError(f"prompts of up to {task.max_prompt_tokens} tokens and --rl_max_new_tokens="
                         f"{cfg.rl_max_new_tokens} do not fit --block_size={cfg.block_size}: change one of the two")
    for kind in task.held_out:
        task.heldout_problems(cfg.eval_problems, kind, cfg.seed)  # raises ValueError if there are too few
    return task
