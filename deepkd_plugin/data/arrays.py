"""Small image sets held in memory, and the choice of a subset."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ..errors import UserError


class ArrayDataset(Dataset[tuple[Any, ...]]):
    """Images (N, H, W, 3) uint8 with labels `targets` (N,): (transform(PIL image), label)."""

    def __init__(self, images: np.ndarray, targets: np.ndarray, transform: Callable[[Any], Any] | None) -> None:
        self.images, self.targets, self.transform = images, targets, transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return self.transform(Image.fromarray(self.images[index])), int(self.targets[index])

    def pixels(self, indices: np.ndarray) -> np.ndarray:
        """Copy some images: (n, H, W, 3) uint8."""
        return self.images[indices]


class Indexed(Dataset[tuple[Any, ...]]):
    """A data set's (image, label), followed by the place in it: mdistiller's training samples."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return (*self.dataset[index], index)


class Contrast(Dataset[tuple[Any, ...]]):
    """An Indexed data set's samples, followed by CRD's contrast indices: their place, then `count` of other classes.

    labels: (N,), of the samples in their order. relaxed: the first index is that of any sample of the same class. As
    in mdistiller, negatives are drawn without replacement from sets of CIFAR's size, with it from larger ones.
    """

    def __init__(self, dataset: Dataset, labels: np.ndarray, count: int, relaxed: bool) -> None:
        self.dataset, self.labels, self.count, self.relaxed = dataset, labels, count, relaxed
        self.order = np.argsort(labels, kind="stable")
        self.start, self.end = (np.searchsorted(labels[self.order], labels, side) for side in ("left", "right"))

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
    """Choose indices to train on and indices to hold out, in the data's order.

    labels: (N,). Of every class the last `holdout` share is held out, and of what is left the first
    `per_class` images (0: all) are trained on. Raises UserError if one of the two would be empty although it is
    asked for.
    """
    train, kept_out = [], []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        kept = len(members) - round(holdout * len(members))
        train.append(members[: min(kept, per_class) if per_class else kept])
        kept_out.append(members[kept:])
    chosen, out = np.sort(np.concatenate(train)), np.sort(np.concatenate(kept_out))
    if not len(chosen) or (holdout and not len(out)):
        raise UserError(
            f"DATASET.HOLDOUT is {holdout}, which leaves {len(chosen)} images to train on and {len(out)} held out of "
            f"{len(labels)}; both must be above 0"
        )
    return chosen, out
