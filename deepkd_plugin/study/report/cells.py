"""A table's cells with their numbers and comparisons: what report.md, report.csv and the page all show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from ..measures import CLASSIFICATION, MEASURES, Measures
from ..table import Method, Pair, Run
from . import published
from .collect import Record, Table
from .formats import CONFIDENCE, interval, signed
from .published import Published
from .statistics import (
    EQUAL,
    HIGHER,
    LEVEL,
    LOWER,
    Difference,
    Summary,
    compare,
    compare_published,
    holm,
    summarise,
)

NUMBERS = {"last": "last epoch", "best": "best of all epochs, chosen on the test images"}
"""The two numbers of a run. The last epoch's is the main one: it needs no look at the test images."""


def number_name(number: str, measures: Measures) -> str:
    """What one of NUMBERS is called in a table whose runs measure these."""
    return NUMBERS[number].replace("epoch", measures.step)


@dataclass(frozen=True)
class Number:
    """One of a cell's two numbers over its runs: against the published value, and against its base.

    further: the other measures of the same epochs, by name.
    """

    summary: Summary
    minus_published: Difference | None
    gain: Difference | None
    holm_p: float | None = None
    further: dict[str, Summary] = field(default_factory=dict)

    @property
    def after_holm(self) -> str | None:
        """The verdict by Holm's p value."""
        if self.holm_p is None or self.gain is None:
            return None
        return self.gain.verdict if self.holm_p < 1 - LEVEL else EQUAL


@dataclass(frozen=True)
class Cell:
    """A pair and a method: its runs that count, how many are planned, its numbers and the published one.

    published_gain: the published value minus the base's; None where either is missing or not comparable.
    """

    pair: Pair
    method: Method
    base: Method | None
    planned: tuple[Run, ...]
    records: tuple[Record, ...]
    published: Published | None
    base_published: Published | None
    numbers: dict[str, Number]
    measures: Measures = MEASURES[CLASSIFICATION]

    @property
    def published_gain(self) -> float | None:
        if self.published is None or self.base_published is None:
            return None
        ours, base = self.published, self.base_published
        if ours.value is None or base.value is None or not (ours.comparable and base.comparable):
            return None
        return ours.value - base.value


def assemble(table: Table) -> list[Cell]:
    """The cells of every pair and method that is planned, pair by pair in the plan's order."""
    methods = {method.name: method for method in table.methods}
    found: dict[tuple[str, str], Cell] = {}
    for pair in table.pairs:
        for method in table.methods:
            runs = tuple(run for run in table.runs if (run.pair, run.method) == (pair.name, method.name))
            if not runs:
                continue
            keys = [(run.pair, run.method, run.seed) for run in runs]
            records = tuple(table.records[key] for key in keys if key in table.records)
            settings = records[0].settings if records else None
            names = (table.dataset, table.metric, pair.teacher, pair.student, method.name)
            found[pair.name, method.name] = Cell(
                pair=pair,
                method=method,
                base=methods.get(method.base),
                planned=runs,
                records=records,
                published=published.find(*names, settings, table.options),
                base_published=None,
                numbers={},
                measures=table.measures,
            )
    cells = [_compare(cell, found.get((cell.pair.name, cell.method.base))) for cell in found.values()]
    return _correct(cells)


def _compare(cell: Cell, base: Cell | None) -> Cell:
    numbers = {}
    for name in NUMBERS:
        values = [getattr(record, name) for record in cell.records]
        held = cell.published
        known = held is not None and held.value is not None and held.comparable
        gain = None
        if base is not None:
            others = [getattr(record, name) for record in base.records]
            gain = compare(values, others, (cell.method.label, base.method.label))
        minus = compare_published(values, held.value) if known else None
        further = {
            other: summarise([record.further[name][other] for record in cell.records])
            for other in cell.measures.further
        }
        numbers[name] = Number(summarise(values), minus, gain, further=further)
    return replace(cell, numbers=numbers, base_published=base.published if base is not None else None)


def _correct(cells: list[Cell]) -> list[Cell]:
    """The cells with Holm's p values, over all of a table's comparisons of the same number."""
    adjusted = {
        name: holm([cell.numbers[name].gain and cell.numbers[name].gain.p for cell in cells])
        for name in NUMBERS
    }
    return [
        replace(
            cell,
            numbers={name: replace(held, holm_p=adjusted[name][i]) for name, held in cell.numbers.items()},
        )
        for i, cell in enumerate(cells)
    ]


def comparisons(cells: Iterable[Cell], number: str) -> int:
    """How many comparisons Holm's correction is over."""
    return sum(cell.numbers[number].holm_p is not None for cell in cells)


def by_base(cells: Iterable[Cell]) -> dict[str, list[Cell]]:
    """The cells with a base, under a heading for each base; a single method over it is named in the heading."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.base is not None:
            groups.setdefault(cell.base.name, []).append(cell)
    named = {}
    for group in groups.values():
        methods = dict.fromkeys(cell.method.label for cell in group)
        over = f"over {group[0].base.label}"
        named[f"{next(iter(methods))} {over}" if len(methods) == 1 else f"Gain {over}"] = group
    return named


def headline(group: Sequence[Cell], number: str = "last") -> str:
    """What the comparisons of one base come to, in a sentence without its subject."""
    held = [cell.numbers[number] for cell in group]
    judged = [one for one in held if one.gain is not None and one.gain.verdict is not None]
    without = len(held) - len(judged)
    if not judged:
        if len(held) > 1:
            return f"no verdict yet in any of {len(held)} comparisons"
        return f"no verdict yet: {held[0].gain.reason if held[0].gain else 'one of them has no runs'}"
    count = Counter(one.gain.verdict for one in judged)
    parts = [f"{verdict} in {count[verdict]}" for verdict in (HIGHER, LOWER, EQUAL) if count[verdict]]
    gains = [one.gain.value for one in judged]
    clear = [one for one in judged if one.gain.verdict != EQUAL]
    stay = sum(one.after_holm != EQUAL for one in clear)
    if len(judged) > 1:
        text = f"{', '.join(parts)} of {len(judged)} comparisons"
        text += f"; gain {signed(min(gains))} to {signed(max(gains))}"
        text += f"; {stay} of {len(clear)} also after Holm's correction" if clear else ""
    else:
        text = f"{judged[0].gain.verdict}; gain {interval(judged[0].gain)}"
        text += f"; {'also' if stay else 'not'} after Holm's correction" if clear else ""
    return text + (f"; {without} without a verdict" if without else "")


def agreement(cells: Iterable[Cell], number: str = "last") -> str:
    """How the published values lie to our intervals, in a sentence; "" where there is none to compare."""
    held = [cell.numbers[number].minus_published for cell in cells]
    held = [one for one in held if one is not None and one.low is not None]
    if not held:
        return ""
    inside = sum(one.low <= 0 <= one.high for one in held)
    values = [one.value for one in held]
    spread = signed(values[0]) if len(held) == 1 else f"{signed(min(values))} to {signed(max(values))}"
    return (
        f"{inside} of {len(held)} published values lie in the {CONFIDENCE} interval of our mean "
        f"(ours minus published: {spread})"
    )
