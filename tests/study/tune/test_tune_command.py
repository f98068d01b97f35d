"""`deepkd tune`: what it starts, when it ends a trial, what it leaves. One slow test trains."""

import csv
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from deepkd_plugin.commands import cli
from deepkd_plugin.data import sources
from deepkd_plugin.run import record
from deepkd_plugin.study.kinds.classification import Classification
from deepkd_plugin.study.tune import command, crew, report

FAKE = (sys.executable, "-S", str(Path(__file__).parent / "fake_trial.py"))
ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "configs" / "glyphs100" / "res20_res8"
KIND = Classification()
DRAW = report.draw


@pytest.fixture
def no_test_images(monkeypatch):
    """Any process that read a test image here would end in an error."""
    load = sources.Source.load

    def refuse(source, node, split, *rest):
        assert split == "train", "the test images were read"
        return load(source, node, split, *rest)

    monkeypatch.setattr(sources.Source, "load", refuse)


@pytest.fixture
def tune(monkeypatch, tmp_path, data_root, capsys, no_test_images):
    """tune(words…) -> (exit code, stdout, stderr); its trials are of fake_trial.py."""
    monkeypatch.setattr(command, "WORKER", FAKE)
    monkeypatch.setattr(crew, "LOOK", 0.02)
    monkeypatch.setattr(report, "draw", lambda search, path: path.touch())  # matplotlib takes its time
    monkeypatch.setattr(Classification, "teachers", lambda kind, cfgs: dict.fromkeys(cfgs))  # what a fake has none of
    monkeypatch.setattr(Classification, "seconds", lambda kind, cfgs, threads, runs: [100.0 for _ in cfgs])

    def run(*words, cfg=CONFIGS, methods=("kd", "deepkd")):
        chosen = ["--methods", *methods] if methods else []
        options = ["DATASET.ROOT", str(data_root), "SOLVER.EPOCHS", "4", "DISTILLER.FOLD_TEACHER", "False"]
        code = cli.main(["tune", "--cfg", str(cfg), *chosen, "--out", str(run.out), *words, *options])
        captured = capsys.readouterr()
        return code, " ".join(captured.out.split()), captured.err

    run.out = tmp_path / "search"
    return run


