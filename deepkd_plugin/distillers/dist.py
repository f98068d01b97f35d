"""Distillation from a stronger teacher (Huang et al., 2022): correlations in place of probabilities."""

from collections.abc import Hashable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..losses import wide
from ..rules import NOT_NEGATIVE, TEMPERATURE, Key
from .base import Distiller, Losses
from .terms import cross_entropy


class DIST(Distiller):
    """CE_WEIGHT · CE + BETA · T² · (1 − inter) + GAMMA · T² · (1 − intra) at TEMPERATURE, from the config node DIST.

    inter: Pearson's correlation of the two networks' probabilities over the classes, averaged over the samples. intra:
    over the batch's samples, averaged over the classes. Neither falls into target and other classes, so DeepKD has
    nothing to take apart.
    """

    on_logits = soft_labels = True
    losses_of = "batch"
    by_default = False
    keys = (
        Key("DIST.CE_WEIGHT", 1.0, "weight of the cross-entropy", *NOT_NEGATIVE),
        Key("DIST.BETA", 2.0, "weight of the correlation over classes", *NOT_NEGATIVE),
        Key("DIST.GAMMA", 2.0, "weight of the correlation over samples", *NOT_NEGATIVE),
        Key("DIST.TEMPERATURE", 4.0, "softmax temperature", *TEMPERATURE),
    )

    def constants(self, epoch: float, num_classes: int) -> Hashable:
        return ()

    def forward_train(self, image: Tensor, target: Tensor, epoch: float, **batch: Any) -> tuple[Tensor, Losses]:
        node, views = self.cfg.DIST, self.compare(image)
        t = float(node.TEMPERATURE)
        student, teacher = (F.softmax(wide(logits) / t, dim=1) for logits in views[0])
        inter, intra = correlation(student, teacher).mean(), correlation(student.mT, teacher.mT).mean()
        return views[0][0], {
            "loss_ce": node.CE_WEIGHT * cross_entropy(views, target),
            "loss_kd": t**2 * (node.BETA * (1 - inter) + node.GAMMA * (1 - intra)),
        }


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Return Pearson's correlation of each row, (N, M) each to (N,); 0 for a row without spread."""
    a, b = (rows - rows.mean(1, keepdim=True) for rows in (a, b))
    norm: Tensor = torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=1)
    return (a * b).sum(1) / (norm + 1e-8)
