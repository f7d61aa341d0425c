"""nanoR1: random weights -> base -> zero -> student, in one command.

    base          next-token prediction on the corpus of the task (data/), or on your own text
    zero          GRPO on the base, from rule-based rewards alone: no supervised fine-tuning
    student_base  a base of its own for a smaller GPT, on the same corpus
    student       the RL teacher, zero, distilled into the student's base
    student_rl    the control, if asked for: GRPO on the student's base, with as many updates as the student had

    python train.py                            everything, then the report
    python train.py --stage=base|zero|student  one part, on earlier checkpoints; student makes its student_base first
    python train.py --student_rl=True          the control too; a finished run may gain it
    python train.py --preset=tiny              the same in under a minute: does it run at all?
    python train.py --ask="8*7-19"             what each model answers
    python train.py --evaluate=FILE            what each model reaches on a file of problems
    python train.py --init=DIR                 the base is a model from elsewhere: see docs/real_model.md
    python train.py --seed=1 --out=out/seed1   --key=value sets any field of Config in run.py
    torchrun --standalone --nproc_per_node=2 train.py    in several processes: see parallel.py

It writes into --out (out/, or out/PRESET): NAME.pt for each finished stage, resume.pt for the stage under way,
log.jsonl (one row a step), samples.jsonl (how the answers to four problems change), results.json, report.md. The same
command goes on from the last checkpoint. Settings, files and torch.compile are the business of run.py, several
processes that of parallel.py. A reader may skip both: what is imported from them does what its name says.
"""
import dataclasses
import functools
import gc
import math
import os
import random
import sys
import textwrap
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
from data.bilingual import Bilingual
from data.bpe import Encoding
from data.chat import Pretrained
from data.countdown import Countdown
from data.own import OwnCorpus, OwnProblems, fingerprint, path_of, read_problems
from data.pretrained import load_model
from distill import distill_step
from grpo import grpo_step, sample_rollout
from model import GPT, GPTConfig, Optimizer, generate
from parallel import all_reduce, broadcast, end, init, per_rank, rank, world_size
from rewards import extract_answer, format_reward, reflects
from run import (BASE, DEPENDS, EVAL_SAMPLES, FIELDS, LOOK_PROBLEMS, LOOK_SAMPLES, STUDENT, STUDENT_BASE, STUDENT_RL,
                 ZERO, Config, Run, UsageError, build_model, check, clipped, compiled, fitting, forecast, frozen,
                 graphed, has, keep_samples, load_checkpoint, lock, lr_schedule, open_run, parse_args, return_memory,
                 seeded, train_stage, tune_libraries, write_file)


# What a run is about


def make_task(cfg: Config):
    """The problems, the corpus and the reward that the settings ask for (each setting is explained in Config). Name a
    task of your own here, and in the choices of Config.task. worked_share and wait_share say how many of the corpus's
    authors show their steps, and recheck them. Raises ValueError for a bad file, and if there are too few problems or
    they do not fit."""
    if cfg.task == "countdown":
        task = Countdown(cfg.max_number, cfg.worked_share, cfg.wait_share)
    else:
        task = {"arithmetic": Arithmetic, "bilingual": Bilingual}[cfg.task](
            cfg.max_ops, cfg.max_number, cfg.max_factor, cfg.parentheses, cfg.worked_share, cfg.wait_share)
    if cfg.init:
        task, rng = Pretrained(task, path_of(cfg.init), cfg.instruction), random.Random(f"{cfg.seed}/shots")
        task.show([task.make_problem(rng) for _ in range(0 if cfg.problems else cfg.shots)])
        if cfg.student_init and Encoding(Path(path_of(cfg.student_init)), task.template or "") != task.encoding:
            raise ValueError(f"{path_of(cfg.student_init)} has another tokenizer than {path_of(cfg.init)}")
    if cfg.problems:  # "PATH", or "PATH (checksum)" in a run under way; path_of takes the path
        max_answer_tokens = cfg.rl_max_new_tokens - 6  # the rest: four tags, a thought of one token, the stop token
        task = OwnProblems(task, path_of(cfg.problems), cfg.block_size - cfg.rl_max_new_tokens, max_answer_tokens,
                           cfg.shots)
    if cfg.corpus:
        task = OwnCorpus(task, path_of(cfg.corpus), cfg.corpus_share)
    if cfg.rl_max_new_tokens + task.max_prompt_tokens > cfg.block_size:
        raise ValueError(f"prompts of up to {task.max_prompt_tokens} tokens and --rl_max_new_tokens="
                         f"{cfg.rl_max_new_tokens} do not fit --block_size={cfg.block_size}")
    for kind in task.held_out:
        task.heldout_problems(cfg.eval_problems, kind, cfg.seed)  # raises ValueError if there are too few
    return task


