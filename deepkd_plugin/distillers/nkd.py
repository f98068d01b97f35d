"""Normalised knowledge distillation (Yang et al., 2023): a soft label's target and its other classes, by themselves."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..losses import DecoupledKD, wide
from ..rules import NOT_NEGATIVE, TEMPERATURE, Key
from ..topk import Kept
from .base import Method
from .terms import Term, View


class NKD(Method):
    """CE_WEIGHT · CE − p_t · log p_s of the target + GAMMA · NCKD at TEMPERATURE, all from the config node NKD.

    The target's probabilities are at temperature 1. The authors' code has the cross-entropy of the normalised
    distributions for NCKD: the teacher's entropy, times T², is between them, and no gradient is. DeepKD over it: what
    is said of the target is its target-class part.
    """

    losses_of = "samples"
    by_default = False
    keys = (
        Key("NKD.CE_WEIGHT", 1.0, "weight of the cross-entropy", *NOT_NEGATIVE),
        Key("NKD.GAMMA", 1.5, "weight of the non-target classes", *NOT_NEGATIVE),
        Key("NKD.TEMPERATURE", 1.0, "softmax temperature of the non-target classes", *TEMPERATURE),
    )

    @classmethod
    def terms(cls, views: Sequence[View], cfg: Any, temperature: float | None = None) -> list[Term]:
        return [Term(*views[0], temperature or float(cfg.NKD.TEMPERATURE))]

    @classmethod
    def parts(cls, term: Term, target: Tensor, cfg: Any, top_k: Kept = None, mask: str = "renormalise") -> DecoupledKD:
        log_s, log_t = (
            F.log_softmax(wide(logits), dim=1).gather(1, target.long().unsqueeze(1)).squeeze(1)
            for logits in (term.student, term.teacher)
        )
        whole = super().parts(term, target, cfg, top_k, mask)
        return whole._replace(tckd=-log_t.exp() * log_s)

    @classmethod
    def weights(cls, cfg: Any) -> tuple[float, float]:
        return cfg.NKD.CE_WEIGHT, 1.0

    @classmethod
    def part_weights(cls, cfg: Any) -> tuple[float, float]:
        return 1.0, cfg.NKD.GAMMA
