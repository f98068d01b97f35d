"""The tasks of a Slurm job that train a run together: the first one has the run's crew, the others do as it says.

Each task has one process of the run, as a torchrun on its node would have. In a store the first task says when a
process is to be started, how, and at which port the processes meet. A task whose process fails says so there, and the
others end theirs.
"""

import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import IO, Any

from torch.distributed import TCPStore

from ...distributed import process_group
from ...errors import UserError
from ..shared import cores, ending
from ..table import Run
from .runs import Crew, begin, end

LOOK = 0.5
"""Seconds between two looks at a process and at the store."""


class Tasks:
    """What the tasks of this job tell each other.

    worker, code: as Crew has them. environment: submitit's, of torch.distributed. crew: makes the first task's crew.
    """

    def __init__(self, worker: Sequence[str], code: str, environment: Any, store: TCPStore) -> None:
        self.worker, self.code, self.store = worker, code, store
        self.rank, self.size, self.local_size = environment.rank, environment.world_size, environment.local_world_size
        self.tries = 0
        self.crew: Callable[..., Crew] = partial(FirstCrew, tasks=self)

    @property
    def first(self) -> bool:
        """Whether this task decides."""
        return not self.rank

    def say(self, how: str | None) -> int:
        """Tell the others how the next process is to be started, None for no more; returns the port to meet at."""
        with socket.socket() as free:
            free.bind(("", 0))
            port = int(free.getsockname()[1])
        self.tries += 1
        self.store.set(f"try {self.tries}", json.dumps(how and [how, port]))
        return port

    def hear(self) -> Any:
        """Wait for what the first task says next: how and the port; None if nothing more comes."""
        self.tries += 1
        key = f"try {self.tries}"
        try:
            while not self.store.check([key]):
                time.sleep(LOOK)
            told = json.loads(self.store.get(key))
            if told is None:
                self.store.add("ended", 1)
            return told
        except RuntimeError:  # the first task has ended, and the store with it
            return None

    def end(self) -> None:
        """Tell the others that nothing more comes, and wait a moment until they have heard it."""
        self.say(None)
        late = time.monotonic() + process_group.GRACE
        while self.store.add("ended", 0) < self.size - 1 and time.monotonic() < late:
            time.sleep(LOOK / 10)

    def environment(self, port: int) -> dict[str, str]:
        """Make the environment of this task's process; each sees all GPUs of its node, and takes one by LOCAL_RANK."""
        threads = os.environ.get("SLURM_CPUS_PER_TASK") or str(max(1, cores() // self.local_size))
        return {"OMP_NUM_THREADS": threads, **os.environ, "PYTHONUNBUFFERED": "1", "MASTER_PORT": str(port)}

    def wait(self, process: subprocess.Popen[bytes]) -> int:
        """Wait for the end of this task's process; returns its exit code.

        One that has not seen in time that another has failed is ended, and that is 1.
        """
        late = None
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(LOOK)
            if late is None and self.has_failed():
                late = time.monotonic() + process_group.GRACE
            if late is not None and time.monotonic() > late:
                end([process])
                return 1

    def has_failed(self) -> bool:
        """Tell whether another task's process has failed, or the first task is gone."""
        try:
            return bool(self.store.check([f"failed {self.tries}"]))
        except RuntimeError:
            return True

    def first_failure(self, code: int) -> int:
        """Tell the others that this task's process has failed; returns the code of the one that did so first."""
        if self.first:
            time.sleep(LOOK)  # if it saw that another has gone, that one comes first
        return int(self.store.compare_set(f"failed {self.tries}", "", str(code)))

    def follow(self, run: Run) -> None:
        """Start processes as the first task says, until nothing more comes."""
        while (told := self.hear()) is not None:
            how, port = told
            run.folder.mkdir(parents=True, exist_ok=True)  # it is there, but other nodes may see that late
            with open(run.folder / "log.txt", "ab") as log:
                environment = self.environment(port)
                process = begin(self.worker, 1, self.code, run, how, subprocess.DEVNULL, log, environment)
                try:
                    code = self.wait(process)
                finally:
                    if process.poll() is None:
                        end([process])
                if code < 0:
                    log.write(f"deepkd: process {self.rank} of {self.size} was {ending(code)}\n".encode())
            if code:
                with contextlib.suppress(RuntimeError):
                    self.first_failure(code)


@dataclass
class FirstCrew(Crew):
    """The crew of a job's first task: it starts the run's first process, and has the other tasks start theirs."""

    tasks: Tasks = field(kw_only=True)

    def command(self, tool: str) -> list[str]:
        nodes, each = self.tasks.size // self.tasks.local_size, self.tasks.local_size
        return process_group.by_torchrun(tool, "--nnodes", str(nodes), "--nproc_per_node", str(each))

    def begin(self, run: Run, how: str, lock: int, log: IO[bytes], slot: int) -> subprocess.Popen[bytes]:
        environment = self.tasks.environment(self.tasks.say(how))
        return begin(self.worker, 1, self.code, run, how, lock, log, environment)

    def wait(self, process: subprocess.Popen[bytes], run: Run) -> int:
        code = self.tasks.wait(process)
        return code and self.tasks.first_failure(code)


@contextlib.contextmanager
def joined(worker: Sequence[str], code: str) -> Iterator[Tasks]:
    """Meet the other tasks of this job, by what submitit knows of them. Raises UserError if they do not come."""
    from submitit.helpers import TorchDistributedEnvironment

    environment = TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    host, port, first = environment.master_addr, environment.master_port, environment.rank == 0
    try:
        # it waits for all, lest the first be gone before another has come
        store = TCPStore(host, port, environment.world_size, first, process_group.PATIENCE)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"Slurm: the tasks of this job cannot meet at {host}:{port} ({reason})") from None
    tasks = Tasks(worker, code, environment, store)
    try:
        yield tasks
    finally:
        if first:
            tasks.end()
