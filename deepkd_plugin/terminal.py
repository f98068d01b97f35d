"""How the commands begin and end: their words, one line for a mistake or an interruption, and the exit code."""

import argparse
import contextlib
import errno
import functools
import os
import re
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from difflib import get_close_matches
from importlib import import_module
from itertools import islice
from pathlib import Path
from textwrap import wrap
from typing import Any, NoReturn

from .errors import UserError, shown

KEY = re.compile(r"[A-Za-z]\w*(\.[A-Za-z_]\w*)+")
"""A config key; no name of a table, pair or method is like it."""


PAIR = re.compile(rf"(?P<key>{KEY.pattern})=(?P<value>.*)", re.DOTALL)
"""A config key and its value in one word."""


SCRIPTS = {
    "tools/train.py": "deepkd train",
    "tools/eval.py": "deepkd eval",
    "tools/train_detection.py": "deepkd detect",
    "tools/eval_detection.py": "deepkd detect-eval",
}
"""The scripts of a checkout of this package, and the commands that are the same."""


def nearest(word: str, names: Iterable[str]) -> str:
    """Return "; did you mean NAME?" of the name that is most like a word, in capitals or not; "" if none is."""
    known = {name.lower(): name for name in names}
    near = get_close_matches(word[:100].lower(), known, n=1)
    return f"; did you mean {known[near[0]]}?" if near else ""


