"""What `auto` comes to: the memory format, and whether the teacher is folded, by timing both ways here.

Two ways are timed in turn on noise, on the run's device. The other one than the first is taken only if it is faster by
GAIN, so that the choice is stable.
"""

import contextlib
import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import config, device
from .config import CHANNELS_LAST, FOLD_TEACHER
from .distillers.base import Distiller
from .distributed import collectives, process_group
from .errors import UserError
from .fold import CannotFoldError, differences, fold
from .rules import automatic

BUDGET = 1.5
"""Seconds that a comparison may take, about."""

GAIN = 0.03
"""Share of its time by which the other way must be faster."""

ROUNDS, MOST = 3, 50
"""How often each way is timed, at least and at most."""

FEW = 8 * 32 * 32
"""Pixels of the images of the first pass, which tells a CPU how many images the others may have."""

REAL = 32
"""Training images on which a folded teacher must say what the teacher says."""

Pass = Callable[[int], Any]
"""Number of images -> one pass over so many."""


class Choice(NamedTuple):
    """The value of a key, and how it came about, in words."""

    value: bool
    how: str


def settle(cfg: Any, distiller: Any, samples: Callable[[int], Tensor], reason: str = "") -> tuple[Any, dict[str, str]]:
    """Give a distiller its memory format and, if so, its folded teacher; measure what the config leaves open.

    samples: returns so many training images, (n, 3, H, W), on the device. reason: why the teacher cannot be folded
    here, "" if nothing is in the way. Prints in a line what was measured. Returns the config with True or False in
    place of `auto`, and how each value came about, for the run's record. Raises UserError for a teacher that is to be
    folded and cannot be.
    """
    at, how, measured = next(distiller.parameters()).device, {}, []
    if automatic(cfg.SOLVER.CHANNELS_LAST):
        teacher = getattr(distiller, "teacher", None) if config.asks_teacher(cfg) else None
        images = noise(samples(1), _share(cfg))
        choice = _agreed(channels_last(distiller.student, teacher, images, cfg.SOLVER.AMP))
        cfg = resolved(cfg, CHANNELS_LAST, choice.value)
        how[CHANNELS_LAST] = choice.how
        measured.append(f"{CHANNELS_LAST} {choice.value} ({choice.how})")
    device.place(distiller, at, cfg.SOLVER.CHANNELS_LAST)
    if cfg.DISTILLER.FOLD_TEACHER is not False:
        auto = automatic(cfg.DISTILLER.FOLD_TEACHER)
        reason = config.plain_teacher(cfg) or reason
        if getattr(distiller, "teacher", None) is None:  # whatever the config calls the distiller
            reason = "there is no teacher"
        if not reason and not isinstance(distiller, Distiller):
            reason = f"{type(distiller).__module__}.{type(distiller).__qualname__} is no distiller of this package"
        choice = Choice(False, reason)
        if not reason:
            last = cfg.SOLVER.CHANNELS_LAST
            choice = _agreed(_fold(cfg, distiller, lambda count: device.place_batch(samples(count), at, last)))
            if not choice.value:
                distiller.fold(None)
            measured.append(f"{FOLD_TEACHER} {choice.value} ({choice.how})")
        elif not auto and cfg.DISTILLER.TYPE != "NONE":
            raise _refused(reason)
        how[FOLD_TEACHER] = choice.how
        cfg = resolved(cfg, FOLD_TEACHER, choice.value) if auto else cfg
    if measured:
        print(f"chosen    {', '.join(measured)}")
    return cfg, how


def choose(cfg: Any, student: nn.Module, teacher: nn.Module | None, images: Tensor) -> dict[str, bool]:
    """Measure both keys before any run has begun, with untrained networks.

    images: a batch (B, 3, H, W) on the networks' device. Both are moved to the chosen format.
    """
    asked = teacher if config.asks_teacher(cfg) else None
    last = channels_last(student, asked, images, cfg.SOLVER.AMP).value
    folds = False
    if teacher is not None and not config.plain_teacher(cfg):
        device.place(teacher, images.device, last)
        images = device.place_batch(images, images.device, last)
        with contextlib.suppress(CannotFoldError):
            folds = folding(teacher, fold(teacher, images[:2]), images).value
    return {CHANNELS_LAST: last, FOLD_TEACHER: folds}


def _agreed(choice: Choice) -> Choice:
    """Return the choice of the first of several processes: gradients of one memory format are summed."""
    return choice._replace(value=bool(collectives.from_first([choice.value])[0]))


def _share(cfg: Any) -> int:
    """Return how many images a process passes at once."""
    return math.ceil(config.chunk(cfg) / process_group.size())


