"""`deepkd report`: the report of a table, of what there is."""

from collections.abc import Sequence
from pathlib import Path

from .. import extensions
from ..terminal import Parser


def main(words: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    parser = Parser(
        "deepkd report",
        description="Write report.md, report.csv and report.html, which needs no other file, from the runs of a table.",
        examples=("output/glyphs100",),
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="where reproduce put a table")
    folder = parser.parse(words).folder
    extensions.load()  # users' own methods say what they weigh
    from ..study.report import report

    for path in report(folder):
        print(path)
    return 0
