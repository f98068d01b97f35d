"""A table's plan, as table.json holds it: reproduce writes it, the report and --reuse read it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError, shown
from ..run.checkpoint import write_whole
from .measures import CLASSIFICATION, MEASURES, Measures

FILE = "table.json"
"""The plan's file in the table's folder."""

Cell = tuple[str, str]
"""The names of a pair and a method."""


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
    """A row of the table; base names the row that its gain is taken over, None without one."""

    name: str
    label: str
    base: str | None


@dataclass(frozen=True)
class Run:
    """One training run: its cell and seed, its config file and options, and the folder of its files.

    options: KEY, VALUE, …: all that its process gets; in table.json without those that name seed and folder. hash:
    record.config_hash of the resolved config. epochs: lines of metrics.jsonl of a finished run. kind: a key of
    MEASURES. teacher: the fingerprint that its teacher must have (see plan.with_teachers), None if any will do.
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
    def cell(self) -> Cell:
        return self.pair, self.method

    @property
    def name(self) -> str:
        return f"{self.pair} {self.method} seed {self.seed}"


NOMASK = "_nomask"
"""How the row of a DeepKD without its mask is called, behind the name of the one with it."""

WEIGHTED = "_ea"
"""How the row of a method whose samples are weighted by entropy is called, behind the method's."""


def row_name(base: str, deepkd: bool = False) -> str:
    """Name the row of a base method, or of DeepKD over it, as its config file is called."""
    plain = base.lower()
    return plain if not deepkd else "deepkd" if plain == "kd" else f"deepkd_{plain}"


def title(name: str, dataset: str, over: str | None) -> str:
    """Call a table by its name; an ablation with what it is of."""
    return name if over is None else f"{name} over {over} on {dataset}"


@dataclass(frozen=True)
class Table:
    """The plan of a table.

    over: the base method of an ablation, None for any other table. kind: a key of MEASURES. metric: the main number.
    options: KEY -> VALUE that every run was given. runs: those of all calls.
    """

    folder: Path
    name: str
    dataset: str
    over: str | None
    kind: str
    metric: str
    options: Mapping[str, str]
    seeds: tuple[int, ...]
    pairs: tuple[Pair, ...]
    methods: tuple[Method, ...]
    runs: tuple[Run, ...]

    @property
    def title(self) -> str:
        return title(self.name, self.dataset, self.over)

    @property
    def measures(self) -> Measures:
        return MEASURES[self.kind]

    def write(self) -> None:
        """Write table.json; UserError if the folder cannot be written."""
        # tables of the first kind were written without one before there were others
        kind = {} if self.kind == CLASSIFICATION else {"kind": self.kind}
        plan = {
            "table": self.name,
            **kind,
            "dataset": self.dataset,
            "over": self.over,
            "metric": self.metric,
            "options": [word for pair in self.options.items() for word in pair],
            "seeds": self.seeds,
            "pairs": [vars(pair) for pair in self.pairs],
            "methods": [vars(method) for method in self.methods],
            "runs": [self._entry(run) for run in self.runs],
        }
        text = json.dumps(plan, indent=1, ensure_ascii=False) + "\n"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self.folder / FILE, lambda file: file.write(text.encode(errors="surrogateescape")))
        except OSError as error:
            raise UserError(f"{self.folder}: --out must be a folder that can be written ({error.strerror})") from None

    def _entry(self, run: Run) -> dict[str, Any]:
        folder = run.folder.absolute().relative_to(self.folder.absolute())
        entry = {name: value for name, value in vars(run).items() if name not in ("kind", "teacher")}
        return entry | {"config": run.config.as_posix(), "folder": folder.as_posix()}

    @classmethod
    def read(cls, folder: Path) -> Table:
        """Read a folder's table.json; UserError if it cannot be read or does not hold together."""
        path = folder / FILE
        if not path.is_file():
            raise UserError(f"{folder}: holds no {FILE}; it must be a folder that 'deepkd reproduce' made")
        try:
            table = _parse(folder, json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{path}: must be the plan of a table ({reason})") from None
        if table.kind not in MEASURES:
            raise UserError(f"{path}: kind is {shown(table.kind)}; it must be one of {', '.join(MEASURES)}")
        names = {"pair": [pair.name for pair in table.pairs], "method": [m.name for m in table.methods]}
        for run in table.runs:
            for what, known in names.items():
                if (name := getattr(run, what)) not in known:
                    one_of = ", ".join(sorted(known))
                    raise UserError(f"{path}: a run's {what} is {shown(name)}; it must be one of {one_of}")
        for name, count in Counter(run.name for run in table.runs).items():
            if count > 1:
                raise UserError(f"{path}: {name} is planned twice; a run must be there once")
        return table


def _parse(folder: Path, plan: Any) -> Table:
    """Make the table of a table.json's content; KeyError, TypeError, … if that is something else."""
    kind, words = str(plan.get("kind", CLASSIFICATION)), [str(word) for word in plan.get("options", ())]
    return Table(
        folder=folder,
        name=str(plan["table"]),
        dataset=str(plan["dataset"]),
        over=as_text(plan.get("over")),
        kind=kind,
        metric=str(plan["metric"]),
        options=dict(zip(words[::2], words[1::2])),
        seeds=tuple(int(seed) for seed in plan["seeds"]),
        pairs=tuple(Pair(str(p["name"]), str(p["teacher"]), str(p["student"])) for p in plan["pairs"]),
        methods=tuple(Method(str(m["name"]), str(m["label"]), as_text(m["base"])) for m in plan["methods"]),
        runs=tuple(
            Run(
                pair=str(run["pair"]),
                method=str(run["method"]),
                seed=int(run["seed"]),
                config=Path(run["config"]),
                options=tuple(str(word) for word in run["options"]),
                hash=str(run["hash"]),
                epochs=int(run["epochs"]),
                folder=folder / run["folder"],
                kind=kind,
            )
            for run in plan["runs"]
        ),
    )


def as_text(value: Any) -> str | None:
    """Make text of an entry that may be null."""
    return None if value is None else str(value)
