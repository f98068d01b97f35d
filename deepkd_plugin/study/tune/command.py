"""`deepkd tune` from its arguments to its exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ...errors import UserError
from ...run import record
from ...run.lock import locked
from ...terminal import Stopped, exit_code
from ..reproduce.runs import WORKER
from .crew import TrialCrew, TrialDisplay
from .plan import Request, Tuning
from .report import write
from .search import Search, open_storage, require


def tune(request: Request) -> int:
    """Search, and write what was found.

    Returns 0 if every method has all its trials, 1 if runs failed. With dry_run nothing is started or written. Raises
    UserError for what the user can mend, and Stopped after an interruption.
    """
    require()
    tuning = Tuning(request)
    missing = tuning.problems(prepare=False)
    if missing and not request.dry_run:
        raise UserError("; ".join(missing))
    if not missing:
        tuning.check_before()
    print(tuning.describe())
    for problem in missing:
        print(f"missing   {problem}")
    if request.dry_run:
        return 0
    with locked(tuning.out):
        if missing := tuning.problems(prepare=True):
            raise UserError("; ".join(missing))
        tuning.write()
        storage = open_storage(tuning.out)
        searches = [
            Search(storage, name, space, request.budget, tuning.cfgs[name].SOLVER.EPOCHS)
            for name, space in tuning.spaces.items()
        ]
        return _run(tuning, searches)


def _run(tuning: Tuning, searches: Sequence[Search]) -> int:
    request = tuning.request
    begun = sum(search.count("RUNNING") + search.left for search in searches)
    display = TrialDisplay(sys.stdout, begun * request.seeds)
    crew = TrialCrew(
        *((), tuning.jobs, False, record.code_hash(), display, 3, WORKER), searches=searches, make_runs=tuning.runs
    )
    try:
        crew.work()
    except KeyboardInterrupt as interruption:
        again = f"interrupted; the trials that ended stay, and the same command goes on: {request.command}"
        raise Stopped(again, exit_code(interruption)) from None
    for failure in crew.failures:
        print(failure, file=sys.stderr)
    for path in write(tuning, searches):
        print(path)
    if crew.failures:
        print(f"again     the same command begins the trials that failed anew: {request.command}")
    return 1 if crew.failures else 0
