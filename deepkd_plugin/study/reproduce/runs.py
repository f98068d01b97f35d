"""The runs of a table as processes: what is left of each on disk, N of them side by side, what failed."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

from ... import device
from ...distributed import process_group
from ...errors import UserError
from ...run import checkpoint, record
from ...run import folder as run_folder
from ...run.lock import locked, sign
from ...run.metrics import check_lines
from ...terminal import spoken
from ..kinds import KINDS
from ..shared import cores, ending, threads
from ..table import Run
from .display import Display

State = Literal["finished", "resumable", "new"]

IMPORT = "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); from deepkd_plugin.study.reproduce import worker"
"""`python -m` would put the current folder first, and may find another package or mdistiller there than we did."""

WORKER = (sys.executable, "-c", f"{IMPORT}; sys.exit(worker.main(sys.argv[1:]))", json.dumps(sys.path))
"""What trains a run: a command that is given our process id, the number of processes, the hashes of code and config,
the run's kind, and --cfg FILE, --resume or --overwrite, KEY VALUE …; its stdin is the run's lock."""

PATIENCE = 10.0
"""Seconds for which a lock is waited for: processes of a killed command need a moment to end."""

GRACE = 30.0
"""Seconds that an interrupted process is given to end by itself, which it does after its current step."""

TAIL = 10
"""Lines of a log that a failure shows."""

ECHO = re.compile(r"deepkd: (interrupted|another process of this run has ended)")
"""What a process says that was ended because another one of its run had failed, which has said why."""


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
        return f"{self.run.name} failed {times} ({ending(self.code)}), log {self.run.folder / 'log.txt'}:{end}"


def state(run: Run, overwrite: bool = False, code: str | None = None) -> State:
    """Tell what is left of a run on disk: its result, a checkpoint to go on from, or nothing of use.

    Raises OtherCodeError, a UserError, for a result or a checkpoint of other code than `code`, by default
    record.code_hash(), whose numbers must not share a cell with ours, and for those of another config or teacher.
    overwrite: such a run is "new", and so is one whose checkpoint or record is damaged. Raises UserError for
    a checkpoint that no run.json vouches for.
    """
    left, goes_on = run_folder.left(run.folder, KINDS[run.kind].checkpoint)
    finished = left.get("finished")
    if goes_on and not left:
        raise UserError(
            f"{run.folder}: holds a checkpoint, and its {record.FILE} is empty or missing; put that back, or move the "
            f"folder away, so that the run can be made anew"
        )
    if not finished and not goes_on:
        return "new"
    code = code or record.code_hash()
    codes = {left.get("code"), *(session.get("code") for session in left.get("resumed", []))}
    if codes != {code}:
        others = ", ".join(sorted(str(other or "an older version") for other in codes - {code}))
        mixes = f"was made by other code ({others}; now {code})"
    elif left.get("config_hash") != run.hash:
        mixes = f"was made under another config ({left.get('config_hash')}; planned {run.hash})"
    elif changed := [key for session in left.get("resumed", []) for key in session.get("changed", ())]:
        mixes = f"went on under another config ({', '.join(changed)})"
    elif run.teacher is not None and left.get("teacher") != run.teacher:
        mixes = f"was taught by another teacher (its weights were {left.get('teacher')}, now {run.teacher})"
    elif finished:
        return "finished"
    else:
        latest = run.folder / KINDS[run.kind].checkpoint
        ours = KINDS[run.kind].checkpoint == run_folder.CHECKPOINTS[0]  # detectron2's names another file
        return "new" if overwrite and ours and not _is_whole(latest) else "resumable"
    if overwrite:
        return "new"
    raise OtherCodeError(
        f"{run.folder}: the run there {mixes}, and a table must not mix them; give another --out, or "
        f"--overwrite, which makes such runs anew"
    )


def _is_whole(latest: Path) -> bool:
    """Tell whether --resume can read a checkpoint, and the record of its epochs beside it."""
    try:
        check_lines(latest.parent, checkpoint.load(latest, "--resume")["epoch"])
    except (UserError, KeyError, TypeError, IndexError):
        return False
    return True


def execute(
    runs: Sequence[Run],
    jobs: int,
    *,
    overwrite: bool = False,
    display: Display | None = None,
    attempts: int = 3,
    worker: Sequence[str] = WORKER,
    together: int = 1,
    make_crew: Callable[..., "Crew"] | None = None,
) -> list[Failure]:
    """Train the runs that are not finished, `jobs` of them side by side; returns those that were given up.

    Each run's process writes to its log.txt and holds its lock. One that fails is tried again, from its
    checkpoint and after the others, `attempts` times in all; exit code 2, a mistake of the user, is final.
    together: how many processes train a run; torchrun, in the run's process, starts and ends them. Threads and GPUs
    are shared out, one GPU to each of them. An interruption ends the processes and then goes on; another call goes on
    where they were. make_crew: instead of Crew.

    overwrite: runs that other code made are made anew. Raises UserError, before anything is started, if a run was
    made by other code (OtherCodeError) or is being trained by another process (HeldError).
    """
    code = record.code_hash()
    todo = [run for run in runs if state(run, overwrite, code) != "finished"]
    deadline = time.monotonic() + PATIENCE
    for run in todo:
        if run.folder.is_dir():
            with locked(run.folder, deadline):
                pass
    display = display or Display(sys.stdout)
    crew = (make_crew or Crew)(todo, min(jobs, len(todo)), overwrite, code, display, attempts, worker, together)
    try:
        display.begin(todo, len(runs) - len(todo))
        crew.work()
    finally:
        display.close()
    return crew.failures


@dataclass
class Crew:
    """Threads that take one run after another, each with its share of the machine, and train it in a process.

    A process is waited for by the thread that started it: if that is gone the kernel ends it (worker.end_with).
    lock: held while a process is started, and while the display is told. What runs there are, and what becomes of
    one, is in take, wait, ended, finished and failed.
    """

    runs: Sequence[Run]
    size: int
    overwrite: bool
    code: str
    display: Display
    attempts: int
    worker: Sequence[str]
    together: int = 1
    """Processes that train one run."""
    failures: list[Failure] = field(default_factory=list)
    processes: set[subprocess.Popen[bytes]] = field(default_factory=set)
    stopping: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.waiting = deque((run, 1) for run in self.runs)
        self.gpus = [str(index) for index in range(device.count())]
        if self.gpus and os.environ.get("CUDA_VISIBLE_DEVICES"):
            named = [name.strip() for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",")]
            self.gpus = named[: len(self.gpus)]  # CUDA stops at the first name that it does not know

    def work(self) -> None:
        """Train all runs. Whatever ends this, no process is left behind."""
        with ThreadPoolExecutor(max(self.size, 1)) as pool:
            try:
                for future in as_completed([pool.submit(self.train_runs, slot) for slot in range(self.size)]):
                    future.result()
            finally:
                self.stop()

    def train_runs(self, slot: int) -> None:
        """Train runs until none waits."""
        while not self.stopping and (taken := self.take()):
            self.train_run(*taken, slot)

    def take(self) -> tuple[Run, int] | None:
        """Take the next run, with the number of this try; None if none waits."""
        try:
            return self.waiting.popleft()
        except IndexError:
            return None

    def wait(self, process: subprocess.Popen[bytes], run: Run) -> int:
        """Wait for the end of a run's process; returns its exit code."""
        return process.wait()

    def train_run(self, run: Run, attempt: int, slot: int) -> None:
        """Train a run. If that fails it waits again, behind the others, as long as it has attempts left."""
        try:
            started = self.start(run, attempt, slot)
        except (UserError, OSError) as error:  # something changed since the command began, or a disk is full, say
            cannot = f"{run.folder}: its process cannot be started ({error})"
            why = str(error) if isinstance(error, UserError) else cannot
            self.failed(Failure(run, 2, attempt, (why,)), why)
            return
        if started is None:
            return
        process, log_start = started
        code = self.wait(process, run)
        self.processes.discard(process)
        if not self.stopping:
            self.ended(run, code, attempt, _last_lines(run.folder / "log.txt", log_start))

    def ended(self, run: Run, code: int, attempt: int, lines: tuple[str, ...]) -> None:
        """Tell what became of a run whose process has ended, with the last lines of its log."""
        if code == 0:
            try:
                if state(run, False, self.code) == "finished":
                    self.finished(run)
                    return
            except OtherCodeError as error:
                lines = (str(error),)
        said = [line for line in lines if not ECHO.match(line)] or lines
        why = ": ".join((f"{ending(code)}, try {attempt} of {self.attempts}", *said[-1:]))
        self.failed(Failure(run, code, attempt, lines), why, code != 2 and attempt < self.attempts)

    def finished(self, run: Run) -> None:
        with self.lock:
            self.display.finished(run)

    def failed(self, failure: Failure, why: str, again: bool = False) -> None:
        if again:
            self.waiting.append((failure.run, failure.attempts + 1))
        else:
            self.failures.append(failure)
        with self.lock:
            self.display.failed(failure.run, why, again)

    def start(self, run: Run, attempt: int, slot: int) -> tuple[subprocess.Popen[bytes], int] | None:
        """Start a run's process; returns it and where its part of the log begins.

        Returns None if the run is finished by now. Raises UserError or OSError if it cannot start.
        """
        # the process has the lock, too, for as long as it lives
        with locked(run.folder, time.monotonic() + (PATIENCE if attempt > 1 else 0.0)) as lock:
            run_folder.settle(run.folder)
            before = state(run, self.overwrite, self.code)
            if before == "finished":
                self.finished(run)
                return None
            kind, resume = KINDS[run.kind], before == "resumable"
            how = "--resume" if resume else "--overwrite"
            words = kind.words(str(run.config), resume, run.options)
            with self.lock, open(run.folder / "log.txt", "ab") as log:
                if self.stopping:
                    return None
                command = shlex.join([*self.command(kind.tool), *words])
                log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {command}\n".encode(errors="surrogateescape"))
                log.flush()
                log_start = log.tell()  # which moves with what the process writes
                process = self.begin(run, how, lock, log, slot)
                self.processes.add(process)
                self.display.started(run, resume)
                with contextlib.suppress(OSError):
                    sign(lock, process.pid)
                return process, log_start

    def command(self, tool: str) -> list[str]:
        """Return the words that start a tool as a run's process does."""
        if self.together == 1:
            return spoken(tool)
        return process_group.by_torchrun(tool, "--standalone", "--nproc_per_node", str(self.together))

    def begin(self, run: Run, how: str, lock: int, log: IO[bytes], slot: int) -> subprocess.Popen[bytes]:
        """Start a run's process."""
        return begin(self.worker, self.together, self.code, run, how, lock, log, self.environment(slot))

    def environment(self, slot: int) -> dict[str, str]:
        """Make a process's environment: its number of threads, its GPUs, and a log that is written as it goes."""
        ours = {"PYTHONUNBUFFERED": "1"}
        if self.gpus:
            first = slot % max(1, len(self.gpus) // self.together) * self.together
            ours["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus[first : first + self.together])
        return {"OMP_NUM_THREADS": str(threads(self.size * self.together, cores())), **os.environ, **ours}

    def stop(self) -> None:
        """End all processes."""
        self.stopping = True
        try:
            with self.lock:  # none is being started
                pass
        finally:
            end(list(self.processes))


def begin(
    worker: Sequence[str],
    together: int,
    code: str,
    run: Run,
    how: str,
    stdin: int,
    log: IO[bytes],
    environment: Mapping[str, str],
) -> subprocess.Popen[bytes]:
    """Start the process of a run; stdin: its lock, which torchrun hands on to others by this way only."""
    return subprocess.Popen(
        [
            *worker,
            str(os.getpid()),
            str(together),
            code,
            run.hash,
            run.kind,
            "--cfg",
            str(run.config),
            how,
            *run.options,
        ],
        stdin=stdin,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,  # Ctrl-C is for us; we tell it
    )


def end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End runs' processes: SIGTERM, and SIGKILL to their whole groups after a grace or a second Ctrl-C.

    Those that a killed one has started end with it (worker.end_with).
    """
    deadline = time.monotonic() + GRACE
    try:
        for process in processes:
            process.terminate()
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
    finally:
        for process in processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _last_lines(log: Path, start: int) -> tuple[str, ...]:
    """Read the end of what was written to a log from a place on."""
    with open(log, "rb") as file:
        file.seek(max(start, file.seek(0, os.SEEK_END) - 20_000))
        lines = file.read().decode(errors="replace").splitlines()
    return tuple(line for line in lines if line.strip())[-TAIL:]
