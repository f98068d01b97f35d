"""How the commands end: one line for a mistake or an interruption, and the exit code that goes with it."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from .errors import UserError


class Parser(argparse.ArgumentParser):
    """Tells of a mistake in one line, as everything else does."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"command line: {message}; see {self.prog} --help")


def guarded(work: Callable[[], None]) -> int:
    """Run a command; a UserError becomes one line on stderr and exit code 2, an interruption 130 or 143."""
    try:
        with _terminable():
            work()
    except UserError as error:
        print(f"deepkd: error: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(f"deepkd: {stopped}", file=sys.stderr)
        return stopped.code
    except KeyboardInterrupt as interruption:
        print("deepkd: interrupted; the same command starts again", file=sys.stderr)
        return exit_code(interruption)
    return 0


class Stopped(Exception):  # noqa: N818 (no error: somebody wanted it)
    """Training was interrupted; the message says what is left of the run."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def exit_code(interruption: KeyboardInterrupt) -> int:
    """What shells expect of a process that a signal ended: 130 for Ctrl-C, 143 for SIGTERM (see _terminable)."""
    return interruption.args[0] if interruption.args else 130


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end a run as Ctrl-C does, with the exit code that shells expect of it."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
