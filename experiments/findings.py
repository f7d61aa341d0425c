"""The findings: claims about DeepSeek-R1 and GRPO, measured at toy scale. Controls could refute them.

    python experiments/findings.py                    trains the missing cells, and renews the tables
    python experiments/findings.py --only=7           one finding
    python experiments/findings.py --only=variants    docs/variants.md
    python experiments/findings.py --jobs=4           four trainings at a time (default: one for each core)
    python experiments/findings.py --figure           draws experiments/variants.png from the stored results

cells.py has the cells, which are the runs, and tables.py the tables. To resume an interrupted run, repeat the command.

The sentences of the pages, claims and bars included, are written by hand. Their tables stand between the marks
`<!-- NAME -->` and `<!-- end -->`. They are made from the stored results alone.
"""
import argparse
import os
import re
import sys
from pathlib import Path

from cells import CELLS, REGIMES, ROOT, SEEDS, Cell, run_cells, stored

from engine.arguments import Parser, number
from engine.files import write_file
from engine.terminal import UsageError
from tables import FINDINGS, Known, table, variants_table
from variants import VARIANTS

PAGE, VARIANTS_PAGE = ROOT / "experiments/findings.md", ROOT / "docs/variants.md"
CELLS_OF = {str(n): finding.cells for n, finding in FINDINGS.items()} | {
    "variants": tuple(f"{regime} {name}" for regime in REGIMES for name in VARIANTS)}


def known() -> Known:
    """The cells that are stored for all seeds."""
    found = {name: [stored(name, seed) for seed in SEEDS] for name in CELLS}
    return Known({name: cells for name, cells in found.items() if None not in cells})


def minutes(k: Known, cells: tuple[str, ...]) -> float:
    """The minutes of training and evaluation of these cells, one after another."""
    return sum(sum(k.values(cell, "seconds")) for cell in cells) / 60


def shown(cell: Cell) -> list[str]:
    """A cell's commands, without the --stage flags."""
    commands = [[part for part in command if not part.startswith("--")] for command in cell.commands()]
    return list(dict.fromkeys(" ".join(["python", *command, *cell.all_flags()]) for command in commands))


def complete(k: Known, key: str) -> bool:
    """Whether all cells of a finding, or of the variants, are stored. If not, say which are missing."""
    missing = [cell for cell in CELLS_OF[key] if cell not in k.cells]
    if missing:
        name = key if key == "variants" else f"finding {key}"
        print(f"{name}: left out, because these have not been run: {', '.join(missing)}")
    return not missing


def sections(text: str) -> dict[int, tuple[str, str]]:
    """The claim and the bar of each section of findings.md: its heading, and the paragraph below it.

    >>> sections("## 2. Votes help\\n\\n**Bar:** One point\\nor more.\\n\\nText")
    {2: ('Votes help', 'One point or more')}
    """
    found = re.findall(r"^## (\d+)\. (.+)\n\n\*\*Bar:\*\* ([^*]+)\.\n\n", text, re.MULTILINE)
    return {int(n): (claim, bar.replace("\n", " ")) for n, claim, bar in found}


def blocks(k: Known) -> dict[str, list[str]]:
    """The tables of findings.md by their names, for the findings whose cells are all stored."""
    found, rows, written = {}, [], sections(PAGE.read_text(encoding="utf-8"))
    for n, finding in FINDINGS.items():
        if not complete(k, str(n)):
            continue
        if n not in written:
            raise UsageError(f"{PAGE.name} has no section {n} with a claim and a **Bar:**")
        measured, holds, tables = finding.measure(k)
        rows.append([n, *written[n], measured, "**holds**" if holds else "**does not hold**"])
        found |= tables
        starts = [CELLS[cell].start for cell in finding.cells if CELLS[cell].start]
        cells = tuple(dict.fromkeys([*starts, *finding.cells]))  # with the runs that others start from
        found[f"{n} runs"] = [
            "", f"`python experiments/findings.py --only={n}` takes {minutes(k, cells):.0f} minutes of one thread, "
            "for these runs with seeds 0, 1 and 2:", "",
            *(f"    {line}" for cell in cells for line in shown(CELLS[cell])), ""]
    machines = {"{device}, {dtype}".format(**cell["machine"]) for cells in k.cells.values() for cell in cells}
    found["summary"] = [*table(["#", "claim", "bar", "measured", "verdict"], rows),
                        f"All runs together took {minutes(k, tuple(k.cells)) / 60:.1f} hours of training and "
                        f"evaluation on one thread ({' and '.join(sorted(machines))}).", ""]
    return found


def blocks_of_variants(k: Known) -> dict[str, list[str]]:
    """The tables of docs/variants.md by their names."""
    return {regime: variants_table(k, regime) for regime in REGIMES} if complete(k, "variants") else {}


def renewed(path: Path, blocks: dict[str, list[str]]) -> str:
    """The text of a page with new tables. Raises UsageError if a mark is missing."""
    text = path.read_text(encoding="utf-8")
    for name, lines in blocks.items():
        start, end = f"<!-- {name} -->\n", "<!-- end -->\n"
        before, mark, rest = text.partition(start)
        if not mark or end not in rest:
            raise UsageError(f"{path.name} lacks the mark {start.strip()} or its {end.strip()}")
        text = before + start + "\n".join(lines) + "\n" + end + rest.partition(end)[2]
    return text


def pages(k: Known) -> dict[Path, str]:
    """The pages with the tables of the stored cells."""
    return {PAGE: renewed(PAGE, blocks(k)), VARIANTS_PAGE: renewed(VARIANTS_PAGE, blocks_of_variants(k))}


def main(argv: list[str]) -> int:
    """Run the command line -> exit code."""
    parser = Parser(prog="findings.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False)
    parser.add_argument("--only", choices=CELLS_OF, help="one finding, or the variants")
    parser.add_argument("--jobs", type=number(int, None, None), default=os.cpu_count() or 1, help="trainings at a time")
    parser.add_argument("--figure", action="store_true", help="draw experiments/variants.png, and train nothing")
    try:
        options = parser.parse_args(argv)
        if options.figure:
            k = known()
            if not complete(k, "variants"):
                return 2
            from plot import draw_variants  # matplotlib is needed for this alone
            curves = {name: {regime: k.values(f"{regime} {name}", "rows", "zero", "heldout_accuracy")
                             for regime in REGIMES} for name in VARIANTS}
            draw_variants(curves, ROOT / "experiments/variants.png")
            return 0
        asked = CELLS_OF[options.only] if options.only else CELLS
        run_cells([name for name in CELLS if name in asked], options.jobs)
        for path, text in pages(known()).items():
            write_file(path, text.encode())
            print(f"wrote {path.relative_to(ROOT)}")
        return 0
    except (UsageError, OSError) as error:
        print(f"findings.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nfindings.py: interrupted; the same command goes on from there", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
