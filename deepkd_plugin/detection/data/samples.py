"""Images with boxes, as training and tests take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...data import draws
from ...data.draws import Draw

Sample = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class Boxes:
    """The boxes of n images, m in all, in the order of their images.

    boxes: (m, 4) float32, x1 y1 x2 y2 in pixels. labels: (m,) int64 from 1. crowd: (m,) bool, whether a box is
    around a group. offsets: (n + 1,) int64; image i has the rows from offsets[i] to offsets[i + 1]. Flat arrays and not
    objects: loader processes share them with this one.
    """

    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    offsets: np.ndarray

    def counts(self) -> np.ndarray:
        """Count the boxes of each image: (n,) int64."""
        return np.diff(self.offsets)

    def to_train_on(self, sizes: np.ndarray) -> Boxes:
        """Cut the boxes at their images' edges, and leave out crowds and boxes without an area.

        sizes: (n, 2), width and height of the images.
        """
        limits = np.tile(np.repeat(sizes, self.counts(), axis=0), 2)
        boxes = np.clip(self.boxes, 0, limits).astype(np.float32)
        kept = ~self.crowd & (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        offsets = np.concatenate([[0], np.cumsum(kept)])[self.offsets]
        return Boxes(boxes[kept], self.labels[kept], self.crowd[kept], offsets)


@dataclass(frozen=True)
class AnnotatedImages:
    """A detection set in one piece.

    images: place -> (float tensor (3, H, W) in [0, 1], anything). ids: (n,) int64. sizes: (n, 2) int64, width
    and height. class_names: of labels 1, 2 …. train_on_empty: whether images without boxes are trained on.
    """

    images: Dataset[tuple[Tensor, Any]]
    ids: np.ndarray
    sizes: np.ndarray
    boxes: Boxes
    class_names: tuple[str, ...]
    train_on_empty: bool

    def __len__(self) -> int:
        return len(self.ids)

    def training(self, chosen: np.ndarray, flip: float, seed: int) -> DetectionSamples:
        """Give samples of some images with the boxes that are trained on, mirrored with probability `flip`."""
        boxes = self.boxes.to_train_on(self.sizes)
        if not self.train_on_empty:
            chosen = chosen[boxes.counts()[chosen] > 0]
        return DetectionSamples(replace(self, boxes=boxes), chosen, flip=flip, seed=seed)

    def testing(self, chosen: np.ndarray) -> DetectionSamples:
        """Give samples of some images with all their boxes, and what AP needs besides."""
        return DetectionSamples(self, chosen, for_ap=True)


class DetectionSamples(Dataset[Sample]):
    """(image (3, H, W) float32 in [0, 1], target) of the images at `chosen`.

    target: boxes (n, 4) float32 x1 y1 x2 y2 in pixels, labels (n,) int64 from 1 (0 is background), image_id; with
    `for_ap` also iscrowd (n,) int64. flip: probability that image and boxes are mirrored, as `seed`, epoch and image
    say. A sample is asked for by (epoch, place), or by its place alone for epoch 0.
    """

    def __init__(
        self, images: AnnotatedImages, chosen: np.ndarray, *, flip: float = 0.0, seed: int = 0, for_ap: bool = False
    ) -> None:
        self.images, self.chosen, self.flip, self.seed, self.for_ap = images, chosen, flip, seed, for_ap

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        place = int(self.chosen[index])
        image = self.images.images[place][0]
        all_boxes = self.images.boxes
        rows = slice(all_boxes.offsets[place], all_boxes.offsets[place + 1])
        boxes = torch.tensor(all_boxes.boxes[rows])
        if self.flip and draws.numbers(Draw(self.seed, epoch, place), draws.WEAK, 1)[0] < self.flip:
            image, boxes = mirror(image, boxes)
        target = {
            "boxes": boxes,
            "labels": torch.tensor(all_boxes.labels[rows]),
            "image_id": torch.tensor(int(self.images.ids[place])),
        }
        if self.for_ap:
            target["iscrowd"] = torch.tensor(all_boxes.crowd[rows].astype(np.int64))
        return image, target


def mirror(image: Tensor, boxes: Tensor) -> Sample:
    """Exchange left and right of an image (3, H, W) and its boxes (n, 4)."""
    x1, y1, x2, y2 = boxes.unbind(1)
    width = image.shape[-1]
    return image.flip(-1), torch.stack([width - x2, y1, width - x1, y2], 1)


def collate(samples: Sequence[Sample]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Make a batch: images, which may be of several sizes, and their targets."""
    images, targets = zip(*samples)
    return list(images), list(targets)
