"""Decoupled knowledge distillation (Zhao et al., 2022)."""

from collections.abc import Sequence
from typing import Any

from .base import Method
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
    def temperature_of(cls, cfg: Any) -> float:
        return float(cfg.DKD.T)

    @classmethod
    def weights(cls, cfg: Any) -> tuple[float, float]:
        return cfg.DKD.CE_WEIGHT, 1.0

    @classmethod
    def part_weights(cls, cfg: Any) -> tuple[float, float]:
        return cfg.DKD.ALPHA, cfg.DKD.BETA
