"""The processes that train one run together, and what they tell each other; all that is known of torch.distributed.

A launcher such as torchrun starts them. They share each batch: every process passes its own images, and `gather` gives
each the logits of all, with a graph for its own rows. So each computes the loss of the whole batch, whatever that
compares, and the sum of the processes' gradients (`Summation`) is the gradient of one process that had the whole batch.
"""

import atexit
import contextlib
import datetime
import io
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from . import device
from .errors import UserError
from .terminal import Stopped, process_share, spoken, world_size

PATIENCE = datetime.timedelta(minutes=30)
"""How long a process waits for another, which may draw a data set or test a network alone."""

GRACE = 5.0
"""Seconds from a signal to the end of a process that cannot see it, because it waits for a lost one."""

BUCKET = 25 * 2**20
"""Bytes of gradients that are reduced at once, more or less; DistributedDataParallel's number."""

MEETING = ("MASTER_ADDR", "MASTER_PORT")
"""What a launcher sets in the environment for processes to find each other, beside their numbers."""


ProcessGroup = Any
"""A group of torch.distributed's."""


class Lost(Stopped):
    """Another process of the run has ended, so this one cannot go on."""

    def __init__(self) -> None:
        super().__init__("another process of this run has ended", 1)


class _Processes(NamedTuple):
    rank: int
    size: int
    local: int
    """This process's number on its machine."""
    device: torch.device
    streams: Any
    """The group that gradients are summed in while a backward pass may use the other, as SyncBatchNorm does."""
    store: Any


_ALONE = _Processes(0, 1, 0, torch.device("cpu"), None, None)
_here = _ALONE
_has_joined = False


def size() -> int:
    """Return how many processes train this run."""
    return _here.size


def rank() -> int:
    """Return this process's number among them; 0 alone writes and prints."""
    return _here.rank


def streams() -> Any:
    """Return the group that gradients by stream are summed in."""
    return _here.streams


