"""Runs that other tables have finished, taken over instead of trained again: --reuse."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from ...errors import UserError
from ...run import record
from ...run.checkpoint import write_whole
from ...run.record import names_a_teacher
from ..table import Run, read_plan
from .runs import HeldError, OtherCodeError, locked, state
from .tables import Table

RECORD = "run.json"


class Other(NamedTuple):
    """A run of another table: its folder, and its name with the table's."""

    folder: Path
    name: str


def elsewhere(runs: Sequence[Run], folders: Iterable[Path]) -> dict[Path, list[Other]]:
    """By their folders, the runs that other tables planned under the same resolved config too, in the tables' order.

    Raises UserError for a folder that holds no table.
    """
    planned: dict[tuple[str, str], list[Other]] = {}
    for folder in folders:
        try:
            held = read_plan(folder.absolute())
        except UserError as error:
            raise UserError(f"command line: --reuse: {error}") from None
        title = Table(held["name"], held["dataset"], (), held["over"]).title
        for run in held["runs"]:
            other = Other(run.folder, f"{title}: {run.pair} {run.method} seed {run.seed}")
            planned.setdefault((held["kind"], run.hash), []).append(other)
    found = {run.folder: planned.get((run.kind, run.hash), []) for run in runs}
    return {
        ours: others
        for ours, those in found.items()
        if (others := [other for other in those if other.folder.resolve() != ours.resolve()])
    }


def usable(
    runs: Sequence[Run], others: Mapping[Path, Sequence[Other]], code: str
) -> tuple[dict[Run, Other], int]:
    """Which of these runs other tables have finished; and how many they have, but only such as must not be taken.

    Those are runs of other code, of another teacher, or of one that is not known here.
    """
    found: dict[Run, Other] = {}
    unfit = 0
    for run in runs:
        those = [other for other in others.get(run.folder, ()) if _finished(other.folder)]
        fitting = [other for other in those if _fits(run, other.folder, code)]
        if fitting:
            found[run] = fitting[0]
        else:
            unfit += bool(those)
    return found, unfit


def take_over(run: Run, other: Other, code: str) -> None:
    """Copy another table's run into a run's folder, in place of what is there, unless either has changed meanwhile.

    run.json, which says that a run is finished, goes first and comes last, and says where it is from (`taken_from`).
    A run that another process is training is left to it. Raises UserError where the files cannot be copied.
    """
    with contextlib.suppress(HeldError), locked(run.folder):
        if state(run, True, code) == "finished" or not _fits(run, other.folder, code):
            return
        held = record.read_run(other.folder)
        try:
            (run.folder / RECORD).unlink(missing_ok=True)
            for path in run.folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != "lock":
                    path.unlink()
            ignored = shutil.ignore_patterns("lock", RECORD, ".*.tmp")
            shutil.copytree(other.folder, run.folder, ignore=ignored, dirs_exist_ok=True)
            text = json.dumps({"taken_from": other.name} | held, indent=2) + "\n"
            write_whole(run.folder / RECORD, lambda file: file.write(text.encode()))
        except OSError as error:  # shutil's own among them
            raise UserError(f"{other.folder}: its files cannot be copied to {run.folder} ({error})") from None


def _finished(folder: Path) -> bool:
    try:
        return bool(record.read_run(folder).get("finished"))
    except (UserError, AttributeError):  # none, or something else than a record
        return False


def _fits(run: Run, folder: Path, code: str) -> bool:
    """Whether the run that lies in a folder could stand in a run's place."""
    if run.teacher is None and names_a_teacher(folder):
        return False  # its file is not here, or the kind of table does not tell
    try:
        return state(replace(run, folder=folder), code=code) == "finished"
    except OtherCodeError:
        return False
