"""The gradient signal-to-noise ratio in a run: measured, recorded, resumed, and as what sets the momenta."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from deepkd_plugin import config, launch
from deepkd_plugin.device import seed_everything
from deepkd_plugin.distillers import KD, DeepKD
from deepkd_plugin.distillers.vanilla import Vanilla
from deepkd_plugin.errors import UserError
from deepkd_plugin.hosts import builtin
from deepkd_plugin.run import checkpoint
from deepkd_plugin.run.metrics import read_lines, read_metrics
from deepkd_plugin.run.schedule import make_scheduler
from deepkd_plugin.trainer import DecoupledMomentumTrainer, Trainer

STREAMS = ("tog", "tcg", "ncg")
PAPER = (0.075, -0.075, 0.05)
TIMED = ("seconds", "images_per_second", "data_seconds")
PARAMETERS = 12 * 8 + 8 + 2 * 8 + 8 * 5 + 5


class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(12, width), nn.BatchNorm1d(width), nn.ReLU())
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        return self.head(self.body(x)), {}


@pytest.fixture
def cfg(tmp_path):
    """Four epochs of four iterations."""
    tree = builtin.CFG.clone()
    config.add_deepkd_config(tree)
    tree.LOG.PREFIX = str(tmp_path)
    tree.SOLVER.TRAINER = "DecoupledMomentumSGD"
    tree.SOLVER.EPOCHS = 4
    tree.SOLVER.BATCH_SIZE = 16
    tree.SOLVER.LR_DECAY_STAGES = [2]
    tree.DISTILLER.TYPE = "DeepKD"
    tree.DeepKD.MASK.TYPE = "none"  # a mask of one class leaves NCG without a gradient
    return tree


def measure(cfg, every=1, window=3, coordinates=0):
    cfg.GSNR.update({"MEASURE": True, "EVERY": every, "WINDOW": window, "COORDINATES": coordinates})


def allocate(cfg, deltas=PAPER, **options):
    measure(cfg)
    cfg.GSNR.MEASURE = False
    cfg.SOLVER.DECOUPLED.update({"ALLOCATION": "gsnr"} | options)
    set_deltas(cfg, deltas)


def set_deltas(cfg, deltas):
    cfg.SOLVER.DECOUPLED.DELTA.update(dict(zip(("TOG", "TCG", "NCG"), deltas)))


def make(cfg, name="run", method=DeepKD, trainer=DecoupledMomentumTrainer):
    config.check(cfg, {})
    seed_everything(cfg.SOLVER.SEED)
    student = Net()
    distiller = Vanilla(student) if method is Vanilla else method(student, Net(16).requires_grad_(False), cfg)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(50, 3, 2, 2, generator=generator)
    labels = (images.flatten(1) @ torch.randn(12, 5, generator=generator)).argmax(1)
    loader = DataLoader(TensorDataset(images, labels, torch.arange(50)), 16, shuffle=True)
    made = trainer(name, distiller, loader, DataLoader(TensorDataset(images, labels), 16), cfg)
    made.teacher_acc = 50.0  # as if it had been tested: these teachers know nothing
    return made


def stop_after(trainer, epoch, resume=False):
    """Interrupt a run when the training epoch after `epoch` begins."""
    run = trainer.train_epoch

    def stop(number):
        if number > epoch:
            raise KeyboardInterrupt
        return run(number)

    trainer.train_epoch = stop
    with pytest.raises(KeyboardInterrupt):
        trainer.train(resume)


def windows(trainer):
    return read_lines(trainer.folder, "gsnr.jsonl")


def lines(trainer):
    return [
        {name: value for name, value in record.items() if name not in TIMED} for record in read_metrics(trainer.folder)
    ]


def assert_same_end(one, other):
    """The same weights, statistics, buffers and momenta, bit for bit."""
    ends = [t.module.student.state_dict() for t in (one, other)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    states = [t.optimizer.state_dict() for t in (one, other)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert list(states[0]["state"]) == list(states[1]["state"])
    for p, q in zip(*(s["state"].values() for s in states)):
        assert all(torch.equal(a, b) for a, b in zip(p.values(), q.values()))


# Measuring


@pytest.mark.parametrize(
    ("method", "trainer", "deltas", "options"),
    [
        (Vanilla, Trainer, (0.0, 0.0, 0.0), {}),
        (DeepKD, Trainer, (0.0, 0.0, 0.0), {}),
        (DeepKD, DecoupledMomentumTrainer, (0.0, 0.0, 0.0), {}),
        (DeepKD, DecoupledMomentumTrainer, (0.075, -0.075, 0.075), {}),
        (DeepKD, DecoupledMomentumTrainer, PAPER, {}),
        (DeepKD, DecoupledMomentumTrainer, PAPER, {"AMP": True}),
    ],
)
def test_a_measured_run_is_bitwise_the_one_that_is_not(cfg, method, trainer, deltas, options):
    cfg.SOLVER.EPOCHS = 2
    cfg.SOLVER.TRAINER = "base" if trainer is Trainer else "DecoupledMomentumSGD"
    cfg.SOLVER.update(options)
    set_deltas(cfg, deltas)
    plain = make(cfg, "plain", method, trainer)
    plain.train()
    measure(cfg)
    cfg.GSNR.LAYERS = True
    measured = make(cfg, "measured", method, trainer)
    measured.train()
    assert_same_end(plain, measured)
    assert [w["iteration"] for w in windows(measured)] == [3, 6]
    assert not (plain.folder / "gsnr.jsonl").exists()
    assert plain.monitor is None
    records = lines(measured)
    assert [record.pop("gsnr") for record in records] == [w["gsnr"] for w in windows(measured)]
    assert records == lines(plain)


def test_what_a_window_leaves(cfg):
    measure(cfg)
    set_deltas(cfg, PAPER)
    trainer = make(cfg)
    trainer.train()
    held = windows(trainer)
    assert [(w["epoch"], w["iteration"]) for w in held] == [(1, 3), (2, 6), (3, 9), (3, 12), (4, 15)]
    for window in held:
        assert list(window) == [
            *("epoch", "iteration", "samples", "coordinates", "parameters", "gsnr", "angle", "momentum")
        ]
        assert (window["samples"], window["coordinates"], window["parameters"]) == (3, PARAMETERS, PARAMETERS)
        assert window["momentum"] == pytest.approx({"tog": 0.975, "tcg": 0.825, "ncg": 0.95})
        assert list(window["gsnr"]) == list(STREAMS)
        for found in window["gsnr"].values():
            assert list(found) == ["mean", "ratio", "norm", "zero_variance", "missing", "not_finite"]
            assert found["ratio"] > 0
            assert found["norm"] > 0
            assert 0 <= found["zero_variance"] < PARAMETERS
            assert found["missing"] == found["not_finite"] == 0
        assert list(window["angle"]) == ["tog-tcg", "tog-ncg", "tcg-ncg"]
        assert all(0 < degrees < 180 for degrees in window["angle"].values())
    # an epoch's record has its last window, not what a window says beside it
    records = read_metrics(trainer.folder)
    assert [record["gsnr"] for record in records] == [held[i]["gsnr"] for i in (0, 1, 3, 4)]
    work = (trainer.folder / "worklog.txt").read_text()
    assert work.count("gsnr/ncg/ratio: ") == 4


def test_an_epoch_in_which_no_window_ends(cfg):
    measure(cfg, every=2)
    trainer = make(cfg)
    trainer.train()
    assert [w["iteration"] for w in windows(trainer)] == [6, 12]
    assert ["gsnr" in record for record in read_metrics(trainer.folder)] == [False, True, True, False]


def test_layers_and_a_subset(cfg):
    measure(cfg, coordinates=50)
    cfg.GSNR.LAYERS = True
    trainer = make(cfg)
    trainer.train()
    window = windows(trainer)[-1]
    assert (window["coordinates"], window["parameters"]) == (50, PARAMETERS)
    assert list(window["layers"]) == ["body.1", "body.2", "head"]  # names as the student has them
    for by_stream in window["layers"].values():
        assert list(by_stream) == list(STREAMS)
        assert all(set(found) == {"mean", "ratio"} for found in by_stream.values())
    used = 50 - window["gsnr"]["tog"]["zero_variance"]
    layers = [by_stream["tog"]["ratio"] for by_stream in window["layers"].values()]
    assert used
    assert min(layers) <= window["gsnr"]["tog"]["ratio"] <= max(layers)
    assert "layers" not in read_metrics(trainer.folder)[-1]


def test_the_numbers_are_those_of_the_runs_own_gradients(cfg):
    """The streams' gradients in the sampled iterations, taken by autograd and given to numpy."""
    measure(cfg, every=2)
    cfg.SOLVER.EPOCHS = 2
    trainer = make(cfg)
    params = list(trainer.module.student.parameters())
    by_stream, stored = trainer.step.by_stream, {stream: [] for stream in STREAMS}

    def watched(losses):
        losses = by_stream(losses)
        if trainer.monitor.due:
            for stream, loss in losses.items():
                parts = torch.autograd.grad(loss, params, retain_graph=True)
                stored[stream].append(torch.cat([g.flatten() for g in parts]).double().numpy())
        return losses

    trainer.step.by_stream = watched
    trainer.train()
    (window,) = windows(trainer)
    for stream, gradients in stored.items():
        x = np.array(gradients[:3])
        varied = np.ptp(x, 0) > 0
        signal, noise = x.mean(0)[varied] ** 2, x.var(0, ddof=1)[varied]
        expected = {
            "mean": (signal / noise).mean(),
            "ratio": signal.sum() / noise.sum(),
            "norm": np.linalg.norm(x, axis=1).mean(),
            "zero_variance": (~varied).sum(),
            "missing": 0,
            "not_finite": 0,
        }
        assert window["gsnr"][stream] == pytest.approx(expected, rel=1e-9)


