"""The runs of a table as processes: what is left of each on disk, N of them side by side, what failed."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ... import device
from ...errors import UserError
from ...run import checkpoint, record
from ..kinds import KINDS
from ..shared import cores, threads
from .display import Display

if TYPE_CHECKING:
    from ..table import Run

State = Literal["finished", "resumable", "new"]

IMPORT = "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); from deepkd_plugin.study.reproduce import worker"
"""`python -m` would put the current folder first, and may find another package or mdistiller there than we did."""

WORKER = (sys.executable, "-c", f"{IMPORT}; sys.exit(worker.main(sys.argv[1:]))", json.dumps(sys.path))
"""What trains a run: a command that is given its lock's descriptor, our process id, the hashes of code and config,
the run's kind, and --cfg FILE, --resume or --overwrite, KEY VALUE …."""

PATIENCE = 10.0
"""Seconds for which a lock is waited for: processes of a killed command need a moment to end."""

GRACE = 30.0
"""Seconds that an interrupted process is given to end by itself, which it does after its current step."""

TAIL = 10
"""Lines of a log that a failure shows."""


class HeldError(UserError):
    """Another process is at work in a folder."""


class OtherCodeError(UserError):
    """A run was made by other code than this, or with another teacher: its numbers do not belong beside ours."""


@dataclass(frozen=True)
class Failure:
    """A run that was given up: its last exit code (negative: a signal's number) and the end of its log."""

    run: Run
    code: int
    attempts: int
    lines: tuple[str, ...] = ()

    def __str__(self) -> str:
        times = "once" if self.attempts == 1 else f"{self.attempts} times"
        end = "".join(f"\n    {line}" for line in self.lines)
        return (
            f"{self.run.name} failed {times} ({ending(self.code)}), log {self.run.folder / 'log.txt'}:{end}"
        )


