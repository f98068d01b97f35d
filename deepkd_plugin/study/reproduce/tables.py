"""The tables that can be reproduced: the shipped configs', and ablations of DeepKD made of one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...config.tree import get
from ...data.sizes import steps
from ...errors import UserError
from ...streams import STREAMS
from ..kinds import KINDS
from ..kinds.kind import Kind
from ..measures import CLASSIFICATION, DETECTION, DETECTRON2

METHODS = (
    *("vanilla", "kd", "dkd", "mlkd", "crld"),
    *("deepkd", "deepkd_dkd", "deepkd_mlkd", "deepkd_crld"),
)
"""The order of a table's rows; other config files follow."""

TEACHER = "teacher"
"""The config in a pair's folder that makes its teacher and is no row."""

BASES = ("kd", "dkd", "mlkd", "crld")
"""What DeepKD can be put over."""

COCO = "coco"
"""The table of mdistiller's detectors; of COCO under this package's own, configs/detection may have others."""

DATASET = "glyphs100"
"""The data set of an ablation, unless another is asked for: the embedded one."""

_DELTAS = tuple(f"SOLVER.DECOUPLED.DELTA.{stream.upper()}" for stream in STREAMS)


def _nothing(cfg: Any) -> list[str]:
    return []


@dataclass(frozen=True)
class Method:
    """A row of a table.

    name: on the command line and in folders. config: its file's name in a pair's folder, without .yaml. base: the
    row that its gain is taken over, None without one. label: None where the config says it (see label()).
    options: resolved config of the file -> KEY VALUE pairs that make the row of it. defaults: such that a user's
    own come before.
    """

    name: str
    config: str
    base: str | None = None
    label: str | None = None
    options: Callable[[Any], list[str]] = _nothing
    defaults: Callable[[Any], list[str]] = _nothing


@dataclass(frozen=True)
class Table:
    """A table: its rows, and the pairs that have configs for them.

    over: the base method of an ablation. varies: the config keys that tell an ablation's rows apart.
    """

    name: str
    dataset: str
    methods: tuple[Method, ...]
    over: str | None = None
    varies: tuple[str, ...] = ()
    kind: Kind = KINDS[CLASSIFICATION]

    @property
    def title(self) -> str:
        """The name; an ablation's with what it is of."""
        return self.name if self.over is None else f"{self.name} over {self.over} on {self.dataset}"

    @property
    def place(self) -> str:
        """Where its configs lie, in words."""
        return self.kind.place(self.dataset)

    @property
    def pairs(self) -> tuple[str, ...]:
        """The pairs that have a config for one of the rows."""
        pairs = self.kind.pairs(self.dataset)
        return tuple(pair for pair in pairs if any(self.file(pair, method) for method in self.methods))

    def file(self, pair: str, method: Method) -> Path | None:
        """The config of a cell; None where the pair has none."""
        return self.kind.file(self.dataset, pair, method.config)


def names() -> list[str]:
    """Every table's name."""
    return [*_datasets(), *_detection(), COCO, *ABLATIONS]


def find(name: str, base: str | None = None, dataset: str | None = None) -> Table:
    """The table of a name; base and dataset, of an ablation, are kd and glyphs100 unless they are given.

    Raises UserError for an unknown name, base or data set, and where what a table needs is not installed.
    """
    if name not in names():
        raise UserError(f"command line: TABLE is {name!r}; it must be one of {', '.join(names())}")
    if name not in ABLATIONS:
        for flag, value in (("--base", base), ("--dataset", dataset)):
            if value is not None:
                raise UserError(
                    f"command line: {flag} is of the ablations ({', '.join(ABLATIONS)}); {name} must go without"
                )
        table = _table(name)
        table.kind.require()
        return table
    over, dataset = base or BASES[0], dataset or DATASET
    if over not in BASES:
        raise UserError(f"command line: --base is {over!r}; it must be one of {', '.join(BASES)}")
    if dataset not in _datasets():
        raise UserError(f"command line: --dataset is {dataset!r}; it must be one of {', '.join(_datasets())}")
    config = "deepkd" if over == "kd" else f"deepkd_{over}"
    rows, varies = ABLATIONS[name]
    table = Table(name, dataset, rows(config), over, varies)
    if not table.pairs:
        raise UserError(
            f"command line: --base is {over!r}; configs/{dataset} must have a {config}.yaml for it, and has none"
        )
    return table


