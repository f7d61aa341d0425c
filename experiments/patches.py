"""Patches: functions of the project are replaced while tests run, and put back at the end.

    patch = without("grpo", "group_advantages")                 the function without its body
    run_tests(["tests/test_grpo.py"], [patch], "advantages")    {test: "" or the name of its exception}

tests/test_exercises.py proves the exercises of docs/exercises.md with it.
"""
import ast
import contextlib
import importlib
import inspect
import io
import sys
import textwrap
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def patched(patches) -> Iterator[None]:
    """Replace functions by others, as (module or class, name, other function). At the end they are put back."""
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in patches]
    try:
        swap(patches)
        yield
    finally:
        swap(originals)


def swap(patches) -> None:
    """Replace functions where they are defined, and in all modules of the project that have imported them. (A test that
    says `from grpo import make_batch` has a name of its own for it. test_sampler.py has functions in a dict.) This
    module is left out."""
    for owner, name, new in patches:
        old = getattr(owner, name)
        setattr(owner, name, new)
        for module in list(sys.modules.values()):
            path = getattr(module, "__file__", None) or ""
            if not path.startswith(str(ROOT)) or path == __file__:
                continue
            dicts = [value for key, value in vars(module).items() if type(value) is dict and key != "__builtins__"]
            for names in [vars(module), *dicts]:
                names.update({key: new for key, value in names.items() if value is old})


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


class Outcomes:
    """A plugin of pytest. It puts patches in when the tests have been imported, and takes them out at the end. For each
    test that ran it keeps "" if the test passed, or else the name of its exception."""

    def __init__(self, patches):
        self.patches, self.undo, self.found = patches, contextlib.ExitStack(), {}

    def pytest_collection_finish(self, session):
        self.undo.enter_context(patched(self.patches))

    def pytest_runtest_logreport(self, report):
        if report.when == "call" and report.passed:
            self.found[report.nodeid] = ""

    def pytest_exception_interact(self, node, call, report):
        self.found[report.nodeid] = call.excinfo.typename

    def pytest_sessionfinish(self, session):
        self.undo.close()


def run_tests(tests, patches=(), keyword: str = "") -> dict[str, str]:
    """Run tests ("tests/test_grpo.py::test_bandit", ...) in this process, with patches -> see Outcomes. With a keyword
    (-k of pytest), only those that it selects."""
    import pytest
    plugin = Outcomes(patches)
    options = ["--quiet", "--tb=native", f"--rootdir={ROOT}", f"--config-file={ROOT / 'pytest.ini'}", "-k", keyword,
               "--override-ini=addopts=", "-p", "no:cacheprovider", "-p", "no:faulthandler"]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            pytest.main([*options, *(str(ROOT / test) for test in dict.fromkeys(tests))], plugins=[plugin])
    finally:
        plugin.undo.close()
    return plugin.found
