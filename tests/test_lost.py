"""Processes of one run that are killed or find a mistake: the others end within seconds, and the run goes on."""

import json
import os
import random
import re
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import small
import test_several as several
from processes import free_port, job, kill, torchrun, wait_for

from deepkd_plugin import launch, trainer
from deepkd_plugin.distributed import collectives, process_group
from deepkd_plugin.errors import UserError
from deepkd_plugin.run import lock, record

pytestmark = pytest.mark.slow


def train(folder, resume=False, overwrite=False, **keys):
    trainer.READ_EVERY = 1
    launch.run(several.make(folder, **keys), resume, overwrite, "torchrun")


def test_a_run_whose_processes_are_killed_goes_on_bitwise(tmp_path):
    """10 times, at random moments, one of its two processes; the run also saves itself inside its epochs."""
    lasts = []

    def measure(processes):
        begun = time.monotonic()
        wait_for(lambda: not any(process.is_alive() for process in processes), 300)
        lasts.append(time.monotonic() - begun)

    codes, outputs = job(partial(train, tmp_path / "whole", CHECKPOINT_MINUTES=1e-9), tmp_path, measure)
    assert codes == [0, 0], outputs
    draw, seconds, runs, resumed = random.Random(0), [], 0, 0

    def end_one(processes):
        # one that has ended before is no kill
        processes[0].join(draw.uniform(0, lasts[0]))
        end_one.at = time.monotonic()
        processes[draw.randrange(2)].kill()

    while len(seconds) < 10:
        runs += 1
        assert runs < 40, "hardly a run lives until it is killed"
        folder, codes = tmp_path / f"cut {runs}", [-signal.SIGKILL]
        while -signal.SIGKILL in codes:
            latest = (folder / "run/latest").is_file()
            begun = (folder / "run/run.json").is_file()
            work = partial(train, folder, latest, begun and not latest, CHECKPOINT_MINUTES=1e-9)
            codes, outputs = job(work, tmp_path, end_one)
            assert "Traceback" not in "".join(outputs)
            if -signal.SIGKILL in codes:
                seconds.append(time.monotonic() - end_one.at)
                resumed += latest
                if codes.index(-signal.SIGKILL) and codes[0]:
                    # of a run that was whole before, the first process says so, and the other has yet to end
                    assert re.search("another process of this run has ended|epochs done", outputs[0].splitlines()[-1])
        assert codes == [0, 0] or "epochs done" in outputs[0], outputs
        assert small.same(small.weights(folder / "run"), small.weights(tmp_path / "whole/run"))
        assert several.records(folder / "run") == several.records(tmp_path / "whole/run")
        assert not list((folder / "run").glob(".*.tmp"))
    print(f"killed at {len(seconds)} random moments of {runs} runs, {resumed} of them resumed; ended in {seconds}")
    assert resumed
    # a process that waits for a lost one would wait for half an hour; one of them may have to wait for a busy processor
    assert sorted(seconds)[5] < 10
    assert max(seconds) < 60


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


def test_a_second_job_in_one_folder_is_refused(tmp_path):
    with lock.ours(tmp_path / "run"):
        codes, outputs = job(partial(train, tmp_path), tmp_path)
    assert codes[0] == 2
    assert codes[1] in (1, 2)
    assert re.fullmatch(rf"deepkd: error: .*run: process {os.getpid()} on .* is at work there; .*\n", outputs[0])
    assert outputs[1] == ""
    assert not (tmp_path / "run").exists()


def wait_for_one_that_does_not_come():
    process_group.GRACE = 1.0
    if process_group.rank():
        time.sleep(600)
    collectives.wait()


def test_the_first_process_ends_in_time_though_it_waits_for_another(tmp_path):
    """It sees no signal while it waits."""

    def end(processes):
        time.sleep(1.5)  # so that it waits
        processes[0].terminate()
        processes[0].join(60)
        assert not processes[0].is_alive()
        processes[1].kill()

    codes, _ = job(wait_for_one_that_does_not_come, tmp_path, end)
    assert codes[0] == 128 + signal.SIGTERM


def say_something_slowly():
    process_group.GRACE = 0.1
    try:
        time.sleep(600)
    except KeyboardInterrupt:
        time.sleep(1)
        print("last words")
        raise


def test_a_process_that_has_seen_the_signal_has_time_to_say_what_is_left(tmp_path):
    codes, outputs = job(say_something_slowly, tmp_path, lambda processes: [one.terminate() for one in processes])
    assert codes == [128 + signal.SIGTERM, -signal.SIGTERM]
    assert outputs[0].startswith("last words\n")


def words(folder, data_root):
    # two runs that measure whether to fold may choose differently
    pairs = "SOLVER.EPOCHS 3 DATASET.TRAIN_PER_CLASS 2 DATASET.HOLDOUT 0.02 DATASET.NUM_WORKERS 1 "
    pairs += f"DISTILLER.FOLD_TEACHER False DATASET.ROOT {data_root} LOG.PREFIX {folder} EXPERIMENT.NAME run"
    return ["tools/train.py", "--cfg", "configs/glyphs100/res20_res8/deepkd.yaml", *pairs.split()]


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
def test_torchrun_trains_one_run_and_starts_it_again(tmp_path, data_root):
    """One torchrun starts both processes, or two a process each, as on two machines: of these one is killed."""
    started = [torchrun(words(tmp_path / "whole", data_root))]
    port = free_port()
    started += [torchrun(words(tmp_path / "cut", data_root), "--max-restarts", "2", port=port) for _ in range(2)]
    wait_for((tmp_path / "cut/glyphs100/run/latest").exists, 300)
    kill(started[1:], 1)
    ended = [process.communicate(timeout=600) for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], [err[-6000:] for _, err in ended]
    folders = [tmp_path / name / "glyphs100/run" for name in ("whole", "cut")]
    assert small.same(small.weights(folders[1]), small.weights(folders[0]))
    runs = [json.loads((folder / record.FILE).read_text()) for folder in folders]
    assert [run["processes"] for run in runs] == [2, 2]
    assert [len(run.get("resumed", [])) for run in runs] == [0, 1]
    assert runs[0]["command"].startswith("torchrun --nproc_per_node 2 tools/train.py --cfg ")
    assert runs[1]["command"].startswith("torchrun --nproc_per_node 1 --nnodes 2 tools/train.py --cfg ")
    assert ended[0][0].count("BatchNorm takes its means over a process's share of 64 images") == 1
    # a run of another launcher is refused in every attempt, and told of once in each
    again = torchrun(words(tmp_path / "whole", data_root), "--max-restarts", "1")
    err = again.communicate(timeout=600)[1]
    assert again.returncode == 1
    lines = [line for line in err.splitlines() if line.startswith("deepkd: ")]
    assert len(lines) == 2
    assert all(re.search("holds a run already", line) for line in lines)