def choose(given: Sequence[str] | None, there: Sequence[str], flag: str) -> tuple[str, ...]:
    """The names given on the command line, in the table's order; all without any. UserError for an unknown one."""
    unknown = [name for name in given or () if name not in there]
    if unknown:
        raise UserError(f"command line: {flag} is {unknown[0]!r}; it must be one of {', '.join(there)}")
    return tuple(name for name in there if name in (given or there))


def label(method: Method, cfg: Any) -> str:
    """What a row is called, by its resolved config."""
    if method.label is not None:
        return method.label
    if cfg.DISTILLER.TYPE == "NONE":
        return "student alone"
    if cfg.DISTILLER.TYPE != "DeepKD":
        return cfg.DISTILLER.TYPE
    mask = {"none": "", "static": " + static mask", "dynamic": " + DTM"}[cfg.DeepKD.MASK.TYPE]
    variant = ", release's momenta" if cfg.SOLVER.DECOUPLED.VARIANT == "release" else ""
    return f"{cfg.DeepKD.BASE} + DeepKD{mask}{variant}"


def _table(name: str) -> Table:
    """The table of configs of a name."""
    if name in _datasets():
        return Table(name, name, _methods(CLASSIFICATION, name))
    if name in _detection():
        return Table(name, name, _methods(DETECTION, name), kind=KINDS[DETECTION])
    return Table(name, name, _ON_DETECTRON2, kind=KINDS[DETECTRON2])


def _datasets() -> list[str]:
    return KINDS[CLASSIFICATION].tables()


def _detection() -> list[str]:
    return KINDS[DETECTION].tables()


def _methods(kind: str, table: str) -> tuple[Method, ...]:
    """A row for each config that lies in a pair's folder."""
    found = KINDS[kind].configs(table) - {TEACHER}
    ordered = [name for name in METHODS if name in found] + sorted(found - set(METHODS))
    bases = {"deepkd": "kd"} | {f"deepkd_{base}": base for base in BASES}
    # another DeepKD is one over the same base, such as deepkd_release
    return tuple(
        Method(name, name, bases.get(name, "kd" if name.startswith("deepkd_") else None)) for name in ordered
    )


def _theirs(kind: str) -> Callable[[Any], list[str]]:
    """mdistiller's own KD.TYPE, with the weight of ReviewKD's loss that DeepKD over it has (mdistiller's for both)."""

    def options(cfg: Any) -> list[str]:
        deltas = [f"SOLVER.DECOUPLED.DELTA.{stream}" for stream in cfg.SOLVER.DECOUPLED.DELTA]
        return ["KD.TYPE", kind, *(word for path in deltas for word in (path, "0.0"))]

    return options


_ON_DETECTRON2 = (
    Method("kd", "KD-{}", None, "KD"),
    Method("dkd", "DKD-{}", None, "DKD"),
    Method("reviewkd", "ReviewDeepKD-{}", None, "ReviewKD", _theirs("ReviewKD")),
    Method("reviewdkd", "ReviewDeepKD-{}", None, "ReviewDKD", _theirs("ReviewDKD")),
    Method("deepkd_dkd_nodtm", "DeepKD-{}-noDTM", "dkd", "DKD + DeepKD"),
    Method("deepkd_dkd", "DeepKD-{}", "dkd", "DKD + DeepKD + DTM"),
    Method("deepkd_reviewdkd", "ReviewDeepKD-{}", "reviewdkd", "ReviewDKD + DeepKD + DTM"),
)
"""The rows of COCO; a config's name has a place for the pair."""


