"""The picture of `deepkd eval`: what is taken for what, in the look of the tables' pages."""

import io
import textwrap
import warnings
from collections.abc import Sequence

import numpy as np
from matplotlib import style
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure

from ..study.report.figures import COLOURS, PAGE_STYLE

NUMBERED = 12
"""Classes up to which the shares are written out."""


@style.context(PAGE_STYLE)
def draw(shares: np.ndarray, names: Sequence[str], title: str) -> tuple[bytes, bytes]:
    """Draw which share of each class's test images is taken for each class; returns the picture as PNG and as SVG.

    shares: (n, n), NaN if there are none.
    """
    shares = 100.0 * shares
    names = [textwrap.shorten(name, 24, placeholder="…") or "…" for name in names]
    # a point for each letter of the longest name, room for the squares, and for the bar
    side = max(3.2, 0.2 * len(names))
    margin = 0.075 * max(map(len, names))
    figure = Figure(figsize=(side + margin + 1.4, side + margin + 1.0), layout="constrained")
    axes = figure.add_subplot()
    scale = LinearSegmentedColormap.from_list("page", (COLOURS["ground"], COLOURS["blue"]))
    colours = scale.with_extremes(bad=COLOURS["grid"])
    # by the root, so that few mistakes are seen too
    drawn = axes.imshow(shares, cmap=colours, norm=PowerNorm(0.5, 0, 100))
    axes.grid(visible=False)
    axes.set_xticks(range(len(names)), names, rotation=90 if margin > 0.3 else 0, fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel("taken for")
    axes.set_ylabel("class")
    axes.set_title(title, fontsize=10, loc="left")
    if len(names) <= NUMBERED:
        for (row, column), share in np.ndenumerate(shares):
            if not share >= 0.5:  # NaN of a class without images too
                continue
            colour = COLOURS["ground" if share > 55 else "ink"]
            axes.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=8, color=colour)
    bar = figure.colorbar(drawn, ax=axes, shrink=0.7, label="% of the class's test images")
    bar.outline.set_visible(False)  # type: ignore[operator]
    png, svg = io.BytesIO(), io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # names may be in any script
        figure.savefig(png, format="png", dpi=150)
        figure.set_layout_engine("none")  # the places are known now
        figure.savefig(svg, format="svg", metadata={"Date": None})
    return png.getvalue(), svg.getvalue()
