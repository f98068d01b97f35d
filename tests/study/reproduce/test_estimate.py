"""How long a table will take: the arithmetic by hand, the timing on small networks."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from deepkd_plugin import data, device
from deepkd_plugin.data import sizes
from deepkd_plugin.data.sizes import images, steps
from deepkd_plugin.hosts import registry
from deepkd_plugin.study.kinds import timing
from deepkd_plugin.study.kinds.timing import Parts, measure, run_seconds
from deepkd_plugin.study.reproduce import estimate, tables
from deepkd_plugin.study.reproduce.plan import make_plan
from deepkd_plugin.study.shared import duration

PARTS = Parts(teacher=1.0, student=0.1, backward=0.01)


def plan(*options, name="glyphs100", methods=("kd", "deepkd"), seeds=1, pairs=None):
    table = tables.find(name)
    return make_plan(table, pairs or table.pairs[:1], methods, seeds, options, Path("nowhere"))


def cfg(method, *options, name="glyphs100", pairs=None):
    return next(iter(plan(*options, name=name, methods=(method,), pairs=pairs).cfgs.values()))


@pytest.mark.parametrize(
    ("options", "train", "test", "batches"),
    [
        ((), 6000, 5000, 94),
        (("SOLVER.BATCH_SIZE", "60"), 6000, 5000, 100),
        (("DATASET.TRAIN_PER_CLASS", "2"), 200, 5000, 4),
        (("DATASET.HOLDOUT", "0.2"), 4800, 1200, 75),
        (("DATASET.HOLDOUT", "0.02", "DATASET.TRAIN_PER_CLASS", "60"), 5900, 100, 93),
    ],
)
def test_images_and_steps_are_those_of_the_loaders(options, train, test, batches, data_root):
    held = cfg("kd", "DATASET.ROOT", str(data_root), *options)
    assert (images(held), steps(held)) == ((train, test), batches)
    train_loader, test_loader, count, _ = data.get_dataset(held)
    assert (count, len(test_loader.dataset), len(train_loader)) == (train, test, batches)


def test_every_data_set_has_a_size():
    assert sizes.SIZES.keys() == data.DATASETS.keys()


EPOCH = 5000 / 64 * 0.1
"""The student's forward pass over the test images."""

TEACHER = 5000 / 64 * 1.0
"""The teacher's, once."""


@pytest.mark.parametrize(
    ("method", "options", "step"),
    [
        ("vanilla", (), 0.11),
        ("kd", (), 1.11),
        ("dkd", (), 1.11),
        ("mlkd", (), 2.22),  # two views
        ("deepkd", (), 1.12),  # two distinct momenta
        ("deepkd", ("SOLVER.DECOUPLED.DELTA.NCG", "0.05"), 1.13),
        ("deepkd", ("SOLVER.DECOUPLED.VARIANT", "release"), 1.12),
        ("deepkd_crld", (), 2.24),
        ("deepkd_crld", ("SOLVER.DECOUPLED.DELTA.NCG", "0.05"), 2.26),
        # allocated momenta differ, and every tenth step samples three streams
        ("deepkd", ("SOLVER.DECOUPLED.ALLOCATION", "gsnr", "GSNR.EVERY", "10"), 1.133),
        ("deepkd", ("GSNR.MEASURE", "True", "GSNR.EVERY", "10"), 1.123),
    ],
)
def test_a_run_costs_its_views_forward_and_a_backward_pass_for_each_momentum(method, options, step):
    teacher = 0 if method == "vanilla" else TEACHER
    expected = 12 * (94 * step + EPOCH) + teacher
    assert run_seconds(cfg(method, *options), PARTS, 0.0) == pytest.approx(expected)


