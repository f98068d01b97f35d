"""What `deepkd tune` searches of a method: ranges of values, and the options that a point in them comes to."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ... import config, data
from ...config.tree import get
from ...distillers import DISTILLERS, DeepKD
from ...errors import UserError
from ...topk import classes, count_classes

Value = float | int | str
Point = dict[str, Value]
"""Name -> value of what is searched. Of the mask, only what its type has."""

DELTAS = "SOLVER.DECOUPLED.DELTA"
MASK, TYPE = "DeepKD.MASK", "mask"
MASKS = ("none", "static", "dynamic")

EDGE = 0.05
"""What part of a range's length counts as its edge."""


@dataclass(frozen=True)
class Range:
    """Numbers that are searched.

    name: in a Point. key: the config key, or the section of several. label: in reports. low, high: the ends. least,
    most: what it is never widened beyond. log: equal ratios count alike. whole: whole numbers. mask: the type of mask
    without which it means nothing; "" if it always does something.
    """

    name: str
    key: str
    label: str
    low: float
    high: float
    least: float
    most: float
    log: bool = False
    whole: bool = False
    mask: str = ""

    def edge(self, value: float) -> str:
        """Say at which end of the range a value is: "lower", "upper", or "" for neither."""
        low, high, at = map(self._scale, (self.low, self.high, value))
        near = 0.0 if self.whole else EDGE * (high - low)
        return "lower" if at <= low + near else "upper" if at >= high - near else ""

    def widened(self, edge: str) -> Range:
        """Return the range made half as long again at one end, as far as it may go."""
        low, high = self._scale(self.low), self._scale(self.high)
        more = max((high - low) / 2, 1.0 if self.whole else 0.0)
        low, high = (low - more, high) if edge == "lower" else (low, high + more)
        if self.log:
            low, high = math.exp(low), math.exp(high)
        if self.whole:
            low, high = math.ceil(low), math.floor(high)
        # the other end stays as it was, whatever rounding would make of it
        ends = {"low": max(low, self.least)} if edge == "lower" else {"high": min(high, self.most)}
        return replace(self, **ends)

    def ask(self, trial: Any) -> float:
        """Let an Optuna trial suggest a value."""
        if self.whole:
            return trial.suggest_int(self.name, int(self.low), int(self.high))
        return trial.suggest_float(self.name, self.low, self.high, log=self.log)

    def _scale(self, value: float) -> float:
        return math.log(value) if self.log else value


@dataclass(frozen=True)
class Space:
    """What is searched of one method.

    cfg: its config as it stands. own: where that is in the space. ranges: by name. masks: the types of mask to choose
    from; () if the config's stays.
    """

    cfg: Any
    own: Mapping[str, Value]
    ranges: Mapping[str, Range]
    masks: tuple[str, ...] = ()

    def ask(self, trial: Any) -> Point:
        """Let an Optuna trial suggest a point."""
        point: Point = {}
        mask = self.cfg.DeepKD.MASK.TYPE
        if self.masks:
            point[TYPE] = mask = trial.suggest_categorical(TYPE, self.masks)
        for name, range_ in self.ranges.items():
            if range_.mask in ("", mask):
                point[name] = range_.ask(trial)
        return point

    def options(self, point: Point) -> list[str]:
        """Return the KEY VALUE pairs of a point; none for what is as the config has it."""
        words: list[str] = []
        for name, value in point.items():
            if value != self.own.get(name) and name not in ("easy", "middle"):
                words += self._option(name, value)
        phases = {name: point[name] for name in ("easy", "middle") if name in point}
        if any(value != self.own[name] for name, value in phases.items()):
            first = round(float(phases["easy"]), 3)
            second = round(first + float(phases["middle"]) * (1 - first), 3)
            words += [f"{MASK}.PHASES", str([first, second])]
        return words

    def _option(self, name: str, value: Value) -> list[str]:
        if name == TYPE:
            return [f"{MASK}.TYPE", str(value)]
        range_, number = self.ranges[name], float(value)
        if name == "delta":
            size = _largest(self.cfg)
            signed = {stream: delta / size * number for stream, delta in _deltas(self.cfg).items()}
            return [word for stream, delta in signed.items() for word in (f"{DELTAS}.{stream}", f"{delta:.4g}")]
        if range_.whole:
            return [range_.key, str(int(number))]
        if name == "rate":
            return [range_.key, f"{number:.3g}"]
        # a share of the classes; from 1 on it would be a number of them
        return [range_.key, f"{min(max(round(number, 3), range_.least), 0.999):g}"]

    def widened(self, ends: Mapping[str, Sequence[float]]) -> Space:
        """Return the space with other ends of some ranges."""
        wider = {name: replace(self.ranges[name], low=low, high=high) for name, (low, high) in ends.items()}
        return replace(self, ranges={**self.ranges, **wider})

    def edges(self, point: Point) -> dict[str, str]:
        """Return the ranges at an end of which a point is, and at which end."""
        found = {name: self.ranges[name].edge(float(point[name])) for name in self.ranges if name in point}
        return {name: edge for name, edge in found.items() if edge}


