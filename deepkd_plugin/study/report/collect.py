"""What the runs of a table left: a record of each, and for every planned run without one the reason.

Only runs that belong together are in one cell (a pair, a method): finished, under the planned config, and all by
the same code, teacher and settings.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ...config.meaning import computes
from ...config.tree import flatten
from ...run import record
from ...run.metrics import METRICS, read_metrics
from ..measures import CLASSIFICATION, MEASURES, Measures
from ..table import Run, Table, as_text
from .detectron2 import settings as ours

NOT_STARTED, UNFINISHED, OTHER_CONFIG, MIXED, UNREADABLE = (
    "not started",
    "unfinished",
    "other config",
    "does not fit its cell",
    "unreadable",
)
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
    taken_from: the table and run that it was trained for, if that was another one (--reuse).
    """

    run: Run
    best: float
    best_epoch: int
    last: float
    epochs: int
    curve: dict[int, float]
    lr: dict[int, float]
    momentum: dict[int, dict[str, float]]
    teacher: str | None
    teacher_acc: float | None
    minutes: float
    execution: tuple[str, ...]
    versions: dict[str, str]
    processor: str
    device: str
    python: str
    commit: str
    codes: tuple[str, ...]
    started: str
    settings: dict[str, Any]
    measures: Measures = MEASURES[CLASSIFICATION]
    further: dict[str, dict[str, float]] = field(default_factory=dict)
    taken_from: str | None = None


@dataclass(frozen=True)
class LeftOut:
    """A planned run that does not count: the kind of reason (NOT_STARTED, …), and the reason in words."""

    run: Run
    kind: str
    reason: str


@dataclass(frozen=True)
class Results(Table):
    """A table's plan and what there is of it. records: by (pair, method, seed)."""

    records: dict[tuple[str, str, int], Record]
    left_out: tuple[LeftOut, ...]


class _RejectedError(Exception):
    """A run that does not count: kind and reason."""


def collect(folder: Path) -> Results:
    """Read a table's plan and its runs' folders.

    A run that is broken in whatever way is left out with a reason. Raises UserError only if the plan itself cannot be
    read.
    """
    table = Table.read(folder)
    records: dict[Run, Record] = {}
    left_out: list[LeftOut] = []
    for run in table.runs:
        try:
            records[run] = read_record(run)
        except _RejectedError as why:
            left_out.append(LeftOut(run, *why.args))
        # files from a full disk or a killed editor hold anything
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split()).replace(f"{run.folder}/", "")
            left_out.append(LeftOut(run, UNREADABLE, f"cannot be read: {reason[:LONGEST]}"))
    by_code = Counter(one.codes for one in records.values())
    cells = dict.fromkeys((run.pair, run.method) for run in table.runs)
    for cell in cells:
        of_cell = [one for run, one in records.items() if (run.pair, run.method) == cell]
        for run, reason in _misfits(of_cell, by_code):
            del records[run]
            left_out.append(LeftOut(run, MIXED, reason))
    order = {run: i for i, run in enumerate(table.runs)}
    left_out.sort(key=lambda left: order[left.run])
    by_key = {(run.pair, run.method, run.seed): one for run, one in records.items()}
    return Results(**vars(table), records=by_key, left_out=tuple(left_out))


def read_record(run: Run) -> Record:
    """Read what a finished run left; raises _RejectedError(kind, reason) for any other, anything for broken files."""
    if not (run.folder / record.FILE).exists():
        words = _last_words(run.folder)
        if words:
            raise _RejectedError(UNFINISHED, "ended before its first epoch" + words)
        raise _RejectedError(NOT_STARTED, "not started")
    about = record.read_run(run.folder)
    measures = MEASURES[run.kind]
    if about["config_hash"] != run.hash:
        reason = f"made under another config: its hash is {about['config_hash']}, the plan's {run.hash}"
        raise _RejectedError(OTHER_CONFIG, reason)
    if not about["finished"]:
        reason = f"unfinished: {_epochs_done(run.folder)} of {run.epochs} {measures.step}s"
        raise _RejectedError(UNFINISHED, reason + _last_words(run.folder))
    settings = yaml.load((run.folder / "config.yaml").read_text(encoding="utf-8"), _Loader)
    return _record(run, about, read_metrics(run.folder), ours(run.kind, flatten(settings)), measures)


def _record(
    run: Run,
    about: dict[str, Any],
    lines: Sequence[dict[str, Any]],
    settings: dict[str, Any],
    measures: Measures,
) -> Record:
    """Put a record together; KeyError, ValueError, … if its files do not hold what they should. about: run.json."""
    result, teacher_acc = about["result"], about.get("teacher_acc")
    key = measures.key
    curve = {int(line["epoch"]): float(line[key]) for line in lines if key in line}
    of_epoch = {int(line["epoch"]): line for line in lines}
    further = {
        number: {name: float(of_epoch[int(result[at])][other]) for name, other in measures.further.items()}
        for number, at in (("last", "epochs"), ("best", "best_epoch"))
    }
    made = Record(
        run=run,
        best=float(result["best"]),
        best_epoch=int(result["best_epoch"]),
        last=float(result["last"]),
        epochs=int(result["epochs"]),
        curve=curve,
        lr={int(line["epoch"]): float(line["lr"]) for line in lines if "lr" in line},
        momentum={
            int(line["epoch"]): {stream: float(value) for stream, value in line["momentum"].items()}
            for line in lines
            if "momentum" in line
        },
        teacher=as_text(about.get("teacher")),
        teacher_acc=teacher_acc if teacher_acc is None else float(teacher_acc),
        minutes=float(about["minutes"]),
        execution=tuple(dict.fromkeys(str(line["execution"]) for line in lines if "execution" in line)),
        versions={str(name): str(version) for name, version in about["versions"].items()},
        processor=str(about["processor"]),
        device=str(about["device"]),
        python=str(about["python"]),
        commit=str(about["commit"]),
        codes=tuple(
            dict.fromkeys(str(session.get("code")) for session in (about, *about.get("resumed", ())))
        ),
        started=str(about["started"]),
        settings=settings,
        measures=measures,
        further=further,
        taken_from=as_text(about.get("taken_from")),
    )
    numbers = [made.best, made.last, made.minutes, made.teacher_acc or 0.0, *curve.values()]
    numbers += [value for values in further.values() for value in values.values()]
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
    computed = {k: v for k, v in one.settings.items() if computes(k) and k != "SOLVER.SEED"}
    return {key: json.dumps(value, default=str) for key, value in computed.items()}


def _epochs_done(folder: Path) -> int:
    try:
        return len((folder / METRICS).read_bytes().splitlines())
    except OSError:
        return 0


def _last_words(folder: Path) -> str:
    """Quote the last line of a run's log, for a reason."""
    try:
        with (folder / "log.txt").open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 8192))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    # colours, and bars that overwrite themselves
    lines = [line.strip() for line in re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text))]
    lines = [line for line in lines if line]
    return f"; its log ends: {lines[-1][:LONGEST]}" if lines else ""
