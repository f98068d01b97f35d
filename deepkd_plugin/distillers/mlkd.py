"""Multi-level logit distillation (Jin et al., 2023): instances, batch and classes at several temperatures."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..losses import wide
from ..rules import NOT_NEGATIVE, TEMPERATURES, Key, one_of
from .base import Losses, Method
from .terms import Term, View, total

RELEASE_WEAK = (2.0, 6.0)
"""Temperatures at which the release's strong terms read the weak view's logits."""


class MLKD(Method):
    """CE_WEIGHT · CE of both views + KD_WEIGHT · (instance, class and batch level), from the config node MLKD."""

    views = 2
    keys = (
        Key("MLKD.CE_WEIGHT", 0.1, "weight of the cross-entropy of both views", *NOT_NEGATIVE),
        Key("MLKD.KD_WEIGHT", 0.9, "weight of its three levels", *NOT_NEGATIVE),
        Key("MLKD.TEMPERATURES", [2.0, 3.0, 4.0, 5.0, 6.0], "softmax temperatures", *TEMPERATURES),
        Key("MLKD.VARIANT", "formula", "formula, or its release's arithmetic", *one_of("formula", "release")),
    )

    @classmethod
    def terms(cls, views: Sequence[View], cfg: Any, temperature: float | None = None) -> list[Term]:
        """Return the instance-level terms of a weak and a strong view at every temperature.

        On the weak view the samples count whose teacher confidence is at most the batch's median, on the strong
        view all. VARIANT "release" does what the authors' code does instead: it multiplies the weak view's batch mean
        by the share of those samples, and on the strong view's side reads the weak logits again at T = 2 and 6.
        """
        node, (weak, strong) = cfg.MLKD, views
        uncertain = _at_most_median(F.softmax(wide(weak[1]), dim=1).amax(1))
        terms = []
        for t in map(float, node.TEMPERATURES):
            if node.VARIANT == "release":
                second = weak if t in RELEASE_WEAK else strong
                weight = node.KD_WEIGHT * uncertain.mean()
            else:
                second, weight = strong, node.KD_WEIGHT * uncertain
            terms += [Term(*weak, t, weight), Term(*second, t, node.KD_WEIGHT)]
        return terms

    @classmethod
    def task(cls, views: Sequence[View], cfg: Any) -> Losses:
        """Return the class-level and the batch-level loss of the weak view.

        With P the probabilities (B, C) at a temperature: the squared distance of PᵀP (C, C), over C, in the
        rows of the classes whose total probability is at most the median; and of PPᵀ (B, B), over B, in the rows
        of the samples that `terms` counts. VARIANT "release": all rows, times the share of those counted.
        (The release also computes both on the strong view, and drops them.)
        """
        node = cfg.MLKD
        student, teacher = (wide(logits) for logits in views[0])
        probability = F.softmax(teacher, dim=1)
        classes, samples = _at_most_median(probability.sum(0)), _at_most_median(probability.amax(1))
        if node.VARIANT == "release":
            classes, samples = (rows.mean().expand_as(rows) for rows in (classes, samples))

        def distance(gram: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
            pairs = [(F.softmax(teacher / t, dim=1), F.softmax(student / t, dim=1)) for t in node.TEMPERATURES]
            return total(((gram(t) - gram(s)).square().sum(1) * rows).sum() / len(rows) for t, s in pairs)

        with torch.autocast(student.device.type, enabled=False):  # it would multiply matrices in bfloat16
            class_level = distance(lambda p: p.mT @ p, classes)
            batch_level = distance(lambda p: p @ p.mT, samples)
        return {"loss_cc": node.KD_WEIGHT * class_level, "loss_bc": node.KD_WEIGHT * batch_level}

    @classmethod
    def weights(cls, cfg: Any) -> tuple[float, float]:
        return cfg.MLKD.CE_WEIGHT, 1.0


def _at_most_median(values: Tensor) -> Tensor:
    """Return 1 for each value that is at most the median of all, else 0, in the values' dtype: (N,)."""
    return (values <= torch.quantile(values, 0.5)).to(values.dtype)
