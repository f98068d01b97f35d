"""Cross-view consistency regularisation for knowledge distillation (Zhang et al., 2024)."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..losses import wide
from ..rules import NOT_NEGATIVE, PROBABILITY, TEMPERATURE, Key
from .base import Method
from .terms import Term, View


class CRLD(Method):
    """CE_WEIGHT · CE of both views + four terms, all from the config node CRLD.

    Within a view student and teacher see the same image (weight WV_WEIGHT). Across views the student sees one and the
    teacher the other (CV_WEIGHT). A sample counts within views if the teacher's largest probability on the weak view
    reaches TAU_W, and across views if that on the strong one reaches TAU_S.
    """

    views = 2
    losses_of = "samples"
    keys = (
        Key("CRLD.CE_WEIGHT", 1.0, "weight of the cross-entropy of both views", *NOT_NEGATIVE),
        Key("CRLD.WV_WEIGHT", 2.0, "weight of the terms within a view", *NOT_NEGATIVE),
        Key("CRLD.CV_WEIGHT", 0.5, "weight of the terms across views", *NOT_NEGATIVE),
        Key("CRLD.TEMPERATURE", 4.0, "softmax temperature", *TEMPERATURE),
        Key("CRLD.TAU_W", 0.9, "least teacher confidence on the weak view, within views", *PROBABILITY),
        Key("CRLD.TAU_S", 0.2, "least teacher confidence on the strong view, across views", *PROBABILITY),
    )

    @classmethod
    def terms(cls, views: Sequence[View], cfg: Any, temperature: float | None = None) -> list[Term]:
        node = cfg.CRLD
        temperature = temperature or float(node.TEMPERATURE)
        (weak_s, weak_t), (strong_s, strong_t) = views
        within = node.WV_WEIGHT * _confident(weak_t, node.TAU_W)
        across = node.CV_WEIGHT * _confident(strong_t, node.TAU_S)
        return [
            Term(weak_s, weak_t, temperature, within),
            Term(strong_s, strong_t, temperature, within),
            Term(strong_s, weak_t, temperature, across),
            Term(weak_s, strong_t, temperature, across),
        ]

    @classmethod
    def weights(cls, cfg: Any) -> tuple[float, float]:
        return cfg.CRLD.CE_WEIGHT, 1.0


def _confident(teacher_logits: Tensor, threshold: float) -> Tensor:
    """Return 1 for each sample whose largest probability reaches the threshold, else 0: (B,)."""
    probability = F.softmax(wide(teacher_logits), dim=1).amax(1)
    return (probability >= threshold).to(probability.dtype)
