"""Decoupled knowledge distillation (Zhao et al., 2022)."""

from collections.abc import Hashable, Sequence
from typing import Any

from torch import Tensor

from ..losses import decoupled_kd
from .base import Losses, Method, warmup_epochs, warmup_factor
from .terms import Term, View, classes, cross_entropy, standardised


class DKD(Method):
    """CE_WEIGHT · CE + warm-up · (ALPHA · TCKD + BETA · NCKD) at DKD.T, all from the config node DKD."""

    on_proposals = soft_labels = True
    losses_of = "samples"
    warmup_key = "DKD.WARMUP"

    @classmethod
    def terms(cls, views: Sequence[View], cfg: Any, temperature: float | None = None) -> list[Term]:
        return [Term(*views[0], temperature or cls.temperature_of(cfg))]

    @classmethod
    def temperature_of(cls, cfg: Any) -> float:
        return float(cfg.DKD.T)

    @classmethod
    def loss_weights(cls, cfg: Any) -> dict[str, float]:
        node = cfg.DKD
        return {"CE": node.CE_WEIGHT, "TCKD": node.ALPHA, "NCKD": node.BETA} | warmup_epochs(cls, cfg)

    def constants(self, epoch: float, num_classes: int) -> Hashable:
        return warmup_factor(epoch, self.cfg.DKD.WARMUP)

    def forward_train(self, image: Tensor, target: Tensor, epoch: float, **batch: Any) -> tuple[Tensor, Losses]:
        node, views = self.cfg.DKD, self.compare(image)
        (term,) = standardised(self.terms(views, self.cfg), self.standardise)
        tckd, nckd, _ = decoupled_kd(term.student, term.teacher, classes(target), term.temperature)
        dkd = node.ALPHA * tckd.mean() + node.BETA * nckd.mean()
        return views[0][0], {
            "loss_ce": node.CE_WEIGHT * cross_entropy(views, target),
            "loss_kd": warmup_factor(epoch, node.WARMUP) * dkd,
        }
