"""The two rule-based rewards of DeepSeek-R1-Zero (arXiv 2501.12948v2, section 2.2), and the parser of completions.

A completion is the text that the language model writes after a prompt. It earns

    accuracy  1 if its answer is correct, else 0
    format    1 if it is <think>...</think><answer>...</answer> and nothing else, else 0

The thought is the text between <think> and </think>. The answer is the text between <answer> and </answer>. The task
is to think first, so accuracy also needs a closed, non-empty thought before the answer. problem.check(answer) -> bool
says whether the answer is correct (data/arithmetic.py). RL maximises the sum of the two rewards.

Both rewards are rules. R1-Zero has no neural network that scores answers, because RL would learn to exploit mistakes of
this network (reward hacking). RL exploits the gaps of a rule, too, so these rules are strict. A repeated tag, an answer
inside the thought, an empty thought, and text outside the two blocks earn no format reward. White space is allowed
around the blocks, as in the paper's template. One gap stays open: <think>.</think><answer>37</answer> earns both
rewards, because no rule can see whether a thought makes sense.

    >>> import data.arithmetic
    >>> problem = data.arithmetic.parse("8*7-19")
    >>> completion = "<think>8*7=56, 56-19=37</think> <answer> 37 </answer>"
    >>> accuracy_reward(completion, problem), format_reward(completion)
    (1.0, 1.0)
    >>> accuracy_reward("37", problem), format_reward("<think></think><answer>37</answer>")
    (0.0, 0.0)
    >>> rule_rewards("<think>8*7=56, 56-19=37</think><answer>37", problem)  # the last tag is missing
    {'accuracy': 0.0, 'format': 0.0, 'reflection': 0.0}
"""
import re

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
MAX_CHARS = 100_000  # a longer completion earns nothing, so that no check takes long
# The ten reflective words that the paper counts (2501.12948v2, appendix C.2)
REFLECTIVE = re.compile(r"\b(wait|mistake|however|but|retry|error|verify|wrong|evaluate|check)\b", re.IGNORECASE)


def split_completion(completion: str) -> list[str] | None:
    """The five texts before, between and after the four tags. None unless each tag occurs exactly once, in order.

    >>> split_completion("<think>a</think><answer>b</answer>")
    ['', 'a', '', 'b', '']
    >>> split_completion("<think>a<answer>b</answer></think>") is None
    True
    """
    if len(completion) > MAX_CHARS or any(completion.count(tag) != 1 for tag in TAGS):
        return None
    texts, rest = [], completion
    for tag in TAGS:
        before, found, rest = rest.partition(tag)
        if not found:
            return None  # the tags are in another order
        texts.append(before)
    return [*texts, rest]


def format_reward(completion: str) -> float:
    """1.0 if the completion is a non-empty thought, then a non-empty answer, with only white space around them."""
    texts = split_completion(completion)
    if texts is None:
        return 0.0
    before, thought, between, answer, after = (text.strip() for text in texts)
    if before or between or after:
        return 0.0
    return 1.0 if thought and answer else 0.0


def extract_answer(completion: str) -> str | None:
    """The text of the answer, without white space around it; or None, if the tags or the thought are malformed."""
    texts = split_completion(completion)
    if texts is None or not texts[1].strip():
        return None
    return texts[3].strip()


def accuracy_reward(completion: str, problem) -> float:
    """1.0 if problem.check() accepts the answer. Text outside the two blocks costs the format reward, not this one."""
    answer = extract_answer(completion)
    return float(answer is not None and problem.check(answer))


def reflects(completion: str) -> bool:
    """Is there one of the ten reflective words that DeepSeek-R1 counts (appendix C.2)? This is logged, not rewarded.

    >>> reflects("8*7=54, wait, 8*7=56"), reflects("8*7=56, a waiter")
    (True, False)
    """
    return REFLECTIVE.search(completion) is not None


def rule_rewards(completion: str, problem) -> dict[str, float]:
    """The two rewards, and reflection, which is only logged: 0.0 or 1.0 each."""
    return {"accuracy": accuracy_reward(completion, problem), "format": format_reward(completion),
            "reflection": float(reflects(completion))}
