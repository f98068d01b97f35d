"""Learning curves of a table made by accuracy.py: mean over the seeds, band from the lowest to the highest.

python benchmarks/curves.py results/glyphs100.json docs/glyphs100_curves.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

# Okabe and Ito's colours, which colour-blind readers can tell apart, each with a line style of its own
STYLES = [("#000000", "-"), ("#0072B2", "--"), ("#009E73", "-."), ("#D55E00", "-"), ("#CC79A7", "--")]


def main(table: str, picture: str) -> None:
    runs = json.loads(Path(table).read_text())
    figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for method, (colour, line) in zip(dict.fromkeys(run["method"] for run in runs), STYLES):
        curves = np.array([run["curve"] for run in runs if run["method"] == method])
        epochs = np.arange(1, curves.shape[1] + 1)
        axes.plot(epochs, curves.mean(0), line, color=colour, label=method)
        axes.fill_between(epochs, curves.min(0), curves.max(0), color=colour, alpha=0.15, linewidth=0)
    seeds = len({run["seed"] for run in runs})
    axes.set(
        xlabel="epoch", ylabel="test top-1 (%)", title=f"{Path(table).stem}: mean and range of {seeds} seeds"
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(picture, dpi=150)


if __name__ == "__main__":
    main(*sys.argv[1:])
