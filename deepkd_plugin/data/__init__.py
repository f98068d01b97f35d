"""Data sets by config: what mdistiller's get_dataset gives, for the sets that the built-in host reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, Subset

from .. import device
from ..errors import UserError
from . import cifar100, glyphs, imagenet
from .arrays import ArrayDataset, Indexed, choose, small_image_transforms


@dataclass(frozen=True)
class Source:
    """A data set: how its parts are made from the config node DATASET. Both give (image, label)."""

    train: Callable[[Any], Dataset]
    test: Callable[[Any], Dataset]
    num_classes: int


def get_dataset(cfg: Any) -> tuple[DataLoader, DataLoader, int, int]:
    """(train loader, test loader, number of training images, number of classes) of DATASET.TYPE.

    Training batches are (image, target, index), test batches (image, target). With DATASET.HOLDOUT the
    second loader holds the images kept from training instead of the test set. Raises UserError for an
    unknown type and for data that is missing or not what it should be.
    """
    train = Indexed(_source(cfg).train(cfg.DATASET))
    test_loader, num_classes = get_test_set(cfg)
    train_loader = DataLoader(train, cfg.SOLVER.BATCH_SIZE, shuffle=True, **_loading(cfg))
    return train_loader, test_loader, len(train), num_classes


def get_test_set(cfg: Any) -> tuple[DataLoader, int]:
    """(test loader, number of classes), without touching training images unless DATASET.HOLDOUT asks for them."""
    source = _source(cfg)
    test = source.test(cfg.DATASET)
    return DataLoader(test, cfg.DATASET.TEST.BATCH_SIZE, **_loading(cfg)), source.num_classes


def _source(cfg: Any) -> Source:
    if cfg.DATASET.TYPE not in DATASETS:
        raise UserError(f"DATASET.TYPE is {cfg.DATASET.TYPE!r}; it must be one of {', '.join(DATASETS)}")
    return DATASETS[cfg.DATASET.TYPE]


def _loading(cfg: Any) -> dict[str, Any]:
    return {"num_workers": cfg.DATASET.NUM_WORKERS, "pin_memory": device.pick().type == "cuda"}


def _small_images(
    source: ModuleType, load: Callable[[str, str], tuple[np.ndarray, np.ndarray]], flip: bool
) -> Source:
    """A set that fits into memory, with mdistiller's CIFAR-100 augmentation."""
    augmented, plain = small_image_transforms(source.MEAN, source.STD, flip)

    def train(node: Any) -> Dataset:
        images, labels = load(node.ROOT, "train")
        chosen, _ = choose(labels, node.TRAIN_PER_CLASS, node.HOLDOUT)
        return ArrayDataset(images[chosen], labels[chosen], augmented)

    def test(node: Any) -> Dataset:
        if not node.HOLDOUT:
            return ArrayDataset(*load(node.ROOT, "test"), plain)
        images, labels = load(node.ROOT, "train")
        _, held = choose(labels, node.TRAIN_PER_CLASS, node.HOLDOUT)
        return ArrayDataset(images[held], labels[held], plain)

    return Source(train, test, source.NUM_CLASSES)


def _imagenet(train: bool, node: Any) -> Dataset:
    if not train and not node.HOLDOUT:
        return imagenet.load_imagenet(node.ROOT, "val", augment=False)
    images = imagenet.load_imagenet(node.ROOT, "train", augment=train)
    chosen, held = choose(np.asarray(images.targets), node.TRAIN_PER_CLASS, node.HOLDOUT)
    return Subset(images, chosen if train else held)


DATASETS: dict[str, Source] = {
    "cifar100": _small_images(cifar100, cifar100.load_cifar100, flip=True),
    # a mirrored glyph is another glyph (b and d), so there is no flip
    "glyphs100": _small_images(glyphs, glyphs.load_glyphs100, flip=False),
    "imagenet": Source(partial(_imagenet, True), partial(_imagenet, False), imagenet.NUM_CLASSES),
}
"""The data sets of the built-in host."""
