"""Who this process is among those of its run: how it joins them, and how it ends with them."""

import atexit
import contextlib
import datetime
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from .. import device
from ..errors import UserError
from ..terminal import Stopped, is_interrupted, spoken
from .environment import process_share, world_size

PATIENCE = datetime.timedelta(minutes=30)
"""How long a process waits for another, which may draw a data set or test a network alone."""

GRACE = 5.0
"""Seconds from a signal to the end of a process that cannot see it, because it waits for a lost one."""

LAST_WORDS = 15.0
"""Seconds more for one that has seen it, to say what is left of the run; torchrun kills after 30 in all."""

MEETING = ("MASTER_ADDR", "MASTER_PORT")
"""What a launcher sets in the environment for processes to find each other, beside their numbers."""

ProcessGroup = Any
"""A group of torch.distributed's."""


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


def here() -> _Processes:
    """Return this process's place among them."""
    return _here


def streams() -> Any:
    """Return the group that gradients by stream are summed in."""
    return _here.streams


def command(tool: str) -> list[str]:
    """Return the words that start a tool as this process was started."""
    if size() == 1:
        return spoken(tool)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", size()))
    nodes = ["--nnodes", str(size() // local)] if size() > local else []
    return by_torchrun(tool, "--nproc_per_node", str(local), *nodes)


def by_torchrun(tool: str, *flags: str) -> list[str]:
    """Return the words that start several processes of a tool."""
    words = spoken(tool)
    return [
        "torchrun",
        *flags,
        *(words[1:] if words[1] == "-m" or words[1].endswith(".py") else ["--no-python", *words]),
    ]


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


@contextlib.contextmanager
def planned(processes: int) -> Iterator[None]:
    """Let what is checked in the block be checked for a run of so many processes, which are still to be started."""
    global _here
    before, _here = _here, _here._replace(size=processes)
    try:
        yield
    finally:
        _here = before


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
    """End this process GRACE seconds after a signal has asked for it, or LAST_WORDS later if it is about to end.

    Python sees no signal while it waits for a GPU, which may wait for a process that is gone. One that has seen it may
    need a while on a busy machine, to look at the checkpoint and to end its loader's processes.
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
                if is_interrupted():
                    time.sleep(LAST_WORDS)
                os._exit(128 + number[0])
        os.close(reader)

    threading.Thread(target=watch, daemon=True).start()
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)
