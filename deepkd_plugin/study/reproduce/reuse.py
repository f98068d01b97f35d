"""Runs that other tables have finished, taken over instead of trained again: --reuse."""

import contextlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from ...errors import UserError
from ...run import folder as run_folder
from ...run import lock, record
from ...run.lock import HeldError, locked
from ..table import Run, Table
from .plan import is_taught
from .runs import OtherCodeError, state


class Other(NamedTuple):
    """A run of another table: its folder, and its name with the table's."""

    folder: Path
    name: str


def elsewhere(runs: Sequence[Run], folders: Iterable[Path]) -> dict[Path, list[Other]]:
    """Find the runs that other tables planned under the same resolved config too: by folder, in the tables' order.

    Raises UserError for a folder that holds no table.
    """
    planned: dict[tuple[str, str], list[Other]] = {}
    for folder in folders:
        try:
            table = Table.read(folder.absolute())
        except UserError as error:
            raise UserError(f"command line: --reuse: {error}") from None
        for run in table.runs:
            other = Other(run.folder, f"{table.title}: {run.name}")
            planned.setdefault((run.kind, run.hash), []).append(other)
    return {
        run.folder: [
            other for other in planned.get((run.kind, run.hash), []) if other.folder.resolve() != run.folder.resolve()
        ]
        for run in runs
    }


def usable(runs: Sequence[Run], others: Mapping[Path, Sequence[Other]], code: str) -> tuple[dict[Run, Other], int]:
    """Tell which of these runs other tables have finished, and how many of them only by runs that must not be taken.

    Those are runs of other code, of another teacher, or of one that is not known here.
    """
    taken: dict[Run, Other] = {}
    unfit = 0
    for run in runs:
        those = [o for o in others[run.folder] if record.find_run(o.folder).get("finished")]
        fitting = [other for other in those if _fits(run, other.folder, code)]
        if fitting:
            taken[run] = fitting[0]
        else:
            unfit += bool(those)
    return taken, unfit


def take_over(run: Run, other: Other, code: str) -> None:
    """Copy another table's run into a run's folder, in place of what is there, unless either has changed meanwhile.

    run.json, which says that a run is finished, comes last, and says where it is from (`taken_from`).
    A run that another process is training is left to it. Raises UserError if the files cannot be copied.
    """
    with contextlib.suppress(HeldError), locked(run.folder):
        if state(run, True, code) == "finished" or not _fits(run, other.folder, code):
            return
        run_folder.settle(run.folder)
        run_folder.check(run.folder, resume=False, overwrite=True)
        theirs = record.read_run(other.folder)
        try:
            run_folder.set_aside(run.folder)
            record.write_run(run.folder, {run_folder.COPYING: True, "config_hash": run.hash, "finished": False})
            ignored = shutil.ignore_patterns(lock.FILE, run_folder.REPLACED, record.FILE, ".*.tmp")
            shutil.copytree(other.folder, run.folder, ignore=ignored, dirs_exist_ok=True)
            record.write_run(run.folder, {"taken_from": other.name} | theirs)
        except OSError as error:  # shutil's own among them
            raise UserError(f"{other.folder}: its files cannot be copied to {run.folder} ({error})") from None
        finally:
            run_folder.settle(run.folder)


def _fits(run: Run, folder: Path, code: str) -> bool:
    """Tell whether the run in a folder could stand in a run's place."""
    if run.teacher is None and is_taught(folder):
        return False  # its file is not here, or the kind of table does not tell
    try:
        return state(replace(run, folder=folder), code=code) == "finished"
    except OtherCodeError:
        return False