def test_images_are_loaded_in_turn_or_beside_the_steps(monkeypatch):
    monkeypatch.setattr(estimate, "cores", lambda: 4)

    def step(*options):
        held = cfg("kd", "SOLVER.EPOCHS", "1", "SOLVER.WARMUP_EPOCHS", "0", *options)
        return (run_seconds(held, PARTS, 0.05) - EPOCH - TEACHER) / 94

    assert step() == pytest.approx(1.11 + 64 * 0.05)
    assert step("DATASET.NUM_WORKERS", "2") == pytest.approx(64 * 0.05 / 2)
    assert step("DATASET.NUM_WORKERS", "4") == pytest.approx(1.11)
    assert step("DATASET.NUM_WORKERS", "16") == pytest.approx(1.11)
    assert step("DATASET.PIPELINE", "device") == pytest.approx(1.11)
    monkeypatch.setattr(estimate, "cores", lambda: 1)
    assert step("DATASET.NUM_WORKERS", "16") == pytest.approx(64 * 0.05)


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


def test_the_networks_of_a_pair_are_timed(monkeypatch):
    counts = []
    kept = timing.Timed._seconds

    def seconds(timed, part, count, budget, backward=False):
        counts.append((part, count, torch.get_num_threads(), backward))
        return kept(timed, part, count, budget, backward)

    monkeypatch.setattr(timing.Timed, "_seconds", seconds)
    monkeypatch.setattr(timing, "BUDGET", 0.3)
    before = torch.get_num_threads()
    found = measure(registry.BUILTIN, cfg("kd", "SOLVER.BATCH_SIZE", "16"), 1)
    assert torch.get_num_threads() == before
    assert min(found.teacher, found.student) > 0
    assert found.backward >= 0
    assert {(part, backward) for part, _, _, backward in counts} == {
        ("teacher", False), ("student", False), ("student", True),
    }  # fmt: skip
    assert {threads for _, _, threads, _ in counts} == {1}
    counts.clear()
    alone = measure(registry.BUILTIN, cfg("vanilla", "SOLVER.BATCH_SIZE", "4"), 2)
    assert alone.teacher == 0
    assert {count for _, count, _, _ in counts} == {4}
    assert {threads for _, _, threads, _ in counts} == {1, 2}


def test_a_batch_that_takes_too_long_is_scaled(monkeypatch):
    """By a clock of our own: an image takes the student 0.1 s forward and 0.2 s back, the teacher 0.7 s."""
    counts = []

    def seconds(timed, part, count, budget, backward=False):
        counts.append(count)
        each = {"teacher": 0.7, "student": 0.3 if backward else 0.1}[part]
        return 64 / count * count * each

    monkeypatch.setattr(timing.Timed, "_seconds", seconds)
    found = measure(registry.BUILTIN, cfg("kd"), 1)
    assert found == pytest.approx((64 * 0.7, 64 * 0.1, 64 * 0.2))
    assert max(counts) == timing.FEW
    monkeypatch.setattr(timing, "BUDGET", 10_000.0)
    measure(registry.BUILTIN, cfg("kd"), 1)
    assert max(counts) == 64


def test_threads_that_wait_for_each_other_are_not_believed(monkeypatch):
    def seconds(timed, part, count, budget, backward=False):
        return (2.0 if backward else 1.0) * (100.0 if torch.get_num_threads() == 2 else 1.0)

    monkeypatch.setattr(timing.Timed, "_seconds", seconds)
    assert measure(registry.BUILTIN, cfg("kd"), 2) == (1.0, 1.0, 1.0)


def test_two_views_take_longer_to_make():
    one, two = (timing.loading_seconds(cfg(method)) for method in ("kd", "mlkd"))
    assert 0 < one < two < 0.1


@pytest.fixture
def timed(monkeypatch):
    """measure and loading_seconds replaced; the calls that they got."""
    calls = []

    def replaced(host, held, threads):
        calls.append((held.DISTILLER.TYPE, threads))
        return PARTS

    monkeypatch.setattr(timing, "measure", replaced)
    monkeypatch.setattr(timing, "loading_seconds", lambda held: 0.0)
    monkeypatch.setattr(timing, "cores", lambda: 8)
    monkeypatch.setattr(device, "count", lambda: 0)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return calls


