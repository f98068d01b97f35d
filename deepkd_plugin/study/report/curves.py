"""Learning curves, in panels of one scale: lines in a stretched box whose strokes do not stretch.

Every letter is ordinary text of the page beside it, as sharp and as large on a phone as on paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .axes import spread, tick, ticks
from .cells import Cell
from .markup import Markup, tag

DASHES = ("6 4", "", "11 4", "2 3", "9 3 2 3")
"""Line styles, in the order in which lines take them; page.css has a colour for each."""

LINES = len(DASHES)
"""Lines of a panel that can be told apart."""

MOST_POINTS = 240
"""Epochs of a curve that are drawn, at most."""

HEIGHT, LABEL = 250, 17
"""Pixels: of a panel of curves, and from one direct label to the next."""

LONG = 24
"""Letters of a label from which on the names stand under a panel, as they do on a phone."""


@dataclass(frozen=True)
class Curve:
    """A method's curve in a panel: its style, and by epoch the mean, the lowest and the highest of its runs."""

    label: str
    style: int
    runs: int
    epochs: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


def curves(groups: Mapping[str, Sequence[Cell]], metric: str, name: str) -> Markup | None:
    """Learning curves of one pair, a panel for each group of cells; None where no run wrote any."""
    held = {
        heading: [curve for i, cell in enumerate(cells) if (curve := mean_curve(cell, i)) is not None]
        for heading, cells in groups.items()
    }
    everything = [curve for drawn in held.values() for curve in drawn]
    if not everything:
        return None
    scale = _scale(everything)
    step = next(cell for cells in groups.values() for cell in cells).measures.step
    what = f"{metric}, {name}"
    panels = [_panel(heading, drawn, scale, what, step) for heading, drawn in held.items() if drawn]
    thinned = max(_every(curve.epochs) for curve in everything)
    caption = (
        f"{metric} on the test images by {step}: the mean of the runs that count, in a band from the lowest to the "
        "highest of them. The vertical axis, one for all, leaves out what lies below the second half of training."
    )
    if thinned > 1:
        caption += f" At least every {_nth(thinned)} {step} is drawn."
    return tag("figure", tag("figcaption", caption), tag("div", panels, class_="panels"))


def mean_curve(cell: Cell, style: int = 0) -> Curve | None:
    """A cell's curve over the epochs that all of its runs have; None where no run wrote any."""
    held = [record.curve for record in cell.records if record.curve]
    if not held:
        return None
    epochs = sorted(set(held[0]).intersection(*held[1:]))
    columns = [[curve[epoch] for curve in held] for epoch in epochs]
    if not columns:
        return None
    return Curve(
        cell.method.label,
        style,
        len(held),
        epochs,
        [sum(column) / len(column) for column in columns],
        [min(column) for column in columns],
        [max(column) for column in columns],
    )


def _scale(drawn: Sequence[Curve]) -> tuple[float, float]:
    """Ends of the vertical axis: all that curves and bands reach in the second half of training."""
    late = [
        value
        for curve in drawn
        for epoch, low, high in zip(curve.epochs, curve.low, curve.high)
        if 2 * epoch >= curve.epochs[-1]
        for value in (low, high)
    ]
    low, high = min(late), max(late)
    margin = 0.06 * (high - low) or 1.0
    return low - margin, high + margin


