"""A table's cells with their numbers and comparisons, which report.md, report.csv and the page all show."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from ..measures import Measures
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
    compare_paired,
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

    paired: the gain seed by seed, None if the base has other seeds. further: the other measures of the same epochs, by
    name.
    """

    summary: Summary
    minus_published: Difference | None
    gain: Difference | None
    paired: Difference | None
    holm_p: float | None
    further: dict[str, Summary]

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
    measures: Measures
    base_published: Published | None = None
    numbers: dict[str, Number] = field(default_factory=dict)

    @property
    def published_gain(self) -> float | None:
        known = (self.published, self.base_published)
        ours, base = (one.comparable_value if one else None for one in known)
        return None if ours is None or base is None else ours - base

    def values(self, number: str) -> list[float]:
        """List one of NUMBERS of each run."""
        return list(self.by_seed(number).values())

    def by_seed(self, number: str) -> dict[int, float]:
        """Gather one of NUMBERS of each run, by its seed."""
        return {record.run.seed: getattr(record, number) for record in self.records}


def assemble(table: Results) -> list[Cell]:
    """Make the cells of every planned pair and method, pair by pair in the plan's order.

    Holm's correction is over all of the table's comparisons of the same number.
    """
    methods = {method.name: method for method in table.methods}
    cells: dict[tuple[str, str | None], Cell] = {}
    for pair in table.pairs:
        for method in table.methods:
            runs = tuple(run for run in table.runs if (run.pair, run.method) == (pair.name, method.name))
            if not runs:
                continue
            outcomes = (table.outcomes[run] for run in runs)
            records = tuple(one for one in outcomes if isinstance(one, Record))
            settings = records[0].settings if records else None
            names = (table.dataset, table.metric, pair.teacher, pair.student, method.name)
            known = published.find(*names, settings, table.options)
            base = methods.get(method.base or "")
            cells[pair.name, method.name] = Cell(pair, method, base, runs, records, known, table.measures)
    with_base = [(cell, cells.get((cell.pair.name, cell.method.base))) for cell in cells.values()]
    for name in NUMBERS:
        gains = [
            compare(cell.values(name), base.values(name), (cell.method.label, base.method.label)) if base else None
            for cell, base in with_base
        ]
        adjusted = holm([gain.p if gain else None for gain in gains])
        for (cell, base), gain, holm_p in zip(with_base, gains, adjusted):
            paired = compare_paired(cell.by_seed(name), base.by_seed(name)) if base else None
            cell.numbers[name] = _number(cell, name, gain, paired, holm_p)
    return [replace(cell, base_published=base.published if base else None) for cell, base in with_base]


def _number(cell: Cell, name: str, gain: Difference | None, paired: Difference | None, holm_p: float | None) -> Number:
    known = cell.published.comparable_value if cell.published else None
    minus = None if known is None else compare_published(cell.values(name), known)
    further = {
        other: summarise([record.further[name][other] for record in cell.records]) for other in cell.measures.further
    }
    return Number(summarise(cell.values(name)), minus, gain, paired, holm_p, further)


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
        parts = [f"{verdict} in {verdicts[verdict]}" for verdict in (HIGHER, LOWER, EQUAL) if verdicts[verdict]]
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
