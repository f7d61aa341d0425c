"""The table of the response styles that the base reads."""
import pytest

import styles
from data import arithmetic, countdown


@pytest.mark.parametrize("name, shares", [("arithmetic", arithmetic.STYLES), ("countdown", countdown.STYLES)])
def test_the_table_shows_every_style(name, shares):
    """The table must not leave out a response style, count another task's threads, or show shares that do not add
    up."""
    table = styles.style_table(styles.TASKS[name](), n=2000)
    header, line, *rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.split("\n")]
    assert [row[0] for row in rows] == list(shares)
    assert sum(float(row[1].rstrip("%")) for row in rows) == pytest.approx(100, abs=0.5)
    assert all(abs(float(row[1].rstrip("%")) / 100 - shares[row[0]]) < 0.04 for row in rows)
    assert len(header) == len(line) == 4 and "wait" in rows[-1][3]


def test_bad_input(capsys):
    """A misspelt task must not print another task's table, or end in a traceback."""
    for argv in (["chess"], ["arithmetic", "countdown"], ["--help"]):
        assert styles.main(argv) == 2
        printed = capsys.readouterr()
        assert printed.err.count("\n") == 1 and not printed.out
