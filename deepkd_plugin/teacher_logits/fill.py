"""Filling a table before any run needs it: all views of all images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import data, device
from ..data import draws
from ..data.resident import ResidentLoader, batchwise, count_numbers, draw, view_index
from ..run.progress import EpochBar
from .lookup import TeacherLogits, check_teacher
from .tables import make_key, place


def fill(cfg: Any, teacher: nn.Module, fingerprint: str, samples: Any, at: torch.device) -> TeacherLogits:
    """Compute what the table that a config means does not have yet; returns the table, closed.

    teacher: on the device `at`. samples: the training set, as data.get_dataset's loader has it. An interruption leaves
    what is done. Raises UserError as tables.open_logits does.
    """
    key, images = make_key(cfg, fingerprint, samples), samples.images
    source, size = data.source(cfg.DATASET.TYPE), cfg.SOLVER.BATCH_SIZE
    if cfg.SOLVER.AMP:  # as in a training step
        device.classify_in_float32(teacher)
    pixels = torch.from_numpy(images.pixels(np.arange(len(images)))).to(at)
    targets = torch.as_tensor(images.targets)
    loader = ResidentLoader(samples, pixels, targets, size, source.mean, source.std, source.augmentation)
    check_teacher(teacher, loader.normalise(loader.images[:32]))
    view = 0

    def find(epoch: int, index: Tensor) -> tuple[Tensor, Tensor]:
        return index, torch.full_like(index, view)

    logits = TeacherLogits(key, place(cfg), teacher, find, cfg.SOLVER.AMP)
    try:
        with EpochBar("views", key.views) as bar:
            for view, drawn in _views(source, key.views, at):
                for index in torch.arange(key.count).split(size):
                    if logits.table is None or logits.table.read(*(part.numpy() for part in find(0, index)))[1].all():
                        continue
                    image = loader.make(index.to(at), [d.expand(*d.shape[:-1], len(index)) for d in drawn])
                    logits(device.place_batch(image, at, cfg.SOLVER.CHANNELS_LAST), index, view + 1)
                bar.update(view + 1, "")
    finally:
        logits.close()
    return logits


def _views(source: Any, count: int, at: torch.device) -> Iterator[tuple[int, list[Tensor]]]:
    """Yield each view of an image with what its distortions draw for it, (…, 1) each."""
    distortions = batchwise(source.augmentation, source.side, source.side)
    some = torch.arange(100 * count)  # each view is drawn by some of so many images of a seed
    numbers = draws.uniforms(0, 0, some, draws.WEAK, count_numbers(distortions))
    drawn, views = draw(distortions, numbers), view_index(distortions, 0, 0, some)
    for view in range(count):
        (first,) = torch.nonzero(views == view)[:1].flatten().tolist() or [None]
        if first is not None:
            yield view, [d[..., first : first + 1].to(at) for d in drawn]
