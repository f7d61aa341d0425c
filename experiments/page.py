"""One HTML file that replays a run: every answer that the run kept, every token, and where RL would push it.

    python experiments/page.py                  writes out/run.html, for the run in out/
    python experiments/page.py --out=out/tiny   writes out/tiny/run.html

Any browser of 2023 or later opens the file from disk. It needs no network. docs/run.html is the page of a run with
default settings: python train.py && python experiments/page.py && cp out/run.html docs/run.html

The answers, their tokens and the model's likeliest tokens come from samples.jsonl, the curves from log.jsonl. How
another model sees the same tokens (the model that a stage began with, or the teacher) is computed here from its
checkpoint. page.html is the template: it draws the page from the data that `replay` returns.
"""
import base64
import itertools
import json
import math
import re
import sys
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import r1
import train
from controls import CONTROLS
from data.arithmetic import OPERATIONS
from data.bilingual import Everyday
from engine.arguments import Parser
from engine.ask import stored_config
from engine.evaluation import majority
from engine.files import build_model, load_checkpoint, log_rows
from engine.samples import N_LIKELIEST, predictions, token_text
from engine.tasks import make_task
from engine.terminal import UsageError
from grpo import Rollout
from model import GPT
from rewards import TAGS, extract_answer, format_reward, split_completion

TEMPLATE = Path(__file__).with_name("page.html")
POINTS = 200         # of a curve
MAX_TOKENS = 4_096   # of a forward pass
LARGEST = 1_000_000  # bytes of a page
# The curves of RL: a metric of log.jsonl, its title, and whether it is a share. Distillation has the loss alone; its
# other curves are made from the samples, because the log describes the teacher's answers.
REFLECT = "answers that reflect"
CURVES = (("accuracy", "correct", True), ("format", "well formed", True), ("length", "tokens of an answer", False),
          ("entropy", "entropy, nats a token", False), ("no_signal", "groups without signal", True),
          ("reflection", REFLECT, True))
LOSS = (("loss", "loss", False),)
SEEN = (("accuracy", "correct, of these answers"), ("format", "well formed, of these"))

BESIDE = (" Each answer of the student is shown with an answer of the teacher to the same problem. The teacher finds "
          "blue tokens likelier than the student does, and orange tokens less likely. Look for shades that fade from "
          "step to step.")
KINDS = {  # the kind of a stage: (its name on the page, what one sees there and what to look for)
    "rl": ("RL", "Reinforcement learning (RL) with GRPO. The model answers each problem eight times, and each answer "
           "is compared with the mean of the eight. GRPO would push blue tokens up and orange tokens down. Look for "
           "answers that have the correct number and are pushed down, for wrong ones that are pushed up, and for the "
           "few tokens (a digit, a tag) that get most of the push."),
    "kl": ("distillation", "Distillation: the student learns its teacher's probabilities." + BESIDE),
    "sft": ("fine-tuning", "Fine-tuning: the student learns its teacher's good answers." + BESIDE),
}
FINE_TUNED = ("dev1", "dev3", "student_sft")  # in r1.py
LEGENDS = {False: ("pushed up (solid line)", "pushed down (dashed line)", "no push"),
           True: ("likelier for the teacher (solid line)", "less likely for the teacher (dashed line)", "equal")}


class Source(NamedTuple):
    """The files of a run."""
    out: Path
    rows: list      # of samples.jsonl
    log: list       # of log.jsonl
    results: dict
    stages: dict    # the table of stages of the program that made it
    task: object


class Words:
    """The texts of the page's tokens, each once: a token is a number in this list. n_likeliest is how many of a model's
    likeliest tokens the page shows at a position."""

    def __init__(self, n_likeliest: int):
        self.number, self.n_likeliest = {}, n_likeliest

    def __call__(self, text: str) -> int:
        return self.number.setdefault(text, len(self.number))

    def likeliest(self, model: dict[str, int]) -> list[str]:
        """The likeliest tokens of {text: p}."""
        return sorted(model, key=model.get, reverse=True)[:self.n_likeliest]