def kd_seconds(*options):
    return run_seconds(cfg("kd", *options), PARTS, 0.0)


def test_a_plan_without_runs_is_timed_once_a_pair(timed):
    made = plan(methods=("vanilla", "kd", "dkd"), seeds=2)
    found = estimate.estimate(made, dict.fromkeys(made.runs, "new"), 2)
    alone = run_seconds(cfg("vanilla"), PARTS, 0.0)
    assert found.seconds == pytest.approx((2 * alone + 4 * kd_seconds()) / 2)
    assert timed == [("KD", 4)]  # with a teacher; eight cores are shared out to two jobs
    how = "an estimate: 6 by their networks' passes over noise, timed here, each on 4 of 8 cores"
    assert str(found) == f"about {duration(found.seconds)}; {how}"


@pytest.mark.parametrize(("gpus", "jobs", "turns"), [(0, 2, 1), (0, 16, 2), (1, 4, 4), (2, 4, 2), (4, 2, 1)])
def test_runs_that_share_a_device_take_turns(timed, monkeypatch, gpus, jobs, turns):
    monkeypatch.setattr(device, "count", lambda: gpus)
    made = plan(methods=("kd",), seeds=16)
    found = estimate.estimate(made, dict.fromkeys(made.runs, "new"), jobs)
    assert found.seconds == pytest.approx(16 * kd_seconds() * turns / jobs)
    share = f"each on {8 // jobs or 1} of 8 cores"
    if gpus:
        share = "those on one GPU in turn" if turns > 1 else "each on a GPU of its own"
    assert found.how.endswith(share)


@pytest.mark.parametrize(("given", "each", "turns"), [("2", 2, 1), ("8", 8, 4), ("4,2", 4, 2), ("x", 2, 1)])
def test_threads_are_those_that_the_runs_will_have(timed, monkeypatch, given, each, turns):
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    made = plan(methods=("kd",), seeds=4)
    found = estimate.estimate(made, dict.fromkeys(made.runs, "new"), 4)
    assert timed == [("KD", each)]
    assert found.seconds == pytest.approx(kd_seconds() * turns)
    assert found.how.endswith(f"each on {each} of 8 cores")


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
    for run, minutes in zip(made.runs[:3], (2.0, 3.0, 30.0)):
        run.folder.mkdir()
        (run.folder / "run.json").write_text(json.dumps({"minutes": minutes}))
        states[run] = "finished"
    half = made.runs[3]
    half.folder.mkdir()
    (half.folder / "metrics.jsonl").write_text('{"epoch": 1}\n' * 6)  # of 12
    states[half] = "resumable"
    deepkd = run_seconds(cfg("deepkd"), PARTS, 0.0)
    found = estimate.estimate(made, states, 1)
    assert found.seconds == pytest.approx(180 * 1.5 + 5 * deepkd)
    assert found.how == (
        "an estimate: 2 by finished runs of their kind; 5 by their networks' passes over noise, timed here, each on "
        "8 of 8 cores"
    )
    assert estimate.estimate(made, states, 1, here=False).seconds is None
    made = dataclasses.replace(made, runs=made.runs[:5])
    timed.clear()
    found = estimate.estimate(made, states, 1, here=False)
    assert found.seconds == pytest.approx(270)
    assert found.how == "an estimate: 2 by finished runs of their kind"
    assert timed == []


def test_a_timing_that_fails_stops_nothing(timed, monkeypatch):
    def fails(*arguments):
        raise RuntimeError("CUDA out of memory.\nMore of it")

    monkeypatch.setattr(timing, "measure", fails)
    made = plan()
    found = estimate.estimate(made, dict.fromkeys(made.runs, "new"), 1)
    assert str(found) == "not known: timing res20_res8 failed (CUDA out of memory.)"
