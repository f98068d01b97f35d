"""The columns of a pair's tables: what each says of a cell, for Markdown and for the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..measures import CLASSIFICATION, MEASURES, Measures
from .cells import Cell, Number, number_name
from .formats import CONFIDENCE, NONE, interval, mean_std, p_value
from .statistics import EQUAL, Difference

Words = tuple[str, ...]
"""What a field says: first the thing itself, then what belongs to it in small letters."""


@dataclass(frozen=True)
class Column:
    """A column: its heading, what it says of a cell, and its kind: "number", "words", or "prose" that needs room."""

    title: str
    words: Callable[[Cell], Words]
    kind: str = "number"


def columns(cells: Sequence[Cell], number: str) -> list[Column]:
    """The columns that the cells of one pair need for one of NUMBERS, the method's first.

    Without any published value, or without any base, the columns on it are left out. The published values stand
    in the main table alone, and beside its number the best epoch's. Further measures follow the main one.
    """
    measures = cells[0].measures
    step = measures.step
    bases = list(dict.fromkeys(cell.base.label for cell in cells if cell.base is not None))
    over = f"Gain over {bases[0]}" if len(bases) == 1 else "Gain over the base"
    several = len(bases) > 1

    def held(cell: Cell) -> Number:
        return cell.numbers[number]

    def gain(cell: Cell) -> Words:
        if held(cell).gain is None:
            return _missing_gain(cell)
        text = interval(held(cell).gain)
        return (text, f"over {cell.base.label}") if several else (text,)

    shown = [Column("Method", lambda cell: (cell.method.label,), "words"), Column("Runs", _runs)]
    known = any(cell.published is not None for cell in cells)
    if number == "last":
        shown.append(Column(f"Ours, last {step}", lambda cell: (mean_std(held(cell).summary),)))
    else:
        shown.append(
            Column(f"Ours, best {step}", lambda cell: (mean_std(held(cell).summary), *_best_epochs(cell)))
        )
    shown += [
        Column(name, lambda cell, name=name: (mean_std(held(cell).further[name]),))
        for name in measures.further
    ]
    if known and number == "last":
        shown.append(Column("Published", _published, "prose"))
    if known:
        minus = f"Ours − published [{CONFIDENCE}]"
        shown.append(Column(minus, lambda cell: _minus(held(cell).minus_published, cell)))
    if bases:
        shown += [
            Column(f"{over} [{CONFIDENCE}]", gain),
            Column("p, and Holm's", lambda cell: _p(held(cell))),
            Column("Verdict", lambda cell: verdict(cell, number), "words"),
        ]
    if number == "last":
        shown.append(Column(f"Best {step}*", lambda cell: (mean_std(cell.numbers["best"].summary),)))
    return shown


def verdict(cell: Cell, number: str) -> Words:
    """A verdict on a cell's gain over its base, or why there is none."""
    if cell.base is None:
        return (NONE,)
    held = cell.numbers[number]
    if held.gain is None:
        return ("no verdict", *_missing_gain(cell)[1:])
    if held.gain.verdict is None:
        return ("no verdict", held.gain.reason)
    if held.gain.verdict != EQUAL and held.after_holm == EQUAL:
        return (held.gain.verdict, "not after Holm's correction")
    return (held.gain.verdict,)


def title(number: str, metric: str, measures: Measures = MEASURES[CLASSIFICATION]) -> str:
    """The caption of a table of one of NUMBERS."""
    name = number_name(number, measures)
    return f"{name[0].upper()}{name[1:]}: {metric}"


def _runs(cell: Cell) -> Words:
    return (f"{len(cell.records)}\u00a0of\u00a0{len(cell.planned)}",)


def _published(cell: Cell) -> Words:
    held = cell.published
    if held is None:
        return (NONE,)
    note = f"; {held.note}" if held.note else ""
    return held.text, f"{held.method}; {held.source}; {held.certainty}{note}"


def _minus(difference: Difference | None, cell: Cell) -> Words:
    if difference is not None:
        return tuple(text for text in (interval(difference), difference.reason) if text)
    return (
        (NONE, "not comparable") if cell.published is not None and not cell.published.comparable else (NONE,)
    )


def _p(held: Number) -> Words:
    if held.gain is None or held.gain.p is None:
        return (NONE,)
    return p_value(held.gain.p), f"Holm\u00a0{p_value(held.holm_p)}"


def _missing_gain(cell: Cell) -> Words:
    if cell.base is None:
        return (NONE,)
    return (NONE, f"{cell.base.label if cell.records else cell.method.label} has no runs")


def _best_epochs(cell: Cell) -> Words:
    epochs = sorted(record.best_epoch for record in cell.records)
    if not epochs:
        return ()
    step = cell.measures.step
    return (f"{step} {epochs[0]}" if epochs[0] == epochs[-1] else f"{step}s {epochs[0]} to {epochs[-1]}",)