def read_run(out: Path) -> Source:
    """Read a run. Raises UsageError if there are no samples, or they have no tokens."""
    path = out / "samples.jsonl"
    if not path.exists() or not (out / "results.json").exists():
        raise UsageError(f"there is no {path}: run python train.py first")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    rows = [row for row in rows if "likeliest" in row]
    if not rows:
        raise UsageError(f"{path} has no answers with tokens: it is from an older version, or no stage has started")
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    program = r1 if "cold_steps" in results["config"] else train
    task = make_task(stored_config(program.Config, results["config"]))
    return Source(out, rows, log_rows(out), results, CONTROLS | program.STAGES, task)


def replay(source: Source, n_likeliest: int = N_LIKELIEST) -> dict:
    """The data of the page.

    "words" are the texts of the tokens; a token is an index into them. "views" are the stages. A view's "groups" are
    indexed by step and problem, its "teacher" by problem. An answer's "tokens" have a list at each position, of
    [token, p, p of another model, ...]: first the token that was sampled, then each model's likeliest ones. Each p is
    in thousandths. Where only an upper bound b is known, because the run kept five tokens, it is -1 - b.
    """
    words = Words(n_likeliest)
    stages = dict.fromkeys(row["stage"] for row in source.rows)
    views = [make_view(source, stage, words) for stage in stages]
    ends = [token_text(source.task.encoding, i) for i in source.task.stop_ids]
    return {"words": [*words.number], "ends": [words.number[text] for text in ends if text in words.number],
            "views": views, "links": links(views, words), "facts": facts(source.results),
            "terms": terms(source.results["config"])}


def facts(results: dict) -> str:
    """One line about the run."""
    config, parts = results["config"], []
    for name, result in results["models"].items():
        if "test" in result:
            parts.append(f"{name} {100 * result['test']['pass@1']:.0f}\u00a0%")
    found = f" Correct answers to test problems: {', '.join(parts)}." if parts else ""
    return f"A run of nanoR1: task {config['task']}, seed {config['seed']}.{found}"


def terms(config: dict) -> list[str]:
    """The terms of the page, as paragraphs."""
    scale = ", divided by their standard deviation (with n − 1)" if config["scale"] == "std" else ""
    return [
        "Models: base has learned next-token prediction. zero is the base after reinforcement learning with GRPO "
        "(Group Relative Policy Optimization). student_base is a smaller base, and student is student_base after it "
        "has learned zero's probabilities.",
        "Reward: the number that an answer earns by rules, accuracy + format by default. accuracy is 1 if the text "
        "inside <answer>…</answer> is correct and follows a closed <think>…</think>. format is 1 if the answer is "
        "these two blocks and nothing else, and neither is empty. So a correct number outside <answer>…</answer> earns "
        "nothing: its accuracy is 0, and it has no vote. reflection (the thought has a word such as “wait”) is shown "
        "and not rewarded.",
        "Advantage: the reward minus the mean reward of the group, which is the eight answers to the problem"
        f"{scale}. So an answer is good or bad only beside the others. If all eight earn the same, all advantages are "
        "0, and the group has no signal.",
        "Push: GRPO makes each token of an answer more likely if the advantage is positive, and less likely if it is "
        "negative. All tokens of an answer have its advantage. So the correct steps of a bad answer are pushed down, "
        "and the wrong steps of a better one are pushed up. The gradient of the objective with respect to the token's "
        "logit is advantage × (1 − probability). So tokens that the model was sure of are pale.",
        "The answers are drawn for show, to the same four training problems and with the same random numbers at each "
        "step. No update learns from them, so the page says “would”. It leaves out clipping and the KL penalty.",
        "Shades of a student: the teacher's probability minus the student's. With the forward KL divergence at "
        "temperature 1, this is the push on the token's logit.",
        "Bars: the likeliest tokens at a position. A run keeps the five likeliest tokens of the model that it trains. "
        "For other tokens, “<” marks an upper bound.",
        "This page was made with python experiments/page.py --out=DIR, from the run of python train.py in DIR.",
    ]


# Views


