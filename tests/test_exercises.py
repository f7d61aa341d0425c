"""The exercises of docs/exercises.md: without the lines that a reader deletes, the tests fail. With them, they pass."""
import ast
import importlib
import inspect
import re
import shlex
import textwrap
from operator import attrgetter

import pytest

from patches import run_tests
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "exercises.md").read_text(encoding="utf-8")
SECTIONS = re.split(r"^## ", PAGE.split("\n## Six questions")[0], flags=re.MULTILINE)[1:]
SHAPE = re.compile(r"(\d+)\. [^`\n]+: `([\w.]+)`\n\n\*\*Delete\*\* (.+?)\.\n\n\*\*Read first\*\* .+?\n\n<details>"
                   r"<summary>Hint 1<.+?</details>\n<details><summary>Hint 2<.+?</details>\n\n```sh\n(.+?)\n```\n+",
                   re.DOTALL)


def without(module: str, name: str, first: str = "", last: str = "") -> tuple:
    """A patch that deletes statements from a function or method: ("model", "GPT.generate", "length +=", "if ended") ->
    (owner, name, the function without them).

    They are the statements from the one that begins with `first` to the one that begins with `last`; by default all but
    the docstring. Raises ValueError if a beginning does not occur exactly once. So a change of the code is noticed.
    """
    home = importlib.import_module(module)
    source = textwrap.dedent(inspect.getsource(attrgetter(name)(home)))
    function, lines, namespace = ast.parse(source).body[0], source.splitlines(), {}

    def statement(beginning: str) -> ast.stmt:
        found = [node for node in ast.walk(function) if isinstance(node, ast.stmt)
                 and lines[node.lineno - 1].strip().startswith(beginning)]
        if len(found) != 1:
            raise ValueError(f"{module}.{name} has {len(found)} statements that begin with {beginning!r}, not one")
        return found[0]

    start = statement(first).lineno if first else function.body[1].lineno
    end = statement(last or first).end_lineno if first else function.end_lineno
    exec("\n".join(lines[:start - 1] + lines[end:]), vars(home), namespace)  # its globals are those of its module
    owner, _, last_name = name.rpartition(".")
    return attrgetter(owner)(home) if owner else home, last_name, namespace[last_name]


def lines_of(deleted):
    """What "Delete" says -> the beginnings of the first and the last statement, for `without`."""
    if deleted == "the body":
        return "", ""
    found = re.fullmatch(r"from `(.+)` to `(.+)`|the statement that begins with `(.+?)`(, which .+)?", deleted)
    return found[1] or found[3], found[2] or ""


def exercise(section):
    """A section of the page -> (module, function, the deleted lines, files with tests, the keyword of -k)."""
    number, name, deleted, command = SHAPE.fullmatch(section).groups()
    module, function = re.fullmatch(r"((?:engine\.)?\w+)\.(.+)", name).groups()
    *start, _, keyword = shlex.split(command)
    assert start[:3] == ["python", "-m", "pytest"] and len(start) > 3
    return module, function, lines_of(deleted), start[3:], keyword


def test_there_are_twelve():
    """An exercise that does not have the shape of the others would not be tested below."""
    assert [section.partition(".")[0] for section in SECTIONS] == [str(n) for n in range(1, 13)]
    assert all(SHAPE.fullmatch(section) for section in SECTIONS)


@pytest.fixture(scope="module")
def complete():
    """The outcomes of the tests of all exercises with the lines."""
    exercises = [exercise(section) for section in SECTIONS]
    return run_tests(sum((files for *_, files, _ in exercises), []), keyword=" or ".join(e[-1] for e in exercises))


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.partition("`")[2].partition("`")[0])
def test_an_exercise_can_be_done(complete, section):
    """Tests that pass without the deleted lines would tell a reader nothing. Neither would tests that fail with them,
    or a command that runs no test."""
    module, function, lines, files, keyword = exercise(section)
    owner, name, deleted = patch = without(module, function, *lines)
    found = run_tests(files, [patch], keyword)
    assert found and not any(complete[test] for test in found)
    for test in {test.partition("[")[0] for test in found}:
        assert any(error for case, error in found.items() if case.partition("[")[0] == test), f"{test} passes"
    for part in keyword.split(" or "):
        assert any(part in test for test in found), f"{part} selects no test"
    assert getattr(owner, name) is not deleted, "the lines are there again"


def test_the_questions():
    """Each file with an exercise, and train.py, has one question with a command."""
    questions = re.split(r"^### ", PAGE.split("\n## Six questions")[1], flags=re.MULTILINE)[1:]
    files = {re.match(r"`([\w/]+\.py)`", question)[1] for question in questions}
    modules = {exercise(section)[0].replace(".", "/") + ".py" for section in SECTIONS}
    assert len(questions) == 6 and files == modules | {"train.py"}
    assert all(question.count("```sh") == 1 for question in questions)
