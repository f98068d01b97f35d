"""Knowledge distillation (Hinton et al., 2015)."""

from collections.abc import Sequence
from typing import Any

from .base import Method
from .terms import Term, View


class KD(Method):
    """CE_WEIGHT · CE + KD_WEIGHT · KD at KD.TEMPERATURE, all from the config node KD."""

    keeps_weight = on_proposals = True
    losses_of = "samples"

    @classmethod
    def terms(cls, views: Sequence[View], cfg: Any, temperature: float | None = None) -> list[Term]:
        return [Term(*views[0], temperature or cls.temperature_of(cfg))]

    @classmethod
    def temperature_of(cls, cfg: Any) -> float:
        return float(cfg.KD.TEMPERATURE)

    @classmethod
    def weights(cls, cfg: Any) -> tuple[float, float]:
        return cfg.KD.LOSS.CE_WEIGHT, cfg.KD.LOSS.KD_WEIGHT
