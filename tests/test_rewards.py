"""The rewards against a table of tricks, a second parser, and a count of the characters that they read."""
import random
import sys

import pytest

from data.arithmetic import parse
from rewards import MAX_CHARS, TAGS, accuracy_reward, format_reward, reflects, rule_rewards

THINK, END_THINK, ANSWER, END_ANSWER = TAGS

# completion to "8*7-19", whose answer is 37; the accuracy and the format that it must get
TABLE = [
    # correct and well formed
    ("<think>8*7=56, 56-19=37</think><answer>37</answer>", 1, 1),
    ("<think>8*7=56, 56-19=37</think>\n\n<answer>37</answer>", 1, 1),
    ("  \n<think>\nx\n</think>\t<answer>\n37\n</answer>\r\n", 1, 1),
    ("<think>no idea</think><answer>37</answer>", 1, 1),
    ("<think>.</think><answer>37</answer>", 1, 1),
    ("<think>\0</think><answer>37</answer>", 1, 1),
    ("<think>1 < 2 > 0 </ think> <b></think><answer>37</answer>", 1, 1),
    ("<think>User: 1+1\nAssistant: 2</think><answer>37</answer>", 1, 1),
    ("<think>日本 \U0001f600</think><answer>37</answer>", 1, 1),
    # well formed and wrong
    ("<think>x</think><answer>36</answer>", 0, 1),
    ("<think>37</think><answer>73</answer>", 0, 1),
    ("<think>x</think><answer>-37</answer>", 0, 1),
    ("<think>x</think><answer>+37</answer>", 0, 1),
    ("<think>x</think><answer>037</answer>", 0, 1),
    ("<think>x</think><answer>37.0</answer>", 0, 1),
    ("<think>x</think><answer>37.</answer>", 0, 1),
    ("<think>x</think><answer>3 7</answer>", 0, 1),
    ("<think>x</think><answer>3_7</answer>", 0, 1),
    ("<think>x</think><answer>37e0</answer>", 0, 1),
    ("<think>x</think><answer>0x25</answer>", 0, 1),
    ("<think>x</think><answer>8*7-19</answer>", 0, 1),
    ("<think>x</think><answer>74//2*1</answer>", 0, 1),
    ("<think>x</think><answer>=37</answer>", 0, 1),
    ("<think>x</think><answer>8*7-19=37</answer>", 0, 1),
    ("<think>x</think><answer>36 37</answer>", 0, 1),
    ("<think>x</think><answer>37, or 36</answer>", 0, 1),
    ("<think>x</think><answer>37\n36</answer>", 0, 1),
    ("<think>x</think><answer>37\0</answer>", 0, 1),
    ("<think>x</think><answer>\0</answer>", 0, 1),
    ("<think>x</think><answer>37\u200b</answer>", 0, 1),
    ("<think>x</think><answer>\u0663\u0667</answer>", 0, 1),  # Arabic-Indic 37, which int() reads
    ("<think>x</think><answer>\uff13\uff17</answer>", 0, 1),  # full-width 37, which int() reads
    ("<think>x</think><answer>3\u00b2</answer>", 0, 1),
    ("<think>x</think><answer>\u221237</answer>", 0, 1),
    ("<think>x</think><answer>" + "3" * 400 + "</answer>", 0, 1),
    ("<think>x</think><answer>" + "0" * 398 + "37</answer>", 0, 1),
    ("<think>x</think><answer>99**98**97</answer>", 0, 1),
    ("<think>x</think><answer>__import__('os').getcwd()</answer>", 0, 1),
    ("<think>x</think><answer>\\boxed{37}</answer>", 0, 1),
    ("<think>x</think><answer><b>37</b></answer>", 0, 1),
    ("<think>x</think><answer>[37]</answer>", 0, 1),
    ("<think>x</think><answer>None</answer>", 0, 1),
    # correct, with text where none belongs
    ("So: <think>x</think><answer>37</answer>", 1, 0),
    ("<think>x</think>so<answer>37</answer>", 1, 0),
    ("<think>x</think><answer>37</answer>.", 1, 0),
    ("<think>x</think><answer>37</answer> 36", 1, 0),
    ("\0<think>x</think><answer>37</answer>", 1, 0),
    ("<think>x</think><answer>37</answer>\0", 1, 0),
    ("<think>x</think><answer>37</answer></b>", 1, 0),
    ("<<think>x</think><answer>37</answer>", 1, 0),
    ("<thi<think>nk>x</think><answer>37</answer>", 1, 0),
    ("<think>x</think><answer>37</answer><|endoftext|>", 1, 0),
    ("<think>x</think><answer>37</answer>\nUser: 1+1\nAssistant: 2", 1, 0),
    # no thought
    ("<think></think><answer>37</answer>", 0, 0),
    ("<think> \n\t </think><answer>37</answer>", 0, 0),
    ("<think>\u00a0\u2003</think><answer>37</answer>", 0, 0),
    ("x<think></think><answer>37</answer>", 0, 0),
    ("<answer>37</answer>", 0, 0),
    ("x</think><answer>37</answer>", 0, 0),
    # no answer
    ("<think>x</think><answer></answer>", 0, 0),
    ("<think>x</think><answer> \n </answer>", 0, 0),
    ("<think>x</think>37", 0, 0),
    ("<think>x</think>", 0, 0),
    ("37", 0, 0),
    ("", 0, 0),
    (" \n ", 0, 0),
    ("\0", 0, 0),
    # an answer inside the thought
    ("<think><answer>37</answer></think>", 0, 0),
    ("<think>x<answer>37</answer></think>37", 0, 0),
    ("<think>x<answer>37</answer></think><answer>36</answer>", 0, 0),
    ("<think>x<answer>36</answer></think><answer>37</answer>", 0, 0),
    ("<think>x<answer></think>37</answer>", 0, 0),
    ("<answer>37<think>x</think></answer>", 0, 0),
    # twice
    ("<think>x</think><answer>36</answer><answer>37</answer>", 0, 0),
    ("<think>x</think><answer>37</answer><answer>37</answer>", 0, 0),
    ("<think>x</think><answer>37</answer><answer>", 0, 0),
    ("<think>x</think><answer>37</answer></answer>", 0, 0),
    ("<think>x</think><answer><answer>37</answer></answer>", 0, 0),
    ("<think><think>x</think></think><answer>37</answer>", 0, 0),
    ("<think>x</think><think>y</think><answer>37</answer>", 0, 0),
    ("<think>x</think></think><answer>37</answer>", 0, 0),
    ("<think>x</think><answer>37</answer>" * 2, 0, 0),
    ("<think>x</think><answer>37</answer><think>y</think>", 0, 0),
    # out of order
    ("<answer>37</answer><think>x</think>", 0, 0),
    ("</think>x<think><answer>37</answer>", 0, 0),
    ("<think>x</think></answer>37<answer>", 0, 0),
    ("<think>x<answer>37</think></answer>", 0, 0),
    # a tag missing, cut off, or not quite a tag
    ("<think>x<answer>37</answer>", 0, 0),
    ("<think>x</think><answer>37", 0, 0),
    ("<think>x</think><answer>37</answer", 0, 0),
    ("<think>x</think><answer>37</", 0, 0),
    ("<think>x</think>37</answer>", 0, 0),
    ("<think>8*7=56, 56-1", 0, 0),
    ("<THINK>x</THINK><ANSWER>37</ANSWER>", 0, 0),
    ("<Think>x</think><answer>37</answer>", 0, 0),
    ("<think>x</think><Answer>37</answer>", 0, 0),
    ("<think >x</think><answer>37</answer>", 0, 0),
    ("<think>x</think>< answer>37</answer>", 0, 0),
    ("<think/>x</think><answer>37</answer>", 0, 0),
    ("<th\0ink>x</think><answer>37</answer>", 0, 0),
    ("\uff1cthink\uff1ex</think><answer>37</answer>", 0, 0),
    ("&lt;think&gt;x</think><answer>37</answer>", 0, 0),
    ("<thinking>x</thinking><answer>37</answer>", 0, 0),
]