def _momentum(config: str) -> tuple[Method, ...]:
    def variant(name: str) -> list[str]:
        return ["SOLVER.DECOUPLED.VARIANT", name, "SOLVER.DECOUPLED.ALLOCATION", "fixed"]

    def none(cfg: Any) -> list[str]:
        return variant("paper") + _deltas(cfg, 0.0)

    def gsnr(cfg: Any) -> list[str]:
        # either end of its bounds must be a momentum; some recipes have -0.1, which is none upwards
        options = [*variant("paper")[:3], "gsnr"]
        for path in _DELTAS:
            most = 0.99 * (1 - cfg.SOLVER.MOMENTUM)
            if abs(get(cfg, path)) > most:
                options += [path, f"{_sign(get(cfg, path)) * most:g}"]
        return options

    return (
        Method("none", config, None, "one momentum", none),
        Method("paper", config, "none", "fixed, paper", lambda cfg: variant("paper")),
        Method("release", config, "none", "fixed, release", lambda cfg: variant("release")),
        Method("gsnr", config, "none", "by GSNR", gsnr, _windows),
    )


def _windows(cfg: Any) -> list[str]:
    """Windows short enough that a run has ten of them, of at most the usual length.

    Ten measurements are few for momenta that follow them, and a short run's windows hold few samples: it shows
    that the allocation works, not how well.
    """
    iterations = steps(cfg) * cfg.SOLVER.EPOCHS
    window = min(cfg.GSNR.WINDOW, max(2, iterations // 10))
    every = min(cfg.GSNR.EVERY, max(1, iterations // (10 * window)))
    return ["GSNR.EVERY", str(every), "GSNR.WINDOW", str(window)]


def _mask(config: str) -> tuple[Method, ...]:
    none = Method("none", config, None, "no mask", lambda cfg: ["DeepKD.MASK.TYPE", "none"])
    rows = [none]
    for percent in (5, 10, 25, 50, 75, None):
        for reading in ("renormalise", "multiply"):
            if percent is None:
                name, what, kind = "dynamic", "dynamic mask", ["DeepKD.MASK.TYPE", "dynamic"]
            else:
                name, what = f"static{percent}", f"K = {percent} % of the classes"
                kind = ["DeepKD.MASK.TYPE", "static", "DeepKD.MASK.K", str(percent / 100)]
            options = [*kind, "DeepKD.MASK.READING", reading]
            rows.append(
                Method(
                    f"{name}-{reading}", config, "none", f"{what}, {reading}", lambda cfg, o=options: list(o)
                )
            )
    return tuple(rows)


SWEEP = (0.0, 0.025, 0.05, 0.075, 0.099)
"""Sizes of Δ. The paper's range ends at 0.1, where MOMENTUM 0.9 plus it is a sum that never forgets, which the config
check refuses; at 0.099 a buffer averages 1,000 steps."""


def _delta(config: str) -> tuple[Method, ...]:
    return tuple(
        Method(
            f"delta{size:g}",
            config,
            "delta0" if size else None,
            f"|Δ| = {size:g}",
            lambda cfg, s=size: _deltas(cfg, s),
        )
        for size in SWEEP
    )


def _deltas(cfg: Any, size: float) -> list[str]:
    """Options that give every delta of a config this size and leave its sign."""
    return [word for path in _DELTAS for word in (path, str(_sign(get(cfg, path)) * size + 0.0))]


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


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


def _phases(config: str) -> tuple[Method, ...]:
    return tuple(
        Method(
            name,
            config,
            None if name == "thirds" else "thirds",
            f"φ = {what}",
            lambda cfg, e=ends: ["DeepKD.MASK.TYPE", "dynamic", "DeepKD.MASK.PHASES", str(e)],
        )
        for name, (what, ends) in PHASES.items()
    )


ABLATIONS: dict[str, tuple[Callable[[str], tuple[Method, ...]], tuple[str, ...]]] = {
    "ablation-momentum": (_momentum, ("SOLVER.DECOUPLED.VARIANT", "SOLVER.DECOUPLED.ALLOCATION")),
    "ablation-mask": (_mask, ("DeepKD.MASK.TYPE", "DeepKD.MASK.K", "DeepKD.MASK.READING")),
    "ablation-delta": (_delta, _DELTAS),
    "ablation-phases": (_phases, ("DeepKD.MASK.TYPE", "DeepKD.MASK.PHASES")),
}
"""Rows (of the base's DeepKD config) and the keys that they vary."""
