"""Sums of gradients over the processes: in flat buckets, which are reduced while a backward pass goes on."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import together

BUCKET = 25 * 2**20
"""Bytes of gradients that are reduced at once, more or less; DistributedDataParallel's number."""


class _Bucket:
    """Some parameters' gradients in flat memory, followed by a number for each that tells whether it has one."""

    def __init__(self, members: Sequence[Tensor]) -> None:
        self.members = members
        self.left = len(members)
        self.numel = sum(p.numel() for p in members)
        self.flat = torch.empty(self.numel + len(members), dtype=members[0].dtype, device=members[0].device)

    def views(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each parameter and its gradient's place, in the parameter's order of memory if it is a dense one."""
        offset = 0
        for p in self.members:
            part = self.flat[offset : offset + p.numel()]
            dense = p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last)
            yield p, part.as_strided(p.shape, p.stride()) if dense else part.view(p.shape)
            offset += p.numel()

    def flags(self) -> Tensor:
        return self.flat[self.numel :]


class Summation:
    """The gradients of one backward pass, or several, on their way to their sum over all processes.

    params: all that may have a gradient, in one order in all processes. earlier: gradients that this process has had
    before, which are added. The gradients are put into buckets, and a bucket is reduced as soon as it is full, in one
    order in all processes, while the pass goes on. With `finish` come the sums, as views of the buckets.
    """

    def __init__(self, params: Sequence[Tensor], earlier: Mapping[Tensor, Tensor], group: Any = None) -> None:
        self.params, self.group = params, group
        self.earlier = dict(earlier)
        # a pass reaches the last parameters first
        self.buckets = [_Bucket(members) for members in _buckets(params[::-1])]
        self.views = {p: view for bucket in self.buckets for p, view in bucket.views()}
        self.home = {p: bucket for bucket in self.buckets for p in bucket.members}
        self.taken: set[Tensor] = set()
        self.works: list[Any] = []

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """Take the gradients of a pass that torch.autograd.grad makes in the block; it returns the views."""
        hooks = [p.register_hook(self._taker(p)) for p in self.params]  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def take(self, p: Tensor, gradient: Tensor) -> Tensor:
        """Put a parameter's gradient into its bucket; returns its place there."""
        view, bucket = self.views[p], self.home[p]
        view.copy_(gradient)
        if p in self.earlier:
            view.add_(self.earlier.pop(p))
        self.taken.add(p)
        bucket.left -= 1
        while len(self.works) < len(self.buckets) and not self.buckets[len(self.works)].left:
            self._launch()
        return view

    @torch.no_grad()
    def flush(self) -> None:
        """Reduce what is left, for parameters that have no gradient here too."""
        for p in list(self.earlier):
            self.take(p, self.earlier.pop(p))
        while len(self.works) < len(self.buckets):
            self._launch()

    def finish(self) -> list[Tensor | None]:
        """Return the sums in the parameters' order; None for a parameter without a gradient in any process.

        One without a gradient here but with one elsewhere counts as 0 here. This waits for the device only if there
        is such a parameter.
        """
        self.flush()
        with together():
            for work in self.works:
                if work is not None:  # as it is in a process outside of the group
                    work.wait()
        nowhere = {
            p
            for bucket in self.buckets
            if bucket.left
            for p, flag in zip(bucket.members, bucket.flags().tolist())
            if not flag
        }
        return [None if p in nowhere else self.views[p] for p in self.params]

    def _taker(self, p: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda gradient: self.take(p, gradient)

    def _launch(self) -> None:
        bucket = self.buckets[len(self.works)]
        bucket.flags().fill_(1)
        for place, p in enumerate(bucket.members if bucket.left else ()):
            if p not in self.taken:
                self.views[p].zero_()
                bucket.flags()[place] = 0
        with together():
            self.works.append(dist.all_reduce(bucket.flat, group=self.group, async_op=True))


def summed(gradients: Sequence[Mapping[Tensor, Tensor]], params: Sequence[Tensor], group: Any = None) -> list[Any]:
    """Sum several sets' gradients by parameter over the processes, all at once: [set][parameter], None without one."""
    sums = [Summation(params, mine, group) for mine in gradients]
    for one in sums:
        one.flush()
    return [one.finish() for one in sums]


def _buckets(params: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Collect parameters of one dtype and device, in order, until their bytes fill a bucket."""
    alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for p in params:
        alike.setdefault((p.dtype, p.device), []).append(p)
    for kind in alike.values():
        bucket, filled = list[Tensor](), 0
        for p in kind:
            bucket.append(p)
            filled += p.numel() * p.element_size()
            if filled >= BUCKET:
                yield bucket
                bucket, filled = [], 0
        if bucket:
            yield bucket
