"""The tables that can be reproduced: those of configs in folders, and ablations of DeepKD made of one of them."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ... import extensions
from ...config.tree import get
from ...data import source
from ...distillers import DISTILLERS, DeepKD, bases
from ...errors import UserError
from ...streams import STREAMS
from ...terminal import nearest
from ..calibration import MASS, mask_options, measure
from ..kinds import KINDS
from ..kinds.kind import Kind
from ..measures import CLASSIFICATION, DETECTRON2
from ..table import NOMASK, WEIGHTED, Cell, row_name, title

TEACHER = "teacher"
"""The config in a pair's folder that makes its teacher and is no row."""

DATASET = "glyphs100"
"""The data set of an ablation, unless another is asked for: the embedded one."""

_DELTAS = tuple(f"SOLVER.DECOUPLED.DELTA.{stream.upper()}" for stream in STREAMS)

Options = Callable[[Any], Sequence[str]]
"""Resolved config of a row's file -> KEY VALUE pairs that make the row of it."""


def fixed(*words: str) -> Options:
    """Return the same KEY VALUE pairs for every config."""
    return lambda cfg: words


_NOTHING = fixed()


@dataclass(frozen=True)
class Row:
    """A row of a table.

    name: on the command line and in folders. label: what it is called; None if the config says that, and the base with
    it. base: the row that its gain is taken over, None without one. defaults: options such that a user's own come
    before. config: its file's name in a pair's folder, without .yaml. twin: of a matched base, the config of DeepKD
    over it (matched.py).
    """

    name: str
    label: str | None = None
    base: str | None = None
    options: Options = _NOTHING
    defaults: Options = _NOTHING
    config: str = ""
    twin: str = ""


@dataclass(frozen=True)
class Outline:
    """What a table can have: its rows, and the pairs with configs for them.

    source: its folder of configs as the kind calls it; a path if it is a user's own. over: the base method of an
    ablation. varies: the config keys that tell an ablation's rows apart.
    """

    name: str
    source: str
    methods: tuple[Row, ...]
    over: str | None = None
    varies: tuple[str, ...] = ()
    kind: Kind = KINDS[CLASSIFICATION]

    @property
    def dataset(self) -> str:
        return Path(self.source).name

    @property
    def title(self) -> str:
        return title(self.name, self.dataset, self.over)

    @property
    def place(self) -> str:
        """Where its configs are, in words."""
        return self.kind.place(self.source)

    @property
    def pairs(self) -> tuple[str, ...]:
        """The pairs that have a config for one of the rows."""
        pairs = self.kind.pairs(self.source)
        return tuple(pair for pair in pairs if any(self.file(pair, method) for method in self.methods))

    @property
    def by_default(self) -> tuple[str, ...]:
        """The rows that are trained unless some are asked for: all, but in tables that ship not later methods'."""
        all_of_them = self.over is not None or os.path.isabs(self.source)
        return tuple(row.name for row in self.methods if all_of_them or not _later(row.config))

    def file(self, pair: str, method: Row) -> Path | None:
        """Name the config of a cell; None if the pair has none, or not what its options are taken from."""
        if method.twin and self.twin_file(pair, method) is None:
            return None
        return self.kind.file(self.source, pair, method.config)

    def twin_file(self, pair: str, method: Row) -> Path | None:
        """Name the config of a matched base's twin; None if the pair has none."""
        return self.kind.file(self.source, pair, method.twin)


def names() -> list[str]:
    """List every table's name."""
    return [*(name for kind in KINDS.values() for name in kind.tables()), *ABLATIONS]


def find(name: str, base: str | None = None, dataset: str | None = None) -> Outline:
    """Find the table of a name, or of a user's folder of configs.

    base, dataset: of an ablation, kd and glyphs100 unless they are given. Raises UserError for an unknown name, base
    or data set, and if something is not installed that the table needs.
    """
    extensions.load()  # users' own methods
    if name not in ABLATIONS:
        for flag, value in (("--base", base), ("--dataset", dataset)):
            if value is not None:
                raise UserError(
                    f"command line: {flag} is of the ablations ({', '.join(ABLATIONS)}); {name} must go without"
                )
        table = _table(name)
        table.kind.require()
        return table
    datasets, taken_apart = KINDS[CLASSIFICATION].tables(), [row_name(base) for base in bases()]
    over, source = base or taken_apart[0], _source("--dataset", dataset or DATASET, datasets)
    if over not in taken_apart:
        raise UserError(
            f"command line: --base is {over!r}; it must be one of {', '.join(taken_apart)}{nearest(over, taken_apart)}"
        )
    config = row_name(over, deepkd=True)
    varies, (first, *others) = ABLATIONS[name]
    rows = (replace(first, config=config), *(replace(row, config=config, base=first.name) for row in others))
    table = Outline(name, source, rows, over, varies)
    if not table.pairs:
        raise UserError(
            f"command line: --base is {over!r}; {table.place} must have a {config}.yaml for it, and has none"
        )
    return table


