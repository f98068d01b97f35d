"""Every way to run a step takes the same step: against the eager, sequential one."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deepkd_plugin import device, optim, speed
from deepkd_plugin.gsnr import GradientMonitor
from deepkd_plugin.optim import DecoupledMomentumSGD
from deepkd_plugin.run.metrics import read_metrics

MOMENTUM = {"tog": 0.975, "tcg": 0.825, "ncg": 0.95}


class Toy(nn.Module):
    """A distiller with BatchNorm whose losses change with the epoch, as warm-up and mask do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)]
        self.student = nn.Sequential(*layers).double()

    def forward(self, image, target, epoch):
        logits = self.student(image)
        kd = epoch * logits.square().mean()
        return logits, {"tog": F.cross_entropy(logits, target), "tcg": kd, "ncg": logits.sin().mean()}


def make(kind=speed.Step):
    module = Toy()
    optimizer = DecoupledMomentumSGD(module.parameters(), 0.1, MOMENTUM, 1e-2, "tcg")
    return kind(module, optimizer, lambda losses: losses, False, torch.device("cpu"))


def run(step, epochs=3, sizes=(6, 6, 6, 6, 6, 4)):
    """Every step's losses and logits, and the final weights and statistics."""
    generator = torch.Generator().manual_seed(1)
    seen = []
    for epoch in range(1, epochs + 1):
        step.optimizer.param_groups[0]["lr"] = 0.1 / epoch
        for size in sizes:
            image = torch.randn(size, 3, 8, 8, generator=generator, dtype=torch.float64)
            batch = {"image": image, "target": torch.arange(size) % 5}
            logits, losses = step(batch, epoch)
            seen += [logits.detach().clone(), *(loss.detach().clone() for loss in losses.values())]
    return seen + [value.clone() for value in step.distiller.state_dict().values()]


def assert_same(one, other, tolerance=1e-12):
    assert len(one) == len(other)
    for a, b in zip(one, other):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.fixture
def recorded(monkeypatch):
    """device.capture and its stream, with the semantics of a capture: nothing runs until the first replay."""
    captures = []

    def capture(function):
        captures.append(function)
        static = {}

        class Graph:
            def replay(self):
                logits, losses = function()
                static["logits"].copy_(logits.detach())
                for name, loss in losses.items():
                    static[name].copy_(loss.detach())

        step = captures_of[0]
        shape = (len(step.inputs["target"]), 5)
        static |= {name: torch.zeros((), dtype=torch.float64) for name in MOMENTUM}
        static["logits"] = torch.zeros(shape, dtype=torch.float64)
        return Graph(), (static["logits"], {name: static[name] for name in MOMENTUM})

    captures_of = []
    monkeypatch.setattr(device, "capture", capture)
    monkeypatch.setattr(device, "side_stream", torch.enable_grad)
    return captures, captures_of


def test_replayed_steps_are_the_eager_ones(recorded):
    """Three epochs of another learning rate and loss, with a smaller last batch, through recorded replays."""
    captures, step_of = recorded
    graphed = make(speed.GraphedStep)
    step_of.append(graphed)
    assert_same(run(make()), run(graphed))
    assert len(captures) == 3  # one an epoch: constants of an epoch may be in it
    assert graphed.optimizer.capturable


def test_no_step_of_a_warm_up_by_iteration_is_captured(recorded):
    """Its factor is another in every step; the first steps after it are eager too, and then a capture is made."""
    captures, step_of = recorded
    graphed, eager = make(speed.GraphedStep), make()
    step_of.append(graphed)
    points = [0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, *[3] * 5]
    image, target = torch.randn(8, 3, 8, 8, dtype=torch.float64), torch.arange(8) % 5
    for step, epoch in enumerate(points):
        batch = {"image": image.roll(step, 0), "target": target}
        (_, one), (_, other) = graphed(batch, epoch), eager(batch, epoch)
        assert_same(list(one.values()), list(other.values()))
        assert len(captures) == (step >= 11)


def test_capturable_buffers_stay_where_they_are():
    eager, capturable = make(), make()
    capturable.optimizer.capturable = True
    assert_same(run(eager, 1), run(capturable, 1))
    state = capturable.optimizer.state
    before = [b.data_ptr() for s in state.values() for b in s["buffers"]]
    run(capturable, 1)
    assert [b.data_ptr() for s in state.values() for b in s["buffers"]] == before
    assert copy.deepcopy(capturable.optimizer).capturable


