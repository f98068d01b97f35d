"""A table's runs as one array job of a Slurm cluster, through submitit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...run import record
from ...run.lock import HeldError
from ..table import Run
from .runs import WORKER, Failure, execute, state

TIMEOUTS = 100
"""How often a job whose time is up is queued again; it goes on from its run's checkpoint."""

DEFAULTS = {"name": "deepkd", "timeout_min": 24 * 60}
"""submitit would give a job five minutes."""


@dataclass(frozen=True)
class Job:
    """What one job of the array does; submitit pickles it."""

    code: str
    overwrite: bool
    worker: tuple[str, ...] = WORKER

    def __call__(self, run: Run) -> Failure | None:
        """Train a run as runs.execute does; returns None if all is well, or if another process is training it."""
        if record.code_hash() != self.code:
            return Failure(run, 2, 0, ("the package's code was changed since the job was submitted",))
        try:
            failures = execute([run], 1, overwrite=self.overwrite, worker=self.worker)
        except HeldError as error:
            print(error)
            return None
        except UserError as error:
            return Failure(run, 2, 1, (str(error),))
        return failures[0] if failures else None

    def checkpoint(self, run: Run) -> Any:
        """Say what submitit queues when the job's time is up: the same again, as runs go on where they were."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, run)


def submit(runs: Sequence[Run], folder: Path, parameters: Mapping[str, Any], *, overwrite: bool = False) -> list[str]:
    """Submit the runs that are not finished as one array job, with its logs in folder/slurm; returns the jobs' numbers.

    parameters: submitit's, such as timeout_min, gpus_per_node, cpus_per_task, slurm_partition or
    slurm_array_parallelism; they are for one run.

    A second call while jobs wait or run submits again what is not finished; whichever job comes second finds the
    result or the other's lock, and ends without touching the run.

    Raises UserError without submitit, on a machine without Slurm, for parameters that submitit or Slurm refuses, and
    if a run was made by other code.
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
        executor = submitit.AutoExecutor(folder / "slurm", "slurm", slurm_max_num_timeout=TIMEOUTS)
        executor.update_parameters(**{**DEFAULTS, **parameters})
        jobs = executor.map_array(Job(code, overwrite), todo)
    # submitit's for a machine without Slurm, for what Slurm refuses, and for a parameter's name, value and type
    except (RuntimeError, NameError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--launcher slurm: submitit refuses: {reason}") from None
    return [job.job_id for job in jobs]