def test_a_base_trainer_has_one_stream(cfg):
    measure(cfg)
    cfg.SOLVER.TRAINER = "base"
    trainer = make(cfg, method=KD, trainer=Trainer)
    trainer.train()
    window = windows(trainer)[0]
    assert list(window["gsnr"]) == ["task"]
    assert window["angle"] == {}
    assert window["momentum"] == {"task": 0.9}


def test_a_run_that_is_started_again_leaves_no_old_window(cfg):
    measure(cfg)
    trainer = make(cfg)
    trainer.train()
    assert b"gsnr/tog/ratio" in next((trainer.folder / "gsnr.events").iterdir()).read_bytes()
    cfg.GSNR.MEASURE = False
    make(cfg).train(overwrite=True)
    assert not (trainer.folder / "gsnr.jsonl").exists()
    assert not (trainer.folder / "gsnr.events").exists()


# Resuming


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_a_run_resumed_within_a_window_is_bitwise_the_uninterrupted_one(cfg, epoch):
    """After epoch 1, 2 and 3 a window has 1, 2 and 0 samples."""
    allocate(cfg, SMOOTHING=0.3)
    cfg.GSNR.update({"COORDINATES": 100, "LAYERS": True})
    whole = make(cfg, "whole")
    result = whole.train()
    stop_after(make(cfg, "parts"), epoch)
    resumed = make(cfg, "parts")
    assert resumed.train(resume=True) == result
    assert_same_end(whole, resumed)
    assert (whole.folder / "gsnr.jsonl").read_bytes() == (resumed.folder / "gsnr.jsonl").read_bytes()
    assert lines(whole) == lines(resumed)
    assert whole.allocation.logs == resumed.allocation.logs
    states = [checkpoint.load(t.folder / "latest", "test") for t in (whole, resumed)]
    assert states[0]["allocation"] == states[1]["allocation"] == whole.allocation.logs
    moments = [state["monitor"].pop("moments") for state in states]
    assert states[0]["monitor"] == states[1]["monitor"] == {"iteration": 16}
    assert moments[0]["samples"] == 1
    for name, value in moments[0].items():
        same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
        assert same(value, moments[1][name]), name


