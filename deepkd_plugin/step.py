"""One training step: forward passes, losses by stream, their gradients, the update."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from .device import autocast
from .gsnr import GradientMonitor
from .optim import DecoupledMomentumSGD

Batch = Mapping[str, Any]
"""A distiller's arguments: image (a tensor, or a list of views), target, …"""

Outcome = tuple[Tensor, dict[str, Tensor]]
"""The student's logits (B, C), and each stream's loss."""


class Step:
    """One step of training: `step(batch, epoch)` moves the student's weights.

    epoch: for the distiller, which reads its warm-up and mask from it; counted from 1, a fraction while a warm-up by
    iteration lasts (Trainer.advance_warmup).

    by_stream: the distiller's losses -> losses by stream. amp: run both networks under bfloat16 autocast.
    """

    name = "eager"
    monitor: GradientMonitor | None = None
    """Takes a sample of the streams' gradients in a step in which it is due."""
    clip_norm = 0.0
    """Largest norm of the whole gradient in the update; 0: any."""

    def __init__(
        self,
        distiller: nn.Module,
        optimizer: DecoupledMomentumSGD,
        by_stream: Callable[[dict[str, Tensor]], dict[str, Tensor]],
        amp: bool,
        device: torch.device,
    ) -> None:
        self.distiller = distiller
        self.optimizer = optimizer
        self.by_stream = by_stream
        self.amp = amp
        self.device = device

    def __call__(self, batch: Batch, epoch: float) -> Outcome:
        logits, losses = self.gradients(batch, epoch)
        if self.clip_norm:
            self.optimizer.clip(lambda params: clip_grad_norm_(params, self.clip_norm))
        self.optimizer.step()
        return logits, losses

    def gradients(self, batch: Batch, epoch: float) -> Outcome:
        """Do all of a step but its update."""
        self.optimizer.zero_grad()  # first, so that old gradients take no memory beside the new activations
        with autocast(self.device, self.amp):
            logits, losses = self.distiller(**batch, epoch=epoch)
        by_stream = self.by_stream(losses)
        if self.monitor is not None and self.samples:
            self.monitor.sample(by_stream)
        self.optimizer.backward(by_stream)
        return logits, by_stream

    @property
    def samples(self) -> bool:
        """Whether the monitor takes a sample in this step."""
        return self.monitor is not None and self.monitor.due
