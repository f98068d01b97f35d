"""Decoupled knowledge distillation (Zhao et al., 2022)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..losses import decoupled_kd
from .base import Distiller, warmup_factor


class DKD(Distiller):
    """CE_WEIGHT · CE + warm-up · (ALPHA · TCKD + BETA · NCKD) at DKD.T, all from the config node DKD."""

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher)
        self.temperature = float(cfg.DKD.T)
        self.ce_weight = cfg.DKD.CE_WEIGHT
        self.alpha = cfg.DKD.ALPHA
        self.beta = cfg.DKD.BETA
        self.warmup_epochs = cfg.DKD.WARMUP

    def forward_train(
        self, image: Tensor, target: Tensor, epoch: int, **batch: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        student_logits, teacher_logits = self.both_logits(image)
        tckd, nckd, _ = decoupled_kd(student_logits, teacher_logits, target, self.temperature)
        dkd = self.alpha * tckd.mean() + self.beta * nckd.mean()
        return student_logits, {
            "loss_ce": self.ce_weight * F.cross_entropy(student_logits, target),
            "loss_kd": warmup_factor(epoch, self.warmup_epochs) * dkd,
        }
