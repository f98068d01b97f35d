"""Training without a teacher."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class Vanilla(nn.Module):
    """The student alone under cross-entropy, with a distiller's protocol."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    def get_learnable_parameters(self) -> list[nn.Parameter]:
        return list(self.student.parameters())

    def get_extra_parameters(self) -> int:
        return 0

    def forward(self, image: Tensor, target: Tensor | None = None, **batch: Any) -> Any:
        logits = self.student(image)[0]
        if not self.training:
            return logits
        return logits, {"ce": F.cross_entropy(logits, target)}
