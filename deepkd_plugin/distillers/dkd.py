"""Decoupled knowledge distillation (Zhao et al., 2022)."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .base import Method, warmup_epochs
from .terms import Term, View


class DKD(Method):
    """CE_WEIGHT · CE + warm-up · (ALPHA · TCKD + BETA · NCKD) at DKD.T, all from the config node DKD."""

    on_proposals = True
    losses_of = "samples"
    warmup_key = "DKD.WARMUP"

    @classmethod
    def terms(cls, views: Sequence[View], cfg: Any, temperature: float | None = None) -> list[Term]:
        return [Term(*views[0], temperature or cls.temperature_of(cfg))]

    @classmethod
    def distance(cls, term: Term, target: Tensor, cfg: Any) -> Tensor:
        tckd, nckd, _ = cls.parts(term, target, cfg)
        distance: Tensor = cfg.DKD.ALPHA * tckd + cfg.DKD.BETA * nckd
        return distance

    @classmethod
    def temperature_of(cls, cfg: Any) -> float:
        return float(cfg.DKD.T)

    @classmethod
    def weights(cls, cfg: Any) -> tuple[float, float]:
        return cfg.DKD.CE_WEIGHT, 1.0

    @classmethod
    def loss_weights(cls, cfg: Any) -> dict[str, float]:
        node = cfg.DKD
        return {"CE": node.CE_WEIGHT, "TCKD": node.ALPHA, "NCKD": node.BETA} | warmup_epochs(cls, cfg)
