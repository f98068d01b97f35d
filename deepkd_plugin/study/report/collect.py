"""What the runs of a table left: a record of each, and for every planned run without one the reason.

Only runs that belong together are in one cell (a pair, a method): finished, under the planned config, and all by
the same code, teacher and settings.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ...config.meaning import comparable
from ...config.tree import flatten
from ...distillers.variants import resolved
from ...run import record
from ...run.metrics import METRICS, read_metrics
from ..measures import MEASURES, Measures
from ..table import Cell, Run, Table, as_text
from .detectron2 import settings as ours

NOT_STARTED, UNFINISHED, OTHER_CONFIG = "not started", "unfinished", "other config"
MIXED, UNREADABLE = "does not fit its cell", "unreadable"
"""Why a planned run has no record."""

LONGEST = 200
"""Characters that a reason quotes, of a log's last line or an error."""


# libyaml's reader, if PyYAML was built with it, takes a tenth of the time
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Record:
    """What one finished run measured and by what it was made.

    best, last: the main measure, on the test images in percent, of the best and the last epoch; further: others of
    the same epochs, {"last" or "best": {name: value}}. curve, lr, momentum: the main measure, learning rate and momenta
    by epoch, empty if the run did not write them. teacher: fingerprint of its weights, None without one;
    teacher_acc: its own main measure, None if it was not tested. execution: the ways its steps were taken.
    settings: the config by dotted path. codes: hashes of the package's code, one for each that a session ran.
    processes: how many trained it; several numbers if it went on in another. taken_from: the table and run that it was
    trained for, if that was another one (--reuse).
    """

    run: Run
    settings: dict[str, Any]
    best: float
    best_epoch: int
    last: float
    epochs: int
    further: dict[str, dict[str, float]]
    curve: dict[int, float]
    lr: dict[int, float]
    momentum: dict[int, dict[str, float]]
    execution: tuple[str, ...]
    teacher: str | None
    teacher_acc: float | None
    taken_from: str | None
    codes: tuple[str, ...]
    processes: tuple[int, ...]
    versions: dict[str, str]
    minutes: float
    processor: str
    device: str
    python: str
    commit: str
    started: str

    @property
    def measures(self) -> Measures:
        return MEASURES[self.run.kind]


RESULT: dict[str, Callable[[Any], Any]] = {"best": float, "best_epoch": int, "last": float, "epochs": int}
"""Entries of run.json's result, and what they are."""

MADE: dict[str, Callable[[Any], Any]] = {"minutes": float}
MADE |= dict.fromkeys(("processor", "device", "python", "commit", "started"), str)
"""Entries of run.json that every run has."""


@dataclass(frozen=True)
class LeftOut:
    """A planned run that does not count: the kind of reason (NOT_STARTED, …), and the reason in words."""

    run: Run
    kind: str
    reason: str


@dataclass(frozen=True)
class Results(Table):
    """A table's plan and what each of its runs came to, in the plan's order."""

    outcomes: dict[Run, Record | LeftOut]

    @property
    def records(self) -> list[Record]:
        return [one for one in self.outcomes.values() if isinstance(one, Record)]

    @property
    def left_out(self) -> list[LeftOut]:
        return [one for one in self.outcomes.values() if isinstance(one, LeftOut)]


def collect(folder: Path) -> Results:
    """Read a table's plan and its runs' folders.

    A run that is broken in whatever way is left out with a reason. Raises UserError only if the plan itself cannot be
    read.
    """
    table = Table.read(folder)
    results = Results(**vars(table), outcomes={run: _outcome(run) for run in table.runs})
    by_code = Counter(one.codes for one in results.records)
    cells: dict[Cell, list[Record]] = {}
    for one in results.records:
        cells.setdefault((one.run.pair, one.run.method), []).append(one)
    for cell in cells.values():
        results.outcomes.update({run: LeftOut(run, MIXED, reason) for run, reason in _misfits(cell, by_code)})
    return results


def _outcome(run: Run) -> Record | LeftOut:
    try:
        return read_record(run)
    except Exception as error:  # files from a full disk or a killed editor hold anything
        reason = " ".join(f"{type(error).__name__}: {error}".split()).replace(f"{run.folder}/", "")
        return LeftOut(run, UNREADABLE, f"cannot be read: {reason[:LONGEST]}")


