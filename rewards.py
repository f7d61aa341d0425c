"""The two rule-based rewards of DeepSeek-R1-Zero (arXiv 2501.12948v2, section 2.2), and the parser behind them.

    accuracy  1 if problem.check() accepts the one <answer> that follows the one closed, non-empty <think>, else 0
    format    1 if the completion is exactly <think>...</think><answer>...</answer>, else 0

R1's later stages (r1.py) add a third, language_reward in data/bilingual.py.

There is no neural reward model, because a policy that is optimised against one finds its holes. Rules have holes too,
so this file is strict. A tag that appears twice, an answer inside the thought, an empty thought, or any text before,
between or after the two blocks is not well formed. (The paper does not publish its parser, so this is our choice. White
space may stand around the blocks, as in the paper's template.) The text is never executed, and the parser reads each
character a bounded number of times.

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
    """1.0 if the completion is one non-empty thought, one non-empty answer, and nothing else but white space."""
    parts = split_completion(completion)
    if parts is None:
        return 0.0
    before, thought, between, answer, after = (part.strip() for part in parts)
    return float(bool(thought and answer) and not (before or between or after))


def extract_answer(completion: str) -> str | None:
    """The text of the one answer after the one closed, non-empty thought, without white space around it; or None."""
    parts = split_completion(completion)
    return parts[3].strip() if parts is not None and parts[1].strip() else None


def accuracy_reward(completion: str, problem) -> float:
    """1.0 if problem.check() accepts the answer. Text around the two blocks costs the format reward alone."""
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
