"""The two rule-based rewards of DeepSeek-R1-Zero (arXiv 2501.12948v2, section 2.2), and the parser behind them.

    accuracy  1 if problem.check() accepts the one <answer> that follows the one closed, non-empty <think>, else 0
    format    1 if the completion is exactly <think>...</think><answer>...</answer>, else 0

R1's later stages (r1.py) add a third, `language_reward`.

There is no neural reward model, because a policy that is optimised against one finds its holes. Rules have holes too,
so this file is strict. A tag that appears twice, an answer inside the thought, an empty thought, or any text before,
between or after the two blocks is not well formed. The text is never executed, and the parser reads each character a
bounded number of times.

Where we differ from the paper, and why
1. The paper does not publish its parser. How strict to be is our choice; white space may stand around the blocks, as in
   the paper's template.

    >>> import data.arithmetic
    >>> problem = data.arithmetic.parse("8*7-19")
    >>> completion = "<think>8*7=56, 56-19=37</think> <answer> 37 </answer>"
    >>> accuracy_reward(completion, problem), format_reward(completion)
    (1.0, 1.0)
    >>> accuracy_reward("37", problem), format_reward("<think></think><answer>37</answer>")
    (0.0, 0.0)

A completion that loses its last tag earns neither reward, although its sum may be right:

    >>> rule_rewards("<think>8*7=56, 56-19=37</think><answer>37", problem)
    {'accuracy': 0.0, 'format': 0.0, 'reflection': 0.0}
"""
import re
from collections import Counter
from collections.abc import Callable

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
MAX_CHARS = 100_000  # a longer completion gets no reward; no model here can sample one
REFLECTIVE = re.compile(r"\b(wait|mistake|however|but|retry|error|verify|wrong|evaluate|check)\b", re.IGNORECASE)


def split_completion(completion: str) -> list[str] | None:
    """The five texts around the four tags, or None unless each tag occurs exactly once, in order.

    >>> split_completion("<think>a</think><answer>b</answer>")
    ['', 'a', '', 'b', '']
    >>> split_completion("<think>a<answer>b</answer></think>") is None
    True
    """
    if len(completion) > MAX_CHARS or any(completion.count(tag) != 1 for tag in TAGS):
        return None
    parts, rest = [], completion
    for tag in TAGS:
        before, found, rest = rest.partition(tag)
        if not found:
            return None  # the tag stands before another that it must follow
        parts.append(before)
    return [*parts, rest]


def format_reward(completion: str) -> float:
    """1.0 if the completion is one non-empty thought, one non-empty answer, and nothing else but white space.

    >>> format_reward("<think>a</think><answer>b</answer> so b")
    0.0
    """
    parts = split_completion(completion)
    if parts is None:
        return 0.0
    before, thought, between, answer, after = (part.strip() for part in parts)
    return float(bool(thought and answer) and not (before or between or after))


def extract_answer(completion: str) -> str | None:
    """The text of the one answer after the one closed, non-empty thought, without white space around it; or None.

    >>> extract_answer("<think>2+3=5</think> so <answer> 5 </answer>")
    '5'
    """
    parts = split_completion(completion)
    return parts[3].strip() if parts is not None and parts[1].strip() else None


def accuracy_reward(completion: str, problem) -> float:
    """1.0 if problem.check() accepts the answer. Text around the two blocks costs the format reward alone.

    >>> import data.arithmetic
    >>> [accuracy_reward(f"<think>{thought}</think> <answer>5</answer>.", data.arithmetic.parse("2+3"))
    ...  for thought in ("2+3=5", "")]
    [1.0, 0.0]
    """
    answer = extract_answer(completion)
    return float(answer is not None and problem.check(answer))


def reflects(completion: str) -> bool:
    """Does the text hold one of the ten reflective words that DeepSeek-R1 counts (appendix C.2)? It earns nothing.

    >>> reflects("8*7=54, wait, 8*7=56"), reflects("8*7=56, a waiter")
    (True, False)
    """
    return REFLECTIVE.search(completion) is not None


def rule_rewards(completion: str, problem) -> dict[str, float]:
    """Both rewards, 0.0 or 1.0 each, and for the log whether the completion reflects."""
    return {"accuracy": accuracy_reward(completion, problem), "format": format_reward(completion),
            "reflection": float(reflects(completion))}


def language_reward(completion: str, in_language: Callable[[str], bool]) -> float:
    """The share of the thought's steps that are in the question's language, from 0 to 1 (DeepSeek-R1, eq. 7, counts
    words). It is paid to a well-formed completion only, and not for repetition: a step that stands there three times
    makes it 0. A step is a part of the thought between commas that holds a digit.

    >>> from data.bilingual import Problem
    >>> def reward(thought):
    ...     completion = f"<think>{thought}</think><answer>7 minus 19</answer>"
    ...     return language_reward(completion, Problem("8*7-19", "37", words=False).in_language)
    >>> reward("8*7=56, 56-19=37"), reward("8*7=54, wait, 8*7=56, 56 minus 19 is 37, 1+1=2")
    (1.0, 0.75)
    >>> reward("8*7=56, 56 minus 19 is 37"), reward("8*7 is 56"), reward("so, hmm"), reward("8*7=56, " * 1000)
    (0.5, 0.0, 0.0, 0.0)
    """
    if not format_reward(completion):
        return 0.0
    parts = (part.strip() for part in split_completion(completion)[1].split(","))
    steps = Counter(part for part in parts if any(character.isdigit() for character in part))
    if not steps or max(steps.values()) > 2:
        return 0.0
    return sum(n for step, n in steps.items() if in_language(step)) / steps.total()