@pytest.mark.parametrize(("every", "expected"), [(1, [11, 14]), (2, [14])])
def test_measuring_from_a_resumed_epoch_on(cfg, every, expected):
    """The iterations are the run's; what was not measured before it stays so."""
    measure(cfg, every)
    cfg.GSNR.MEASURE = False
    set_deltas(cfg, PAPER)
    whole = make(cfg, "whole")
    whole.train()
    stop_after(make(cfg, "parts"), 2)
    cfg.GSNR.MEASURE = True
    resumed = make(cfg, "parts")
    resumed.train(resume=True)
    assert [w["iteration"] for w in windows(resumed)] == expected
    assert [w["epoch"] for w in windows(resumed)] == [3, 4][-len(expected) :]
    assert_same_end(whole, resumed)


def test_a_measured_run_goes_on_without_measuring(cfg):
    measure(cfg)
    whole = make(cfg, "whole")
    whole.train()
    stop_after(make(cfg, "parts"), 2)
    cfg.GSNR.MEASURE = False
    resumed = make(cfg, "parts")
    resumed.train(resume=True)
    assert windows(resumed) == windows(whole)[:2]
    assert_same_end(whole, resumed)


def test_what_may_not_change_at_a_resume(cfg):
    allocate(cfg)
    stop_after(make(cfg), 1)
    for node, key, value in (("GSNR", "WINDOW", 4), ("GSNR", "EVERY", 2), ("GSNR", "COORDINATES", 10)):
        held = cfg[node][key]
        cfg[node][key] = value
        with pytest.raises(UserError, match=f"own config: {node}.{key} was {held}, is {value}"):
            make(cfg).train(resume=True)
        cfg[node][key] = held
    cfg.SOLVER.DECOUPLED.SMOOTHING = 0.9
    with pytest.raises(UserError, match="SMOOTHING was 0.5, is 0.9"):
        make(cfg).train(resume=True)