@pytest.mark.parametrize("backend", ["aot_eager", "broken"])
def test_compiled_steps_and_the_fallback(monkeypatch, capsys, backend):
    def broken(graph, inputs):
        raise RuntimeError("no compiler here\nand more")

    monkeypatch.setattr(device, "compile_options", lambda at: {"backend": broken if backend == "broken" else backend})
    compiled = make(speed.CompiledStep)
    assert_same(run(make(), 1), run(compiled, 1), 1e-10)
    out = capsys.readouterr().out
    if backend == "broken":
        assert compiled.name == "eager"
        assert "SOLVER.EXECUTION compile: falls back to eager (" in out
        assert "no compiler here" in out
    else:
        assert (compiled.name, out) == ("compile", "")
    assert not any("_orig_mod" in name for name in compiled.distiller.state_dict())


def test_batched_gradients_take_the_same_steps():
    batched = make()
    batched.optimizer.batched = True
    assert_same(run(make()), run(batched))


def test_auto_is_sequential_on_a_cpu_without_measuring():
    def never():
        raise AssertionError("measured")

    assert speed.choose_gradients("auto", make(), never) == "sequential"
    assert speed.choose_gradients("batched", make(), never) == "batched"


def test_the_measurement_takes_the_faster_and_leaves_no_trace(monkeypatch, capsys):
    step = make()
    before = [value.clone() for value in step.distiller.state_dict().values()]
    batch = {"image": torch.randn(4, 3, 8, 8, dtype=torch.float64), "target": torch.arange(4)}
    costs = {False: 3.0, True: 1.0}

    def gradients(self, batch, epoch):
        now[0] += costs[self.optimizer.batched]

    now = [0.0]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])
    with monkeypatch.context() as patch:
        patch.setattr(speed.Step, "gradients", gradients)
        assert speed.faster(step, batch) == "batched"
        costs[True] = 5.0
        assert speed.faster(step, batch) == "sequential"
    assert speed.faster(step, batch) in ("sequential", "batched")
    assert_same(before, list(step.distiller.state_dict().values()))
    assert not step.optimizer.state
    assert all(p.grad is None for p in step.distiller.parameters())
    assert "ms for forward and backward" in capsys.readouterr().out


def test_streams_that_will_part_are_timed_apart(monkeypatch):
    """By GSNR, equal momenta do not stay equal: the trial has a set of each stream."""
    step, batch = make(), {"image": torch.randn(4, 3, 8, 8, dtype=torch.float64), "target": torch.arange(4)}
    for group in step.optimizer.param_groups:
        group["momentum"] = dict.fromkeys(group["momentum"], 0.9)
    seen = []
    by_set = optim.backward_by_set
    monkeypatch.setattr(
        optim, "backward_by_set", lambda losses, sets, *rest: seen.append(sets) or by_set(losses, sets, *rest)
    )
    speed.faster(step, batch, apart=True, rounds=1)
    assert {len(sets) for sets in seen} == {len(step.optimizer.streams)}
    assert all(group["merge"] for group in step.optimizer.param_groups)


def test_what_cannot_be_mapped_is_walked_in_turn(capsys):
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g * float(g.sum() > -1e9)  # a host read: it has no batching rule

    step = make()
    student = step.distiller.student
    student.register_forward_hook(lambda module, inputs, output: Opaque.apply(output))
    batch = {"image": torch.randn(4, 3, 8, 8, dtype=torch.float64), "target": torch.arange(4)}
    assert speed.faster(step, batch) == "sequential"
    assert "SOLVER.GRADIENTS auto: sequential (" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "execution", "said"),
    [
        ((), "eager, sequential gradients", ""),
        (("SOLVER.GRADIENTS", "batched"), "eager, batched gradients", ""),
        (
            ("SOLVER.EXECUTION", "graphs"),
            "eager, sequential gradients",
            "graphs: falls back to eager (it needs CUDA",
        ),
    ],
)
def test_runs_name_the_way_they_went(train, options, execution, said):
    code, out, err = train("deepkd", *options)
    assert code == 0, err
    assert [record["execution"] for record in read_metrics(train.folder)] == [execution] * 2
    assert said in out


class Measured:
    """A step as the trainer takes it where gradients are sampled: an iteration is counted first."""

    def __init__(self, step, every):
        self.step, self.optimizer, self.distiller = step, step.optimizer, step.distiller
        self.monitor = step.monitor = GradientMonitor(
            step.distiller.named_parameters(), tuple(MOMENTUM), every, window=100
        )

    def __call__(self, batch, epoch):
        self.monitor.tick()
        assert self.step.samples == (self.monitor.iteration % self.monitor.every == 0)
        return self.step(batch, epoch)


