"""One training step: forward passes, losses by stream, their gradients, the update."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from . import device
from .gsnr import GradientMonitor
from .optim import DecoupledMomentumSGD

Batch = Mapping[str, Any]
"""A distiller's arguments: image (a tensor, or a list of views), target, …"""

Outcome = tuple[Tensor, dict[str, Tensor]]
"""The student's logits (B, C), and each stream's loss."""


class Step:
    """Forward passes, losses by stream, their gradients, the update; where `monitor` is due, its sample too."""

    name = "eager"
    monitor: GradientMonitor | None = None
    clip_norm = 0.0
    """Largest norm of the whole gradient in the update; 0: any."""

    def __init__(
        self,
        distiller: nn.Module,
        optimizer: DecoupledMomentumSGD,
        by_stream: Callable[[dict[str, Tensor]], dict[str, Tensor]],
        amp: bool,
        at: torch.device,
    ) -> None:
        self.distiller, self.optimizer, self.by_stream, self.amp, self.at = (
            distiller,
            optimizer,
            by_stream,
            amp,
            at,
        )

    def __call__(self, batch: Batch, epoch: int) -> Outcome:
        logits, losses = self.gradients(batch, epoch)
        if self.clip_norm:
            self.optimizer.clip(lambda params: clip_grad_norm_(params, self.clip_norm))
        self.optimizer.step()
        return logits, losses

    def gradients(self, batch: Batch, epoch: int) -> Outcome:
        """The step without its update."""
        self.optimizer.zero_grad()  # first, so that old gradients do not lie beside the new activations
        with device.autocast(self.at, self.amp):
            logits, losses = self.distiller(**batch, epoch=epoch)
        by_stream = self.by_stream(losses)
        if self.samples:
            self.monitor.sample(by_stream)
        self.optimizer.backward(by_stream)
        return logits, by_stream

    @property
    def samples(self) -> bool:
        """Whether the monitor takes a sample in this step."""
        return self.monitor is not None and self.monitor.due