def make_view(source: Source, stage: str, words: Words) -> dict:
    """The answers and the curves of one stage."""
    rows = [row for row in source.rows if row["stage"] == stage]
    of_teacher = [row for row in rows if row["model"] == "teacher"]
    distilled = bool(of_teacher)
    rows = sorted((row for row in rows if row["model"] != "teacher"), key=lambda row: row["step"])
    steps = [*dict.fromkeys(row["step"] for row in rows)]
    n_problems = len(rows) // len(steps)
    tuned = stage in FINE_TUNED or source.results["config"]["divergence"] == "sft"
    kind, text = KINDS["rl" if not distilled else "sft" if tuned else "kl"]
    began = starts(source, stage, distilled)
    log = [row for row in source.log if row["stage"] == stage]
    view = {"stage": stage, "title": f"{stage}: {kind}", "words": text, "legend": LEGENDS[distilled], "steps": steps,
            "charts": charts(log, rows, distilled),
            "problems": [name_problem(source.task, row["question"]) for row in rows[:n_problems]], "columns": {}}
    others = {name: "teacher" if distilled else "before RL" for name in began[-1:] if has(source, name)}
    groups = make_groups(source, rows, [*others], words)
    view["groups"] = [groups[i:i + n_problems] for i in range(0, len(groups), n_problems)]
    view["columns"]["answers"] = ["student" if distilled else "at step {step}", *others.values()]
    if distilled:
        others = {name: "student at step 0" for name in began[:1]} | {stage: f"at step {steps[-1]}"}
        others = {name: label for name, label in others.items() if has(source, name)}
        view["teacher"] = make_groups(source, of_teacher, [*others], words)
        view["columns"]["teacher"] = ["teacher", *others.values()]
    view["opening"] = opening(view)
    return view


def has(source: Source, name: str) -> bool:
    """Does the run have the checkpoint of this stage?"""
    return (source.out / f"{name}.pt").exists()


def name_problem(task, question: str) -> dict[str, str]:
    """A question and its answer, which is empty if the task does not know it."""
    problem = parse(task, question)
    return {"question": question, "answer": minus(problem.answer) if problem else ""}


def starts(source: Source, stage: str, distilled: bool) -> list[str]:
    """The stages whose models a stage started from: [the one that it trained] in RL, [the one that it trained, its
    teacher] in distillation. Empty if the page does not know this stage."""
    names = source.stages[stage].starts if stage in source.stages else ()
    if not distilled:
        cold = stage != "dev2" or source.results["config"]["cold_start"]  # see r1.py
        return [*names[-1:]] if cold else ["base"]
    return sorted(names, key=lambda name: name not in ("base", "student_base"))


def charts(log: list[dict], rows: list[dict], distilled: bool) -> list[dict]:
    """The curves of a stage, from its rows of the log and of the samples."""
    logged = [(title, share, [[row["step"], round(row[name], 4)] for row in log if row.get(name) is not None])
              for name, title, share in (LOSS if distilled else CURVES)]
    if not any(row.get("reflection", 0) > 0.05 for row in log):
        logged = [curve for curve in logged if curve[0] != REFLECT]
    steps = sorted({row["step"] for row in rows})
    for name, title in SEEN if distilled else ():
        means = [[x for row in rows if row["step"] == step for x in row["rewards"].get(name, [])] for step in steps]
        logged.append((title, True, [[step, round(sum(x) / len(x), 4)] for step, x in zip(steps, means) if x]))
    return [{"title": title, "percent": share, "points": thin(points),
             "top": 1 if share else max(*(value for _, value in points), 1e-9)}
            for title, share, points in logged if points]


def thin(points: list) -> list:
    """At most POINTS of the points, evenly spaced, with the first and the last.

    >>> thin([*range(399)])[:3], thin([*range(399)])[-1], len(thin([*range(399)]))
    ([0, 2, 4], 398, 200)
    """
    n = len(points)
    return points if n <= POINTS else [points[round(i * (n - 1) / (POINTS - 1))] for i in range(POINTS)]


def opening(view: dict) -> dict:
    """The step and the problem that a view shows first: those of the first correct number that is punished."""
    found = correct_number(groups_of(view))
    return {"step": found[1], "problem": found[2]} if found else {"step": view["steps"][0], "problem": 0}


# Groups and answers


