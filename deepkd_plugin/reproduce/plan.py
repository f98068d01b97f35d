"""A table's plan: which runs, under which configs, where; what could stop them; and table.json, its record."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os.path import normpath
from pathlib import Path
from typing import Any

from .. import data, record
from ..checkpoint import write_whole
from ..errors import UserError
from ..host import Host
from ..launch import read_config
from ..networks import weights_file
from ..registry import find_host
from ..shipped import shipped
from .tables import Method, Table, label

FILE = "table.json"
METRIC = "top-1 (%)"

OURS = {
    "SOLVER.SEED": "--seeds N",
    "LOG.PREFIX": "--out DIR",
    "EXPERIMENT.PROJECT": "--out DIR",
    "EXPERIMENT.NAME": "--out DIR",
}
"""Keys that the plan sets itself, and what to use instead."""

Cell = tuple[str, str]
"""The names of a pair and a method."""


@dataclass(frozen=True)
class Run:
    """One training run: what it is, the config file and options it gets, and where it leaves its files.

    options: KEY, VALUE, …: all that its process gets. hash: record.config_hash of the resolved config.
    """

    pair: str
    method: str
    seed: int
    config: Path
    options: tuple[str, ...]
    hash: str
    epochs: int
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.pair} {self.method} seed {self.seed}"


@dataclass(frozen=True)
class Plan:
    """What a call is to run, and the table that it belongs to.

    runs: those of this call. cfgs: their resolved configs by cell. document: table.json, with the runs of earlier
    calls. replaced: how many of those had another config than they would have now.
    """

    table: Table
    out: Path
    host: Host
    runs: tuple[Run, ...]
    cfgs: Mapping[Cell, Any]
    document: Mapping[str, Any] = field(repr=False)
    replaced: int = 0

    @property
    def pairs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(run.pair for run in self.runs))

    @property
    def methods(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(run.method for run in self.runs))

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(sorted({run.seed for run in self.runs}))


def make_plan(
    table: Table,
    pairs: Sequence[str],
    methods: Sequence[str],
    seeds: int,
    options: Sequence[str],
    out: Path,
) -> Plan:
    """The runs of pairs × methods × seeds 0 … seeds − 1, with the plan that `out` holds already.

    options: KEY, VALUE, … for every run. Runs of earlier calls stay in the plan, under the config that they would
    have now: a table is of one protocol. Nothing is written. Raises UserError for a config or option that is
    wrong, and where `out` holds another table.
    """
    for key, instead in OURS.items():
        if key in options[::2]:
            raise UserError(f"command line: {key} is set for each run by the plan; use {instead} instead")
    for key in table.varies:
        if key in options[::2]:
            raise UserError(f"command line: {key} is what {table.name} varies; leave it out")
    before = _read(out, table)
    asked = {(p, m, s) for p in pairs for m in methods for s in range(seeds)}
    old = {(run["pair"], run["method"], run["seed"]): run["hash"] for run in before["runs"]}
    reader = _Reader(table, options, out)
    all_seeds = sorted({seed for _, _, seed in asked | old.keys()})
    planned = [
        run
        for pair in table.pairs
        for method in table.methods
        for run in reader.runs(
            pair, method, [s for s in all_seeds if (pair, method.name, s) in asked | old.keys()]
        )
    ]
    runs = tuple(run for run in planned if (run.pair, run.method, run.seed) in asked)
    if not runs:
        raise UserError(
            f"command line: --methods is {' '.join(methods)}; configs/{table.dataset} has none of them for "
            f"{' '.join(pairs)}"
        )
    now = {(run.pair, run.method, run.seed): run.hash for run in planned}
    return Plan(
        table=table,
        out=out,
        host=reader.host,
        runs=runs,
        cfgs={cell: cfg for cell, cfg in reader.cfgs.items() if cell in {(r.pair, r.method) for r in runs}},
        document=_document(table, planned, reader.cfgs, options, out),
        replaced=sum(now.get(key) != held for key, held in old.items()),
    )


def write(plan: Plan) -> None:
    """Write table.json; UserError where the folder cannot be written."""
    text = json.dumps(plan.document, indent=1, ensure_ascii=False) + "\n"
    try:
        plan.out.mkdir(parents=True, exist_ok=True)
        write_whole(plan.out / FILE, lambda file: file.write(text.encode()))
    except OSError as error:
        raise UserError(
            f"{plan.out}: --out must be a folder that can be written ({error.strerror})"
        ) from None


def problems(plan: Plan, runs: Iterable[Run], prepare: bool) -> list[str]:
    """What would stop these runs, a line each: data sets that are not there, teachers without a file.

    prepare: also draw or fetch a data set, once, before several processes would. (Imagenet's teachers may be
    torchvision's, which the first run fetches.)
    """
    cells = dict.fromkeys((run.pair, run.method) for run in runs)
    cfgs = [plan.cfgs[cell] for cell in cells]
    found = []
    sets = {(cfg.DATASET.TYPE, cfg.DATASET.ROOT): cfg for cfg in cfgs}
    for cfg in sets.values():
        try:
            _look_at_data(cfg, prepare)
        except UserError as error:
            found.append(str(error))
    missing: dict[str, list[str]] = {}
    for (pair, _), cfg in zip(cells, cfgs):
        if cfg.DISTILLER.TYPE == "NONE":
            continue
        kind, name = cfg.DATASET.TYPE, cfg.DISTILLER.TEACHER
        file = weights_file(plan.host, kind, name, cfg.DISTILLER.TEACHER_WEIGHTS)
        if not file and kind != "imagenet":
            file = f"none in the zoo for {name}"
        if file and not Path(file).is_file():
            missing.setdefault(normpath(file), []).append(pair)
    if missing:
        files = "; ".join(f"{file} ({', '.join(dict.fromkeys(of))})" for file, of in missing.items())
        found.append(
            f"DISTILLER.TEACHER_WEIGHTS: files of teachers are missing: {files}; they must be there, or be named "
            f"by it for the pairs of one teacher"
        )
    return found


def _look_at_data(cfg: Any, prepare: bool) -> None:
    """UserError where a data set is not there, by the part that is read fastest."""
    kind, node = cfg.DATASET.TYPE, cfg.DATASET
    if not prepare and (kind == "glyphs100" or node.DOWNLOAD):
        return
    source = data.DATASETS[kind]
    # glyphs100 is drawn, and a process of each run would draw it
    for split in ("train", "test") if kind == "glyphs100" else ("test",):
        source.read(node, split, source.test_transform())


class _Reader:
    """Reads the configs of cells and makes their runs."""

    def __init__(self, table: Table, options: Sequence[str], out: Path) -> None:
        self.table, self.options, self.out = table, list(options), out
        self.host = find_host()
        self.cfgs: dict[Cell, Any] = {}

    def runs(self, pair: str, method: Method, seeds: Sequence[int]) -> list[Run]:
        """A cell's runs; none where the pair has no config for the method."""
        file = self.table.file(pair, method)
        if file is None or not seeds:
            return []
        options = self.options
        base, _ = read_config(self.host, str(file), options)
        row = method.options(base)
        options = [*method.defaults(base), *options, *row]
        try:
            cfg = read_config(self.host, str(file), options)[0] if row else base
        except UserError as error:  # the row's own options are nobody's words
            raise UserError(f"{self.table.name}, {pair} {method.name}: {error}") from None
        self.cfgs[pair, method.name] = cfg
        return [self._run(pair, method.name, seed, file, options, cfg) for seed in seeds]

    def _run(self, pair: str, method: str, seed: int, file: Path, options: Sequence[str], cfg: Any) -> Run:
        seeded = cfg.clone()
        seeded.defrost()
        seeded.SOLVER.SEED = seed
        held = record.config_hash(seeded)
        above, name = self.out.absolute() / "runs" / pair, f"seed{seed}-{held[:8]}"
        ours = ("SOLVER.SEED", str(seed), "LOG.PREFIX", str(above))
        ours += ("EXPERIMENT.PROJECT", method, "EXPERIMENT.NAME", name)
        return Run(
            pair, method, seed, file, (*options, *ours), held, cfg.SOLVER.EPOCHS, above / method / name
        )


def _document(
    table: Table, runs: Sequence[Run], cfgs: Mapping[Cell, Any], options: Sequence[str], out: Path
) -> dict[str, Any]:
    """The content of table.json."""
    cells = dict.fromkeys((run.pair, run.method) for run in runs)
    pairs = []
    for pair in dict.fromkeys(pair for pair, _ in cells):
        of = [cfgs[cell] for cell in cells if cell[0] == pair]
        taught = [cfg.DISTILLER.TEACHER for cfg in of if cfg.DISTILLER.TYPE != "NONE"]
        pairs.append(
            {"name": pair, "teacher": (taught or [""])[0], "student": of[0].DISTILLER.STUDENT},
        )
    methods = []
    for method in table.methods:
        of = [cfgs[cell] for cell in cells if cell[1] == method.name]
        if of:
            methods.append({"name": method.name, "label": label(method, of[0]), "base": method.base})
    root, above = shipped("configs").parent, out.absolute()
    entries = [
        {
            "pair": run.pair,
            "method": run.method,
            "seed": run.seed,
            "config": run.config.relative_to(root).as_posix(),
            "options": [
                word
                for pair in zip(run.options[::2], run.options[1::2])
                if pair[0] not in OURS
                for word in pair
            ],
            "hash": run.hash,
            "epochs": run.epochs,
            "folder": run.folder.relative_to(above).as_posix(),
        }
        for run in runs
    ]
    return {
        "table": table.name,
        "dataset": table.dataset,
        "over": table.over,
        "metric": METRIC,
        "options": list(options),
        "seeds": sorted({run.seed for run in runs}),
        "pairs": pairs,
        "methods": methods,
        "runs": entries,
    }


def _read(out: Path, table: Table) -> Mapping[str, Any]:
    """The table.json of an earlier call; an empty plan without one. UserError for another table's."""
    path = out / FILE
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        name = (held["table"], held.get("over"), held["dataset"])
        [(run["pair"], run["method"], run["seed"], run["hash"]) for run in held["runs"]]
    except FileNotFoundError:
        return {"runs": []}
    except OSError as error:
        raise UserError(f"{out}: --out must be a folder ({error.strerror})") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: must be the plan that deepkd reproduce wrote there, and is damaged ({error!r}); give another "
            f"--out, or delete it: the runs beside it are found again"
        ) from None
    if name != (table.name, table.over, table.dataset):
        other = Table(name[0], name[2], (), name[1]).title
        raise UserError(f"{out}: --out holds the table {other}; give another for {table.title}")
    return held
