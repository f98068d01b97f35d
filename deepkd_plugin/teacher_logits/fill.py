"""Filling a table before any run needs it: all its views of all images, by any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .. import data, device
from ..data import draws
from ..data.arrays import Training
from ..data.normalise import NormalisingLoader
from ..data.resident import ResidentLoader, batchwise, count_numbers, draw, view_count, view_index
from ..data.workers import end_if_left
from ..run.progress import EpochBar
from .lookup import TeacherLogits, check_teacher
from .tables import make_key, place

Batches = Callable[[int, list[Tensor]], Iterator[Tensor]]
"""(view, places of images by batch) -> the images of each batch in that view, (B, 3, H, W)."""


def fill(
    cfg: Any, teacher: nn.Module, fingerprint: str, samples: Any, at: torch.device, share: tuple[int, int] = (0, 1)
) -> TeacherLogits:
    """Compute what the table that a config means does not have yet; returns the table, closed.

    teacher: on the device `at`. samples: the training set, as data.get_dataset's loader has it. share: (n, N), to take
    the nth part of N. An interruption leaves what is done. Raises UserError as tables.open_logits does.
    """
    key, (number, parts) = make_key(cfg, fingerprint, samples), share
    if cfg.SOLVER.AMP:  # as in a training step
        device.classify_in_float32(teacher)
    some = torch.linspace(0, key.count - 1, min(32, key.count)).long()
    batches = _stored(cfg, samples, at) if key.seed is not None else _counted(cfg, samples, at)
    check_teacher(teacher, device.place_batch(next(batches(0, [some])), at, cfg.SOLVER.CHANNELS_LAST))
    view = 0

    def find(epoch: int, index: Tensor) -> tuple[Tensor, Tensor]:
        return index, torch.full_like(index, view)

    # of about one size, since the teacher rounds otherwise in batches of a few
    split = np.array_split(np.arange(key.count), -(-key.count // cfg.SOLVER.BATCH_SIZE))[number::parts]
    logits = TeacherLogits(key, place(cfg), teacher, find, cfg.SOLVER.AMP, np.asarray(samples.images.targets))
    try:
        with EpochBar("views", key.views) as bar:
            for view in range(key.views):
                missing = [torch.from_numpy(part) for part in split if not _has(logits, part, view)]
                for index, image in zip(missing, batches(view, missing)):
                    logits(device.place_batch(image, at, cfg.SOLVER.CHANNELS_LAST), index, view + 1)
                bar.update(view + 1, "")
    finally:
        logits.close()
    return logits


def _has(logits: TeacherLogits, places: np.ndarray, view: int) -> bool:
    return logits.table is None or bool(logits.table.read(places, np.full_like(places, view))[1].all())


def _stored(cfg: Any, samples: Any, at: torch.device) -> Batches:
    """Return what reads images and makes their views as a run does, by the run's own loader processes."""
    source, places = data.source(cfg), np.arange(len(samples.images))
    whole = Training(samples.images, places, source.training_views(1), cfg.SOLVER.SEED, data.weak_views(cfg))

    def batches(view: int, places: list[Tensor]) -> Iterator[Tensor]:
        keys = [[(view + 1, place) for place in part.tolist()] for part in places]
        workers = cfg.DATASET.NUM_WORKERS
        loader = DataLoader(whole, batch_sampler=keys, num_workers=workers, worker_init_fn=end_if_left)
        finished = NormalisingLoader(loader, source.mean, source.std, at) if source.in_bytes else loader
        return (image for image, _, _ in finished)

    return batches


def _counted(cfg: Any, samples: Any, at: torch.device) -> Batches:
    """Return what makes the views of a set whose views can be counted, on the device."""
    images, source = samples.images, data.source(cfg)
    pixels = torch.from_numpy(images.pixels(np.arange(len(images)))).to(at)
    targets = torch.as_tensor(images.targets)
    loader = ResidentLoader(
        samples, pixels, targets, cfg.SOLVER.BATCH_SIZE, source.mean, source.std, source.augmentation
    )
    distortions = batchwise(source.augmentation, source.side, source.side)
    some = torch.arange(100 * (view_count(distortions) or 0))  # each view is drawn by some of so many images of a seed
    numbers = draws.uniforms(0, 0, some, draws.WEAK, count_numbers(distortions))
    drawn, views = draw(distortions, numbers), view_index(distortions, 0, 0, some)

    def batches(view: int, places: list[Tensor]) -> Iterator[Tensor]:
        for first in torch.nonzero(views == view)[:1].flatten().tolist():
            of_view = [d[..., first : first + 1].to(at) for d in drawn]
            for index in places:
                yield loader.make(index.to(at), [d.expand(*d.shape[:-1], len(index)) for d in of_view])

    return batches
