"""Accuracy of a student while it trains, and of its teacher before that."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import config
from .device import autocast, classify_in_float32, place_batch, refusals
from .distributed.collectives import total
from .errors import UserError
from .mixture import Teachers, members
from .run.metrics import Sums
from .terminal import warn

FEW = 1000
"""Test images below which a teacher that may only have been lucky is not refused."""


@torch.no_grad()
def evaluate(distiller: nn.Module, loader: Any, device: torch.device, solver: Any) -> dict[str, float]:
    """Test a distiller on a loader of (image, target): top-1 and top-5 in percent, mean cross-entropy.

    Of several processes each tests the images of its own loader, and the numbers are of all of them.
    """
    distiller.eval()
    sums = Sums()
    sums.add(dict.fromkeys(("top1", "top5", "loss"), torch.zeros((), device=device)), 0)
    for batch in loader:
        image, target, *_ = place_batch(batch, device, solver.CHANNELS_LAST)
        with autocast(device, solver.AMP):
            logits = distiller(image=image).float()
        loss = F.cross_entropy(logits, target, reduction="sum")
        sums.add(correct(logits, target) | {"loss": loss}, len(target))
    *totals, count = total([*sums.totals().values(), sums.count])
    return dict(zip(("test_acc", "test_acc_top5", "test_loss"), (value / count for value in totals)))


@refusals()
def measure_teacher(distiller: nn.Module, loader: Any, cfg: Any, source: str = "config") -> float | None:
    """Print and return the top-1 in percent of a distiller's teacher on the test images; None without one.

    Raises UserError, naming `source`, if that is no better than chance, unless DISTILLER.ANY_TEACHER: less than 1 % of
    the way from chance to perfect above it, or less than three standard errors. Fewer than `FEW` images cannot tell the
    second, so it is a warning with them. Several teachers are tested each, and then their mixture, without its weights
    by the labels; run/record.py gets each one's accuracy from `tested`.
    """
    teacher = getattr(distiller, "teacher", None)
    if teacher is None:
        return None
    if not isinstance(teacher, Teachers):
        return _measure(teacher, loader, cfg, cfg.DISTILLER.TEACHER, source)
    teacher.tested = []
    for number, (one, of_one) in enumerate(zip(members(teacher), config.by_teacher(cfg))):
        with config.naming(number):
            teacher.tested.append(_measure(one, loader, of_one, of_one.DISTILLER.TEACHER, source))
    return _measure(teacher, loader, cfg, "mixture of them", source)


def _measure(teacher: nn.Module, loader: Any, cfg: Any, name: str, source: str) -> float:
    if cfg.SOLVER.AMP:  # as in a training step
        for one in members(teacher):
            classify_in_float32(one)
    alone = Alone(teacher)
    device = next(teacher.parameters()).device
    accuracy = evaluate(alone, loader, device, cfg.SOLVER)["test_acc"]
    chance = 1.0 / alone.num_classes
    error = math.sqrt(chance * (1.0 - chance) / len(loader.dataset))
    above, count = accuracy / 100.0 - chance, len(loader.dataset)
    if above < max(0.01 * (1.0 - chance), 3.0 * error):
        luck = above >= 0.01 * (1.0 - chance) and count < FEW
        text = (
            f"{source}: the teacher {name} from DISTILLER.TEACHER_WEIGHTS {'may be' if luck else 'is'} at chance on "
            f"{cfg.DATASET.TYPE} ({accuracy:.2f} % top-1"
        )
        if luck:
            warn(f"{text} on {count} images, and {100 * chance:.2f} % is chance): more images would tell")
        elif cfg.DISTILLER.ANY_TEACHER:
            warn(f"{text}); it is taken as it is, by DISTILLER.ANY_TEACHER")
        else:
            raise UserError(
                f"{text}); it must be trained on this data set, or DISTILLER.ANY_TEACHER be True to go on with it"
            )
    print(f"teacher   {name} {accuracy:.2f} % top-1 on the test images")
    return accuracy


def correct(logits: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Count how many of a batch are right at top-1 and top-5, in percent points times samples.

    logits: (B, C); target: (B,). With fewer than five classes top-5 counts them all.
    """
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = best == target.unsqueeze(1)
    return {"top1": 100.0 * hits[:, 0].sum(), "top5": 100.0 * hits.sum()}


class Alone(nn.Module):
    """A network, or the mixture of several, under the protocol of `evaluate`; then it knows its number of classes."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.num_classes = 0

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.network(image)[0]
        if isinstance(self.network, Teachers):
            logits = self.network.mix_unlabelled(logits)
        self.num_classes = logits.shape[1]
        return logits
