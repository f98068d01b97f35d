"""The process of one run, which runs.execute starts."""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from ...errors import UserError
from ...hosts.registry import find_host
from ...run import record
from ...run.lock import keep
from ...terminal import guarded
from ..kinds import KINDS
from ..kinds.kind import Kind


def main(argv: Sequence[str]) -> int:
    """Train under the run's lock, for as long as the parent lives: LOCK PARENT CODE CONFIG KIND --cfg FILE HOW ….

    LOCK: the lock's descriptor, inherited. PARENT: the id of the process that waits for this one. CODE, CONFIG:
    the hashes that the run was planned with. KIND: of KINDS. HOW: --resume or --overwrite; KEY VALUE pairs follow.
    Returns the exit code of the kind's tool.
    """
    lock, parent, code, planned, name, *words = argv
    keep(int(lock))
    end_with(int(parent))
    kind = KINDS[name]
    _, file, how, *options = words
    return guarded(lambda: check(code, planned, kind, words)) or kind.train(file, how == "--resume", options)


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


def end_with(parent: int) -> None:
    """Let the kernel end this process when the thread that started it is gone, killed or not; Linux only."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)
