"""Data sets by config: what mdistiller's get_dataset gives, for the sets that the built-in host reads."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, Subset

from .. import device
from ..errors import UserError
from . import cifar100, glyphs, imagenet
from .arrays import ArrayDataset, choose, small_image_transforms

Sets = tuple[Dataset, Dataset, int]
"""Training set, test set, number of classes."""


def get_dataset(cfg: Any) -> tuple[DataLoader, DataLoader, int, int]:
    """(train loader, test loader, number of training images, number of classes) of DATASET.TYPE.

    Training batches are (image, target, index), test batches (image, target). With DATASET.HOLDOUT the
    second loader holds the images kept from training instead of the test set. Raises UserError for an
    unknown type and for data that is missing or not what it should be.
    """
    if cfg.DATASET.TYPE not in DATASETS:
        raise UserError(f"DATASET.TYPE is {cfg.DATASET.TYPE!r}; it must be one of {', '.join(DATASETS)}")
    train, test, num_classes = DATASETS[cfg.DATASET.TYPE](cfg.DATASET)
    options = {"num_workers": cfg.DATASET.NUM_WORKERS, "pin_memory": device.pick().type == "cuda"}
    return (
        DataLoader(train, cfg.SOLVER.BATCH_SIZE, shuffle=True, **options),
        DataLoader(test, cfg.DATASET.TEST.BATCH_SIZE, **options),
        len(train),
        num_classes,
    )


def _small_images(
    source: ModuleType, load: Callable[[str, str], tuple[np.ndarray, np.ndarray]], flip: bool, node: Any
) -> Sets:
    train_transform, test_transform = small_image_transforms(source.MEAN, source.STD, flip)
    images, labels = load(node.ROOT, "train")
    chosen, held = choose(labels, node.TRAIN_PER_CLASS, node.HOLDOUT)
    test = (images[held], labels[held]) if node.HOLDOUT else load(node.ROOT, "test")
    train = ArrayDataset(images[chosen], labels[chosen], train_transform, train=True)
    return train, ArrayDataset(*test, test_transform, train=False), cifar100.NUM_CLASSES


def _imagenet(node: Any) -> Sets:
    train = imagenet.load_imagenet(node.ROOT, "train")
    chosen, held = choose(np.asarray(train.targets), node.TRAIN_PER_CLASS, node.HOLDOUT)
    test: Dataset = imagenet.load_imagenet(node.ROOT, "val")
    if node.HOLDOUT:
        test = Subset(imagenet.load_imagenet(node.ROOT, "train", augment=False), held)
    return Subset(train, chosen), test, imagenet.NUM_CLASSES


DATASETS: dict[str, Callable[[Any], Sets]] = {
    "cifar100": partial(_small_images, cifar100, cifar100.load_cifar100, True),
    # a mirrored glyph is another glyph (b and d), so there is no flip
    "glyphs100": partial(_small_images, glyphs, glyphs.load_glyphs100, False),
    "imagenet": _imagenet,
}
"""Data set → how to make it from the config node DATASET."""
