"""Two processes of torch.distributed on this machine, for tests that compare them with one."""

import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from deepkd_plugin.distributed import process_group
from deepkd_plugin.terminal import guarded


def in_two_processes(work: Callable, folder: Path, *args: Any, one_run: bool = False) -> list[Any]:
    """What work(rank, *args) returns in each of two processes joined by gloo; files go to `folder`.

    one_run: they are processes of one run, as those that torchrun starts.
    """
    torch.multiprocessing.spawn(_process, (work, str(folder), args, one_run), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def _process(rank: int, work: Callable, folder: str, args: tuple, one_run: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    if one_run:
        os.environ.update(dict.fromkeys(("RANK", "LOCAL_RANK", *process_group.MEETING), str(rank)), WORLD_SIZE="2")
    with process_group.joined():
        torch.save(work(rank, *args), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
    # a thread of gloo that lets its last tensor go while Python shuts down ends the process with SIGABRT (seen with
    # torch 2.14, one process in some twenty), so Python does not shut down
    os._exit(0)


def as_process(monkeypatch: Any, rank: int, size: int = 2) -> None:
    """Let this process be one of several, as far as it is asked for its number."""
    monkeypatch.setattr(process_group, "_here", process_group._ALONE._replace(rank=rank, size=size))


def job(work: Callable, folder: Path, meanwhile: Callable = lambda pids: None) -> tuple[list[int], list[str]]:
    """Run work() as a command in two processes of one run; returns their exit codes (< 0: a signal) and their output.

    meanwhile: called with their ids as soon as they are started.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    outputs = [folder / f"output {rank}" for rank in range(2)]
    sys.stdout.flush()
    pids = [_fork(rank, port, work, output) for rank, output in enumerate(outputs)]
    meanwhile(pids)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    return codes, [output.read_text(errors="replace") for output in outputs]


def _fork(rank: int, port: int, work: Callable, output: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        end = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(end), "w", buffering=1) for _ in range(2))
        os.environ.update(WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank))
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))

        def joined() -> None:
            with process_group.joined():
                work()

        code = guarded(joined)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
