"""From losses by stream to gradients by stream, with no backward pass that is not needed.

A stream is a named part of the loss whose gradient gets a momentum of its own (DeepKD: task TOG, target
class TCG, non-target class NCG). Momentum is linear in the gradient, so streams with equal coefficients
may share one backward pass and one buffer without changing the result.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

STREAMS = ("tog", "tcg", "ncg")
"""DeepKD's streams: task, target class, non-target class."""

EXTRA_STREAMS = ("feat",)
"""Streams that exist if SOLVER.DECOUPLED.LOSS_STREAMS gives them a loss."""

Sets = tuple[tuple[str, ...], ...]
"""A partition of the stream names, in their order: each inner tuple is handled as one."""


def merge_streams(coefficients: Sequence[Mapping[str, Hashable]]) -> Sets:
    """Partition the streams into sets that have equal coefficients in every one of several groups.

    coefficients: for each parameter group, stream name → coefficients, all with the same names.
    """
    sets: dict[tuple[Hashable, ...], list[str]] = {}
    for name in coefficients[0]:
        sets.setdefault(tuple(group[name] for group in coefficients), []).append(name)
    return tuple(tuple(names) for names in sets.values())


def assign_losses(
    losses: Mapping[str, Tensor], streams: Sequence[str], assignment: Mapping[str, str]
) -> dict[str, Tensor]:
    """Sum a distiller's named losses into streams.

    losses: name → scalar, or one value per device as DataParallel returns it (averaged). assignment: loss
    name → stream. A loss that is not in it goes to the stream of its own name; if there is only
    one stream, all go to that one. Raises ValueError for a loss that no stream takes.
    """
    by_stream: dict[str, Tensor] = {}
    for name, loss in losses.items():
        stream = streams[0] if len(streams) == 1 else assignment.get(name, name)
        if stream not in streams:
            raise ValueError(
                f"loss {name!r} belongs to no stream: it is neither one of {tuple(streams)} nor assigned to one of them"
            )
        value = loss.mean()
        by_stream[stream] = by_stream[stream] + value if stream in by_stream else value
    return by_stream


def backward_by_set(
    losses: Mapping[str, Tensor],
    sets: Sets,
    params: Sequence[Tensor],
    retain_graph: bool = False,
    batched: bool = False,
) -> list[list[Tensor | None]]:
    """Make one backward pass for each set of streams that has a loss, or with `batched` one for all of them.

    losses: stream → scalar. Returns, for each set, the gradients of its summed losses with respect to
    `params`, in their order; None for a parameter that does not take part. The graph is kept between the
    passes and, with `retain_graph`, after the last. The caller may write to the gradients. Raises
    ValueError for an unknown stream or a loss that is not a scalar, RuntimeError if no loss needs a
    gradient.

    batched: walk the graph once with all sets' gradients stacked (autograd's is_grads_batched, which maps
    each operation's backward over them: fewer launches on a GPU, and rounding of its own). A parameter that
    takes part in one set gets zeros in the others. RuntimeError if an operation cannot be mapped.
    """
    known = [name for names in sets for name in names]
    for name, loss in losses.items():
        if name not in known:
            raise ValueError(f"unknown stream {name!r}; the streams are {known}")
        if loss.ndim != 0:
            raise ValueError(f"the loss of stream {name!r} must be a scalar, got shape {tuple(loss.shape)}")
    totals: list[Tensor | None] = []
    for names in sets:
        parts = [losses[name] for name in names if name in losses and losses[name].requires_grad]
        totals.append(sum(parts[1:], parts[0]) if parts else None)
    if all(total is None for total in totals):
        raise RuntimeError(f"none of the losses {list(losses)} needs a gradient")
    present = [total for total in totals if total is not None]
    if batched and len(present) > 1:
        columns = iter(_batched(present, params, retain_graph))
    else:
        columns = _in_turn(present, params, retain_graph)
    return [[None] * len(params) if total is None else next(columns) for total in totals]


