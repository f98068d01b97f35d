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
        console = Console(stderr=True, force_terminal=terminal)
        bar = 16 if console.width >= 100 else 8
        self.room = console.width - len(title) - bar - 2 * len(str(steps)) - 5
        """Characters for the text of `update`, with which a line fits the terminal."""
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}", markup=False),
        )
        # drawn by update alone: a thread of its own would be in the way of the loader's forks
        self._progress = Progress(
            *columns,
            console=console,
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

    def say(self, line: str) -> None:
        """Print a line on stdout, above the bar."""
        self._progress.stop()
        print(line)
        self._progress.start()


def step_text(
    means: Mapping[str, float], mask: Mapping[str, float], rate: float, seconds_left: float, room: int = 80
) -> str:
    """Say how an epoch goes: losses, accuracy, K, images a second, and the time until the last epoch ends.

    means: losses by stream, and train_acc if it is measured. mask: topk.recorded of what it keeps. room: characters
    that there are; where they are few the losses are summed, and what is less worth is left out.
    """
    by_stream = {name: value for name, value in means.items() if not name.startswith("train_")}
    losses = " ".join(f"{name} {value:.3f}" for name, value in by_stream.items())
    total = f"loss {sum(by_stream.values()):.3f}"
    accuracy = [f"top-1 {means['train_acc']:.2f}"] if "train_acc" in means else []
    kept = [text[1:]] if (text := shown(mask)) else []
    speed, left = f"{rate:.0f} images/s", f"{clock(seconds_left)} left"
    forms = (
        [losses, *accuracy, *kept, speed, left],
        [total, *accuracy, *kept, speed, left],
        [total, *accuracy, *kept, left],
        [total, *accuracy, left],
        [total, left],
    )
    texts = [" ".join(form) for form in forms]
    return next((text for text in texts if len(text) <= room), texts[-1])


def clock(seconds: float) -> str:
    """Write a time as a clock does: 02:05, 10:02:05."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes:02}:{seconds:02}"


def epoch_line(entry: Mapping[str, Any], epochs: int, measure: str, name: str, best: float) -> str:
    """Say what an epoch brought, in a line of a terminal of 80 columns.

    entry: its line of metrics.jsonl. epochs: how many there are. measure: what the best epoch is chosen by, such as
    test_acc; name: what the line calls it. best: the best epoch's.
    """
    trained = f"  train {entry['train_acc']:.2f}" if "train_acc" in entry else ""
    mask = f" {text}" if (text := shown(entry)) else ""
    return (
        f"epoch {entry['epoch']:{len(str(epochs))}}/{epochs}  loss {entry['train_loss']:.4g}{trained}  "
        f"{name} {entry[measure]:.2f}  best {best:.2f}{mask}  lr {entry['lr']:.3g}"
    )
