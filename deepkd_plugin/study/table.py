"""A table's plan as table.json holds it: reproduce writes it, the report and --reuse read it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from .measures import CLASSIFICATION, MEASURES

FILE = "table.json"
"""A table's plan in its folder: reproduce writes it, the report reads it."""

Cell = tuple[str, str]
"""The names of a pair and a method."""


@dataclass(frozen=True)
class Run:
    """One training run: what it is, the config file and options it gets, and where it leaves its files.

    options: KEY, VALUE, …: all that its process gets. hash: record.config_hash of the resolved config. kind: of
    kinds.KINDS. teacher: the fingerprint of its teacher, where runs on disk must have the same (see with_teachers).
    """

    pair: str
    method: str
    seed: int
    config: Path
    options: tuple[str, ...]
    hash: str
    epochs: int
    folder: Path
    kind: str = CLASSIFICATION
    teacher: str | None = None

    @property
    def name(self) -> str:
        return f"{self.pair} {self.method} seed {self.seed}"


@dataclass(frozen=True)
class Pair:
    """A teacher and a student."""

    name: str
    teacher: str
    student: str

    @property
    def label(self) -> str:
        return f"{self.teacher} → {self.student}" if self.teacher else self.student


@dataclass(frozen=True)
class Method:
    """A row of the table; base names the method that its gain is taken over, None without one."""

    name: str
    label: str
    base: str | None


@dataclass(frozen=True)
class Planned:
    """One run of the plan: where it belongs, its folder, and the hash of the config it must have."""

    pair: str
    method: str
    seed: int
    folder: Path
    hash: str
    epochs: int


def read_plan(folder: Path) -> dict[str, Any]:
    """The fields of a Table that table.json holds; UserError where it cannot be read."""
    path = folder / FILE
    if not path.is_file():
        raise UserError(f"{folder}: holds no {FILE}; it must be a folder that 'deepkd reproduce' made")
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        runs = tuple(
            Planned(
                str(run["pair"]),
                str(run["method"]),
                int(run["seed"]),
                folder / run["folder"],
                str(run["hash"]),
                int(run["epochs"]),
            )
            for run in held["runs"]
        )
        options = [str(word) for word in held.get("options", ())]
        plan = {
            "name": str(held["table"]),
            "dataset": str(held["dataset"]),
            "over": _text(held.get("over")),
            "options": dict(zip(options[::2], options[1::2])),
            "metric": str(held["metric"]),
            "kind": str(held.get("kind", CLASSIFICATION)),
            "seeds": tuple(int(seed) for seed in held["seeds"]),
            "pairs": tuple(Pair(str(p["name"]), str(p["teacher"]), str(p["student"])) for p in held["pairs"]),
            "methods": tuple(
                Method(str(m["name"]), str(m["label"]), _text(m["base"])) for m in held["methods"]
            ),
            "runs": runs,
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: must be the plan of a table ({type(error).__name__}: {error})") from None
    if plan["kind"] not in MEASURES:
        raise UserError(f"{path}: kind is {plan['kind']!r}; it must be one of {', '.join(MEASURES)}")
    keys = Counter((run.pair, run.method, run.seed) for run in runs)
    twice = [key for key, count in keys.items() if count > 1]
    if twice:
        pair, method, seed = twice[0]
        raise UserError(f"{path}: {pair} {method} seed {seed} is planned twice; a run must be there once")
    known = {pair.name for pair in plan["pairs"]}, {method.name for method in plan["methods"]}
    for run in runs:
        for what, name, names in (("pair", run.pair, known[0]), ("method", run.method, known[1])):
            if name not in names:
                raise UserError(
                    f"{path}: a run's {what} is {name!r}; it must be one of {', '.join(sorted(names))}"
                )
    return plan


def _text(held: Any) -> str | None:
    return None if held is None else str(held)