class Ledger:
    """The gradients that wait for an optimizer's step: p.grad and, of several sets of streams, each set's own.

    With one set p.grad is all there is. With several p.grad is their sum, in memory of its own. The object is changed
    in place and never replaced, so whoever holds it sees what waits.
    """

    def __init__(self) -> None:
        self.sets: Sets = ()
        """The partition that the gradients were made under; () if none wait."""
        self.by_set: list[dict[Tensor, Tensor]] = []
        """Each set's gradients by parameter; empty dictionaries if there is one set."""

    @property
    def apart(self) -> bool:
        """Whether sets have gradients of their own beside p.grad."""
        return len(self.sets) > 1

    def clear(self) -> None:
        """Forget the sets' gradients; p.grad is the parameters' own."""
        self.sets = ()
        self.by_set.clear()

    def forget_stale(self) -> None:
        """Forget the sets' gradients if somebody else, say the module's zero_grad, removed p.grad."""
        if any(p.grad is None for gradients in self.by_set for p in gradients):
            self.clear()

    def expect(self, sets: Sets) -> None:
        """Raise RuntimeError if gradients of another partition wait."""
        if self.sets and self.sets != sets:
            raise RuntimeError("coefficients changed between two backward calls of one step")

    def add(self, sets: Sets, params: Sequence[Tensor], columns: Sequence[Sequence[Tensor | None]]) -> None:
        """Add the gradients of one backward call, [set][parameter], and their sum to p.grad."""
        self.expect(sets)
        if not self.sets:
            self.sets = sets
            self.by_set[:] = [{} for _ in sets]
        new = [{p: g for p, g in zip(params, column) if g is not None} for column in columns]
        if self.apart:
            for mine, gradients in zip(self.by_set, new):
                _add(mine, gradients)
        sums = _total(new) if self.apart else new[0]
        grads = {p: p.grad for p in sums if p.grad is not None}
        _add(grads, sums)
        for p in sums:
            p.grad = grads[p]

    def merged(self, sets: Sets, params: Sequence[Tensor]) -> list[dict[Tensor, Tensor]]:
        """Return the gradients of a step's sets by parameter, added up from the finer sets of `add`.

        Raises RuntimeError if p.grad is set without gradients by stream, or if a set has come apart since.
        """
        sums = {p: p.grad for p in params if p.grad is not None}
        if not self.sets and sums and len(sets) > 1:
            streams = tuple(name for names in sets for name in names)
            raise RuntimeError(
                f"p.grad is set but the gradients by stream are not: call the optimizer's backward() with "
                f"one loss for each of {streams}"
            )
        for names in self.sets:
            if not any(set(names) <= set(members) for members in sets):
                raise RuntimeError(
                    f"the coefficients of {names} came to differ after backward had merged their gradients: "
                    f"change them after step() and before backward()"
                )
        if len(sets) == 1:
            return [sums]
        merged: list[dict[Tensor, Tensor]] = [{} for _ in sets]
        for names, gradients in zip(self.sets, self.by_set):
            home = merged[next(s for s, members in enumerate(sets) if set(names) <= set(members))]
            for p, g in gradients.items():
                # a sum of several sets must leave each of them as it is
                home[p] = home[p] + g if p in home else g
        return merged

    def clip(self, params: Sequence[Tensor], clipper: Callable[[list[Tensor]], Any]) -> None:
        """Let `clipper` clip p.grad in place, and scale each coordinate of each set as that of p.grad was."""
        present = [p for p in params if p.grad is not None]
        before = [p.grad.clone() if p.grad is not None else None for p in present] if self.apart else []
        clipper(present)
        for p, was in zip(present, before):
            if p.grad is None or was is None:
                continue
            factor = torch.where(was != 0, p.grad / was, 1.0)
            for gradients in self.by_set:
                if p in gradients:
                    gradients[p].mul_(factor)

    def scale(self, params: Sequence[Tensor], factor: float | Tensor) -> None:
        """Multiply p.grad and every set's gradients."""
        scaled = [p.grad for p in params if p.grad is not None]
        scaled += [g for gradients in self.by_set for g in gradients.values()]
        if scaled:
            torch._foreach_mul_(scaled, factor)

    def average(self, params: Sequence[Tensor], group: Any = None) -> None:
        """Average p.grad and every set's gradients over the processes of torch.distributed's `group`."""
        sums = {p: p.grad for p in params if p.grad is not None}
        averaged = average(self.by_set if self.apart else [sums], params, group)
        if self.apart:
            self.by_set[:] = averaged
        for p, gradient in (_total(averaged) if self.apart else averaged[0]).items():
            p.grad = gradient


