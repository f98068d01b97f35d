"""What every distiller has in common, as mdistiller's trainers and tools expect it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .terms import View


class Distiller(nn.Module):
    """A student that trains beside a teacher in evaluation mode.

    In training `forward(image=, target=, epoch=, …)` gives `(logits, {name: scalar loss})`, in evaluation
    `forward(image=)` gives the student's logits. Both networks map images (B, 3, H, W) to
    `(logits (B, C), features)`.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher

    def train(self, mode: bool = True) -> Distiller:
        super().train(mode)
        self.teacher.eval()
        return self

    def get_learnable_parameters(self) -> list[nn.Parameter]:
        return list(self.student.parameters())

    def get_extra_parameters(self) -> int:
        """How many learnable parameters the method adds to the student's."""
        return 0

    def forward(self, **batch: Any) -> Any:
        if self.training:
            return self.forward_train(**batch)
        return self.student(batch["image"])[0]

    def forward_train(self, image: Tensor, target: Tensor, epoch: int, **batch: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} must define forward_train")

    def views(self, image: Tensor | Sequence[Tensor], count: int) -> list[View]:
        """Both networks' logits of each view of the batch; the teacher's carry no graph.

        image: (B, 3, H, W), or a list of `count` views, weak before strong. Raises ValueError for another
        number of views.
        """
        images = [image] if isinstance(image, Tensor) else list(image)
        if len(images) != count:
            raise ValueError(
                f"{type(self).__name__} needs {count} view(s) of each image, the batch has {len(images)}; "
                f"get_dataset gives as many as the config's method needs"
            )
        return [self._view(one) for one in images]

    def _view(self, image: Tensor) -> View:
        with torch.inference_mode():  # without autograd's bookkeeping
            teacher_logits = self.teacher(image)[0]
        return self.student(image)[0], teacher_logits.clone()  # an ordinary tensor again


def warmup_factor(epoch: int, epochs: int) -> float:
    """DKD's linear warm-up of the distillation loss: epoch / epochs up to 1 (epochs are counted from 1)."""
    return min(epoch / epochs, 1.0) if epochs else 1.0
