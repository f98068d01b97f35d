"""The page's figures by matplotlib: SVG whose letters are text and whose colours are those of page.css."""

import io
import re
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ..shared import count
from .cells import Cell
from .statistics import EQUAL, HIGHER, LOWER

COLOURS = {
    "ink": "#14181d",
    "quiet": "#525c66",
    "grid": "#e3e7eb",
    "ground": "#ffffff",
    "blue": "#0072b2",
    "red": "#d55e00",
    "green": "#008f68",
    "purple": "#b3568c",
}
"""What page.css calls them -> the light scheme's. On the page they stand by name, so they follow its scheme."""

LINES = (("ink", (0, (3, 2))), ("blue", "-"), ("red", (0, (7, 2))), ("green", (0, (1, 1.5))), ("purple", "-."))
"""Colour and dashes of a panel's lines, in the order in which they take them."""

MARKS = {
    HIGHER: ("o", "blue", "blue"),
    LOWER: ("s", "red", "red"),
    EQUAL: ("o", "quiet", "ground"),
    None: ("x", "quiet", "quiet"),
}
"""A verdict's mark in the dot plot: its form, its colour and what fills it."""

WIDTH, LETTERS = 340, 48
"""Points across a figure, about a phone's screen; letters of a line there."""

PAGE_STYLE = (
    "default",
    {
        "font.family": "DejaVu Sans",
        "font.size": 11,
        "svg.fonttype": "none",
        "svg.hashsalt": "deepkd",
        "text.parse_math": False,
        "text.color": COLOURS["ink"],
        "axes.edgecolor": COLOURS["quiet"],
        "axes.labelcolor": COLOURS["quiet"],
        "xtick.labelcolor": COLOURS["quiet"],
        "ytick.labelcolor": COLOURS["quiet"],
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": COLOURS["grid"],
        "legend.frameon": False,
        "legend.handlelength": 3,
    },
)


@dataclass(frozen=True)
class Drawing:
    """A figure for the page: the size and the content of its svg element, its title and what it shows in words."""

    title: str
    words: str
    width: float
    height: float
    content: Markup


@dataclass(frozen=True)
class Curve:
    """The learning curves of a cell's runs. values: (runs, epochs)."""

    label: str
    epochs: list[int]
    values: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        return self.values.mean(0)


def mean_curve(cell: Cell) -> Curve | None:
    """Return a cell's curves over the epochs that all of its runs have; None if it has none."""
    runs = [record.curve for record in cell.records if record.curve]
    epochs = sorted(set.intersection(*map(set, runs))) if runs else []
    values = np.array([[run[epoch] for epoch in epochs] for run in runs])
    return Curve(cell.method.label, epochs, values) if epochs else None


def draw_curve(axes: Axes, curve: Curve, colour: str, dashes: Any, label: str) -> None:
    """Draw the mean of a cell's runs, and a band from the lowest to the highest of them."""
    marker = "o" if len(curve.epochs) == 1 else None
    axes.plot(curve.epochs, curve.mean, color=colour, linestyle=dashes, marker=marker, label=label)
    if len(curve.values) > 1:
        low, high = curve.values.min(0), curve.values.max(0)
        axes.fill_between(curve.epochs, low, high, color=colour, alpha=0.15, linewidth=0)


def curves(groups: Mapping[str, Sequence[Cell]], what: str, name: str) -> dict[str, Drawing]:
    """Draw the learning curves of one pair: a panel of one scale for each group of cells that has any.

    what: the measure and the pair. name: of the pair on the page, for the figures' ids.
    """
    panels = {
        heading: drawn
        for heading, cells in groups.items()
        if (drawn := [curve for cell in cells if (curve := mean_curve(cell))])
    }
    if not panels:
        return {}
    step = next(iter(groups.values()))[0].measures.step
    # all that the second half of training reaches, on every panel
    late = [c.values[:, 2 * np.array(c.epochs) >= c.epochs[-1]] for drawn in panels.values() for c in drawn]
    low, high = min(values.min() for values in late), max(values.max() for values in late)
    margin = 0.06 * (high - low) or 1.0
    return {
        heading: _panel(drawn, (low - margin, high + margin), step, f"{heading}: {what} by {step}", f"{name}-{i}")
        for i, (heading, drawn) in enumerate(panels.items(), 1)
    }