def _fold(cfg: Any, distiller: Distiller, samples: Callable[[int], Tensor]) -> Choice:
    """Fold a distiller's teacher, unless that changes its logits or, if it is left open, is not faster."""
    auto, teacher, images = automatic(cfg.DISTILLER.FOLD_TEACHER), distiller.teacher, samples(REAL)
    try:
        folded = fold(teacher, images[:2])
    except CannotFoldError as error:
        if not auto:
            raise _refused(f"the teacher {config.teacher_name(cfg)}: {error}") from None
        return Choice(False, str(error))
    with torch.inference_mode(), device.whole_float32():
        different = differences(teacher(images)[0], folded(images)[0])
    if different:
        return Choice(False, f"its logits would be others: {different}")
    choice = folding(teacher, folded, noise(images, _share(cfg))) if auto else Choice(True, "as the config says")
    if choice.value:
        distiller.fold(folded)
    return choice


def _refused(reason: str) -> UserError:
    return UserError(f"config: {FOLD_TEACHER} is True; it must be auto or False here: {reason}")


def resolved(cfg: Any, key: str, value: bool) -> Any:
    """Return a config, frozen as it is, with another value of a key."""
    cfg = cfg.clone()
    config.set_default(cfg, key, value)
    return cfg


def noise(like: Tensor, count: int) -> Tensor:
    """Make `count` images of noise of the size, the memory format and on the device of some images."""
    drawn = torch.randn(count, *like.shape[1:], generator=torch.Generator().manual_seed(0))
    last = like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous()
    placed: Tensor = device.place_batch(drawn, like.device, last)
    return placed


def channels_last(student: nn.Module | None, teacher: nn.Module | None, images: Tensor, amp: bool) -> Choice:
    """Choose the memory format of a step's passes: the teacher's, and the student's with its backward pass.

    images: (B, 3, H, W), contiguous, as the networks are. Without one of the two it is that of the other alone. The
    passes are made by copies, so nothing of the networks changes.
    """

    def passes(last: bool) -> Pass:
        at = images.device
        placed = device.place_batch(images, at, last)
        learner, taught = (
            None if network is None else device.place(copy.deepcopy(network), at, last)
            for network in (student, teacher)
        )
        if learner is not None:
            learner.train()

        def one(count: int) -> None:
            with device.autocast(at, amp):
                if taught is not None:
                    with torch.inference_mode():
                        taught(placed[:count])
                total = None if learner is None else learner(placed[:count])[0].float().sum()
            if total is not None and learner is not None:
                total.backward()
                learner.zero_grad()

        return one

    return _faster(medians({last: passes(last) for last in (False, True)}, images), "channels last", "contiguous")


def folding(teacher: nn.Module, folded: nn.Module, images: Tensor) -> Choice:
    """Choose between a teacher and its folded copy by their passes over images (B, 3, H, W) of their format."""

    def one(network: nn.Module) -> Pass:
        return torch.inference_mode()(lambda count: network(images[:count]))

    return _faster(medians({False: one(teacher), True: one(folded)}, images), "folded", "plain")


def _faster(times: Mapping[bool, float], other: str, first: str) -> Choice:
    value = times[True] < (1 - GAIN) * times[False]
    return Choice(value, f"{other} {times[True]:.3g} ms, {first} {times[False]:.3g} ms a pass")


def medians(passes: Mapping[bool, Pass], images: Tensor) -> dict[bool, float]:
    """Return the median milliseconds of two passes, timed in turn: A B A B …

    images: those that a pass may have; on a CPU there are fewer if the whole batch would take longer than BUDGET.
    """
    count = len(images)
    if images.device.type != "cuda":
        few = min(count, max(2, FEW // images[0, 0].numel()))
        passes[False](few)  # sets things up
        affordable = few * BUDGET / (2 * (ROUNDS + 1) * seconds(passes[False], few, images.device))
        count = min(count, max(few, int(affordable)))
    for one in passes.values():
        one(count)
    times: dict[bool, list[float]] = {way: [] for way in passes}
    spent = 0.0
    while len(times[False]) < ROUNDS or (spent < BUDGET and len(times[False]) < MOST):
        for way, one in passes.items():
            times[way].append(seconds(one, count, images.device))
            spent += times[way][-1]
    return {way: 1e3 * statistics.median(values) for way, values in times.items()}


def seconds(one: Pass, count: int, at: torch.device) -> float:
    """Return the time of a pass over `count` images."""
    device.synchronise(at)
    started = time.perf_counter()
    one(count)
    device.synchronise(at)
    return time.perf_counter() - started
