"""Trials as processes: each is a run for each seed, watched by its metrics, and ended early if others were better."""

from __future__ import annotations

import contextlib
import re
import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import IO, Any

from ...errors import UserError
from ...run import folder as run_folder
from ...run.metrics import read_metrics
from ..measures import MEASURES
from ..reproduce.display import Display
from ..reproduce.runs import Crew, Failure, end
from ..table import Run
from .search import DIVERGED, OPTIONS, OUTCOME, SEEDS, WIDENED, Search

LOOK = 0.5
"""Seconds between two looks at what a run has written."""

_DIVERGED = re.compile(r"loss '.*' became (nan|-?inf) ")
"""How Trainer.check_finite says that a recipe diverges."""

MakeRuns = Callable[[Search, int, Sequence[str]], list[Run]]
"""A search, a trial's number and its options -> its runs, one for each seed."""


class TrialDisplay(Display):
    """A line when a run starts or ends, as Display's, and when the pruner ends a trial."""

    def __init__(self, stream: IO[str], total: int) -> None:
        super().__init__(stream)
        self.total = total

    def pruned(self, run: Run, epoch: int, value: float) -> None:
        self.done += 1
        self.say(f"pruned    {run.name}: {value:.2f} after epoch {epoch}, below the median of the others")

    def diverged(self, run: Run) -> None:
        self.done += 1
        self.say(f"diverged  {run.name}")


@dataclass
class Task:
    """A trial that is under way: its runs by seed, and the last epochs' results of those that have ended."""

    search: Search
    trial: Any
    runs: list[Run]
    values: list[float] = field(default_factory=list)
    pruned: dict[str, Any] | None = None
    """What the epoch left at which the pruner ended the trial."""

    @property
    def run(self) -> Run:
        """The run that is next."""
        return self.runs[len(self.values)]


@dataclass
class TrialCrew(Crew):
    """A crew whose runs are trials: the next one is chosen when somebody is free.

    searches: the methods'; the one with the most trials left is next. make_runs: see MakeRuns. turn: held while the
    storage is asked or told.
    """

    display: TrialDisplay
    searches: Sequence[Search] = ()
    make_runs: MakeRuns | None = None
    turn: threading.RLock = field(default_factory=threading.RLock)
    tasks: dict[Run, Task] = field(default_factory=dict)
    given_up: set[str] = field(default_factory=set)
    """Methods of which a run failed in this call; they get no more trials."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.changed = threading.Condition(self.turn)
        for search in self.searches:
            for trial in search.interrupted():
                self.waiting.append((self._begin(search, trial).run, 1))

    def take(self) -> tuple[Run, int] | None:
        """Take a run that waits, or else begin a trial; wait as long as a trial that is under way may lead to one."""
        with self.changed:
            while not self.stopping:
                if (waiting := super().take()) is not None:
                    return waiting
                for search in sorted(self.searches, key=lambda one: -one.left):
                    if search.method not in self.given_up and (trial := search.ask()) is not None:
                        return self._begin(search, trial).run, 1
                if not self.tasks:
                    return None
                self.changed.wait(1.0)
        return None

    def wait(self, process: subprocess.Popen[bytes], run: Run) -> int:
        """Wait for a run's end; end it earlier if the pruner says so."""
        while True:
            try:
                return process.wait(LOOK)
            except subprocess.TimeoutExpired:
                if not self.tasks[run].pruned and self._look(run):
                    end([process])

    def ended(self, run: Run, code: int, attempt: int, lines: tuple[str, ...]) -> None:
        task = self.tasks[run]
        if task.pruned and code:
            self._tell(task, self._states.PRUNED)
            with self.lock:
                self.display.pruned(run, task.pruned["epoch"], task.pruned[_key(run)])
        elif code == 2 and any(map(_DIVERGED.search, lines)):
            with self.turn:
                task.trial.set_user_attr(OUTCOME, DIVERGED)
            # to the sampler it is worse than any that was pruned
            self._tell(task, self._states.PRUNED)
            with self.lock:
                self.display.diverged(run)
        else:
            super().ended(run, code, attempt, lines)

    def finished(self, run: Run) -> None:
        task = self.tasks[run]
        self._look(run, prune=False)
        task.pruned = None  # it was at its end before it could be ended
        task.values.append(read_metrics(run.folder)[-1][_key(run)])
        super().finished(run)
        with self.changed:
            task.trial.set_user_attr(SEEDS, task.values)
            if len(task.values) < len(task.runs):
                self.tasks[task.run] = self.tasks.pop(run)
                self.waiting.appendleft((task.run, 1))
                run_folder.drop_states(run.folder)
                self.changed.notify_all()
                return
        self._tell(task, self._states.COMPLETE, fmean(task.values))

    def failed(self, failure: Failure, why: str, again: bool = False) -> None:
        super().failed(failure, why, again)
        if not again:
            task = self.tasks[failure.run]
            self.given_up.add(task.search.method)
            self._tell(task, self._states.FAIL)
            task.search.repeat(task.trial)

    def stop(self) -> None:
        super().stop()
        with self.changed:
            self.changed.notify_all()

    @property
    def _states(self) -> Any:
        return self.searches[0].optuna.trial.TrialState

    def _begin(self, search: Search, trial: Any) -> Task:
        """Make a trial's runs; one that was interrupted has the results of those that it ended."""
        words = search.space.options(search.point(trial))
        trial.set_user_attr(OPTIONS, words)
        trial.set_user_attr(WIDENED, bool(search.study.user_attrs.get(WIDENED)))
        assert self.make_runs is not None
        runs = self.make_runs(search, trial.number, words)
        # one that ended its last seed and was not told of gets that seed again, which is finished at once
        task = Task(search, trial, runs, list(trial.user_attrs.get(SEEDS, ()))[: len(runs) - 1])
        self.tasks[task.run] = task
        return task

    def _tell(self, task: Task, state: Any, value: float | None = None) -> None:
        """End a trial; its weights are of no more use."""
        with self.changed:
            task.search.study.tell(task.trial, value, state)
            for run in task.runs:
                self.tasks.pop(run, None)
                run_folder.drop_states(run.folder)
            self.changed.notify_all()

    def _look(self, run: Run, prune: bool = True) -> bool:
        """Report what the first seed's run has reached since the last look; returns whether that is to be its end."""
        task = self.tasks[run]
        if run is not task.runs[0]:  # the pruner compares first seeds
            return False
        lines: list[dict[str, Any]] = []
        with contextlib.suppress(UserError):
            lines = read_metrics(run.folder)
        with self.turn:
            known = task.trial.storage.get_trial(task.trial._trial_id).intermediate_values
            for line in lines:
                if line["epoch"] in known:
                    continue
                task.trial.report(line[_key(run)], line["epoch"])
                if prune and line["epoch"] < run.epochs and task.trial.should_prune():
                    task.pruned = line
                    return True
        return False


def _key(run: Run) -> str:
    return MEASURES[run.kind].key
