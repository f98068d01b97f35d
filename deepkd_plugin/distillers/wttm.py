"""Weighted transformed teacher matching (Zheng and Yang, 2024): a temperature for the teacher alone."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..losses import DecoupledKD, wide
from ..rules import NOT_NEGATIVE, POSITIVE, Key
from ..topk import Kept
from .base import Method
from .terms import Term, View


class WTTM(Method):
    """CE_WEIGHT · CE + KD_WEIGHT · U · KL(q ‖ p), all from the config node WTTM.

    p is the student's softmax, at temperature 1. q is the teacher's with every probability raised to the power GAMMA
    and divided by their sum U, a sample's weight: large where the teacher is unsure. DeepKD over it takes U · KL apart,
    and leaves 1 − q of the target with the non-target part, so that the parts add up.
    """

    keeps_weight = True
    losses_of = "samples"
    by_default = False
    keys = (
        Key("WTTM.CE_WEIGHT", 1.0, "weight of the cross-entropy", *NOT_NEGATIVE),
        Key("WTTM.KD_WEIGHT", 4.0, "weight of the distillation loss", *NOT_NEGATIVE),
        Key("WTTM.GAMMA", 0.2, "power of the teacher's probabilities: 1 / GAMMA is its temperature", *POSITIVE),
    )

    @classmethod
    def terms(cls, views: Sequence[View], cfg: Any, temperature: float | None = None) -> list[Term]:
        """Return one term; `temperature` is left out, because the student's is 1."""
        return [Term(*views[0], 1.0)]

    @classmethod
    def distance(cls, term: Term, target: Tensor, cfg: Any) -> Tensor:
        weight, term = _transformed(term, float(cfg.WTTM.GAMMA))
        return weight * super().distance(term, target, cfg)

    @classmethod
    def parts(cls, term: Term, target: Tensor, cfg: Any, top_k: Kept = None, mask: str = "renormalise") -> DecoupledKD:
        weight, term = _transformed(term, float(cfg.WTTM.GAMMA))
        tckd, nckd, p = super().parts(term, target, cfg, top_k, mask)
        return DecoupledKD(weight * tckd, weight * nckd, p)

    @classmethod
    def weights(cls, cfg: Any) -> tuple[float, float]:
        return cfg.WTTM.CE_WEIGHT, cfg.WTTM.KD_WEIGHT

    @classmethod
    def term_weights(cls, cfg: Any) -> dict[str, float]:
        return {}  # KD_WEIGHT is of their sum, which DeepKD weighs itself


def _transformed(term: Term, power: float) -> tuple[Tensor, Term]:
    """Return the sum of the teacher's probabilities to a power, (B,), and the term with the teacher sharpened by it."""
    teacher = wide(term.teacher)
    return (power * F.log_softmax(teacher, dim=1)).exp().sum(1), term._replace(teacher=power * teacher)