class Parser(argparse.ArgumentParser):
    """Tells of a mistake in one line, as everything else does. examples: words behind the command, for its help."""

    takes_pairs = False

    def __init__(self, *args: Any, examples: Sequence[str] = (), **options: Any) -> None:
        # a flag that is cut short may be another one tomorrow
        super().__init__(*args, allow_abbrev=False, **options)
        self.register("type", Path, _path)
        self.examples = examples

    def format_help(self) -> str:
        command = shlex.join(spoken(self.prog))
        wrapped = [
            wrap(f"{command} {words}", 74, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
            for words in self.examples
        ]
        lines = [" \\\n  ".join(["  " + first, *rest]) for first, *rest in wrapped]
        return "\n".join([super().format_help(), "examples:", *lines, ""]) if lines else super().format_help()

    def add_pairs(self) -> None:
        """Take the KEY VALUE pairs, or KEY=VALUE, that stand anywhere between the flags, as `options`."""
        self.takes_pairs = True
        self.add_argument("options", metavar="KEY VALUE", nargs="*", default=[], help="config keys, after the file's")

    def add_run(self) -> None:
        """Take what training takes: --resume or --overwrite, and KEY VALUE pairs."""
        how = self.add_mutually_exclusive_group()
        how.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint")
        how.add_argument("--overwrite", action="store_true", help="start again over a run that is there")
        self.add_pairs()

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """Read the words, in any order; of two pairs with one KEY the later is the later in `options`.

        A KEY takes the next word, however that looks, and ends the words of a flag that takes several (but for
        names of files, which may look like one).
        """
        free: list[str] = []
        flags: list[str] = []
        pairs: list[str] = []
        flag: argparse.Action | None = None
        left = iter(words)
        for word in left:
            if word.startswith("-"):
                flags.append(word)
                flag = self._option_string_actions.get(word)
                if flag and flag.nargs is None:
                    flags += islice(left, 1)
            elif self.takes_pairs and (pair := PAIR.fullmatch(word)):
                pairs += pair.group("key", "value")
                flag = None
            elif self.takes_pairs and KEY.fullmatch(word) and not (flag and flag.nargs and flag.type is Path):
                pairs += [word, *islice(left, 1)]
                flag = None
            elif flag and flag.nargs == "+":
                flags.append(word)
            else:
                free.append(word)
        for name in (word.partition("=")[0] for word in flags if word.startswith("--")):
            if name not in self._option_string_actions:
                self.error(f"unrecognized arguments: {name[:100]}{self._meant(name)}")
        args = self.parse_args([*free, *flags])
        if self.takes_pairs:
            # what is neither is at the end, where a word without its value is told of
            args.options = [*pairs, *args.options]
        return args

    def _meant(self, flag: str) -> str:
        """Say what a flag that is none may mean: one that is written alike, or else a config key."""
        alike = nearest(flag, self._option_string_actions)
        word = flag[2:].replace("-", "_")
        if alike or not (self.takes_pairs and word.isidentifier()):
            return alike
        return f"; a config key goes without --, as SOLVER.SEED 1, and `deepkd keys {word[:100]}` looks for one"

    def parse_args(self, *args: Any, **options: Any) -> Any:  # typeshed's has overloads
        if _building:
            raise _Built(self)
        return super().parse_args(*args, **options)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += nearest(str(value), map(str, action.choices or ()))
            raise

    def error(self, message: str) -> NoReturn:
        raise UserError(f"command line: {message}; see {self.prog} --help")


def _path(text: str) -> Path:
    """Read a path: no shell expands the ~ of --flag=~/x and KEY=~/x, nor a config's."""
    return Path(os.path.expanduser(text))


_building: list[bool] = []


class _Built(Exception):  # noqa: N818 (no error: `built` asks for it)
    """Carries a command's parser out of it."""


def built(command: Callable[[], Any]) -> Parser:
    """Return the parser that a command makes, and do nothing else of the command."""
    _building.append(True)
    try:
        command()
    except _Built as end:
        parser: Parser = end.args[0]
        return parser
    finally:
        _building.pop()
    raise AssertionError("the command has parsed nothing")


def count(text: str) -> int:
    """Read a number from 1 to 10,000, as argparse's type: of seeds, of runs side by side, of classes."""
    if not (text.isdecimal() and len(text) <= 5 and 1 <= int(text) <= 10_000):
        raise argparse.ArgumentTypeError(f"is {shown(text)}; it must be a whole number from 1 to 10,000")
    return int(text)


def guarded(work: Callable[[], int | None]) -> int:
    """Run a command and return its exit code; a UserError is one line on stderr and 2, an interruption 130 or 143.

    What the system refuses (a full disk, too many open files, …) is one line and 2, too; a reader of stdout that has
    gone is 141, as for a process that SIGPIPE ends.
    """
    open_streams()
    try:
        with _terminable(), _quiet_threads():
            code = work() or 0
            sys.stdout.flush()
            return code
    except UserError as error:
        print(f"deepkd: error: {error}", file=sys.stderr)
        return 2
    except (OSError, RuntimeError) as error:
        reason = used_up(error)
        if reason is None:
            raise
        print(f"deepkd: error: {reason}", file=sys.stderr)
        return _end_of_pipe() if isinstance(error, BrokenPipeError) else 2
    except Stopped as stopped:
        if str(stopped):
            print(f"deepkd: {stopped}", file=sys.stderr)
        return stopped.code
    except KeyboardInterrupt as interruption:
        print("deepkd: interrupted; the same command starts again", file=sys.stderr)
        return exit_code(interruption)


@functools.cache
def warn(text: str) -> None:
    """Print a line on stderr, once in a process: something works, but hardly as it was meant."""
    print(f"deepkd: warning: {text}", file=sys.stderr)


def used_up(error: BaseException) -> str | None:
    """Say in a line what the system refused, or its libraries; None if it was something else that failed."""
    text = " ".join(str(error).split())
    if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE) or re.search("Too many open files|ancdata", text):
        return f"too many open files ({text}); `ulimit -n` must be higher, or DATASET.NUM_WORKERS lower"
    if isinstance(error, BrokenPipeError) and error.filename is None:
        return "nobody reads the output any more"
    if re.match("operator torchvision::.* does not exist", text):
        return (
            "torch and torchvision do not go together: one is for the CPU and the other for CUDA, or for another "
            "version; install both anew, by one command of https://pytorch.org/get-started/locally/"
        )
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.filename}: {error.strerror}" if error.filename else text
    return None


def run_script(module: str, **options: Any) -> int:
    """Import a command's module and run its `main`; returns the exit code. options: what `main` takes.

    What the import fails by is told in a line too, if a user can mend it.
    """
    return guarded(lambda: import_module(module).main(**options))


