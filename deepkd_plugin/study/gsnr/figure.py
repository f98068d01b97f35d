"""The figure of `deepkd gsnr`, after the paper's figures 1a and 2: GSNR, angles and momenta over iterations."""

import math
from collections.abc import Sequence
from functools import reduce
from itertools import cycle
from operator import getitem
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import AutoLocator, LogLocator, MaxNLocator, NullFormatter, NullLocator, StrMethodFormatter

from ...gsnr import noise_floor
from .windows import TITLES, Run

# Okabe and Ito's colours, which colour-blind readers can tell apart
STREAM_STYLES = (
    ("#0072B2", "-", "o"),
    ("#D55E00", "--", "s"),
    ("#009E73", "-.", "^"),
    ("#CC79A7", ":", "D"),
    ("#56B4E9", (0, (6, 2)), "v"),
)

PAIR_STYLES = (
    ("#000000", "-", "P"),
    ("#E69F00", "--", "X"),
    ("#56B4E9", "-.", "d"),
    ("#CC79A7", ":", "*"),
    ("#0072B2", (0, (6, 2)), "<"),
    ("#009E73", (0, (3, 1, 1, 1)), ">"),
)

GREY = "#767676"

BAND = 0.18
"""Opacity of the range of several runs."""

MARKERS = 12
"""How many points of a line carry its marker, at most."""


def draw(runs: Sequence[Run]) -> Figure:
    """Draw checked runs, over iterations.

    The panels have GSNR by both summaries with what noise alone gives, angles between the streams' gradients, and
    momenta. Several runs are drawn as their mean, in a band from the lowest to the highest.
    """
    first = runs[0]
    iterations = sorted({window["iteration"] for run in runs for window in run.windows})
    styles = dict(zip(first.streams, cycle(STREAM_STYLES)))
    noise = noise_floor(first.windows[0]["samples"])
    heights = [3.0, 3.0, *([2.3] if first.pairs else []), 1.7]
    figure = Figure(figsize=(6.6, 0.85 * sum(heights)), layout="constrained")
    panels = list(figure.subplots(len(heights), sharex=True, height_ratios=heights))

    for panel, (name, title) in zip(panels, TITLES.items()):
        for stream, style in styles.items():
            values = _grid(runs, iterations, "gsnr", stream, name)
            _line(panel, iterations, values, stream.upper(), style)
        if math.isfinite(noise[name]):
            panel.axhline(noise[name], color=GREY, linestyle="--", linewidth=1.1, label="noise alone")
        _log_axis(panel)
        panel.set_ylabel(f"GSNR\n({title})")
    if first.pairs:
        panel = panels[2]
        panel.axhline(90, color=GREY, linewidth=0.9, label="_90 degrees")
        for pair, style in zip(first.pairs, cycle(PAIR_STYLES)):
            values = _grid(runs, iterations, "angle", pair)
            _line(panel, iterations, values, pair.upper(), style)
        panel.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 3, 10]))  # steps that meet 90
        panel.set_ylabel("angle between\ngradients (°)")
        _legend(panel)
    for stream, style in styles.items():
        values = _grid(runs, iterations, "momentum", stream)
        _line(panels[-1], iterations, values, stream.upper(), style, step="post")
    measured = first.settings["SOLVER.DECOUPLED.ALLOCATION"] == "gsnr"
    panels[-1].set_ylabel("momentum\n(set by GSNR)" if measured else "momentum")

    _legend(panels[0], len(runs))
    for panel in panels:
        panel.grid(color="#d9d9d9", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
        panel.yaxis.label.set_size(9)
    panels[-1].set_xlabel("iteration", fontsize=9)
    panels[-1].xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    figure.align_ylabels(panels)
    figure.suptitle(_title(runs), fontsize=9.5)
    return figure


def _grid(runs: Sequence[Run], iterations: Sequence[int], *keys: str) -> np.ma.MaskedArray:
    """Collect one value of each window, (runs, iterations), masked if a run has none. keys: its place in a window."""
    rows = []
    for run in runs:
        values = {window["iteration"]: reduce(getitem, keys, window) for window in run.windows}
        rows.append([values.get(iteration) for iteration in iterations])
    return np.ma.masked_invalid(np.array(rows, dtype=float))


def _line(
    panel: Axes, x: Sequence[int], values: np.ma.MaskedArray, label: str, style: Any, step: str | None = None
) -> None:
    """Draw runs' mean and the band of their range, in a style of their own."""
    colour, line, marker = style
    every = math.ceil(len(x) / MARKERS)
    if step:  # momenta coincide, so each line leaves points for the markers of others
        every = max(every, min(3, len(x)))
    start = len(panel.get_lines()) * math.ceil(every / 3) % every
    panel.plot(
        x, values.mean(0), label=label, color=colour, linestyle=line, linewidth=1.5, marker=marker, markersize=4.5,
        markeredgewidth=0, markevery=(start, every), drawstyle=f"steps-{step}" if step else "default",
    )  # fmt: skip
    if len(values) > 1:
        low, high = values.min(0), values.max(0)
        panel.fill_between(x, low, high, step=step, color=colour, alpha=BAND, linewidth=0, label=f"_{label}")


def _log_axis(panel: Axes) -> None:
    """Make the vertical axis logarithmic, with as many plain numbers as there is room for."""
    panel.set_yscale("log", nonpositive="mask")
    low, high = panel.get_ylim()
    if high < 3 * low:
        panel.yaxis.set_major_locator(AutoLocator())
        panel.yaxis.set_minor_locator(NullLocator())
    else:
        subs = (1, 1.5, 2, 3, 4, 5, 7) if high < 8 * low else (1, 2, 5) if high < 300 * low else (1,)
        panel.yaxis.set_major_locator(LogLocator(subs=subs))
        panel.yaxis.set_minor_locator(LogLocator(subs=range(2, 10)))
    panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())


def _legend(panel: Axes, seeds: int = 1) -> None:
    """Name lines and bands above a panel: in one row of up to five, else in two."""
    handles, _ = panel.get_legend_handles_labels()
    if seeds > 1:
        handles.append(Patch(color=GREY, alpha=BAND, linewidth=0, label=f"range of {seeds} seeds"))
    columns = len(handles) if len(handles) <= 5 else math.ceil(len(handles) / 2)
    panel.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, ncols=columns, frameon=False,
        fontsize=8.5, handlelength=2.8, handletextpad=0.6, columnspacing=1.3, borderpad=0,
    )  # fmt: skip


def _title(runs: Sequence[Run]) -> str:
    settings = runs[0].settings
    kind, student = settings["DISTILLER.TYPE"], settings["DISTILLER.STUDENT"]
    others = [one["TEACHER"] for one in settings.get("DISTILLER.MORE_TEACHERS", ())]
    taught = " + ".join([str(settings["DISTILLER.TEACHER"]), *others])
    pair = student if kind == "NONE" else f"{taught} → {student}"
    name = settings.get("DeepKD.FEATURE", "none")
    feature = "" if name == "none" else f" and features by {name}"
    method = {"NONE": "no distillation", "DeepKD": f"DeepKD over {settings['DeepKD.BASE']}{feature}"}.get(kind, kind)
    seeds = f"seed {runs[0].seed}" if len(runs) == 1 else f"mean of {len(runs)} seeds"
    return (
        f"{settings['DATASET.TYPE']}, {pair}, {method}\n"
        f"{seeds}; gradients every {settings['GSNR.EVERY']} iterations, windows of {settings['GSNR.WINDOW']} samples"
    )
