"""Training without a teacher."""

from collections.abc import Hashable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .base import Distiller, Losses


class Vanilla(Distiller):
    """The student alone under cross-entropy, with a distiller's protocol."""

    name = "NONE"
    losses_of = "samples"
    soft_labels = True

    def __init__(self, student: nn.Module) -> None:
        nn.Module.__init__(self)
        self.student = student

    def constants(self, epoch: float, num_classes: int) -> Hashable:
        return ()

    def forward_train(self, image: Tensor, target: Tensor, epoch: float, **batch: Any) -> tuple[Tensor, Losses]:
        logits = self.whole(self.student(image)[0])
        return logits, {"ce": F.cross_entropy(logits, target)}
