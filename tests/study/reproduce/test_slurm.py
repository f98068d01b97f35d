"""A table as an array job: on submitit's local executor, and as what Slurm would be given."""

import contextlib
import importlib.util
import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from deepkd_plugin.errors import UserError
from deepkd_plugin.run import record
from deepkd_plugin.run.lock import locked
from deepkd_plugin.study.reproduce import runs as runs_module
from deepkd_plugin.study.reproduce.runs import OtherCodeError, execute, state
from deepkd_plugin.study.reproduce.slurm import Job, submit, tasks, with_tasks

needs_submitit = pytest.mark.skipif(
    importlib.util.find_spec("submitit") is None,
    reason='submitit is not installed: pip install "deepkd_plugin[slurm]"',
)


def log(run):
    return (run.folder / "log.txt").read_text()


def test_without_submitit(fake_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r'needs submitit: pip install "deepkd_plugin\[slurm\]"'):
        submit([fake_run()], tmp_path, {})


def submitted(runs, folder, worker, tasks=1):
    """The jobs of these runs, as submitit runs them here."""
    import submitit

    executor = submitit.AutoExecutor(folder / "slurm", "local")
    executor.update_parameters(tasks_per_node=tasks, timeout_min=30)
    return executor.map_array(Job(record.code_hash(), False, worker, tasks), runs)


