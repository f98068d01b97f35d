"""The gradient signal-to-noise ratio of measured runs: tables and summary, for `deepkd gsnr`."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from . import config
from .checkpoint import write_whole
from .errors import UserError
from .gsnr import SUMMARIES, noise_floor
from .gsnr_figure import TITLES, draw
from .metrics import GSNR

ORDERINGS = (("tog", "tcg"), ("ncg", "tcg"))
"""The paper's finding: the first stream's GSNR is above the second's."""

MAY_DIFFER = (
    "SOLVER.SEED",
    "SOLVER.EXECUTION",
    "SOLVER.GRADIENTS",
    "DATASET.NUM_WORKERS",
    "DATASET.PIPELINE",
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


def report(folders: Sequence[Path], out: Path) -> str:
    """Write the tables and the figure of runs into a folder; returns the summary for the terminal.

    The runs are seeds of one experiment. Raises UserError where one was not measured, where they do not
    belong together, and where `out` cannot be written.
    """
    runs = read_runs(folders)
    figure = draw(runs)
    try:
        out.mkdir(parents=True, exist_ok=True)
        files = write_tables(runs, out)
        files += [out / "gsnr.png", out / "gsnr.svg"]
        write_whole(files[-2], lambda file: figure.savefig(file, format="png", dpi=200))
        write_whole(files[-1], lambda file: figure.savefig(file, format="svg", metadata={"Date": None}))
    except OSError as error:
        raise UserError(f"{out}: must be a folder that can be written ({error})") from None
    return f"{summarise(runs)}\nfiles     {out}/ ({', '.join(path.name for path in files)})"


def read_runs(folders: Iterable[Path]) -> list[Run]:
    """The runs of some folders, checked to be different seeds of one experiment; UserError otherwise."""
    runs = [read_run(folder) for folder in folders]
    first = runs[0]
    seeds: dict[int, Path] = {}
    for run in runs:
        file = run.folder / "config.yaml"
        if run.seed in seeds:
            raise UserError(
                f"{file}: SOLVER.SEED is {run.seed}; it must be another than that of {seeds[run.seed]}"
            )
        seeds[run.seed] = run.folder
        for key in sorted(first.settings.keys() | run.settings.keys()):
            held, wanted = run.settings.get(key), first.settings.get(key)
            if config.computes(key) and key not in MAY_DIFFER and held != wanted:
                raise UserError(f"{file}: {key} is {held!r}; it must be {wanted!r}, as in {first.folder}")
        for window in run.windows:
            for what, wanted in _measured(first.windows[0]).items():
                if (held := _measured(window)[what]) != wanted:
                    raise UserError(
                        f"{run.folder / GSNR}: {what} of iteration {window['iteration']} is {held!r}; it "
                        f"must be {wanted!r}, as in the first window of {first.folder}"
                    )
    return runs


def read_run(folder: Path) -> Run:
    """One run's config.yaml and gsnr.jsonl; UserError where either is missing or of another form."""
    path = folder / "config.yaml"
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        settings = config.flatten(tree)
        for key in (
            "SOLVER.SEED",
            "DATASET.TYPE",
            "DISTILLER.TYPE",
            "DISTILLER.TEACHER",
            "DISTILLER.STUDENT",
        ):
            settings[key]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, KeyError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"{path}: must be the config of a run ({reason})") from None
    # of keys that are newer than the run; YAML has no tuples
    defaults = {k.path: list(k.default) if isinstance(k.default, tuple) else k.default for k in config.KEYS}
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


def _window(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        window = json.loads(line)
        for key in ("iteration", "epoch", "samples", "coordinates", "parameters"):
            window[key]
        dict(window["angle"])
        for stream, values in window["gsnr"].items():
            window["momentum"][stream]
            for key in (*SUMMARIES, "norm", "zero_variance", "missing"):
                values[key]
        for by_stream in window.get("layers", {}).values():
            for values in by_stream.values():
                for key in SUMMARIES:
                    values[key]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: line {number} must be the record of a window ({type(error).__name__}: {error})"
        ) from None
    return window


