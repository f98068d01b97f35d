"""What a search leaves beside its storage: the chosen configs, every trial, and pictures of what mattered."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from ... import data
from ...config import file as config_file
from ...config.tree import get
from ...errors import UserError
from ...run.checkpoint import write_text, write_whole
from ..kinds import KINDS
from ..measures import CLASSIFICATION
from ..report.figures import COLOURS, PAGE_STYLE, WIDTH
from ..shared import count, csv_text
from .plan import Tuning
from .search import OPTIONS, SEEDS, WIDENED, Search, names, outcome
from .space import TYPE, Space

ACROSS = 3
"""Panels in a row of a picture."""

HELD_OUT = "held-out top-1 (%)"


def write(tuning: Tuning, searches: Sequence[Search]) -> list[Path]:
    """Write trials.csv, and for each method with a result its config and its picture, and report.md.

    Returns the files. Raises UserError if one cannot be written.
    """
    out, chosen = tuning.out, [search for search in searches if search.best is not None]
    texts = {"trials.csv": csv_text(rows(searches)), "report.md": report(tuning, searches)}
    texts |= {f"tuned/{tuning.pair}/{search.method}.yaml": tuned(tuning, search) for search in chosen}
    try:
        (out / "tuned" / tuning.pair).mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            write_text(out / name, text)
        for search in chosen:
            draw(search, out / f"{search.method}.svg")
    except OSError as error:
        raise UserError(f"{out}: --out must be a folder that can be written ({error})") from None
    return [out / name for name in (*texts, *(f"{search.method}.svg" for search in chosen))]


def rows(searches: Sequence[Search]) -> list[dict[str, Any]]:
    """List every trial of every method: what became of it, its result and what it tried."""
    searched = names(searches)
    return [
        {
            "method": search.method,
            "trial": trial.number,
            "ranges": "wider" if trial.user_attrs.get(WIDENED) else "first",
            "outcome": outcome(trial),
            "epochs": max(trial.intermediate_values, default=0),
            "held_out": trial.value if trial.state.name == "COMPLETE" else None,
            "last_seen": trial.intermediate_values[max(trial.intermediate_values)]
            if trial.intermediate_values
            else None,
            "seeds": " ".join(f"{value:.2f}" for value in trial.user_attrs.get(SEEDS, ())),
            **{name: trial.params.get(name) for name in searched},
            "options": " ".join(trial.user_attrs.get(OPTIONS, ())),
        }
        for search in searches
        for trial in search.trials
    ]


def tuned(tuning: Tuning, search: Search) -> str:
    """Write a method's config with the values of its best trial, for all of the training images."""
    best = search.best
    kind, file = KINDS[CLASSIFICATION], tuning.files[search.method]
    words = [*tuning.request.options, *best.user_attrs[OPTIONS]]
    cfg, tree = kind.read(file, words), config_file.read(file)
    for key in words[::2]:
        config_file.put(tree, key, get(cfg, key))
    tree.get("DATASET", {}).pop("HOLDOUT", None)
    space = search.space
    held_out = data.source(cfg).images(tuning.cfgs[search.method])[1]
    lines = [
        f"# {search.method}, chosen by deepkd tune: trial {best.number}, the best of {len(search.trials)}, with "
        f"{best.value:.2f} % top-1",
        f"# of {held_out} held-out training images ({count(tuning.request.seeds, 'seed')}).",
        *(f"# {text}" for text in at_edges(search, space)),
    ]
    return "\n".join(lines) + "\n" + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def at_edges(search: Search, space: Space) -> list[str]:
    """Say which values of the best trial are at an end of their range, and what was done about it."""
    best, widened = search.best, search.study.user_attrs.get(WIDENED, {})
    lines = []
    for name, edge in space.edges(best.params).items():
        range_ = space.ranges[name]
        end = range_.low if edge == "lower" else range_.high
        limit = range_.least if edge == "lower" else range_.most
        if math.isclose(end, limit, abs_tol=1e-12):
            why = "it goes no further"
        elif name in widened:
            why = "it was widened once; a search of other --rates, or by hand, may find better"
        else:
            why = "it was not widened: the first trials' best was elsewhere, or all trials were of the first ranges"
        lines.append(f"{range_.label} {best.params[name]:.3g} is at the {edge} end of its range, {end:.3g}: {why}.")
    return lines