def make_groups(source: Source, rows: list[dict], names: list[str], words: Words) -> list[dict]:
    """One group for each row of samples.jsonl. `names` are the stages whose models read the same tokens."""
    others = [other_view(source, name, rows) for name in names]
    ends = {token_text(source.task.encoding, i) for i in source.task.stop_ids}
    groups = []
    for r, row in enumerate(rows):
        problem, answers = parse(source.task, row["question"]), []
        for i, text in enumerate(row["completions"]):
            seen = [other[r, i] for other in others if other[r, i] is not None]
            scores = {name: values[i] for name, values in row["rewards"].items()}
            cut = row["tokens"][i][-1:] and row["tokens"][i][-1] not in ends
            answers.append({
                "tokens": positions(row["tokens"][i], row["logprobs"][i], row["likeliest"][i], seen, words),
                "advantage": round(row["advantages"][i], 4), "reward": scores["reward"],
                "rewards": {name: value for name, value in scores.items()
                            if name in ("accuracy", "format") or value and name != "reward"},
                "why": verdict(text, problem, scores, bool(cut))})
        groups.append({"answers": answers, **summary(row, problem)})
    return groups


def positions(tokens: list[str], logprobs: list[float], likeliest: list[dict], others: list[list[dict]],
              words: Words) -> list[list]:
    """The tokens of an answer as `replay` describes them. `others` are the views of other models (see other_view)."""
    found = []
    for k, (token, logp, own) in enumerate(zip(tokens, logprobs, likeliest)):
        models = [{text: round(1000 * p) for text, p in own.items()}, *(other[k] for other in others)]
        bounds = [-1 - min(model.values()) for model in models]
        models[0].setdefault(token, round(1000 * math.exp(logp)))
        texts = dict.fromkeys([token, *(text for model in models for text in words.likeliest(model))])
        found.append([[words(text), *(model.get(text, bound) for model, bound in zip(models, bounds))]
                      for text in texts])
    return found


def other_view(source: Source, name: str, rows: list[dict]) -> dict:
    """How another model of the run sees the answers in these rows: {(row, answer): for each position {text: p in
    thousandths}, with the tokens that the row has there and the model's own five likeliest}. None for an answer that
    the model cannot read."""
    model, encoding = build_model(load_checkpoint(source.out / f"{name}.pt", name)), source.task.encoding
    ids = {token_text(encoding, i): i for i in range(model.config.vocab_size)}
    found, asked, prompts, completions = {}, [], [], []
    for r, row in enumerate(rows):
        problem = parse(source.task, row["question"])
        for i, tokens in enumerate(row["tokens"]):
            found[r, i] = None
            prompt = source.task.encode_prompt(problem) if problem else []
            fits = len(prompt) + len(tokens) - 1 <= model.config.block_size
            wanted = [[*dict.fromkeys([token, *own])] for token, own in zip(tokens, row["likeliest"][i])]
            if prompt and fits and all(text in ids for texts in wanted for text in texts):
                found[r, i] = []
                asked.append((found[r, i], wanted))
                prompts.append(prompt)
                completions.append([ids[token] for token in tokens])
    read(model, prompts, completions, asked, ids)
    return found


def read(model: GPT, prompts: list, completions: list, asked: list, ids: dict[str, int]) -> None:
    """Add the model's probabilities to the lists in `asked`: [(list to add to, for each position the texts)]."""
    texts = {i: text for text, i in ids.items()}
    rollout = Rollout(prompts, completions, [[0.0] * len(ids) for ids in completions], [], [], [])
    for rows, probs in predictions(model, rollout, MAX_TOKENS):
        top = probs.topk(N_LIKELIEST).indices.tolist()
        for row, p, likeliest in zip(rows.tolist(), probs, top):
            found, wanted = asked[row]
            tokens = [*dict.fromkeys([*(ids[text] for text in wanted[len(found)]), *likeliest])]
            found.append({texts[i]: round(1000 * value) for i, value in zip(tokens, p[tokens].tolist())})


def parse(task, question: str):
    """The problem of a question; None if this task does not know it."""
    try:
        return task.parse(question)
    except ValueError:
        return None


# Words about a group and an answer