def interrupt(job):
    """Tell all tasks of a job that its time is up, as Slurm does 90 seconds before."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int((path / "stat").read_text().rpartition(")")[2].split()[1]) == job._process.pid:
                os.kill(int(path.name), signal.SIGUSR2)


def results(runs, folder, worker):
    """What these jobs return."""
    return [job.result() for job in submitted(runs, folder, worker)]


@needs_submitit
@pytest.mark.slow
def test_jobs_train_their_runs(fake_run, tmp_path):
    runs = [fake_run(0), fake_run(1, FAIL="2:1")]
    well, failure = results(runs, tmp_path, fake_run.worker)
    assert well is None
    assert (failure.run, failure.code, failure.attempts) == (runs[1], 2, 1)
    assert failure.lines == ("from epoch 0", "the reason")
    assert [state(run) for run in runs] == ["finished", "resumable"]
    logs = [path.read_text() for path in (tmp_path / "slurm").glob("*.out")]
    assert sum("finished  pair kd seed 0: best " in text for text in logs) == 1
    # the rest is one call more
    assert results(runs[1:], tmp_path, fake_run.worker) == [None]
    assert state(runs[1]) == "finished"


@needs_submitit
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="finds the job's process in /proc")
@pytest.mark.slow
@pytest.mark.parametrize("tasks", [1, 2])
def test_a_job_whose_time_is_up_is_queued_again_and_goes_on(fake_run, tmp_path, tasks):
    run = fake_run(SECONDS="0.7")
    (job,) = submitted([run], tmp_path, fake_run.worker, tasks)
    deadline = time.monotonic() + 300
    while state(run) != "resumable":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    interrupt(job)
    assert job.results() == [None] * tasks
    assert state(run) == "finished"
    starts = [line for line in log(run).splitlines() if line.startswith("from epoch")]
    assert len(starts) == 2
    assert starts[0] == "from epoch 0" < starts[1]


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A machine with Slurm's commands, which keep what they were given: the folder of that."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (
        ("srun", ""),
        ("sbatch", f'grep -q partition=none "$1" && {{ echo "invalid partition" >&2; exit 1; }}\n'
                   f'cat "$1" >> {folder}/submitted; echo Submitted batch job 123'),
    ):  # fmt: skip
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


@needs_submitit
def test_what_slurm_is_given(fake_run, tmp_path, cluster):
    runs = [fake_run(seed) for seed in range(3)]
    parameters = {"gpus_per_node": 1, "slurm_partition": "gpu", "slurm_array_parallelism": 2}
    assert submit(runs, tmp_path, parameters) == ["123_0", "123_1", "123_2"]
    given = (cluster / "submitted").read_text().splitlines()
    for line in ("array=0-2%2", "job-name=deepkd", "gpus-per-node=1", "partition=gpu", "time=1440"):
        assert given.count(f"#SBATCH --{line}") == 1
    assert any(line.startswith(f"#SBATCH --output={tmp_path}/slurm/") for line in given)
    submit(runs, tmp_path, {"timeout_min": 60, "name": "table"})
    given = (cluster / "submitted").read_text()
    assert "#SBATCH --time=60\n" in given
    assert "#SBATCH --job-name=table\n" in given
    (cluster / "submitted").unlink()
    submit(runs, tmp_path, with_tasks({"nodes": 2}, 16))
    given = (cluster / "submitted").read_text().splitlines()
    for line in ("nodes=2", "ntasks-per-node=8", "gpus-per-node=8"):
        assert given.count(f"#SBATCH --{line}") == 1


@needs_submitit
def test_what_is_finished_is_not_submitted(fake_run, tmp_path, cluster):
    runs = [fake_run(seed) for seed in range(3)]
    assert execute(runs[:1], 1, worker=fake_run.worker) == []
    assert submit(runs, tmp_path, {}) == ["123_0", "123_1"]
    assert execute(runs, 2, worker=fake_run.worker) == []
    (cluster / "submitted").unlink()
    assert submit(runs, tmp_path, {}) == []
    assert not (cluster / "submitted").exists()


@needs_submitit
@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"gpu": 1}, "Parameter 'gpu' need to be prefixed"),
        ({"slurm_gpu": 1}, "Unknown argument 'gpu' for executor 'slurm'"),
        ({"timeout_min": "long"}, 'Parameter "timeout_min" expected type'),
        ({"slurm_partition": "none"}, "invalid partition"),
    ],
)
def test_parameters_that_are_refused(fake_run, tmp_path, cluster, parameters, expected):
    with pytest.raises(UserError) as error:
        submit([fake_run(0), fake_run(1)], tmp_path, parameters)
    message = str(error.value)
    assert message.startswith(f"--launcher slurm: submitit refuses: {expected}")
    assert "\n" not in message


@needs_submitit
def test_a_machine_without_slurm(fake_run, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match='submitit refuses: Could not detect "srun"'):
        submit([fake_run()], tmp_path, {})


@pytest.mark.parametrize(
    ("given", "gpus", "expected", "count"),
    [
        ({}, None, {}, 1),
        ({"gpus_per_node": 1}, None, {"gpus_per_node": 1}, 1),
        ({"nodes": 2}, None, {"nodes": 2}, 2),
        ({}, 4, {"tasks_per_node": 4, "gpus_per_node": 4}, 4),
        ({"nodes": 2}, 8, {"nodes": 2, "tasks_per_node": 4, "gpus_per_node": 4}, 8),
        ({"gpus_per_node": 4}, 4, {"tasks_per_node": 4, "gpus_per_node": 4}, 4),
        ({"tasks_per_node": 2}, None, {"tasks_per_node": 2}, 2),  # on CPUs
        *(({"nodes": 2, "tasks_per_node": 8, key: gpus}, None, {}, 16) for key, gpus in (
            ("gpus_per_node", 8), ("slurm_gpus_per_node", "a100:8")
        )),
    ],
)  # fmt: skip
def test_a_job_has_a_task_for_each_gpu(given, gpus, expected, count):
    made = with_tasks(given, gpus)
    assert made in (expected, given)
    assert tasks(made) == count


@pytest.mark.parametrize(
    ("given", "gpus", "expected"),
    [
        ({"gpus_per_node": 8}, None, "gpus_per_node is 8 and tasks_per_node 1; they must be equal"),
        ({"gpus_per_node": 8, "slurm_tasks_per_node": 4}, None, "gpus_per_node is 8 and tasks_per_node 4"),
        ({"tasks_per_node": 2}, 4, "tasks_per_node is 2; it must be 4 with --gpus-per-run 4, or be left out"),
        ({"slurm_gpus_per_node": "a100:2", "nodes": 2}, 8, "gpus_per_node is 2; it must be 4 with --gpus-per-run 8"),
        ({"nodes": 3}, 8, "--gpus-per-run is 8; it must be a multiple of --slurm nodes=3"),
        ({"nodes": "two"}, None, "nodes is 'two'; it must be a whole number"),
        ({"tasks_per_node": 0}, None, "tasks_per_node is 0; it must be a whole number"),
        ({"tasks_per_node": True}, None, "tasks_per_node is True; it must be a whole number"),
        ({"slurm_gpus_per_task": 1, "tasks_per_node": 2}, None, "slurm_gpus_per_task must be left out with several"),
    ],
)
def test_tasks_that_do_not_fit_their_gpus_are_refused(given, gpus, expected):
    with pytest.raises(UserError) as error:
        with_tasks(given, gpus)
    message = str(error.value)
    assert message.startswith("command line: --")
    assert expected in message
    assert "\n" not in message


def test_jobs_do_not_mix_code(fake_run, tmp_path):
    run = fake_run()
    failure = Job("before", False, fake_run.worker)(run)
    assert (failure.run, failure.code) == (run, 2)
    assert failure.lines == ("the package's code was changed since the job was submitted",)
    assert not run.folder.exists()


@needs_submitit
def test_a_run_of_other_code_is_refused_or_made_anew(fake_run, tmp_path, cluster):
    run = fake_run()
    execute([run], 1, worker=fake_run.worker)
    before = json.loads((run.folder / "run.json").read_text())
    (run.folder / "run.json").write_text(json.dumps(before | {"code": "before"}))
    with pytest.raises(OtherCodeError, match="was made by other code"):
        submit([run], tmp_path, {})
    failure = Job(record.code_hash(), False, fake_run.worker)(run)
    assert failure.code == 2
    assert "was made by other code" in failure.lines[0]
    assert submit([run], tmp_path, {}, overwrite=True) == ["123"]
    assert Job(record.code_hash(), True, fake_run.worker)(run) is None
    assert state(run) == "finished"


def test_a_job_leaves_a_run_alone_that_another_trains_or_has_finished(fake_run, capsys, monkeypatch):
    monkeypatch.setattr(runs_module, "PATIENCE", 0.1)
    run = fake_run()
    job = Job(record.code_hash(), False, fake_run.worker)
    with locked(run.folder):
        assert job(run) is None
    assert f"process {os.getpid()} on " in capsys.readouterr().out
    assert not (run.folder / "log.txt").exists()
    assert job(run) is None
    assert log(run).count("from epoch") == 1
    assert job(run) is None
    assert job(replace(run, hash="89ab")).code == 2  # planned anew, under another config
    assert log(run).count("from epoch") == 1
