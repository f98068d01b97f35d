"""Learning curves of a table of `deepkd reproduce`, a panel for each base: mean over the seeds, band of their range.

python benchmarks/curves.py output/glyphs100 docs/glyphs100_curves.png
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from deepkd_plugin.report.cells import Cell, assemble
from deepkd_plugin.report.collect import Record, collect

# Okabe and Ito's colours, which colour-blind readers can tell apart, each with a line style of its own
ALONE, BASE, METHOD = ("#666666", ":"), ("#0072B2", "--"), ("#D55E00", "-")


def main(folder: str, picture: str) -> None:
    table = collect(Path(folder))
    cells = [cell for cell in assemble(table) if cell.records]
    of = {(cell.pair.name, cell.method.name): cell for cell in cells}
    over = [cell for cell in cells if cell.base and (cell.pair.name, cell.base.name) in of]
    if not over:
        sys.exit(f"{folder}: holds no finished runs of a method and of its base")
    columns = min(len(over), 4)
    rows = -(-len(over) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.6 * columns, 2.9 * rows), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, cell in zip(axes.flat, over):
        alone = of.get((cell.pair.name, "vanilla"))
        if alone is not None:
            draw(axis, alone, *ALONE)
        draw(axis, of[cell.pair.name, cell.base.name], *BASE)
        draw(axis, cell, *METHOD)
        axis.set(title=cell.pair.label if len(table.pairs) > 1 else cell.base.label, xlabel="epoch")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize="small", loc="lower right")
    for axis in axes.flat[len(over) :]:
        axis.set_visible(False)
    axes[0, 0].set(ylabel=f"test {table.metric}")
    most = max(len(cell.records) for cell in cells)
    figure.suptitle(f"{table.title}: mean and range of {most} seeds", fontsize="medium")
    figure.savefig(picture, dpi=150)


def draw(axis: Axes, cell: Cell, colour: str, line: str) -> None:
    curves = np.array([of_epochs(record) for record in cell.records])
    epochs = np.arange(1, curves.shape[1] + 1)
    axis.plot(epochs, curves.mean(0), line, color=colour, label=cell.method.label)
    axis.fill_between(epochs, curves.min(0), curves.max(0), color=colour, alpha=0.15, linewidth=0)


def of_epochs(record: Record) -> Sequence[float]:
    return [record.curve[epoch] for epoch in sorted(record.curve)]


if __name__ == "__main__":
    main(*sys.argv[1:])