def reward_function(cfg: Config, task) -> Callable:
    """What GRPO maximises ("reward"), and what is logged beside it. A task may return a "reward" of its own."""
    def reward_fn(completion: str, problem) -> dict[str, float]:
        scores = task.reward(completion, problem)
        weighted = cfg.accuracy_weight * scores["accuracy"] + cfg.format_weight * scores.get("format", 0.0)
        return {"reward": weighted, **scores}
    return reward_fn


# The stages


@functools.lru_cache(maxsize=2)  # of the text to train on, which both bases share, and of the held-out text
def load_corpus(task, rows: int, seed: int, length: int, heldout: bool = False) -> tuple[Tensor, Tensor]:
    """The corpus and where its rows start -> (token ids (n,), starts (rows,) of rows of `length` tokens).

    A row starts where a document starts, so that the model has seen prompts at position 0, where RL puts them. A row
    usually ends in the middle of a document. What is left of that document is skipped, unless it is long enough to fill
    another row.
    """
    n_tokens, starts = int(1.35 * rows * length), []  # about a quarter is skipped; if it was more, make twice as many
    while len(starts) < rows:
        corpus = task.make_corpus(n_tokens, seed, heldout)
        documents = np.append(0, np.flatnonzero(corpus == task.stop_ids[0]) + 1)  # where each starts
        starts, position = [], 0
        while position + length <= len(corpus):
            starts.append(position)
            position += length
            later = documents[documents.searchsorted(position):]  # the documents that start here or after it
            if len(later) and later[0] - position < length:  # what is left of this document does not fill a row
                position = int(later[0])
        n_tokens *= 2
    return torch.from_numpy(corpus.astype(np.int32)), torch.tensor(starts[:rows])


def starting_model(cfg: Config, task, name: str) -> GPT:
    """What a base is before it reads the corpus: random weights, or a model from elsewhere. Without a folder of its own
    the student's base is then the teacher's with every second layer left out."""
    student = name == STUDENT_BASE
    if cfg.init:
        folder = student and cfg.student_init or cfg.init
        model = load_model(path_of(folder), task.encoding.n_tokens, cfg.block_size, getattr(torch, cfg.dtype))
        if student and not cfg.student_init:
            model.blocks = model.blocks[::2]
            model.config = dataclasses.replace(model.config, n_layer=len(model.blocks))
        return model
    shape = [getattr(cfg, "student_" * student + key) for key in ("n_layer", "n_head", "n_embd")]
    return GPT(GPTConfig(task.encoding.n_vocab, cfg.block_size, *shape), getattr(torch, cfg.dtype))


