"""Learning curves of a table of `deepkd reproduce`, a panel for each method with a base: mean and range of the runs.

python benchmarks/curves.py output/glyphs100 docs/glyphs100_curves.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from deepkd_plugin.errors import UserError
from deepkd_plugin.study.report.cells import assemble
from deepkd_plugin.study.report.collect import collect
from deepkd_plugin.study.report.curves import Curve, mean_curve
from deepkd_plugin.terminal import guarded

# Okabe and Ito's colours, which colour-blind readers can tell apart, each with a line style of its own
ALONE, BASE, METHOD = ("#666666", ":"), ("#0072B2", "--"), ("#D55E00", "-")
COLUMNS = 4


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="the table's, with finished runs")
    parser.add_argument("picture", type=Path, help="file to write, .png, .svg or .pdf")
    args = parser.parse_args()
    write(args.folder, args.picture)


def write(folder: Path, picture: Path) -> None:
    """Draw a table's folder. UserError where nothing can be drawn, or not there."""
    table = collect(folder)
    cells = assemble(table)
    drawn = {(cell.pair.name, cell.method.name): mean_curve(cell) for cell in cells}
    panels = []
    for cell in cells:
        if cell.base is not None:
            names = {"vanilla": ALONE, cell.base.name: BASE, cell.method.name: METHOD}
            curves = {name: drawn.get((cell.pair.name, name)) for name in names}
            if curves[cell.base.name] and curves[cell.method.name]:
                title = (
                    f"{cell.pair.label}\n{cell.method.label}" if len(table.pairs) > 1 else cell.method.label
                )
                panels.append((title, [(curve, names[name]) for name, curve in curves.items() if curve]))
    if not panels:
        raise UserError(f"{folder}: must hold finished runs of a method and of its base, and holds none")
    columns = min(len(panels), COLUMNS)
    rows = -(-len(panels) // columns)
    size = (2.6 * columns, 3.3 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, (title, curves) in zip(axes.flat, panels):
        for curve, (colour, line) in curves:
            draw(axis, curve, colour, line)
        axis.set_title(title, fontsize="medium")
        axis.set_xlabel(table.measures.step)
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend(frameon=False, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.2))
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    axes[0, 0].set_ylabel(f"test {table.metric}")
    try:
        figure.savefig(picture, dpi=150)
    except (ValueError, OSError) as error:  # an ending that names no format, a place that is not there
        raise UserError(f"command line: picture is {picture}; {error}") from None


def draw(axis: Axes, curve: Curve, colour: str, line: str) -> None:
    """The mean of a cell's runs, and a band from the lowest to the highest of them."""
    label = f"{curve.label}, {curve.runs} run{'' if curve.runs == 1 else 's'}"
    axis.plot(curve.epochs, curve.mean, line, color=colour, label=label)
    axis.fill_between(curve.epochs, curve.low, curve.high, color=colour, alpha=0.15, linewidth=0)


if __name__ == "__main__":
    sys.exit(guarded(main))
