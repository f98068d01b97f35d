"""A table's cells with their numbers and comparisons, which report.md, report.csv and the page all show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from ..measures import CLASSIFICATION, MEASURES, Measures
from ..table import Method, Pair, Run
from . import published
from .collect import Record, Results
from .formats import CONFIDENCE, interval, span
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
    """Return what one of NUMBERS is called in a table whose runs measure these."""
    return NUMBERS[number].replace("epoch", measures.step)


@dataclass(frozen=True)
class Number:
    """One of a cell's two numbers over its runs, compared with the published value and with its base.

    further: the other measures of the same epochs, by name.
    """

    summary: Summary
    minus_published: Difference | None
    gain: Difference | None
    holm_p: float | None = None
    further: dict[str, Summary] = field(default_factory=dict)

    @property
    def after_holm(self) -> str | None:
        """The verdict by Holm's p value; None if there is none."""
        if self.holm_p is None or self.gain is None:
            return None
        return self.gain.verdict if self.holm_p < 1 - LEVEL else EQUAL


@dataclass(frozen=True)
class Cell:
    """A pair and a method: its runs that count, how many are planned, its numbers and the published one.

    published_gain: the published value minus the base's; None if either is missing or not comparable.
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


def assemble(table: Results) -> list[Cell]:
    """Make the cells of every planned pair and method, pair by pair in the plan's order."""
    methods = {method.name: method for method in table.methods}
    cells: dict[tuple[str, str | None], Cell] = {}
    for pair in table.pairs:
        for method in table.methods:
            runs = tuple(run for run in table.runs if (run.pair, run.method) == (pair.name, method.name))
            if not runs:
                continue
            keys = [(run.pair, run.method, run.seed) for run in runs]
            records = tuple(table.records[key] for key in keys if key in table.records)
            settings = records[0].settings if records else None
            names = (table.dataset, table.metric, pair.teacher, pair.student, method.name)
            cells[pair.name, method.name] = Cell(
                pair=pair,
                method=method,
                base=methods.get(method.base or ""),
                planned=runs,
                records=records,
                published=published.find(*names, settings, table.options),
                base_published=None,
                numbers={},
                measures=table.measures,
            )
    return _correct(
        [_compare(cell, cells.get((cell.pair.name, cell.method.base))) for cell in cells.values()]
    )


def _compare(cell: Cell, base: Cell | None) -> Cell:
    """Return the cell with its numbers, compared with the published value and with its base."""
    numbers = {}
    for name in NUMBERS:
        values = [getattr(record, name) for record in cell.records]
        gain = minus = None
        if base is not None:
            others = [getattr(record, name) for record in base.records]
            gain = compare(values, others, (cell.method.label, base.method.label))
        if cell.published is not None and cell.published.value is not None and cell.published.comparable:
            minus = compare_published(values, cell.published.value)
        further = {
            other: summarise([record.further[name][other] for record in cell.records])
            for other in cell.measures.further
        }
        numbers[name] = Number(summarise(values), minus, gain, further=further)
    return replace(cell, numbers=numbers, base_published=base.published if base is not None else None)


def _correct(cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells with Holm's p values, over all of a table's comparisons of the same number."""
    gains = {name: [cell.numbers[name].gain for cell in cells] for name in NUMBERS}
    adjusted = {name: holm([gain.p if gain else None for gain in gains[name]]) for name in NUMBERS}
    return [
        replace(
            cell,
            numbers={
                name: replace(number, holm_p=adjusted[name][i]) for name, number in cell.numbers.items()
            },
        )
        for i, cell in enumerate(cells)
    ]


def comparisons(cells: Iterable[Cell], number: str) -> int:
    """Count the comparisons that Holm's correction is over."""
    return sum(cell.numbers[number].holm_p is not None for cell in cells)


def by_base(cells: Iterable[Cell]) -> dict[str, list[Cell]]:
    """Group the cells by their base, under headings; the heading names a method that is alone over its base."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.base is not None:
            groups.setdefault(cell.base.label, []).append(cell)
    named = {}
    for base, group in groups.items():
        methods = {cell.method.label for cell in group}
        named[f"{methods.pop() if len(methods) == 1 else 'Gain'} over {base}"] = group
    return named


def headline(group: Sequence[Cell], number: str = "last") -> str:
    """Say what the comparisons of one base come to, in a sentence without its subject."""
    numbers = [cell.numbers[number] for cell in group]
    judged = [(one.gain, one.after_holm) for one in numbers if one.gain and one.gain.verdict is not None]
    if not judged:
        if len(numbers) > 1:
            return f"no verdict yet in any of {len(numbers)} comparisons"
        return f"no verdict yet: {numbers[0].gain.reason if numbers[0].gain else 'one of them has no runs'}"
    clear = [after_holm for gain, after_holm in judged if gain.verdict != EQUAL]
    stay = sum(verdict != EQUAL for verdict in clear)
    if len(judged) > 1:
        verdicts = Counter(gain.verdict for gain, _ in judged)
        parts = [
            f"{verdict} in {verdicts[verdict]}" for verdict in (HIGHER, LOWER, EQUAL) if verdicts[verdict]
        ]
        text = f"{', '.join(parts)} of {len(judged)} comparisons; gain {span([gain.value for gain, _ in judged])}"
        text += f"; {stay} of {len(clear)} also after Holm's correction" if clear else ""
    else:
        gain = judged[0][0]
        text = f"{gain.verdict}; gain {interval(gain)}"
        text += f"; {'also' if stay else 'not'} after Holm's correction" if clear else ""
    without = len(numbers) - len(judged)
    return text + (f"; {without} without a verdict" if without else "")


def agreement(cells: Iterable[Cell], number: str = "last") -> str:
    """Say in a sentence how far our means are from the published values; "" if there is none to compare."""
    differences = [cell.numbers[number].minus_published for cell in cells]
    ends = [(one.value, one.low, one.high) for one in differences if one and one.low is not None]
    if not ends:
        return ""
    inside = sum(low <= 0 <= high for _, low, high in ends)
    return (
        f"{inside} of {len(ends)} published values lie in the {CONFIDENCE} interval of our mean "
        f"(ours minus published: {span([value for value, *_ in ends])})"
    )
