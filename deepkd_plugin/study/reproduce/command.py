"""`deepkd reproduce` from its arguments to its exit code."""

import ast
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from ... import device
from ...distributed import process_group
from ...errors import UserError
from ...run import record
from ...run.lock import locked
from ...run.metrics import read_metrics
from ...terminal import Stopped, exit_code, spoken
from ..shared import cores, count, entry, threads
from ..table import Run
from . import matched, reuse, slurm, tables
from .estimate import Estimate, estimate
from .plan import Plan, make_plan, problems, with_teachers
from .runs import state

DONE = {"finished": "finished", "elsewhere": "to take over", "resumable": "to go on with", "new": "new"}
"""States of a run, in words."""


@dataclass(frozen=True)
class Request:
    """What was asked for; `command` is the line that asked."""

    table: str
    command: str
    pairs: Sequence[str] | None = None
    methods: Sequence[str] | None = None
    base: str | None = None
    dataset: str | None = None
    matched: bool = False
    seeds: int = 5
    jobs: int | None = None
    out: Path | None = None
    options: Sequence[str] = ()
    dry_run: bool = False
    overwrite: bool = False
    reuse: Sequence[Path] = ()
    launcher: str = "local"
    slurm: Sequence[str] = ()
    gpus_per_run: int | None = None


def reproduce(request: Request) -> int:
    """Plan a table's runs, show the plan, run what is not finished, and report.

    Returns 0 if all runs of the plan are finished (or submitted), 1 if some failed. With dry_run nothing is started or
    written. Raises UserError for what the user can mend, and Stopped after an interruption.
    """
    local = request.launcher == "local"
    parameters = {} if local else slurm_parameters(request)
    together = _together(request, parameters)
    jobs = request.jobs or device.count() // together or 1
    plan = _plan(request, threads(jobs * together, cores()) if local else None)
    check_together(plan, together, local)
    others = reuse.elsewhere(plan.runs, request.reuse)
    plan = with_teachers(plan, {ours: [other.folder for other in those] for ours, those in others.items()})
    code = record.code_hash()
    states: dict[Run, str] = {run: state(run, request.overwrite, code) for run in plan.runs}
    unfinished = [run for run in plan.runs if states[run] != "finished"]
    taken, unfit = reuse.usable(unfinished, others, code)
    left = [run for run in unfinished if run not in taken]
    missing = problems(plan, left, prepare=False)
    if plan.replaced and not request.overwrite:
        missing.insert(
            0,
            f"{plan.out}: {plan.replaced} runs of earlier calls had other options or config files, and would leave the "
            f"table; give another --out, the same options, or --overwrite",
        )
    if missing and not request.dry_run:
        raise UserError("; ".join(missing))
    expected = estimate(*_as_taken(plan, states, taken), jobs, together, here=local) if left else None
    states |= dict.fromkeys(taken, "elsewhere")
    where = _machine(jobs, together) if local else _cluster(parameters)
    print(describe(plan, states, where, expected, request, unfit))
    if request.dry_run:
        for problem in missing:
            print(entry("missing", problem))
        return 0
    with locked(plan.out):
        plan.document.write()
        missing = problems(plan, left, prepare=True)
        if missing:
            raise UserError("; ".join(missing))
        for run, other in taken.items():
            reuse.take_over(run, other, code)
        return _run(request, plan, jobs, together) if local else _submit(request, plan, parameters)


def describe(
    plan: Plan, states: Mapping[Run, str], where: str, expected: Estimate | None, request: Request, unfit: int
) -> str:
    """Put the plan into words. unfit: how many runs of --reuse have a config of the plan and must not be taken over."""
    by_state = Counter(states.values())
    parts = {name: dict.fromkeys(getattr(run, name) for run in plan.runs) for name in ("pair", "method", "seed")}
    numbers = " × ".join(count(len(what), name) for name, what in parts.items())
    there = [f"{by_state[state]} {words}" for state, words in DONE.items() if by_state[state]]
    entries = {
        "table": f"{plan.table.title}, {plan.document.metric}: {numbers} = {count(len(plan.runs), 'run')}",
        "pairs": " ".join(parts["pair"]),
        "methods": " ".join(parts["method"]),
        "on request": _on_request(plan, request),
        "runs": ", ".join(there),
        "protocol": _protocol(plan),
        "options": " ".join(request.options),
        "chosen": _chosen(plan),
        "reuse": f"{', '.join(map(str, request.reuse))}: {count(by_state['elsewhere'], 'run')} to take over"
        if request.reuse
        else "",
        "not taken": f"{count(unfit, 'run')} of --reuse, of other code, or of a teacher that is another or not here"
        if unfit
        else "",
        "earlier": f"{count(plan.replaced, 'run')} of earlier calls had other options or config files; they "
        f"stay on disk, and are no part of the table until a call has their options again"
        if plan.replaced
        else "",
        "warning": _without_base(plan),
        "on": where,
        "time": str(expected or ""),
        "folder": str(plan.out),
    }
    return "\n".join(entry(name, text) for name, text in entries.items() if text)


