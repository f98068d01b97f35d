"""Detection sets by config, for the torchvision host."""

from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from ... import config, device
from ...data.arrays import Passes, Shares
from ...data.workers import end_if_left
from ...distributed import process_group
from ...errors import UserError
from . import canvas, coco  # noqa: F401 (each registers its set)
from .samples import DetectionSamples, collate
from .sources import DETECTION_SETS, DetectionSource

__all__ = ["DETECTION_SETS", "DetectionSource", "get_detection_sets"]


def get_detection_sets(cfg: Any) -> tuple[DataLoader, DataLoader, int, tuple[str, ...]]:
    """Return (training loader, test loader, number of training images, names of the classes) of DATASET.TYPE.

    A batch is (list of images, list of targets) of `samples.DetectionSamples`; targets of the second loader have
    what AP needs. Training images are mirrored with probability DETECTION.FLIP. With DATASET.HOLDOUT the last
    share of the training images is kept from training, and the second loader has it instead of the test set.
    Raises UserError for an unknown type and for data that is missing or not what it should be.
    """
    source = DETECTION_SETS[cfg.DATASET.TYPE]
    images = source.load(cfg.DATASET, "train")
    chosen, kept_out = _split(len(images), cfg.DATASET.HOLDOUT)
    train = images.training(chosen, cfg.DETECTION.FLIP, cfg.SOLVER.SEED)
    if not len(train):
        raise UserError(f"DATASET.ROOT {cfg.DATASET.ROOT}: no training image of {cfg.DATASET.TYPE} has a box")
    if cfg.DATASET.HOLDOUT:
        test, boxes = images.testing(kept_out), images.boxes.counts()[kept_out]
    else:
        other = source.load(cfg.DATASET, "test")
        if other.class_names != images.class_names:
            raise UserError(
                f"DATASET.ROOT {cfg.DATASET.ROOT}: the training and the test set of {cfg.DATASET.TYPE} have other "
                f"classes ({len(images.class_names)} and {len(other.class_names)}); they must be the same"
            )
        test, boxes = other.testing(np.arange(len(other))), other.boxes.counts()
    if not boxes.any():
        raise UserError(
            f"DATASET.ROOT {cfg.DATASET.ROOT}: none of the {len(test)} images of {cfg.DATASET.TYPE} to test on has a "
            f"box; AP needs some"
        )
    return _loader(cfg, train, True), _loader(cfg, test, False), len(train), images.class_names


def _split(count: int, holdout: float) -> tuple[np.ndarray, np.ndarray]:
    """Choose the places to train on and those to hold out."""
    kept = count - round(holdout * count)
    if not kept or (holdout and kept == count):
        raise UserError(
            f"DATASET.HOLDOUT is {holdout}, which leaves {kept} images to train on and {count - kept} held out of "
            f"{count}; both must be above 0"
        )
    return np.arange(kept), np.arange(kept, count)


def _loader(cfg: Any, samples: DetectionSamples, training: bool) -> DataLoader:
    size = cfg.SOLVER.BATCH_SIZE if training else cfg.DATASET.TEST.BATCH_SIZE
    loading: dict[str, Any] = {"num_workers": cfg.DATASET.NUM_WORKERS}
    loading["pin_memory"] = device.pick().type == "cuda"
    loading["worker_init_fn"] = end_if_left
    sampler = Passes(samples.chosen, cfg.SOLVER.SEED) if training else None
    if process_group.size() > 1:
        # whole batches of tests, for the images of a batch are padded to one size
        tested = [range(first, min(first + size, len(samples))) for first in range(0, len(samples), size)]
        tested = tested[process_group.rank() :: process_group.size()]
        own = Shares(sampler, size, config.chunk(cfg)) if training else tested
        return DataLoader(samples, batch_sampler=own, collate_fn=collate, **loading)
    return DataLoader(samples, size, sampler=sampler, collate_fn=collate, **loading)
