"""Real runs that two processes train together on CPUs, by gloo: of torchrun on this machine, and as tasks of a job."""

import importlib.util
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from test_runs import Told, command, ended, is_free, read, tiny_runs, wait_for
from test_slurm import interrupt

from deepkd_plugin import device, extensions, launch
from deepkd_plugin.run import checkpoint, record
from deepkd_plugin.run.metrics import read_metrics
from deepkd_plugin.study.reproduce.runs import WORKER, execute
from deepkd_plugin.study.reproduce.slurm import Job

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc"),
    pytest.mark.skipif(
        importlib.util.find_spec("mdistiller") is not None,
        reason="processes of their own would train on the installed mdistiller as host",
    ),
]

NETWORK = """
from torch import nn

def plain(num_classes):  # without BatchNorm, whose means are over a process's share
    features = nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()
    return nn.Sequential(*features, nn.Linear(128, num_classes))
"""


@pytest.fixture
def make(tmp_path, data_root, monkeypatch):
    """make(name) -> a run of a network without BatchNorm, on CPUs; make.worker trains it."""
    (tmp_path / "modules").mkdir()
    module = f"network_of_{tmp_path.name}"  # of this test alone: a module that was imported is not read again
    (tmp_path / f"modules/{module}.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    # other tests leave a checkout of mdistiller in the path, which would be the host
    paths = [path for path in sys.path if not (Path(path) / "mdistiller").is_dir()]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setattr(extensions, "_contents", {})
    monkeypatch.setenv(extensions.VARIABLE, "")
    monkeypatch.delenv("MDISTILLER_ROOT", raising=False)
    monkeypatch.setattr(device, "count", lambda: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)

    def run(name, *options):
        words = ("DISTILLER.STUDENT", f"{module}:plain", "DATASET.NUM_WORKERS", "1", *options)
        return tiny_runs(tmp_path / name, data_root, 1, words)[0]

    run.worker = (*WORKER[:-1], json.dumps(paths))
    return run


@pytest.fixture
def alone(make):
    """The same run, trained by one process."""
    run = make("alone")
    assert launch.main(["--cfg", str(run.config), *run.options]) == 0
    return run


def check_same(run, alone):
    """They are of one config, and took the same steps to rounding."""
    assert read(run)["config_hash"] == read(alone)["config_hash"] == run.hash
    weights, expected = (checkpoint.load(r.folder / "student_latest", "test")["model"] for r in (run, alone))
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, atol=1e-5, rtol=1e-4)
    assert [line["epoch"] for line in read_metrics(run.folder)] == [1, 2, 3]
    assert [record.processes(read(one)) for one in (run, alone)] == [(2,), (1,)]


def processes(run):
    """What torchrun has started for a run: {rank: process}, and its own process as "torchrun"."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words, given = (path / "cmdline").read_text(), (path / "environ").read_text()
        except OSError:
            continue
        if str(run.folder.parents[1]) in words and "worker.main" in words:
            rank = [entry.partition("=")[2] for entry in given.split("\0") if entry.startswith("RANK=")]
            found[rank[0] if rank else "torchrun"] = int(path.name)
    return found


def sessions(run):
    """How often a run has begun or gone on."""
    about = record.find_run(run.folder)
    return len(about.get("resumed", ())) + bool(about)


def test_a_run_of_two_processes_that_are_ended_in_every_way_ends_as_that_of_one(make, alone):
    """Its command gets SIGTERM, then one of its processes SIGKILL, and then the one that started them."""
    run = make("together")
    pid = command([run], 1, worker=make.worker, together=2)
    wait_for(lambda: read_metrics(run.folder), 300)
    assert set(processes(run)) == {"0", "1", "torchrun"}
    assert not is_free(run)
    os.kill(pid, signal.SIGTERM)
    assert ended(pid) == 143
    assert not processes(run)
    assert is_free(run)
    assert "Traceback" not in (run.folder / "log.txt").read_text()

    pid = command([run], 1, worker=make.worker, together=2)
    for number, which in ((2, "1"), (3, "torchrun")):
        wait_for(lambda least=number: sessions(run) == least, 300)
        before = processes(run)
        os.kill(before[which], signal.SIGKILL)
        wait_for(lambda gone=before: not set(gone.values()) & set(processes(run).values()), 60)
    assert ended(pid) == 0
    log = (run.folder / "log.txt").read_text()
    assert "deepkd: process 1 of 2 was killed by SIGKILL\n" in log
    assert log.count(" torchrun --standalone --nproc_per_node 2 tools/train.py --cfg ") == 4
    assert sessions(run) == 4
    check_same(run, alone)


def test_a_mistake_that_all_processes_find_is_told_once_and_final(make):
    run, told = make("together", "SOLVER.BATCH_SIZE", "1"), Told()
    (failure,) = execute([run], 1, display=told, worker=make.worker, together=2)
    assert (failure.code, failure.attempts, len(failure.lines)) == (2, 1, 1)
    assert failure.lines[0].startswith("deepkd: error: command line: SOLVER.BATCH_SIZE is 1; it must be at least 2")


def test_two_tasks_of_a_job_train_a_run_as_one_process(make, alone, tmp_path):
    """The job's time is up after the first epoch."""
    submitit = pytest.importorskip("submitit", reason='pip install "deepkd_plugin[slurm]"')
    run = make("together")
    executor = submitit.AutoExecutor(tmp_path / "slurm", "local")
    executor.update_parameters(tasks_per_node=2, timeout_min=30)
    job = executor.submit(Job(record.code_hash(), False, make.worker, 2), run)
    wait_for(lambda: read_metrics(run.folder), 300)
    interrupt(job)
    assert job.results() == [None, None]
    assert sessions(run) == 2
    assert not processes(run)
    check_same(run, alone)
