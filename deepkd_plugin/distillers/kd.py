"""Knowledge distillation (Hinton et al., 2015)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .base import Distiller
from .terms import Term, cross_entropy, divergence, standardised


class KD(Distiller):
    """CE_WEIGHT · CE + KD_WEIGHT · KD at KD.TEMPERATURE, all from the config node KD."""

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher)
        self.temperature = float(cfg.KD.TEMPERATURE)
        self.ce_weight = cfg.KD.LOSS.CE_WEIGHT
        self.kd_weight = cfg.KD.LOSS.KD_WEIGHT
        self.standardise = cfg.EXPERIMENT.LOGIT_STAND

    def forward_train(
        self, image: Tensor, target: Tensor, epoch: int, **batch: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        views = self.views(image, 1)
        terms = [Term(*views[0], self.temperature)]
        return views[0][0], {
            "loss_ce": self.ce_weight * cross_entropy(views, target),
            "loss_kd": self.kd_weight * divergence(standardised(terms, self.standardise)),
        }
