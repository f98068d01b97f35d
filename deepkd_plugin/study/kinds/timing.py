"""How long runs will take: the steps of their own trainers, taken here on noise."""

import contextlib
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from ... import config, device
from ...data import pipeline
from ...fold import CannotFoldError, fold
from ...teacher_logits.tables import share_of, sharing
from ..shared import cores

BUDGET = 3.0
"""Seconds that the timing of a pair's runs may take, about."""

FEW, LARGE = 8, 400
"""Images in the batch that tells whether a whole one fits the budget: one from so many pixels of a side on."""

Work = Callable[[int], Callable[[], Any]]
"""Number of images -> what is timed for so many."""


class Timed(Protocol):
    """What is asked of a kind of table whose runs are timed."""

    def source(self, cfg: Any) -> Any:
        """Return the data set of a config."""

    def network(self, cfg: Any, name: str, teacher: bool = False) -> nn.Module:
        """Make an untrained network, of the config's images. teacher: of images as its teacher takes them."""

    def trainer(self, cfg: Any, networks: Sequence[nn.Module], loader: Any) -> Any:
        """Make the trainer of a run over a loader of which it asks the length only. networks: student, teacher."""


class Timer:
    """Times the runs of one pair, with untrained networks, before any of them has begun.

    On a CPU steps are taken by one thread or by `threads`, whichever is faster: if other work keeps a core busy,
    threads that wait for each other take many times as long. A CPU that would take longer than BUDGET is given
    smaller batches, and their times are scaled. Left out: reading files, checkpoints, measuring AP. A table of
    teacher's logits is taken to be empty before the first of the pair's runs, of which there are `runs` of each config.
    """

    def __init__(self, kind: Timed, cfgs: Sequence[Any], threads: int, runs: Sequence[int]) -> None:
        self.kind, self.cfgs, self.device = kind, cfgs, device.pick()
        self.epochs: Counter[Any] = Counter()
        """Of all runs that share a table, by what it is of."""
        for cfg, count in zip(cfgs, runs):
            self.epochs[sharing(cfg)] += count * cfg.SOLVER.EPOCHS if _looks_up(cfg) else 0
        self.threads = [1] if threads == 1 else [1, threads]
        self.budget = BUDGET / (len(cfgs) + 2)
        self.networks: dict[tuple[str, str], nn.Module] = {}
        """On the device, made once for all configs, by part and name; and the time of each one's test of an image."""
        self.passes: dict[tuple[str, str], float] = {}

    def seconds(self) -> list[float]:
        """Return the time of each config's run. Raises whatever a trainer that cannot be timed does."""
        before = torch.get_num_threads()
        try:
            with warnings.catch_warnings():  # the runs themselves will say so
                warnings.simplefilter("ignore")
                for cfg in self.cfgs:
                    for part in _parts(cfg):
                        if part not in self.networks:
                            self.test(cfg, part)
                return [self.run(cfg) for cfg in self.cfgs]
        finally:
            torch.set_num_threads(before)

    def run(self, cfg: Any) -> float:
        """Return the time of one run: its epochs, each with a test of the student, and one test of the teacher."""
        source, views = self.kind.source(cfg), config.views(cfg)
        student, *teacher = (source.images(cfg)[1] * self.passes[part] for part in _parts(cfg))
        step, workers = self.step(cfg), min(cfg.DATASET.NUM_WORKERS, cores())
        if _looks_up(cfg):
            share = share_of(cfg, self.epochs[sharing(cfg)])
            step += share * cfg.SOLVER.BATCH_SIZE * self.passes[_parts(cfg)[1]]
        if pipeline(cfg) == "workers":
            load = cfg.SOLVER.BATCH_SIZE * self.timed(source.augmenter(views), self.budget / 10)
            step = max(step, load / workers) if workers else step + load
        tests = 2 if cfg.DISTILLER.MORE_TEACHERS else 1  # each of several, and their mixture
        return cfg.SOLVER.EPOCHS * (source.steps(cfg) * step + student) + tests * sum(teacher)

    def step(self, cfg: Any) -> float:
        """Time the trainer's step on a batch of SOLVER.BATCH_SIZE, with its share of samples for the GSNR."""
        cfg = cfg.clone()
        cfg.defrost()
        cfg.SOLVER.EXECUTION = "eager"  # compiling takes longer than the budget
        source, batch = self.kind.source(cfg), cfg.SOLVER.BATCH_SIZE
        networks = [self.networks[part] for part in _parts(cfg)]
        trainer = self.kind.trainer(cfg, networks, range(source.steps(cfg)))
        trainer.distiller.train()
        if cfg.DISTILLER.FOLD_TEACHER is True and config.asks_teacher(cfg):
            images = device.place_batch(source.noise(2)[0], self.device, cfg.SOLVER.CHANNELS_LAST)
            with contextlib.suppress(CannotFoldError):  # whose run will say so
                trainer.distiller.fold(fold(networks[1], images))
        if cfg.SOLVER.DECOUPLED.ALLOCATION == "gsnr":  # momenta are equal only before the first window
            for group in trainer.optimizer.param_groups:
                group["momentum"] = {s: m - i / 1000 for i, (s, m) in enumerate(group["momentum"].items())}

        def work(count: int) -> Callable[[], Any]:
            noise, known = [*source.noise(count, config.views(cfg))], {}
            if config.contrasts(cfg):
                noise.append(torch.randint(source.images(cfg)[0], (count, 1 + cfg.CRD.NCE.K)))
            if _looks_up(cfg):
                several = [1 + len(cfg.DISTILLER.MORE_TEACHERS)] if cfg.DISTILLER.MORE_TEACHERS else []
                known["teacher_logits"] = torch.randn(count, *several, source.num_classes, device=self.device)
            return lambda: trainer.step(trainer.prepare(noise, 1, 1) | known, 1)

        step, monitor = self.least(work, batch), trainer.monitor
        if monitor is None:
            return step
        while not monitor.due:
            monitor.tick()
        return step + (self.least(work, batch) - step) / monitor.every

    def test(self, cfg: Any, part: tuple[str, str]) -> None:
        """Make the student or the teacher, and time its pass by batches as a test takes them."""
        made = self.kind.network(cfg, part[1], part[0] == "teacher").requires_grad_(part[0] == "student").eval()
        network = self.networks[part] = device.place(made, self.device, cfg.SOLVER.CHANNELS_LAST)
        batch = self.kind.source(cfg).test_batch(cfg)

        def work(count: int) -> Callable[[], Any]:
            images = self.kind.source(cfg).noise(count)[0]
            images = device.place_batch(images, self.device, cfg.SOLVER.CHANNELS_LAST)
            return lambda: network(images)

        with torch.no_grad(), device.autocast(self.device, cfg.SOLVER.AMP):
            self.passes[part] = self.least(work, batch) / batch

    def least(self, work: Work, batch: int) -> float:
        """Return the shortest time of work(batch)(), from fewer images if a whole batch takes a CPU too long."""
        if self.device.type == "cuda":
            return self.timed(work(batch), self.budget)
        torch.set_num_threads(self.threads[0])
        side = self.kind.source(self.cfgs[0]).noise(1)[0][0].shape[1]
        count = min(FEW if side < LARGE else 1, batch)
        call = work(count)
        seconds = self.timed(call)
        if (affordable := min(batch, int(self.budget / 4 * count / max(seconds, 1e-9)))) > count:
            count, call = affordable, work(affordable)
            seconds = self.timed(call, self.budget / 2)
        for threads in self.threads[1:]:
            torch.set_num_threads(threads)
            other = self.timed(call, self.budget / 2)
            self.threads = [threads if other < seconds else 1]
            seconds = min(seconds, other)
        return batch / count * seconds

    def timed(self, call: Callable[[], Any], budget: float = 0.0) -> float:
        """Return the shortest time of a call, which other work disturbs least.

        There are two calls at least, as the first one sets things up, unless that takes a run's share of BUDGET; then
        more until `budget` is used up, 20 at most.
        """
        times: list[float] = []
        while sum(times) < (self.budget if len(times) < 2 else budget) and len(times) < 20:
            started = time.perf_counter()
            call()
            device.synchronise(self.device)
            times.append(time.perf_counter() - started)
        return min(times)


def _looks_up(cfg: Any) -> bool:
    """Tell whether a config's runs look their teacher's logits up in a table."""
    return cfg.DISTILLER.TEACHER_LOGITS != "compute" and cfg.DISTILLER.TYPE != "NONE"


def _parts(cfg: Any) -> list[tuple[str, str]]:
    """Name a config's student and, if it has one, teacher."""
    parts = [("student", cfg.DISTILLER.STUDENT), ("teacher", config.teacher_name(cfg))]
    return parts[:1] if cfg.DISTILLER.TYPE == "NONE" else parts