def spoken(tool: str) -> list[str]:
    """Return the words that start a tool from the current folder: a script, or `deepkd COMMAND`.

    A script of SCRIPTS is taken from the checkout of the one that runs, or from the current folder if that is the
    package's checkout. Otherwise, as for an installed package, the command is named. `python -m deepkd_plugin`, and a
    `deepkd` that is not on the path, are named as they were called.
    """
    called, here = Path(sys.argv[0]), Path(__file__).parent
    if tool in SCRIPTS:
        beside = called.with_name(Path(tool).name)
        for script in (beside, Path(tool)):
            if script.is_file() and script.resolve() == here.parent / tool:
                return ["python", str(script)]
    elif tool.endswith(".py"):
        return ["python", tool]
    name, *command = SCRIPTS.get(tool, tool).split()
    if called == here / "__main__.py":
        return [sys.orig_argv[0], "-m", here.name, *command]
    return [str(called) if called.name == name and not shutil.which(name) else name, *command]


def version() -> str:
    """Return the package's version, of this very code; what is installed may be another one's."""
    text: str = sys.modules[__package__ or ""].__version__
    return text


def open_streams() -> None:
    """Let a terminal that cannot show a character show "?", lines reach a file at once, and what was closed nothing.

    The next file that is opened would otherwise take the place of a closed stdout, and get its output.
    """
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            setattr(sys, name, os.fdopen(number, "w"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace", line_buffering=True)


@contextlib.contextmanager
def _quiet_threads() -> Iterator[None]:
    """Let no thread write a traceback about a loader's process that is gone; whoever waits for its images tells.

    Python's thread that hands tensors to such processes calls sys.excepthook if one ends meanwhile.
    """
    show = sys.excepthook

    def quieter(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        gone = issubclass(kind, (EOFError, ConnectionError)) and threading.current_thread() is not main
        if not gone:
            show(kind, error, trace)

    main = threading.main_thread()
    sys.excepthook = quieter
    try:
        yield
    finally:
        sys.excepthook = show


def _end_of_pipe() -> int:
    """Let Python end without a word about a pipe that nobody reads."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return 128 + signal.SIGPIPE


class Stopped(Exception):  # noqa: N818 (no error: somebody wanted it)
    """Training was interrupted; the message says what is left of the run, or nothing if another process says it."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def exit_code(interruption: KeyboardInterrupt) -> int:
    """Return what shells expect of a process that a signal ended: 130 for Ctrl-C, 143 for SIGTERM (see _terminable)."""
    return interruption.args[0] if interruption.args else 130


_arrived: list[int] = []
"""The signals that have asked this process to end, since its command began."""


def check_interruption() -> None:
    """Raise KeyboardInterrupt if a signal has asked for an end: what its handler raised may have been lost.

    Python drops what is raised inside a callback of the interpreter's own, such as those of a fork.
    """
    if _arrived:
        raise KeyboardInterrupt(128 + _arrived[0])


def is_interrupted() -> bool:
    """Tell whether a signal has asked this process to end, and Python has seen it."""
    return bool(_arrived)


def _stop(number: int, frame: Any) -> None:
    _arrived.append(number)
    raise KeyboardInterrupt(128 + number)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end a run as Ctrl-C does, each with the exit code that shells expect of it."""
    # a shell has its background jobs ignore Ctrl-C
    numbers = [n for n in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, _stop) for number in numbers}
    _arrived.clear()
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _tell_dropped
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tell_dropped(dropped: Any) -> None:
    """Tell of an exception that Python drops, unless it was an end that somebody asked for, as usual."""
    if not isinstance(dropped.exc_value, KeyboardInterrupt) and "DataLoader worker" not in str(dropped.exc_value):
        sys.__unraisablehook__(dropped)


def _as_usual() -> None:
    """Let a signal end a loader's process without a word; what a command says, its own process says."""
    for number, handler in ((signal.SIGTERM, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
        if signal.getsignal(number) is _stop:
            signal.signal(number, handler)


os.register_at_fork(after_in_child=_as_usual)
