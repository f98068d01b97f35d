"""Every way to run a step takes the same step: against the eager, sequential one."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deepkd_plugin import device, speed
from deepkd_plugin.metrics import read_metrics
from deepkd_plugin.optim import DecoupledMomentumSGD

MOMENTUM = {"tog": 0.975, "tcg": 0.825, "ncg": 0.95}


class Net(nn.Sequential):
    """With a forward of its own: torch 2.4 does not compile torch's."""

    def forward(self, x):
        for layer in self:
            x = layer(x)
        return x


class Toy(nn.Module):
    """A distiller with BatchNorm whose losses change with the epoch, as warm-up and mask do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)]
        self.student = Net(*layers).double()

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

    monkeypatch.setattr(
        device, "compile_options", lambda at: {"backend": broken if backend == "broken" else backend}
    )
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
