"""DeepKD: a base method's loss taken apart into the streams TOG, TCG and NCG (arXiv 2505.15133)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..losses import DecoupledKD, decoupled_kd
from ..topk import TopKSchedule, count_classes
from .base import Distiller, warmup_factor


def _kd_terms(terms: DecoupledKD) -> tuple[Tensor, Tensor]:
    """KD is TCKD + (1 − p) · NCKD in every sample, so its non-target stream keeps that weight."""
    return terms.tckd.mean(), ((1.0 - terms.teacher_target_prob) * terms.nckd).mean()


def _dkd_terms(terms: DecoupledKD) -> tuple[Tensor, Tensor]:
    """DKD frees NCKD of the teacher's (1 − p)."""
    return terms.tckd.mean(), terms.nckd.mean()


BASES: dict[str, Callable[[DecoupledKD], tuple[Tensor, Tensor]]] = {"KD": _kd_terms, "DKD": _dkd_terms}
"""Base method → its target-class and non-target-class loss, scalars, from the terms per sample."""


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
        self.weights = (node.CE_WEIGHT, node.TCG_WEIGHT, node.NCG_WEIGHT)
        self.temperature = float(node.TEMPERATURE)
        self.warmup_epochs = node.WARMUP
        self.mask = node.MASK
        self.epochs = cfg.SOLVER.EPOCHS

    def forward_train(
        self, image: Tensor, target: Tensor, epoch: int, **batch: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        student_logits, teacher_logits = self.both_logits(image)
        terms = decoupled_kd(
            student_logits,
            teacher_logits,
            target,
            self.temperature,
            self.top_k(epoch, student_logits.shape[1]),
            self.mask.READING,
        )
        target_class, non_target_class = self.base(terms)
        ce_weight, tcg_weight, ncg_weight = self.weights
        warmup = warmup_factor(epoch, self.warmup_epochs)
        return student_logits, {
            "tog": ce_weight * F.cross_entropy(student_logits, target),
            "tcg": warmup * tcg_weight * target_class,
            "ncg": warmup * ncg_weight * non_target_class,
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
        return count_classes(_classes(mask.K), num_classes)
    return TopKSchedule(num_classes, _classes(mask.INITIAL), _classes(mask.OPTIMAL), mask.PHASES)(progress)


def _classes(value: float) -> float:
    """A YAML number of classes: from 1 on a count, below 1 a fraction of the classes."""
    return int(value) if value >= 1 and value == int(value) else float(value)
