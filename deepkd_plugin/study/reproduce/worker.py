"""The process of one run, which runs.begin starts, and by it those that train the run together."""

import ctypes
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ...distributed import process_group
from ...errors import UserError
from ...hosts.registry import find_host
from ...run import record
from ...run.lock import keep
from ...terminal import guarded
from ..kinds import KINDS
from ..kinds.kind import Kind
from ..shared import ending


def main(argv: Sequence[str]) -> int:
    """Train under the run's lock, for as long as the parent lives: PARENT PROCESSES CODE CONFIG KIND --cfg FILE HOW ….

    stdin is the lock. PARENT: the id of the process that waits for this one. PROCESSES: how many this one is to start,
    to train the run together; 1 if it trains itself, alone or as one of several. CODE, CONFIG: the hashes that the run
    was planned with. KIND: of KINDS. HOW: --resume or --overwrite; KEY VALUE pairs follow. Returns the exit code of the
    kind's tool.
    """
    parent, processes, code, planned, name, *words = argv
    kind = KINDS[name]
    if int(processes) > 1:
        end_with(int(parent), signal.SIGTERM)
        return guarded(lambda: check(code, planned, kind, words)) or lead(int(processes), argv)
    take_lock()
    # torchrun ends its processes, unless it is killed
    end_with(int(parent), signal.SIGKILL if process_group.launcher() else signal.SIGTERM)
    _, file, how, *options = words
    return guarded(lambda: check(code, planned, kind, words)) or kind.train(file, how == "--resume", options)


def lead(processes: int, argv: Sequence[str]) -> int:
    """Start processes like this one by torchrun; returns the exit code of the first that fails, 0 if none does.

    The last line is of a process that was killed, or else what a process said.
    """
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.ERROR)  # the processes say themselves why they end
    words = [sys.executable, *sys.orig_argv[1 : -len(argv)], str(os.getpid()), "1", *argv[2:]]
    with tempfile.TemporaryDirectory(prefix="deepkd-") as folder:
        # these flags would else be read from the environment
        flags = ["--standalone", "--nnodes", "1", "--max-restarts", "0", "--nproc-per-node", str(processes)]
        flags += ["--log-dir", folder, "--no-python"]
        # torchrun replaces names behind a $
        given = torchrun.parse_args([*flags, *(word.replace("$", "$$") for word in words)])
        try:
            torchrun.run(given)
        except SignalException as interruption:
            return 128 + interruption.sigval
        except ChildFailedError as error:
            codes = [failure.exitcode for failure in error.failures.values()]
            # another may have ended by itself before torchrun saw that one was killed; SIGTERM is torchrun's own
            ends = error.failures.items()
            killed = ((rank, one) for rank, one in ends if one.exitcode < 0 and one.exitcode != -signal.SIGTERM)
            rank, first = next(killed, error.get_first_failure())
            if first.exitcode < 0:
                print(f"deepkd: process {rank} of {processes} was {ending(first.exitcode)}", file=sys.stderr)
                return 128 - first.exitcode
            return 2 if 2 in codes else first.exitcode
    return 0


def take_lock() -> None:
    """Hold the lock that stdin is; then there is nothing to read there."""
    keep(os.dup(0))
    nowhere = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nowhere, 0)
    os.close(nowhere)


def check(code: str, planned: str, kind: Kind, words: Sequence[str]) -> None:
    """Raise UserError if the run would not be the one that was planned, before it takes its time."""
    now = record.code_hash()
    if now != code:
        raise UserError(f"the package's code was changed since the table was started: it was {code}, is {now}")
    _, file, _, *options = words
    resolved = kind.hash(kind.read(Path(file), options))
    if resolved != planned:
        raise UserError(
            f"{file}: its config was changed since the table was started: its hash was {planned}, is {resolved} "
            f"on the host {find_host().name}"
        )


def end_with(parent: int, number: signal.Signals = signal.SIGTERM) -> None:
    """Let the kernel end this process when the thread that started it is gone, killed or not; Linux only.

    number: the signal that it gets.
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, number)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)
