"""A table's runs as one array job of a Slurm cluster, through submitit; a run may be a job of several tasks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UserError, shown
from ...run import record
from ...run.lock import HeldError
from ..table import Run
from .runs import WORKER, Crew, Failure, execute, state

TIMEOUTS = 100
"""How often a job whose time is up is queued again; it goes on from its run's checkpoint."""

SHAPE = ("nodes", "tasks_per_node", "gpus_per_node")
"""submitit's parameters that say how many processes a job is, and where."""

DEFAULTS = {"name": "deepkd", "timeout_min": 24 * 60}
"""submitit would give a job five minutes."""


@dataclass(frozen=True)
class Job:
    """What one job of the array does; submitit pickles it. tasks: how many processes the job is."""

    code: str
    overwrite: bool
    worker: tuple[str, ...] = WORKER
    tasks: int = 1

    def __call__(self, run: Run) -> Failure | None:
        """Train a run as runs.execute does; returns None if all is well, or if another process is training it.

        Of several tasks the first one decides and returns what became of the run; the others return None.
        """
        if self.tasks == 1:
            return self.train(run, None)
        from .tasks import joined

        try:
            with joined(self.worker, self.code) as tasks:
                return self.train(run, tasks.crew) if tasks.first else tasks.follow(run)
        except UserError as error:
            return Failure(run, 2, 0, (str(error),))

    def train(self, run: Run, make_crew: Callable[..., Crew] | None) -> Failure | None:
        """Train a run by a crew; see __call__."""
        if record.code_hash() != self.code:
            return Failure(run, 2, 0, ("the package's code was changed since the job was submitted",))
        try:
            failures = execute([run], 1, overwrite=self.overwrite, worker=self.worker, make_crew=make_crew)
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


def with_tasks(parameters: Mapping[str, Any], gpus: int | None = None) -> dict[str, Any]:
    """Return the parameters of a job, with a task for each of a run's GPUs.

    gpus: how many a run has on all nodes together; None leaves that to the parameters. Raises UserError if there would
    be another number of tasks than of GPUs, if tasks could not see their GPUs by number, and for what is no number.
    """
    nodes, each, cards = (_number(parameters, name) for name in SHAPE)
    if gpus is not None:
        if gpus % (nodes or 1):
            raise UserError(f"command line: --gpus-per-run is {gpus}; it must be a multiple of --slurm nodes={nodes}")
        right = gpus // (nodes or 1)
        for name, given in zip(SHAPE[1:], (each, cards)):
            if given not in (None, right):
                raise UserError(
                    f"command line: --slurm {name} is {given}; it must be {right} with --gpus-per-run {gpus}, or be "
                    f"left out"
                )
        parameters = {**dict.fromkeys(SHAPE[1:], right), **parameters}
    elif cards and cards != (each or 1):
        raise UserError(
            f"command line: --slurm gpus_per_node is {cards} and tasks_per_node {each or 1}; they must be equal, for "
            f"each task trains on one GPU (--gpus-per-run sets both)"
        )
    if tasks(parameters) > 1:
        for name in parameters:
            if "gpu" in name and "per_task" in name:
                raise UserError(
                    f"command line: --slurm {name} must be left out with several tasks, for each must see all GPUs of "
                    f"its node; gpus_per_node says how many these are"
                )
    return dict(parameters)


def tasks(parameters: Mapping[str, Any]) -> int:
    """Count the tasks of a job with these parameters, which train a run together."""
    nodes, each, _ = (_number(parameters, name) or 1 for name in SHAPE)
    return nodes * each


def _number(parameters: Mapping[str, Any], name: str) -> int | None:
    """Read one of SHAPE; None if it is not given. One with slurm_ before it comes first, and GPUs may have a type."""
    value = parameters.get(f"slurm_{name}", parameters.get(name))
    if value is None:
        return None
    text = str(value).rpartition(":")[2]
    if type(value) not in (int, str) or not text.isdecimal() or int(text) < (name != SHAPE[2]):
        raise UserError(f"command line: --slurm {name} is {shown(value)}; it must be a whole number")
    return int(text)


def submit(runs: Sequence[Run], folder: Path, parameters: Mapping[str, Any], *, overwrite: bool = False) -> list[str]:
    """Submit the runs that are not finished as one array job, with its logs in folder/slurm; returns the jobs' numbers.

    parameters: submitit's, such as timeout_min, nodes, tasks_per_node, gpus_per_node, cpus_per_task, slurm_partition or
    slurm_array_parallelism; they are for one run (with_tasks).

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
        jobs = executor.map_array(Job(code, overwrite, tasks=tasks(parameters)), todo)
    # submitit's for a machine without Slurm, for what Slurm refuses, and for a parameter's name, value and type
    except (RuntimeError, NameError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--launcher slurm: submitit refuses: {reason}") from None
    return [job.job_id for job in jobs]
