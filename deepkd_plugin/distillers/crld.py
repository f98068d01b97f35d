"""Cross-view consistency regularisation for knowledge distillation (Zhang et al., 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..losses import wide
from .base import Distiller
from .terms import Term, View, cross_entropy, divergence, standardised


def crld_terms(views: Sequence[View], temperature: float, node: Any) -> list[Term]:
    """The four terms of a weak and a strong view, from the config node CRLD.

    Within a view student and teacher see the same image (weight WV_WEIGHT), across views the student
    sees one and the teacher the other (CV_WEIGHT). A sample counts within views where the teacher's largest
    probability on the weak view reaches TAU_W, and across views where that on the strong one reaches TAU_S.
    """
    (weak_s, weak_t), (strong_s, strong_t) = views
    within = node.WV_WEIGHT * _confident(weak_t, node.TAU_W)
    across = node.CV_WEIGHT * _confident(strong_t, node.TAU_S)
    return [
        Term(weak_s, weak_t, temperature, within),
        Term(strong_s, strong_t, temperature, within),
        Term(strong_s, weak_t, temperature, across),
        Term(weak_s, strong_t, temperature, across),
    ]


class CRLD(Distiller):
    """CE_WEIGHT · CE of both views + the terms of crld_terms, all from the config node CRLD."""

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher)
        self.node = cfg.CRLD
        self.standardise = cfg.EXPERIMENT.LOGIT_STAND

    def forward_train(
        self, image: Sequence[Tensor], target: Tensor, **batch: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        views = self.views(image, 2)
        terms = crld_terms(views, float(self.node.TEMPERATURE), self.node)
        return views[0][0], {
            "loss_ce": self.node.CE_WEIGHT * cross_entropy(views, target),
            "loss_kd": divergence(standardised(terms, self.standardise)),
        }


def _confident(teacher_logits: Tensor, threshold: float) -> Tensor:
    """1 for each sample whose largest probability reaches the threshold, else 0: (B,)."""
    probability = F.softmax(wide(teacher_logits), dim=1).amax(1)
    return (probability >= threshold).to(probability.dtype)