def ending(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return f"killed by {signal.Signals(-code).name}"
    return f"killed by signal {-code}"


def state(run: Run, overwrite: bool = False, code: str | None = None) -> State:
    """What is left of a run on disk: its result, a checkpoint to go on from, or nothing of use.

    Raises OtherCodeError, a UserError, for a result or a checkpoint of other code than `code`, by default
    record.code_hash(), whose numbers must not share a cell with ours, and for those of another config or teacher.
    overwrite: such a run is "new".
    """
    try:
        held = json.loads((run.folder / "run.json").read_text())
    except (OSError, ValueError):
        return "new"
    if not isinstance(held, dict):
        return "new"
    if not held.get("finished") and not (run.folder / KINDS[run.kind].checkpoint).is_file():
        return "new"
    code = code or record.code_hash()
    codes = {held.get("code"), *(session.get("code") for session in held.get("resumed", []))}
    if codes != {code}:
        others = ", ".join(sorted(str(other or "an older version") for other in codes - {code}))
        mixes = f"was made by other code ({others}; now {code})"
    elif held.get("config_hash") != run.hash:
        mixes = f"was made under another config ({held.get('config_hash')}; planned {run.hash})"
    elif run.teacher is not None and held.get("teacher") != run.teacher:
        mixes = f"was taught by another teacher (its weights were {held.get('teacher')}, now {run.teacher})"
    else:
        return "finished" if held.get("finished") else "resumable"
    if overwrite:
        return "new"
    raise OtherCodeError(
        f"{run.folder}: the run there {mixes}, and a table must not mix them; give another --out, or "
        f"--overwrite, which makes such runs anew"
    )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Be the only process in a folder, made if needed, as its file `lock` tells; HeldError where another one is.

    The lock goes with the process, however that ends.
    """
    _make(folder)
    lock = _lock(folder)
    try:
        _sign(lock, os.getpid())
        yield
    finally:
        os.close(lock)


def execute(
    runs: Sequence[Run],
    jobs: int,
    *,
    overwrite: bool = False,
    display: Display | None = None,
    attempts: int = 3,
    worker: Sequence[str] = WORKER,
) -> list[Failure]:
    """Train the runs that are not finished, `jobs` processes side by side; returns those that were given up.

    Each process writes to its run's log.txt and holds its run's lock. One that fails is tried again, from its
    checkpoint and after the others, `attempts` times in all; exit code 2, a mistake of the user, is final.
    Threads and GPUs are shared out, one GPU to each run: on several it would be another computation. An
    interruption ends the processes and then goes on; another call goes on where they were.

    overwrite: runs that other code made are made anew. Raises UserError, before anything is started, where a
    run was made by other code (OtherCodeError) or is being trained by another process (HeldError).
    """
    code = record.code_hash()
    states = [state(run, overwrite, code) for run in runs]
    todo = [run for run, held in zip(runs, states) if held != "finished"]
    deadline = time.monotonic() + PATIENCE
    for run in todo:
        if run.folder.is_dir():
            os.close(_lock(run.folder, deadline))
    pool = _Pool(jobs, min(jobs, len(todo)), overwrite, code, worker)
    display = display or Display()
    failures = []
    waiting = deque((run, 1) for run in todo)
    try:
        display.begin(todo, len(runs) - len(todo))
        while waiting or pool.active:
            while waiting and pool.free:
                run, attempt = waiting.popleft()
                try:
                    before = pool.start(run, attempt)
                except UserError as error:  # something changed since the command began
                    failures.append(Failure(run, 2, attempt, (str(error),)))
                    display.failed(run, str(error), again=False)
                    continue
                if before == "finished":
                    display.finished(run)
                else:
                    display.started(run, resumed=before == "resumable")
            for task in pool.ended():
                number = task.process.returncode
                lines = task.last_lines()
                if number == 0:
                    try:
                        if state(task.run, False, code) == "finished":
                            display.finished(task.run)
                            continue
                    except OtherCodeError as error:
                        lines = (str(error),)
                again = number != 2 and task.attempt < attempts
                if again:
                    waiting.append((task.run, task.attempt + 1))
                else:
                    failures.append(Failure(task.run, number, task.attempt, lines))
                tries = f"{ending(number)}, try {task.attempt} of {attempts}"
                display.failed(task.run, ": ".join((tries, *lines[-1:])), again)
            display.refresh()
            time.sleep(0.1 if pool.active else 0)
    finally:
        try:
            pool.stop()  # whatever ended the loop, no process may be left behind
        finally:
            display.close()
    return failures


@dataclass
class _Task:
    run: Run
    attempt: int
    slot: int
    process: subprocess.Popen[bytes]
    log_start: int

    def last_lines(self) -> tuple[str, ...]:
        """The end of what this attempt wrote."""
        with open(self.run.folder / "log.txt", "rb") as log:
            log.seek(max(self.log_start, log.seek(0, os.SEEK_END) - 20_000))
            lines = log.read().decode(errors="replace").splitlines()
        return tuple(line for line in lines if line.strip())[-TAIL:]


class _Pool:
    """The processes that are at work, each in a slot that has its share of the machine."""

    def __init__(
        self, slots: int, side_by_side: int, overwrite: bool, code: str, worker: Sequence[str]
    ) -> None:
        self.free = list(range(slots))
        self.active: list[_Task] = []
        self.overwrite, self.code, self.worker = overwrite, code, worker
        self.threads = threads(side_by_side, cores())
        self.gpus = [str(index) for index in range(device.count())]
        if self.gpus and os.environ.get("CUDA_VISIBLE_DEVICES"):
            named = [name.strip() for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",")]
            self.gpus = named[: len(self.gpus)]  # CUDA stops at the first name that it does not know

    def environment(self, slot: int) -> dict[str, str]:
        """A process's: its number of threads, its GPU, and a log that is written as it goes."""
        ours = {"PYTHONUNBUFFERED": "1"}
        if self.gpus:
            ours["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        return {"OMP_NUM_THREADS": str(self.threads), **os.environ, **ours}

    def start(self, run: Run, attempt: int) -> State:
        """Start a run's process, unless it is finished by now; returns the state it was in.

        Raises UserError where it must not start.
        """
        _make(run.folder)
        lock = _lock(run.folder, time.monotonic() + (PATIENCE if attempt > 1 else 0.0))
        try:
            before = state(run, self.overwrite, self.code)
            if before == "finished":
                return "finished"
            kind, resume = KINDS[run.kind], before == "resumable"
            file, how = str(run.config), "--resume" if resume else "--overwrite"
            # a signal between the process's start and its entry here would leave it behind
            with checkpoint.uninterrupted(), open(run.folder / "log.txt", "ab") as log:
                command = shlex.join(["python", kind.tool, *kind.words(file, resume, run.options)])
                log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {command}\n".encode())
                log.flush()
                slot = self.free.pop(0)
                about = [str(lock), str(os.getpid()), self.code, run.hash, run.kind]
                process = subprocess.Popen(
                    [*self.worker, *about, "--cfg", file, how, *run.options],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=self.environment(slot),
                    pass_fds=(lock,),
                    start_new_session=True,  # Ctrl-C is for us; we tell it
                )
                self.active.append(_Task(run, attempt, slot, process, log.tell()))
                _sign(lock, process.pid)
            return before
        except OSError as error:  # a full disk, say: the other runs go on
            raise UserError(f"{run.folder}: its process cannot be started ({error})") from None
        finally:
            os.close(lock)  # the process has it, for as long as it lives

    def ended(self) -> list[_Task]:
        """The processes that came to an end since the last call; their slots are free again."""
        ended = [task for task in self.active if task.process.poll() is not None]
        for task in ended:
            self.active.remove(task)
            self.free.append(task.slot)
        return ended

    def stop(self) -> None:
        """End all processes: SIGTERM, and SIGKILL to their whole groups after a grace or a second Ctrl-C."""
        left = [task.process for task in self.active]
        deadline = time.monotonic() + GRACE
        try:
            for process in left:
                process.terminate()
            for process in left:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, deadline - time.monotonic()))
        finally:
            for process in left:
                if process.poll() is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            self.active.clear()


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: must be a folder that can be written ({error.strerror})") from None


def _lock(folder: Path, deadline: float = 0.0) -> int:
    """The descriptor of a folder's lock, which lives until every copy of it is closed.

    Raises HeldError where another process has it and keeps it until the deadline (time.monotonic).
    """
    path = folder / "lock"
    lock = -1
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return lock
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise HeldError(
                        f"{folder}: {_holder(lock)} is at work there; call again when it has ended"
                    ) from None
            time.sleep(0.1)
    except BaseException as error:
        if lock >= 0:
            os.close(lock)
        if isinstance(error, OSError):
            raise UserError(f"{path}: must be a file that can be locked ({error.strerror})") from None
        raise


def _sign(lock: int, pid: int) -> None:
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"process {pid} on {socket.gethostname()}\n".encode(), 0)


def _holder(lock: int) -> str:
    return os.pread(lock, 200, 0).decode(errors="replace").strip() or "another process"