def summary(row: dict, problem) -> dict:
    """The vote of a group, and what its rewards are worth, as sentences."""
    votes = [extract_answer(text) for text in row["completions"]]
    if problem:
        votes = [None if vote is None else problem.canonical(vote) for vote in votes]
    counts, winner = Counter(vote for vote in votes if vote is not None), majority(votes)
    parts = [f"{n} for {minus(clip(vote))}" for vote, n in counts.most_common(8)]
    if None in votes:
        parts.append(f"{votes.count(None)} without a readable answer")
    vote = f"Vote of the eight: {', '.join(parts)}."
    if problem and problem.answer and winner is not None:
        vote += f" The most frequent answer is {'correct' if problem.check(winner) else 'wrong'}."
    rewards = row["rewards"]["reward"]
    signal = len(set(rewards)) > 1
    if signal:
        note = (f"The eight earn {sum(rewards) / len(rewards):.2f} on average. An answer that earns more has a "
                "positive advantage and is pushed up. One that earns less has a negative advantage and is pushed down.")
    else:
        note = (f"No signal: all eight earn {rewards[0]:g}, so no answer is better than the others. All advantages are "
                "0, and nothing is pushed.")
    return {"vote": vote, "note": note, "signal": signal}


def verdict(text: str, problem, scores: dict[str, float], cut: bool) -> str:
    """Why an answer earns what it earns, in a few words."""
    accurate, well_formed = scores["accuracy"] == 1, "format" not in scores or format_reward(text) == 1
    if isinstance(problem, Everyday) or problem is None or not problem.answer:
        return "correct" if accurate else "wrong"
    answer = extract_answer(text)
    outside = "" if well_formed else ", and text outside the two blocks costs the format reward"
    if accurate:
        return f"{minus(clip(answer or ''))} is correct{outside}" if answer else "correct"
    if answer is not None:
        said = minus(clip(answer)) or "an empty answer"
        return f"{said} is {'correct, but was not accepted' if problem.check(answer) else 'wrong'}{outside}"
    found = stated(text, problem)
    start = f"{minus(clip(found))} is the correct number, but " if found else ""
    return f"{start}{broken(text, cut)}{', so it earns nothing' if scores['reward'] == 0 else ''}"


def broken(text: str, cut: bool) -> str:
    """What is wrong with the tags of an answer whose text cannot be found."""
    missing, repeated = [tag for tag in TAGS if tag not in text], [tag for tag in TAGS if text.count(tag) > 1]
    if len(missing) == len(TAGS):
        found = "the four tags are missing"
    elif missing:
        found = f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
    elif repeated:
        found = f"{' and '.join(repeated)} {'occurs' if len(repeated) == 1 else 'occur'} more than once"
    else:
        found = "the thought is empty" if split_completion(text) else "the tags are in another order"
    return found + (" (it was cut off)" if cut else "")


def stated(text: str, problem) -> str | None:
    """The last number or the last word of a text without its tags, if it is the correct answer.

    >>> import data.arithmetic
    >>> problem = data.arithmetic.parse("2-15")
    >>> [stated(text, problem) for text in ("<think>2-15=-13", "so -13", "2-13")]
    ['-13', '-13', None]
    """
    plain = re.sub("|".join(TAGS), " ", text[:10_000])
    for found in (re.findall(r"(?<![0-9)])-?[0-9]+", plain), plain.split()):
        if found and problem.check(found[-1]):
            return found[-1]
    return None


def minus(text: str) -> str:
    """A number with a typographic minus sign; other texts as they are."""
    return text.replace("-", "−") if re.fullmatch("-[0-9.]+", text) else text


def clip(text: str) -> str:
    """The beginning of a text."""
    return text if len(text) <= 40 else text[:39] + "…"


# Moments worth a look


def links(views: list[dict], words: Words) -> list[dict]:
    """Links to moments of the first RL stage: a correct number that is punished, a problem that most answers now solve, a
    wrong digit that is punished, a group without signal. A moment that does not exist is left out."""
    view = next((view for view in views if "teacher" not in view), None)
    if view is None:
        return []
    groups = groups_of(view)
    found = [correct_number(groups), first_majority(groups, len(view["problems"])),
             wrong_digit(groups, [*words.number]), no_signal(groups)]
    return [{"text": text, "at": {"view": view["stage"], "step": step, "problem": problem + 1, **more}}
            for text, step, problem, more in filter(None, found)]


