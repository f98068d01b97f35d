"""A run's folder and its run.json: which code, config and machine its numbers come from. Only this module reads it."""

import hashlib
import json
import platform
import subprocess
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .. import config, device, extensions
from ..config.file import without_aliases
from ..distributed import process_group
from ..errors import UserError
from . import checkpoint

FILE = "run.json"
"""The record's file in a run's folder."""

RECORDED = ("torch", "torchvision", "numpy", "pillow", "matplotlib", "yacs", "tensorboardX", "deepkd_plugin")
"""Distributions whose versions are written down."""

BITWISE = ("device", "processor", "versions", "code", "processes")
"""What must stay as it was for a run that goes on to end with the same weights."""

PACKAGE = Path(__file__).parents[1]
"""The package's own folder, whose code is hashed."""

APART = ("study/", "students/", "commands/", "card.py", "detection/detectron2/merge.py")
"""Files and folders of the package that start runs and read what they left, and change nothing in them."""


def prepare_folder(
    folder: Path,
    cfg: Any,
    torch_device: torch.device,
    command: str,
    resume: bool,
    teacher: str | None,
    teacher_acc: float | None,
    classes: dict[str, str],
    changed: Mapping[str, Any] | None = None,
    epoch: int = 0,
) -> None:
    """Write a run's resolved config and run.json into its folder; of one that goes on, only a note into run.json.

    teacher, teacher_acc: the teacher's fingerprint and its top-1 in percent, None without one. classes: where
    the code of student and distiller is from, which tells the host. changed: keys that a run goes on with other values
    of, before and now; epoch: how many it has done. One that goes on takes the number of threads that it began with.
    Raises UserError if the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        before = read_run(folder) if resume else {}
        if resume and not _is_of(before, cfg, teacher):
            raise UserError(
                f"{folder / FILE}: --resume needs the record of this run, and it is another's or was changed; put it "
                f"back, or start again with --overwrite"
            )
        device.use_threads(before.get("threads"))
        machine = {
            "device": device.describe(torch_device),
            "threads": torch.get_num_threads(),
            "processor": processor(),
            "python": platform.python_version(),
            "versions": versions(cfg) | device.settings(torch_device),
            "commit": commit(),
            "package": str(PACKAGE),
            "code": code_hash(),
            "classes": classes,
            "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        if process_group.size() > 1:
            machine["processes"] = process_group.size()
        started_by = {} if process_group.launcher() is None else {"launcher": process_group.launcher()}
        if resume:
            others = [name for name in BITWISE if machine.get(name) != before.get(name)]
            if others:
                print(f"{folder}: goes on with another {', '.join(others)}: no longer bitwise the uninterrupted run")
            session = machine | ({"changed": dict(changed), "after": epoch} if changed else {})
            note(folder, {"resumed": [*before.get("resumed", []), session], "finished": False} | started_by)
            return
        run = {"command": command, "config_hash": config_hash(cfg), "seed": cfg.SOLVER.SEED}
        run |= {"teacher": teacher, "teacher_acc": teacher_acc, "minutes": 0.0, "finished": False}
        # first, because it says whose the other files are
        write_run(folder, run | machine | started_by)
        checkpoint.write_text(folder / "config.yaml", without_aliases(cfg.dump()))
    except OSError as error:
        raise UserError(f"{folder}: LOG.PREFIX must name a folder that can be written ({error})") from None


def _is_of(run: Mapping[str, Any], cfg: Any, teacher: str | None) -> bool:
    """Tell whether a run.json can be that of a run, and holds what going on needs."""
    threads, minutes = run.get("threads"), run.get("minutes")
    return (
        (run.get("seed"), run.get("teacher")) == (cfg.SOLVER.SEED, teacher)
        and (threads is None or (type(threads) is int and 0 < threads <= 10_000))
        and type(minutes) in (int, float)
        and isinstance(run.get("resumed", []), list)
    )


def config_hash(cfg: Any) -> str:
    """Hash every key that says what a run computes."""
    return hashlib.sha256(json.dumps(config.comparable(config.flatten(cfg)), sort_keys=True).encode()).hexdigest()[:16]


def code_hash(package: Path | None = None) -> str:
    """Hash the package's .py files, every one that can change what a run computes, and users' own.

    package: its folder; by default this one, as it was when this process began. Those of APART are left out, so that
    a report may be mended without parting the runs of before from those of after.
    """
    if package is None:
        extensions.load()
        own = extensions.contents()
        return hashlib.sha256(repr((_LOADED, own)).encode()).hexdigest()[:16] if own else _LOADED
    digest = hashlib.sha256()
    files = {path.relative_to(package).as_posix(): path for path in package.rglob("*.py")}
    for name in sorted(files):
        if not name.startswith(APART):
            content = files[name].read_bytes()
            digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


_LOADED = code_hash(PACKAGE)
# read with the modules, because files may be edited while a run loads its data


def add_minutes(folder: Path, minutes: float) -> float:
    """Add a session's training time to a run's, and return the sum."""
    total = read_run(folder)["minutes"] + minutes
    note(folder, {"minutes": round(total, 2)})
    return total


def note(folder: Path, entries: dict[str, Any]) -> None:
    """Add entries to a run's run.json."""
    write_run(folder, read_run(folder) | entries)


def read_run(folder: Path) -> dict[str, Any]:
    """Read a run's run.json; UserError if there is none, or something else than a record in it."""
    path = folder / FILE
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: must be the record of a run ({error})") from None
    if not isinstance(run, dict):
        raise UserError(f"{path}: must be the record of a run (it holds a {type(run).__name__})")
    return run


def find_run(folder: Path) -> dict[str, Any]:
    """Read a run's run.json; {} if there is none that can be read."""
    try:
        return read_run(folder)
    except UserError:
        return {}


def processes(run: Mapping[str, Any]) -> tuple[int, ...]:
    """Return how many processes trained a run, by its run.json; several numbers if it went on in another."""
    sessions = (run, *run.get("resumed", ()))
    return tuple(dict.fromkeys(int(session.get("processes", 1)) for session in sessions))


def write_run(folder: Path, run: dict[str, Any]) -> None:
    """Write a run's run.json, whole or not at all."""
    text = json.dumps(run, indent=2) + "\n"
    checkpoint.write_whole(folder / FILE, lambda file: file.write(text.encode()))


def commit(folder: Path = PACKAGE, file: str = "launch.py") -> str:
    """Name the commit of the checkout that `folder` is in, with "+" if it was changed since; "unknown" without one.

    file: one of the folder's own, which that checkout must track: an installed package may be in another
    project's checkout.
    """
    try:
        ours = ["git", "-C", str(folder), "ls-files", "--error-unmatch", file]
        subprocess.run(ours, capture_output=True, check=True)
        describe = ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(describe, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions(cfg: Any) -> dict[str, str]:
    """Give the versions of what a run computes with: also of timm, if its config has a network of it or RandAugment."""
    keys = config.flatten(cfg)
    networks = [keys.get("DISTILLER.STUDENT"), keys.get("DISTILLER.TEACHER")]
    networks += [one["TEACHER"] for one in keys.get("DISTILLER.MORE_TEACHERS", ())]
    of_timm = any(str(name).startswith("timm:") for name in networks)
    of_timm = of_timm or bool(keys.get("AUGMENT.RANDAUGMENT"))
    return {name: version_of(name) for name in (*RECORDED, *(["timm"] if of_timm else []))}


def processor() -> str:
    """Name the processor, if the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def version_of(name: str, without: str = "not installed") -> str:
    """Give the version of an installed distribution, or another text without one."""
    try:
        return version(name)
    except PackageNotFoundError:
        return without
