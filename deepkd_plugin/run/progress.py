"""What training shows on the terminal: a bar for the epoch that runs, a line for each that has ended."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from ..topk import shown


class EpochBar:
    """A bar on stderr that counts an epoch's steps: `with EpochBar("epoch 1/3", 100) as bar: bar.update(20, text)`.

    It is only drawn in a terminal, and is gone when it ends.
    """

    def __init__(self, title: str, steps: int) -> None:
        terminal = sys.stderr.isatty()
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(16),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}", markup=False),
        )
        # drawn by update alone: a thread of its own would be in the way of the loader's forks
        self._progress = Progress(
            *columns,
            console=Console(stderr=True, force_terminal=terminal),
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            disable=not terminal,
        )
        self._task = self._progress.add_task(title, total=steps, text="")

    def __enter__(self) -> EpochBar:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def update(self, step: int, text: str) -> None:
        """Show that so many steps are done, with a text behind them."""
        self._progress.update(self._task, completed=step, text=text, refresh=True)


def step_text(means: Mapping[str, float], mask: Mapping[str, float], rate: float, seconds_left: float) -> str:
    """Say how an epoch goes: losses, accuracy, K, images a second, and the time until the last epoch ends.

    means: losses by stream, and train_acc if it is measured. mask: topk.recorded of what it keeps.
    """
    losses = " ".join(f"{name} {value:.3f}" for name, value in means.items() if not name.startswith("train_"))
    accuracy = f" top-1 {means['train_acc']:.2f}" if "train_acc" in means else ""
    minutes, seconds = divmod(int(seconds_left), 60)
    hours, minutes = divmod(minutes, 60)
    time_left = f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes:02}:{seconds:02}"
    return f"{losses}{accuracy}{shown(mask)} {rate:.0f} images/s {time_left} left"


def epoch_line(entry: Mapping[str, Any], measure: str, name: str, best: float) -> str:
    """Say what an epoch brought.

    entry: its line of metrics.jsonl. measure: what the best epoch is chosen by, such as test_acc; name: what the
    line calls it. best: the best epoch's.
    """
    trained = f"  train {entry['train_acc']:.2f}" if "train_acc" in entry else ""
    mask = f" {text}" if (text := shown(entry)) else ""
    return (
        f"epoch {entry['epoch']:3d}  loss {entry['train_loss']:.4f}{trained}  {name} {entry[measure]:.2f}  "
        f"best {best:.2f}{mask}  lr {entry['lr']:.4g}  {entry['images_per_second']:.0f} images/s"
    )
