"""How large each detection set is, known without reading it: for plans and estimates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..networks import COCO_IDS
from . import canvas


@dataclass(frozen=True)
class Size:
    """A set's numbers of images (training ones without a box not counted where they are left out), its classes
    without the background, and an image's pixels.
    """

    train: int
    test: int
    classes: int
    height: int
    width: int


SIZES = {
    "glyph_canvas": Size(*canvas.COUNTS.values(), canvas.NUM_CLASSES, canvas.SIZE, canvas.SIZE),
    "coco": Size(117_266, 5_000, len(COCO_IDS), 480, 640),
}
"""By DATASET.TYPE."""


def images(cfg: Any) -> tuple[int, int]:
    """How many images a run trains on in an epoch, and how many it tests on."""
    size = SIZES[cfg.DATASET.TYPE]
    held = round(cfg.DATASET.HOLDOUT * size.train)
    return size.train - held, held or size.test


def steps(cfg: Any) -> int:
    """A run's steps in an epoch."""
    return math.ceil(images(cfg)[0] / cfg.SOLVER.BATCH_SIZE)
