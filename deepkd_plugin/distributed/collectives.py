"""What the processes of one run tell each other; alone, each is what it would be of one process."""

import contextlib
import io
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import UserError
from ..terminal import Stopped
from .process_group import here, rank, size


class Lost(Stopped):
    """Another process of the run has ended, so this one cannot go on."""

    def __init__(self) -> None:
        super().__init__("another process of this run has ended", 1)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Turn the backends' errors about a process that is gone into Lost."""
    try:
        yield
    except RuntimeError as error:
        # gloo's errors have no class of their own
        if isinstance(error, dist.DistError) or "gloo" in str(error) or "onnection" in str(error):
            raise Lost from error
        raise


def _reduced(values: Tensor, operation: Any = dist.ReduceOp.SUM) -> Tensor:
    with together():
        dist.all_reduce(values, operation)
    return values


def wait() -> None:
    """Wait until all processes are here."""
    if size() > 1:
        _reduced(torch.zeros(1, device=here().device)).item()


@contextlib.contextmanager
def in_turn() -> Iterator[None]:
    """Let the first process of each machine go through the block before the others: it may fetch or make files."""
    if here().local:
        wait()
    yield
    if not here().local:
        wait()


def from_first(numbers: Sequence[float]) -> list[float]:
    """Return the first process's numbers, in all of them."""
    if size() == 1:
        return list(numbers)
    values = torch.tensor(numbers, dtype=torch.float64, device=here().device)
    with together():
        dist.broadcast(values, 0)
        return list(values.tolist())


def total(numbers: Sequence[float]) -> list[float]:
    """Add up the processes' numbers."""
    if size() == 1:
        return list(numbers)
    return list(_reduced(torch.tensor(numbers, dtype=torch.float64, device=here().device)).tolist())


def largest(numbers: Sequence[float]) -> list[float]:
    """Return the largest of the processes' numbers, place by place."""
    if size() == 1:
        return list(numbers)
    values = torch.tensor(numbers, dtype=torch.float64, device=here().device)
    return list(_reduced(values, dist.ReduceOp.MAX).tolist())


def parts_of_all(numbers: Sequence[float]) -> Sequence[Tensor | float]:
    """Return this process's part of the sum of all processes' numbers, place by place: (n,), 0 of nothing."""
    if size() == 1:
        return [1.0] * len(numbers)
    own = torch.tensor(numbers, dtype=torch.float32, device=here().device)
    return (own / _reduced(own.clone()).clamp_min(1)).unbind()


def added(values: Tensor) -> Tensor:
    """Add up the processes' tensors of one shape, without waiting for the device."""
    return values if size() == 1 else _reduced(values.detach().clone())


def of_all(mine: Any) -> list[Any]:
    """Return what each process has: numbers, texts and tensors on the CPU, in lists and dicts."""
    if size() == 1:
        return [mine]
    buffer = io.BytesIO()
    torch.save(mine, buffer)
    row = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8).to(here().device)
    counts = [int(count) for count in total([len(row) if number == rank() else 0 for number in range(size())])]
    parts = gather(row, counts).cpu().split(counts)
    return [torch.load(io.BytesIO(part.numpy().tobytes()), weights_only=True) for part in parts]


def check_alike(**facts: int) -> None:
    """Raise UserError if a fact, a number of 63 bits at most, is not the same in all processes."""
    if size() == 1:
        return
    values = torch.tensor(list(facts.values()), dtype=torch.int64, device=here().device)
    both = _reduced(torch.cat([values, -values]), dist.ReduceOp.MAX).view(2, -1)
    for name, high, low in zip(facts, both[0].tolist(), both[1].tolist()):
        if high != -low:
            raise UserError(
                f"torch.distributed: the {size()} processes differ in {name.replace('_', ' ')}; all must have the same "
                f"files and the same version"
            )


def spread(module: nn.Module) -> None:
    """Give all processes the first one's parameters and buffers."""
    if size() == 1:
        return
    with torch.no_grad(), together():
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor, 0)


def spread_buffers(module: nn.Module) -> None:
    """Give all processes the first one's buffers."""
    if size() > 1:
        with together():
            for tensor in module.buffers():
                dist.broadcast(tensor, 0)


def rows_of_all(row: Tensor) -> Tensor:
    """Stack the processes' tensors (n,) of one dtype, on the CPU: (processes, n)."""
    return gather(row[None].to(here().device), [1] * size()).cpu()


def synchronised(network: nn.Module) -> nn.Module:
    """Return a network whose BatchNorm takes means over all processes."""
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
    return converted


def gather(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """Return the rows of all processes, in the processes' order; only this one's carry a graph.

    rows: (counts[rank], …), or one row more that stands in for none. counts: of each process.
    """
    rows = rows[: counts[rank()]]
    if size() == 1:
        return rows
    padded = rows.detach().new_zeros((max(counts), *rows.shape[1:]))
    padded[: len(rows)] = rows.detach()
    # as bytes, for not every backend knows every dtype
    mine = padded.contiguous().view(-1).view(torch.uint8)
    every = [torch.empty_like(mine) for _ in counts]
    with together():
        dist.all_gather(every, mine)
    parts = [each.view(padded.dtype).view(padded.shape)[:count] for each, count in zip(every, counts)]
    parts[rank()] = rows
    return torch.cat(parts)
