"""What `deepkd reproduce` shows of its runs: live lines in a terminal, plain ones elsewhere."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Sequence
from typing import IO, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import Progress, Task, TaskID
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ...errors import UserError
from ...run.metrics import METRICS, count_epochs, read_metrics
from ...run.record import find_run
from ..measures import MEASURES
from ..shared import duration
from ..table import Run

COLUMNS = {"": 7, "epoch": 7, "test": 5, "best": 5, "time": 6, "left": 6}
"""A run's numbers and their least widths; the first is its seed."""


def for_stream(stream: IO[str] | None = None) -> Display:
    """Choose live lines if the stream (stdout) is a terminal that can move its cursor, plain lines elsewhere."""
    stream = stream or sys.stdout
    if stream.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        return LiveDisplay(Console(file=stream, force_terminal=True))
    return Display(stream)


class Display:
    """What runs.execute tells of its runs: one line when one starts, ends or fails, for logs."""

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream
        self.total = self.done = self.given_up = 0

    def begin(self, runs: Sequence[Run], before: int) -> None:
        """Begin with `runs`, which are to be trained; so many others were finished before."""
        self.total, self.done = before + len(runs), before
        if before:
            self.say(f"{before} of {self.total} runs were finished before")

    def started(self, run: Run, resumed: bool) -> None:
        """Tell that a process has begun, for a new run or from a run's checkpoint."""
        self.say(f"{'resumed' if resumed else 'started'}   {run.name}")

    def finished(self, run: Run) -> None:
        """Tell that a run has its result."""
        self.done += 1
        self.say(f"finished  {run.name}: {_result(run)}, {self.done} of {self.total} runs")

    def failed(self, run: Run, why: str, again: bool) -> None:
        """Tell that a process failed; `again`: its run will be tried again."""
        self.given_up += not again
        self.say(f"failed    {run.name}: {why}")

    def close(self) -> None:
        """End: nothing more will come."""

    def say(self, line: str) -> None:
        print(line, file=self.stream, flush=True)


class LiveDisplay(Display):
    """A line for each run that is being trained and a bar for all, redrawn in place below what is said."""

    def __init__(self, console: Console) -> None:
        super().__init__(console.file)
        self.console = console
        self.clock = Progress(console=console, speed_estimate_period=math.inf)
        """Counts epochs: those made of all runs, and those of each run without a result, visible while it trains."""
        self.all = self.clock.add_task("", visible=False)
        self.tasks: dict[Run, TaskID] = {}
        self.live = Live(console=console, get_renderable=self.view, refresh_per_second=1)

    def begin(self, runs: Sequence[Run], before: int) -> None:
        for run in runs:
            self.tasks[run] = self.clock.add_task("", start=False, total=run.epochs, visible=False, run=run)
        self._start(self.all)
        self.live.start()
        super().begin(runs, before)

    def started(self, run: Run, resumed: bool) -> None:
        done = count_epochs(run.folder) if resumed else 0
        # a run that is made anew still has its predecessor's record
        written = None if resumed else _written(run)
        self._start(self.tasks[run], completed=done, visible=True, run=run, values=(), written=written)
        self.live.refresh()

    def finished(self, run: Run) -> None:
        self._end(run, final=True)
        super().finished(run)

    def failed(self, run: Run, why: str, again: bool) -> None:
        self._end(run, final=not again)
        super().failed(run, why, again)

    def say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)
        self.live.refresh()

    def close(self) -> None:
        for task in self.tasks.values():
            self.clock.update(task, visible=False)
        self.live.stop()

    def _start(self, task: TaskID, **fields: Any) -> None:
        self.clock.reset(task, **fields)
        self.clock.advance(task, 0)  # from here on it takes the speed

    def _end(self, run: Run, final: bool) -> None:
        self.live.refresh()
        self.clock.update(self.tasks[run], visible=False)
        if final:
            self.clock.remove_task(self.tasks.pop(run))

    def view(self) -> RenderableType:
        """Make the table of the running runs, as they are now, and the bar, within the window."""
        running = [task for task in self.clock.tasks if task.visible]
        for task in running:
            self._read(task)
        shown = running[: max(1, self.console.height - 4)]
        bar = self._bar(running, len(running) - len(shown))
        return Group(self._table(shown), bar) if shown else bar

    def _read(self, task: Task) -> None:
        """Take up what a run has written since the last reading."""
        run = task.fields["run"]
        if (written := _written(run)) == task.fields["written"]:
            return
        with contextlib.suppress(UserError):  # what another program writes
            lines, key = read_metrics(run.folder), MEASURES[run.kind].key
            values = [line[key] for line in lines if key in line]
            self.clock.update(task.id, written=written, values=values)
            if new := max(0.0, len(lines) - task.completed):
                self.clock.advance(task.id, new)
                self.clock.advance(self.all, new)

    def _table(self, shown: Sequence[Task]) -> Table:
        names = max(len(_cell(run)) for run in self.tasks)
        width = names + sum(COLUMNS.values()) + 2 * len(COLUMNS)
        table = Table(box=None, pad_edge=False, header_style="", width=min(self.console.width - 1, width))
        overflow = "crop" if self.console.options.ascii_only else "ellipsis"
        table.add_column("run", ratio=1, no_wrap=True, overflow=overflow)
        for head, width in COLUMNS.items():
            table.add_column(head, justify="right", no_wrap=True, min_width=width)
        for task in shown:
            run, values = task.fields["run"], task.fields["values"]
            numbers = [f"{value:.2f}" for value in (values[-1], max(values))] if values else ["-", "-"]
            times = _short(task.elapsed), _short(task.time_remaining)
            table.add_row(_cell(run), f"seed {run.seed}", f"{task.completed:.0f}/{run.epochs}", *numbers, *times)
        return table

    def _bar(self, running: Sequence[Task], more: int) -> Table:
        whole, *each = self.clock.tasks
        words = [f"{self.done} of {self.total} runs"]
        words += [f"{self.given_up} failed"] * (self.given_up > 0)
        words += [f"{more} more running"] * (more > 0)
        words += [_short(whole.elapsed)]
        if whole.speed:
            longest = max((task.time_remaining or 0.0 for task in running), default=0.0)
            words += [f"{_short(max(sum(task.remaining or 0.0 for task in each) / whole.speed, longest))} left"]
        # by epochs, so that it moves before the first run ends
        share = self.done + sum(task.completed / max(task.total or 0.0, 1) for task in running)
        width = self.console.width - 3  # Ctrl-C leaves its "^C" behind the cursor
        text = "   ".join(words)[: width - 3]
        bar = Table.grid(padding=(0, 2))
        bar.add_row(ProgressBar(max(self.total, 1), share, width=min(24, width - len(text) - 2)), Text(text))
        return bar


def _cell(run: Run) -> str:
    return f"{run.pair} {run.method}"


def _written(run: Run) -> int | None:
    """Tell when a run's metrics.jsonl was written, None without one."""
    with contextlib.suppress(OSError):
        return (run.folder / METRICS).stat().st_mtime_ns
    return None


def _short(seconds: float | None) -> str:
    """Put a time into at most seven characters."""
    return "-" if seconds is None else duration(seconds, short=True)


def _result(run: Run) -> str:
    record = find_run(run.folder)
    result = record.get("result") or {}
    if not {"best", "last"} <= result.keys():
        return "done"
    return f"best {result['best']:.2f}, last {result['last']:.2f}, {_short(60 * record['minutes'])}"
