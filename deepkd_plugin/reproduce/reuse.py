"""Runs that another table has finished, taken over instead of trained again: --reuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .. import record
from ..checkpoint import write_whole
from ..errors import UserError
from .measures import CLASSIFICATION
from .plan import read_document
from .runs import OtherCodeError, locked, state
from .shared import FILE

if TYPE_CHECKING:
    from .plan import Run

RECORD = "run.json"


class Other(NamedTuple):
    """A run of another table: its folder, and its name with the table's."""

    folder: Path
    name: str


def elsewhere(runs: Sequence[Run], folders: Sequence[Path]) -> dict[Path, Other]:
    """By their folders, the runs that other tables planned under the same resolved config too; the first table's.

    Raises UserError for a folder that holds no table.
    """
    planned: dict[tuple[str, str], Other] = {}
    for folder in folders:
        held = read_document(folder, "--reuse")
        if held is None:
            raise UserError(
                f"{folder}: --reuse must name a folder that deepkd reproduce made; this has no {FILE}"
            )
        kind = held.get("kind", CLASSIFICATION)
        for run in held["runs"]:
            name = f"{held['table']}: {run['pair']} {run['method']} seed {run['seed']}"
            planned.setdefault((kind, run["hash"]), Other(folder.absolute() / run["folder"], name))
    found = {run.folder: planned.get((run.kind, run.hash)) for run in runs}
    return {ours: other for ours, other in found.items() if other is not None and other.folder != ours}


def finished(runs: Sequence[Run], others: Mapping[Path, Other], code: str) -> tuple[dict[Run, Other], int]:
    """Which of these runs another table has finished; and how many it made by other code or with another teacher."""
    found, unfit = {}, 0
    for run in runs:
        if run.folder not in others:
            continue
        other = others[run.folder]
        try:
            if state(replace(run, folder=other.folder), code=code) == "finished":
                found[run] = other
        except OtherCodeError:
            unfit += 1
    return found, unfit


def take_over(run: Run, other: Other) -> None:
    """Copy another table's run into a run's folder, in place of what is there.

    run.json, which says that a run is finished, comes last, and says where it is from (`taken_from`). Raises UserError
    where the files cannot be copied, and HeldError where another process is at work in the run's folder.
    """
    with locked(run.folder):
        held = record.read_run(other.folder)
        try:
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
