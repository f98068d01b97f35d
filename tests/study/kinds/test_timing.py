"""How long runs take, by a clock that counts what convolutions and linear layers compute instead of seconds.

So a step's time is known to the last operation, on any machine and beside any other work.
"""

import time
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from deepkd_plugin.data import DATASETS, Source, register_dataset
from deepkd_plugin.hosts.builtin.models import cifar_model_dict
from deepkd_plugin.study.kinds import KINDS, timing
from deepkd_plugin.study.kinds.timing import Timer
from deepkd_plugin.study.reproduce import tables

TINY = (
    "DATASET.TYPE",
    "dots",
    "SOLVER.BATCH_SIZE",
    "8",
    "DATASET.TEST.BATCH_SIZE",
    "8",
    "SOLVER.EPOCHS",
    "10",
)
TINY += ("SOLVER.LR_DECAY_STAGES", "[9]")
STEPS, TESTED, LOAD = 5, 16, 1e6
DELTAS = (
    "SOLVER.DECOUPLED.DELTA.TOG",
    "0.05",
    "SOLVER.DECOUPLED.DELTA.TCG",
    "-0.05",
    "SOLVER.DECOUPLED.DELTA.NCG",
)


class Clock:
    """Seconds: `pace` of them an operation, and those that `wait` adds."""

    def __init__(self):
        self.counter = FlopCounterMode(display=False)
        self.now, self.counted, self.pace = 0.0, 0, 1.0

    def __call__(self):
        self.set(self.pace)
        return self.now

    def set(self, pace):
        """Count from here on at another pace."""
        total = self.counter.get_total_flops()
        self.now += self.pace * (total - self.counted)
        self.counted, self.pace = total, pace

    def wait(self, image):
        """Distort an image by nothing, in LOAD seconds."""
        self.now += LOAD
        return image


@pytest.fixture
def clock(monkeypatch):
    """The clock in the place of time.perf_counter, and a set of 40 and 16 small images."""
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    facts = {
        "num_classes": 4,
        "train": 8 * STEPS,
        "test": TESTED,
        "side": 8,
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
    }
    register_dataset("dots", Source(lambda root, split: None, **facts))
    with clock.counter:
        yield clock
    del DATASETS["dots"]


def cfg(method, *options):
    kind, table = KINDS["classification"], tables.find("glyphs100")
    return kind.read(kind.file("glyphs100", table.pairs[0], method), (*TINY, *options))


def seconds(*cfgs, threads=1, runs=None):
    return Timer(KINDS["classification"], cfgs, threads, runs or [1] * len(cfgs)).seconds()


def passes(name, side=8):
    """Operations of a network's forward pass of 8 images, and of the backward pass."""
    network = cifar_model_dict[name][0](num_classes=4)
    with FlopCounterMode(display=False) as counter:
        logits, _ = network(torch.randn(8, 3, side, side))
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        logits.sum().backward()
    return forward, counter.get_total_flops()


@pytest.mark.parametrize(
    ("method", "options", "views", "backward"),
    [
        ("vanilla", (), 1, 1),
        ("kd", (), 1, 1),
        ("mlkd", (), 2, 1),
        ("deepkd", (), 1, 2),  # two distinct momenta
        ("deepkd", (*DELTAS, "0.02"), 1, 3),
        ("deepkd_crld", (*DELTAS, "0.02"), 2, 3),
        # allocated momenta differ, and every fifth step samples three streams
        ("deepkd", ("SOLVER.DECOUPLED.ALLOCATION", "gsnr", "GSNR.EVERY", "5"), 1, 3 + 3 / 5),
        ("deepkd", ("GSNR.MEASURE", "True", "GSNR.EVERY", "5"), 1, 2 + 3 / 5),
    ],
)
def test_a_run_costs_its_steps_and_its_tests(clock, method, options, views, backward):
    student, back = passes("resnet8")
    teacher = 0 if method == "vanilla" else passes("resnet20")[0]
    step = views * (teacher + student + backward * back)
    tested = TESTED / 8
    expected = 10 * (STEPS * step + tested * student) + tested * teacher
    (taken,) = seconds(cfg(method, *options))
    assert taken == pytest.approx(expected, rel=5e-3)  # relations of classes, angles of gradients are counted too


