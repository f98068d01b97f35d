"""Small image sets held in memory, and the choice of a subset."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ..errors import UserError


class ArrayDataset(Dataset[tuple[Any, ...]]):
    """Images (N, H, W, 3) uint8 with labels `targets` (N,): (transform(PIL image), label)."""

    def __init__(self, images: np.ndarray, targets: np.ndarray, transform: Callable[[Any], Any]) -> None:
        self.images, self.targets, self.transform = images, targets, transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return self.transform(Image.fromarray(self.images[index])), int(self.targets[index])

    def pixels(self, indices: np.ndarray) -> np.ndarray:
        """A copy of some images: (n, H, W, 3) uint8."""
        return self.images[indices]


class Indexed(Dataset[tuple[Any, ...]]):
    """A data set's (image, label) with the place in it behind: mdistiller's training samples."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return (*self.dataset[index], index)


class Contrast(Dataset[tuple[Any, ...]]):
    """An Indexed data set with CRD's contrast indices behind: its own place, then `count` of other classes.

    labels: (N,), of the samples in their order. relaxed: the first index is any sample's of the same class. As
    in mdistiller, negatives are drawn without replacement from sets of CIFAR's size, with it from larger ones.
    """

    def __init__(self, dataset: Dataset, labels: np.ndarray, count: int, relaxed: bool) -> None:
        self.dataset, self.labels, self.count, self.relaxed = dataset, labels, count, relaxed
        self.order = np.argsort(labels, kind="stable")
        self.start, self.end = (
            np.searchsorted(labels[self.order], labels, side) for side in ("left", "right")
        )

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        start, end = int(self.start[index]), int(self.end[index])
        others = len(self.order) - (end - start)
        if self.count <= others <= 100_000:
            drawn = torch.randperm(others)[: self.count]
        else:
            drawn = torch.randint(others, (self.count,))
        drawn = (drawn + (drawn >= start) * (end - start)).numpy()  # skip the sample's own class
        own = int(self.order[int(torch.randint(start, end, ()))]) if self.relaxed else index
        return (*self.dataset[index], np.concatenate([[own], self.order[drawn]]))


def choose(labels: np.ndarray, per_class: int, holdout: float) -> tuple[np.ndarray, np.ndarray]:
    """Indices to train on and indices held out, in the data's order.

    labels: (N,). Of every class the last `holdout` share is held out, and of what is left the first
    `per_class` images (0: all) are trained on. Raises UserError where one of the two would be empty although
    it is asked for.
    """
    train, held = [], []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        kept = len(members) - round(holdout * len(members))
        train.append(members[: min(kept, per_class) if per_class else kept])
        held.append(members[kept:])
    chosen, kept_out = np.sort(np.concatenate(train)), np.sort(np.concatenate(held))
    if not len(chosen) or (holdout and not len(kept_out)):
        raise UserError(
            f"DATASET.HOLDOUT is {holdout}, which leaves {len(chosen)} images to train on and {len(kept_out)} held "
            f"out of {len(labels)}; both must be above 0"
        )
    return chosen, kept_out


def check_labels(labels: np.ndarray, num_classes: int, source: str) -> None:
    """Raise UserError for a label outside 0 … num_classes − 1."""
    bad = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if bad.size:
        raise UserError(
            f"{source}: label {int(labels[bad[0]])} of image {int(bad[0])} is outside the classes; labels "
            f"must lie in 0 … {num_classes - 1}"
        )
