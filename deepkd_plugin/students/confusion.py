"""A network's accuracy by class, and what it takes for what."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..accuracy import evaluate
from ..device import place
from ..errors import UserError
from ..run.checkpoint import write_text, write_whole
from ..study.shared import csv_text
from .figure import draw

WORST, SHOWN = 5, 40
"""Classes that the terminal names, and that a picture has room for."""


class Confusion:
    """What a network takes test images for. targets, predicted: (N,), the labels of the images and the likeliest ones.

    names: of the classes. numbers: what `accuracy.evaluate` measured.
    """

    def __init__(
        self, targets: np.ndarray, predicted: np.ndarray, names: Sequence[str], numbers: dict[str, float]
    ) -> None:
        count = len(names)
        self.names, self.numbers = names, numbers
        self.images = np.bincount(targets, minlength=count)
        self.right = np.bincount(targets[targets == predicted], minlength=count)
        wrong = targets != predicted
        pairs, self.times = np.unique(targets[wrong].astype(np.int64) * count + predicted[wrong], return_counts=True)
        self.true, self.taken_for = np.divmod(pairs, count)

    def accuracy(self, label: int) -> float | None:
        """Return a class's accuracy in percent; None if it has no test image."""
        return 100.0 * self.right[label] / self.images[label] if self.images[label] else None

    def mistaken(self, label: int) -> tuple[int, int] | None:
        """Return what a class's images are taken for most often, and how often; None if never."""
        places = np.flatnonzero(self.true == label)
        if not places.size:
            return None
        most = places[self.times[places].argmax()]
        return int(self.taken_for[most]), int(self.times[most])

    def matrix(self, labels: Sequence[int]) -> np.ndarray:
        """Return, for some classes, the share of each one's images that is taken for each: (n, n), NaN without any."""
        at = {label: index for index, label in enumerate(labels)}
        shares = np.zeros((len(labels), len(labels)))
        for label, index in at.items():
            shares[index, index] = self.right[label]
        for true, taken, times in zip(self.true.tolist(), self.taken_for.tolist(), self.times):
            if true in at and taken in at:
                shares[at[true], at[taken]] = times
        counts = self.images[list(labels)].astype(float)
        counts[counts == 0] = np.nan
        return shares / counts[:, None]

    def by_mistakes(self) -> list[int]:
        """List the classes, those with the most mistakes in and out of them first."""
        count = len(self.names)
        mistakes = np.bincount(self.true, self.times, count) + np.bincount(self.taken_for, self.times, count)
        return [int(label) for label in np.argsort(-mistakes, kind="stable")]


class _Watched:
    """A test loader that keeps the labels of what it has given."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.targets: list[Tensor] = []

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            self.targets.append(batch[1].cpu())
            yield batch


class _Watching(nn.Module):
    """A network under the protocol of `accuracy.evaluate`, which keeps the labels that it finds likeliest."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.predicted: list[Tensor] = []

    def forward(self, image: Tensor) -> Tensor:
        outcome = self.network(image)
        logits: Tensor = outcome if isinstance(outcome, Tensor) else outcome[0]
        # as accuracy.correct has it
        self.predicted.append(logits.float().topk(min(5, logits.shape[1]), dim=1).indices[:, 0].cpu())
        return logits


def measure(network: nn.Module, loader: Any, names: Sequence[str], device: torch.device, solver: Any) -> Confusion:
    """Test a network, which gives logits or (logits, features), as a run tests its student.

    names: of the classes. solver: the config node SOLVER.
    """
    watching, watched = _Watching(place(network, device, solver.CHANNELS_LAST)), _Watched(loader)
    numbers = evaluate(watching, watched, device, solver)
    return Confusion(torch.cat(watched.targets).numpy(), torch.cat(watching.predicted).numpy(), names, numbers)


def worst(found: Confusion) -> str:
    """Name the classes that are recognised worst, in a line."""
    rated = [(accuracy, label) for label in range(len(found.names)) if (accuracy := found.accuracy(label)) is not None]
    parts = []
    for accuracy, label in sorted(rated)[:WORST]:
        mistaken = found.mistaken(label)
        taken = f" (taken for {found.names[mistaken[0]]})" if mistaken else ""
        parts.append(f"{found.names[label]} {accuracy:.1f} %{taken}")
    return ", ".join(parts)


def write(found: Confusion, title: str, folder: Path, name: str) -> list[Path]:
    """Write eval_NAME.csv, confusion_NAME.png and .svg into a folder; returns their paths.

    Of many classes the picture has those with the most mistakes, in the order of their labels.
    Raises UserError if the folder cannot be written.
    """
    rows = []
    for label, class_name in enumerate(found.names):
        accuracy, mistaken = found.accuracy(label), found.mistaken(label)
        row = {"label": label, "class": class_name, "images": int(found.images[label])}
        row |= {"right": int(found.right[label]), "accuracy": accuracy}
        row |= {"taken_for": found.names[mistaken[0]] if mistaken else None, "times": mistaken[1] if mistaken else 0}
        rows.append(row)
    table, *pictures = (folder / f"{part}_{name}.{end}" for part, end in _FILES)
    labels = list(range(len(found.names)))
    if len(labels) > SHOWN:
        labels = sorted(found.by_mistakes()[:SHOWN])
        title += f"\nthe {SHOWN} of {len(found.names)} classes with the most mistakes"
    drawn = draw(found.matrix(labels), [found.names[label] for label in labels], title)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(table, csv_text(rows))
        for path, content in zip(pictures, drawn):
            write_whole(path, partial(_put, content))
    except OSError as error:
        raise UserError(f"{folder}: must be a folder that can be written ({error})") from None
    return [table, *pictures]


def _put(content: bytes, file: IO[bytes]) -> None:
    file.write(content)


_FILES = (("eval", "csv"), ("confusion", "png"), ("confusion", "svg"))