def test_a_teacher_costs_what_it_does_at_its_own_size(clock):
    student, back = passes("resnet8")
    teacher = passes("resnet20", 16)[0]
    assert teacher > 3.9 * passes("resnet20")[0]
    tested = TESTED / 8
    expected = 10 * (STEPS * (teacher + student + back) + tested * student) + tested * teacher
    (taken,) = seconds(cfg("kd", "DISTILLER.TEACHER_INPUT.SIZE", "16"))
    assert taken == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize(("method", "computed"), [("kd", 0), ("mlkd", 1)])
def test_with_a_table_a_run_costs_what_is_not_in_it(clock, method, computed):
    """Of a set without augmentation, all of whose views the first epoch of the first run has seen."""
    student, back = passes("resnet8")
    teacher = passes("resnet20")[0]
    views = computed + 1
    options = ("DISTILLER.TEACHER_LOGITS", "table")
    tested = TESTED / 8
    (taken,) = seconds(cfg(method, *options), runs=[5])
    step = views * (student + back) + (computed + 1 / 50) * teacher
    assert taken == pytest.approx(10 * (STEPS * step + tested * student) + tested * teacher, rel=5e-3)


def test_a_pair_s_runs_are_timed_as_each_alone_and_its_networks_are_tested_once(clock):
    apart = seconds(cfg("kd")) + seconds(cfg("dkd"))
    before = clock()
    assert seconds(cfg("kd"), cfg("dkd")) == pytest.approx(apart, rel=2e-3)
    together, before = clock() - before, clock()
    seconds(cfg("kd"))
    seconds(cfg("dkd"))
    assert together < clock() - before


def test_images_are_loaded_in_turn_or_beside_the_steps(clock, monkeypatch):
    monkeypatch.setattr(timing, "cores", lambda: 4)
    DATASETS["dots"] = replace(DATASETS["dots"], augmentation=(clock.wait,))

    def step(*options):
        return seconds(cfg("vanilla", *options))[0] / 10 / STEPS

    clock.set(0.0)  # steps take no time
    assert step("DATASET.NUM_WORKERS", "0") == pytest.approx(8 * LOAD)
    assert step("DATASET.NUM_WORKERS", "2") == pytest.approx(8 * LOAD / 2)
    assert step("DATASET.NUM_WORKERS", "16") == pytest.approx(8 * LOAD / 4)
    assert step("DATASET.PIPELINE", "device") == 0
    clock.set(1.0)
    alone = step("DATASET.PIPELINE", "device")
    assert alone > 8 * LOAD
    assert step("DATASET.NUM_WORKERS", "2") == pytest.approx(alone)
    assert step("DATASET.NUM_WORKERS", "0") == pytest.approx(alone + 8 * LOAD)


def test_a_batch_that_takes_too_long_is_scaled(clock, monkeypatch):
    options = ("SOLVER.BATCH_SIZE", "32", "DATASET.TEST.BATCH_SIZE", "32")
    seen = []
    noise = Source.noise
    monkeypatch.setattr(Source, "noise", lambda *arguments: seen.append(arguments[1]) or noise(*arguments))
    few = seconds(cfg("kd", *options))
    assert max(seen) == timing.FEW
    monkeypatch.setattr(timing, "BUDGET", 1e12)
    assert seconds(cfg("kd", *options)) == pytest.approx(few, rel=2e-3)
    assert max(seen) == 32


def test_threads_that_wait_for_each_other_are_not_believed(clock, monkeypatch):
    alone = seconds(cfg("kd"))
    before, set_threads = torch.get_num_threads(), torch.set_num_threads
    for pace, factor in ((100.0, 1.0), (0.5, 0.5)):

        def paced(threads, pace=pace):
            clock.set(pace if threads == 3 else 1.0)
            set_threads(threads)

        monkeypatch.setattr(torch, "set_num_threads", paced)
        together = seconds(cfg("kd"), threads=3)
        assert together == pytest.approx([factor * one for one in alone], rel=2e-3)
    assert torch.get_num_threads() == before


def test_nothing_is_compiled_and_nothing_is_left_behind(clock, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.nn.Module, "compile", None)
    held = cfg("kd", "SOLVER.EXECUTION", "compile")
    assert seconds(held) == pytest.approx(seconds(cfg("kd")))
    assert held.SOLVER.EXECUTION == "compile"
    assert list(tmp_path.iterdir()) == []
