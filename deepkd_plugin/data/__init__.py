"""Data sets by config: what mdistiller's get_dataset gives, for the sets that the built-in host reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import transforms

from .. import config, device
from ..errors import UserError
from . import cifar100, glyphs, imagenet, tiny_imagenet
from .arrays import ArrayDataset, Contrast, Indexed, choose
from .resident import ResidentLoader
from .views import StrongAugment, TwoViews

Distortion = Callable[[Image.Image], Image.Image]
Loader = DataLoader | ResidentLoader


@dataclass(frozen=True)
class Source:
    """A data set: how its parts are read, and how an image becomes a tensor.

    read: (node DATASET, "train" or "test", transform) -> data set of (transform(image), label) that has all
    labels as `targets`. mean, std: of the channels, images being in [0, 1]. augmentation, resizing: what an
    image goes through in training and in tests. small: whether all images are of one size, need no resizing and
    fit on a device.
    """

    read: Callable[[Any, str, Callable[[Image.Image], Any]], Dataset]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: tuple[Distortion, ...]
    resizing: tuple[Distortion, ...] = ()
    small: bool = True

    def training_transform(self, views: int) -> Callable[[Image.Image], Any]:
        """Image to tensor, or to [weak view, strong view] where `views` is 2."""
        weak = self._tensor(*self.augmentation)
        return weak if views == 1 else TwoViews(weak, self._tensor(*self.augmentation, StrongAugment()))

    def test_transform(self) -> Callable[[Image.Image], Tensor]:
        """Image to tensor, nothing at random."""
        return self._tensor(*self.resizing)

    def _tensor(self, *distortions: Distortion) -> Callable[[Image.Image], Tensor]:
        end = transforms.ToTensor(), transforms.Normalize(self.mean, self.std)
        return transforms.Compose([*distortions, *end])


def get_dataset(cfg: Any) -> tuple[Loader, Loader, int, int]:
    """(train loader, test loader, number of training images, number of classes) of DATASET.TYPE.

    Training batches are (image, target, index), where `image` is a list of the weak and the strong view if
    the config's method needs both, and CRD has (B, 1 + K) contrast indices behind them; test batches are
    (image, target). With DATASET.HOLDOUT the second loader holds the images kept from training instead of the
    test set. With DATASET.PIPELINE "device" batches are made on the device and lie there. Raises UserError for
    an unknown type, for one or a method that this pipeline cannot serve, and for data that is missing or not
    what it should be.
    """
    source = _source(cfg)
    config.check_pipeline(cfg, {"DATASET.PIPELINE": "config"})
    images = source.read(cfg.DATASET, "train", source.training_transform(config.views(cfg)))
    chosen, _ = _choose(images, cfg.DATASET)
    train: Dataset = Indexed(Subset(images, chosen))
    if cfg.DISTILLER.TYPE in ("CRD", "CRDKD"):
        labels = np.asarray(images.targets)[chosen]
        train = Contrast(train, labels, cfg.CRD.NCE.K, cfg.CRD.MODE == "relax")
    test_loader, num_classes = get_test_set(cfg)
    train_loader = _loader(cfg, source, train, images, chosen, training=True)
    return train_loader, test_loader, len(train), num_classes


def get_test_set(cfg: Any) -> tuple[Loader, int]:
    """(test loader, number of classes), without touching training images unless DATASET.HOLDOUT asks for them."""
    source = _source(cfg)
    images = source.read(cfg.DATASET, "train" if cfg.DATASET.HOLDOUT else "test", source.test_transform())
    test, held = images, np.arange(len(images))
    if cfg.DATASET.HOLDOUT:
        _, held = _choose(images, cfg.DATASET)
        test = Subset(images, held)
    return _loader(cfg, source, test, images, held, training=False), source.num_classes


def num_classes(cfg: Any) -> int:
    """The classes of DATASET.TYPE, without reading it."""
    return _source(cfg).num_classes


def _source(cfg: Any) -> Source:
    kind = cfg.DATASET.TYPE
    if kind not in DATASETS:
        raise UserError(f"DATASET.TYPE is {kind!r}; it must be one of {', '.join(DATASETS)}")
    source = DATASETS[kind]
    if cfg.DATASET.PIPELINE == "device" and not source.small:
        raise UserError(
            f"config: DATASET.PIPELINE is 'device'; it must be 'workers' with DATASET.TYPE {kind}: its images are "
            f"of many sizes, and too many for a device"
        )
    return source


def _choose(images: Any, node: Any) -> tuple[np.ndarray, np.ndarray]:
    return choose(np.asarray(images.targets), node.TRAIN_PER_CLASS, node.HOLDOUT)


def _loader(
    cfg: Any, source: Source, dataset: Dataset, images: Any, chosen: np.ndarray, training: bool
) -> Loader:
    """Batches of `dataset`, whose images are those of `images` at `chosen`."""
    size = cfg.SOLVER.BATCH_SIZE if training else cfg.DATASET.TEST.BATCH_SIZE
    at = device.pick()
    if cfg.DATASET.PIPELINE == "workers":
        loading = {"num_workers": cfg.DATASET.NUM_WORKERS, "pin_memory": at.type == "cuda"}
        return DataLoader(dataset, size, shuffle=training, **loading)
    pixels = torch.from_numpy(images.pixels(chosen)).to(at)
    targets = torch.from_numpy(np.asarray(images.targets)[chosen]).to(at)
    distortions = source.augmentation if training else None
    return ResidentLoader(dataset, pixels, targets, size, source.mean, source.std, distortions)


def _cifar100(node: Any, split: str, transform: Callable) -> Dataset:
    return ArrayDataset(*cifar100.load_cifar100(node.ROOT, split, node.DOWNLOAD), transform)


def _glyphs100(node: Any, split: str, transform: Callable) -> Dataset:
    return ArrayDataset(*glyphs.load_glyphs100(node.ROOT, split), transform)


def _imagenet(node: Any, split: str, transform: Callable) -> Dataset:
    return imagenet.load_imagenet(node.ROOT, "train" if split == "train" else "val", transform)


def _tiny_imagenet(node: Any, split: str, transform: Callable) -> Dataset:
    return tiny_imagenet.load_tiny_imagenet(node.ROOT, "train" if split == "train" else "val", transform)


_CROP = transforms.RandomCrop(32, padding=4)

DATASETS: dict[str, Source] = {
    "cifar100": Source(
        _cifar100,
        cifar100.NUM_CLASSES,
        cifar100.MEAN,
        cifar100.STD,
        augmentation=(_CROP, transforms.RandomHorizontalFlip()),
    ),
    # a mirrored glyph is another glyph (b and d), so there is no flip
    "glyphs100": Source(_glyphs100, glyphs.NUM_CLASSES, glyphs.MEAN, glyphs.STD, augmentation=(_CROP,)),
    "imagenet": Source(
        _imagenet,
        imagenet.NUM_CLASSES,
        imagenet.MEAN,
        imagenet.STD,
        imagenet.AUGMENTATION,
        imagenet.RESIZING,
        small=False,
    ),
    "tiny_imagenet": Source(
        _tiny_imagenet,
        tiny_imagenet.NUM_CLASSES,
        tiny_imagenet.MEAN,
        tiny_imagenet.STD,
        tiny_imagenet.AUGMENTATION,
    ),
}
"""The data sets of the built-in host."""
