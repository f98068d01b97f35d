"""Detection sets by config, for the torchvision host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch.utils.data import DataLoader
from torchvision.transforms.functional import to_tensor

from ... import device
from ...data.arrays import ArrayDataset
from ...errors import UserError
from . import canvas, coco
from .samples import AnnotatedImages, Boxes, DetectionSamples, collate


def get_detection_sets(cfg: Any) -> tuple[DataLoader, DataLoader, int, tuple[str, ...]]:
    """(training loader, test loader, number of training images, names of the classes) of DATASET.TYPE.

    A batch is (list of images, list of targets) of `samples.DetectionSamples`; targets of the second loader have
    what AP needs. Training images are mirrored with probability DETECTION.FLIP. With DATASET.HOLDOUT the last
    share of the training images is kept from training, and the second loader holds it instead of the test set.
    Raises UserError for an unknown type and for data that is missing or not what it should be.
    """
    found = _read(cfg, "train")
    chosen, held = _split(len(found), cfg.DATASET.HOLDOUT)
    train = found.training(chosen, cfg.DETECTION.FLIP)
    if not len(train):
        raise UserError(f"DATASET.ROOT {cfg.DATASET.ROOT}: no training image of {cfg.DATASET.TYPE} has a box")
    if cfg.DATASET.HOLDOUT:
        test, boxes = found.testing(held), found.boxes.counts()[held]
    else:
        other = _read(cfg, "test")
        if other.class_names != found.class_names:
            raise UserError(
                f"DATASET.ROOT {cfg.DATASET.ROOT}: the training and the test set of {cfg.DATASET.TYPE} have other "
                f"classes ({len(found.class_names)} and {len(other.class_names)}); they must be the same"
            )
        test, boxes = other.testing(np.arange(len(other))), other.boxes.counts()
    if not boxes.any():
        raise UserError(
            f"DATASET.ROOT {cfg.DATASET.ROOT}: none of the {len(test)} images of {cfg.DATASET.TYPE} to test on has a "
            f"box; AP needs some"
        )
    return _loader(cfg, train, True), _loader(cfg, test, False), len(train), found.class_names


def _read(cfg: Any, split: str) -> AnnotatedImages:
    kind = cfg.DATASET.TYPE
    if kind not in DETECTION_SETS:
        raise UserError(
            f"DATASET.TYPE is {kind!r}; for detection it must be one of {', '.join(DETECTION_SETS)}"
        )
    return DETECTION_SETS[kind](cfg.DATASET, split)


def _split(count: int, holdout: float) -> tuple[np.ndarray, np.ndarray]:
    """Places to train on and places held out."""
    kept = count - round(holdout * count)
    if not kept or (holdout and kept == count):
        raise UserError(
            f"DATASET.HOLDOUT is {holdout}, which leaves {kept} images to train on and {count - kept} held out of "
            f"{count}; both must be above 0"
        )
    return np.arange(kept), np.arange(kept, count)


def _loader(cfg: Any, samples: DetectionSamples, training: bool) -> DataLoader:
    size = cfg.SOLVER.BATCH_SIZE if training else cfg.DATASET.TEST.BATCH_SIZE
    loading = {"num_workers": cfg.DATASET.NUM_WORKERS, "pin_memory": device.pick().type == "cuda"}
    return DataLoader(samples, size, shuffle=training, collate_fn=collate, **loading)


def _glyph_canvas(node: Any, split: str) -> AnnotatedImages:
    pixels, boxes, labels = canvas.load_glyph_canvas(node.ROOT, split)
    n = len(pixels)
    flat = np.concatenate(boxes)
    held = Boxes(
        flat,
        np.concatenate(labels),
        np.zeros(len(flat), bool),
        (flat[:, 2:] - flat[:, :2]).prod(1),
        np.cumsum([0, *map(len, labels)]),
    )
    images = ArrayDataset(pixels, np.arange(n), to_tensor)
    sizes = np.full((n, 2), canvas.SIZE)
    return AnnotatedImages(images, np.arange(n), sizes, held, tuple(canvas.CLASSES), train_on_empty=True)


def _coco(node: Any, split: str) -> AnnotatedImages:
    return coco.load_coco(node.ROOT, split)


DETECTION_SETS: dict[str, Callable[[Any, str], AnnotatedImages]] = {
    "glyph_canvas": _glyph_canvas,
    "coco": _coco,
}
"""(node DATASET, "train" or "test") -> the set. A glyph_canvas wants DETECTION.FLIP 0: a mirrored glyph is another."""
