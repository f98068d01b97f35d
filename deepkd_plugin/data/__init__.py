"""Data sets by config: what mdistiller's get_dataset gives, for the sets that are registered."""

from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from .. import config, device
from ..distributed import process_group
from ..errors import UserError, shown
from ..terminal import warn
from . import arrow, cifar100, glyphs, imagenet, pairs, tiny_imagenet  # noqa: F401 (each registers its set)
from .arrays import Contrast, Passes, Shares, Training, choose
from .augment import make_mixing, training_source
from .description import Description, describe
from .draws import Views
from .normalise import NormalisingLoader
from .own import OWN, OwnImages
from .resident import ResidentLoader, known
from .sources import DATASETS, ZOOS, Source, knows, names, register_dataset, source
from .workers import end_if_left

__all__ = [
    "DATASETS",
    "OWN",
    "ZOOS",
    "Description",
    "OwnImages",
    "Source",
    "describe",
    "get_dataset",
    "get_test_set",
    "knows",
    "make_mixing",
    "names",
    "num_classes",
    "pipeline",
    "register_dataset",
    "source",
    "training_source",
]

Loader = DataLoader | NormalisingLoader | ResidentLoader


def get_dataset(cfg: Any) -> tuple[Loader, Loader, int, int]:
    """Return (training loader, test loader, number of training images, number of classes) of DATASET.TYPE.

    Training batches are (image, target, index). If the config's method needs two views, `image` is the list of the
    weak and the strong one. CRD has (B, 1 + K) contrast indices behind them. Test batches are (image, target). With
    DATASET.HOLDOUT the second loader has the images kept from training instead of the test set. Images are float32 and
    normalised. With the pipeline "device", and of a large set, batches are on the device already. Raises UserError for
    an unknown type, for one or a method that the pipeline cannot serve, and for data that is missing or not what it
    should be.
    """
    data_set = _source(cfg)
    config.check_pipeline(cfg, {"DATASET.PIPELINE": "config"})
    images = data_set.load(cfg.DATASET, "train")
    chosen, _ = _choose(data_set, images, cfg.DATASET)
    make = data_set.training_views(config.views(cfg))
    train: Dataset = Training(images, chosen, make, cfg.SOLVER.SEED, weak_views(cfg))
    if config.contrasts(cfg):
        labels = np.asarray(images.targets)[chosen]
        train = Contrast(train, labels, cfg.CRD.NCE.K, cfg.CRD.MODE == "relax")
    test_loader, num_classes = get_test_set(cfg)
    train_loader = _loader(cfg, data_set, train, images, chosen, training=True)
    return train_loader, test_loader, len(train), num_classes


def get_test_set(cfg: Any) -> tuple[Loader, int]:
    """Return (test loader, number of classes), reading no training image unless DATASET.HOLDOUT asks for them."""
    _source(cfg)  # which refuses what it cannot serve
    data_set, node = source(cfg), cfg.DATASET  # as it is without AUGMENT, so that tests see one image whatever that is
    images = data_set.load(node, "train" if node.HOLDOUT else "test", data_set.test_transform())
    test, chosen = images, np.arange(len(images))
    if node.HOLDOUT:
        _, chosen = _choose(data_set, images, node)
        test = Subset(images, chosen)
    return _loader(cfg, data_set, test, images, chosen, training=False), data_set.num_classes


def num_classes(cfg: Any) -> int:
    """Return the number of classes of DATASET.TYPE, without reading it."""
    return source(cfg).num_classes


def pipeline(cfg: Any) -> str:
    """Return who makes a run's batches: "workers" or "device", which DATASET.PIPELINE auto leaves to what can be.

    That is the device on a GPU, for a small set whose distortions it knows and a method that needs nothing else.
    """
    asked: str = cfg.DATASET.PIPELINE
    if asked != "auto":
        return asked
    data_set = DATASETS.get(cfg.DATASET.TYPE)  # None: one of detection, or a user's own images, which are large
    if device.pick().type == "cpu" or data_set is None or not data_set.small or config.needs_workers(cfg):
        return "workers"
    made = all(known(distortion, data_set.side, data_set.side) for distortion in data_set.augmentation)
    return "device" if made else "workers"


def weak_views(cfg: Any) -> Views:
    """Return whose numbers make a run's weak views: with stored logits of a teacher, a few epochs' in turn."""
    node = cfg.DISTILLER
    if node.TEACHER_LOGITS == "stored" and node.TYPE != "NONE":
        return Views(node.LOGITS_SEED, node.LOGITS_VIEWS)
    return Views(cfg.SOLVER.SEED)


def _source(cfg: Any) -> Source:
    data_set = training_source(cfg)
    if cfg.DATASET.PIPELINE == "device" and not data_set.small:
        raise UserError(
            f"config: DATASET.PIPELINE is 'device'; it must be 'workers' with DATASET.TYPE {cfg.DATASET.TYPE}: its "
            f"images are of many sizes, and too many for a device"
        )
    return data_set


def _choose(data_set: Source, images: Any, node: Any) -> tuple[np.ndarray, np.ndarray]:
    """Choose as `choose` does; UserError for a class that has no image to train on, a line for one without tests."""
    labels = np.asarray(images.targets)
    parts = choose(labels, node.TRAIN_PER_CLASS, node.HOLDOUT)
    names = data_set.class_names(node.ROOT) if data_set.class_names else None
    for part, purpose in zip(parts, ("train", "test")):
        missing = np.setdiff1d(labels, labels[part])
        if not missing.size or (purpose == "test" and not node.HOLDOUT):
            continue
        first = shown(names[missing[0]]) if names else str(missing[0])
        text = f"DATASET.HOLDOUT {node.HOLDOUT} leaves no image of the class {first} to {purpose} on"
        if purpose == "train":
            raise UserError(f"{text}; it must leave one, or the class must have more images")
        warn(f"{text}, and {missing.size - 1} other classes have none either")
    return parts


def _loader(cfg: Any, data_set: Source, samples: Dataset, images: Any, chosen: np.ndarray, training: bool) -> Loader:
    """Make the loader of `samples`, whose images are those of `images` at the places `chosen`."""
    size = cfg.SOLVER.BATCH_SIZE if training else data_set.test_batch(cfg)
    target_device = device.pick()
    sampler = Passes(chosen, cfg.SOLVER.SEED, weak_views(cfg)) if training else None
    tested = range(process_group.rank(), len(samples), process_group.size())  # processes share the test images
    if pipeline(cfg) == "workers":
        loading: dict[str, Any] = {"num_workers": cfg.DATASET.NUM_WORKERS}
        loading["pin_memory"] = target_device.type == "cuda"
        loading["worker_init_fn"] = end_if_left
        if sampler is not None and process_group.size() > 1:
            loader = DataLoader(samples, batch_sampler=Shares(sampler, size, config.chunk(cfg)), **loading)
        else:
            loader = DataLoader(samples, size, sampler=sampler or tested, **loading)
        if data_set.in_bytes:
            return NormalisingLoader(loader, data_set.mean, data_set.std, target_device)
        return loader
    if not training:
        chosen = chosen[tested]
    pixels = torch.from_numpy(images.pixels(chosen)).to(target_device)
    targets = torch.from_numpy(np.asarray(images.targets)[chosen]).to(target_device)
    distortions = data_set.augmentation if training else ()
    loader = ResidentLoader(samples, pixels, targets, size, data_set.mean, data_set.std, distortions, sampler)
    if process_group.size() > 1:
        loader.chunk = config.chunk(cfg)
    return loader
