"""The dot plot of gains with their intervals: SVG whose positions are percentages.

So it follows the width of its place while letters and marks keep their size, on a phone as on paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .axes import signed_tick, ticks
from .cells import Cell
from .columns import verdict
from .formats import CONFIDENCE, interval, signed
from .markup import Markup, join, tag
from .statistics import EQUAL, HIGHER, LOWER

SHORT = 8
"""Comparisons that stay on one page when it is printed."""

MARKS = {HIGHER: "higher", LOWER: "lower", EQUAL: "equal", None: "none"}
"""A verdict's mark in the dot plot, by its class in page.css."""


def dot_plot(groups: Mapping[str, Sequence[Cell]], number: str, title: str) -> Markup:
    """The gain of every comparison with its interval, under a heading for each base.

    It is a table whose rows hold the drawing beside the same numbers as text. On a hollow diamond lies what
    the published numbers give.
    """
    held = [cell for group in groups.values() for cell in group]
    scale = _gain_scale(held, number)
    pairs = len({cell.pair.name for cell in held}) > 1
    rows = []
    for heading, group in groups.items():
        methods = len({cell.method.name for cell in group}) > 1
        rows.append(
            tag(
                "tbody",
                tag(
                    "tr",
                    tag("th", heading, scope="rowgroup", role="rowheader"),
                    tag("td", _axis(scale), class_="plot", role="cell"),
                    tag("td", role="cell", colspan=2),
                    class_="group",
                    role="row",
                ),
                [_dot_row(cell, number, scale, pairs or not methods, methods) for cell in group],
                class_="short" if len(group) <= SHORT else None,
                role="rowgroup",
            )
        )
    heads = (
        ("Comparison", None),
        ("lower ← 0 → higher", "plot"),
        (f"Gain [{CONFIDENCE}]", "gain"),
        ("Verdict", None),
    )
    head = tag(
        "tr",
        [tag("th", text, scope="col", class_=kind, role="columnheader") for text, kind in heads],
        role="row",
    )
    table = tag(
        "table",
        tag("caption", title, class_="hidden"),
        tag("thead", head, role="rowgroup"),
        rows,
        class_="dots",
        role="table",
    )
    return tag("figure", tag("figcaption", title, tag("small", _legend(held))), table)


def _gain_scale(cells: Sequence[Cell], number: str) -> tuple[float, float, list[float]]:
    """Ends and ticks of the axis that holds every gain, interval and published gain, and 0."""
    values = [0.0]
    for cell in cells:
        gain = cell.numbers[number].gain
        if gain is not None:
            values += [value for value in (gain.value, gain.low, gain.high) if value is not None]
        if cell.published_gain is not None:
            values.append(cell.published_gain)
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 1.0
    low, high = low - margin, high + margin
    return low, high, ticks(low, high, 6)


def _axis(scale: tuple[float, float, list[float]]) -> Markup:
    low, high, at = scale
    labels = [
        tag("text", signed_tick(value, at), x=_percent(value, low, high), y="78%", text_anchor="middle")
        for value in at
    ]
    return tag("svg", labels, class_="axis", aria_hidden="true", focusable="false")


def _dot_row(
    cell: Cell, number: str, scale: tuple[float, float, list[float]], pairs: bool, methods: bool
) -> Markup:
    gain = cell.numbers[number].gain
    said = verdict(cell, number)
    mark = MARKS[gain.verdict if gain is not None else None]
    name: list[Markup | str] = []
    if methods:
        name.append(tag("span", cell.method.label))
    if pairs:
        name.append(tag("span", cell.pair.label, class_="second" if methods else None))
    text = "no runs" if gain is None else interval(gain)
    row = tag(
        "tr",
        tag("th", name, scope="row", role="rowheader"),
        tag("td", _dots(cell, number, scale, mark), class_="plot", role="cell"),
        tag("td", text, class_="gain", role="cell"),
        tag("td", said[0], [tag("small", one) for one in said[1:]], class_=f"verdict {mark}", role="cell"),
        role="row",
    )
    if cell.published_gain is None:
        return row
    source = tag("td", tag("small", _published_gain(cell)), colspan=4, role="cell")
    return join(row, tag("tr", source, class_="source", role="row"))


def _published_gain(cell: Cell) -> str:
    """The published gain with the two numbers it is the difference of, their sources and certainty."""
    ours, base = (
        f"{p.method} {p.text} ({p.source}; {p.certainty})" for p in (cell.published, cell.base_published)
    )
    note = f"; {cell.published.note}" if cell.published.note else ""
    return f"◇ published {signed(cell.published_gain)} = {ours} − {base}{note}"


def _dots(cell: Cell, number: str, scale: tuple[float, float, list[float]], mark: str) -> Markup:
    low, high, at = scale

    def x(value: float) -> str:
        return _percent(value, low, high)

    drawn = [
        tag("line", x1=x(v), x2=x(v), y1="0", y2="100%", class_="zero" if v == 0 else "grid") for v in at
    ]
    gain = cell.numbers[number].gain
    if gain is not None and gain.low is not None and gain.high is not None:
        drawn.append(
            tag("line", x1=x(gain.low), x2=x(gain.high), y1="50%", y2="50%", class_=f"whisker {mark}")
        )
    if cell.published_gain is not None:
        drawn.append(_shape("M0-8 8 0 0 8-8 0Z", x(cell.published_gain), "published"))
    if gain is not None:
        square = "M-5-5H5V5H-5Z"
        drawn.append(
            _shape(square, x(gain.value), f"dot {mark}")
            if mark == "lower"
            else tag("circle", cx=x(gain.value), cy="50%", r=5, class_=f"dot {mark}")
        )
    return tag("svg", drawn, aria_hidden="true", focusable="false")


def _shape(path: str, x: str, kind: str) -> Markup:
    return tag("svg", tag("path", d=path, class_=kind), x=x, y="50%", overflow="visible", class_="shape")


def _legend(cells: Sequence[Cell]) -> str:
    text = (
        "Filled circle: higher; filled square: lower; hollow circle: not distinguishable; dotted: no verdict."
    )
    if any(cell.published_gain is not None for cell in cells):
        text += " Hollow diamond: the gain by the published numbers, whose spread is unknown."
    return text


def _percent(value: float, low: float, high: float) -> str:
    return f"{100 * (value - low) / (high - low):.2f}%"
