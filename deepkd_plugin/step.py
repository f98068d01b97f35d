"""One training step: forward passes, losses by stream, their gradients, the update."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.utils import clip_grad_norm_

from .device import autocast_within, classify_in_float32, precision
from .distributed.process_group import ProcessGroup
from .gsnr import GradientMonitor
from .mixture import members
from .optim import StreamOptimizer

Batch = Mapping[str, Any]
"""A distiller's arguments: image (a tensor, or a list of views), target, …"""


class Outcome(NamedTuple):
    """What a step leaves beside the weights; no tensor carries a graph."""

    logits: Tensor
    """The student's, (B, C)."""
    losses: dict[str, Tensor]
    """By stream."""
    sums: dict[str, Tensor]
    """What Step.measure says of the batch."""


class Step:
    """One step of training: `step(batch, epoch)` moves the student's weights.

    epoch: for the distiller, which reads its warm-up and mask from it; counted from 1, a fraction while a warm-up by
    iteration lasts (Trainer.advance_warmup).

    by_stream: the distiller's losses -> losses by stream. amp: SOLVER.AMP; both networks run under that autocast, but
    the teacher's last layer in float32. Under float16 the losses are scaled, and a step whose gradients overflow moves
    nothing: there is one scale and one such decision for all streams and processes.
    """

    name = "eager"
    monitor: GradientMonitor | None = None
    """Takes a sample of the streams' gradients in a step in which it is due."""
    clip_norm = 0.0
    """Largest norm of the whole gradient in the update; 0: any."""
    scaler: GradScaler | None = None
    """Has the scale of the losses under float16."""
    sum_over: ProcessGroup | None = None
    """The processes that the batch is shared among."""

    def __init__(
        self,
        distiller: nn.Module,
        optimizer: StreamOptimizer,
        by_stream: Callable[[dict[str, Tensor]], dict[str, Tensor]],
        amp: bool | str,
        device: torch.device,
    ) -> None:
        self.distiller = distiller
        self.module: Any = getattr(distiller, "module", distiller)
        self.optimizer = optimizer
        self.by_stream = by_stream
        self.device = device
        if amp:
            autocast_within(self.module, device, amp)
            if hasattr(self.module, "teacher"):
                for teacher in members(self.module.teacher):
                    classify_in_float32(teacher)
        if precision(amp) == "float16":
            self.scaler = GradScaler(device.type)

    def complete(self, batch: Batch) -> Batch:
        """Return the distiller's arguments; replaced if the step itself makes them of what the loader has drawn."""
        return batch

    def measure(self, logits: Tensor, losses: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Return what a batch adds to the epoch's sums; replaced by who keeps such sums."""
        return {}

    def __call__(self, batch: Batch, epoch: float) -> Outcome:
        batch = self.complete(batch)
        logits, losses, batch = self.gradients(batch, epoch)
        if self.clip_norm:
            if self.scaler is not None:
                self.scaler.unscale_(self.optimizer)
            self.optimizer.clip(lambda params: clip_grad_norm_(params, self.clip_norm))
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        # without their graphs, which would live as long as somebody keeps a number of the step
        logits, losses = logits.detach(), {stream: loss.detach() for stream, loss in losses.items()}
        return Outcome(logits, losses, self.measure(logits, losses, batch))

    def gradients(self, batch: Batch, epoch: float) -> tuple[Tensor, dict[str, Tensor], Batch]:
        """Do all of a step but its update; returns logits and losses by stream, and the batch that they are of."""
        self.optimizer.zero_grad()  # first, so that old gradients take no memory beside the new activations
        logits, losses = self.distiller(**batch, epoch=epoch)
        by_stream = self.by_stream(losses)
        self.backward(by_stream)
        return logits, by_stream, batch

    def backward(self, by_stream: dict[str, Tensor], last: bool = True) -> None:
        """Add the gradients of losses by stream, and sample them if it is time. last: False if more will follow."""
        sum_over = self.sum_over if last else None
        if self.scaler is not None:
            by_stream = {stream: self.scaler.scale(loss) for stream, loss in by_stream.items()}
        if self.monitor is not None and self.samples:
            self.monitor.sample(by_stream, last, sum_over, 1.0 if self.scaler is None else self.scaler.get_scale())
        self.optimizer.backward(by_stream, sum_over=sum_over)

    @property
    def samples(self) -> bool:
        """Whether the monitor takes a sample in this step."""
        return self.monitor is not None and self.monitor.due
