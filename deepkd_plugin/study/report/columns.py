"""The columns of a pair's tables: what each says of a cell, in Markdown and on the page."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..measures import CLASSIFICATION, MEASURES, Measures
from .cells import Cell, Number, number_name
from .formats import CONFIDENCE, NONE, interval, mean_std, p_value, paired
from .statistics import EQUAL

Words = tuple[str, ...]
"""What a field says: first the thing itself, then what is added in small letters."""


@dataclass(frozen=True)
class Column:
    """A column: its heading, what it says of a cell, and its kind.

    kind: "number", "runs", which are a number too, "words", or "prose", which needs room.
    """

    title: str
    words: Callable[[Cell], Words]
    kind: str = "number"


def columns(cells: Sequence[Cell], number: str) -> list[Column]:
    """Choose the columns that the cells of one pair need for one of NUMBERS, the method's first.

    Columns on published values, or on bases, are left out if there are none. The published values are in the main
    table alone, and beside its number is the best epoch's. Further measures follow the main one.
    """
    measures = cells[0].measures
    step, main = measures.step, number == "last"
    bases = list(dict.fromkeys(cell.base.label for cell in cells if cell.base is not None))
    over = f"Gain over {bases[0]}" if len(bases) == 1 else "Gain over the base"
    known = any(cell.published is not None for cell in cells)

    def ours(cell: Cell) -> Words:
        return (mean_std(cell.numbers[number].summary), *(() if main else _best_epochs(cell)))

    def further(name: str) -> Column:
        return Column(name, lambda cell: (mean_std(cell.numbers[number].further[name]),))

    def gain(cell: Cell) -> Words:
        difference = cell.numbers[number].gain
        if cell.base is None or difference is None:
            return _missing_gain(cell)
        over = [f"over {cell.base.label}"] if len(bases) > 1 else []
        return (interval(difference), *paired(cell.numbers[number].paired), *over)

    shown = [
        Column("Method", lambda cell: (cell.method.label,), "words"),
        Column("Runs", lambda cell: (f"{len(cell.records)}\u00a0of\u00a0{len(cell.planned)}",), "runs"),
        Column(f"Ours, {number} {step}", ours),
        *map(further, measures.further),
    ]
    if known and main:
        shown.append(Column("Published", _published, "prose"))
    if known:
        shown.append(Column(f"Ours − published [{CONFIDENCE}]", lambda cell: _minus(cell, number)))
    if bases:
        shown += [
            Column(f"{over} [{CONFIDENCE}]", gain),
            Column("p, and Holm's", lambda cell: _p(cell.numbers[number])),
            Column("Verdict", lambda cell: verdict(cell, number), "words"),
        ]
    if main:
        shown.append(Column(f"Best {step}*", lambda cell: (mean_std(cell.numbers["best"].summary),)))
    return shown


def verdict(cell: Cell, number: str) -> Words:
    """Give the verdict on a cell's gain over its base, or say why there is none."""
    if cell.base is None:
        return (NONE,)
    gain, after_holm = cell.numbers[number].gain, cell.numbers[number].after_holm
    if gain is None:
        return ("no verdict", *_missing_gain(cell)[1:])
    if gain.verdict is None:
        return ("no verdict", gain.reason)
    if gain.verdict != EQUAL and after_holm == EQUAL:
        return (gain.verdict, "not after Holm's correction")
    return (gain.verdict,)


def title(number: str, metric: str, measures: Measures = MEASURES[CLASSIFICATION]) -> str:
    """Write the caption of a table of one of NUMBERS."""
    name = number_name(number, measures)
    return f"{name[0].upper()}{name[1:]}: {metric}"


def _published(cell: Cell) -> Words:
    value = cell.published
    if value is None:
        return (NONE,)
    note = f"; {value.note}" if value.note else ""
    return value.text, f"{value.method}; {value.source}; {value.certainty}{note}"


def _minus(cell: Cell, number: str) -> Words:
    difference = cell.numbers[number].minus_published
    if difference is not None:
        return tuple(text for text in (interval(difference), difference.reason) if text)
    return (NONE, "not comparable") if cell.published and not cell.published.comparable else (NONE,)


def _p(number: Number) -> Words:
    if number.gain is None or number.gain.p is None or number.holm_p is None:
        return (NONE,)
    return p_value(number.gain.p), f"Holm\u00a0{p_value(number.holm_p)}"


def _missing_gain(cell: Cell) -> Words:
    if cell.base is None:
        return (NONE,)
    return NONE, f"{cell.base.label if cell.records else cell.method.label} has no runs"


def _best_epochs(cell: Cell) -> Words:
    epochs = sorted({record.best_epoch for record in cell.records})
    step = cell.measures.step
    if len(epochs) > 1:
        return (f"{step}s {epochs[0]} to {epochs[-1]}",)
    return tuple(f"{step} {epoch}" for epoch in epochs)
