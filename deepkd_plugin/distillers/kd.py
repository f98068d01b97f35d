"""Knowledge distillation (Hinton et al., 2015)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..losses import kd_divergence
from .base import Distiller


class KD(Distiller):
    """CE_WEIGHT · CE + KD_WEIGHT · KD at KD.TEMPERATURE, all from the config node KD."""

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher)
        self.temperature = float(cfg.KD.TEMPERATURE)
        self.ce_weight = cfg.KD.LOSS.CE_WEIGHT
        self.kd_weight = cfg.KD.LOSS.KD_WEIGHT

    def forward_train(
        self, image: Tensor, target: Tensor, epoch: int, **batch: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        student_logits, teacher_logits = self.both_logits(image)
        kd = kd_divergence(student_logits, teacher_logits, self.temperature).mean()
        return student_logits, {
            "loss_ce": self.ce_weight * F.cross_entropy(student_logits, target),
            "loss_kd": self.kd_weight * kd,
        }