def choose(given: Sequence[str] | None, there: Sequence[str], flag: str) -> tuple[str, ...]:
    """Put the names given on the command line into the table's order; all without any. UserError for an unknown one."""
    unknown = [name for name in given or () if name not in there]
    if unknown:
        raise UserError(
            f"command line: {flag} is {unknown[0]!r}; it must be one of {', '.join(there)}{nearest(unknown[0], there)}"
        )
    return tuple(name for name in there if name in (given or there))


def label(method: Row, cfg: Any) -> str:
    """Say what a row is called, by its resolved config."""
    if method.label is not None:
        return method.label
    if cfg.DISTILLER.TYPE == "NONE":
        return "student alone"
    weighted = "" if cfg.DISTILLER.ENTROPY_WEIGHT == "none" else ", samples weighted by entropy"
    if not _is_deepkd(cfg):
        return f"{cfg.DISTILLER.TYPE}{weighted}"
    mask = {"none": "", "static": " + static mask", "dynamic": " + DTM", "top_p": " + top-p mask"}[cfg.DeepKD.MASK.TYPE]
    reading = " (multiply)" if mask and cfg.DeepKD.MASK.READING == "multiply" else ""
    variant = {"article": ", as in the article", "release": ", release's momenta"}.get(cfg.SOLVER.DECOUPLED.VARIANT, "")
    matched = ", matched steps" if cfg.SOLVER.DECOUPLED.DAMPENING == "matched" else ""
    feature = f" + {cfg.DeepKD.FEATURE}" if cfg.DeepKD.FEATURE != "none" else ""
    over = f"{cfg.DeepKD.BASE} + {cfg.DISTILLER.TYPE}"
    return f"{over}{mask}{reading}{feature}{variant}{matched}{weighted}"


def taken_apart(method: Row, cfg: Any) -> str | None:
    """Name the method that a row's config puts DeepKD over; None without one, and for rows that name their base."""
    return cfg.DeepKD.BASE if method.label is None and _is_deepkd(cfg) else None


def _later(config: str) -> bool:
    """Tell whether a config that ships is of a method that the article does not have, or of DeepKD over one."""
    later = [name for name, cls in DISTILLERS.items() if not getattr(cls, "by_default", True)]
    return config.endswith(WEIGHTED) or any(config in (row_name(name), row_name(name, deepkd=True)) for name in later)


def _is_deepkd(cfg: Any) -> bool:
    """Tell whether a config's method is DeepKD or a user's class over it."""
    return issubclass(DISTILLERS.get(cfg.DISTILLER.TYPE, object), DeepKD)


def base_rows(table: Outline, cfgs: Mapping[Cell, Any]) -> dict[str, str | None]:
    """Name each planned row's base: DeepKD's is the row that trains the method under it, whatever it is called.

    cfgs: the planned cells' configs. Of several such rows the one of the method's name counts, else the first. Raises
    UserError if a row puts DeepKD over one method for one pair and over another for another.
    """
    by_row = {row: [cfg for (_, name), cfg in cfgs.items() if name == row.name] for row in table.methods}
    over: dict[str, str] = {}
    for row, of_pairs in by_row.items():
        methods = {taken_apart(row, cfg) for cfg in of_pairs}
        if len(methods) > 1:
            raise UserError(
                f"{table.place}: {row.name} puts DeepKD over {' and '.join(sorted(map(str, methods)))}; a row must be "
                f"over one method for all pairs"
            )
        if of_pairs and (method := methods.pop()) and row.base is None:
            over[row.name] = method
    trained: dict[str, list[str]] = {}
    for row, of_pairs in by_row.items() if over else ():
        if cfg := of_pairs[0] if of_pairs else find_config(table, row):
            trained.setdefault(cfg.DISTILLER.TYPE, []).append(row.name)
    rows = {row.name: row.base for row in table.methods}
    for name, base in over.items():
        if there := trained.get(base):
            rows[name] = row_name(base) if row_name(base) in there else there[0]
    return rows


def find_config(table: Outline, method: Row) -> Any:
    """Read a row's config file, of the first pair that has one; None if it cannot be read."""
    for pair in table.pairs:
        if file := table.file(pair, method):
            try:
                return table.kind.read(file, [])
            except UserError:
                return None
    return None


def _table(name: str) -> Outline:
    """Find the table of configs of a name or a path."""
    kind = next((kind for kind in KINDS.values() if name in kind.tables()), KINDS[CLASSIFICATION])
    source = _source("TABLE", name, names())
    rows = _ON_DETECTRON2 if kind is KINDS[DETECTRON2] else _rows(kind, source)
    return Outline(Path(source).name, source, rows, kind=kind)