# Momenta


def by_hand(cfg, held):
    """The momenta after each window, from the ratios that were recorded."""
    node, logs, path = cfg.SOLVER.DECOUPLED, None, []
    bounds = np.abs([node.DELTA[s.upper()] for s in STREAMS])
    for window in held:
        new = np.log([window["gsnr"][s]["ratio"] for s in STREAMS])
        logs = new if logs is None else node.SMOOTHING * logs + (1 - node.SMOOTHING) * new
        centred = (logs - (logs.max() + logs.min()) / 2) / (math.log(node.SEPARATION) / 2)
        path.append(dict(zip(STREAMS, 0.9 + bounds * np.clip(centred, -1, 1))))
    return path


@pytest.mark.parametrize("separation", [1.05, 20.0])
def test_momenta_follow_every_window_within_their_bounds(cfg, separation):
    allocate(cfg, SEPARATION=separation, SMOOTHING=0.4)
    trainer = make(cfg)
    assert trainer.optimizer.param_groups[0]["momentum"] == dict.fromkeys(STREAMS, 0.9)
    # a second group: the head's parameters, as a distiller with settings of its own for them would have
    first = trainer.optimizer.param_groups[0]
    second = dict(first) | {"params": first["params"][-2:], "momentum": dict(first["momentum"])}
    first["params"] = first["params"][:-2]
    trainer.optimizer.param_groups.append(second)
    trainer.scheduler = make_scheduler(trainer.optimizer, cfg.SOLVER)
    seen = []
    trainer.optimizer.register_step_pre_hook(
        lambda optimizer, *_: seen.append([dict(group["momentum"]) for group in optimizer.param_groups])
    )
    trainer.train()
    held = windows(trainer)
    for window, expected in zip(held, by_hand(cfg, held)):
        assert window["momentum"] == pytest.approx(expected, abs=1e-12)
        for stream, bound in zip(STREAMS, PAPER):
            assert abs(window["momentum"][stream] - 0.9) <= abs(bound) + 1e-12
    assert held[0]["momentum"] != dict.fromkeys(STREAMS, 0.9)
    assert len({tuple(w["momentum"].values()) for w in held}) > 1
    # from the iteration after a window on, in every group
    for iteration, groups in enumerate(seen, 1):
        ended = [w for w in held if w["iteration"] < iteration]
        expected = ended[-1]["momentum"] if ended else dict.fromkeys(STREAMS, 0.9)
        assert groups == [expected, expected]
    ends = [[w for w in held if w["epoch"] <= epoch][-1]["momentum"] for epoch in (1, 2, 3, 4)]
    assert [record["momentum"] for record in read_metrics(trainer.folder)] == ends


@pytest.mark.parametrize("deltas", [(0.075, -0.075, 0.075), (0.075, -0.075, 0.025)])
def test_the_papers_order_gives_the_fixed_papers_momenta(cfg, monkeypatch, deltas):
    """From the first full window with its order on, the run has the fixed variant's momenta exactly."""
    set_deltas(cfg, deltas)
    fixed, stream = config.momenta(cfg)
    allocate(cfg, deltas)
    trainer = make(cfg)
    assert trainer.optimizer.param_groups[0]["weight_decay_stream"] == stream
    finish = trainer.monitor.finish

    def paper():
        record = finish()
        for name, ratio in (("tog", 0.9), ("tcg", 0.1), ("ncg", 0.8)):
            record["gsnr"][name]["ratio"] = ratio
        return record

    monkeypatch.setattr(trainer.monitor, "finish", paper)
    trainer.train()
    assert [w["momentum"] for w in windows(trainer)] == [fixed] * 5


