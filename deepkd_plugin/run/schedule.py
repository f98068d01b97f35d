"""Learning rate by epoch, for torch's LambdaLR, and the warm-ups within an epoch."""

import math
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def lr_factor(solver: Any, epoch: float) -> float:
    """Return the share of SOLVER.LR in an epoch, counted from 1, or at a point within one (see warmup_point).

    step: LR_DECAY_RATE to the power of the LR_DECAY_STAGES below the epoch (mdistiller). cosine: from the
    end of warm-up to MIN_LR in the last epoch (the release's ImageNet and CRLD recipes). During warm-up,
    with either: linear from WARMUP_START at epoch 0 to 1 at epoch WARMUP_EPOCHS. Only warm-up changes within an epoch.
    """
    warmup = solver.WARMUP_EPOCHS
    if epoch < warmup:
        return solver.WARMUP_START + (1 - solver.WARMUP_START) * epoch / warmup
    epoch = math.ceil(epoch)
    if solver.LR_SCHEDULE == "cosine":
        progress = (epoch - warmup) / max(solver.EPOCHS - warmup, 1)
        floor = solver.MIN_LR / solver.LR
        return floor + 0.5 * (1 - floor) * (1 + math.cos(math.pi * progress))
    return solver.LR_DECAY_RATE ** sum(stage < epoch for stage in solver.LR_DECAY_STAGES)


def warmup_point(unit: str, longest: float, epoch: int, step: int, steps: int) -> float:
    """Return where warm-ups are in a step: its epoch or, while they last and rise by iteration, a point within it.

    unit: SOLVER.WARMUP_UNIT. longest: the epochs of the longest warm-up. epoch, step: both counted from 1, of `steps`
    in an epoch. The last step of an epoch is at the epoch itself, so both units agree there.
    """
    point = epoch - 1 + step / steps
    return point if unit == "iteration" and point < longest else epoch


def set_rate(scheduler: LambdaLR, solver: Any, point: float) -> None:
    """Set the optimizer's rate at a warmup_point; the scheduler goes on by epochs."""
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler.base_lrs):
        group["lr"] = rate * lr_factor(solver, point)


def make_scheduler(optimizer: Optimizer, solver: Any) -> LambdaLR:
    """Make a scheduler whose step() after an epoch sets the next one's rate."""
    return LambdaLR(optimizer, lambda done: lr_factor(solver, done + 1))


def set_epoch(scheduler: LambdaLR, solver: Any, epoch: int) -> None:
    """Set the rate that follows so many epochs, as stepping does: it follows from the config alone."""
    scheduler.last_epoch = epoch
    scheduler.base_lrs = [solver.LR for _ in scheduler.base_lrs]
    scheduler._last_lr = [solver.LR * lr_factor(solver, epoch + 1) for _ in scheduler.base_lrs]
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr):
        group["initial_lr"], group["lr"] = solver.LR, rate