@pytest.mark.parametrize("completion, accuracy, well_formed", TABLE)
def test_table(completion, accuracy, well_formed):
    """Each of these completions is a trick or an edge case. It must not get a reward that it has not earned, or miss
    one that it has earned."""
    assert accuracy_reward(completion, parse("8*7-19")) == accuracy
    assert format_reward(completion) == well_formed


@pytest.mark.parametrize("question, right, wrong", [
    ("5-5", "0", ("-0", "+0", "00", "0.0", "", "O", "\u0660", "\uff10", "False", "None")),
    ("10-3", "7", ("007", "07", "7//1", "7//2*1", "14//2*1", "-7", "7.", "7,0", "\u2466")),
    ("2+1", "3", ("7//2*1", "03", "3 ", " 3", "3\n", "0b11")),
    ("1-20", "-19", ("19", "- 19", "--19", "-019", "\u221219", "\u201319", "(19)", "-1 9", "19-")),
    ("9*9-1", "80", ("8_0", "8e1", "0080", "80%", "80 = 80", "8\u06f0")),
])
def test_integers(question, right, wrong):
    """int() accepts "-0", "007", " 7", "1_0" and the digits of every script. check() must accept exactly one
    spelling."""
    problem = parse(question)
    assert problem.check(right) and not any(problem.check(answer) for answer in wrong)
    assert accuracy_reward(f"<think>x</think><answer> {right}\n</answer>", problem) == 1.0
    assert not any(accuracy_reward(f"<think>x</think><answer>{answer}</answer>", problem)
                   for answer in wrong if answer.strip() != right)


