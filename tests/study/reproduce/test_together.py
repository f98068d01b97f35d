"""Runs that several processes train together: by torchrun on this machine, and as tasks of a job. On CPUs, by gloo."""

import contextlib
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from test_runs import CONFIG, Told, command, ended, environment, is_free, numbers, read, tiny_runs, wait_for

from deepkd_plugin import device, launch
from deepkd_plugin.run import checkpoint
from deepkd_plugin.run.metrics import read_metrics
from deepkd_plugin.study.reproduce.runs import WORKER, execute, state

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
in_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")

NETWORK = """
from torch import nn

def plain(num_classes):  # without BatchNorm, whose means are over a process's share
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, num_classes))
"""


@pytest.fixture
def on_cpus(tmp_path, monkeypatch):
    """on_cpus(name, count) -> runs of a network without BatchNorm; on_cpus.worker trains them on CPUs."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules/a_plain_network.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.delenv("MDISTILLER_ROOT", raising=False)
    monkeypatch.setattr(device, "count", lambda: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    root = Path(os.environ.get("DATA", tmp_path))

    def make(name, data_root, count=1):
        options = ("DISTILLER.STUDENT", "a_plain_network:plain", "DATASET.NUM_WORKERS", "1")
        return tiny_runs(tmp_path / name, data_root, count, options)

    make.worker = (*WORKER[:-1], json.dumps(__import__("sys").path))
    return make


def weights(run):
    return checkpoint.load(run.folder / "student_latest", "test")["model"]


@pytest.mark.slow
def test_x(on_cpus, data_root):
    (alone,), (run,) = on_cpus("alone", data_root), on_cpus("together", data_root)
    assert launch.main(["--cfg", str(alone.config), *alone.options]) == 0
    told = Told()
    assert execute([run], 1, display=told, worker=on_cpus.worker, together=2) == [], (run.folder / "log.txt").read_text()
    print((run.folder / "log.txt").read_text())
    print(read(run))
    print(max((weights(run)[n]-weights(alone)[n]).abs().max() for n in weights(run)))
    print(read_metrics(run.folder)[-1], read_metrics(alone.folder)[-1])
