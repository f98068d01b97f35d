"""A table's runs as one array job of a Slurm cluster, through submitit."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from ...errors import UserError
from ...run import record
from .display import PlainDisplay
from .runs import TAIL, WORKER, Failure, HeldError, execute, state

if TYPE_CHECKING:
    from ..table import Run

TIMEOUTS = 100
"""How often a job whose time is up is queued again; it goes on from its run's checkpoint."""

DEFAULTS = {"name": "deepkd", "timeout_min": 24 * 60}
"""submitit would give a job five minutes."""


@dataclass(frozen=True)
class Job:
    """What one job of the array does; submitit pickles it."""

    code: str
    overwrite: bool
    worker: tuple[str, ...]

    def __call__(self, run: Run) -> Failure | None:
        """Train a run as runs.execute does; None if all is well, or if another process is training it."""
        if record.code_hash() != self.code:
            return Failure(run, 2, 0, ("the package's code was changed since the job was submitted",))
        try:
            failures = execute(
                [run], 1, overwrite=self.overwrite, display=PlainDisplay(sys.stdout), worker=self.worker
            )
        except HeldError as held:
            print(held)
            return None
        except UserError as error:
            return Failure(run, 2, 1, (str(error),))
        return failures[0] if failures else None

    def checkpoint(self, run: Run) -> Any:
        """What submitit queues when the job's time is up: the same again, as runs go on where they were."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, run)


@overload
def submit(
    runs: Sequence[Run],
    folder: Path,
    parameters: Mapping[str, Any],
    *,
    cluster: str = ...,
    overwrite: bool = ...,
    wait: Literal[False] = ...,
    worker: Sequence[str] = ...,
) -> list[str]: ...


@overload
def submit(
    runs: Sequence[Run],
    folder: Path,
    parameters: Mapping[str, Any],
    *,
    cluster: str = ...,
    overwrite: bool = ...,
    wait: Literal[True],
    worker: Sequence[str] = ...,
) -> list[Failure]: ...


def submit(
    runs: Sequence[Run],
    folder: Path,
    parameters: Mapping[str, Any],
    *,
    cluster: str = "slurm",
    overwrite: bool = False,
    wait: bool = False,
    worker: Sequence[str] = WORKER,
) -> list[str] | list[Failure]:
    """Submit the runs that are not finished as one array job, with its logs in folder/slurm.

    parameters: submitit's, such as timeout_min, gpus_per_node, cpus_per_task, slurm_partition or
    slurm_array_parallelism; they are for one run. cluster: "local" runs the jobs here, for trying it out.

    Returns the jobs' numbers, or, with `wait`, the runs that were given up, when all jobs have ended. A second
    call while jobs wait or run submits again what is not finished; whichever job comes second finds the result
    or the other's lock, and ends without touching the run.

    Raises UserError without submitit, on a machine without Slurm, for parameters that submitit or Slurm
    refuses, and where a run was made by other code.
    """
    try:
        import submitit
    except ImportError:
        raise UserError('--launcher slurm needs submitit: pip install "deepkd_plugin[slurm]"') from None
    code = record.code_hash()
    todo = [run for run in runs if state(run, overwrite, code) != "finished"]
    if not todo:
        return []
    try:
        executor = submitit.AutoExecutor(folder / "slurm", cluster, slurm_max_num_timeout=TIMEOUTS)
        executor.update_parameters(**{**DEFAULTS, **parameters})
        jobs = executor.map_array(Job(code, overwrite, tuple(worker)), todo)
    # submitit's for a machine without Slurm, for what Slurm refuses, and for a parameter's name, value and type
    except (RuntimeError, NameError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--launcher slurm: submitit refuses: {reason}") from None
    if not wait:
        return [job.job_id for job in jobs]
    outcomes = [_outcome(job, run) for job, run in zip(jobs, todo)]
    return [failure for failure in outcomes if failure is not None]


def _outcome(job: Any, run: Run) -> Failure | None:
    """What a job returned, waited for; a Failure also where it was lost: cancelled, out of memory, its node gone."""
    from submitit.core.utils import UncompletedJobError

    try:
        return job.result()
    except UncompletedJobError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        return Failure(run, 1, 1, tuple(lines[-TAIL:]))