# A second parser


def reference(completion, right):
    """(accuracy, format) by a scanner that goes from one "<" to the next and writes down which tag stands there."""
    found, i = [], completion.find("<")
    while i >= 0:
        found += [(tag, i, i + len(tag)) for tag in TAGS if completion[i:i + len(tag)] == tag]
        i = completion.find("<", i + 1)
    if [tag for tag, _, _ in found] != [THINK, END_THINK, ANSWER, END_ANSWER]:
        return 0.0, 0.0
    edges = [0] + [edge for _, start, end in found for edge in (start, end)] + [len(completion)]
    blank = [all(c.isspace() for c in completion[a:b]) for a, b in zip(edges[::2], edges[1::2])]
    answer = completion[edges[6]:edges[7]]
    while answer[:1].isspace():
        answer = answer[1:]
    while answer[-1:].isspace():
        answer = answer[:-1]
    return float(not blank[1] and answer == str(right)), float(blank == [True, False, True, False, True])


BITS = [*TAGS, *TAGS, THINK.upper(), "< think>", "</ answer>", "<", ">", "/", "think", "answer", "<answer>37</answer>",
        "<think>x</think>", "37", "37", "37", "036", "-37", "-", "0", "8*7=56, ", "x", "wait", " ", "  ", "\n", "\t",
        "\0", "\u0663\u0667", "\uff13\uff17", "\u00a0", "\u200b", "\x1c", "\ud800", "\U0001f600", "e\u0301",
        "User: ", "<|endoftext|>"]


def mutated(rng):
    """A well-formed completion after a few edits, or fragments at random."""
    if rng.random() < 0.3:
        return "".join(rng.choices(BITS, k=rng.randint(0, 12)))
    parts = [THINK, rng.choice(("8*7=56", "37", "x ", " ")), END_THINK, rng.choice(("", "", " ", "\n", "so")), ANSWER,
             rng.choice(("37", " 37 ", "37", "36", "-37")), END_ANSWER]
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        i, j = rng.randrange(len(parts)), rng.randrange(len(parts))
        edit = rng.randrange(5)
        if edit == 0:
            parts[i] = ""
        elif edit == 1:
            parts.insert(i, parts[j])
        elif edit == 2:
            parts[i], parts[j] = parts[j], parts[i]
        elif edit == 3:
            parts.insert(rng.randint(0, len(parts)), rng.choice(BITS))
        else:
            k = rng.randint(0, len(parts[i]))
            parts[i] = parts[i][:k] + rng.choice(("", rng.choice(BITS))) + parts[i][k + rng.randint(0, 1):]
    return "".join(parts)