@style.context(PAGE_STYLE)
def _panel(drawn: Sequence[Curve], scale: tuple[float, float], step: str, title: str, name: str) -> Drawing:
    labels = [textwrap.fill(f"{curve.mean[-1]:.2f}  {curve.label}", LETTERS) for curve in drawn]
    figure, axes = _axes(height=190, left=36, bottom=34 + 15 * sum(label.count("\n") + 1 for label in labels))
    for curve, label, (colour, dashes) in zip(drawn, labels, LINES):
        draw_curve(axes, curve, COLOURS[colour], dashes, label)
    axes.set_ylim(scale)
    axes.margins(x=0.01)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.set_xlabel(step, loc="right", labelpad=1)
    figure.legend(loc="lower left", borderpad=0, borderaxespad=0, labelspacing=0.2)
    words = "; ".join(
        f"{curve.label}: {count(len(curve.values), 'run')}, {curve.mean[0]:.1f} at {step} "
        f"{curve.epochs[0]}, {curve.mean[-1]:.2f} at {step} {curve.epochs[-1]}"
        for curve in drawn
    )
    return _drawing(figure, title, words, name)


@style.context(PAGE_STYLE)
def dot_plot(groups: Mapping[str, Sequence[tuple[str, Cell]]], number: str, title: str) -> Drawing | None:
    """Draw the gain of every named cell with its interval, under a heading for each group; None if none has a gain.

    A hollow diamond is where the published numbers have it.
    """
    rows = [row for heading, group in groups.items() for row in ((heading, None), *group)]
    if not any(cell and cell.numbers[number].gain for _, cell in rows):
        return None
    figure, axes = _axes(height=32 * len(rows), left=8, bottom=20, top=20)
    axes.axvline(0, color=COLOURS["quiet"], linewidth=1.2)
    for y, (name, cell) in enumerate(rows):
        _say(axes, y - 0.37 if cell else y + 0.2, name, weight="normal" if cell else "bold")
        gain = cell and cell.numbers[number].gain
        if cell and cell.published_gain is not None:
            axes.plot(cell.published_gain, y, "D", markersize=8, markerfacecolor="none", color=COLOURS["ink"])
        if not gain:
            continue
        form, colour, fill = MARKS[gain.verdict]
        if gain.low is not None and gain.high is not None:
            axes.plot((gain.low, gain.high), (y, y), color=COLOURS[colour], linewidth=2)
        axes.plot(gain.value, y, form, color=COLOURS[colour], markerfacecolor=COLOURS[fill], markeredgewidth=1.8)
    axes.margins(x=0.04)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.yaxis.set_visible(False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(labeltop=True)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:+.3g}".replace("-", "−") if x else "0"))
    return _drawing(figure, title, "The table beside it has the same numbers.", "gains")


def _say(axes: Axes, y: float, text: str, **font: Any) -> None:
    """Write a row's name at the left, on the ground's colour so that no line of the grid crosses it."""
    ground = {"facecolor": COLOURS["ground"], "edgecolor": "none", "pad": 1}
    short = textwrap.fill(text, LETTERS, max_lines=1, placeholder=" …")
    axes.text(0, y, short, transform=axes.get_yaxis_transform(), va="center", bbox=ground, **font)


def _axes(height: float, left: float, bottom: float, top: float = 8) -> tuple[Figure, Axes]:
    """Make a figure with axes of a height and these margins, in points."""
    whole = bottom + height + top
    figure = Figure(figsize=(WIDTH / 72, whole / 72))
    place = (left / WIDTH, bottom / whole, 1 - (left + 8) / WIDTH, height / whole)
    return figure, figure.add_axes(place)


def _drawing(figure: Figure, title: str, words: str, name: str) -> Drawing:
    """Write a figure as the page needs it: colours by name, and ids that no other figure has."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the reader's browser has a font of its own
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    # what comes before holds no part of the drawing, and a style that would be the whole page's
    content = re.sub(r"^.*?(?=<g )|</svg>\s*$", "", file.getvalue(), flags=re.DOTALL)

    def adapt(tag: re.Match[str]) -> str:
        text = re.sub(r'(?<=<g) id="[^"]*"', "", tag[0])  # nothing refers to a group
        text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
        for colour, value in COLOURS.items():
            text = text.replace(value, f"var(--{colour})")
        return re.sub(r"(\.\d\d)\d+", r"\1", text)

    # letters outside of a tag are ours: matplotlib escapes theirs
    content = re.sub(r"<[^>]*>", adapt, content)
    width, height = 72 * figure.get_size_inches()
    return Drawing(title, words, round(width, 2), round(height, 2), Markup(content))
