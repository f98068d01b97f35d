"""The lock on a folder: one process at a time is at work in it, whoever started it."""

import contextlib
import errno
import fcntl
import os
import re
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import UserError

FILE = "lock"
"""The file in a folder that is locked. One that a killed process leaves says nothing."""


_SIGNED = re.compile(rb"(process \d+ on .*\n)?")
"""What `sign` leaves in a lock's file. One that holds anything else is somebody's."""


class HeldError(UserError):
    """Another process is at work in a folder."""


_held: dict[tuple[int, int], int] = {}
"""What this process has locked: (device, inode) of the lock's file -> the descriptor."""


@contextlib.contextmanager
def locked(folder: Path, deadline: float = 0.0, remove: bool = False) -> Iterator[int]:
    """Be the only process in a folder, made if needed, as its file `lock` tells; yields that file's descriptor.

    The lock is kept until every copy of the descriptor is closed: it goes with the process, however that ends. If the
    folder then holds nothing else, the file is removed, with the folders that were made for it. remove: in any case;
    then no other process may have a copy of the descriptor. Raises HeldError if
    another process has the lock and keeps it until the deadline (time.monotonic), UserError if there can be none, and
    OSError if too many files are open.
    """
    made: list[Path] = []
    try:
        made += [above for above in (folder, *folder.parents) if not above.exists()]
        lock = _take(folder, deadline)
    except OSError as error:  # a name of many options is longer than a file system takes
        _unmake(made)
        if error.errno == errno.ENAMETOOLONG:
            raise UserError(f"{folder}: EXPERIMENT.NAME must be set to a shorter name ({error.strerror})") from None
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        path = folder / FILE
        if str(error.filename) == str(path):
            raise UserError(f"{path}: must be a file that can be locked ({error.strerror})") from None
        raise UserError(
            f"{folder}: must be a folder that can be written; LOG.PREFIX, --out or --to names it ({error.strerror})"
        ) from None
    try:
        keep(lock)
        with contextlib.suppress(OSError):  # it is only for a message
            sign(lock, os.getpid())
        yield lock
    finally:
        _held.pop(_identity(lock), None)
        with contextlib.suppress(OSError):
            alone = os.listdir(folder) == [FILE]
            if alone or remove:
                (folder / FILE).unlink()
            _unmake(made if alone else ())
        os.close(lock)


@contextlib.contextmanager
def ours(folder: Path) -> Iterator[None]:
    """Be the only process in a folder, as `locked`, unless this process is so already."""
    with contextlib.nullcontext() if _has(folder) else locked(folder, remove=True):
        yield


def _unmake(folders: Iterable[Path]) -> None:
    """Remove folders that are empty; of a path with "..", one may be another that is not."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _has(folder: Path) -> bool:
    """Tell whether this process has a folder's lock."""
    try:
        return _identity(folder / FILE) in _held
    except OSError:
        return False


def keep(lock: int) -> None:
    """Hold a lock, taken or inherited, in this process only: a loader's workers may outlive it for a while."""
    os.set_inheritable(lock, False)
    _held[_identity(lock)] = lock


def sign(lock: int, pid: int) -> None:
    """Say in a lock which process has it."""
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"process {pid} on {socket.gethostname()}\n".encode(), 0)


def _take(folder: Path, deadline: float) -> int:
    """Open and lock a folder's file; returns its descriptor."""
    path = folder / FILE
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # whoever had it may have removed the file, and somebody else has made another
            if _identity(lock) == _identity(path):
                if not _SIGNED.fullmatch(os.pread(lock, 400, 0)):
                    raise OSError(errno.EEXIST, "it holds something else than a lock's process", str(path))
                return lock
            os.close(lock)
        except FileNotFoundError:
            os.close(lock)
        except BlockingIOError:
            holder = os.pread(lock, 200, 0).decode(errors="replace").strip() or "another process"
            os.close(lock)
            if time.monotonic() >= deadline:
                raise HeldError(f"{folder}: {holder} is at work there; call again when it has ended") from None
            time.sleep(0.1)
        except OSError as error:
            os.close(lock)
            raise OSError(error.errno, error.strerror, str(path)) from None


def _identity(file: int | Path) -> tuple[int, int]:
    status = os.stat(file)
    return status.st_dev, status.st_ino


def _forget() -> None:
    """Let go, in a child of a fork, of what its parent holds."""
    for lock in _held.values():
        os.close(lock)
    _held.clear()


os.register_at_fork(after_in_child=_forget)
