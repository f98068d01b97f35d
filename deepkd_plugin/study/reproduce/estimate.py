"""How long a run will take, from its steps' parts timed here on noise: an estimate, shown before a table starts."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ... import device
from ...run.metrics import read_metrics
from ...run.record import read_run
from ..shared import cores, duration, threads

if TYPE_CHECKING:
    from ..table import Run
    from .plan import Plan


@dataclass(frozen=True)
class Estimate:
    """Seconds that a plan's runs still take, None where nobody can tell, and how that was found, in words."""

    seconds: float | None
    how: str

    def __str__(self) -> str:
        return self.how if self.seconds is None else f"about {duration(self.seconds)}; {self.how}"


def estimate(plan: Plan, states: Mapping[Run, str], jobs: int, here: bool = True) -> Estimate:
    """How long the runs that are not finished take, `jobs` at a time.

    A run takes what the finished ones of its pair and method did (median); without any, what its steps take by its
    pair's networks timed here, or, without `here`, which is for other machines, nobody knows. Runs that share a
    GPU or, beyond one for each core, a CPU are counted as if in turn. What a run has done already is taken off.
    """
    left = [run for run in plan.runs if states[run] != "finished"]
    known = _finished_seconds(run for run in plan.runs if states[run] == "finished")
    jobs = min(jobs, len(left)) or 1
    each = threads(jobs, cores())
    turns = jobs / device.count() if device.count() else jobs * each / cores()
    timer = plan.table.kind.timer(plan.cfgs, each) if here else None
    untimed = {run.pair for run in left if (run.pair, run.method) not in known}
    if timer is not None and len(untimed) > 1:
        print(f"timing the networks of {len(untimed)} pairs, some seconds each", file=sys.stderr, flush=True)
    seconds, by_finished = [], 0
    for run in left:
        cell = (run.pair, run.method)
        done = len(read_metrics(run.folder)) / run.epochs if states[run] == "resumable" else 0.0
        if cell in known:
            by_finished += 1
            seconds.append((1 - done) * known[cell])
            continue
        if timer is None:
            return Estimate(None, "not known: no run of each pair and method is finished yet")
        try:
            alone = timer(run.pair, plan.cfgs[cell])
        except RuntimeError as error:  # such as a GPU whose memory others use
            return Estimate(None, f"not known: timing {run.pair} failed ({str(error).splitlines()[0]})")
        seconds.append((1 - done) * max(1.0, turns) * alone)
    timed = len(left) - by_finished
    how = [f"{by_finished} by finished runs of their kind"] * (by_finished > 0)
    how += [f"{timed} by their networks' passes over noise, timed here, {_share(each, jobs)}"] * (timed > 0)
    return Estimate(total_seconds(seconds, jobs), f"an estimate: {'; '.join(how)}")


def total_seconds(seconds: Sequence[float], jobs: int) -> float:
    """The time of runs made `jobs` at a time: no less than the longest of them."""
    return max(sum(seconds) / jobs, max(seconds, default=0.0))


def _finished_seconds(runs: Iterable[Run]) -> dict[tuple[str, str], float]:
    """The median time of finished runs by pair and method."""
    held: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        held.setdefault((run.pair, run.method), []).append(60 * read_run(run.folder)["minutes"])
    return {cell: statistics.median(seconds) for cell, seconds in held.items()}


def _share(threads: int, jobs: int) -> str:
    """How runs side by side were taken to share the machine."""
    if device.count():
        return "those on one GPU in turn" if jobs > device.count() else "each on a GPU of its own"
    return f"each on {threads} of {cores()} cores"