def _source(what: str, word: str, known: Sequence[str]) -> str:
    """Find a folder of configs by a word of the command line: a name of `known`, or the path of a user's own."""
    if word in known:
        return word
    path = Path(os.path.abspath(os.path.expanduser(word)))
    if not path.is_dir():
        raise UserError(
            f"command line: {what} is {word!r}; it must be one of {', '.join(known)}, or a folder of configs "
            f"PAIR/METHOD.yaml{nearest(word, known)}"
        )
    if not any(path.glob("*/*.yaml")):
        raise UserError(f"command line: {what} is {word!r}; it must hold configs PAIR/METHOD.yaml, and has none")
    return str(path)


def _rows(kind: Kind, source: str) -> tuple[Row, ...]:
    """Make a row of each config in the pairs' folders: the student alone, bases, DeepKD over them, others."""
    files = kind.configs(source) - {TEACHER}
    over = [row_name(base, deepkd=True) for base in bases()]
    order = ["vanilla", *map(row_name, bases()), *over, *(f"{name}{NOMASK}" for name in over)]
    ordered = [name for name in order if name in files] + sorted(files - set(order))
    return tuple(Row(name, config=name) for name in ordered)


def _theirs(kind: str, cfg: Any) -> list[str]:
    """Set mdistiller's own KD.TYPE, with the weight of ReviewKD's loss that DeepKD over it has."""
    deltas = [f"SOLVER.DECOUPLED.DELTA.{stream}" for stream in cfg.SOLVER.DECOUPLED.DELTA]
    return ["KD.TYPE", kind, *(word for path in deltas for word in (path, "0.0"))]


_ON_DETECTRON2 = (
    Row("kd", "KD", config="KD-{}"),
    Row("dkd", "DKD", config="DKD-{}"),
    Row("reviewkd", "ReviewKD", None, partial(_theirs, "ReviewKD"), config="ReviewDeepKD-{}"),
    Row("reviewdkd", "ReviewDKD", None, partial(_theirs, "ReviewDKD"), config="ReviewDeepKD-{}"),
    Row("deepkd_dkd_nodtm", "DKD + DeepKD", "dkd", config="DeepKD-{}-noDTM"),
    Row("deepkd_dkd", "DKD + DeepKD + DTM", "dkd", config="DeepKD-{}"),
    Row("deepkd_reviewdkd", "ReviewDKD + DeepKD + DTM", "reviewdkd", config="ReviewDeepKD-{}"),
)
"""The rows of COCO; a config's name has a place for the pair."""


def _momenta(variant: str, allocation: str = "fixed") -> list[str]:
    return ["SOLVER.DECOUPLED.VARIANT", variant, "SOLVER.DECOUPLED.ALLOCATION", allocation]


def _steps(dampening: str, decay: str = "variant") -> list[str]:
    return ["SOLVER.DECOUPLED.DAMPENING", dampening, "SOLVER.DECOUPLED.WEIGHT_DECAY_STREAM", decay]


def _calibrated(cfg: Any) -> list[str]:
    """Ask the teacher for K*, as `deepkd calibrate` does, whenever the table is planned: it is the same each time."""
    return mask_options(cfg, measure(cfg, MASS)[0])


def _deltas(size: float, cfg: Any) -> list[str]:
    """Give every delta of a config this size, and leave its sign."""
    return [word for path in _DELTAS for word in (path, str(_sign(get(cfg, path)) * size + 0.0))]