def command(tool: str) -> list[str]:
    """Return the words that start a tool as this process was started."""
    words = spoken(tool)
    if size() == 1:
        return words
    words = words[1:] if words[1] == "-m" or words[1].endswith(".py") else ["--no-python", *words]
    local = int(os.environ.get("LOCAL_WORLD_SIZE", size()))
    nodes = ["--nnodes", str(size() // local)] if size() > local else []
    return ["torchrun", "--nproc_per_node", str(local), *nodes, *words]


def launcher() -> str | None:
    """Name the torchrun that has started this process, and starts it again by --max-restarts; None without one.

    Each of its attempts gets the same name, and no other torchrun has it.
    """
    name, parent = os.environ.get("TORCHELASTIC_RUN_ID"), os.getppid()
    if name is None:
        return None
    started = ""
    with contextlib.suppress(OSError, IndexError):  # the number of a process may be another's later
        started = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    return " ".join([name, str(parent), started, socket.gethostname()])


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Be one of the processes that a launcher has started, until the block ends; alone, do nothing.

    NCCL joins GPUs, of which LOCAL_RANK chooses one (take_card), and gloo CPUs. All processes but the first are silent,
    and of a mistake that the first finds too it alone tells. Raises UserError for an environment that is no launcher's.
    """
    global _here, _has_joined
    if world_size() == 1:
        yield
        return
    with _ending_in_time():
        _here = here = _join()
        _has_joined = True
        silence = contextlib.ExitStack()
        if here.rank:
            nowhere = silence.enter_context(open(os.devnull, "w"))  # noqa: SIM115 (it is one)
            silence.enter_context(contextlib.redirect_stdout(nowhere))
            silence.enter_context(contextlib.redirect_stderr(nowhere))
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)  # it has nothing to finish; the first process has
        try:
            with silence:
                yield
        except BaseException as error:
            _tell(here, error)
            raise
        finally:
            _here = _ALONE
        if here.store is not None:
            dist.destroy_process_group()


def take_card() -> None:
    """Let this process of several use the GPU of its LOCAL_RANK; this starts CUDA."""
    if _here.device.type == "cuda":
        device.take(_here.local)


def ended(work: Callable[[], int]) -> int:
    """Return a command's exit code; one of several processes ends with it here.

    A thread of gloo that lets its last tensor go while Python shuts down ends the process with SIGABRT at times, so
    Python does not shut down.
    """
    code = 1
    try:
        code = work()
    except BaseException:
        if not _has_joined:
            raise
        sys.excepthook(*sys.exc_info())
    if _has_joined:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    return code


def _join() -> _Processes:
    _, asked, local = process_share(*MEETING)
    if not dist.is_available():
        raise UserError(f"environment: WORLD_SIZE is {asked}; it must be 1 with a PyTorch without torch.distributed")
    home, store = device.pick(), None
    if home.type == "cuda":
        home = torch.device("cuda", local)
    if not dist.is_initialized():
        try:
            store, number, count = next(iter(rendezvous("env://", timeout=PATIENCE)))
            store = _of_this_attempt(store, number, count)
            backend = "nccl" if home.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=PATIENCE)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"environment: the {asked} processes of WORLD_SIZE cannot be joined ({error})") from None
    return _Processes(dist.get_rank(), dist.get_world_size(), local, home, dist.new_group(), store)


def _of_this_attempt(store: Any, number: int, count: int) -> Any:
    """Return the part of a store that the processes of this attempt alone use.

    torchrun gives all attempts one store, and what a process of the last one has left there, such as its address, would
    be taken for that of its successor. So the first process answers whatever others ask under a name that is new, until
    each has confirmed.
    """
    token = uuid.uuid4().hex
    if number:
        store.set(f"asks {number}", token)
        token = store.get(f"answer {token}").decode()
        store.set(f"{token} {number}", "here")
        return PrefixStore(token, store)
    left, end = set(range(1, count)), time.monotonic() + PATIENCE.total_seconds()
    while left:
        for other in list(left):
            if store.check([f"asks {other}"]):
                store.set(f"answer {store.get(f'asks {other}').decode()}", token)
            if store.check([f"{token} {other}"]):
                left.discard(other)
        if time.monotonic() > end:
            raise ValueError(f"{len(left)} of {count} did not come")
        time.sleep(0.02)
    return PrefixStore(token, store)


def _tell(here: _Processes, error: BaseException) -> None:
    """Raise, in place of an error that ends this process, what it is to tell of it.

    That is nothing if another process has caused it, or if the first has found the same mistake.
    """
    if not here.rank:
        with contextlib.suppress(Exception):  # the store may be gone
            here.store.set("ended", "1")
    elif isinstance(error, Stopped):
        raise Stopped("", error.code) from None
    elif isinstance(error, UserError):
        told = True
        try:
            here.store.wait(["ended"], datetime.timedelta(seconds=2))
        except (dist.DistStoreError, AttributeError):
            told = False
        except RuntimeError:  # the store has gone with the first process
            pass
        raise Stopped("", 2) if told else UserError(f"process {here.rank} of {here.size}: {error}") from None


@contextlib.contextmanager
def _ending_in_time() -> Iterator[None]:
    """End this process GRACE seconds after a signal has asked for it.

    Python sees no signal while it waits for a GPU, which may wait for a process that is gone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch() -> None:
        while number := os.read(reader, 1):
            if number[0] in (signal.SIGTERM, signal.SIGINT):
                time.sleep(GRACE)
                os._exit(128 + number[0])
        os.close(reader)

    threading.Thread(target=watch, daemon=True).start()
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """Turn the backends' errors about a process that is gone into Lost."""
    try:
        yield
    except RuntimeError as error:
        # gloo's errors have no class of their own
        if isinstance(error, dist.DistError) or "gloo" in str(error) or "onnection" in str(error):
            raise Lost from error
        raise


def _reduced(values: Tensor, operation: Any = dist.ReduceOp.SUM) -> Tensor:
    with _together():
        dist.all_reduce(values, operation)
    return values


def wait() -> None:
    """Wait until all processes are here."""
    if size() > 1:
        _reduced(torch.zeros(1, device=_here.device)).item()


@contextlib.contextmanager
def in_turn() -> Iterator[None]:
    """Let the first process of each machine go through the block before the others: it may fetch or make files."""
    if _here.local:
        wait()
    yield
    if not _here.local:
        wait()


def from_first(numbers: Sequence[float]) -> list[float]:
    """Return the first process's numbers, in all of them."""
    if size() == 1:
        return list(numbers)
    values = torch.tensor(numbers, dtype=torch.float64, device=_here.device)
    with _together():
        dist.broadcast(values, 0)
        return list(values.tolist())


def total(numbers: Sequence[float]) -> list[float]:
    """Add up the processes' numbers."""
    if size() == 1:
        return list(numbers)
    return list(_reduced(torch.tensor(numbers, dtype=torch.float64, device=_here.device)).tolist())


def largest(numbers: Sequence[float]) -> list[float]:
    """Return the largest of the processes' numbers, place by place."""
    if size() == 1:
        return list(numbers)
    values = torch.tensor(numbers, dtype=torch.float64, device=_here.device)
    return list(_reduced(values, dist.ReduceOp.MAX).tolist())


def parts_of_all(numbers: Sequence[float]) -> Sequence[Tensor | float]:
    """Return this process's part of the sum of all processes' numbers, place by place: (n,), 0 of nothing."""
    if size() == 1:
        return [1.0] * len(numbers)
    own = torch.tensor(numbers, dtype=torch.float32, device=_here.device)
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
    row = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8).to(_here.device)
    counts = [int(count) for count in total([len(row) if number == rank() else 0 for number in range(size())])]
    parts = gather(row, counts).cpu().split(counts)
    return [torch.load(io.BytesIO(part.numpy().tobytes()), weights_only=True) for part in parts]


def check_alike(**facts: int) -> None:
    """Raise UserError if a fact, a number of 63 bits at most, is not the same in all processes."""
    if size() == 1:
        return
    values = torch.tensor(list(facts.values()), dtype=torch.int64, device=_here.device)
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
    with torch.no_grad(), _together():
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor, 0)


