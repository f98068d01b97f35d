"""How long a classification run will take, from its networks' passes timed here on noise."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from ... import config, data, device
from ...config.keys import TRAINER
from ...hosts.host import Host
from ...hosts.networks import network
from ...hosts.registry import find_host
from ..shared import cores

if TYPE_CHECKING:
    from ..table import Cell
from ...data.sizes import SIZES, images, steps

BUDGET = 3.0
"""Seconds that the timing of a pair's networks may take, about."""

FEW = 8
"""Images in the batch that tells whether a whole one fits the budget."""


class Parts(NamedTuple):
    """Seconds that a pair's networks take for SOLVER.BATCH_SIZE images: both forward passes, one backward pass."""

    teacher: float
    student: float
    backward: float


class ClassifierTimer:
    """Times each pair's networks once, and how long an image takes to load."""

    def __init__(self, cfgs: Mapping[Cell, Any], threads: int) -> None:
        self.cfgs, self.threads = cfgs, threads
        self.measured: dict[str, Parts] = {}
        self.loading: dict[tuple[str, int], float] = {}

    def __call__(self, pair: str, cfg: Any) -> float:
        if pair not in self.measured:
            self.measured[pair] = measure(find_host(), with_teacher(self.cfgs, pair), self.threads)
        views = (cfg.DATASET.TYPE, config.views(cfg))
        if views not in self.loading:
            self.loading[views] = loading_seconds(cfg)
        return run_seconds(cfg, self.measured[pair], self.loading[views])


def run_seconds(cfg: Any, parts: Parts, loading: float) -> float:
    """A run's time from its parts.

    loading: seconds of one core for each training image. Every view costs both forward passes and its part of
    every backward pass, of which there is one for each distinct momentum. Workers load beside the steps. What is
    left out: losses, optimizer, reading files, checkpoints.
    """
    views, batch = config.views(cfg), cfg.SOLVER.BATCH_SIZE
    with_teacher = cfg.DISTILLER.TYPE != "NONE"
    passes = backward_passes(cfg)
    step = views * (with_teacher * parts.teacher + parts.student + passes * parts.backward)
    load = 0.0 if cfg.DATASET.PIPELINE == "device" else batch * loading
    workers = min(cfg.DATASET.NUM_WORKERS, cores())
    step = max(step, load / workers) if workers else step + load
    test = images(cfg)[1] / batch
    epoch = steps(cfg) * step + test * parts.student
    return cfg.SOLVER.EPOCHS * epoch + with_teacher * test * parts.teacher


def measure(host: Host, cfg: Any, threads: int) -> Parts:
    """Time a config's networks, untrained, on noise of the real size; on a CPU by `threads` threads.

    Or by one, if that is faster: where other work keeps a core busy, threads that wait for each other take many
    times as long. A CPU that would take longer than BUDGET is given a smaller batch, and the time is scaled.
    """
    return least_parts(Timed(host, cfg, device.pick()), cfg.SOLVER.BATCH_SIZE, threads)


def least_parts(timed: Timed, batch: int, threads: int) -> Parts:
    """The times of a whole batch, as `measure` has them."""
    before = torch.get_num_threads()
    try:
        if timed.at.type == "cuda":
            return timed.parts(batch, BUDGET / 3)
        torch.set_num_threads(1)
        count = min(timed.few, batch)
        each = sum(timed.parts(count, 0.0))
        count = max(count, min(batch, int(batch * BUDGET / (6 * each))))
        alone = timed.parts(count, BUDGET / 6)
        torch.set_num_threads(threads)
        if threads == 1 or timed.student(count, 0.0) > alone.student:
            return alone
        return min(alone, timed.parts(count, BUDGET / 6), key=sum)
    finally:
        torch.set_num_threads(before)
        timed.made.clear()
        device.release()  # this process stays while others train


class Timed:
    """A config's networks, to be timed. few: images in the batch that tells whether a whole one fits the budget."""

    few = FEW

    def __init__(self, host: Host, cfg: Any, at: torch.device) -> None:
        self.cfg, self.at = cfg, at
        kind, classes = cfg.DATASET.TYPE, data.num_classes(cfg)
        names = {"student": cfg.DISTILLER.STUDENT}
        if cfg.DISTILLER.TYPE != "NONE":
            names["teacher"] = cfg.DISTILLER.TEACHER
        self.made = {
            part: device.place(network(host, kind, name, classes), at, cfg.SOLVER.CHANNELS_LAST)
            for part, name in names.items()
        }
        if "teacher" in self.made:
            self.made["teacher"].eval()

    def parts(self, count: int, budget: float) -> Parts:
        """The parts' times for a whole batch, by `count` images; each for `budget` seconds, two calls at least."""
        teacher = 0.0
        if "teacher" in self.made:
            with torch.inference_mode():
                teacher = self._seconds("teacher", count, budget)
        student = self.student(count, budget)
        return Parts(teacher, student, max(self._seconds("student", count, budget, True) - student, 0.0))

    def student(self, count: int, budget: float) -> float:
        """The time of the student's forward pass, as parts has it."""
        return self._seconds("student", count, budget)

    def _seconds(self, part: str, count: int, budget: float, backward: bool = False) -> float:
        solver, side, made = self.cfg.SOLVER, SIZES[self.cfg.DATASET.TYPE].side, self.made[part]
        image = device.place_batch(torch.randn(count, 3, side, side), self.at, solver.CHANNELS_LAST)

        def call() -> None:
            with device.autocast(self.at, solver.AMP):
                logits = made(image)[0]
            if backward:
                made.zero_grad()
                logits.float().sum().backward()

        return solver.BATCH_SIZE / count * least_seconds(call, self.at, budget)


def loading_seconds(cfg: Any) -> float:
    """Seconds of one core to make a training image's views from pixels."""
    source = data.DATASETS[cfg.DATASET.TYPE]
    width, height = SIZES[cfg.DATASET.TYPE].stored
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    make, image = source.training_transform(config.views(cfg)), Image.fromarray(pixels)
    return least_seconds(lambda: make(image), None, 0.0, calls=20)


def with_teacher(cfgs: Mapping[Cell, Any], pair: str) -> Any:
    """A config of the pair that has a teacher, if there is one."""
    of = [cfg for (name, _), cfg in cfgs.items() if name == pair]
    return next((cfg for cfg in of if cfg.DISTILLER.TYPE != "NONE"), of[0])


def backward_passes(cfg: Any) -> float:
    """Backward passes of a step, those that sample gradients for their GSNR among them."""
    if cfg.SOLVER.TRAINER != TRAINER:
        return 1
    momentum = config.momenta(cfg)[0]
    measured = cfg.SOLVER.DECOUPLED.ALLOCATION == "gsnr"
    # momenta that are allocated are equal only before the first window
    passes = len(momentum) if measured else len(set(momentum.values()))
    return passes + (len(momentum) / cfg.GSNR.EVERY if measured or cfg.GSNR.MEASURE else 0)


def least_seconds(call: Callable[[], Any], at: torch.device | None, budget: float, calls: int = 2) -> float:
    """The shortest time of a call, which other work disturbs least. at: None without a device to wait for.

    At least `calls` of them, as the first one sets things up, then until the budget is used up, 20 at most.
    """
    times: list[float] = []
    while len(times) < calls or (sum(times) < budget and len(times) < 20):
        started = time.perf_counter()
        call()
        if at is not None:
            device.synchronise(at)
        times.append(time.perf_counter() - started)
    return min(times)