def test_random_completions_get_what_the_second_parser_gives():
    """An odd string must not raise an exception, or get a reward that the rules do not give. A second parser checks
    100,000 strings."""
    rng, problem, counts = random.Random(0), parse("8*7-19"), {}
    for _ in range(100_000):
        completion = mutated(rng)
        got = accuracy_reward(completion, problem), format_reward(completion)
        assert got == reference(completion, 37), repr(completion)
        assert type(got[0]) is type(got[1]) is float
        counts[got] = counts.get(got, 0) + 1
    assert len(counts) == 4 and min(counts.values()) > 1000, counts


# Time


class Counted(str):
    """A string that counts the characters that its methods read, at most."""
    read = calls = 0


def counted(name):
    def method(self, *args):
        Counted.calls += 1
        Counted.read += len(self)
        result = getattr(str, name)(self, *args)
        if isinstance(result, (tuple, list)):
            return type(result)(Counted(part) for part in result)
        return Counted(result) if isinstance(result, str) else result
    return method


for name in dir(str):
    if not name.startswith("__") or name in ("__contains__", "__getitem__", "__iter__", "__add__", "__eq__"):
        setattr(Counted, name, counted(name))
Counted.__hash__ = str.__hash__

HARD = [lambda n: THINK * n, lambda n: "<" * n, lambda n: "<think>" + "<thin" * n, lambda n: " " * n,
        lambda n: "<think>" + " " * n + "</think>" + " " * n + "<answer>" + " " * n,
        lambda n: TAGS[3] * n + TAGS[0] * n,
        lambda n: "<think>x</think><answer>" + "7" * n + "</answer>", lambda n: "".join(TAGS) + "x" * n,
        lambda n: "<think>" + "x" * n + "</think>" + "\n" * n + "<answer>37</answer>" + "\n" * n]


@pytest.mark.parametrize("hard", HARD)
def test_parsing_is_linear(hard):
    """A regular expression that backtracks may take minutes for one long sample. This test counts characters and calls,
    so it does not depend on a clock."""
    def work(n):
        """(characters read, calls of string methods, names of all functions written in C) for one scoring."""
        c_calls, text = [], Counted(hard(n))
        problem, Counted.read, Counted.calls = parse("8*7-19"), 0, 0
        sys.setprofile(lambda frame, event, arg: c_calls.append(arg.__name__) if event == "c_call" else None)
        try:
            accuracy_reward(text, problem), format_reward(text)
        finally:
            sys.setprofile(None)
        return Counted.read / len(text), Counted.calls, set(c_calls)

    (share, calls, names), (share_2, calls_2, _) = work(500), work(1000)
    assert 0 < share_2 <= share * 1.01 + 0.01 and share_2 < 60 and calls_2 == calls
    assert not names & {"match", "fullmatch", "search", "findall", "finditer", "sub", "eval", "exec", "compile"}


def test_very_long_completions_get_nothing():
    """Without a cap, one sample could cost any amount of time. A cap that is off by one would refuse the longest
    completion that is allowed."""
    problem, frame = parse("8*7-19"), "<think>{}</think><answer>37</answer>"
    for extra, reward in ((0, 1.0), (1, 0.0), (10 * MAX_CHARS, 0.0)):
        completion = frame.format("x" * (MAX_CHARS - len(frame.format("")) + extra))
        assert accuracy_reward(completion, problem) == format_reward(completion) == reward


@pytest.mark.parametrize("text, expected", [
    ("8*7=54, wait, 8*7=56", True), ("Wait", True), ("WAIT!", True), ("but", True), ("let me check.", True),
    ("awaits", False), ("waiter", False), ("button", False), ("checked", False), ("8*7=56", False), ("", False)])
def test_reflection_counts_words(text, expected):
    """If substrings counted as words, every "about" would hold a "but"."""
    assert reflects(text) is expected


@pytest.mark.parametrize("completion, accuracy, well_formed", TABLE[::7] + [("<think>wait</think>", 0, 0)])
def test_rule_rewards_are_the_two_rewards(completion, accuracy, well_formed):
    """A task must use exactly the two rewards that are tested here, and reflection must earn nothing. Otherwise
    training would reward something that no test checks."""
    scores = rule_rewards(completion, parse("8*7-19"))
    assert scores == {"accuracy": accuracy, "format": well_formed, "reflection": float("wait" in completion)}
    assert list(scores) == ["accuracy", "format", "reflection"] and {type(v) for v in scores.values()} == {float}
