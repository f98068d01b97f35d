"""`deepkd gsnr`: the gradient signal-to-noise ratio of measured runs, as tables and a summary."""

from collections.abc import Iterable, Sequence
from itertools import combinations, pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

from ...errors import UserError
from ...gsnr import noise_floor
from ...run.checkpoint import write_text, write_whole
from ..shared import csv_text
from .figure import draw
from .windows import TITLES, Run, read_runs

ORDERINGS = (("tog", "tcg"), ("ncg", "tcg"))
"""The paper's finding: the first stream's GSNR is above the second's."""


def report(folders: Sequence[Path], out: Path) -> str:
    """Write the tables and the figure of runs into a folder; return the summary for the terminal.

    The runs are seeds of one experiment. Raises UserError if one was not measured, if they do not belong together,
    or if `out` cannot be written.
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


def write_tables(runs: Sequence[Run], out: Path) -> list[Path]:
    """Write gsnr.csv, gsnr_angles.csv and, if layers were measured, gsnr_layers.csv; return their paths.

    A number that does not exist (GSNR without a variance) is an empty field.
    """
    streams: list[dict[str, Any]] = []
    angles: list[dict[str, Any]] = []
    layers: list[dict[str, Any]] = []
    for run in runs:
        for window in run.windows:
            place = {"run": str(run.folder), "seed": run.seed}
            place |= {"epoch": window["epoch"], "iteration": window["iteration"]}
            noise = {f"noise_{name}": value for name, value in noise_floor(window["samples"]).items()}
            for stream, values in window["gsnr"].items():
                row = place | {"samples": window["samples"], "stream": stream}
                row |= {name: values[name] for name in ("mean", "ratio")} | noise
                # windows from before 0.2.0 have no count of what is not finite
                row |= {name: values.get(name) for name in ("norm", "zero_variance", "missing", "not_finite")}
                streams.append(row | {"momentum": window["momentum"][stream]})
            angles += [place | {"pair": pair, "degrees": value} for pair, value in window["angle"].items()]
            for layer, by_stream in window.get("layers", {}).items():
                for stream, values in by_stream.items():
                    row = place | {"layer": layer, "stream": stream}
                    layers.append(row | {name: values[name] for name in ("mean", "ratio")})
    written = []
    for name, rows in (("gsnr.csv", streams), ("gsnr_angles.csv", angles), ("gsnr_layers.csv", layers)):
        path = out / name
        if rows:
            write_text(path, csv_text(rows))
            written.append(path)
        else:  # may be there of runs that were drawn here before
            path.unlink(missing_ok=True)
    return written


def summarise(runs: Sequence[Run]) -> str:
    """Tell what checked runs measured, for the terminal: medians over all windows, orderings, angles."""
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
            counts = [_holds(windows, name, high, low) for name in TITLES]
            rows.append(("ordering", f"{high.upper()} > {low.upper()}", *counts))
    table = [f"{row[0]:10}{row[1]:20}{row[2]:24}{row[3]}" for row in rows]
    measured = (
        f"measured  {first.settings['DISTILLER.STUDENT']}, {len(windows)} window{'s' * (len(windows) > 1)} of "
        f"{windows[0]['samples']} samples, "
        f"{windows[0]['coordinates']} of {windows[0]['parameters']} coordinates, {seeds}"
    )
    lines = [measured, *table]
    if first.settings["SOLVER.DECOUPLED.ALLOCATION"] == "gsnr":
        lines += [f"{name:10}{text}" for name, text in swings(runs)]
    if first.pairs:
        angles = [f"{p.upper()} {_median((w['angle'][p] for w in windows), '.1f', '°')}" for p in first.pairs]
        lines.append(f"angles    {', '.join(angles)} (medians)")
    return "\n".join(lines)


def swings(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Say whether momenta that follow the GSNR settle: how far they move from window to window, and change places.

    Moves are means over runs and pairs of neighbouring windows, of all of them and of the second half of each run. Two
    streams change places if the one whose momentum was higher now has the lower one.
    """
    steps = [(run, list(pairwise(run.windows))) for run in runs]
    halves = {"all": [s for _, of in steps for s in of], "late": [s for _, of in steps for s in of[len(of) // 2 :]]}
    if not halves["all"]:
        return []

    def moved(stream: str, when: str) -> float:
        return fmean(abs(new["momentum"][stream] - old["momentum"][stream]) for old, new in halves[when])

    def exchanged(one: str, other: str, when: str) -> int:
        gaps = [[w["momentum"][one] - w["momentum"][other] for w in step] for step in halves[when]]
        return sum(old * new < 0 for old, new in gaps)

    streams = [stream for stream in runs[0].streams if stream != "feat"]
    moves = ", ".join(f"{s.upper()} {moved(s, 'all'):.3f} (late {moved(s, 'late'):.3f})" for s in streams)
    told = [("momenta", f"move by {moves} a window")]
    for one, other in combinations(streams, 2):
        counts = [f"{exchanged(one, other, when)} of {len(of)}" for when, of in halves.items()]
        told.append(("", f"{one.upper()} and {other.upper()} change places in {counts[0]} windows, late {counts[1]}"))
    return told


def _median(values: Iterable[float | None], form: str = ".4g", unit: str = "") -> str:
    numbers = [value for value in values if value is not None]
    return format(median(numbers), form) + unit if numbers else "none"


def _holds(windows: Sequence[dict[str, Any]], name: str, high: str, low: str) -> str:
    """Count the windows in which one stream's number is above another's, of those that have both."""
    pairs = [(window["gsnr"][high][name], window["gsnr"][low][name]) for window in windows]
    both = [(a, b) for a, b in pairs if a is not None and b is not None]
    return f"in {sum(a > b for a, b in both)} of {len(both)} windows"