def report(tuning: Tuning, searches: Sequence[Search]) -> str:
    """Write the search in words, for people."""
    request, cfg = tuning.request, next(iter(tuning.cfgs.values()))
    train, tested = data.source(cfg).images(cfg)
    lines = [
        f"# {tuning.pair} on {cfg.DATASET.TYPE}: chosen on held-out images",
        "",
        f"Every method had {count(request.budget, 'trial')} of {count(request.seeds, 'seed')} each, on {train} images, "
        f"and was judged by the top-1 of its last epoch on {tested} others of the training set. No test image was "
        f"read. Trial 0 is the config as it stands. The chosen trial is the best of many, so its figure is too high: "
        f"measure it with `deepkd reproduce {shlex.quote(str(tuning.out / 'tuned'))}`. `trials.csv` has every trial.",
        "",
        "| method | trials | completed | pruned | diverged | as it stood | chosen | chosen trial |",
        "|---|---|---|---|---|---|---|---|",
        *map(_row, searches),
        "",
    ]
    for search in searches:
        lines += [f"## {search.method}", ""]
        if search.best is None:
            lines += ["No trial has a result, so nothing was chosen.", ""]
            continue
        options = search.best.user_attrs[OPTIONS]
        pairs = [f"`{key} {value}`" for key, value in zip(options[::2], options[1::2])]
        lines += [f"Chosen: {', '.join(pairs) or 'the config as it stands'}.", *_widened(search)]
        lines += [*at_edges(search, search.space), "", f"![What mattered]({search.method}.svg)", ""]
    return "\n".join(lines)


def _row(search: Search) -> str:
    ends = [outcome(trial) for trial in search.trials]
    as_it_stood = next((trial for trial in search.trials if trial.params.items() <= search.narrow.own.items()), None)
    results = map(_result, (as_it_stood, search.best))
    numbers = [str(ends.count(name)) for name in ("complete", "pruned", "diverged")]
    which = "–" if search.best is None else str(search.best.number)
    return f"| {' | '.join([search.method, str(len(ends)), *numbers, *results, which])} |"


def _result(trial: Any) -> str:
    """Write a trial's result, or what became of it without one."""
    if trial is None:
        return "–"
    return f"{trial.value:.2f}" if trial.state.name == "COMPLETE" else outcome(trial)


def _widened(search: Search) -> list[str]:
    ends: Mapping[str, Sequence[float]] = search.study.user_attrs.get(WIDENED, {})
    return [
        f"The range of {search.narrow.ranges[name].label} was widened once, to {low:.3g} … {high:.3g}: the best of the "
        f"first trials was at its end."
        for name, (low, high) in ends.items()
    ]


@style.context(PAGE_STYLE)
def draw(search: Search, path: Path) -> None:
    """Draw every trial's result by each of the values that were searched, an SVG.

    A filled mark has a result; a hollow one was pruned, and is where it was then; the chosen one has a ring.
    """
    shown = [name for name in search.narrow.own if any(name in trial.params for trial in search.trials)]
    across, down = min(len(shown), ACROSS), math.ceil(len(shown) / ACROSS)
    figure = Figure(figsize=(across * WIDTH / 100, down * WIDTH / 110), layout="constrained")
    panels = list(figure.subplots(down, across, squeeze=False, sharey=True).flat)
    shares = search.importances()
    for axes, name in zip(panels, shown):
        _panel(axes, search, name, shares.get(name))
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    figure.supylabel(HELD_OUT, fontsize="medium", color=COLOURS["quiet"])
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    write_whole(path, lambda file: figure.savefig(file, format="svg", metadata=nothing))


def _panel(axes: Axes, search: Search, name: str, share: float | None) -> None:
    range_ = search.space.ranges.get(name)
    trials = [trial for trial in search.trials if name in trial.params and trial.intermediate_values]
    for trial in trials:
        done = trial.state.name == "COMPLETE"
        value = trial.value if done else trial.intermediate_values[max(trial.intermediate_values)]
        fill = COLOURS["blue"] if done else "none"
        colour = COLOURS["blue"] if done else COLOURS["quiet"]
        axes.plot(trial.params[name], value, "o", markersize=5, color=colour, markerfacecolor=fill)
        if trial.number == search.best.number:
            axes.plot(trial.params[name], value, "o", markersize=11, color=COLOURS["red"], markerfacecolor="none")
    if range_ is not None and range_.log:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    label = "type of mask" if name == TYPE else range_.label if range_ is not None else name
    axes.set_xlabel(label if share is None else f"{label}: {share:.0%}", color=COLOURS["ink"])