def spread_buffers(module: nn.Module) -> None:
    """Give all processes the first one's buffers."""
    if size() > 1:
        with _together():
            for tensor in module.buffers():
                dist.broadcast(tensor, 0)


def rows_of_all(row: Tensor) -> Tensor:
    """Stack the processes' tensors (n,) of one dtype, on the CPU: (processes, n)."""
    return gather(row[None].to(_here.device), [1] * size()).cpu()


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
    with _together():
        dist.all_gather(every, mine)
    parts = [each.view(padded.dtype).view(padded.shape)[:count] for each, count in zip(every, counts)]
    parts[rank()] = rows
    return torch.cat(parts)


def shares(count: int, chunk: int) -> list[list[int]]:
    """Divide a batch of `count` images: of each micro-batch of at most `chunk`, how many images each process has."""
    sizes = [min(chunk, count - first) for first in range(0, count, chunk)]
    return [[whole // size() + (number < whole % size()) for number in range(size())] for whole in sizes]


def own(count: int, chunk: int) -> list[int]:
    """Return the places in a batch of the images that this process passes, micro-batch by micro-batch.

    If it has none in a micro-batch it passes the first image there all the same, for nothing: the others wait for it.
    """
    places: list[int] = []
    first = 0
    for counts in shares(count, chunk):
        start, mine = first + sum(counts[: rank()]), counts[rank()]
        places += range(start, start + mine) if mine else [first]
        first += sum(counts)
    return places


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
        with _together():
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
        with _together():
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
