"""A run's folder: which files in it are the run's own, and what becomes of a run that is started again.

A run that is started over another one moves that one's files into the folder `replaced`, run.json first, and only then
writes its own run.json. So every moment tells what a killed process was about, and `settle` ends it: without a run.json
the files in `replaced` go back; with one, they go back too if the new run has no checkpoint yet, else they go.
"""

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..distributed import collectives, process_group
from ..distributed.environment import one_process
from ..errors import UserError
from . import checkpoint, lock, record

REPLACED = "replaced"
"""The folder in a run's folder that keeps the run of before until the new one has finished an epoch."""

COPYING = "copying"
"""What a run.json says for as long as another table's run is being copied to its side."""

CARD, CARD_MARK = "README.md", "<!-- deepkd_plugin wrote this file"
"""A run's model card, and what is in it until somebody makes it theirs."""

CHECKPOINTS = ("latest", "last_checkpoint")
"""What says that a run can be gone on with: ours, and detectron2's."""

_WHICH = r"(latest|best|\d+)"
_STATES = rf"latest|best|epoch_\d+|student_{_WHICH}(\.safetensors)?"
_EVENTS = r"(train|gsnr)\.events/events\.out\.tfevents\..+"
_FILES = re.compile(
    rf"{_STATES}|{_EVENTS}|config\.yaml|run\.json|metrics\.jsonl|gsnr\.jsonl|worklog\.txt|gsnr[\w.-]*\.csv|gsnr\.(png|svg)"
    rf"|README\.md|eval_{_WHICH}\.csv|confusion_{_WHICH}\.(png|svg)|student_{_WHICH}\.(onnx|pt2)"
)
_DETECTRON2S = re.compile(
    r"last_checkpoint|model_(\d{7}|final)\.pth|metrics\.json|events\.out\.tfevents\..+"
    r"|inference/(coco_instances_results\.json|instances_predictions\.pth)"
)
"""What a run may write in its folder, and what detectron2 writes there beside it."""

_FOLDERS = ("train.events", "gsnr.events", "inference")
"""The folders that a run may make in its own."""


@contextlib.contextmanager
def held(folder: Path, resume: bool, overwrite: bool, record_needed: bool = True) -> Iterator[None]:
    """Be the only process in a run's folder, which fits what is to be done there (`check`).

    What a killed process left is put in order first. If the block ends before a new run has a checkpoint, the run that
    was there before is back. Of several processes of one run the first does all this, and the others wait until the
    folder is theirs. Raises UserError before anything is changed.
    """
    if process_group.size() == 1:
        one_process()
    if process_group.rank():
        collectives.wait()
        yield
        return
    with lock.ours(folder):
        settle(folder)
        check(folder, resume, overwrite, record_needed)
        collectives.wait()
        try:
            yield
        finally:
            settle(folder)


def restarted(folder: Path, resume: bool, overwrite: bool) -> tuple[bool, bool]:
    """Return whether a run is resumed or overwritten, if its launcher starts it again after a process has failed.

    Then it goes on from `latest`, or begins again if there is none yet. A folder that no earlier attempt of this
    launcher has written to is treated as the flags say.
    """
    if process_group.launcher() and record.find_run(folder).get("launcher") == process_group.launcher():
        resume = (folder / CHECKPOINTS[0]).is_file()
        overwrite = not resume
    resumed, overwritten = collectives.from_first([resume, overwrite])
    return bool(resumed), bool(overwritten)


def check(folder: Path, resume: bool, overwrite: bool, record_needed: bool = True) -> None:
    """Raise UserError if a run cannot go on in its folder, or would end another one or touch files of others there.

    record_needed: False for the trainers of mdistiller, which write no run.json.
    """
    if resume:
        if not (folder / CHECKPOINTS[0]).is_file():
            raise UserError(f"{folder}: --resume finds no checkpoint 'latest' there; leave it out to start the run")
        if record_needed and not is_run(folder):
            raise UserError(
                f"{folder}: --resume finds no {record.FILE} of this package beside 'latest'; it must be there, "
                f"and be of that run"
            )
        return
    files = own_files(folder)
    proven = is_run(folder)
    holds_run = proven or any(path.name in (record.FILE, CHECKPOINTS[0]) for path in files)
    if holds_run and not overwrite:
        raise UserError(
            f"{folder}: holds a run already; go on with --resume, start again with --overwrite "
            f"(deepkd_plugin's launcher), or set EXPERIMENT.NAME"
        )
    if not record_needed:
        return
    if files and not proven:
        raise UserError(
            f"{folder}: holds {_names(files)}, and no {record.FILE} of this package says that they are its own; move "
            f"them away, or set EXPERIMENT.NAME"
        )
    linked = [path for path in files if path.is_symlink() or not path.is_file()]
    events = [folder / name for name in _FOLDERS[:2]]
    linked += [path for path in events if path.is_symlink() or (path.exists() and not path.is_dir())]
    if linked:
        raise UserError(
            f"{folder}: {_names(linked)} must be the run's own, and is a link or of another kind; move it away, or "
            f"set EXPERIMENT.NAME"
        )