def trials(out):
    with open(out / "trials.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_method_has_as_many_trials_and_its_best_is_chosen(tune, monkeypatch):
    monkeypatch.setattr(report, "draw", DRAW)
    code, out, err = tune("--budget", "6", "--jobs", "2", "--seeds", "2")
    assert (code, err) == (0, "")
    assert "4800 to train on, 1200 held out of the training images; no test image is read" in out
    rows = trials(tune.out)
    for method in ("kd", "deepkd"):
        mine = [row for row in rows if row["method"] == method]
        assert [row["trial"] for row in mine] == [str(number) for number in range(6)]
        done = [row for row in mine if row["outcome"] == "complete"]
        assert {row["outcome"] for row in mine} <= {"complete", "pruned"}
        for row in done:
            first, second = map(float, row["seeds"].split())
            assert second == pytest.approx(first + 1, abs=0.01)
            assert float(row["held_out"]) == pytest.approx((first + second) / 2, abs=0.01)
        best = max(done, key=lambda row: float(row["held_out"]))
        file = tune.out / "tuned" / "res20_res8" / f"{method}.yaml"
        cfg = KIND.read(file, [])
        assert pytest.approx(float(best["rate"]), rel=6e-3) == cfg.SOLVER.LR
        assert (cfg.DATASET.HOLDOUT, cfg.SOLVER.EPOCHS, cfg.SOLVER.SEED) == (0.0, 4, 0)
        svg = (tune.out / f"{method}.svg").read_text()
        assert "learning rate" in svg
    words = (tune.out / "report.md").read_text()
    assert "Every method had 6 trials of 2 seeds each, on 4800 images" in words
    assert not list(tune.out.rglob("latest")), "weights of trials that have ended"


def test_the_chosen_config_is_what_its_trial_ran_but_for_the_held_out_images(tune):
    tune("--budget", "3", methods=["deepkd"])
    search = json.loads((tune.out / "search.json").read_text())
    best = max((row for row in trials(tune.out) if row["held_out"]), key=lambda row: float(row["held_out"]))
    (folder,) = (tune.out / "runs" / "deepkd").glob(f"trial{int(best['trial']):03d}-seed0-*")
    ran = record.read_run(folder)["config_hash"]
    file = tune.out / "tuned" / "res20_res8" / "deepkd.yaml"
    settled = [word for pair in search["settled"].get("deepkd", {}).items() for word in map(str, pair)]
    assert KIND.hash(KIND.read(file, ["DATASET.HOLDOUT", "0.2", *settled]), 0) == ran


def test_trials_below_the_median_are_pruned(tune, monkeypatch):
    monkeypatch.setenv("FAKE_SECONDS", "0.3")
    code, out, _ = tune("--budget", "8", "--jobs", "4", methods=["kd"])
    assert code == 0
    pruned = [row for row in trials(tune.out) if row["outcome"] == "pruned"]
    assert pruned
    assert out.count("pruned trial") == len(pruned)
    for row in pruned:
        assert row["held_out"] == ""
        assert 2 <= int(row["epochs"]) < 4  # not in the first half of the schedule
        (folder,) = (tune.out / "runs" / "kd").glob(f"trial{int(row['trial']):03d}-*")
        assert not record.read_run(folder)["finished"]


def test_a_rate_at_the_edge_is_said_and_widened_once(tune):
    code, _, _ = tune("--budget", "12", methods=["kd"])
    assert code == 0
    rows = trials(tune.out)
    assert [row["ranges"] for row in rows] == ["first"] * 8 + ["wider"] * 4
    words = (tune.out / "report.md").read_text()
    # the best is at 2, and the range ended at four times the config's 0.2
    assert "The range of learning rate was widened once, to 0.05 … 3.2" in words


def test_divergence_is_a_result_and_not_a_failure(tune, monkeypatch):
    monkeypatch.setenv("FAKE_DIVERGES", "0.3")
    code, _, err = tune("--budget", "6", methods=["kd"])
    assert (code, err) == (0, "")
    rows = trials(tune.out)
    gone = [row for row in rows if row["outcome"] == "diverged"]
    assert gone
    assert len(rows) == 6
    assert all(float(row["rate"]) >= 0.3 and row["held_out"] == "" for row in gone)
    assert KIND.read(tune.out / "tuned" / "res20_res8" / "kd.yaml", []).SOLVER.LR < 0.3


def test_a_failure_is_told_and_the_same_command_tries_again(tune, monkeypatch, tmp_path):
    (tmp_path / "fails").write_text("kd")
    monkeypatch.setenv("FAKE_FAILS", str(tmp_path / "fails"))
    code, _, err = tune("--budget", "3")
    assert code == 1
    assert "trial 0 kd seed 0 failed once (exit code 2)" in err
    assert "the reason" in err
    assert "No trial has a result, so nothing was chosen." in (tune.out / "report.md").read_text()
    assert (tune.out / "tuned" / "res20_res8" / "deepkd.yaml").is_file()
    (tmp_path / "fails").unlink()
    code, _, err = tune("--budget", "3")
    assert (code, err) == (0, "")
    done = [row["outcome"] for row in trials(tune.out) if row["method"] == "kd"]
    assert done[0] == "fail"
    assert len(done) == 4


def test_an_interrupted_search_goes_on(tune, monkeypatch):
    finished = crew.TrialDisplay.finished
    count = iter(range(100))

    def interrupt(display, run):
        finished(display, run)
        if next(count) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setenv("FAKE_SECONDS", "0.05")
    with monkeypatch.context() as patch:
        patch.setattr(crew.TrialDisplay, "finished", interrupt)
        code, _, err = tune("--budget", "5", "--jobs", "2")
    assert code == 130
    assert "interrupted; the trials that ended stay, and the same command goes on: deepkd tune --cfg" in err
    assert not (tune.out / "trials.csv").exists()
    before = (tune.out / "journal.jsonl").read_bytes()
    code, _, err = tune("--budget", "5", "--jobs", "2")
    assert (code, err) == (0, "")
    assert (tune.out / "journal.jsonl").read_bytes().startswith(before)
    for method in ("kd", "deepkd"):
        mine = [row for row in trials(tune.out) if row["method"] == method]
        assert [row["trial"] for row in mine] == [*"01234"]
    # and one whose budget is spent has nothing to do, until it is raised
    rows = trials(tune.out)
    assert tune("--budget", "5")[0] == 0
    assert trials(tune.out) == rows
    assert tune("--budget", "6")[0] == 0
    assert len(trials(tune.out)) == 12


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["DATASET.HOLDOUT", "0.0"], "DATASET.HOLDOUT is 0.0; it must be above 0, because no choice is made on test"),
        (["SOLVER.SEED", "3"], "SOLVER.SEED is set for each run by the search; use --seeds N instead"),
        (["EXPERIMENT.NAME", "x"], "EXPERIMENT.NAME is set for each run by the search; use --out DIR instead"),
        (["--rates", "0.2", "0.1"], "--rates is 0.2 0.1; it must be two numbers above 0, the lower end first"),
        (["--rates", "0.1"], "--rates is 0.1; it must be two numbers"),
        (["--rates", "0.1", "1", "SOLVER.LR", "0.1"], "give one of them"),
        (["--budget", "0"], "must be a whole number from 1"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(tune, words, line):
    code, out, err = tune(*words)
    assert (code, out) == (2, "")
    assert line in err
    assert err.count("\n") == 1
    assert not tune.out.exists()


def test_the_configs_of_a_search(tune, tmp_path):
    assert "it must hold configs METHOD.yaml, and has none" in tune(cfg=tmp_path, methods=())[2]
    assert "--methods is 'dot'; it must be one of crld, deepkd," in tune(methods=["dot"])[2]
    (tmp_path / "more").mkdir()
    shutil.copy(CONFIGS / "kd.yaml", tmp_path / "more" / "kd.yaml")
    twice = tune("--cfg", str(tmp_path / "more" / "kd.yaml"), cfg=CONFIGS / "kd.yaml", methods=())[2]
    assert "each must have a name of its own" in twice
    code, out, _ = tune("--dry-run", cfg=CONFIGS / "kd.yaml", methods=())
    assert code == 0
    assert "learning rate 0.05 to 0.8; warm-up (epochs) 0 to 1" in out
    assert not tune.out.exists()


def test_trials_of_two_searches_are_not_mixed(tune):
    assert tune("--budget", "1", methods=["kd"])[0] == 0
    for words in (["--seeds", "2"], ["--rates", "0.1", "1"], ["SOLVER.WEIGHT_DECAY", "0.001"]):
        code, _, err = tune("--budget", "1", *words, methods=["kd"])
        assert code == 2
        assert f"{tune.out}: holds a search with other " in err
        assert "give another --out" in err
    (tune.out / "search.json").write_text("[1]")
    assert "must be what a search wrote" in tune("--budget", "1", methods=["kd"])[2]


def test_training_with_a_held_out_share_reads_no_test_image(train, no_test_images):
    code, _, err = train("kd")
    assert code == 0, err


SET = """
from pathlib import Path
import numpy as np
from deepkd_plugin.data import Source, register_dataset

def read(root, split):
    if split != "train":
        Path(root, "read").touch()
        raise OSError("a test image was asked for")
    numbers = np.random.default_rng(0)
    return numbers.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8), np.arange(40) % 4

register_dataset("untested", Source(read, num_classes=4, train=40, test=8, side=32, mean=(0.5,) * 3, std=(0.2,) * 3))
"""
CONFIG = """
EXPERIMENT: {PROJECT: untested}
DATASET: {TYPE: untested, NUM_WORKERS: 0}
DISTILLER: {TYPE: NONE, STUDENT: resnet8}
SOLVER: {TRAINER: base, BATCH_SIZE: 8, EPOCHS: 2, LR: 0.1, CHANNELS_LAST: True}
"""


@pytest.mark.slow
def test_real_trials_read_no_test_image(tmp_path, monkeypatch, capsys):
    """In processes of their own, on a set whose test images cannot be read."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "untested_set.py").write_text(SET)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'modules'}:{ROOT}")
    monkeypatch.setenv("DEEPKD_EXTENSIONS", "untested_set")
    monkeypatch.setattr(command, "WORKER", (*command.WORKER[:-1], json.dumps(sys.path)))
    (tmp_path / "vanilla.yaml").write_text(CONFIG)
    words = ["--cfg", tmp_path / "vanilla.yaml", "--budget", "2", "--jobs", "2", "--out", tmp_path / "search"]
    code = cli.main(["tune", *map(str, words), "DATASET.ROOT", str(tmp_path)])
    assert code == 0, capsys.readouterr().err
    assert not (tmp_path / "read").exists()
    rows = trials(tmp_path / "search")
    assert [row["outcome"] for row in rows] == ["complete", "complete"]
    for row in rows:
        (folder,) = (tmp_path / "search" / "runs" / "vanilla").glob(f"trial{int(row['trial']):03d}-*")
        assert record.read_run(folder)["result"]["last"] == pytest.approx(float(row["held_out"]))
    sources.DATASETS.pop("untested", None)
