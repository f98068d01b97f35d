"""How long a table will take: what is timed, what finished runs tell, and how runs share a machine."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from deepkd_plugin import device
from deepkd_plugin.study import shared
from deepkd_plugin.study.kinds.classification import Classification
from deepkd_plugin.study.reproduce import estimate, tables
from deepkd_plugin.study.reproduce.plan import make_plan
from deepkd_plugin.study.shared import duration

KD, OTHER = 300.0, 100.0
"""Seconds of a run of KD, and of one of another method, as timed."""


def plan(*options, name="glyphs100", methods=("kd", "deepkd"), seeds=1, pairs=None):
    table = tables.find(name)
    return make_plan(table, pairs or table.pairs[:1], methods, seeds, options, Path("nowhere"))


@pytest.mark.parametrize(
    ("seconds", "jobs", "total"), [([3, 3, 3, 3], 1, 12), ([3, 3, 3, 3], 2, 6), ([1, 1, 8], 4, 8), ([], 2, 0)]
)
def test_side_by_side_but_no_shorter_than_the_longest(seconds, jobs, total):
    assert estimate.total_seconds(seconds, jobs) == total


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 seconds"), (89, "89 seconds"), (90, "2 minutes"), (3600, "60 minutes"), (7140, "119 minutes"),
        (7200, "2.0 hours"), (100_000, "27.8 hours"), (200_000, "2.3 days"),
    ],
)  # fmt: skip
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.fixture
def timed(monkeypatch):
    """Runs that take KD or OTHER seconds on a machine of 8 cores; returns the (methods, threads) that were timed."""
    calls = []

    def seconds(kind, cfgs, threads, runs):
        methods = [cfg.DISTILLER.TYPE for cfg in cfgs]
        calls.append((methods, threads))
        return [KD if method == "KD" else OTHER for method in methods]

    monkeypatch.setattr(Classification, "seconds", seconds)
    monkeypatch.setattr(estimate, "cores", lambda: 8)
    monkeypatch.setattr(estimate, "busy", lambda: "")
    monkeypatch.setattr(device, "count", lambda: 0)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return calls


def test_a_plan_without_runs_is_timed_once_a_pair(timed):
    made = plan(methods=("vanilla", "kd", "dkd"), seeds=2)
    told = estimate.estimate(made, dict.fromkeys(made.runs, "new"), 2)
    assert told.seconds == pytest.approx(2 * (KD + 2 * OTHER) / 2)
    assert timed == [(["NONE", "KD", "DKD"], 4)]  # eight cores are shared out to two jobs
    how = "an estimate: 6 by their networks' passes over noise, timed here, each on 4 of 8 cores"
    assert str(told) == f"about {duration(told.seconds)}; {how}"


@pytest.mark.parametrize(("load", "said"), [(0.9, False), (9.4, True)])
def test_a_busy_machine_is_told_of_beside_what_it_makes_slow(timed, monkeypatch, load, said):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(estimate, "busy", shared.busy)
    made = plan()
    told = estimate.estimate(made, dict.fromkeys(made.runs, "new"), 1)
    assert told.how.endswith("; other programs keep this machine busy (load 9.4 on 2 cores), and without them it is "
                             "faster") == said  # fmt: skip


@pytest.mark.parametrize(("gpus", "jobs", "turns"), [(0, 2, 1), (0, 16, 2), (1, 4, 4), (2, 4, 2), (4, 2, 1)])
def test_runs_that_share_a_device_take_turns(timed, monkeypatch, gpus, jobs, turns):
    monkeypatch.setattr(device, "count", lambda: gpus)
    made = plan(methods=("kd",), seeds=16)
    told = estimate.estimate(made, dict.fromkeys(made.runs, "new"), jobs)
    assert told.seconds == pytest.approx(16 * KD * turns / jobs)
    share = f"each on {8 // jobs or 1} of 8 cores"
    if gpus:
        share = "those on one GPU in turn" if turns > 1 else "each on a GPU of its own"
    assert told.how.endswith(share)


@pytest.mark.parametrize(("given", "each", "turns"), [("2", 2, 1), ("8", 8, 4), ("4,2", 4, 2), ("x", 2, 1)])
def test_threads_are_those_that_the_runs_will_have(timed, monkeypatch, given, each, turns):
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    made = plan(methods=("kd",), seeds=4)
    told = estimate.estimate(made, dict.fromkeys(made.runs, "new"), 4)
    assert timed == [(["KD"], each)]
    assert told.seconds == pytest.approx(KD * turns)
    assert told.how.endswith(f"each on {each} of 8 cores")


def test_several_pairs_are_announced(timed, capsys):
    made = plan(name="tiny_imagenet", methods=("kd",), pairs=("r18_mv2", "r18_shuv2"))
    estimate.estimate(made, dict.fromkeys(made.runs, "new"), 1)
    assert capsys.readouterr().err == "timing the networks of 2 pairs, some seconds each\n"
    assert len(timed) == 2
    estimate.estimate(made, dict.fromkeys(made.runs, "new"), 1, here=False)
    assert capsys.readouterr().err == ""


def test_finished_runs_tell_and_what_is_done_is_taken_off(timed, tmp_path):
    made = plan(methods=("kd", "deepkd"), seeds=5)
    moved = [dataclasses.replace(run, folder=tmp_path / run.name) for run in made.runs]
    made = dataclasses.replace(made, runs=tuple(moved))
    states = dict.fromkeys(made.runs, "new")
    runs = sorted(made.runs, key=lambda run: run.method != "kd")
    for run, minutes in zip(runs[:3], (2.0, 3.0, 30.0)):
        run.folder.mkdir()
        (run.folder / "run.json").write_text(json.dumps({"minutes": minutes}))
        states[run] = "finished"
    half = runs[3]
    half.folder.mkdir()
    (half.folder / "metrics.jsonl").write_text('{"epoch": 1}\n' * 6)  # of 12
    states[half] = "resumable"
    told = estimate.estimate(made, states, 1)
    assert told.seconds == pytest.approx(180 * 1.5 + 5 * OTHER)
    assert timed == [(["DeepKD"], 8)]
    assert told.how == (
        "an estimate: 2 by finished runs of their kind; 5 by their networks' passes over noise, timed here, each on "
        "8 of 8 cores"
    )
    assert estimate.estimate(made, states, 1, here=False).seconds is None
    made = dataclasses.replace(made, runs=tuple(runs[:5]))
    timed.clear()
    told = estimate.estimate(made, states, 1, here=False)
    assert told.seconds == pytest.approx(270)
    assert told.how == "an estimate: 2 by finished runs of their kind"
    assert timed == []


def test_runs_of_several_gpus_take_a_share_of_the_time_of_one(timed, monkeypatch, tmp_path):
    monkeypatch.setattr(device, "count", lambda: 8)
    made = plan(methods=("kd",), seeds=5)
    runs = [dataclasses.replace(run, folder=tmp_path / run.name) for run in made.runs]
    made, states = dataclasses.replace(made, runs=tuple(runs)), dict.fromkeys(runs, "new")
    told = estimate.estimate(made, states, 2, 4)
    assert told.seconds == pytest.approx(5 * KD / 4 / 2)
    assert told.how.endswith("each on GPUs of its own, as if 4 GPUs were 4 times as fast as one")
    assert estimate.estimate(made, states, 4, 4).seconds == pytest.approx(5 * KD / 4 / 2)  # two share four GPUs
    for run, processes in zip(runs, (4, 1)):
        run.folder.mkdir()
        (run.folder / "run.json").write_text(json.dumps({"minutes": 60 / processes, "processes": processes}))
        states[run] = "finished"
    assert estimate.estimate(made, states, 1, 4).seconds == pytest.approx(3 * 15 * 60)
    assert estimate.estimate(made, states, 1).seconds == pytest.approx(3 * 60 * 60)


@pytest.mark.parametrize(
    ("error", "reason"),
    [(RuntimeError("CUDA out of memory.\nMore of it"), "CUDA out of memory."), (KeyError(), "KeyError")],
)
def test_a_timing_that_fails_stops_nothing(timed, monkeypatch, error, reason):
    def fails(*arguments):
        raise error

    monkeypatch.setattr(Classification, "seconds", fails)
    made = plan()
    told = estimate.estimate(made, dict.fromkeys(made.runs, "new"), 1)
    assert str(told) == f"not known: timing res20_res8 failed ({reason})"
