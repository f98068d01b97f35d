"""The windows of gradient samples that measured runs left, checked to belong together."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from ... import config
from ...config import file as config_file
from ...errors import UserError, shown
from ...gsnr import SUMMARIES
from ...run.metrics import GSNR

TITLES = {"ratio": "ratio of sums", "mean": "mean over coordinates"}
"""The two summaries of gsnr.py, in the order of the panels, and what they are called."""

NEEDED = ("SOLVER.SEED", "DATASET.TYPE", "DISTILLER.TYPE", "DISTILLER.TEACHER", "DISTILLER.STUDENT")
"""Keys that a run's config must have."""

MAY_DIFFER = (
    *("SOLVER.SEED", "SOLVER.EXECUTION", "SOLVER.GRADIENTS", "SOLVER.DETERMINISTIC"),
    *("SOLVER.CHANNELS_LAST", "DISTILLER.FOLD_TEACHER", "DATASET.NUM_WORKERS", "DATASET.PIPELINE"),
)
"""Keys in which runs that share a figure may differ: the seed, and how the same steps are taken."""


@dataclass(frozen=True)
class Run:
    """One measured run: its folder, its config by dotted path, and the windows of its gsnr.jsonl."""

    folder: Path
    settings: dict[str, Any]
    windows: list[dict[str, Any]]

    @property
    def seed(self) -> int:
        return self.settings["SOLVER.SEED"]

    @property
    def streams(self) -> list[str]:
        return list(self.windows[0]["gsnr"])

    @property
    def pairs(self) -> list[str]:
        return list(self.windows[0]["angle"])


def read_runs(folders: Iterable[Path]) -> list[Run]:
    """Read the runs of some folders; UserError if they are not different seeds of one experiment."""
    runs = [read_run(folder) for folder in folders]
    first = runs[0]
    seeds: dict[int, Path] = {}
    for run in runs:
        file = run.folder / "config.yaml"
        if run.seed in seeds:
            raise UserError(f"{file}: SOLVER.SEED is {run.seed}; it must be another than that of {seeds[run.seed]}")
        seeds[run.seed] = run.folder
        for key in sorted(first.settings.keys() | run.settings.keys()):
            value, wanted = run.settings.get(key), first.settings.get(key)
            if config.computes(key) and key not in MAY_DIFFER and value != wanted:
                raise UserError(f"{file}: {key} is {shown(value)}; it must be {shown(wanted)}, as in {first.folder}")
        for window in run.windows:
            for what, wanted in _measured(first.windows[0]).items():
                if (value := _measured(window)[what]) != wanted:
                    raise UserError(
                        f"{run.folder / GSNR}: {what} of iteration {window['iteration']} is {shown(value)}; it "
                        f"must be {shown(wanted)}, as in the first window of {first.folder}"
                    )
    return runs


def read_run(folder: Path) -> Run:
    """Read one run's config.yaml and gsnr.jsonl; UserError if either is missing or of another form."""
    path = folder / "config.yaml"
    try:
        settings = config.flatten(config_file.read(path))
        itemgetter(*NEEDED)(settings)
    except (UserError, AttributeError, KeyError) as error:
        reason = str(error).removeprefix(f"{path}: ") if isinstance(error, UserError) else f"it lacks {error}"
        raise UserError(f"{path}: must be the config of a run ({reason})") from None
    # for keys that are newer than the run; YAML has no tuples
    defaults = {k.path: list(k.default) if isinstance(k.default, tuple) else k.default for k in config.all_keys()}
    settings = defaults | settings
    path = folder / GSNR
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    windows = [_window(path, number, line) for number, line in enumerate(lines, 1)]
    if not windows:
        raise UserError(
            f"{path}: {'holds no window' if path.exists() else 'no such file'}; GSNR.MEASURE must be True in the run, "
            f"and GSNR.EVERY x GSNR.WINDOW of its iterations must be over"
        )
    return Run(folder, settings, windows)


def _measured(window: dict[str, Any]) -> dict[str, Any]:
    """Collect what windows must share if their numbers are to be compared."""
    names = {"streams": list(window["gsnr"]), "pairs": list(window["angle"])}
    return names | {key: window[key] for key in ("samples", "coordinates")}


def _window(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        window = json.loads(line)
        itemgetter("iteration", "epoch", "samples", "coordinates", "parameters")(window)
        dict(window["angle"])
        for stream, values in window["gsnr"].items():
            window["momentum"][stream]
            itemgetter(*SUMMARIES, "norm", "zero_variance", "missing")(values)
        for by_stream in window.get("layers", {}).values():
            for values in by_stream.values():
                itemgetter(*SUMMARIES)(values)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path}: line {number} must be the record of a window ({type(error).__name__}: {error})"
        ) from None
    return window
