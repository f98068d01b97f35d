"""Two processes of torch.distributed on this machine, for tests that compare them with one or kill them."""

import contextlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from deepkd_plugin.distributed import process_group
from deepkd_plugin.terminal import guarded

ROOT = Path(__file__).parents[1]


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


def job(
    work: Callable, folder: Path, meanwhile: Callable = lambda processes: None, seconds: float = 300.0
) -> tuple[list[int], list[str]]:
    """Run work() as a command in two processes of one run; returns their exit codes (< 0: a signal) and their output.

    work: found by its name, or a partial of such a function. meanwhile: called with the two processes as soon as both
    have joined each other. Fails if they do not end in `seconds` after that. They are forks of a process that has
    trained nothing: torch's threads for gradients, which this one may have started, do not survive a fork, and the
    first backward pass there would wait for them for good.
    """
    port = free_port()
    outputs, joined = ([folder / f"{name} {rank}" for rank in range(2)] for name in ("output", "joined"))
    for path in joined:
        path.unlink(missing_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["deepkd_plugin.launch"])
    processes = []
    for rank, paths in enumerate(zip(outputs, joined)):
        processes.append(context.Process(target=_command, args=(rank, port, work, *paths), daemon=True))
        processes[-1].start()
    try:
        wait_for(lambda: all(map(Path.exists, joined)) or not all(one.is_alive() for one in processes), seconds)
        meanwhile(processes)
        end = time.monotonic() + seconds
        for process in processes:
            process.join(max(end - time.monotonic(), 0))
        assert not any(process.is_alive() for process in processes), [path.read_text() for path in outputs]
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [process.exitcode for process in processes], [output.read_text(errors="replace") for output in outputs]


def _command(rank: int, port: int, work: Callable, output: Path, has_joined: Path) -> None:
    code = 99
    try:
        sys.stdout, sys.stderr = (open(output, "a", buffering=1) for _ in range(2))  # noqa: SIM115 (to the end)
        os.environ.update(WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank))
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))

        def joined() -> None:
            with process_group.joined():
                has_joined.touch()
                work()

        code = guarded(joined)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def free_port() -> int:
    """Find a port of this machine that nobody listens to."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def torchrun(words: Sequence[str], *flags: str, port: int | None = None) -> subprocess.Popen:
    """Start two processes of a tool by torchrun, from the repository's root; words: the tool's file and its words.

    port: of this machine, at which two torchruns of one process each meet, as they do on two machines.
    """
    job = ["--standalone", "--nproc_per_node", "2"]
    if port is not None:
        job = ["--nnodes", "2", "--nproc_per_node", "1"]
        job += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{port}"]
    command = [sys.executable, "-m", "torch.distributed.run", *job, *flags, *words]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def kill(launchers: Sequence[subprocess.Popen], rank: int) -> None:
    """Kill a process that one of these torchruns has started, by its number, with -9. Needs /proc."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent in [one.pid for one in launchers] and f"\0RANK={rank}\0" in "\0" + (path / "environ").read_text():
                os.kill(int(path.name), signal.SIGKILL)
                return
    raise AssertionError(f"torchrun has no process {rank}")


def alive(word: str) -> list[str]:
    """The commands of the processes, zombies aside, that have `word` in their words. Needs /proc."""
    commands = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (path / "cmdline").read_text(errors="replace")
            if word in words and int(path.name) != os.getpid():
                commands.append(words.replace("\0", " "))
    return commands


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