def read_record(run: Run) -> Record | LeftOut:
    """Read what a run left: its record if it is finished, else why it does not count.

    KeyError, ValueError, … if its files do not hold what they should.
    """
    if not (run.folder / record.FILE).exists():
        words = _last_words(run.folder)
        if words:
            return LeftOut(run, UNFINISHED, "ended before its first epoch" + words)
        return LeftOut(run, NOT_STARTED, "not started")
    about, measures = record.read_run(run.folder), MEASURES[run.kind]
    if about["config_hash"] != run.hash:
        reason = f"made under another config: its hash is {about['config_hash']}, the plan's {run.hash}"
        return LeftOut(run, OTHER_CONFIG, reason)
    for session in about.get("resumed", ()):
        if changed := session.get("changed"):
            key, (was, now) = next(iter(changed.items()))
            reason = f"went on after {measures.step} {session['after']} under another config: {key} {was}, then {now}"
            return LeftOut(run, OTHER_CONFIG, reason)
    if not about["finished"]:
        metrics = run.folder / METRICS
        done = len(metrics.read_bytes().splitlines()) if metrics.exists() else 0
        reason = f"unfinished: {done} of {run.epochs} {measures.step}s"
        return LeftOut(run, UNFINISHED, reason + _last_words(run.folder))
    settings = yaml.load((run.folder / "config.yaml").read_text(encoding="utf-8"), _Loader)
    lines = read_metrics(run.folder)

    def by_epoch(name: str, kind: Callable[[Any], Any] = float) -> dict[int, Any]:
        return {int(line["epoch"]): kind(line[name]) for line in lines if name in line}

    result, teacher_acc = about["result"], about.get("teacher_acc")
    sessions = (about, *about.get("resumed", ()))
    of_epoch = {int(line["epoch"]): line for line in lines}
    curve = by_epoch(measures.key)
    made = Record(
        run=run,
        settings=resolved(ours(run.kind, flatten(settings))),
        **{name: kind(result[name]) for name, kind in RESULT.items()},
        **{name: kind(about[name]) for name, kind in MADE.items()},
        further={
            number: {name: float(of_epoch[int(result[at])][key]) for name, key in measures.further.items()}
            for number, at in (("last", "epochs"), ("best", "best_epoch"))
        },
        curve=curve,
        lr=by_epoch("lr"),
        momentum=by_epoch("momentum", lambda of: {stream: float(value) for stream, value in of.items()}),
        execution=tuple(dict.fromkeys(by_epoch("execution", str).values())),
        teacher=as_text(about.get("teacher")),
        teacher_acc=None if teacher_acc is None else float(teacher_acc),
        taken_from=as_text(about.get("taken_from")),
        codes=tuple(dict.fromkeys(str(session.get("code")) for session in sessions)),
        processes=record.processes(about),
        versions={name: str(version) for name, version in about["versions"].items()},
    )
    numbers = [made.best, made.last, made.minutes, made.teacher_acc or 0.0, *curve.values()]
    numbers += [value for values in made.further.values() for value in values.values()]
    if not all(math.isfinite(value) for value in numbers):
        raise ValueError("a number is not finite")
    if not lines or lines[-1]["epoch"] != made.epochs:
        ended = lines[-1]["epoch"] if lines else 0
        raise ValueError(f"{METRICS} ends at epoch {ended}, run.json at {made.epochs}")
    if abs(curve.get(made.epochs, made.last) - made.last) > 1e-6:
        raise ValueError(f"the last epoch has {curve[made.epochs]} in {METRICS}, {made.last} in run.json")
    return made


def _misfits(cell: list[Record], by_code: Counter[tuple[str, ...]]) -> list[tuple[Run, str]]:
    """List the runs of a cell that do not belong with most of it, and why.

    Of several groups of equal size the one stays whose code made most of the table, then the latest.
    """
    whole, rest = [], []
    for one in cell:
        if one.codes == ("None",):
            rest.append((one.run, "run.json does not name the code that made it"))
        elif len(one.codes) > 1:
            rest.append((one.run, f"its sessions ran different code: {', '.join(one.codes)}"))
        else:
            whole.append(one)
    if not whole:
        return rest
    count = Counter(_maker(one) for one in whole)
    first = max(whole, key=lambda one: (count[_maker(one)], by_code[one.codes], one.started))
    for one in whole:
        if _maker(one) == _maker(first):
            continue
        if one.codes != first.codes:
            reason = f"made by code {one.codes[0]}, the rest of its cell by {first.codes[0]}"
        elif one.teacher != first.teacher:
            reason = f"its teacher's weights are {one.teacher}, those of the rest of its cell {first.teacher}"
        else:
            ours, theirs = _computed(one), _computed(first)
            key = next(k for k in sorted(ours.keys() | theirs.keys()) if ours.get(k) != theirs.get(k))
            reason = f"{key} is {ours.get(key)}, in the rest of its cell {theirs.get(key)}"
        rest.append((one.run, reason))
    return rest


def _maker(one: Record) -> tuple[Any, ...]:
    """Gather what runs of a cell have in common."""
    return one.codes, one.teacher, tuple(sorted(_computed(one).items()))


def _computed(one: Record) -> dict[str, str]:
    """Gather what a run's config computes, but for its seed, as text."""
    computed = comparable(one.settings)
    return {key: json.dumps(value, default=str) for key, value in computed.items() if key != "SOLVER.SEED"}


def _last_words(folder: Path) -> str:
    """Quote the last line of a run's log, for a reason."""
    try:
        text = (folder / "log.txt").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    # without colours; bars overwrite themselves, and each of their states is a line here
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).strip().splitlines()
    return f"; its log ends: {lines[-1].strip()[:LONGEST]}" if lines else ""