def test_an_allocated_run_is_another_one_than_a_fixed_one(cfg):
    set_deltas(cfg, PAPER)
    fixed = make(cfg, "fixed")
    fixed.train()
    allocate(cfg)
    allocated = make(cfg, "allocated")
    allocated.train()
    ends = [t.module.student.state_dict() for t in (fixed, allocated)]
    assert not all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_an_allocation_with_a_stream_without_losses(cfg):
    allocate(cfg, (0.075, 0.0, 0.05), LOSS_STREAMS=["loss_ce:tog", "loss_kd:ncg"])
    trainer = make(cfg, method=KD)
    trainer.train()
    momentum = windows(trainer)[-1]["momentum"]
    assert windows(trainer)[-1]["gsnr"]["tcg"]["ratio"] is None
    assert momentum["tcg"] == 0.9
    assert (momentum["tog"] - 0.9) * (momentum["ncg"] - 0.9) < 0


@pytest.mark.parametrize("allocation", [True, False])
def test_losses_without_a_stream_are_found_before_a_measured_run(cfg, allocation):
    """Equal momenta hide where a loss goes from the weights, but not from what measures the streams."""
    if allocation:
        allocate(cfg, LOSS_STREAMS=["loss_kd:ncg"])
    else:
        measure(cfg)
    trainer = make(cfg, method=KD)
    with pytest.raises(UserError, match="LOSS_STREAMS: loss 'loss_ce' belongs to no stream"):
        trainer.train()
    assert not trainer.folder.exists()


# Mistakes


@pytest.mark.parametrize("allocation", [False, True])
def test_a_window_that_would_never_end(cfg, allocation):
    if allocation:
        allocate(cfg)
    measure(cfg, every=6, window=3)
    with pytest.raises(UserError) as caught:
        make(cfg)
    assert str(caught.value) == (
        "GSNR.EVERY x GSNR.WINDOW is 6 x 3 = 18 iterations; it must be at most 16, all that the run has, so that "
        "one window ends"
    )
    measure(cfg, every=4, window=4)
    trainer = make(cfg)
    trainer.train()
    assert [w["iteration"] for w in windows(trainer)] == [16]


def test_mistakes_on_the_command_line(train):
    measured = ("GSNR.MEASURE", "True")
    ours = ("SOLVER.TRAINER", "DecoupledMomentumSGD", "SOLVER.DECOUPLED.ALLOCATION", "gsnr")
    for options, expected in [
        (measured, "GSNR.EVERY x GSNR.WINDOW is 200 x 10 = 2000 iterations; it must be at most"),
        ((*measured, "GSNR.WINDOW", "1"), "command line: GSNR.WINDOW is 1; it must be a whole number from 2"),
        (ours[2:], "it must be 'fixed' "),
        (ours, "it must be 'fixed' if fewer than two of SOLVER.DECOUPLED.DELTA differ from 0"),
    ]:
        code, _, err = train("vanilla", *options)
        assert code == 2
        assert err.count("\n") == 1
        assert expected in err
    assert not train.folder.exists()


def test_mdistillers_trainers_do_not_measure(train, mdistiller, monkeypatch):
    monkeypatch.setattr(launch, "find_host", lambda: mdistiller)
    plain = {"LR_SCHEDULE": "step", "WARMUP_EPOCHS": "0", "MIN_LR": "0.0", "CHANNELS_LAST": "False"}
    pairs = [part for name, value in plain.items() for part in (f"SOLVER.{name}", value)]
    code, _, err = train("kd", *pairs, "SOLVER.TRAINER", "dot", "GSNR.MEASURE", "True")
    assert code == 2
    expected = "GSNR.MEASURE is True; it must be False under mdistiller's trainer dot, which does not read it"
    assert f"command line: {expected}" in err
    assert not train.folder.exists()


def test_an_allocated_run_from_the_command_line(train):
    given = {"EVERY": "2", "WINDOW": "2", "COORDINATES": "1000"}
    pairs = [part for name, value in given.items() for part in (f"GSNR.{name}", value)]
    short = ("SOLVER.EPOCHS", "1", "SOLVER.WARMUP_EPOCHS", "0")
    code, _, err = train("deepkd", *short, *pairs, "SOLVER.DECOUPLED.ALLOCATION", "gsnr")
    assert code == 0, err
    (window,) = read_lines(train.folder, "gsnr.jsonl")
    assert (window["iteration"], window["coordinates"]) == (4, 1000)
    (line,) = read_metrics(train.folder)
    assert line["gsnr"] == window["gsnr"]
    assert line["momentum"] == window["momentum"]
    assert len(set(window["momentum"].values())) > 1
