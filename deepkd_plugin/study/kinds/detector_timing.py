"""How long a detection run of this package will take, from its detectors' parts timed here on noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ... import device
from ...detection.distillers import DISTILLERS, training_pass
from ...detection.networks import network
from .timing import FEW, Parts, Timed, backward_passes, least_parts, least_seconds, with_teacher

if TYPE_CHECKING:
    from ..table import Cell
from ...detection.data.sizes import SIZES, images, steps

BOXES = 3
"""In an image of noise."""

LARGE = 400
"""Pixels from which on one image takes a CPU so long that more are not timed."""


def run_seconds(cfg: Any, parts: Parts) -> float:
    """A run's time from its parts: as estimate.run_seconds has it, without loading images and measuring AP.

    In tests the student is taken to need the time of its forward pass in training.
    """
    with_teacher = cfg.DISTILLER.TYPE != "NONE"
    step = with_teacher * parts.teacher + parts.student + backward_passes(cfg) * parts.backward
    test = images(cfg)[1] / cfg.SOLVER.BATCH_SIZE
    epoch = steps(cfg) * step + test * parts.student
    return cfg.SOLVER.EPOCHS * epoch + with_teacher * test * parts.teacher


def measure(cfg: Any, threads: int) -> Parts:
    """Time a config's detectors, untrained, on noise of the real size, as estimate.measure does."""
    return least_parts(TimedDetectors(cfg, device.pick()), cfg.SOLVER.BATCH_SIZE, threads)


class DetectorTimer:
    """Times each pair's detectors once."""

    def __init__(self, cfgs: Mapping[Cell, Any], threads: int) -> None:
        self.cfgs, self.threads = cfgs, threads
        self.measured: dict[str, Parts] = {}

    def __call__(self, pair: str, cfg: Any) -> float:
        if pair not in self.measured:
            self.measured[pair] = measure(with_teacher(self.cfgs, pair), self.threads)
        return run_seconds(cfg, self.measured[pair])


class TimedDetectors(Timed):
    """A config's detectors, to be timed. The teacher's part is its logits of the student's proposals."""

    def __init__(self, cfg: Any, at: torch.device) -> None:
        self.cfg, self.at, self.size = cfg, at, SIZES[cfg.DATASET.TYPE]
        # what a step costs beside its images does not grow with them, and is most of it where they are small
        self.few = FEW if self.size.height < LARGE else 1
        names = [cfg.DISTILLER.STUDENT]
        names += [cfg.DISTILLER.TEACHER] * (cfg.DISTILLER.TYPE != "NONE")
        made = [network(name, self.size.classes, cfg.DETECTION) for name in names]
        distiller = DISTILLERS[cfg.DISTILLER.TYPE](*made, cfg)
        self.made = {"student": device.place(distiller, at, False).train()}
        if len(made) > 1:
            self.made["teacher"] = distiller

    def _seconds(self, part: str, count: int, budget: float, backward: bool = False) -> float:
        distiller, size = self.made[part], self.size
        image = [torch.rand(3, size.height, size.width, device=self.at) for _ in range(count)]
        box = torch.tensor([0.2, 0.2, 0.5, 0.5]) * torch.tensor([size.width, size.height] * 2)
        labels = torch.ones(BOXES, dtype=torch.int64, device=self.at)
        target = [{"boxes": box.repeat(BOXES, 1).to(self.at), "labels": labels}] * count
        amp, batch = self.cfg.SOLVER.AMP, self.cfg.SOLVER.BATCH_SIZE

        def forward() -> Any:
            with device.autocast(self.at, amp):
                return training_pass(distiller.student, image, target)

        def both() -> None:
            distiller.zero_grad()
            sum(forward().losses.values()).backward()

        if part == "student":
            return batch / count * least_seconds(both if backward else forward, self.at, budget)
        step = forward()

        def teach() -> None:
            with device.autocast(self.at, amp):
                distiller.teach(step)

        return batch / count * least_seconds(teach, self.at, budget)