def train_base(run: Run, name: str) -> None:
    """Pretraining, next-token prediction on the corpus: base, or student_base. A model from elsewhere does without,
    unless its number of tokens is set."""
    cfg, length = run.cfg, run.cfg.block_size + 1
    n_tokens, batch = {BASE: (cfg.base_tokens, cfg.base_batch),
                       STUDENT_BASE: (cfg.student_base_tokens, cfg.student_base_batch)}[name]
    steps = n_tokens // (batch * cfg.block_size)
    rows = max(cfg.base_tokens, cfg.student_base_tokens) // cfg.block_size  # one corpus serves both bases
    assert batch >= world_size(), "each rank needs at least one row of every batch"
    torch.manual_seed(cfg.seed)
    model = starting_model(cfg, run.task, name).to(cfg.device)
    if not steps:
        if name == BASE:
            print(forecast(model, cfg, run.task), flush=True)
        return train_stage(run, name, 0, {"model": model}, None)
    print(f"a corpus of {rows * length:,} tokens" + ", and torch.compile" * (cfg.compile == "on"), flush=True)
    with ThreadPoolExecutor(1) as pool:  # the corpus is made while the C++ compiler works for torch.compile
        made = pool.submit(load_corpus, run.task, rows, cfg.seed, length)
        model = compiled(model, cfg, training=True)
    corpus, starts = made.result()
    heldout, heldout_starts = load_corpus(run.task, 2 * batch, cfg.seed, length, heldout=True)
    order = torch.randperm(steps * batch, generator=torch.Generator().manual_seed(cfg.seed))
    optimizer = graphed(Optimizer(model, cfg.base_adam_lr, cfg.base_muon_lr), cfg)

    def next_token_loss(corpus: Tensor, starts: Tensor) -> float:
        """The mean over the rows of all ranks. Where autograd is on, it also adds the gradient to the parameters'."""
        total = torch.zeros(())
        for part in starts[rank()::world_size()].split(max(1, cfg.micro_batch // cfg.block_size)):
            idx = corpus[part[:, None] + torch.arange(length)].long().to(cfg.device)  # (B, T+1)
            loss = F.cross_entropy(model(idx[:, :-1]).float().flatten(0, 1), idx[:, 1:].flatten(), reduction="sum")
            loss = loss / (len(starts) * cfg.block_size)
            if torch.is_grad_enabled():
                loss.backward()
            total += loss.detach().cpu()
        return all_reduce(total).item()

    def step(number: int) -> dict:
        loss = next_token_loss(corpus, starts[order[(number - 1) * batch:number * batch]])
        metrics = {"loss": loss, "grad_norm": optimizer.step(lr_schedule(number, steps)).item()}
        if number % 100 == 0 or number == steps:
            with torch.no_grad():
                metrics["heldout_loss"] = next_token_loss(heldout, heldout_starts)
        return metrics | {"tokens": batch * cfg.block_size}

    train_stage(run, name, steps, {"model": model, "optimizer": optimizer}, step)


def train_zero(run: Run, name: str, policy: GPT) -> None:
    """GRPO on a base: zero, or the control student_rl."""
    cfg, task = run.cfg, run.task
    steps, prompts = cfg.rl_steps, cfg.rl_prompts
    if name == STUDENT_RL:  # as many updates as the student has, each on as many completions
        updates = cfg.distill_steps * cfg.distill_epochs * cfg.distill_minibatches
        completions = cfg.distill_prompts / cfg.distill_minibatches  # of one update
        steps = math.ceil(updates / cfg.rl_minibatches)
        prompts = math.ceil(completions * cfg.rl_minibatches / cfg.rl_samples)
    longer = cfg.distill_longer and name == STUDENT_RL  # the problems that the student is taught on
    reinforce(run, name, policy, steps, prompts, lambda rng: task.make_problem(rng, longer), reward_function(cfg, task))


def reinforce(run: Run, name: str, policy: GPT, steps: int, prompts: int, make_problem: Callable,
              reward_fn: Callable) -> None:
    """A stage of GRPO: steps of `prompts` problems each, which make_problem(rng) makes."""
    cfg, task = run.cfg, run.task
    reference = frozen(policy, cfg) if cfg.kl_coef else None
    policy = compiled(policy, cfg, training=True, sampling=True)
    # AdamW alone: its steps get smaller where the gradient is noisy, as in RL. Muon's steps always have one size.
    optimizer = Optimizer(policy, cfg.rl_lr, beta2=0.999)
    parts = {"model": policy, "optimizer": optimizer} | ({"reference": reference} if cfg.ref_every else {})

    def step(number: int) -> dict:
        if number == 1:
            keep_samples(run, name, 0, steps, {name: policy}, make_problem, reward_fn)
        rng, generator = seeded(cfg, name, number)  # by step and rank, so that each rank draws problems of its own
        problems = [make_problem(rng) for _ in range(per_rank(prompts))]
        metrics, rollout = grpo_step(policy, reference, optimizer, problems, reward_fn, task, cfg, generator,
                                     lr_schedule(number, steps, hold=0.0))
        if cfg.ref_every and number % cfg.ref_every == 0:  # check() in run.py demands a reference for it
            reference.load_state_dict(policy.state_dict())
        if cfg.eval_every and (number % cfg.eval_every == 0 or number == steps):
            return_memory(cfg)  # of the update: the answers' keys and values need it in other pieces
            metrics["heldout_accuracy"] = heldout_accuracy(policy, task, cfg, generator)
        if number in (1, 5, 10) or number % 20 == 0:
            answer = clipped(f"    {problems[0].question}  ->  {' '.join(rollout.texts[0].split())}", room=14)
            print(f"{answer}   reward {rollout.scores[0]['reward']:.1f}")
        keep_samples(run, name, number, steps, {name: policy}, make_problem, reward_fn)
        return metrics | {"tokens": metrics["length"] * prompts * cfg.rl_samples}

    train_stage(run, name, steps, parts, step)


def heldout_accuracy(policy: GPT, task, cfg: Config, generator: torch.Generator) -> float:
    """A quick look at a policy under way: its accuracy on a few held-out problems, which the ranks divide."""
    kind, *_ = task.held_out
    problems = task.heldout_problems(min(LOOK_PROBLEMS, cfg.eval_problems), kind, cfg.seed + 1)[rank()::world_size()]
    answers = sample_rollout(policy, problems, task.reward, task, samples=LOOK_SAMPLES, generator=generator,
                             max_new_tokens=cfg.rl_max_new_tokens).column("accuracy")
    right, n = all_reduce(torch.tensor([answers.sum(), len(answers)])).tolist()
    return right / n


def train_student(run: Run, name: str, teacher: GPT, student: GPT) -> None:
    """Distillation: the teacher, zero, into the student's base."""
    cfg, task = run.cfg, run.task
    distil(run, name, [(teacher, lambda rng: task.make_problem(rng, cfg.distill_longer))], student, cfg.distill_steps,
           cfg, reward_function(cfg, task))


def distil(run: Run, name: str, turns: list[tuple[GPT, Callable]], student: GPT, steps: int, cfg: Config,
           reward_fn: Callable) -> None:
    """A stage of distillation. A turn is a teacher and the make_problem(rng) of what it is asked; each step is the next
    turn's."""
    for teacher in dict.fromkeys(teacher for teacher, _ in turns):
        compiled(teacher, cfg, training=cfg.divergence != "sft", sampling=not cfg.on_policy)
    student = compiled(student, cfg, training=True, sampling=cfg.on_policy)
    # a Muon of rate 0 is none
    optimizer = graphed(Optimizer(student, cfg.distill_adam_lr, cfg.distill_muon_lr), cfg)

    def step(number: int) -> dict:
        rng, generator = seeded(cfg, name, number)
        if number == 1:
            keep_samples(run, name, 0, steps, {name: student, "teacher": turns[0][0]}, turns[0][1], reward_fn)
        teacher, make_problem = turns[number % len(turns)]
        problems = [make_problem(rng) for _ in range(per_rank(cfg.distill_prompts))]
        metrics = distill_step(student, teacher, optimizer, problems, reward_fn, run.task, cfg, generator,
                               lr_schedule(number, steps))
        keep_samples(run, name, number, steps, {name: student}, turns[0][1], reward_fn)
        return metrics | {"tokens": metrics["length"] * cfg.distill_prompts}

    train_stage(run, name, steps, {"model": student, "optimizer": optimizer}, step)


# Each stage's function is called with the run, the stage's name, and the models of the stages in DEPENDS[name].
STAGES = {BASE: train_base, ZERO: train_zero, STUDENT_BASE: train_base, STUDENT: train_student, STUDENT_RL: train_zero}


# Evaluation and the report


def majority(answers: list[str | None]) -> str | None:
    """The most frequent answer, or the first of several that are equally frequent. None is no answer and has no vote.

    >>> majority(["3", None, None, None, "5", "5", "3"])
    '3'
    """
    votes = Counter(answer for answer in answers if answer is not None)
    return votes.most_common(1)[0][0] if votes else None


def evaluate(model: GPT, problems: list, task, *, max_new_tokens: int, generator: torch.Generator,
             size: int = 32) -> dict[str, float]:
    """Sample EVAL_SAMPLES completions of each problem at temperature 1 -> the figures of results.json for one model and
    one kind of problems.

    pass@1 is the share of right completions, pass@1_se its standard error over problems, maj@16 the share of problems
    that the most frequent answer solves, pass@16 the share that any of the 16 solves. format, length (tokens, with the
    stop token) and reflection are means over completions. The ranks divide the problems among themselves, and sample
    answers to `size` of them at a time: keys and values of a model from elsewhere need room. What else the task's
    reward returns ("language", say) is a mean over completions, too.
    """
    n, mine = EVAL_SAMPLES, range(rank(), len(problems), world_size())
    others = [key for key in task.reward("", problems[0]) if key not in ("reward", "accuracy", "format", "reflection")]
    counts = torch.zeros(len(problems), 5 + len(others), dtype=torch.float64)  # of each problem's completions
    for at in range(0, len(mine), size):
        rollout = sample_rollout(model, [problems[i] for i in mine[at:at + size]], task.reward, task, samples=n,
                                 max_new_tokens=max_new_tokens, generator=generator)
        for k, i in enumerate(mine[at:at + size]):
            rows, problem = slice(k * n, (k + 1) * n), problems[i]
            answers = [extract_answer(text) for text in rollout.texts[rows]]
            # canonical: answers that are equal, such as 0.5 and 1/2, are spelled alike and have one vote together
            vote = majority([answer if answer is None else problem.canonical(answer) for answer in answers])
            counts[i] = torch.tensor([
                sum(score["accuracy"] for score in rollout.scores[rows]), vote is not None and problem.check(vote),
                # read from the text, because the reward of your own task may report neither
                sum(map(format_reward, rollout.texts[rows])), sum(map(reflects, rollout.texts[rows])),
                sum(map(len, rollout.completions[rows])),
                *(sum(score[key] for score in rollout.scores[rows]) for key in others)])
    right, votes, well_formed, reflecting, tokens, *sums = all_reduce(counts).unbind(dim=1)
    found = {"pass@1": right.mean() / n, "pass@1_se": right.std() / n / len(problems) ** 0.5, f"maj@{n}": votes.mean(),
             f"pass@{n}": (right > 0).double().mean(), "format": well_formed.mean() / n, "length": tokens.mean() / n,
             "reflection": reflecting.mean() / n} | {key: x.mean() / n for key, x in zip(others, sums)}
    return {key: value.item() for key, value in found.items()} | {"n_problems": len(problems)}


def evaluate_stage(run: Run, name: str) -> None:
    """Evaluate a stage's model on the held-out problems, into results.json."""
    cfg, start = run.cfg, time.perf_counter()
    print(f"{name} answers {cfg.eval_problems} problems of each kind {EVAL_SAMPLES} times", flush=True)
    # On a CPU sampling by base and zero is compiled: RL and distillation need that code anyway, and models of one shape
    # share it. For a student, compiling would take longer than its evaluation, and on a GPU large batches are quicker.
    model = compiled(run.load_model(name), cfg, sampling=cfg.device == "cpu" and not name.startswith("student"))
    size = 8 if cfg.init else 256 if cfg.device == "cuda" else 32  # problems at a time
    found = {"params": model.n_params()}
    for kind in run.task.held_out:
        found[kind] = evaluate(model, run.task.heldout_problems(cfg.eval_problems, kind, cfg.seed), run.task,
                               max_new_tokens=cfg.rl_max_new_tokens, size=size,
                               generator=seeded(cfg, f"evaluate {name} {kind}", 0)[1])
        figures = [f"{key} {value:.3g}" for key, value in found[kind].items() if key not in ("pass@1_se", "n_problems")]
        print(fitting([f"{name} on {kind}: {figures[0]}", *figures[1:]]), flush=True)
    run.results["models"][name] = found
    run.results["seconds"][f"evaluate {name}"] = round(time.perf_counter() - start, 1)
    run.save_results()


def sparkline(values: list[float], width: int = 60) -> str:
    """A chart in one line.

    >>> sparkline([0, 1, 2, 3])
    '▁▃▆█'
    """
    values = [values[i * len(values) // min(width, len(values))] for i in range(min(width, len(values)))]
    low, high = min(values), max(values)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (v - low) / (high - low or 1))] for v in values)


def machine(cfg: Config) -> str:
    """What the run computes on, as text."""
    return f"{cfg.device}, {cfg.dtype}, {world_size()} x {cfg.threads} threads"


COLUMNS = {"pass@1": "", "maj@16": ".1%", "pass@16": ".1%", "format": ".1%", "length": ".1f", "reflection": ".1%"}


def table(rows: list[tuple[str, str, dict[str, float]]]) -> list[str]:
    """Rows of (model, kind of problems, what `evaluate` found) as Markdown, aligned so that a terminal may show it.

    >>> table([("zero", "hard", {"pass@1": 0.5, "pass@1_se": 0.01, **dict.fromkeys([*COLUMNS][1:], 0.25)})])[2]
    'zero |hard    |50.0% ± 1.0%| 25.0%|  25.0%| 25.0%|   0.2|     25.0%'
    """
    figures = rows[0][2] if rows else {}
    columns = COLUMNS | {key: ".1%" for key in figures if key not in (*COLUMNS, "pass@1_se", "n_problems")}
    cells = [["model", "problems", *columns]]
    for name, kind, m in rows:
        others = [f"{m[key]:{form}}" for key, form in columns.items() if form]
        cells.append([name, kind, f"{m['pass@1']:.1%} ± {m['pass@1_se']:.1%}", *others])
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["|".join(cell.ljust(width) if at < 2 else cell.rjust(width)
                      for at, (cell, width) in enumerate(zip(row, widths))) for row in cells]
    return [lines[0], "|".join("-" * width for width in widths), *lines[1:]]


def report(run: Run) -> str:
    """results.json and the RL stage's rows as Markdown."""
    models = {name: run.results["models"][name] for name in STAGES if name in run.results["models"]}
    lines = table([(name, kind, m[kind]) for name, m in models.items() for kind in run.task.held_out]) + [""]
    if rows := [row for row in run.log_rows() if row["stage"] == ZERO]:
        for key in ("accuracy", "length"):
            values = [row[key] for row in rows]
            chart = f"{values[0]:5.2f} {sparkline(values, 36)} {values[-1]:.2f}"
            lines.append(f"    {key:8} over {len(rows)} RL steps {chart}")
    seconds = run.results["seconds"]
    spent = "Seconds: " + ", ".join(f"{name} {s:.0f}" for name, s in seconds.items())
    spent += f"; together {sum(seconds.values()) / 60:.1f} minutes on {machine(run.cfg)}, seed {run.cfg.seed}."
    sizes = "Parameters: " + ", ".join(f"{name} {m['params']:,}" for name, m in models.items()) + "."
    return "\n".join([*lines, "", textwrap.fill(sizes, 80), "", textwrap.fill(spent, 80)])


# The command line


def finished_stages(out: Path) -> tuple[Config, list[str]]:
    """The settings of the run in `out`, and its finished stages. Raises UsageError if there are none."""
    names = [name for name in DEPENDS if (out / f"{name}.pt").exists()]
    if not names:
        raise UsageError(f"there is no model in {out}/: run python train.py first")
    config = load_checkpoint(out / f"{names[-1]}.pt", names[-1])["config"]  # all models of a run have the same task
    known = {name: config[name] for name in FIELDS if name in config}  # an older checkpoint may lack some
    return Config(**known | {"corpus": ""}), names  # what reads no corpus needs no file of it


def ask(out: Path, text: str, samples: int = 1, temperature: float | None = None) -> str:
    """What each finished model in `out` answers: its likeliest answer, or several at temperature 1 or another."""
    cfg, names = finished_stages(out)
    if temperature is None:
        temperature = float(samples > 1)
    try:
        task = make_task(cfg)
        problem = task.parse(text)
    except ValueError as error:
        raise UsageError(f"--ask: {error}") from None
    lines, prompt = [f"{problem.question} = {problem.answer or '?'}"], task.encode_prompt(problem)
    for name in names:
        model = build_model(load_checkpoint(out / f"{name}.pt", name))
        room = min(cfg.rl_max_new_tokens, model.config.block_size - len(prompt))
        if room < 1:
            raise UsageError(f"--ask: the prompt is too long, {len(prompt)} tokens")
        for ids in generate(model, [prompt], room, temperature=temperature, eos_id=task.stop_ids, samples=samples):
            answer = task.encoding.decode([i for i in ids if i not in task.stop_ids])
            right = task.reward(answer, problem)["accuracy"] == 1
            verdict = "right" if right else "wrong" if problem.answer else ""
            lines.append(f"{name:13} {verdict:5}  {' '.join(answer.split())}")
    return "\n".join(lines)


def evaluate_file(out: Path, path: str) -> str:
    """What each finished model in `out` reaches on a file of problems (see data/own.py), as Markdown."""
    cfg, names = finished_stages(out)
    try:
        task = make_task(cfg)
        problems = read_problems(path)
    except ValueError as error:
        raise UsageError(f"--evaluate: {error}") from None
    room = cfg.block_size - cfg.rl_max_new_tokens
    asked = [problem for problem in problems if len(task.encode_prompt(problem)) <= room]
    if len(asked) < 2:
        raise UsageError(f"--evaluate: {path} has {len(asked)} problems of at most {room} tokens, 2 are the least")
    rows, device = [], cfg.device if has(cfg.device) else "cpu"
    for name in names:
        model = build_model(load_checkpoint(out / f"{name}.pt", name)).to(device)
        generator = torch.Generator(device).manual_seed(cfg.seed)
        figures = evaluate(model, asked, task, max_new_tokens=cfg.rl_max_new_tokens, generator=generator,
                           size=8 if cfg.init else 32)
        rows.append((name, Path(path).stem, figures))
    first = f"{path}: {len(asked)} of {len(problems)} problems, those of at most {room} tokens"
    return "\n".join([first, "", *table(rows)])


def prepare(cfg: Config, out: Path) -> tuple[Config, object]:
    """Check the settings and the files that they name -> (the settings, the task). Raises UsageError."""
    try:
        check(cfg)
        task = make_task(cfg)
        for name, folder in ((BASE, cfg.init), (STUDENT_BASE, cfg.student_init)):
            if folder and not (out / f"{name}.pt").exists():  # what cannot be loaded is refused before any work
                load_model(path_of(folder), task.encoding.n_tokens, cfg.block_size)
    except ValueError as error:
        raise UsageError(str(error)) from None
    # a fingerprint is the path and a checksum of the file, so that a changed file is noticed
    files = {key: fingerprint(path_of(getattr(cfg, key))) for key in ("problems", "corpus", "init", "student_init")}
    return dataclasses.replace(cfg, **files), task


def train(run: Run, chosen: str, program: str) -> None:
    """Train the stages whose names begin with `chosen` and that are not finished, evaluate each finished stage that has
    no figures yet, then report."""
    torch.set_num_threads(run.cfg.threads)
    for note in run.task.notes:  # what was read of your own files, and what was left out
        print(note)
    wanted = [name for name in STAGES if name.startswith(chosen) and (name != STUDENT_RL or run.cfg.student_rl)]
    for name, stage in STAGES.items():
        if name in wanted and not run.path(name).exists():
            run.results["models"].pop(name, None)  # the figures of a checkpoint that was removed
            run.began, spent = time.perf_counter(), sum(run.results["seconds"].values()) / 60
            print(f"\n{name}: stage {wanted.index(name) + 1} of {len(wanted)}, {spent:.1f} minutes so far; "
                  f"{machine(run.cfg)}", flush=True)
            stage(run, name, *map(run.load_model, DEPENDS[name]))
            gc.collect()  # compiled models refer to themselves, and would stay in memory for a while
        if run.path(name).exists() and name not in run.results["models"]:
            evaluate_stage(run, name)
    text = report(run)
    write_file(run.out / "report.md", (text + "\n").encode())
    problem = run.task.heldout_problems(2, [*run.task.held_out][0], run.cfg.seed)[0]
    print(f"""\n{text}

{run.out}/ holds the models, report.md, log.jsonl and samples.jsonl. Try next:
    python {program} --out={run.out} --ask="{problem.question}"
    python experiments/samples.py --out={run.out}   # how zero's answers changed
    docs/walkthrough.ipynb                   # the recipe, step by step
    docs/own.md                              # problems and rewards of your own""")


def main(argv: list[str], program: str = "train.py", description: str = __doc__) -> int:
    """Run the command line -> exit code."""
    try:
        tune_libraries()
        cfg, options = parse_args(argv, description)
        out = Path(options.out or f"out/{options.preset or Path(path_of(cfg.init)).name}")
        if options.ask is not None:
            print(ask(out, options.ask, options.samples, options.temperature))
            return 0
        if options.evaluate is not None:
            print(evaluate_file(out, options.evaluate))
            return 0
        try:
            init(cfg.device)
        except ValueError as error:
            raise UsageError(str(error)) from None
        if rank():
            sys.stdout = open(os.devnull, "w", encoding="utf-8")
        prepared = None if rank() else prepare(cfg, out)  # rank 0 reads the files for all
        with lock(out):
            run = broadcast(None if rank() else open_run(*prepared, out))
            train(run, options.stage or "", program)
        return 0
    except (UsageError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):  # a terminal may lack ± and ▁
        stream.reconfigure(errors="replace")
    end(main(sys.argv[1:]))
