"""A table's plan: which runs, under which configs, where, and what could stop them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from ...errors import UserError, shown
from ...run.record import find_run
from ..measures import MEASURES
from ..table import FILE, Cell, Method, Pair, Run, Table, row_name
from . import matched
from .tables import Outline, Row, base_rows, label


@dataclass(frozen=True)
class Plan:
    """What a call is to run, and the table that it belongs to.

    runs: those of this call. cfgs: their resolved configs by cell. document: what table.json will hold, with the runs
    of earlier calls. replaced: how many of those had another config than they would have now. settled: what Kind.settle
    gave to a cell's runs.
    """

    table: Outline
    out: Path
    runs: tuple[Run, ...]
    cfgs: Mapping[Cell, Any]
    document: Table
    replaced: int = 0
    settled: Mapping[Cell, Mapping[str, bool]] = field(default_factory=dict)


def make_plan(
    table: Outline,
    pairs: Sequence[str],
    methods: Sequence[str],
    seeds: int,
    options: Sequence[str],
    out: Path,
    threads: int | None = None,
) -> Plan:
    """Plan the runs of pairs × methods × seeds 0 … seeds − 1, with the plan that `out` holds already.

    options: KEY, VALUE, … for every run. Runs of earlier calls stay in the plan, under the config that they would
    have now: a table is of one protocol. threads: what a run will have here, None if runs are made elsewhere; what the
    configs of a pair leave to a measurement is settled once for all its runs (Kind.settle). Nothing is written. Raises
    UserError for a config or option that is wrong, and if `out` holds another table.
    """
    try:
        str(out.absolute()).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"command line: --out is {shown(str(out.absolute()))}, which is no text under this locale; set "
            f"PYTHONUTF8=1, or a locale of UTF-8"
        ) from None
    for key, instead in table.kind.ours.items():
        if key in options[::2]:
            raise UserError(f"command line: {key} is set for each run by the plan; use {instead} instead")
    for key in table.varies:
        if key in options[::2]:
            raise UserError(f"command line: {key} is what {table.name} varies; leave it out")
    asked = set(product(product(pairs, methods), range(seeds)))
    earlier = _earlier_runs(out, table)
    before = {(run.cell, run.seed): run.hash for run in earlier}
    given = {run.cell: dict(zip(run.options[::2], run.options[1::2])) for run in earlier}
    cfgs: dict[Cell, Any] = {}
    planned: list[Run] = []
    settled: dict[Cell, dict[str, bool]] = {}
    for pair in table.pairs:
        cells: dict[Cell, tuple[list[int], Path, list[str]]] = {}
        for method in table.methods:
            cell = pair, method.name
            of_cell = sorted(seed for other, seed in asked | before.keys() if other == cell)
            file = table.file(pair, method)
            if of_cell and file is not None:
                cfgs[cell], words = _resolve(table, pair, method, file, options)
                cells[cell] = of_cell, file, words
        settled |= table.kind.settle({cell: cfgs[cell] for cell in cells}, given, threads)
        for cell, (of_cell, file, words) in cells.items():
            if values := settled.get(cell):
                words += [word for key, value in values.items() for word in (key, str(value))]
                cfgs[cell] = table.kind.read(file, words)
            planned += [_run(table, cell, seed, file, words, cfgs[cell], out) for seed in of_cell]
    runs = tuple(run for run in planned if (run.cell, run.seed) in asked)
    if not runs:
        raise UserError(
            f"command line: --methods is {' '.join(methods)}; {table.place} has none of them for {' '.join(pairs)}"
        )
    now = {(run.cell, run.seed): run.hash for run in planned}
    cells_of_call = {run.cell for run in runs}
    return Plan(
        table=table,
        out=out,
        runs=runs,
        cfgs={cell: cfg for cell, cfg in cfgs.items() if cell in cells_of_call},
        document=_document(table, planned, cfgs, options, out),
        replaced=sum(now.get(key) != hash_ for key, hash_ in before.items()),
        settled={cell: values for cell, values in settled.items() if cell in cells_of_call},
    )


def problems(plan: Plan, runs: Iterable[Run], prepare: bool) -> list[str]:
    """Say what would stop these runs, a line each: data sets that are not there, teachers without a file, and the like.

    prepare: also draw or fetch a data set, once, before several processes would.
    """
    first = {run.cell: run for run in reversed(list(runs))}
    of_cells = [(first[cell], cfg) for cell, cfg in plan.cfgs.items() if cell in first]
    return plan.table.kind.problems(of_cells, prepare)


def with_teachers(plan: Plan, elsewhere: Mapping[Path, Iterable[Path]]) -> Plan:
    """Add the fingerprints of the teachers that runs on disk must have been taught by.

    elsewhere: a run's folder -> those of other tables' runs which may take its place. A cell needs none if it has no
    run with a teacher yet, or if the teacher's file is not there. Raises UserError for a file that holds something
    else.
    """
    taught = {
        run.cell
        for run in plan.runs
        if any(is_taught(folder) for folder in (run.folder, *elsewhere.get(run.folder, ())))
    }
    known = plan.table.kind.teachers({cell: cfg for cell, cfg in plan.cfgs.items() if cell in taught})
    runs = tuple(replace(run, teacher=known.get(run.cell)) for run in plan.runs)
    return replace(plan, runs=runs)


def is_taught(folder: Path) -> bool:
    """Tell whether the record of a run in a folder names a teacher."""
    return find_run(folder).get("teacher") is not None


def _resolve(table: Outline, pair: str, method: Row, file: Path, options: Sequence[str]) -> tuple[Any, list[str]]:
    """Read the config of a cell; returns it with the options that make it of its file."""
    kind = table.kind
    base = kind.read(file, options)
    if twin := table.twin_file(pair, method) if method.twin else None:
        try:
            row: Sequence[str] = matched.options(base, kind.read(twin, options))
        except UserError as error:
            raise UserError(f"{twin}: {error}") from None
    try:
        if not twin:
            row = method.options(base)
        words = [*method.defaults(base), *options, *row]
        cfg = kind.read(file, words) if row else base
        kind.check(cfg)
    except UserError as error:  # the row's own options are nobody's words
        raise UserError(f"{table.name}, {pair} {method.name}: {error}") from None
    if table.over is not None and row_name(cfg.DeepKD.BASE) != table.over:
        raise UserError(f"{file}: DeepKD.BASE is {cfg.DeepKD.BASE!r}; for --base {table.over} it must be that")
    return cfg, words


def _run(table: Outline, cell: Cell, seed: int, file: Path, words: Sequence[str], cfg: Any, out: Path) -> Run:
    kind, (pair, method) = table.kind, cell
    hash_ = kind.hash(cfg, seed)
    above, name = out.absolute() / "runs" / pair, f"seed{seed}-{hash_[:8]}"
    options = (*words, *kind.own_options(seed, above, method, name))
    return Run(pair, method, seed, file, options, hash_, kind.lines(cfg), above / method / name, kind.name)


def _document(
    table: Outline, runs: Sequence[Run], cfgs: Mapping[Cell, Any], options: Sequence[str], out: Path
) -> Table:
    kind = table.kind
    pairs = []
    for pair in dict.fromkeys(pair for pair, _ in cfgs):
        teacher, student = kind.networks(pair, [cfg for (name, _), cfg in cfgs.items() if name == pair])
        pairs.append(Pair(pair, teacher, student))
    bases = base_rows(table, cfgs)
    first: dict[str, Any] = {}
    for (_, name), cfg in cfgs.items():
        first.setdefault(name, cfg)
    return Table(
        folder=out,
        name=table.name,
        dataset=table.dataset,
        over=table.over,
        kind=kind.name,
        metric=MEASURES[kind.name].metric,
        options=dict(zip(options[::2], options[1::2])),
        seeds=tuple(sorted({run.seed for run in runs})),
        pairs=tuple(pairs),
        methods=tuple(
            Method(row.name, label(row, first[row.name]), bases[row.name]) for row in table.methods if row.name in first
        ),
        runs=tuple(
            replace(run, config=Path(kind.shown(run.config)), options=_of_others(run.options, kind.ours))
            for run in runs
        ),
    )


def _of_others(options: Sequence[str], ours: Iterable[str]) -> tuple[str, ...]:
    """Leave out the KEY VALUE pairs that the plan sets itself."""
    pairs = zip(options[::2], options[1::2])
    return tuple(word for pair in pairs if pair[0] not in ours for word in pair)


def _earlier_runs(out: Path, table: Outline) -> tuple[Run, ...]:
    """Read the runs that earlier calls planned in a folder; UserError for another table's."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: --out must be a folder")
    if not (out / FILE).exists():
        return ()
    try:
        earlier = Table.read(out)
    except UserError as error:
        raise UserError(f"{error}; give another --out, or delete it: the runs beside it are found again") from None
    if (earlier.name, earlier.over, earlier.dataset) != (table.name, table.over, table.dataset):
        raise UserError(f"{out}: --out holds the table {earlier.title}; give another for {table.title}")
    return earlier.runs