def with_momentum(step, momentum):
    for group in step.optimizer.param_groups:
        group["momentum"] = dict(momentum)
    return step


@pytest.fixture
def replays(recorded, monkeypatch):
    """The iterations in which a capture was replayed: a list, and one to put the measured step in."""
    _, step_of = recorded
    capture, iterations, measured = device.capture, [], []

    def counted(function):
        graph, outcome = capture(function)
        replay = graph.replay

        def counting():
            iterations.append(measured[0].monitor.iteration)
            replay()

        graph.replay = counting
        return graph, outcome

    monkeypatch.setattr(device, "capture", counted)

    def start(step, every):
        step_of.append(step)
        measured.append(Measured(step, every))
        return measured[0]

    return iterations, start


def test_a_step_without_a_monitor_takes_no_sample():
    assert make().monitor is None
    assert not make().samples


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("momentum", [MOMENTUM, dict.fromkeys(MOMENTUM, 0.9)])
def test_sampled_steps_are_the_same_bit_for_bit(momentum, batched):
    plain, sampled = (with_momentum(make(), momentum) for _ in range(2))
    plain.optimizer.batched = sampled.optimizer.batched = batched
    sampled = Measured(sampled, 4)
    for a, b in zip(run(plain), run(sampled)):
        assert torch.equal(a, b)
    assert (sampled.monitor.iteration, sampled.monitor.moments.samples) == (18, 4)
    # apart, although equal momenta share a backward pass
    norms = {found["norm"] for found in sampled.monitor.finish()["gsnr"].values()}
    assert len(norms) == 3


@pytest.mark.usefixtures("one_thread")
def test_compiled_steps_are_sampled_like_eager_ones(monkeypatch):
    monkeypatch.setattr(device, "compile_options", lambda at: {"backend": "aot_eager"})
    eager, compiled = Measured(make(), 3), Measured(make(speed.CompiledStep), 3)
    assert_same(run(eager, 1), run(compiled, 1), 1e-10)
    assert compiled.step.name == "compile"
    for name in ("mean", "squares", "norms", "degrees"):
        mine, theirs = (getattr(m.monitor.moments, name) for m in (compiled, eager))
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("one_thread")
def test_a_sampled_step_is_eager_and_replays_go_on_after_it(replays, recorded):
    iterations, start = replays
    graphed = start(make(speed.GraphedStep), 5)
    sizes = (6,) * 8 + (4,)
    eager = Measured(make(), 5)
    assert_same(run(eager, sizes=sizes), run(graphed, sizes=sizes))
    # three eager steps an epoch that are neither sampled (5, 10, …) nor of another size (9, 18, 27)
    assert iterations == [4, 6, 7, 8, 14, 16, 17, 23, 24, 26]
    assert len(recorded[0]) == 3  # a sample ends no capture
    assert graphed.monitor.moments.samples == 5
    for name in ("mean", "squares"):
        mine, theirs = (getattr(m.monitor.moments, name) for m in (graphed, eager))
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("one_thread")
def test_momenta_that_change_end_a_capture(replays, recorded):
    """As an allocation sets them after a window: first all equal and merged, then apart, then others."""
    iterations, start = replays
    equal = dict.fromkeys(MOMENTUM, 0.9)
    graphed = start(with_momentum(make(speed.GraphedStep), equal), 1000)
    eager = Measured(with_momentum(make(), equal), 1000)

    def go(step):
        seen = []
        for part, momentum in enumerate((equal, MOMENTUM, MOMENTUM, MOMENTUM | {"ncg": 0.9})):
            with_momentum(step, momentum)
            generator = torch.Generator().manual_seed(part)
            for size in (6, 6, 6, 6, 4, 6):
                image = torch.randn(size, 3, 8, 8, generator=generator, dtype=torch.float64)
                logits, losses = step({"image": image, "target": torch.arange(size) % 5}, 1)
                seen += [logits.detach().clone(), *(loss.detach().clone() for loss in losses.values())]
        return seen + [value.clone() for value in step.distiller.state_dict().values()]

    assert_same(go(eager), go(graphed))
    # 6 steps each: three eager ones after a change, the fifth is of another size, none where nothing changed
    assert iterations == [4, 6, 10, 12, 13, 14, 15, 16, 18, 22, 24]
    assert len(recorded[0]) == 3
