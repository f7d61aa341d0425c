"""The files made from reasoning-gym's problems. The tests need experiments/requirements.txt, which CI has."""
import json
import re

import pytest

import chain_sum
from data.own import OwnCorpus, OwnProblems
from data.arithmetic import Arithmetic

pytest.importorskip("reasoning_gym")


def test_files_are_what_a_run_takes(tmp_path, monkeypatch):
    """A run must accept the files, the corpus must not contain a test problem, and the answers must be correct."""
    for name, n in {"PROBLEMS": 600, "TESTED": 100, "THREADS": 900}.items():
        monkeypatch.setattr(chain_sum, name, n)
    assert chain_sum.main([str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "problems.jsonl").read_text().splitlines()]
    assert len(rows) == len({row["prompt"] for row in rows}) == 600
    for row in rows:
        expression = re.search(r"problem: ([-+ 0-9]+) =$", row["prompt"])[1]
        assert eval(expression) == int(row["answer"]) and 1 <= len(re.findall("[-+]", expression)) <= 3
    problems = OwnProblems(Arithmetic(), str(tmp_path / "problems.jsonl"), 84, 38)
    assert len(problems.problems["test"]) == 100 and len(problems.problems["train"]) == 500 and len(problems.notes) == 1
    text = (tmp_path / "corpus.jsonl").read_text()
    assert not any(problem.question in text for problem in problems.problems["test"])
    assert sum(problem.question in text for problem in problems.problems["train"]) > 300
    threads = [json.loads(line)["text"] for line in text.splitlines()]
    assert len(threads) == 900 and all(re.match(r"User: State .* =\nAssistant: .", thread) for thread in threads)
    assert "900 documents" in OwnCorpus(problems, str(tmp_path / "corpus.jsonl"), 0.5).notes[-1]


def test_bad_input(tmp_path, capsys):
    """A missing or impossible folder must not end in a traceback, and no file may be overwritten."""
    (tmp_path / "file").write_text("precious")
    for args in ([], ["--out=x"], [str(tmp_path / "file")]):
        assert chain_sum.main(args) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert (tmp_path / "file").read_text() == "precious"
