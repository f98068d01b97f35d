"""Multi-level logit distillation (Jin et al., 2023): instances, batch and classes at several temperatures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..losses import wide
from .base import Distiller
from .terms import Term, View, cross_entropy, divergence, standardised

RELEASE_WEAK = (2.0, 6.0)
"""Temperatures at which the release's strong terms read the weak view's logits."""


def mlkd_terms(views: Sequence[View], node: Any) -> list[Term]:
    """Instance-level terms of a weak and a strong view at every temperature, from the config node MLKD.

    On the weak view the samples count whose teacher confidence is at most the batch's median, on the strong
    view all. VARIANT "release" does what the authors' code does instead: the weak view's batch mean times
    the share of those samples, and on the strong view's side the weak logits again at T = 2 and 6.
    """
    weak, strong = views
    uncertain = _at_most_median(F.softmax(wide(weak[1]), dim=1).amax(1))
    terms = []
    for temperature in map(float, node.TEMPERATURES):
        if node.VARIANT == "release":
            second = weak if temperature in RELEASE_WEAK else strong
            weight = node.KD_WEIGHT * uncertain.mean()
        else:
            second, weight = strong, node.KD_WEIGHT * uncertain
        terms += [Term(*weak, temperature, weight), Term(*second, temperature, node.KD_WEIGHT)]
    return terms


def mlkd_relations(views: Sequence[View], node: Any) -> tuple[Tensor, Tensor]:
    """Class-level and batch-level loss of the weak view, two scalars, from the config node MLKD.

    With P the probabilities (B, C) at a temperature: the squared distance of PᵀP (C, C), over C, in the
    rows of the classes whose total probability is at most the median; and of PPᵀ (B, B), over B, in the rows
    of the samples that mlkd_terms counts. VARIANT "release": all rows, times the share of those counted.
    (The release also computes both on the strong view, and drops them.)
    """
    student, teacher = (wide(logits) for logits in views[0])
    probability = F.softmax(teacher, dim=1)
    classes, samples = _at_most_median(probability.sum(0)), _at_most_median(probability.amax(1))
    if node.VARIANT == "release":
        classes, samples = (rows.mean().expand_as(rows) for rows in (classes, samples))

    def distance(gram: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        at = [(F.softmax(teacher / t, dim=1), F.softmax(student / t, dim=1)) for t in node.TEMPERATURES]
        return sum(((gram(t) - gram(s)).square().sum(1) * rows).sum() / len(rows) for t, s in at)

    with torch.autocast(student.device.type, enabled=False):  # it would multiply matrices in bfloat16
        class_level = distance(lambda p: p.mT @ p, classes)
        batch_level = distance(lambda p: p @ p.mT, samples)
    return node.KD_WEIGHT * class_level, node.KD_WEIGHT * batch_level


class MLKD(Distiller):
    """CE_WEIGHT · CE of both views + KD_WEIGHT · (instance, class and batch level), from the config node MLKD."""

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher)
        self.node = cfg.MLKD
        self.standardise = cfg.EXPERIMENT.LOGIT_STAND

    def forward_train(
        self, image: Sequence[Tensor], target: Tensor, **batch: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        views = self.views(image, 2)
        class_level, batch_level = mlkd_relations(views, self.node)
        return views[0][0], {
            "loss_ce": self.node.CE_WEIGHT * cross_entropy(views, target),
            "loss_kd": divergence(standardised(mlkd_terms(views, self.node), self.standardise)),
            "loss_cc": class_level,
            "loss_bc": batch_level,
        }


def _at_most_median(values: Tensor) -> Tensor:
    """1 where a value is at most the median of all, else 0, in the values' dtype: (N,)."""
    return (values <= torch.quantile(values, 0.5)).to(values.dtype)