def groups_of(view: dict) -> list[tuple]:
    """The groups of a view, each as (step, number of the problem, group)."""
    return [(step, i, group) for step, groups in zip(view["steps"], view["groups"]) for i, group in enumerate(groups)]


def correct_number(groups: list[tuple]) -> tuple | None:
    """The first answer that states the correct number where the rules do not read it, and has a negative advantage; of
    its tokens the one that is pushed down most."""
    for step, problem, group in groups:
        for a, answer in enumerate(group["answers"]):
            if "correct number" in answer["why"] and answer["advantage"] < 0:
                p = [entries[0][1] for entries in answer["tokens"]]  # of each token
                place = {"answer": a + 1, "token": p.index(min(p)) + 1}
                return "a correct number that is punished", step, problem, place
    return None


def no_signal(groups: list[tuple]) -> tuple | None:
    """The first group without signal."""
    return next((("a group without signal", step, i, {}) for step, i, group in groups if not group["signal"]), None)


def first_majority(groups: list[tuple], n_problems: int) -> tuple | None:
    """The first group in which more than half of the answers are correct, if possible one whose problem had no such
    majority at the step before."""
    majorities = [sum(answer["rewards"]["accuracy"] for answer in group["answers"]) > len(group["answers"]) / 2
                  for _, _, group in groups]
    gained = [n for n in range(n_problems, len(groups)) if majorities[n] and not majorities[n - n_problems]]
    for n in [*gained, *(n for n, majority in enumerate(majorities) if majority)][:1]:
        return "a problem that most answers now solve", *groups[n][:2], {}
    return None


def wrong_digit(groups: list[tuple], texts: list[str]) -> tuple | None:
    """The wrong digit that is pushed down most: the first wrong one of a well-formed answer."""
    best, most = None, 0.0
    for step, problem, group in groups:
        for a, answer in enumerate(group["answers"]):
            wrong = answer["rewards"].get("format") == 1 and not answer["rewards"]["accuracy"]
            k = place_of_slip([texts[entries[0][0]] for entries in answer["tokens"]]) if wrong else None
            if k is None:
                continue
            push = answer["advantage"] * (1 - answer["tokens"][k][0][1] / 1000)
            if push < most:
                best, most = ("a wrong digit that is punished", step, problem, {"answer": a + 1, "token": k + 1}), push
    return best


def place_of_slip(tokens: list[str]) -> int | None:
    """The number of the token with the first wrong digit in the first wrong step; None if all steps are correct.

    >>> place_of_slip(["3", "*", "5", "=", "1", "5", ", ", "1", "5", "-", "1", "3", "=", "4"])
    13
    """
    text, starts = "".join(tokens), [0, *itertools.accumulate(map(len, tokens))]
    for step in re.finditer(r"(?<![0-9)])(-?[0-9]{1,9})([-+*])(-?[0-9]{1,9})=(-?[0-9]{1,9})", text):
        value, found = str(OPERATIONS[step[2]](int(step[1]), int(step[3]))), step[4]
        if value != found:
            at = step.start(4) + next((i for i, (a, b) in enumerate(zip(value, found)) if a != b), len(value))
            return starts.index(at) if at in starts and at < step.end(4) else None
    return None


# The file


def make_page(out: Path) -> str:
    """The page of the run in `out`, as HTML. If it would be too large, it shows fewer of the likeliest tokens."""
    source = read_run(out)
    for n_likeliest in (N_LIKELIEST, 3, 1):
        content = json.dumps(replay(source, n_likeliest), separators=(",", ":")).encode()
        packed = base64.b64encode(zlib.compress(content, 9)).decode()
        page = TEMPLATE.read_text(encoding="utf-8").replace("<!--DATA-->", packed)
        if len(page.encode()) < LARGEST:
            break
    return page


def main(argv: list[str]) -> int:
    """Run the command line -> exit code."""
    parser = Parser(prog="page.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("out"))
    try:
        out = parser.parse_args(argv).out
        path, page = out / "run.html", make_page(out)
        path.write_text(page, encoding="utf-8")
        print(f"{path}: {len(page) / 1000:.0f} KB; open it in a browser")
        return 0
    except (ValueError, KeyError, OSError) as error:
        print(f"page.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