def _measured(window: dict[str, Any]) -> dict[str, Any]:
    """What windows must share so that their numbers can be compared."""
    names = {"streams": list(window["gsnr"]), "pairs": list(window["angle"])}
    return names | {key: window[key] for key in ("samples", "coordinates")}


def write_tables(runs: Sequence[Run], out: Path) -> list[Path]:
    """Write gsnr.csv, gsnr_angles.csv and, where layers were measured, gsnr_layers.csv; returns their paths.

    A number that does not exist (GSNR without a variance) is an empty field.
    """
    streams: list[dict[str, Any]] = []
    angles: list[dict[str, Any]] = []
    layers: list[dict[str, Any]] = []
    for run in runs:
        for window in run.windows:
            at = {"run": str(run.folder), "seed": run.seed}
            at |= {"epoch": window["epoch"], "iteration": window["iteration"]}
            noise = {f"noise_{name}": value for name, value in noise_floor(window["samples"]).items()}
            for stream, values in window["gsnr"].items():
                row = at | {"samples": window["samples"], "stream": stream}
                row |= {name: values[name] for name in ("mean", "ratio")} | noise
                row |= {name: values[name] for name in ("norm", "zero_variance", "missing")}
                streams.append(row | {"momentum": window["momentum"][stream]})
            angles += [at | {"pair": pair, "degrees": value} for pair, value in window["angle"].items()]
            for layer, by_stream in window.get("layers", {}).items():
                for stream, values in by_stream.items():
                    row = at | {"layer": layer, "stream": stream}
                    layers.append(row | {name: values[name] for name in ("mean", "ratio")})
    written = []
    for name, rows in (("gsnr.csv", streams), ("gsnr_angles.csv", angles), ("gsnr_layers.csv", layers)):
        path = out / name
        if rows:
            _write_table(rows, path)
            written.append(path)
        else:  # one of runs that were drawn here before
            path.unlink(missing_ok=True)
    return written


def _write_table(rows: list[dict[str, Any]], path: Path) -> None:
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_whole(path, lambda file: file.write(text.getvalue().encode()))


def summarise(runs: Sequence[Run]) -> str:
    """What checked runs measured, for the terminal: medians over all windows, orderings, angles."""
    first = runs[0]
    windows = [window for run in runs for window in run.windows]
    noise = noise_floor(windows[0]["samples"])
    seeds = f"seed{'s' if len(runs) > 1 else ''} {', '.join(str(run.seed) for run in runs)}"
    rows = [("GSNR", "median of windows", *TITLES.values())]
    for stream in first.streams:
        medians = [_median(window["gsnr"][stream][name] for window in windows) for name in TITLES]
        rows.append(("", stream.upper(), *medians))
    rows.append(("", "noise alone", *(f"{noise[name]:.4g}" for name in TITLES)))
    for high, low in ORDERINGS:
        if {high, low} <= set(first.streams):
            held = [_holds(windows, name, high, low) for name in TITLES]
            rows.append(("ordering", f"{high.upper()} > {low.upper()}", *held))
    table = [f"{row[0]:10}{row[1]:20}{row[2]:24}{row[3]}" for row in rows]
    measured = (
        f"measured  {first.settings['DISTILLER.STUDENT']}, {len(windows)} window{'s' * (len(windows) > 1)} of "
        f"{windows[0]['samples']} samples, "
        f"{windows[0]['coordinates']} of {windows[0]['parameters']} coordinates, {seeds}"
    )
    lines = [measured, *table]
    if first.pairs:
        angles = [f"{p.upper()} {_median((w['angle'][p] for w in windows), '.1f', '°')}" for p in first.pairs]
        lines.append(f"angles    {', '.join(angles)} (medians)")
    return "\n".join(lines)


def _median(values: Iterable[float | None], form: str = ".4g", unit: str = "") -> str:
    held = [value for value in values if value is not None]
    return format(median(held), form) + unit if held else "none"


def _holds(windows: Sequence[dict[str, Any]], name: str, high: str, low: str) -> str:
    """In how many of the windows that have both numbers one stream's is above another's."""
    pairs = [(window["gsnr"][high][name], window["gsnr"][low][name]) for window in windows]
    both = [(a, b) for a, b in pairs if a is not None and b is not None]
    return f"in {sum(a > b for a, b in both)} of {len(both)} windows"