def _bounds(cfg: Any) -> list[str]:
    """Shorten deltas such that either end is a momentum; some recipes have -0.1, which is none upwards."""
    most = 0.99 * (1 - cfg.SOLVER.MOMENTUM)
    large = [path for path in _DELTAS if abs(get(cfg, path)) > most]
    return [word for path in large for word in (path, f"{_sign(get(cfg, path)) * most:g}")]


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _windows(cfg: Any) -> list[str]:
    """Make windows short enough that a run has ten of them, of at most the usual length.

    Ten measurements are few for momenta that follow them, and a short run's windows hold few samples: it shows
    that the allocation works, not how well.
    """
    iterations = source(cfg).steps(cfg) * cfg.SOLVER.EPOCHS
    window = min(cfg.GSNR.WINDOW, max(2, iterations // 10))
    every = min(cfg.GSNR.EVERY, max(1, iterations // (10 * window)))
    return ["GSNR.EVERY", str(every), "GSNR.WINDOW", str(window)]


MASKS = {
    f"static{percent}": (
        f"K = {percent} % of the classes",
        ("DeepKD.MASK.TYPE", "static", "DeepKD.MASK.K", str(percent / 100)),
    )
    for percent in (5, 10, 25, 50, 75)
} | {"dynamic": ("dynamic mask", ("DeepKD.MASK.TYPE", "dynamic"))}
"""Masks by name: what they are, and their options."""

TOP_P = ("DeepKD.MASK.TYPE", "top_p", "DeepKD.MASK.INITIAL", "0.5", "DeepKD.MASK.OPTIMAL", str(MASS))
"""The mask by each sample's own mass, with the share on which K* is calibrated."""

SWEEP = (0.0, 0.025, 0.05, 0.075, 0.099)
"""Sizes of Δ. The paper's range ends at 0.1, where MOMENTUM 0.9 plus it is a sum that never forgets, which the config
check refuses; at 0.099 a buffer averages 1,000 steps."""

PHASES = {
    "thirds": ("1/3, 2/3", (1 / 3, 2 / 3)),
    "no-easy": ("0, 1/2: no easy phase", (0.0, 0.5)),
    "no-hard": ("1/2, 1: no hard phase", (0.5, 1.0)),
    "middle-only": ("0, 1: K* throughout", (0.0, 1.0)),
    "early": ("1/6, 1/3", (1 / 6, 1 / 3)),
    "late": ("2/3, 5/6", (2 / 3, 5 / 6)),
    "long-middle": ("1/6, 5/6", (1 / 6, 5 / 6)),
}
"""Ends (φ1, φ2) of the dynamic mask's first two phases: rows' names, what they show, and the ends."""

ABLATIONS: dict[str, tuple[tuple[str, ...], Sequence[Row]]] = {
    "ablation-momentum": (
        ("SOLVER.DECOUPLED.VARIANT", "SOLVER.DECOUPLED.ALLOCATION"),
        [
            Row("none", "one momentum", options=lambda cfg: _momenta("paper") + _deltas(0.0, cfg)),
            Row("paper", "fixed, paper", options=fixed(*_momenta("paper"))),
            Row("release", "fixed, release", options=fixed(*_momenta("release"))),
            Row("gsnr", "by GSNR", None, lambda cfg: _momenta("paper", "gsnr") + _bounds(cfg), _windows),
        ],
    ),
    "ablation-steps": (
        ("SOLVER.DECOUPLED.DAMPENING", "SOLVER.DECOUPLED.WEIGHT_DECAY_STREAM"),
        [
            Row("none", "one momentum", options=lambda cfg: _steps("none") + _deltas(0.0, cfg)),
            Row("plain", "step length, decay and smoothing", options=fixed(*_steps("none"))),
            Row("decay", "decay matched: step length and smoothing", options=fixed(*_steps("none", "matched"))),
            Row("matched", "both matched: smoothing alone", options=fixed(*_steps("matched", "matched"))),
            Row("ema", "ema: steps of 1 - momentum", options=fixed(*_steps("ema"))),
        ],
    ),
    "ablation-mask": (
        ("DeepKD.MASK.TYPE", "DeepKD.MASK.K", "DeepKD.MASK.READING"),
        [
            Row("none", "no mask", options=fixed("DeepKD.MASK.TYPE", "none")),
            *(
                Row(f"{name}-{way}", f"{what}, {way}", options=fixed(*mask, "DeepKD.MASK.READING", way))
                for name, (what, mask) in MASKS.items()
                for way in ("renormalise", "multiply")
            ),
        ],
    ),
    "ablation-calibration": (
        ("DeepKD.MASK.TYPE", "DeepKD.MASK.OPTIMAL", "DeepKD.MASK.INITIAL"),
        [
            Row("none", "no mask", options=fixed("DeepKD.MASK.TYPE", "none")),
            Row("fixed", "K* by hand", options=fixed("DeepKD.MASK.TYPE", "dynamic")),
            Row("calibrated", f"K* that holds {MASS:.0%} of the teacher's mass on average", options=_calibrated),
            Row("sample", f"top-p: {MASS:.0%} of each sample's mass", options=fixed(*TOP_P)),
        ],
    ),
    "ablation-delta": (
        _DELTAS,
        [Row(f"delta{size:g}", f"|Δ| = {size:g}", options=partial(_deltas, size)) for size in SWEEP],
    ),
    "ablation-phases": (
        ("DeepKD.MASK.TYPE", "DeepKD.MASK.PHASES"),
        [
            Row(name, f"φ = {what}", options=fixed("DeepKD.MASK.TYPE", "dynamic", "DeepKD.MASK.PHASES", str(ends)))
            for name, (what, ends) in PHASES.items()
        ],
    ),
}
"""The keys that an ablation varies, and its rows, of the base's DeepKD config; gains are over the first."""
