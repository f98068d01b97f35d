"""How long a table will take: an estimate, shown before it starts."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ... import device
from ...run.metrics import count_epochs
from ...run.record import processes, read_run
from ..shared import busy, cores, duration, threads

if TYPE_CHECKING:
    from ..table import Cell, Run
    from .plan import Plan


@dataclass(frozen=True)
class Estimate:
    """Seconds that a plan's runs still take, None if nobody can tell, and how that was found, in words."""

    seconds: float | None
    how: str

    def __str__(self) -> str:
        return self.how if self.seconds is None else f"about {duration(self.seconds)}; {self.how}"


def estimate(plan: Plan, states: Mapping[Run, str], jobs: int, together: int = 1, here: bool = True) -> Estimate:
    """Tell how long the runs that are not finished take, `jobs` at a time.

    A run takes what the finished ones of its pair and method did (median). Without any, its steps are timed here;
    without `here`, which is for other machines, nobody knows. Runs that share a GPU or, beyond one for each core, a
    CPU are counted as if in turn. What a run has done already is taken off. together: processes of a run, each on a GPU
    of its own; finished runs of another number do not count, and timed steps are divided by it, which is hoped for.
    """
    kind = plan.table.kind
    left = [run for run in plan.runs if states[run] != "finished"]
    known = _finished_seconds((run for run in plan.runs if states[run] == "finished"), together)
    jobs = min(jobs, len(left)) or 1
    each = threads(jobs, cores())
    turns = jobs * together / device.count() if device.count() else jobs * each / cores()
    untimed: dict[str, list[Cell]] = {}
    for cell in dict.fromkeys(run.cell for run in left):
        if cell not in known:
            untimed.setdefault(cell[0], []).append(cell)
    if untimed and not (here and kind.timed):
        return Estimate(None, "not known: no run of each pair and method is finished yet")
    disturbed = busy() if untimed else ""  # asked first, for timing makes a load too
    if len(untimed) > 1:
        print(f"timing the networks of {len(untimed)} pairs, some seconds each", file=sys.stderr, flush=True)
    alone: dict[Cell, float] = {}
    for pair, cells in untimed.items():
        try:
            runs = [sum(run.cell == cell for run in left) for cell in cells]
            alone |= zip(cells, kind.seconds([plan.cfgs[cell] for cell in cells], each, runs))
        except Exception as error:  # a GPU whose memory others use, a method that cannot take noise
            reason = (str(error) or type(error).__name__).splitlines()[0]
            return Estimate(None, f"not known: timing {pair} failed ({reason})")
        finally:
            device.release()  # this process stays while others train
    total = {cell: max(1.0, turns) * seconds / together for cell, seconds in alone.items()} | known
    seconds = []
    for run in left:
        done = count_epochs(run.folder) / run.epochs if states[run] == "resumable" else 0.0
        seconds.append((1 - done) * total[run.cell])
    timed = sum(run.cell in alone for run in left)
    by_finished = len(left) - timed
    how = [f"{by_finished} by finished runs of their kind"] * (by_finished > 0)
    how += [f"{timed} by their networks' passes over noise, timed here, {_share(each, jobs, together)}"] * (timed > 0)
    how += [disturbed] * bool(disturbed)
    return Estimate(total_seconds(seconds, jobs), f"an estimate: {'; '.join(how)}")


def total_seconds(seconds: Sequence[float], jobs: int) -> float:
    """Return the time of runs made `jobs` at a time: no less than the longest of them."""
    return max(sum(seconds) / jobs, max(seconds, default=0.0))


def _finished_seconds(runs: Iterable[Run], together: int) -> dict[Cell, float]:
    """Return the median time of finished runs of so many processes by pair and method."""
    times: dict[Cell, list[float]] = {}
    for run in runs:
        about = read_run(run.folder)
        if processes(about) == (together,):
            times.setdefault(run.cell, []).append(60 * about["minutes"])
    return {cell: statistics.median(seconds) for cell, seconds in times.items()}


def _share(threads: int, jobs: int, together: int) -> str:
    """Say how runs side by side were taken to share the machine."""
    if device.count():
        faster = f", as if {together} GPUs were {together} times as fast as one" if together > 1 else ""
        alone = "a GPU" if together == 1 else "GPUs"
        shared = jobs * together > device.count()
        return ("those on one GPU in turn" if shared else f"each on {alone} of its own") + faster
    return f"each on {threads} of {cores()} cores"