def average(
    gradients: Sequence[Mapping[Tensor, Tensor]], params: Sequence[Tensor], group: Any = None
) -> list[dict[Tensor, Tensor]]:
    """Average each set's gradients by parameter over the processes of torch.distributed's `group`.

    params: all that may have a gradient, in one order on all processes. If only some processes have a gradient, the
    others count as 0; if none has, there is none. The given gradients are overwritten.
    """
    present = torch.tensor([[p in mine for p in params] for mine in gradients], device=params[0].device)
    present = present.to(torch.int32)
    dist.all_reduce(present, dist.ReduceOp.MAX, group)
    averaged = [
        {p: mine[p] if p in mine else torch.zeros_like(p) for p, there in zip(params, row) if there}
        for mine, row in zip(gradients, present.tolist())
    ]
    for bucket in _buckets([g for mine in averaged for g in mine.values()]):
        flat = torch.cat([g.reshape(-1) for g in bucket])
        dist.all_reduce(flat, group=group)
        flat /= dist.get_world_size(group)
        for g, part in zip(bucket, torch.split(flat, [g.numel() for g in bucket])):
            g.copy_(part.view_as(g))
    return averaged


BUCKET = 25 * 2**20
"""Bytes that are reduced at once, more or less; DistributedDataParallel's number."""


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Collect gradients of one dtype, in order, until their bytes fill a bucket."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for g in gradients:
        by_dtype.setdefault(g.dtype, []).append(g)
    for alike in by_dtype.values():
        bucket, size = [], 0
        for g in alike:
            bucket.append(g)
            size += g.numel() * g.element_size()
            if size >= BUCKET:
                yield bucket
                bucket, size = [], 0
        if bucket:
            yield bucket


def _in_turn(totals: Sequence[Tensor], params: Sequence[Tensor], retain_graph: bool) -> Iterator[list[Tensor | None]]:
    for i, total in enumerate(totals):
        keep = retain_graph or i < len(totals) - 1
        yield _own(torch.autograd.grad(total, params, retain_graph=keep, allow_unused=True))


def _batched(totals: Sequence[Tensor], params: Sequence[Tensor], retain_graph: bool) -> list[list[Tensor | None]]:
    """Return [total][parameter], each a slice of one stacked gradient."""
    units = [torch.eye(len(totals), dtype=total.dtype, device=total.device)[i] for i, total in enumerate(totals)]
    stacked = _own(
        torch.autograd.grad(totals, params, units, retain_graph=retain_graph, allow_unused=True, is_grads_batched=True)
    )
    return [[None if g is None else g[i] for g in stacked] for i in range(len(totals))]


def _own(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return gradients that can be written to: autograd may hand out one tensor twice, or an expanded one."""
    seen: set[int] = set()
    own: list[Tensor | None] = []
    for g in gradients:
        if g is not None and g.layout == torch.strided and g.numel():
            storage = g.untyped_storage()
            if storage.data_ptr() in seen or storage.nbytes() < g.numel() * g.element_size():
                g = g.clone(memory_format=torch.contiguous_format)
            seen.add(storage.data_ptr())
        own.append(g)
    return own


def _add(total: dict[Tensor, Tensor], new: Mapping[Tensor, Tensor]) -> None:
    """Add gradients by parameter in place; one that has none yet gets the new one itself."""
    both = [p for p in new if p in total]
    if both:
        torch._foreach_add_([total[p] for p in both], [new[p] for p in both])
    for p, gradient in new.items():
        total.setdefault(p, gradient)


def _total(parts: Sequence[Mapping[Tensor, Tensor]]) -> dict[Tensor, Tensor]:
    """Sum several sets' gradients by parameter, in memory of their own."""
    total = dict(parts[0])
    own: set[Tensor] = set()
    for part in parts[1:]:
        first = [p for p in part if p in total and p not in own]
        again = [p for p in part if p in own]
        if again:
            torch._foreach_add_([total[p] for p in again], [part[p] for p in again])
        if first:
            total.update(zip(first, torch._foreach_add([total[p] for p in first], [part[p] for p in first])))
            own.update(first)
        for p, gradient in part.items():
            total.setdefault(p, gradient)
    return {p: g if p in own else g.clone() for p, g in total.items()}
