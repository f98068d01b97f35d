"""From losses by stream to gradients by stream, with no backward pass that is not needed.

A stream is a named part of the loss whose gradient gets a momentum of its own (DeepKD: task TOG, target
class TCG, non-target class NCG). Momentum is linear in the gradient, so streams with equal coefficients
may share one backward pass and one buffer without changing the result.
"""

import contextlib
from collections.abc import Callable, Hashable, Mapping, Sequence

import torch
from torch import Tensor

STREAMS = ("tog", "tcg", "ncg")
"""DeepKD's streams: task, target class, non-target class."""

EXTRA_STREAMS = ("feat",)
"""Streams that exist if SOLVER.DECOUPLED.LOSS_STREAMS gives them a loss."""

OF_A_TEACHER = ("tcg", "ncg")
"""Those that say something of a teacher: with DISTILLER.TEACHER_POOL streams each of several has a pair of them."""


def of_teacher(stream: str, number: int) -> str:
    """Name a stream of OF_A_TEACHER of one of several teachers, counted from 0: tcg, tcg_2, tcg_3, …"""
    return f"{stream}_{number + 1}" if number else stream


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


Around = Callable[[], contextlib.AbstractContextManager[None]]
"""A context for a backward pass."""


def backward_by_set(
    losses: Mapping[str, Tensor],
    sets: Sets,
    params: Sequence[Tensor],
    retain_graph: bool = False,
    around: Sequence[Around] | None = None,
) -> list[list[Tensor | None]]:
    """Make one backward pass for each set of streams that has a loss.

    losses: stream → scalar. Returns, for each set, the gradients of its summed losses with respect to
    `params`, in their order; None for a parameter that does not take part. The graph is kept between the
    passes and, with `retain_graph`, after the last. The caller may write to the gradients.

    around: a context for each set's pass, whose hooks replace the gradients by tensors of the caller's. Raises
    TypeError for what is no mapping to tensors, ValueError for an unknown stream or a loss that is not a
    scalar, RuntimeError if no loss or no parameter needs a gradient, or none reaches one.
    """
    known = [name for names in sets for name in names]
    _check_losses(losses, known)
    if not params:
        raise RuntimeError("no parameter needs a gradient: all are frozen (requires_grad False), or there are none")
    totals: list[Tensor | None] = []
    for names in sets:
        parts = [losses[name] for name in names if name in losses and losses[name].requires_grad]
        totals.append(sum(parts[1:], parts[0]) if parts else None)
    present = {i: total for i, total in enumerate(totals) if total is not None}
    if not present:
        raise RuntimeError(f"none of the losses {list(losses)} needs a gradient")
    columns: list[list[Tensor | None]] = [[None] * len(params) for _ in sets]
    seen = set[int]()
    for i, total in present.items():
        keep = retain_graph or i < max(present)
        with around[i]() if around else contextlib.nullcontext():
            gradients = torch.autograd.grad(total, params, retain_graph=keep, allow_unused=True)
        columns[i] = list(gradients) if around else _own(gradients, seen)
    if all(g is None for column in columns for g in column):
        raise RuntimeError(
            f"the losses {list(losses)} reach none of the parameters: the network uses other tensors than these. After "
            f"load_state_dict(assign=True) or the like make the optimizer anew; for weights that FSDP shards call "
            f"loss.backward() and then the optimizer's collect(stream)"
        )
    return columns


def _check_losses(losses: Mapping[str, Tensor], known: Sequence[str]) -> None:
    example = f"{{{known[0]!r}: loss}}"
    if not isinstance(losses, Mapping):
        raise TypeError(f"losses must map streams to scalar tensors, as in {example}, got {type(losses).__name__}")
    for name, loss in losses.items():
        if name not in known:
            raise ValueError(f"unknown stream {name!r}; the streams are {known}")
        if not isinstance(loss, Tensor):
            raise TypeError(f"the loss of stream {name!r} must be a scalar tensor, got {type(loss).__name__}")
        if loss.ndim != 0:
            raise ValueError(f"the loss of stream {name!r} must be a scalar, got shape {tuple(loss.shape)}")


def _own(gradients: Sequence[Tensor | None], seen: set[int]) -> list[Tensor | None]:
    """Return gradients that can be written to: autograd may hand out one tensor twice, or an expanded one.

    seen: the memory that passes before have handed out; this one's is added. A function of the user's own, such as a
    fused loss, may return what it has saved, in every pass.

    A tensor of a subclass, such as a DTensor, has no memory to look at and is left as it is.
    """
    own: list[Tensor | None] = []
    for g in gradients:
        if g is not None and type(g) is Tensor and g.layout == torch.strided and g.numel():
            storage = g.untyped_storage()
            if storage.data_ptr() in seen or storage.nbytes() < g.numel() * g.element_size():
                g = g.clone(memory_format=torch.contiguous_format)
            seen.add(storage.data_ptr())
        own.append(g)
    return own
