"""The benchmark scripts run as their docstrings say, on sizes too small to measure anything."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]


def run(script, *arguments):
    command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("step.py", ("--rounds", 1, "--batch", 2, "--pairs", "resnet8:resnet8", "--no-memory")),
        ("optimizer.py", ("--rounds", 1, "--widths", 2)),
    ],
)
def test_speed(script, arguments, tmp_path):
    out = run(script, *arguments, "--write", tmp_path / "table.md")
    assert (tmp_path / "table.md").read_text() == out.removesuffix("\n")
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert all(row["ms"] > 0 for row in rows)
    if script == "optimizer.py":
        state = {row["step"]: row["state MiB"] for row in rows}
        assert state["1 buffer"] == state["torch.optim.SGD"]
        assert state["2 buffers"] == pytest.approx(2 * state["torch.optim.SGD"])


def test_accuracy_tables_and_curves(data_root, tmp_path):
    config = ROOT / "configs/glyphs100/res20_res8/kd.yaml"
    options = ["DATASET.ROOT", data_root, "DATASET.TRAIN_PER_CLASS", 1, "DATASET.HOLDOUT", 0.02]
    options += ["SOLVER.EPOCHS", 2]
    common = ["--options", *options, "--output", tmp_path / "runs", "--table", tmp_path / "table.md"]
    out = run("accuracy.py", config, "--seeds", 0, 1, *common)
    assert "2 epochs, batch 64, seeds 0, 1" in out
    assert "on the held-out training images; 1 training images of each class" in out
    runs = json.loads((tmp_path / "table.json").read_text())
    assert [(r["method"], r["seed"]) for r in runs] == [("kd", 0), ("kd", 1)]
    last = [r["result"]["last"] for r in runs]
    mean, half = sum(last) / 2, abs(last[0] - last[1]) / 2
    assert f"| {mean:.2f} ± {half * 2**0.5:.2f} |" in out
    times = [p.stat().st_mtime for p in sorted((tmp_path / "runs").glob("*/*/latest"))]
    assert run("accuracy.py", config, "--seeds", 0, 1, *common) == out
    assert times == [p.stat().st_mtime for p in sorted((tmp_path / "runs").glob("*/*/latest"))]
    run("curves.py", tmp_path / "table.json", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_contact_sheet(tmp_path):
    run("contact_sheet.py", tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (1280, 960)
