"""Which method of a table won, by how much and how sure, in sentences: the first thing that a reader asks."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from ..shared import count
from .cells import Cell
from .formats import interval, mean_std, p_value
from .protocol import protocol
from .statistics import compare, summarise


def winner(cells: Sequence[Cell], number: str = "last") -> str:
    """Say which row of one pair has the highest mean, and how far it is above the next, by Welch's t-test."""
    ranked = _ranked(cells, number)
    if not ranked:
        return "No run counts yet."
    first, *others = ranked
    runs = count(len(first.records), "run")
    text = f"{first.method.label} is first with {mean_std(summarise(first.values(number)))} over {runs}"
    if not others:
        return f"{text}; no other row has runs."
    second = others[0]
    values, names = (first.values(number), second.values(number)), (first.method.label, second.method.label)
    if (gap := compare(*values, names)) is None:
        raise AssertionError("both have runs")
    verdict = f"no verdict: {gap.reason}" if gap.verdict is None else f"{gap.verdict} (p {p_value(gap.p or 0.0)})"
    return f"{text}. Before {second.method.label}, the next: {interval(gap)}, {verdict}."


def winners(pairs: Sequence[Sequence[Cell]], number: str = "last") -> str:
    """Say in how many pairs each row has the highest mean; of a single pair, what `winner` says."""
    if len(pairs) == 1:
        return winner(pairs[0], number)
    firsts = Counter(ranked[0].method.label for cells in pairs if (ranked := _ranked(cells, number)))
    if not firsts:
        return "No run counts yet."
    parts = [f"{label} in {times}" for label, times in firsts.most_common()]
    return f"First of {count(firsts.total(), 'pair')}: {', '.join(parts)}."


def facts(cell: Cell) -> list[tuple[str, str]]:
    """List what is to be known of a cell's number: its runs, their seeds and their protocol."""
    seeds = ", ".join(str(record.run.seed) for record in cell.records) or "none yet"
    told = [("n", f"{len(cell.records)} of {count(len(cell.planned), 'run')}"), ("Seeds", seeds)]
    return told + [(what, "; ".join(answers)) for what, answers in protocol([cell]) if not what.startswith("Seeds")]


def _ranked(cells: Sequence[Cell], number: str) -> list[Cell]:
    """Sort the cells that have runs by their mean, the highest first."""
    return sorted((cell for cell in cells if cell.records), key=lambda cell: -float(np.mean(cell.values(number))))
