"""Small image sets held in memory, and the choice of a subset."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms

from ..errors import UserError


class ArrayDataset(Dataset[tuple[Any, ...]]):
    """Images (N, H, W, 3) uint8 and labels (N,): (image, label, index) for training, (image, label) for tests."""

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, transform: Callable[[Any], Tensor], train: bool
    ) -> None:
        self.images, self.labels, self.transform, self.train = images, labels, transform, train

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        image = self.transform(Image.fromarray(self.images[index]))
        label = int(self.labels[index])
        return (image, label, index) if self.train else (image, label)


def small_image_transforms(
    mean: tuple[float, ...], std: tuple[float, ...], flip: bool
) -> tuple[Callable[[Any], Tensor], Callable[[Any], Tensor]]:
    """mdistiller's CIFAR-100 augmentation, for training and for tests."""
    end = [transforms.ToTensor(), transforms.Normalize(mean, std)]
    start: list[Any] = [transforms.RandomCrop(32, padding=4)]
    if flip:
        start.append(transforms.RandomHorizontalFlip())
    return transforms.Compose(start + end), transforms.Compose(end)


def choose(labels: np.ndarray, per_class: int, holdout: float) -> tuple[np.ndarray, np.ndarray]:
    """Indices to train on and indices held out, in the data's order.

    labels: (N,). Of every class the last `holdout` share is held out, and of what is left the first
    `per_class` images (0: all) are trained on.
    """
    train, held = [], []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        kept = len(members) - round(holdout * len(members))
        train.append(members[: min(kept, per_class) if per_class else kept])
        held.append(members[kept:])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(held))


def check_labels(labels: np.ndarray, num_classes: int, source: str) -> None:
    """Raise UserError for a label outside 0 … num_classes − 1."""
    bad = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if bad.size:
        raise UserError(
            f"{source}: label {int(labels[bad[0]])} of image {int(bad[0])} is outside the classes; labels "
            f"must lie in 0 … {num_classes - 1}"
        )
