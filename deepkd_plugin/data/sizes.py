"""How large each data set is, known without reading it: for plans and estimates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .. import data
from . import glyphs


@dataclass(frozen=True)
class Size:
    """A data set's numbers of images, and what one is like before (pixels, on average) and in a network (side)."""

    train: int
    test: int
    side: int
    stored: tuple[int, int]


SIZES = {
    "cifar100": Size(50_000, 10_000, 32, (32, 32)),
    "glyphs100": Size(100 * glyphs.PER_CLASS["train"], 100 * glyphs.PER_CLASS["test"], 32, (32, 32)),
    "imagenet": Size(1_281_167, 50_000, 224, (500, 375)),
    "tiny_imagenet": Size(100_000, 10_000, 64, (64, 64)),
}
"""By DATASET.TYPE."""


def images(cfg: Any) -> tuple[int, int]:
    """How many images a run trains on in an epoch, and how many it tests on."""
    node, size, classes = cfg.DATASET, SIZES[cfg.DATASET.TYPE], data.num_classes(cfg)
    held = classes * round(node.HOLDOUT * (size.train // classes))
    train = size.train - held
    if node.TRAIN_PER_CLASS:
        train = min(train, node.TRAIN_PER_CLASS * classes)
    return train, held or size.test


def steps(cfg: Any) -> int:
    """A run's steps in an epoch."""
    return math.ceil(images(cfg)[0] / cfg.SOLVER.BATCH_SIZE)
