"""A training step whose batch is divided: among processes that each pass a part, and among micro-batches in turn."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import device
from .data.arrays import passes
from .distributed import collectives, process_group, sharding
from .errors import UserError
from .step import Batch, Step


class DividedStep(Step):
    """A step on a batch of `count` images, of which this process passes those that sharding.own names.

    The gradient is that of the whole batch, to rounding, whatever the method compares: a part's loss is computed of the
    logits of all, of which the part's own have a graph. Of micro-batches, all logits are known at once only after a
    first pass without a graph, so a method whose losses are of "batch" (distillers/base.py) makes two. One whose losses
    are means over samples sums its micro-batches' by their shares. BatchNorm sees a micro-batch of a process.
    """

    chunk = 1
    """Most images in a micro-batch, of all processes together."""
    count: int | None = None
    """Images in the next batch, of all processes together; None: those that this one passes."""

    def gradients(self, batch: Batch, epoch: float) -> tuple[Tensor, dict[str, Tensor], Batch]:
        self.optimizer.zero_grad()
        count = self.count or len(batch["target"])
        counts = sharding.shares(count, self.chunk)
        parts = _divide(batch, [max(of_part[process_group.rank()], 1) for of_part in counts])
        targets = [collectives.gather(part["target"], each) for part, each in zip(parts, counts)]
        whole = {**batch, "target": torch.cat(targets)}
        if len(parts) > 1 and self.module.losses_of == "batch":
            return *self.in_two_passes(parts, counts, whole["target"], epoch), whole
        logits: list[Tensor] = []
        sums: dict[str, Tensor] = {}
        for i, (part, each, target) in enumerate(zip(parts, counts, targets)):
            with self.making_whole(lambda own, each=each: collectives.gather(own, each)):  # type: ignore[misc]
                own, losses = self.distiller(**{**part, "target": target}, epoch=epoch)
            share = sum(each) / count
            by_stream = {name: loss * share if share < 1 else loss for name, loss in self.by_stream(losses).items()}
            self.backward(by_stream, last=i == len(parts) - 1)
            logits.append(own.detach().clone())  # a compiled network may use its memory again
            for name, loss in by_stream.items():
                sums[name] = sums[name] + loss.detach() if name in sums else loss.detach()
        return torch.cat(logits), sums, whole

    def in_two_passes(
        self, parts: Sequence[Batch], counts: Sequence[Sequence[int]], target: Tensor, epoch: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Pass all micro-batches for their logits, then each again for its part of the whole batch's gradient."""
        of_parts, states = [], []
        buffers = [(buffer, buffer.clone()) for buffer in self.module.student.buffers()]
        for part, each in zip(parts, counts):
            asked: list[Tensor] = []
            states.append(device.generators(self.device))
            with torch.no_grad(), self.making_whole(lambda own, asked=asked: asked.append(own.clone()) or own):  # type: ignore
                self.distiller(**part, epoch=epoch)
            of_parts.append((asked, [collectives.gather(own, each) for own in asked]))
        every = [torch.cat(pieces) for pieces in zip(*(gathered for _, gathered in of_parts))]
        for buffer, before in buffers:  # running means move in the second pass
            buffer.copy_(before)
        after, start = device.generators(self.device), 0
        for i, (part, each, (asked, _)) in enumerate(zip(parts, counts, of_parts)):
            first, mine = start + sum(each[: process_group.rank()]), each[process_group.rank()]
            turn = itertools.count()

            def complete(own: Tensor, first: int = first, mine: int = mine, turn: Iterator[int] = turn) -> Tensor:
                known = every[next(turn)]
                return torch.cat([known[:first], own[:mine], known[first + mine :]]) if own.requires_grad else known

            device.set_generators(self.device, states[i])  # dropout does as it did
            teacher = {"teacher_logits": asked[1::2]}  # `compare` asks for a view's of the student, then the teacher
            with self.making_whole(complete):
                logits, losses = self.distiller(**{**part, **teacher, "target": target}, epoch=epoch)
            by_stream = self.by_stream(losses)
            self.backward(by_stream, last=i == len(parts) - 1)
            start += sum(each)
        device.set_generators(self.device, after)
        return logits.detach(), {name: loss.detach() for name, loss in by_stream.items()}

    @contextlib.contextmanager
    def making_whole(self, complete: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Let the distiller's losses be of what `complete` makes of a part's logits."""
        before, self.module.whole = self.module.whole, complete
        try:
            yield
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise UserError(
                "SOLVER.BATCH_SIZE: of a batch (an epoch's last may be smaller) a process has one image, "
                "which BatchNorm cannot normalise; take another batch size, or fewer processes or micro-batches"
            ) from None
        finally:
            self.module.whole = before


def check_divisible(cfg: Any, module: Any, loader: Any) -> None:
    """Raise UserError if a run's batches cannot be divided: the method reads more than logits, the loader is odd."""
    several = process_group.size() > 1
    how = f"in {process_group.size()} processes" if several else f"with SOLVER.ACCUMULATE {cfg.SOLVER.ACCUMULATE}"
    if not getattr(module, "losses_of", ""):
        raise UserError(
            f"config: DISTILLER.TYPE is {cfg.DISTILLER.TYPE}, whose losses may read more of a batch than logits and "
            f"labels; {how} it must be one that declares `losses_of` (docs/scale.md)"
        )
    if several and passes(loader) is None:
        raise UserError(f"the training set is not one that get_dataset made; {how} it must be, for it is shared")


def _divide(batch: Batch, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Split a batch's tensors, and lists of them, into parts of these sizes."""
    parts: list[dict[str, Any]] = [{} for _ in sizes]
    for name, value in batch.items():
        tensors = value if isinstance(value, list) else [value]
        for part, pieces in zip(parts, zip(*(tensor.split(list(sizes)) for tensor in tensors))):
            part[name] = list(pieces) if isinstance(value, list) else pieces[0]
    return parts
