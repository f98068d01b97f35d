"""Learning curves of a table of `deepkd reproduce`, a panel for each method with a base: mean and range of the runs.

python benchmarks/curves.py output/glyphs100 docs/glyphs100_curves.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from deepkd_plugin.errors import UserError
from deepkd_plugin.study.report.cells import assemble
from deepkd_plugin.study.report.collect import collect
from deepkd_plugin.study.report.figures import draw_curve, mean_curve
from deepkd_plugin.study.shared import count
from deepkd_plugin.terminal import guarded

# Okabe and Ito's colours, which colour-blind readers can tell apart, each with a line style of its own
ALONE, BASE, METHOD = ("#666666", ":"), ("#0072B2", "--"), ("#D55E00", "-")
COLUMNS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the table's, with finished runs")
    parser.add_argument("picture", type=Path, help="file to write, .png, .svg or .pdf")
    args = parser.parse_args()
    write(args.folder, args.picture)


def write(folder: Path, picture: Path) -> None:
    """Draw a table's folder. Raises UserError if nothing can be drawn, or not there."""
    figure = draw(folder)
    try:
        figure.savefig(picture, dpi=150)
    except (ValueError, OSError) as error:  # an ending that names no format, a place that is not there
        raise UserError(f"command line: picture is {picture}; {error}") from None


def draw(folder: Path) -> Figure:
    """Make the figure of a table's folder."""
    table = collect(folder)
    cells = assemble(table)
    curves = {(cell.pair.name, cell.method.name): mean_curve(cell) for cell in cells}
    panels = []
    for cell in cells:
        if cell.base is not None:
            styles = {"vanilla": ALONE, cell.base.name: BASE, cell.method.name: METHOD}
            drawn = {name: curve for name in styles if (curve := curves.get((cell.pair.name, name)))}
            if {cell.base.name, cell.method.name} <= drawn.keys():
                title = f"{cell.pair.label}\n" * (len(table.pairs) > 1) + cell.method.label
                panels.append((title, [(curve, *styles[name]) for name, curve in drawn.items()]))
    if not panels:
        raise UserError(f"{folder}: must hold finished runs of a method and of its base, and holds none")
    columns = min(len(panels), COLUMNS)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(2.6 * columns, 3.3 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axis, (title, drawn) in zip(axes.flat, panels):
        for curve, colour, dashes in drawn:
            label = f"{curve.label}, {count(len(curve.values), 'run')}"
            draw_curve(axis, curve, colour, dashes, label)
        axis.set_title(title, fontsize="medium")
        axis.set_xlabel(table.measures.step)
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend(frameon=False, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.2))
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    axes[0, 0].set_ylabel(f"test {table.metric}")
    return figure


if __name__ == "__main__":
    sys.exit(guarded(main))
