"""A table's plan: which runs, under which configs, where; what could stop them; and table.json, its record."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...run.checkpoint import write_whole
from ...run.record import names_a_teacher
from ..measures import CLASSIFICATION
from ..table import FILE, Cell, Run
from .tables import Method, Table, label


@dataclass(frozen=True)
class Plan:
    """What a call is to run, and the table that it belongs to.

    runs: those of this call. cfgs: their resolved configs by cell. document: table.json, with the runs of earlier
    calls. replaced: how many of those had another config than they would have now.
    """

    table: Table
    out: Path
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
    for key, instead in table.kind.ours.items():
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
            f"command line: --methods is {' '.join(methods)}; {table.place} has none of them for "
            f"{' '.join(pairs)}"
        )
    now = {(run.pair, run.method, run.seed): run.hash for run in planned}
    return Plan(
        table=table,
        out=out,
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
    """What would stop these runs, a line each: data sets that are not there, teachers without a file, and the like.

    prepare: also draw or fetch a data set, once, before several processes would.
    """
    first = {(run.pair, run.method): run for run in reversed(list(runs))}
    cells = [cell for cell in plan.cfgs if cell in first]
    return plan.table.kind.problems([(first[cell], plan.cfgs[cell]) for cell in cells], prepare)


def with_teachers(plan: Plan, elsewhere: Mapping[Path, Iterable[Path]]) -> Plan:
    """The plan with the fingerprints of the teachers that runs on disk must have been taught by.

    elsewhere: a run's folder -> those of other tables' runs which may take its place. Where a cell has no run with a
    teacher yet it needs none, nor where a teacher's file is not there. Raises UserError for a file that holds
    something else.
    """
    recorded = {
        (run.pair, run.method)
        for run in plan.runs
        if any(map(names_a_teacher, (run.folder, *elsewhere.get(run.folder, ()))))
    }
    known = plan.table.kind.teachers({cell: cfg for cell, cfg in plan.cfgs.items() if cell in recorded})
    runs = tuple(replace(run, teacher=known.get((run.pair, run.method))) for run in plan.runs)
    return replace(plan, runs=runs)


class _Reader:
    """Reads the configs of cells and makes their runs."""

    def __init__(self, table: Table, options: Sequence[str], out: Path) -> None:
        self.table, self.options, self.out = table, list(options), out
        self.cfgs: dict[Cell, Any] = {}

    def runs(self, pair: str, method: Method, seeds: Sequence[int]) -> list[Run]:
        """A cell's runs; none where the pair has no config for the method."""
        file = self.table.file(pair, method)
        if file is None or not seeds:
            return []
        options, kind = self.options, self.table.kind
        base = kind.read(file, options)
        row = method.options(base)
        options = [*method.defaults(base), *options, *row]
        try:
            cfg = kind.read(file, options) if row else base
        except UserError as error:  # the row's own options are nobody's words
            raise UserError(f"{self.table.name}, {pair} {method.name}: {error}") from None
        if unfit := kind.unfit(cfg):
            raise UserError(f"{self.table.name}, {pair} {method.name}: {unfit}")
        self.cfgs[pair, method.name] = cfg
        return [self._run(pair, method.name, seed, file, options, cfg) for seed in seeds]

    def _run(self, pair: str, method: str, seed: int, file: Path, options: Sequence[str], cfg: Any) -> Run:
        kind = self.table.kind
        held = kind.hash(cfg, seed)
        above, name = self.out.absolute() / "runs" / pair, f"seed{seed}-{held[:8]}"
        given = (*options, *kind.own_options(seed, above, method, name))
        folder, lines = above / method / name, kind.lines(cfg)
        return Run(pair, method, seed, file, given, held, lines, folder, kind.name)


def _document(
    table: Table, runs: Sequence[Run], cfgs: Mapping[Cell, Any], options: Sequence[str], out: Path
) -> dict[str, Any]:
    """The content of table.json."""
    kind = table.kind
    cells = dict.fromkeys((run.pair, run.method) for run in runs)
    pairs = []
    for pair in dict.fromkeys(pair for pair, _ in cells):
        of = [cfgs[cell] for cell in cells if cell[0] == pair]
        teacher, student = kind.networks(pair, of)
        pairs.append({"name": pair, "teacher": teacher, "student": student})
    methods = []
    for method in table.methods:
        of = [cfgs[cell] for cell in cells if cell[1] == method.name]
        if of:
            methods.append({"name": method.name, "label": label(method, of[0]), "base": method.base})
    above = out.absolute()
    entries = [
        {
            "pair": run.pair,
            "method": run.method,
            "seed": run.seed,
            "config": kind.shown(run.config),
            "options": [
                word
                for pair in zip(run.options[::2], run.options[1::2])
                if pair[0] not in kind.ours
                for word in pair
            ],
            "hash": run.hash,
            "epochs": run.epochs,
            "folder": run.folder.relative_to(above).as_posix(),
        }
        for run in runs
    ]
    # a table of the first kind was written without one before there were others
    named = {} if kind.name == CLASSIFICATION else {"kind": kind.name}
    return {
        "table": table.name,
        **named,
        "dataset": table.dataset,
        "over": table.over,
        "metric": kind.measures.metric,
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
