"""One method's search, in Optuna's storage: which trials there were, which comes next, which is best."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import ceil
from pathlib import Path
from typing import Any

from ...errors import UserError
from .space import Point, Space

JOURNAL = "journal.jsonl"
"""Optuna's storage in the search's folder: lines of JSON."""

OUTCOME, OPTIONS, SEEDS, WIDENED = "outcome", "options", "seeds", "widened"
"""What is noted of a trial: its outcome if it is none of Optuna's states, its options, each seed's result, whether the
ranges were the wider ones. Of a study WIDENED has their ends."""

DIVERGED = "diverged"


class _Alone:
    """A lock for Optuna's file: the folder's keeps other processes out, and the storage's own other threads."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


def require() -> Any:
    """Import Optuna; UserError without it."""
    try:
        import optuna
    except ImportError:
        raise UserError('deepkd tune needs Optuna, which is not installed: pip install "deepkd_plugin[tune]"') from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def open_storage(folder: Path) -> Any:
    """Open the storage in a folder whose lock this process has; UserError for one that is damaged.

    A last line without its end, which a killed process left, is cut off.
    """
    journal = require().storages.journal
    path = folder / JOURNAL

    try:
        if path.exists() and (content := path.read_bytes()) and not content.endswith(b"\n"):
            with open(path, "r+b") as file:
                file.truncate(content.rfind(b"\n") + 1)
        # without snapshots, which would be pickles
        return require().storages.JournalStorage(journal.JournalFileBackend(str(path), lock_obj=_Alone()))
    except OSError as error:
        raise UserError(f"{path}: cannot be read and written ({error})") from None
    except Exception as error:  # whatever Optuna makes of lines that are not its own
        raise UserError(
            f"{path}: must be the storage of this search ({type(error).__name__}: {error}); move the folder away"
        ) from None


class Search:
    """The trials of one method.

    method: its name. space: as it was before any widening. budget: trials that end by a result or by the pruner. The
    first two thirds are of `space`. If the best of these is at the edge of a range, that one is made wider at this end,
    once, and the last third is of the wider space: so every method has as many trials, whatever its ranges are.
    epochs: of a run.
    """

    def __init__(self, storage: Any, method: str, space: Space, budget: int, epochs: int) -> None:
        self.optuna = require()
        self.storage, self.method, self.narrow, self.budget = storage, method, space, budget
        self.startup = max(budget // 3, 2)
        # a schedule's first half says little: the masks' phases and the rate's decay are still to come
        self.pruner = self.optuna.pruners.MedianPruner(n_startup_trials=self.startup, n_warmup_steps=epochs // 2)
        with quiet():
            made = dict(storage=storage, study_name=method)
            self.study = self.optuna.create_study(direction="maximize", load_if_exists=True, **made)
            if not self.study.trials:
                self.study.enqueue_trial(dict(space.own))

    @property
    def trials(self) -> list[Any]:
        """Every trial that was begun, by number."""
        states = self.optuna.trial.TrialState
        return [trial for trial in self.study.get_trials(deepcopy=False) if trial.state != states.WAITING]

    def count(self, *names: str) -> int:
        """Count the trials in some of Optuna's states."""
        return sum(trial.state.name in names for trial in self.trials)

    @property
    def left(self) -> int:
        """How many trials are still to be begun."""
        return max(self.budget - self.count("COMPLETE", "PRUNED", "RUNNING"), 0)

    @property
    def space(self) -> Space:
        """The space as it is by now."""
        return self.narrow.widened(self.study.user_attrs.get(WIDENED, {}))

    def interrupted(self) -> Iterator[Any]:
        """Yield the trials that an earlier call began and did not end."""
        for trial in self.trials:
            if trial.state == self.optuna.trial.TrialState.RUNNING:
                yield self.optuna.trial.Trial(self._study(trial.number), trial._trial_id)

    def ask(self) -> Any:
        """Begin a trial; None if none is left, or if it must wait for those that decide on the ranges."""
        if not self.left:
            return None
        if WIDENED not in self.study.user_attrs and self.count("COMPLETE", "PRUNED", "RUNNING") >= self._first:
            if self.count("RUNNING"):
                return None
            self.study.set_user_attr(WIDENED, self._wider())
        with quiet():
            return self._study(len(self.trials)).ask()

    def repeat(self, trial: Any) -> None:
        """Let a trial that failed be begun anew by the next call, under another number."""
        with quiet():
            self.study.enqueue_trial(trial.params)

    def point(self, trial: Any) -> Point:
        """Return a trial's point; of one that was interrupted, what it lacks is chosen now."""
        with quiet():
            return self.space.ask(trial)

    @property
    def best(self) -> Any:
        """The trial with the best result, the first of equals; None before there is one."""
        done = [trial for trial in self.trials if trial.state.name == "COMPLETE"]
        return max(done, key=lambda trial: trial.value, default=None)

    def importances(self) -> dict[str, float]:
        """Return each searched name's share of what told good results from others (PED-ANOVA); {} if too few ended."""
        done = self.count("COMPLETE")
        if done < 6:
            return {}
        good = min(max(0.1, 5 / done), 0.5)
        with quiet():
            evaluator = self.optuna.importance.PedAnovaImportanceEvaluator(target_quantile=good)
            return self.optuna.importance.get_param_importances(self.study, evaluator=evaluator)

    @property
    def _first(self) -> int:
        return ceil(2 * self.budget / 3)

    def _wider(self) -> dict[str, tuple[float, float]]:
        """Return the ends of the ranges at an edge of which the best is, made wider."""
        best = self.best
        edges = self.narrow.edges(best.params) if best is not None else {}
        wider = {name: self.narrow.ranges[name].widened(edge) for name, edge in edges.items()}
        return {name: (to.low, to.high) for name, to in wider.items() if to != self.narrow.ranges[name]}

    def _study(self, number: int) -> Any:
        """Return the study with a sampler whose draws depend on the trial's number, not on what this process drew."""
        sampler = self.optuna.samplers.TPESampler(seed=number, n_startup_trials=self.startup)
        return self.optuna.load_study(study_name=self.method, storage=self.storage, sampler=sampler, pruner=self.pruner)


@contextmanager
def quiet() -> Iterator[None]:
    """Let Optuna say nothing about what is meant: few trials, a point that is not in its range."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def outcome(trial: Any) -> str:
    """Say what became of a trial."""
    return trial.user_attrs.get(OUTCOME) or trial.state.name.lower()


def names(searches: Sequence[Search]) -> list[str]:
    """List what is searched of any method, in order."""
    return list(dict.fromkeys(name for search in searches for name in search.narrow.own))
