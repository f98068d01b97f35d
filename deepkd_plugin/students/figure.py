"""The picture of `deepkd eval`: what is taken for what, in the look of the tables' pages."""

from __future__ import annotations

import textwrap
import warnings
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import style
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure

from ..study.report.figures import COLOURS, PAGE_STYLE

if TYPE_CHECKING:
    from .test import Confusion

SHOWN = 40
"""Classes that a picture has room for."""

NUMBERED = 12
"""Classes up to which the shares are written out."""


@style.context(PAGE_STYLE)
def draw(found: Confusion, title: str) -> Figure:
    """Draw how many of each class's test images are taken for each class, in percent.

    Of more than SHOWN classes those with the most mistakes are shown, in the order of their labels.
    """
    labels = list(range(len(found.names)))
    if len(labels) > SHOWN:
        labels = sorted(found.by_mistakes()[:SHOWN])
        title += f"\nthe {SHOWN} of {len(found.names)} classes with the most mistakes"
    shares = 100.0 * found.matrix(labels)
    names = [textwrap.shorten(found.names[label], 24, placeholder="…") or "…" for label in labels]
    # a point for each letter of the longest name, room for the squares, and for the bar
    side = max(3.2, 0.2 * len(labels))
    margin = 0.075 * max(map(len, names))
    figure = Figure(figsize=(side + margin + 1.4, side + margin + 1.0), layout="constrained")
    axes = figure.add_subplot()
    colours = LinearSegmentedColormap.from_list("page", (COLOURS["ground"], COLOURS["blue"]))
    colours.set_bad(COLOURS["grid"])
    # by the root, so that few mistakes are seen too
    drawn = axes.imshow(shares, cmap=colours, norm=PowerNorm(0.5, 0, 100))
    axes.grid(visible=False)
    axes.set_xticks(range(len(labels)), names, rotation=90 if margin > 0.3 else 0, fontsize=8)
    axes.set_yticks(range(len(labels)), names, fontsize=8)
    axes.set_xlabel("taken for")
    axes.set_ylabel("class")
    axes.set_title(title, fontsize=10, loc="left")
    if len(labels) <= NUMBERED:
        for (row, column), share in np.ndenumerate(shares):
            if not share >= 0.5:  # NaN of a class without images too
                continue
            colour = COLOURS["ground" if share > 55 else "ink"]
            axes.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=8, color=colour)
    bar = figure.colorbar(drawn, ax=axes, shrink=0.7, label="% of the class's test images")
    bar.outline.set_visible(False)  # type: ignore[operator]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # names may be in any script
        figure.draw_without_rendering()
    return figure
