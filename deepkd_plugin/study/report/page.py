"""report.md and report.html, a page that holds everything, opens from disk, needs no network and no script."""

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..table import Pair
from .cells import NUMBERS, Cell, agreement, by_base, headline, number_name
from .collect import Results
from .columns import columns, title, verdict
from .figures import LINES, curves, dot_plot
from .formats import CONFIDENCE, interval, paired, signed
from .notes import left_out, notes, others, published_without_pair, what_was_run
from .protocol import cautions, protocol
from .statistics import EQUAL, HIGHER, LOWER
from .winners import facts, winner, winners

SIGNS = {HIGHER: "▲\u00a0", LOWER: "▼\u00a0", EQUAL: "≈\u00a0"}
"""Before a verdict, for those who do not see its colour; a screen reader reads the word."""


def page(table: Results, cells: Sequence[Cell]) -> str:
    """Write the whole page of a table."""
    return _HTML.get_template("page.html").render(table=table, cells=cells, pairs=_pairs(table, cells))


def markdown(table: Results, cells: Sequence[Cell]) -> str:
    """Write the report as Markdown."""
    return _MARKDOWN.get_template("report.md").render(table=table, cells=cells, pairs=_pairs(table, cells))


def plain(text: str) -> str:
    """Write text as Markdown takes it literally, in one line and with ordinary spaces."""
    for sign in "\\`*_[]<>|":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())


def _pairs(table: Results, cells: Sequence[Cell]) -> list[tuple[Pair, list[Cell]]]:
    """Group the cells by their pair, in the plan's order."""
    return [(pair, some) for pair in table.pairs if (some := [cell for cell in cells if cell.pair is pair])]


def compared(cells: Sequence[Cell]) -> dict[str, list[tuple[str, Cell]]]:
    """Name the cells with a base, under a heading for each base: by what the heading and the table leave open."""
    groups = by_base(cells)
    pairs = len({cell.pair.name for group in groups.values() for cell in group}) > 1
    named = {}
    for heading, group in groups.items():
        methods = len({cell.method.name for cell in group}) > 1
        named[heading] = [
            (", ".join([cell.method.label] * methods + [cell.pair.label] * (pairs or not methods)), cell)
            for cell in group
        ]
    return named


def panels(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Group the cells that share a panel of curves: a base with the methods over it, as many as can be told apart."""
    groups: dict[str, list[Cell]] = {}
    bases = {cell.base.name for cell in cells if cell.base is not None}
    most = len(LINES)
    for base in cells:
        over = [cell for cell in cells if cell.base is not None and cell.base.name == base.method.name]
        for i in range(0, len(over), most - 1):
            some = over[i : i + most - 1]
            what = some[0].method.label if len(some) == 1 else f"{len(some)} rows over it"
            part = f", part {i // (most - 1) + 1}" if len(over) >= most else ""
            groups[f"{base.method.label} and {what}{part}"] = [base, *some]
    alone = [cell for cell in cells if cell.base is None and cell.method.name not in bases]
    for length in dict.fromkeys(cell.planned[0].epochs for cell in alone):
        alike = [cell for cell in alone if cell.planned[0].epochs == length]
        for i in range(0, len(alike), most):
            some = alike[i : i + most]
            groups[", ".join(cell.method.label for cell in some)] = some
    return groups


_HTML = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_HTML.globals |= {"CONFIDENCE": CONFIDENCE, "NUMBERS": NUMBERS, "SIGNS": SIGNS}
_HTML.globals |= {
    function.__name__: function
    for function in (
        *(agreement, by_base, cautions, columns, compared, curves, dot_plot, headline, interval),
        *(left_out, notes, number_name, others, paired, panels, protocol, published_without_pair, signed, title),
        *(facts, verdict, what_was_run, winner, winners),
    )
}
_MARKDOWN = _HTML.overlay(autoescape=False, finalize=plain)
