"""A torchrun job of tools/train_detection.py that loses a process: it ends, and goes on as if nothing had been."""

import json
import re
import time
from pathlib import Path

import pytest
import small
import test_several as several
from processes import alive, kill, torchrun, wait_for

from deepkd_plugin.run import record

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc"),
]

FEW = """import runpy
from deepkd_plugin.detection.data import canvas
canvas.COUNTS.update(train=16, test=4)
runpy.run_path("tools/train_detection.py", run_name="__main__")
"""
"""The tool, on a glyph_canvas of a few canvases: 2 iterations an epoch."""


@pytest.fixture(scope="module")
def detect(tmp_path_factory):
    """Start a job of the embedded default in a folder of this name: detect(name, torchrun's flags, the tool's)."""
    pytest.importorskip("pycocotools", reason="a whole run measures AP, by pycocotools")
    root = tmp_path_factory.mktemp("detect")
    (root / "few.py").write_text(FEW)

    def start(name, flags=(), own=()):
        words = [str(root / "few.py"), "--cfg", "configs/detection/glyph_canvas/res20_res8/deepkd_dkd.yaml", *own]
        words += ["SOLVER.EPOCHS", "3", "DATASET.NUM_WORKERS", "1", "DATASET.ROOT", str(root / "data")]
        words += ["LOG.PREFIX", str(root / name), "EXPERIMENT.NAME", "run"]
        return torchrun(words, *flags), root / name / "glyph_canvas/run"

    return start


@pytest.fixture(scope="module")
def whole(detect):
    """The folder of the job that loses nothing."""
    job, folder = detect("whole")
    _, err = job.communicate(timeout=900)
    assert job.returncode == 0, err
    return folder


def check_same(folder, whole, resumed):
    assert small.same(small.weights(folder), small.weights(whole))
    assert several.records(folder) == several.records(whole)
    run = json.loads((folder / record.FILE).read_text())
    assert (run["processes"], len(run["resumed"])) == (2, resumed)


def test_a_job_that_loses_a_process_ends_with_one_line_and_goes_on(detect, whole):
    job, folder = detect("cut")
    wait_for((folder / "latest").exists, 600)
    kill([job], 1)
    begun = time.monotonic()
    _, err = job.communicate(timeout=600)
    assert time.monotonic() - begun < 25  # torchrun would kill what has not ended after 30
    assert job.returncode == 1, err
    lines = [line for line in err.splitlines() if line.startswith("deepkd: ") and "warning" not in line]
    assert len(lines) == 1, err
    line = lines[0]
    # torchrun asks the first process to end, if that has not missed the other before
    reason = r"(another process of this run has ended|interrupted in epoch \d+)"
    assert re.match(rf"deepkd: {reason}\. The last checkpoint is whole: ", line)
    assert "Resume with: torchrun --nproc_per_node 2 tools/train_detection.py --cfg " in line
    assert line.endswith(" --resume")
    # a loader's process of the killed one looks for it every 5 seconds
    wait_for(lambda: not alive(str(folder.parents[1])))
    job, folder = detect("cut", own=["--resume"])
    _, err = job.communicate(timeout=900)
    assert job.returncode == 0, err
    check_same(folder, whole, 1)


def test_torchrun_starts_a_job_again_whose_first_process_is_killed(detect, whole):
    job, folder = detect("again", ["--max-restarts", "1"])
    wait_for((folder / "latest").exists, 600)
    kill([job], 0)
    _, err = job.communicate(timeout=900)
    assert job.returncode == 0, err
    check_same(folder, whole, 1)
