"""Decoupled knowledge distillation (Zhao et al., 2022)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..losses import decoupled_kd
from .base import Distiller, warmup_factor
from .terms import Term, cross_entropy, standardised


class DKD(Distiller):
    """CE_WEIGHT · CE + warm-up · (ALPHA · TCKD + BETA · NCKD) at DKD.T, all from the config node DKD."""

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher)
        self.temperature = float(cfg.DKD.T)
        self.ce_weight = cfg.DKD.CE_WEIGHT
        self.alpha = cfg.DKD.ALPHA
        self.beta = cfg.DKD.BETA
        self.warmup_epochs = cfg.DKD.WARMUP
        self.standardise = cfg.EXPERIMENT.LOGIT_STAND

    def forward_train(
        self, image: Tensor, target: Tensor, epoch: int, **batch: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        views = self.views(image, 1)
        (term,) = standardised([Term(*views[0], self.temperature)], self.standardise)
        tckd, nckd, _ = decoupled_kd(term.student, term.teacher, target, term.temperature)
        dkd = self.alpha * tckd.mean() + self.beta * nckd.mean()
        return views[0][0], {
            "loss_ce": self.ce_weight * cross_entropy(views, target),
            "loss_kd": warmup_factor(epoch, self.warmup_epochs) * dkd,
        }
