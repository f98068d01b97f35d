"""Processes of one run that are killed or find a mistake: the others end within seconds, and the run goes on."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import small
import test_several as several
from processes import job, wait_for

from deepkd_plugin import launch, trainer
from deepkd_plugin.distributed import collectives, process_group
from deepkd_plugin.errors import UserError
from deepkd_plugin.run import record

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")]
ROOT = Path(__file__).parents[1]


def train(folder, resume=False, overwrite=False, **keys):
    trainer.READ_EVERY = 1
    launch.run(several.make(folder, **keys), resume, overwrite, "torchrun")


def test_a_run_whose_processes_are_killed_goes_on_bitwise(tmp_path):
    """10 times, at random moments, one of its two processes; the run also saves itself inside its epochs."""
    codes, outputs = job(partial(train, tmp_path / "whole"), tmp_path)
    assert codes == [0, 0], outputs
    draw, kills, runs = random.Random(0), 0, 0
    while kills < 10:
        runs += 1
        folder = tmp_path / f"cut {runs}"
        for _ in range(20):
            latest = (folder / "run/latest").is_file()
            begun = (folder / "run/run.json").is_file()

            def kill(pids):
                time.sleep(draw.uniform(0.2, 1.5))
                os.kill(pids[draw.randrange(2)], signal.SIGKILL)
                kill.at = time.monotonic()

            work = partial(train, folder, latest, begun and not latest, CHECKPOINT_MINUTES=1e-9)
            codes, outputs = job(work, tmp_path, kill)
            assert time.monotonic() - kill.at < 10
            if -signal.SIGKILL not in codes:
                break
            kills += 1
            killed = codes.index(-signal.SIGKILL)
            if killed and codes[0]:
                *_, line = outputs[0].splitlines()
                assert "another process of this run has ended" in line or "cannot be joined" in line
            assert "Traceback" not in "".join(outputs)
        assert codes == [0, 0] or "epochs done" in outputs[0], outputs
        assert small.same(small.weights(folder / "run"), small.weights(tmp_path / "whole/run"))
        assert several.records(folder / "run") == several.records(tmp_path / "whole/run")
        assert not list((folder / "run").glob(".*.tmp"))
    print(f"killed at {kills} random moments of {runs} runs")


def fail(folder, where):
    made = several.make(folder)
    prepare = made.prepare

    def failing(batch, epoch, step):
        if epoch == 2 and process_group.rank() in where:
            raise UserError("the images are not what they were")
        return prepare(batch, epoch, step)

    made.prepare = failing
    launch.run(made, False, False, "torchrun")


def test_a_mistake_that_one_process_finds_ends_all_with_its_line(tmp_path):
    codes, outputs = job(partial(fail, tmp_path, [1]), tmp_path)
    assert codes == [1, 2]
    assert outputs[1] == "deepkd: error: process 1 of 2: the images are not what they were\n"
    *_, line = outputs[0].splitlines()
    assert line.startswith("deepkd: another process of this run has ended. The last checkpoint is whole: ")
    assert line.endswith("latest (epoch 1). Resume with: torchrun --resume")


def test_a_mistake_that_all_find_is_told_once(tmp_path):
    codes, outputs = job(partial(fail, tmp_path, [0, 1]), tmp_path)
    assert codes == [2, 2]
    assert outputs[0].splitlines()[-1] == "deepkd: error: the images are not what they were"
    assert outputs[1] == ""


def test_the_first_process_ends_in_time_though_it_waits_for_another(tmp_path, monkeypatch):
    """It sees no signal while it waits; here the other does not come."""
    monkeypatch.setattr(process_group, "GRACE", 1.0)
    work = lambda: time.sleep(60) if process_group.rank() else collectives.wait()  # noqa: E731

    def end(pids):
        time.sleep(1.5)
        os.kill(pids[0], signal.SIGTERM)
        end.at = time.monotonic()
        wait_for(lambda: os.waitid(os.P_PID, pids[0], os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None)
        assert time.monotonic() - end.at < 5
        os.kill(pids[1], signal.SIGKILL)

    codes, _ = job(work, tmp_path, end)
    assert codes[0] == 128 + signal.SIGTERM


def torchrun(folder, data_root, *flags):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *flags]
    command += ["tools/train.py", "--cfg", "configs/glyphs100/res20_res8/deepkd.yaml", "SOLVER.EPOCHS", "3"]
    command += ["DATASET.TRAIN_PER_CLASS", "2", "DATASET.HOLDOUT", "0.02", "DATASET.NUM_WORKERS", "1"]
    command += ["DISTILLER.FOLD_TEACHER", "False"]  # two runs that measure it may choose differently
    command += ["DATASET.ROOT", str(data_root), "LOG.PREFIX", str(folder), "EXPERIMENT.NAME", "run"]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def processes(rank):
    """The processes of this rank that torchrun has started."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words, environment = (path / "cmdline").read_text(), (path / "environ").read_text()
        except OSError:
            continue
        if "tools/train.py" in words and "torch.distributed.run" not in words and f"\0RANK={rank}\0" in environment:
            yield int(path.name)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
def test_torchrun_trains_one_run_and_starts_it_again(tmp_path, data_root):
    started = [torchrun(tmp_path / name, data_root, "--max-restarts", "2") for name in ("whole", "cut")]
    latest = tmp_path / "cut/glyphs100/run/latest"
    wait_for(latest.exists, 300)
    for pid in processes(1):
        if str(tmp_path / "cut") in Path(f"/proc/{pid}/cmdline").read_text():
            os.kill(pid, signal.SIGKILL)
            break
    ended = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0, 0], ended[1][1][-6000:]
    folders = [tmp_path / name / "glyphs100/run" for name in ("whole", "cut")]
    assert small.same(small.weights(folders[1]), small.weights(folders[0]))
    runs = [json.loads((folder / record.FILE).read_text()) for folder in folders]
    assert [run["processes"] for run in runs] == [2, 2]
    assert [len(run.get("resumed", [])) for run in runs] == [0, 1]
    assert runs[0]["command"].startswith("torchrun --nproc_per_node 2 tools/train.py --cfg ")
    assert ended[0][0].count("BatchNorm takes its means over a process's share of 64 images") == 1
    # a run of another launcher is refused in every attempt, and told of once in each
    again = torchrun(tmp_path / "whole", data_root, "--max-restarts", "1")
    err = again.communicate(timeout=300)[1]
    assert again.returncode == 1
    lines = [line for line in err.splitlines() if line.startswith("deepkd: ")]
    assert len(lines) == 2
    assert all(re.search("holds a run already", line) for line in lines)
