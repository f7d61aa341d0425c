"""The layout: who imports whom, how long a file and a function may be, and what a row of the log holds."""
import ast
import re

import pytest

from tests.conftest import ROOT, rows

# {model, rewards, data} <- grpo <- distill <- engine <- train <- {r1, experiments}
BELOW = {
    "model": set(), "rewards": set(), "data": {"data", "rewards"}, "grpo": {"model", "rewards", "data"},
    "distill": {"model", "rewards", "data", "grpo"},
    "engine": {"model", "rewards", "data", "grpo", "distill", "engine"},
    "train": {"model", "rewards", "data", "grpo", "distill", "engine"},
    "r1": {"model", "rewards", "data", "grpo", "distill", "engine", "train"},
    "experiments": {"model", "rewards", "data", "grpo", "distill", "engine", "train", "r1", "experiments"},
}
SOURCES = sorted(path for path in ROOT.rglob("*.py")
                 if path.relative_to(ROOT).parts[0].removesuffix(".py") in BELOW)
EXPERIMENTS = {path.stem for path in ROOT.glob("experiments/*.py")}  # which import each other by these names


def part_of(path):
    """The part of the project that a file belongs to: its folder, or its own name."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path):
    """The names that a file imports, anywhere in it -> [(the module, the name that is taken from it, or "")]."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative imports would be missed here"
            found += [(node.module, alias.name) for alias in node.names]
    return found


def test_the_files_are_found():
    """A test of all files that reads none."""
    names = {str(path.relative_to(ROOT)) for path in SOURCES}
    assert {"model.py", "rewards.py", "grpo.py", "distill.py", "train.py", "r1.py", "data/corpus.py", "engine/loop.py",
            "engine/speed/fast.py", "engine/pretrained/bpe.py", "experiments/controls.py"} <= names
    assert {part_of(path) for path in SOURCES} == set(BELOW)
    assert ("engine.loop", "Run") in imports(ROOT / "train.py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_down_only(path):
    """A file of the algorithm that cannot be copied without engine/, or an engine that knows one program only."""
    for module, name in imports(path):
        part = module.partition(".")[0]
        if part in EXPERIMENTS - set(BELOW):
            part = "experiments"
        if part in BELOW:
            assert part in BELOW[part_of(path)], f"{path.name} imports {module} {name}"
        assert part != "tests", f"{path.name} imports a test"


def test_train_takes_few_names_of_the_engine():
    """A train.py that is about the engine."""
    taken = [(module, name) for module, name in imports(ROOT / "train.py") if module.partition(".")[0] == "engine"]
    assert 0 < len(taken) <= 12, taken


@pytest.mark.parametrize("path", [path for path in SOURCES if part_of(path) != "experiments"],
                         ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    """A room of the engine that nobody reads to its end, or a function that does not fit a screen."""
    text = path.read_text(encoding="utf-8")
    if part_of(path) == "engine":
        assert len(text.splitlines()) <= 200
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno + 1 <= 50, node.name


# The pages

PAGES = sorted(path for path in (ROOT / "README.md", *ROOT.glob("docs/*"), *ROOT.glob("experiments/*.md"))
               if path.suffix in (".md", ".ipynb"))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files(path):
    """A file is renamed, and a page still links to it by its old name."""
    links = re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8"))
    assert links or path.suffix == ".ipynb"
    for link in links:
        assert link.startswith("https://") or (path.parent / link).exists(), link


def test_the_readme_counts_the_lines():
    """A README of many screens, or one that promises short files and states the lengths that they once had."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    table = re.findall(r"^\| (`[^|]+) \| (\d+) \|", text, re.MULTILINE)
    assert len(table) == 6
    for names, n_lines in table:
        files = [ROOT / name for name in re.findall("`(.+?)`", names)]
        lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)
        assert abs(lines - int(n_lines)) <= 10, (names, lines)


# The log

EVERY = {"stage", "step", "seconds", "loss", "grad_norm", "tokens_per_s"}
SCORES = {"reward", "accuracy", "format", "reflection", "length", "length_wrong", "truncated", "entropy"}
FIELDS = {
    "base": EVERY, "student_base": EVERY,
    "zero": EVERY | SCORES | {"ratio", "kl", "clip_fraction_low", "clip_fraction_high", "sampler_gap", "no_signal"},
    "student": EVERY | SCORES | {"accepted"},
}


def test_a_row_of_the_log_has_every_field(quick):
    """A figure that the docs explain, and that some rows lack: whoever plots it meets a KeyError, or a shorter line."""
    for name, fields in FIELDS.items():
        logged = [row for row in rows(quick) if row["stage"] == name]
        for row in logged:
            heldout = {"heldout_loss"} if name in ("base", "student_base") and row is logged[-1] else set()
            assert row.keys() == fields | heldout, (name, row["step"])
        assert [row["step"] for row in logged] == list(range(1, len(logged) + 1))
    computed = [row for row in rows(quick) if row["stage"] == "zero" and row["no_signal"] < 1]
    assert computed and not any(value is None for row in computed for value in row.values())