def _on_request(plan: Plan, request: Request) -> str:
    """Name the rows that the pairs asked for have, and that no call trains unless --methods names them."""
    if request.methods:
        return ""
    pairs, usual = {run.pair for run in plan.runs}, plan.table.by_default
    rows = [row for row in plan.table.methods if row.name not in usual]
    there = [row.name for row in rows if any(plan.table.file(pair, row) for pair in pairs)]
    return f"{' '.join(there)} (by --methods)" if there else ""


def _as_taken(plan: Plan, states: Mapping[Run, str], taken: Mapping[Run, reuse.Other]) -> tuple[Plan, dict[Run, str]]:
    """Give the plan and states as they would be with the taken runs finished where they are, whose times are known."""
    runs = [replace(run, folder=taken[run].folder) if run in taken else run for run in plan.runs]
    as_taken = ["finished" if run in taken else states[run] for run in plan.runs]
    return replace(plan, runs=tuple(runs)), dict(zip(runs, as_taken))


def slurm_parameters(request: Request) -> dict[str, Any]:
    """Read the KEY=VALUE of --slurm, values as Python writes them or else text; --jobs limits the array.

    --gpus-per-run says how many tasks and GPUs a node has. Raises UserError for a task without a GPU of its own.
    """
    parameters: dict[str, Any] = {}
    for word in request.slurm:
        key, equals, text = word.partition("=")
        if not equals or not key.isidentifier():
            raise UserError(
                f"command line: --slurm is {word!r}; it must be KEY=VALUE of submitit's, such as timeout_min=600"
            )
        try:
            parameters[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            parameters[key] = text
    limit = {} if request.jobs is None else {"slurm_array_parallelism": request.jobs}
    return limit | slurm.with_tasks(parameters, request.gpus_per_run)


def _together(request: Request, parameters: Mapping[str, Any]) -> int:
    """Count the processes that train a run. UserError if there are no GPUs for them here."""
    if request.launcher == "slurm":
        return slurm.tasks(parameters)
    if request.slurm:
        raise UserError("command line: --slurm goes with --launcher slurm")
    if (asked := request.gpus_per_run or 0) > device.count():
        raise UserError(f"command line: --gpus-per-run is {asked}; it must be at most {device.count()}, the GPUs here")
    return asked or 1


def check_together(plan: Plan, together: int, local: bool) -> None:
    """Raise UserError if several processes cannot train this plan's runs; a cluster's GPUs are not known here."""
    if together == 1:
        return
    if not plan.table.kind.several:
        raise UserError(f"command line: {plan.table.name} trains a run on one GPU, and is asked for {together}")
    with process_group.planned(together):
        for run in {run.cell: run for run in plan.runs}.values() if local else ():
            plan.table.kind.read(run.config, run.options)


def _plan(request: Request, each: int | None) -> Plan:
    table = tables.find(request.table, request.base, request.dataset)
    if request.matched:
        table = matched.with_matched(table)
    if table.over is not None and not request.pairs and len(table.pairs) > 1:
        raise UserError(f"command line: --pairs is missing; {table.title} must name some of {', '.join(table.pairs)}")
    pairs = tables.choose(request.pairs, table.pairs, "--pairs")
    there = [method.name for method in table.methods]
    methods = tables.choose(request.methods or table.by_default, there, "--methods")
    methods = matched.with_bases(table, methods)
    out = request.out or Path("output") / table.name
    return make_plan(table, pairs, methods, request.seeds, request.options, out, each)


def _run(request: Request, plan: Plan, jobs: int, together: int) -> int:
    from ..report import report
    from .display import for_stream
    from .runs import execute

    try:
        display = for_stream()
        failures = execute(plan.runs, jobs, overwrite=request.overwrite, display=display, together=together)
    except KeyboardInterrupt as interruption:
        again = f"interrupted; what is finished stays, and the same command goes on: {request.command}"
        raise Stopped(again, exit_code(interruption)) from None
    for failure in failures:
        print(failure, file=sys.stderr)
    done = len(plan.runs) - len(failures)
    print(entry("done", f"{done} of {len(plan.runs)} runs are finished"))
    if saved := _saved(plan.runs):
        print(entry("teacher", saved))
    if failures:
        print(entry("again", f"the same command tries the others again: {request.command}"))
    print(entry("report", ", ".join(str(path) for path in report(plan.out))))
    return 1 if failures else 0


def _saved(runs: Sequence[Run]) -> str:
    """Say what tables of the teacher's logits saved; nothing if no run has one."""
    computed = [
        line["teacher_computed"] for run in runs for line in read_metrics(run.folder) if "teacher_computed" in line
    ]
    if not computed:
        return ""
    return f"{1 - mean(computed):.0%} of its logits in {count(len(computed), 'epoch')} were read from a table"


def _submit(request: Request, plan: Plan, parameters: Mapping[str, Any]) -> int:
    jobs = slurm.submit(plan.runs, plan.out, parameters, overwrite=request.overwrite)
    if jobs:
        print(entry("jobs", f"{len(jobs)} submitted, {jobs[0]} to {jobs[-1]}; logs in {plan.out / 'slurm'}"))
    print(entry("then", shlex.join([*spoken("deepkd report"), str(plan.out)])))
    return 0


def _without_base(plan: Plan) -> str:
    """Say which methods will have no gain, because their base has no row, or is neither asked for nor in the table."""
    bases = {method.name: method.base for method in plan.document.methods}
    rows = {row.name: row for row in plan.table.methods}
    planned = {run.cell for run in plan.document.runs}
    lonely: dict[tuple[str, str], list[str]] = {}
    for (pair, name), cfg in plan.cfgs.items():
        base = bases[name]
        if base is None and (method := tables.taken_apart(rows[name], cfg)) is not None:
            lonely.setdefault(("has no row of its own in the table", method), []).append(name)
        elif base is not None and (pair, base) not in planned:
            lonely.setdefault(("is not asked for and has no runs in the table", base), []).append(name)
    said = [
        f"{base}, the base of {' '.join(dict.fromkeys(names))}, {why}"
        for (why, base), names in sorted(lonely.items(), key=lambda item: item[0][0])
    ]
    return "; ".join(said) + ": there will be no gain over it" if said else ""


def _protocol(plan: Plan) -> str:
    """Say how long runs train, with the methods that do so if they differ."""
    lengths: dict[str, list[str]] = {}
    for (_, method), cfg in plan.cfgs.items():
        lengths.setdefault(plan.table.kind.protocol(cfg), []).append(method)
    if len(lengths) == 1:
        return next(iter(lengths))
    return "; ".join(f"{text} ({' '.join(dict.fromkeys(methods))})" for text, methods in lengths.items())


def _chosen(plan: Plan) -> str:
    """Say what each pair's runs were given of what their configs leave open, True if any of its methods takes that."""
    pairs: dict[str, dict[str, bool]] = {}
    for (pair, _), values in plan.settled.items():
        for key, value in values.items():
            pairs.setdefault(pair, {})[key] = value or pairs.get(pair, {}).get(key, False)
    texts: dict[str, list[str]] = {}
    for pair, values in pairs.items():
        texts.setdefault(", ".join(f"{key} {value}" for key, value in values.items()), []).append(pair)
    return "; ".join(f"{text} ({' '.join(names)})" for text, names in texts.items())


def _machine(jobs: int, together: int) -> str:
    at_a_time = f"{jobs} at a time" + (f", each on {together} GPUs" if together > 1 else "")
    if gpus := device.count():
        return f"{gpus} x {device.describe(device.pick())}; {at_a_time}"
    return f"{record.processor()}, {cores()} cores; {at_a_time}"


def _cluster(parameters: Mapping[str, Any]) -> str:
    given = ", ".join(f"{key} {value}" for key, value in parameters.items())
    return f"Slurm, one array job{f' ({given})' if given else ''}"