def _panel(heading: str, drawn: Sequence[Curve], scale: tuple[float, float], what: str, step: str) -> Markup:
    first, last = min(c.epochs[0] for c in drawn), max(c.epochs[-1] for c in drawn)
    low, high = scale

    def x(epoch: float) -> float:
        return 1000 * (epoch - first) / ((last - first) or 1)

    def y(value: float) -> float:
        return 1000 * (high - value) / (high - low)

    x_ticks = [value for value in ticks(first, last, 5) if float(value).is_integer()] or [first]
    y_ticks = ticks(low, high, 8)
    ends = [y(curve.mean[-1]) for curve in drawn]
    places = spread(ends, 1000 * LABEL / HEIGHT, 0.0, 1000.0)
    grid = [tag("line", x1=0, x2=1000, y1=_round(y(v)), y2=_round(y(v)), class_="grid") for v in y_ticks]
    bands = [_band(curve, x, y) for curve in drawn if curve.runs > 1]
    lines = [_line(curve, x, y) for curve in drawn]
    says = "; ".join(
        f"{c.label}: {c.runs} run{'s' if c.runs > 1 else ''}, {c.mean[0]:.1f} at {step} {c.epochs[0]}, "
        f"{c.mean[-1]:.2f} at {step} {c.epochs[-1]}"
        for c in drawn
    )
    title = f"{heading}: {what} by {step}"
    plot = tag(
        "svg", tag("title", title), tag("desc", says), grid, bands, lines,
        class_="lines", role="img", viewBox="0 0 1000 1000", preserveAspectRatio="none",
    )  # fmt: skip
    leaders = tag(
        "svg",
        [
            tag("line", x1=0, x2=10, y1=_round(a), y2=_round(b), class_=f"leader s{c.style}")
            for c, a, b in zip(drawn, ends, places)
        ],
        class_="leaders", viewBox="0 0 10 1000", preserveAspectRatio="none", aria_hidden="true", focusable="false",
    )  # fmt: skip
    labels = [
        tag("span", tag("b", f"{c.mean[-1]:.2f}"), tag("span", f" {c.label}", class_="name"), style=_top(at))
        for c, at in zip(drawn, places)
    ]
    y_axis = [tag("span", tick(v, y_ticks), style=_top(y(v))) for v in y_ticks]
    x_axis = [tag("span", f"{v:g}", style=f"left:{x(v) / 10:.2f}%") for v in x_ticks]
    legend = [tag("li", _swatch(c), tag("span", tag("b", f"{c.mean[-1]:.2f}"), f" {c.label}")) for c in drawn]
    letters = max(len(c.label) for c in drawn)
    return tag(
        "div",
        tag("h4", heading),
        tag(
            "div",
            tag("div", y_axis, class_="y", aria_hidden="true"),
            plot,
            leaders,
            tag("div", labels, class_="labels", aria_hidden="true"),
            tag("div", x_axis, class_="x", aria_hidden="true"),
            tag("div", step, class_="unit", aria_hidden="true"),
            class_="drawing",
            style=f"--height:{HEIGHT}px;--letters:{letters}",
        ),
        tag("ul", legend, class_="legend"),
        class_="panel crowded" if letters > LONG else "panel",
    )


def _line(curve: Curve, x: Callable[[float], float], y: Callable[[float], float]) -> Markup:
    at = _thinned(curve.epochs)
    points = " ".join(f"{_round(x(curve.epochs[i]))},{_round(y(curve.mean[i]))}" for i in at)
    # a run of one epoch is a dot: a line of no length with round ends
    path = f"M{points}" if len(at) > 1 else f"M{points}h0"
    return tag("path", d=path, class_=f"line s{curve.style}", stroke_dasharray=DASHES[curve.style] or None)


def _band(curve: Curve, x: Callable[[float], float], y: Callable[[float], float]) -> Markup:
    at = _thinned(curve.epochs)
    top = [f"{_round(x(curve.epochs[i]))},{_round(y(curve.high[i]))}" for i in at]
    bottom = [f"{_round(x(curve.epochs[i]))},{_round(y(curve.low[i]))}" for i in reversed(at)]
    return tag("polygon", points=" ".join(top + bottom), class_=f"band s{curve.style}")


def _swatch(curve: Curve) -> Markup:
    line = tag(
        "line", x1=0, x2=30, y1=6, y2=6, class_=f"line s{curve.style}",
        stroke_dasharray=DASHES[curve.style] or None,
    )  # fmt: skip
    return tag("svg", line, class_="swatch", width=30, height=12, aria_hidden="true", focusable="false")


def _every(epochs: Sequence[int]) -> int:
    return math.ceil(len(epochs) / MOST_POINTS)


def _thinned(epochs: Sequence[int]) -> list[int]:
    """Indices of the epochs that are drawn: the first, the last, and those between at equal steps."""
    step = _every(epochs)
    return sorted({0, *range(len(epochs) - 1, -1, -step)})


def _top(value: float) -> str:
    return f"top:{value / 10:.2f}%"


def _round(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _nth(number: int) -> str:
    return {2: "second", 3: "third"}.get(number, f"{number}th")
