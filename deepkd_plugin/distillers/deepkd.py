"""DeepKD: a base method's loss taken apart into the streams TOG, TCG and NCG (arXiv 2505.15133)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..losses import DecoupledKD, decoupled_kd
from ..topk import TopKSchedule, count_classes
from .base import Distiller, warmup_factor

View = tuple[Tensor, Tensor]
"""Student and teacher logits (B, C) of one view of the batch."""
Decouple = Callable[[Tensor, Tensor], DecoupledKD]
"""decoupled_kd with the batch's labels and the config's temperature and mask filled in."""
Base = Callable[[Sequence[View], Tensor, Decouple], dict[str, Tensor]]
"""A base method's loss by stream, unweighted scalars: (views, target, decouple) -> {"tog", "tcg", "ncg"}."""


def _kd(views: Sequence[View], target: Tensor, decouple: Decouple) -> dict[str, Tensor]:
    """KD is TCKD + (1 − p) · NCKD in every sample, so its non-target stream keeps that weight."""
    ((student, teacher),) = views
    terms = decouple(student, teacher)
    non_target = (1.0 - terms.teacher_target_prob) * terms.nckd
    return {
        "tog": F.cross_entropy(student, target),
        "tcg": terms.tckd.mean(),
        "ncg": non_target.mean(),
    }


def _dkd(views: Sequence[View], target: Tensor, decouple: Decouple) -> dict[str, Tensor]:
    """DKD frees NCKD of the teacher's (1 − p)."""
    ((student, teacher),) = views
    terms = decouple(student, teacher)
    return {"tog": F.cross_entropy(student, target), "tcg": terms.tckd.mean(), "ncg": terms.nckd.mean()}


BASES: dict[str, Base] = {"KD": _kd, "DKD": _dkd}
"""The methods that DeepKD can take apart. One with several views gets them all, in the batch's order."""


class DeepKD(Distiller):
    """CE_WEIGHT · CE, TCG_WEIGHT · L_TCG and NCG_WEIGHT · L_NCG as the losses `tog`, `tcg` and `ncg`.

    Everything comes from the config node DeepKD. The trainer DecoupledMomentumSGD gives each loss a
    momentum of its own; under a trainer that sums the losses this is the base method with the top-K mask,
    the ablation without decoupling.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher)
        node = cfg.DeepKD
        self.base = BASES[node.BASE]
        self.ce_weight = node.CE_WEIGHT
        self.tcg_weight = node.TCG_WEIGHT
        self.ncg_weight = node.NCG_WEIGHT
        self.temperature = float(node.TEMPERATURE)
        self.warmup_epochs = node.WARMUP
        self.mask = node.MASK
        self.epochs = cfg.SOLVER.EPOCHS

    def forward_train(
        self, image: Tensor | Sequence[Tensor], target: Tensor, epoch: int, **batch: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        images = [image] if isinstance(image, Tensor) else image
        views = [self.both_logits(view) for view in images]
        decouple = partial(
            decoupled_kd,
            target=target,
            temperature=self.temperature,
            top_k=self.top_k(epoch, views[0][0].shape[1]),
            mask=self.mask.READING,
        )
        losses = self.base(views, target, decouple)
        warmup = warmup_factor(epoch, self.warmup_epochs)
        return views[0][0], {
            "tog": self.ce_weight * losses["tog"],
            "tcg": warmup * self.tcg_weight * losses["tcg"],
            "ncg": warmup * self.ncg_weight * losses["ncg"],
        }

    def top_k(self, epoch: int, num_classes: int) -> int | None:
        """How many non-target classes count in this epoch (from 1); None without a mask."""
        progress = min((epoch - 1) / max(self.epochs - 1, 1), 1.0)
        return mask_size(self.mask, num_classes, progress)


def mask_size(mask: Any, num_classes: int, progress: float) -> int | None:
    """K of a config node DeepKD.MASK at `progress` in [0, 1]; ValueError where the node does not fit C."""
    if mask.TYPE == "none":
        return None
    if mask.TYPE == "static":
        return count_classes(classes(mask.K), num_classes)
    return TopKSchedule(num_classes, classes(mask.INITIAL), classes(mask.OPTIMAL), mask.PHASES)(progress)


def classes(value: float) -> float:
    """A YAML number of classes: from 1 on a count, below 1 a fraction of the classes."""
    return int(value) if value >= 1 and value == int(value) else float(value)