def own_files(folder: Path) -> list[Path]:
    """List what is called like a file of a run, in its folder and in those that a run makes there; links included."""
    patterns = [_FILES, _DETECTRON2S] if "detection" in record.find_run(folder) else [_FILES]
    files = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        below = [folder / name for name in _FOLDERS if (folder / name).is_dir() and not (folder / name).is_symlink()]
        for path in sorted(path for place in (folder, *below) for path in place.iterdir()):
            name = path.relative_to(folder).as_posix()
            if any(pattern.fullmatch(name) for pattern in patterns) and (name != CARD or is_own_card(path)):
                files.append(path)
    return files


def is_own_card(path: Path) -> bool:
    """Tell whether a README.md is one that a run wrote, and nobody has taken that note out of it."""
    try:
        return CARD_MARK in path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False


def is_run(folder: Path) -> bool:
    """Tell whether a run.json proves that a folder holds a run of this package."""
    return {"config_hash", "finished"} <= record.find_run(folder).keys()


def left(folder: Path, name: str = CHECKPOINTS[0]) -> tuple[dict[str, Any], bool]:
    """Return the run.json of the run that `settle` would leave in a folder, and whether that has a file `name`."""
    replaced = (folder / REPLACED / record.FILE).exists() and not _is_begun(folder)
    places = [folder / REPLACED, folder] if replaced else [folder]
    run = record.find_run(places[0])
    return run, any((place / name).is_file() for place in places) and COPYING not in run


def set_aside(folder: Path) -> None:
    """Move the run in a folder, if there is one, to `replaced`, where it waits for the new run's first epoch.

    Raises UserError, with nothing moved, if there is something of somebody's in its place.
    """
    if not is_run(folder):
        return
    kept = folder / REPLACED
    if kept.is_symlink() or (kept.exists() and not kept.is_dir()) or own_files(kept):
        raise UserError(
            f"{kept}: --overwrite keeps the old run there for a while, and this is not of a run; move it "
            f"away, or set EXPERIMENT.NAME"
        )
    files = own_files(folder)
    if not record.find_run(folder)["finished"] and not any(re.fullmatch(_STATES, path.name) for path in files):
        _remove(files, folder)  # it was ended before its first epoch
        return
    print(f"{folder}: the run that is there is kept in {REPLACED}/ until the new one has finished an epoch")
    _move(files, folder, kept, first=True)


def settle(folder: Path) -> None:
    """End what was begun when a run took the place of another: see the top. Temporary files of killed writers go too.

    Only whoever has the folder's lock may do this.
    """
    _remove_temporaries(folder)
    before = folder / REPLACED
    if before.is_symlink() or not before.is_dir():
        return
    ours = (folder / record.FILE).exists()
    if is_run(before):  # else somebody else's
        if _is_begun(folder):
            _remove(own_files(before), before)
        else:
            if ours:
                _remove(own_files(folder), folder)
            _move(own_files(before), before, folder, first=False)
            print(f"{folder}: the run that was there before is back")
    _remove_empty(before)
    with contextlib.suppress(OSError):  # something of somebody's is in there
        before.rmdir()


def settle_new(folder: Path) -> None:
    """Remove what a run took the place of if it has finished an epoch and saved a checkpoint."""
    if _is_begun(folder):
        settle(folder)


def drop_states(folder: Path) -> None:
    """Remove the checkpoints and the student's weights of a run that nobody goes on with; its records stay."""
    for path in own_files(folder):
        if re.fullmatch(_STATES, path.name):
            path.unlink()


def _is_begun(folder: Path) -> bool:
    """Tell whether the run in a folder is worth more than the one whose place it took."""
    if not (folder / record.FILE).exists():
        return False
    run = record.find_run(folder)
    return COPYING not in run and (_has_checkpoint(folder) or bool(run.get("finished")))


def _has_checkpoint(folder: Path) -> bool:
    return any((folder / name).is_file() for name in CHECKPOINTS)


def _move(files: Sequence[Path], here: Path, there: Path, first: bool) -> None:
    """Move files from one folder to another; run.json goes first or last."""
    for path in sorted(files, key=lambda path: (path.name == record.FILE) != first):
        to = there / path.relative_to(here)
        to.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, to)
    _remove_empty(here)


def _remove(files: Sequence[Path], folder: Path) -> None:
    """Remove files, run.json last."""
    for path in sorted(files, key=lambda path: path.name == record.FILE):
        path.unlink()
    _remove_empty(folder)


def _remove_empty(folder: Path) -> None:
    for name in _FOLDERS:
        with contextlib.suppress(OSError):  # not there, or not empty
            (folder / name).rmdir()


def _remove_temporaries(folder: Path) -> None:
    for path, name, _ in checkpoint.temporaries(folder):
        if _FILES.fullmatch(name) and not path.is_symlink():
            path.unlink()


def _names(files: Sequence[Path]) -> str:
    more = f" and {len(files) - 3} more" if len(files) > 3 else ""
    return ", ".join(path.name for path in files[:3]) + more
