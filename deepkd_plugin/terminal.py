"""How the commands begin and end: their words, one line for a mistake or an interruption, and the exit code."""

import argparse
import contextlib
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from .errors import UserError

KEY = re.compile(r"[A-Za-z]\w*(\.[A-Za-z_]\w*)+")
"""A config key; no name of a table, pair or method is like it."""


class Parser(argparse.ArgumentParser):
    """Tells of a mistake in one line, as everything else does; its words may come in any order (parse)."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        # Python 3.14's own; the one of before takes -7.5e-2 for an option
        self._negative_number_matcher = re.compile(r"-\.?\d")

    def add_pairs(self) -> None:
        """Take the KEY VALUE pairs that stand anywhere between the flags, as `options`."""
        keys = "config keys, after the file's"
        self.add_argument("options", metavar="KEY VALUE", nargs="*", default=None, action="extend", help=keys)

    def parse(self, words: Sequence[str] | None = None) -> argparse.Namespace:
        return self.parse_intermixed_args(words)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"command line: {message}; see {self.prog} --help")


class UpToKey(argparse.Action):
    """Of a flag that takes several words: they end before the first KEY, which begins the KEY VALUE pairs."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        end = next((place for place, word in enumerate(values) if KEY.fullmatch(word)), len(values))
        if not end:
            raise argparse.ArgumentError(self, "expected at least one argument")
        setattr(namespace, self.dest, values[:end])
        if values[end:]:
            namespace.options = [*(getattr(namespace, "options", None) or ()), *values[end:]]


def count(text: str) -> int:
    """Read a number from 1 on, as argparse's type."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"is {text!r}; it must be a whole number from 1 on")
    return int(text)


def guarded(work: Callable[[], int | None]) -> int:
    """Run a command and return its exit code; a UserError is one line on stderr and 2, an interruption 130 or 143."""
    try:
        with _terminable():
            return work() or 0
    except UserError as error:
        print(f"deepkd: error: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(f"deepkd: {stopped}", file=sys.stderr)
        return stopped.code
    except KeyboardInterrupt as interruption:
        print("deepkd: interrupted; the same command starts again", file=sys.stderr)
        return exit_code(interruption)


class Stopped(Exception):  # noqa: N818 (no error: somebody wanted it)
    """Training was interrupted; the message says what is left of the run."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def exit_code(interruption: KeyboardInterrupt) -> int:
    """Return what shells expect of a process that a signal ended: 130 for Ctrl-C, 143 for SIGTERM (see _terminable)."""
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
