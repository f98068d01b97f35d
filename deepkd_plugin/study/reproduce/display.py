"""What `deepkd reproduce` shows of its runs: live lines in a terminal, plain ones elsewhere."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING, Any

from ...run.metrics import METRICS, read_metrics
from ..measures import MEASURES
from ..shared import duration

if TYPE_CHECKING:
    from ..table import Run

EVERY = 1.0
"""Seconds between two looks at the runs' records."""


def for_stream(stream: IO[str] | None = None) -> Display:
    """Live lines where the stream (stdout) is a terminal that can move its cursor, plain lines elsewhere."""
    stream = stream or sys.stdout
    if stream.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        return LiveDisplay(stream)
    return PlainDisplay(stream)


class Display:
    """What runs.execute tells of. This one shows nothing."""

    def begin(self, runs: Sequence[Run], before: int) -> None:
        """`runs` are to be trained; so many others were finished before."""

    def started(self, run: Run, resumed: bool) -> None:
        """A process has begun, for a new run or from a run's checkpoint."""

    def finished(self, run: Run) -> None:
        """A run has its result."""

    def failed(self, run: Run, why: str, again: bool) -> None:
        """A process failed; `again`: its run will be tried again."""

    def refresh(self) -> None:
        """Called several times a second."""

    def close(self) -> None:
        """Nothing more will come."""


class PlainDisplay(Display):
    """One line when a run starts, ends or fails: for logs."""

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream
        self.total = self.done = self.given_up = 0
        self.running: dict[Run, _Progress] = {}
        self.began = time.monotonic()

    def begin(self, runs: Sequence[Run], before: int) -> None:
        self.total, self.done = before + len(runs), before
        self.began = time.monotonic()
        if before:
            self.say(f"{before} of {self.total} runs were finished before")

    def started(self, run: Run, resumed: bool) -> None:
        self.running[run] = _Progress(run, resumed)
        self.tell_start(run, resumed)

    def finished(self, run: Run) -> None:
        self.running.pop(run, None)
        self.done += 1
        self.tell_result(run)

    def failed(self, run: Run, why: str, again: bool) -> None:
        self.running.pop(run, None)
        self.given_up += not again
        self.say(f"failed    {run.name}: {why}")

    def tell_start(self, run: Run, resumed: bool) -> None:
        self.say(f"{'resumed' if resumed else 'started'}   {run.name}")

    def tell_result(self, run: Run) -> None:
        self.say(f"finished  {run.name}: {_result(run)}, {self.done} of {self.total} runs")

    def say(self, line: str) -> None:
        print(line, file=self.stream, flush=True)


class _Progress:
    """How far a process has brought its run, from the run's record."""

    def __init__(self, run: Run, resumed: bool) -> None:
        self.run = run
        self.epoch = self.first = 0
        self.last: float | None = None
        self.best: float | None = None
        self.started = self.changed = time.monotonic()
        self.minutes_before = 0.0
        # of a run that this one replaces
        self._stamp = None if resumed else self._changed_at()
        if resumed:
            self.read()
            self.first = self.epoch
            self.minutes_before = _record(run).get("minutes", 0.0)

    def read(self) -> None:
        """Take up what the record has since the last reading."""
        stamp = self._changed_at()
        if stamp == self._stamp:
            return
        try:
            lines = read_metrics(self.run.folder)
        except ValueError:
            return
        self._stamp = stamp
        if len(lines) != self.epoch:
            self.changed = time.monotonic()
        key = MEASURES[self.run.kind].key
        values = [line[key] for line in lines if key in line]
        self.epoch = len(lines)
        self.last = values[-1] if values else None
        self.best = max(values, default=None)

    def _changed_at(self) -> int | None:
        with contextlib.suppress(OSError):
            return (self.run.folder / METRICS).stat().st_mtime_ns
        return None

    @property
    def minutes(self) -> float:
        return self.minutes_before + (time.monotonic() - self.started) / 60

    @property
    def minutes_left(self) -> float | None:
        """By the mean time of this process's epochs; None in its first."""
        if self.epoch <= self.first:
            return None
        each = (self.changed - self.started) / (self.epoch - self.first)
        return max(0.0, each * (self.run.epochs - self.epoch) - (time.monotonic() - self.changed)) / 60