def spaces(cfgs: Mapping[str, Any], given: Collection[str], rates: Sequence[float] | None = None) -> dict[str, Space]:
    """Make the space of each of a table's methods; what they have in common is searched in the same ranges.

    cfgs: resolved configs by method. given: keys that the command line sets, which are not searched. rates: the ends of
    the learning rate's range; by default a quarter of the lowest rate in these configs and four times the highest.
    Raises UserError for a method of which nothing is left to search.
    """
    common = [range_ for range_ in _common(list(cfgs.values()), rates) if range_.key not in given]
    made = {}
    for name, cfg in cfgs.items():
        ranges = {r.name: r for r in (*common, *_own_ranges(cfg, given)) if r.low < r.high}
        masks = MASKS if f"{MASK}.TYPE" not in given and _masked(cfg) else ()
        if not ranges and not masks:
            raise UserError(f"command line: the KEY VALUE pairs set all that {name} has to search; leave out some")
        made[name] = Space(cfg, _own(cfg, ranges, masks), ranges, masks)
    return made


def _common(cfgs: Sequence[Any], rates: Sequence[float] | None) -> list[Range]:
    """Return the ranges that every method has."""
    own = [cfg.SOLVER.LR for cfg in cfgs]
    low, high = rates or (min(own) / 4, max(own) * 4)
    epochs, warmups = min(cfg.SOLVER.EPOCHS for cfg in cfgs), [cfg.SOLVER.WARMUP_EPOCHS for cfg in cfgs]
    longest = min(max(epochs // 4, *warmups), epochs - 1)
    return [
        Range("rate", "SOLVER.LR", "learning rate", low, high, 1e-6, 100.0, log=True),
        Range(
            *("warmup", "SOLVER.WARMUP_EPOCHS", "warm-up (epochs)", 0, longest, 0, max(epochs // 2, longest)),
            whole=True,
        ),
    ]


def _own_ranges(cfg: Any, given: Collection[str]) -> list[Range]:
    """Return the ranges that a method has by its Δ and its mask."""
    ranges = []
    if (size := _largest(cfg)) and not any(f"{DELTAS}.{stream}" in given for stream in _deltas(cfg)):
        room = min(1 - cfg.SOLVER.MOMENTUM, cfg.SOLVER.MOMENTUM)
        ranges.append(
            Range("delta", DELTAS, "|Δ|", 0.0, max(0.75 * room, size), 0.0, max(0.99 * room, size)),
        )
    if not _masked(cfg):
        return ranges
    mask = cfg.DeepKD.MASK
    kinds = MASKS if f"{MASK}.TYPE" not in given else (mask.TYPE,)
    count = data.num_classes(cfg)
    # INITIAL may be a number of classes, and the middle phase must not have fewer
    initial = min(count_classes(classes(mask.INITIAL), count) / count, 0.95)
    shares = {"K": _share(mask.K, count), "OPTIMAL": _share(mask.OPTIMAL, count)}
    for kind, key, label, least in (("static", "K", "K", 0.02), ("dynamic", "OPTIMAL", "K*", initial)):
        ends = min(max(0.2, least), shares[key]), max(0.8, shares[key])
        label = f"{label} (share of the classes)"
        ranges.append(Range(key.lower(), f"{MASK}.{key}", label, *ends, min(least, ends[0]), 0.98, mask=kind))
    first, middle = _phases(cfg)
    key = f"{MASK}.PHASES"
    ranges.append(Range("easy", key, "easy phase (share)", 0.0, max(0.5, first), 0.0, 0.9, mask="dynamic"))
    ends = min(0.2, middle), 1.0
    ranges.append(
        Range("middle", key, "middle phase (share of the rest)", *ends, min(0.05, ends[0]), 1.0, mask="dynamic")
    )
    return [range_ for range_ in ranges if range_.key not in given and range_.mask in ("", *kinds)]


def _own(cfg: Any, ranges: Mapping[str, Range], masks: Sequence[str]) -> Point:
    """Return the point that a config is, within its ranges."""
    count = data.num_classes(cfg)
    first, middle = _phases(cfg)
    values = {
        "rate": cfg.SOLVER.LR,
        "warmup": cfg.SOLVER.WARMUP_EPOCHS,
        "delta": _largest(cfg),
        "k": _share(cfg.DeepKD.MASK.K, count),
        "optimal": _share(cfg.DeepKD.MASK.OPTIMAL, count),
        "easy": first,
        "middle": middle,
    }
    point: Point = {TYPE: cfg.DeepKD.MASK.TYPE} if masks else {}
    return point | {name: min(max(values[name], range_.low), range_.high) for name, range_ in ranges.items()}


def _masked(cfg: Any) -> bool:
    """Tell whether a config's method has a mask of K classes; one that is without it on purpose stays without."""
    deepkd = issubclass(DISTILLERS.get(cfg.DISTILLER.TYPE, object), DeepKD)
    return deepkd and cfg.DeepKD.MASK.TYPE in MASKS[1:]


def _deltas(cfg: Any) -> dict[str, float]:
    """Return the deltas of a config that are not 0, by stream; none under a trainer that has one momentum."""
    if cfg.SOLVER.TRAINER not in config.TRAINERS:
        return {}
    return {stream: delta for stream, delta in get(cfg, DELTAS).items() if delta}


def _largest(cfg: Any) -> float:
    return max(map(abs, _deltas(cfg).values()), default=0.0)


def _share(value: float, count: int) -> float:
    """Return a config's number of classes as a share of them."""
    number = classes(value)
    return number / count if isinstance(number, int) else number


def _phases(cfg: Any) -> tuple[float, float]:
    """Return the easy phase's share of training, and the middle phase's of the rest."""
    first, second = cfg.DeepKD.MASK.PHASES
    return first, (second - first) / (1 - first)
