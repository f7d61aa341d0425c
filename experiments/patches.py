"""Patches: functions of the project are replaced while tests run, and put back at the end.

    with patched([(grpo, "group_advantages", other)]): ..
    run_tests(["tests/test_grpo.py"], [(grpo, "group_advantages", other)], "advantages")    {test: "" or its exception}
"""
import contextlib
import io
import sys
from collections.abc import Iterator
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