class LiveDisplay(PlainDisplay):
    """A line for each run that is being trained and a bar for all, redrawn in place below what is said."""

    def __init__(self, stream: IO[str]) -> None:
        super().__init__(stream)
        self._drawn: list[str] = []
        self._next = 0.0
        self._left: dict[Run, int] = {}
        self._names = self._epochs_done = 0
        encoding = getattr(stream, "encoding", None) or "ascii"
        try:
            "━─…".encode(encoding)
            self._full, self._empty, self._cut = "━─…"
        except UnicodeEncodeError:
            self._full, self._empty, self._cut = "=-~"

    def begin(self, runs: Sequence[Run], before: int) -> None:
        super().begin(runs, before)
        self._left = {run: run.epochs for run in runs}
        self._names = max((len(run.name) for run in runs), default=0)

    def tell_start(self, run: Run, resumed: bool) -> None:
        """Its live line tells."""

    def tell_result(self, run: Run) -> None:
        self.say(f"finished  {run.name}: {_result(run)}")

    def finished(self, run: Run) -> None:
        self._end(run, final=True)
        super().finished(run)

    def failed(self, run: Run, why: str, again: bool) -> None:
        self._end(run, final=not again)
        super().failed(run, why, again)

    def _end(self, run: Run, final: bool) -> None:
        progress = self.running.get(run)
        if progress is not None:
            progress.read()
            self._epochs_done += progress.epoch - progress.first
            self._left[run] = run.epochs - progress.epoch
        if final:
            self._left.pop(run, None)

    def say(self, line: str) -> None:
        self._draw(self._lines(*self._window()), stays=line)

    def refresh(self) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + EVERY
            for progress in self.running.values():
                progress.read()
            self._draw(self._lines(*self._window()))

    def close(self) -> None:
        self._draw([], stays=self._bar(self._window()[0]))

    def _window(self) -> tuple[int, int]:
        """Columns and rows; some terminals say 0."""
        with contextlib.suppress(OSError, ValueError):
            columns, rows = os.get_terminal_size(self.stream.fileno())
            if columns and rows:
                return columns, rows
        return 80, 24

    def _draw(self, lines: list[str], stays: str | None = None) -> None:
        """Replace what is drawn by `lines`, below one that stays; in one write, so that nothing flickers."""
        columns = self._window()[0]
        # a window that was made narrower has wrapped them
        rows = sum(max(1, math.ceil(len(line) / columns)) for line in self._drawn)
        up = f"\x1b[{rows - 1}A" if rows > 1 else ""
        above = "" if stays is None else f"{stays}\n"
        self.stream.write(f"\r{up}\x1b[J{above}" + "\n".join(lines))
        self.stream.flush()
        self._drawn = lines

    def _lines(self, columns: int, rows: int) -> list[str]:
        """The running runs as a table, and the bar, within a window."""
        room = max(1, rows - 3)
        shown = list(self.running.values())[:room]
        width = columns - 1
        names = min(self._names, max(24, width - len(_columns())))
        lines = [f"{'run':<{names}}{_columns('epoch', 'test', 'best', 'time', 'left')}"] if shown else []
        for p in shown:
            values = ("-" if value is None else f"{value:.2f}" for value in (p.last, p.best))
            times = (_duration(p.minutes), _duration(p.minutes_left))
            row = _columns(f"{p.epoch}/{p.run.epochs}", *values, *times)
            lines.append(f"{self._shorten(p.run.name, names):<{names}}{row}")
        lines = [line[:width] for line in lines]
        return [*lines, self._bar(columns, more=len(self.running) - len(shown))]

    def _shorten(self, name: str, width: int) -> str:
        """A name without its middle where it is too long: its end, the seed, is what tells runs apart."""
        end = name[name.rfind(" seed") :]
        return name if len(name) <= width else f"{name[: width - len(end) - 1]}{self._cut}{end}"

    def _bar(self, columns: int, more: int = 0) -> str:
        width = columns - 3  # Ctrl-C leaves its "^C" behind the cursor
        running = [progress.epoch - progress.first for progress in self.running.values()]
        left = {**self._left, **{p.run: p.run.epochs - p.epoch for p in self.running.values()}}
        done, ahead = self._epochs_done + sum(running), sum(left.values())
        minutes = (time.monotonic() - self.began) / 60
        words = [f"{self.done} of {self.total} runs"]
        words += [f"{self.given_up} failed"] * (self.given_up > 0)
        words += [f"{more} more running"] * (more > 0)
        words += [_duration(minutes)]
        if done and ahead:
            longest = max((p.minutes_left or 0.0 for p in self.running.values()), default=0.0)
            words += [f"{_duration(max(minutes / done * ahead, longest))} left"]
        text = "   ".join(words)
        cells = max(0, min(24, width - len(text) - 2))
        # by epochs, so that it moves before the first run ends
        share = (self.done + self._share_of_started()) / max(self.total, 1)
        full = int(cells * min(share, 1.0))
        return f"{self._full * full}{self._empty * (cells - full)}  {text}"[:width]

    def _share_of_started(self) -> float:
        return sum(progress.epoch / max(progress.run.epochs, 1) for progress in self.running.values())


def _columns(epoch: str = "", test: str = "", best: str = "", so_far: str = "", left: str = "") -> str:
    return f"  {epoch:>9}  {test:>6}  {best:>6}  {so_far:>7}  {left:>7}"


def _duration(minutes: float | None) -> str:
    """A time in at most seven characters."""
    return "-" if minutes is None else duration(60 * minutes, short=True)


def _result(run: Run) -> str:
    held = _record(run)
    result = held.get("result", {})
    if not {"best", "last"} <= result.keys():
        return "done"
    return f"best {result['best']:.2f}, last {result['last']:.2f}, {_duration(held.get('minutes'))}"


def _record(run: Run) -> dict[str, Any]:
    try:
        return json.loads((run.folder / "run.json").read_text())
    except (OSError, ValueError):
        return {}
