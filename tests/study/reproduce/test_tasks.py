"""Tasks of a job that train a run together, here as threads with a process each (fake_worker.py)."""

import datetime
import os
import signal
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.distributed import TCPStore

from deepkd_plugin.distributed import process_group
from deepkd_plugin.errors import UserError
from deepkd_plugin.run import record
from deepkd_plugin.run.lock import locked
from deepkd_plugin.study.reproduce import runs as runs_module
from deepkd_plugin.study.reproduce import tasks as module
from deepkd_plugin.study.reproduce.runs import execute, state
from deepkd_plugin.study.reproduce.slurm import Job
from deepkd_plugin.study.reproduce.tasks import Tasks, joined


class InAThread(Tasks):
    """A task whose process gets its numbers here, as threads share what submitit would export."""

    def environment(self, port):
        ours = {"RANK": str(self.rank), "WORLD_SIZE": str(self.size), "MASTER_ADDR": "localhost"}
        return super().environment(port) | ours


@pytest.fixture
def job(fake_run, monkeypatch):
    """job(run) -> what the first of a job's two tasks returns, when both have ended."""
    monkeypatch.setattr(module, "LOOK", 0.05)

    def train(run):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        each = []
        for rank in range(2):
            store = TCPStore("localhost", port, None, not rank, datetime.timedelta(seconds=30), wait_for_workers=False)
            numbers = SimpleNamespace(rank=rank, world_size=2, local_world_size=2)
            each.append(InAThread(fake_run.worker, record.code_hash(), numbers, store))
        first, other = each
        follower = threading.Thread(target=other.follow, args=[run])
        follower.start()
        try:
            return Job(record.code_hash(), False, fake_run.worker, 2).train(run, first.crew)
        finally:
            first.end()
            follower.join(30)
            assert not follower.is_alive()

    return train


def log(run):
    return (run.folder / "log.txt").read_text()


def test_each_task_has_a_process_of_the_run(job, fake_run):
    run = fake_run()
    assert job(run) is None
    assert state(run) == "finished"
    command, *lines = log(run).splitlines()
    assert " torchrun --nnodes 1 --nproc_per_node 2 tools/train.py --cfg " in command
    assert lines == ["from epoch 0"]


def test_all_begin_again_if_the_first_process_fails(job, fake_run):
    run = fake_run(FAIL="1:1")
    assert job(run) is None
    assert state(run) == "finished"
    assert log(run).count("the reason") == 1
    assert [line for line in log(run).splitlines() if "from" in line] == ["from epoch 0", "from epoch 1"]


def test_all_begin_again_if_another_process_is_killed(job, fake_run, capsys):
    run = fake_run(OTHER="-9:1", SECONDS="0.1")
    assert job(run) is None
    assert state(run) == "finished"
    assert "deepkd: process 1 of 2 was killed by SIGKILL\n" in log(run)
    told = "failed    pair kd seed 0: killed by SIGKILL, try 1 of 3: deepkd: process 1 of 2 was killed by SIGKILL\n"
    assert told in capsys.readouterr().out


def test_a_mistake_that_another_process_finds_is_final(job, fake_run, capsys):
    failure = job(fake_run(OTHER="2:9", SECONDS="0.1"))
    assert (failure.code, failure.attempts) == (2, 1)
    assert "the other's reason" in failure.lines


def test_a_process_that_does_not_see_that_another_has_failed_is_ended(job, fake_run, monkeypatch):
    monkeypatch.setattr(process_group, "GRACE", 0.2)
    run = fake_run(OTHER="2:9", BLIND="", SECONDS="20")
    started = time.monotonic()
    assert job(run).code == 2
    assert time.monotonic() - started < 15


def test_the_others_end_if_nothing_is_to_be_done(job, fake_run, monkeypatch):
    monkeypatch.setattr(runs_module, "PATIENCE", 0.1)
    run = fake_run()
    with locked(run.folder):
        assert job(run) is None  # another process trains it
    assert not (run.folder / "log.txt").exists()
    assert execute([run], 1, worker=fake_run.worker) == []
    assert job(run) is None
    assert log(run).count("from epoch") == 1


def test_another_task_ends_with_the_first(fake_run):
    """As when a job's time is up: the first task goes, and the store with it."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if not pid:
        store = TCPStore("localhost", 0, None, True, datetime.timedelta(seconds=30), wait_for_workers=False)
        os.write(write_end, str(store.port).encode())
        time.sleep(60)
        os._exit(0)
    port = int(os.read(read_end, 10))
    store = TCPStore("localhost", port, None, False, datetime.timedelta(seconds=30), wait_for_workers=False)
    numbers = SimpleNamespace(rank=1, world_size=2, local_world_size=2)
    follower = threading.Thread(target=Tasks(fake_run.worker, "", numbers, store).follow, args=[fake_run()])
    follower.start()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    follower.join(20)
    assert not follower.is_alive()


def test_the_threads_of_a_process_are_the_task_s(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(module, "cores", lambda: 9)
    numbers = SimpleNamespace(rank=1, world_size=8, local_world_size=4)
    tasks = Tasks((), "", numbers, None)
    assert tasks.environment(2)["OMP_NUM_THREADS"] == "2"
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "3")
    assert tasks.environment(2)["OMP_NUM_THREADS"] == "3"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert tasks.environment(2)["OMP_NUM_THREADS"] == "7"
    assert tasks.environment(2)["MASTER_PORT"] == "2"


def test_the_first_task_does_not_end_before_the_others_have_come(monkeypatch):
    helpers = pytest.importorskip("submitit.helpers", reason='pip install "deepkd_plugin[slurm]"')
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def exported(**how):
        assert how == {"set_cuda_visible_devices": False, "overwrite": True}  # each takes its card by LOCAL_RANK
        rank = int(threading.current_thread().name)
        numbers = {"rank": rank, "world_size": 2, "local_world_size": 2}
        return SimpleNamespace(master_addr="localhost", master_port=port, **numbers)

    monkeypatch.setattr(helpers, "TorchDistributedEnvironment", lambda: SimpleNamespace(export=exported))
    monkeypatch.setattr(module, "LOOK", 0.05)
    heard = []

    def task():
        with joined((), "") as tasks:
            heard.append(None if tasks.first else tasks.hear())

    threads = [threading.Thread(target=task, name=str(rank), daemon=True) for rank in range(2)]
    for thread in threads:
        thread.start()
        time.sleep(0.5)
    for thread in threads:
        thread.join(10)
    assert heard == [None, None]


def test_tasks_that_cannot_meet_say_so(monkeypatch):
    helpers = pytest.importorskip("submitit.helpers", reason='pip install "deepkd_plugin[slurm]"')
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        numbers = SimpleNamespace(master_addr="localhost", master_port=port, rank=0, world_size=2)
        exported = SimpleNamespace(export=lambda **how: numbers)
        monkeypatch.setattr(helpers, "TorchDistributedEnvironment", lambda: exported)
        with (
            pytest.raises(UserError, match=r"^Slurm: the tasks of this job cannot meet at localhost:\d+ \("),
            joined((), ""),
        ):
            pass
        failure = Job(record.code_hash(), False, (), 2)(Path())
    assert failure.code == 2
