import copy
import itertools
import math

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from deepkd_plugin import DecoupledMomentumSGD, from_sgd, to_sgd

F64 = torch.float64
SHAPES = ((2, 3), (4,), (2, 2, 2))


def golden_params():
    """tests/data/optimizers.npz starts at sin(0, 1, 2, …)."""
    return [torch.sin(torch.arange(n, dtype=F64)).reshape(s).requires_grad_() for s, n in zip(SHAPES, (6, 4, 8))]


def golden_gradient(p, stream, step):
    return torch.cos(0.3 * torch.arange(p.numel(), dtype=F64) + step + 2 * stream).reshape(p.shape)


def linear_loss(params, gradients):
    """A loss whose gradients are exactly `gradients`."""
    return sum((p * g).sum() for p, g in zip(params, gradients))


def random_params(seed=0, dtype=F64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=F64).to(dtype).requires_grad_() for s in SHAPES]


def random_gradients(step, stream):
    generator = torch.Generator().manual_seed(100 * step + stream + 7)
    return [torch.randn(s, generator=generator, dtype=F64) for s in SHAPES]


def one_step(opt, params, step, streams=None):
    opt.zero_grad()
    streams = opt.streams if streams is None else streams
    losses = {
        s: linear_loss(params, [g.to(p.dtype) for p, g in zip(params, random_gradients(step, i))])
        for i, s in enumerate(opt.streams)
        if s in streams
    }
    if losses:
        opt.backward(losses)
    opt.step()


def formula(params, momentum, dampening, weight_decay, decay_stream, lr, steps, matched_to=0.8):
    """The update written out per stream: the oracle that knows of no merging."""
    params = [p.detach().clone() for p in params]
    buffers = {}
    for step in range(steps):
        start = [p.clone() for p in params]
        for i, (stream, m) in enumerate(momentum(step).items()):
            for j, g in enumerate(random_gradients(step, i)):
                g = g + weight_decay * start[j] if stream == decay_stream else g
                if dampening in ("ema", "matched"):
                    gain = (1 - m) / (1 - matched_to if dampening == "matched" else 1)
                    buffers[stream, j] = m * buffers.get((stream, j), torch.zeros_like(g)) + gain * g
                else:
                    buffers[stream, j] = m * buffers[stream, j] + (1 - dampening) * g if (stream, j) in buffers else g
                params[j] -= lr * buffers[stream, j]
    return params


def assert_equal_params(ours, theirs, tolerance=1e-12):
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=tolerance, atol=tolerance)


def golden_run(golden, name, momentum, weight_decay, stream, foreach, late_lr=0.005):
    """The largest distance from a golden trajectory, over its 8 steps."""
    params = golden_params()
    opt = DecoupledMomentumSGD(params, 0.05, momentum, weight_decay, stream, foreach=foreach)
    distance = 0.0
    for step in range(8):
        opt.param_groups[0]["lr"] = 0.05 if step < 5 else late_lr
        opt.zero_grad()
        opt.backward(
            {s: linear_loss(params, [golden_gradient(p, i, step) for p in params]) for i, s in enumerate(opt.streams)}
        )
        opt.step()
        for i, p in enumerate(params):
            distance = max(distance, (p.detach() - golden[f"{name}_step{step}_p{i}"]).abs().max().item())
    return distance


@pytest.mark.parametrize("foreach", [True, False])
class TestGolden:
    @staticmethod
    def release(tcg, ncg):
        """The release's task stream decays with the target-class coefficient (config.momenta, `release`)."""
        return {"tog": tcg, "tcg": tcg, "ncg": ncg}

    def test_release_without_decay(self, golden_optimizers, foreach):
        momentum = self.release(0.825, 0.95)
        assert golden_run(golden_optimizers, "release_no_decay", momentum, 0.0, "tcg", foreach) < 1e-12

    @pytest.mark.parametrize(("name", "ncg"), [("release_kd_recipe", 0.975), ("release_dkd_recipe", 0.95)])
    def test_release_with_decay_departs(self, golden_optimizers, foreach, name, ncg):
        """The release decays weights that TOG and NCG have already moved; we decay θ as the step found it.

        The departure is lr · decay · (how far the step moved θ): at most 1.5e-5 in 8 steps here.
        """
        distance = golden_run(golden_optimizers, name, self.release(0.825, ncg), 5e-4, "tcg", foreach)
        assert 1e-5 < distance < 1.5e-5

    def test_dot(self, golden_optimizers, foreach):
        """mdistiller's DOT decays before anything moves, as we do. Its trajectory has one learning rate."""
        momentum = {"task": 0.825, "distillation": 0.975}
        assert golden_run(golden_optimizers, "dot", momentum, 5e-4, "task", foreach, late_lr=0.05) < 1e-12


@pytest.mark.parametrize("dampening", [0.0, 0.3, "ema", "matched"])
@pytest.mark.parametrize("m", [0.0, 0.825, 0.975])
def test_a_matched_decay_shrinks_weights_as_sgds(m, dampening):
    """Weights without a gradient shrink by the decay alone; once the buffers are full, at SGD's rate."""

    def rate(make):
        p = torch.nn.Parameter(torch.ones(1, dtype=F64))
        opt = make([p])
        sizes = []
        for _ in range(1600):
            opt.zero_grad()
            loss = (0.0 * p).sum()
            loss.backward() if isinstance(opt, torch.optim.SGD) else opt.backward({"tcg": loss})
            opt.step()
            sizes.append(math.log(p.item()))
        return sizes[600] - sizes[-1]

    options = {"dampening": dampening, "matched_to": 0.8, "decay_matched_to": 0.9}
    momentum = {"tog": 0.95, "tcg": m}
    ours = rate(lambda params: DecoupledMomentumSGD(params, 1e-4, momentum, 0.01, "tcg", **options))
    assert ours == pytest.approx(rate(lambda params: torch.optim.SGD(params, 1e-4, 0.9, weight_decay=0.01)), rel=1e-3)


def test_a_matched_decay_of_sgds_own_momentum_is_sgds():
    ends = []
    for options in ({}, {"decay_matched_to": 0.9}):
        params = golden_params()
        opt = DecoupledMomentumSGD(params, 0.1, {"a": 0.9, "b": 0.9}, 0.01, "b", **options)
        for step in range(5):
            one_step(opt, params, step)
        ends.append(params)
    assert_equal_params(*ends)


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(
    ("momentum", "dampening", "nesterov"),
    [(0.9, 0.0, False), (0.9, 0.3, False), (0.9, 0.0, True), (0.0, 0.0, False), (0.0, 0.5, False)],
)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_one_stream_is_sgd(foreach, weight_decay, maximize, momentum, dampening, nesterov, dtype):
    """Bit for bit, in the multi-tensor and in the single-tensor version of both."""
    ours, theirs = random_params(dtype=dtype), random_params(dtype=dtype)
    options = {"dampening": dampening, "nesterov": nesterov, "maximize": maximize, "foreach": foreach}
    opt = DecoupledMomentumSGD(ours, 0.1, momentum, weight_decay, **options)
    sgd = torch.optim.SGD(theirs, 0.1, momentum, weight_decay=weight_decay, **options)
    for step in range(6):
        one_step(opt, ours, step)
        for p, g in zip(theirs, random_gradients(step, 0)):
            p.grad = g.to(dtype)
        sgd.step()
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("dampening", [0.0, 0.25, "ema", "matched"])
@pytest.mark.parametrize("capturable", [True, False])
@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("coefficients", [(0.9, 0.5, 0.9), (0.9, 0.9, 0.9), (0.3, 0.5, 0.9), (0.0, 0.5, 0.0)])
def test_follows_the_formula(foreach, dampening, capturable, merge, coefficients):
    momentum = dict(zip(("tog", "tcg", "ncg"), coefficients))
    if dampening == 0.25 and 0.0 in coefficients:
        pytest.skip("without momentum a number's dampening is ignored, as in torch.optim.SGD")
    params = random_params()
    start = [p.detach().clone() for p in params]
    options = {"matched_to": 0.8, "merge": merge, "foreach": foreach, "capturable": capturable}
    opt = DecoupledMomentumSGD(params, 0.1, momentum, 0.02, "ncg", dampening, **options)
    for step in range(5):
        one_step(opt, params, step)
    assert_equal_params(params, formula(start, lambda _: momentum, dampening, 0.02, "ncg", 0.1, 5))
    buffers = {len(opt.state[p].values()) for p in params}
    assert buffers == {len(set(coefficients)) if merge else 3}


def test_equal_streams_cost_one_backward_pass(monkeypatch):
    calls = []
    original = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(1) or original(*a, **k))
    for coefficients, passes in (((0.9, 0.9, 0.9), 1), ((0.9, 0.5, 0.9), 2), ((0.1, 0.5, 0.9), 3)):
        params = random_params()
        calls.clear()
        one_step(DecoupledMomentumSGD(params, 0.1, dict(zip("abc", coefficients))), params, 0)
        assert len(calls) == passes


class TestChangingCoefficients:
    def run(self, schedule, merge, steps=9, foreach=True, weight_decay=0.02):
        params = random_params()
        start = [p.detach().clone() for p in params]
        opt = DecoupledMomentumSGD(params, 0.1, schedule(0), weight_decay, "tcg", merge=merge, foreach=foreach)
        for step in range(steps):
            opt.param_groups[0]["momentum"].update(schedule(step))
            one_step(opt, params, step)
        return params, formula(start, schedule, 0.0, weight_decay, "tcg", 0.1, steps), opt

    @staticmethod
    def joining(step):
        return {"tog": 0.9, "tcg": 0.5 if step < 4 else 0.9, "ncg": 0.9}

    @staticmethod
    def parting(step):
        return {"tog": 0.9, "tcg": 0.9 if step < 4 else 0.5, "ncg": 0.9}

    @pytest.mark.parametrize("foreach", [True, False])
    def test_streams_that_become_equal_are_exact(self, foreach):
        params, expected, opt = self.run(self.joining, merge=True, foreach=foreach)
        assert_equal_params(params, expected)
        assert all(list(opt.state[p]) == ["momentum_buffer_tog+tcg+ncg"] for p in params)

    @pytest.mark.parametrize("foreach", [True, False])
    def test_without_merging_any_schedule_is_exact(self, foreach):
        for schedule in (self.joining, self.parting):
            params, expected, _ = self.run(schedule, merge=False, foreach=foreach)
            assert_equal_params(params, expected)

    def test_streams_that_part_share_their_past_equally(self):
        """From the split on, the formula with the common buffer's third as each stream's v."""
        params, _, opt = self.run(self.parting, merge=True, steps=4)
        past = [next(iter(opt.state[p].values())).clone() for p in params]
        start = [p.detach().clone() for p in params]
        opt.param_groups[0]["momentum"]["tcg"] = 0.5
        one_step(opt, params, 4)
        gradients = [random_gradients(4, i) for i in range(3)]
        for j, p in enumerate(params):
            tcg = 0.5 * past[j] / 3 + gradients[1][j] + 0.02 * start[j]
            rest = 0.9 * 2 * past[j] / 3 + gradients[0][j] + gradients[2][j]
            torch.testing.assert_close(p.detach(), start[j] - 0.1 * (tcg + rest), rtol=1e-12, atol=1e-12)

    def test_the_difference_of_a_split_fades(self):
        """After n steps apart at most 0.9^n of it is left; at the split it is there."""

        def difference(steps):
            runs = [self.run(self.parting, merge, steps, weight_decay=0.0)[2] for merge in (True, False)]
            (merged, apart) = ([list(opt.state[p].values()) for p in opt.param_groups[0]["params"]] for opt in runs)
            return max((a[0] + a[2] - m[0]).abs().max().item() for a, m in zip(apart, merged))

        assert difference(5) > 0.1
        assert difference(65) < 0.9**60 * difference(5) * (1 + 1e-6)

    def test_changing_them_between_backward_and_step_is_refused(self):
        params = random_params()
        opt = DecoupledMomentumSGD(params, 0.1, {"tog": 0.9, "tcg": 0.9, "ncg": 0.5})
        opt.backward({s: linear_loss(params, random_gradients(0, 0)) for s in opt.streams})
        opt.param_groups[0]["momentum"]["tcg"] = 0.5
        with pytest.raises(RuntimeError, match="change them after step"):
            opt.step()
        with pytest.raises(RuntimeError, match="between two backward calls"):
            opt.backward({"tog": linear_loss(params, random_gradients(0, 0))})

    def test_merging_between_backward_and_step_is_fine(self):
        """What backward kept apart can still be added."""
        params = random_params()
        start = [p.detach().clone() for p in params]
        opt = DecoupledMomentumSGD(params, 0.1, {"tog": 0.9, "tcg": 0.5, "ncg": 0.7})
        opt.backward({s: linear_loss(params, random_gradients(0, i)) for i, s in enumerate(opt.streams)})
        opt.param_groups[0]["momentum"]["tcg"] = 0.9
        opt.step()
        total = [sum(random_gradients(0, i)[j] for i in range(3)) for j in range(3)]
        assert_equal_params(params, [p - 0.1 * g for p, g in zip(start, total)])


@pytest.mark.parametrize("coefficients", [(0.9, 0.5, 0.9), (0.9, 0.9, 0.9)])
def test_gradients_add_up_over_several_backward_calls(coefficients):
    momentum = dict(zip(("tog", "tcg", "ncg"), coefficients))
    once, twice = random_params(), random_params()
    a, b = (DecoupledMomentumSGD(p, 0.1, momentum) for p in (once, twice))
    for step in range(3):
        a.zero_grad()
        b.zero_grad()
        gradients = [[0.0 * g for g in random_gradients(0, 0)] for _ in range(3)]
        for micro in range(2):
            for i in range(3):
                new = random_gradients(10 * step + micro, i)
                gradients[i] = [g + n for g, n in zip(gradients[i], new)]
            b.backward({s: linear_loss(twice, random_gradients(10 * step + micro, i)) for i, s in enumerate(b.streams)})
        a.backward({s: linear_loss(once, gradients[i]) for i, s in enumerate(a.streams)})
        for p, q, *g in zip(once, twice, *gradients):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(p.grad, sum(g), rtol=1e-12, atol=1e-12)
        a.step()
        b.step()
        assert_equal_params(once, twice)


@pytest.mark.parametrize("foreach", [True, False])
def test_grad_is_kept_by_a_step(foreach):
    """p.grad is the user's: a step leaves the sum of the streams as it was."""
    for coefficients in ((0.9, 0.5), (0.9, 0.9)):
        params = random_params()
        opt = DecoupledMomentumSGD(params, 0.1, dict(zip("ab", coefficients)), 0.1, "a", foreach=foreach)
        for step in range(2):
            one_step(opt, params, step)
            for j, p in enumerate(params):
                expected = random_gradients(step, 0)[j] + random_gradients(step, 1)[j]
                torch.testing.assert_close(p.grad, expected, rtol=1e-12, atol=1e-12)


def test_clipping_works_where_streams_are_merged():
    params = random_params()
    start = [p.detach().clone() for p in params]
    opt = DecoupledMomentumSGD(params, 0.1, {"a": 0.9, "b": 0.9})
    opt.backward({s: linear_loss(params, random_gradients(0, i)) for i, s in enumerate("ab")})
    torch.nn.utils.clip_grad_norm_(params, 1e-3)
    opt.step()
    moved = torch.cat([(p.detach() - s).flatten() for p, s in zip(params, start)]).norm()
    assert abs(moved.item() - 1e-4) < 1e-9


@pytest.mark.parametrize("coefficients", [(0.9, 0.5, 0.2), (0.9, 0.5, 0.9)])
def test_foreach_equals_single(coefficients):
    """Streams come and go, one parameter never takes part, dtypes are mixed."""
    runs = []
    for foreach in (True, False):
        params = random_params()
        params[1] = params[1].detach().float().requires_grad_()
        idle = torch.ones(3, dtype=F64, requires_grad=True)
        momentum = dict(zip(("tog", "tcg", "ncg"), coefficients))
        opt = DecoupledMomentumSGD([*params, idle], 0.1, momentum, 0.02, "tcg", foreach=foreach)
        for step, streams in enumerate((("tog",), ("tog", "tcg", "ncg"), ("ncg",), ("tcg", "ncg"), ())):
            one_step(opt, params, step, streams)
        assert torch.equal(idle, torch.ones(3, dtype=F64))
        assert not opt.state[idle]
        runs.append(params)
    for a, b in zip(*runs):
        tolerance = 1e-12 if a.dtype == F64 else 1e-6
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_a_stream_without_gradient_counts_as_zero():
    params, expected = random_params(), random_params()
    a = DecoupledMomentumSGD(params, 0.1, {"x": 0.9, "y": 0.5}, 0.01, "y")
    b = DecoupledMomentumSGD(expected, 0.1, {"x": 0.9, "y": 0.5}, 0.01, "y")
    for step in range(4):
        streams = ("x", "y") if step % 2 else ("x",)
        one_step(a, params, step, streams)
        b.zero_grad()
        zero = 0.0 * linear_loss(expected, random_gradients(0, 0))
        b.backward(
            {
                s: linear_loss(expected, random_gradients(step, i)) if s in streams else zero
                for i, s in enumerate(b.streams)
            }
        )
        b.step()
    assert_equal_params(params, expected)


def test_parameter_groups_have_their_own_settings():
    slow, fast = random_params(1), random_params(2)
    oracle_slow = formula(slow, lambda _: {"a": 0.9, "b": 0.9}, 0.0, 0.0, None, 0.01, 4)
    oracle_fast = formula(fast, lambda _: {"a": 0.5, "b": 0.9}, 0.0, 0.1, "a", 0.1, 4)
    opt = DecoupledMomentumSGD(
        [
            {"params": slow, "lr": 0.01, "momentum": {"a": 0.9, "b": 0.9}, "weight_decay": 0.0},
            {"params": fast, "momentum": {"a": 0.5, "b": 0.9}},
        ],
        0.1,
        {"a": 0.5, "b": 0.5},
        0.1,
        "a",
    )
    for step in range(4):
        opt.zero_grad()
        opt.backward(
            {
                s: linear_loss(slow, random_gradients(step, i)) + linear_loss(fast, random_gradients(step, i))
                for i, s in enumerate("ab")
            }
        )
        opt.step()
    assert_equal_params(slow, oracle_slow)
    assert_equal_params(fast, oracle_fast)
    # one partition for all groups: streams that differ in one group are apart in every one
    assert [len(opt.state[p].values()) for p in (slow[0], fast[0])] == [2, 2]


def test_default_momenta_of_groups_are_not_shared():
    a, b = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    opt = DecoupledMomentumSGD([{"params": [a]}, {"params": [b]}], 0.1, {"x": 0.9})
    opt.param_groups[0]["momentum"]["x"] = 0.5
    assert opt.param_groups[1]["momentum"]["x"] == 0.9


@pytest.mark.parametrize("coefficients", [(0.9, 0.5), (0.9, 0.9)])
def test_state_dict_continues_bitwise_and_survives_a_change_of_dtype(coefficients, tmp_path):
    momentum = dict(zip("ab", coefficients))
    params = random_params()
    opt = DecoupledMomentumSGD(params, 0.1, momentum, 0.01, "b")
    for step in range(3):
        one_step(opt, params, step)
    torch.save(opt.state_dict(), tmp_path / "opt")
    held = torch.load(tmp_path / "opt", weights_only=True)
    twin = [p.detach().clone().requires_grad_() for p in params]
    again = DecoupledMomentumSGD(twin, 0.5, {"a": 0.1, "b": 0.2})
    again.load_state_dict(held)
    narrow = [p.detach().float().requires_grad_() for p in params]
    other = DecoupledMomentumSGD(narrow, 0.5, {"a": 0.1, "b": 0.2})
    other.load_state_dict(held)
    assert all(v.dtype == torch.float32 for p in narrow for v in other.state[p].values())
    for step in range(3, 6):
        one_step(opt, params, step)
        one_step(again, twin, step)
        one_step(other, narrow, step)
        assert all(torch.equal(p, q) for p, q in zip(params, twin))
    assert_equal_params([p.double() for p in narrow], params, 1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_state_dict_survives_a_change_of_device():
    params = random_params()
    opt = DecoupledMomentumSGD(params, 0.1, {"a": 0.9, "b": 0.5})
    one_step(opt, params, 0)
    there = [p.detach().cuda().requires_grad_() for p in params]
    moved = DecoupledMomentumSGD(there, 0.1, {"a": 0.9, "b": 0.5})
    moved.load_state_dict(opt.state_dict())
    assert all(v.is_cuda for p in there for v in moved.state[p].values())


def test_state_dict_moves_to_the_parameters_device():
    """The same rule without a GPU: buffers take the parameters' device, here the meta device."""
    params = random_params()
    opt = DecoupledMomentumSGD(params, 0.1, {"a": 0.9, "b": 0.5})
    one_step(opt, params, 0)
    there = [p.detach().to("meta").requires_grad_() for p in params]
    moved = DecoupledMomentumSGD(there, 0.1, {"a": 0.9, "b": 0.5})
    moved.load_state_dict(opt.state_dict())
    assert all(v.is_meta for p in there for v in moved.state[p].values())


def test_state_of_other_streams_is_refused():
    held = DecoupledMomentumSGD(random_params(), 0.1, {"x": 0.9}).state_dict()
    opt = DecoupledMomentumSGD(random_params(), 0.1, {"a": 0.9, "b": 0.5})
    with pytest.raises(ValueError, match=r"streams \('x',\), this optimizer \('a', 'b'\)"):
        opt.load_state_dict(held)


def test_deepcopy_and_scheduler():
    params = random_params()
    opt = DecoupledMomentumSGD(params, 0.1, {"a": 0.9, "b": 0.5})
    scheduler = torch.optim.lr_scheduler.MultiStepLR(opt, [2], 0.1)
    for step in range(3):
        one_step(opt, params, step)
        scheduler.step()
    assert opt.param_groups[0]["lr"] == pytest.approx(0.01)
    twins, twin = copy.deepcopy((params, opt))
    one_step(opt, params, 3)
    one_step(twin, twins, 3)
    assert all(torch.equal(p, q) for p, q in zip(params, twins))


def test_closure():
    params = random_params()
    opt = DecoupledMomentumSGD(params, 0.1, {"a": 0.9, "b": 0.5})

    def closure():
        opt.zero_grad()
        loss = linear_loss(params, random_gradients(0, 0))
        opt.backward({"a": loss})
        return loss

    before = linear_loss(params, random_gradients(0, 0)).item()
    start = [p.detach().clone() for p in params]
    assert opt.step(closure).item() == before
    assert_equal_params(params, [p - 0.1 * g for p, g in zip(start, random_gradients(0, 0))])


def test_plain_backward_serves_one_stream_only():
    params = random_params()
    linear_loss(params, random_gradients(0, 0)).backward()
    DecoupledMomentumSGD(params, 0.1, {"a": 0.9, "b": 0.9}).step()
    with pytest.raises(RuntimeError, match=r"call the optimizer's backward\(\)"):
        DecoupledMomentumSGD(params, 0.1, {"a": 0.9, "b": 0.5}).step()


@pytest.mark.parametrize("momentum", [{"a": 0.9}, {"a": 0.9, "b": 0.5}])
def test_sparse_gradients_are_refused(momentum):
    table = torch.nn.Embedding(4, 2, sparse=True)
    opt = DecoupledMomentumSGD(table.parameters(), 0.1, momentum)
    rows = table(torch.tensor([1]))
    opt.backward(dict(zip(momentum, [rows.sum(), rows.square().sum()])))
    with pytest.raises(RuntimeError, match="does not take sparse gradients"):
        opt.step()


GOOD = {"lr": 0.1, "momentum": {"a": 0.9, "b": 0.5}, "weight_decay": 0.1, "weight_decay_stream": "a"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": -1.0}, "lr must be at least 0 and finite, got -1.0"),
        ({"lr": float("nan")}, "lr must be at least 0 and finite, got nan"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0 and finite, got -0.1"),
        ({"momentum": {"a": 1.0, "b": 0.5}}, r"momentum of stream 'a' must be in \[0, 1\), got 1.0"),
        ({"momentum": {"a": 0.5, "b": -0.1}}, "momentum of stream 'b'"),
        ({"momentum": {}}, "momentum must map stream names"),
        ({"momentum": {"a": "0.9", "b": 0.5}}, "momentum of stream 'a' must be in"),
        ({"momentum": {"a+b": 0.9}}, r"a stream's name must be a word without '\+', got 'a\+b'"),
        ({"momentum": {1: 0.9}}, "a stream's name must be a word"),
        ({"momentum": [0.9]}, r"momentum must map stream names to numbers, or be a number, got \[0.9\]"),
        ({"lr": float("inf")}, "lr must be at least 0 and finite, got inf"),
        ({"lr": torch.tensor([0.1])}, r"a tensor of shape \(\), got a tensor of shape \(1,\)"),
        ({"lr": torch.tensor([0.1, 0.1])}, r"a tensor of shape \(\), got a tensor of shape \(2,\)"),
        ({"lr": torch.tensor(-0.1)}, "lr must be at least 0"),
        ({"lr": "0.1"}, "lr must be at least 0"),
        ({"dampening": "matched"}, "needs a momentum in .* as matched_to, got None"),
        ({"dampening": "matched", "matched_to": 1.0}, "as matched_to, got 1.0"),
        ({"decay_matched_to": 1.0}, "decay_matched_to must be a momentum in .* got 1.0"),
        ({"decay_matched_to": 0.9, "dampening": 1.0}, "dampening not 1, got 0.9"),
        ({"nesterov": True, "dampening": 0.1}, "nesterov needs a momentum and dampening 0"),
        ({"nesterov": True, "momentum": {"a": 0.0, "b": 0.0}}, "nesterov needs a momentum"),
        ({"dampening": 1.5}, "dampening must be a number"),
        ({"dampening": "nesterov"}, "dampening must be a number"),
        ({"weight_decay_stream": "c"}, r"weight_decay_stream must name one of \('a', 'b'\), got 'c'"),
        ({"weight_decay_stream": None}, "weight_decay_stream must name one of"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        DecoupledMomentumSGD(random_params(), **(GOOD | change))


def test_groups_need_the_same_streams():
    opt = DecoupledMomentumSGD(random_params(), **GOOD)
    with pytest.raises(ValueError, match="every parameter group needs the streams"):
        opt.add_param_group({"params": random_params(1), "momentum": {"a": 0.9}})
    assert len(opt.param_groups) == 1


def test_a_coefficient_that_leaves_its_range_later_is_refused():
    params = random_params()
    opt = DecoupledMomentumSGD(params, **GOOD)
    opt.param_groups[0]["momentum"]["a"] = 1.2
    with pytest.raises(ValueError, match="got 1.2"):
        one_step(opt, params, 0)


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("coefficients", [(0.9, 0.5), (0.9, 0.9)])
def test_parameters_whose_gradients_autograd_shares(foreach, coefficients):
    """Two parameters that only enter as a sum, and one under a plain sum, against the same with copies."""

    def run(own):
        params = [torch.ones(3, dtype=F64, requires_grad=True) for _ in range(3)]
        opt = DecoupledMomentumSGD(params, 0.1, dict(zip("ab", coefficients)), 0.1, "b", foreach=foreach)
        for _ in range(3):
            opt.zero_grad()
            for _ in range(2):
                w1, w2, w3 = (p * torch.ones(3, dtype=F64) if own else p for p in params)
                opt.backward({"a": ((w1 + w2) ** 2).sum(), "b": ((w1 + w2) ** 3).sum() + w3.sum()})
            opt.step()
        return params

    assert_equal_params(run(False), run(True))


class Fused(torch.autograd.Function):
    """A loss that computes its gradient in the forward pass, and returns the same tensor in every backward pass."""

    @staticmethod
    def forward(ctx, p):
        ctx.save_for_backward(2 * p)
        return p.square().sum()

    @staticmethod
    def backward(ctx, _):
        return ctx.saved_tensors[0]


@pytest.mark.parametrize("foreach", [True, False])
def test_a_gradient_that_a_function_returns_in_every_pass(foreach):
    def run(loss_of):
        (p,) = params = [torch.ones(3, dtype=F64, requires_grad=True)]
        opt = DecoupledMomentumSGD(params, 0.1, {"a": 0.9, "b": 0.5}, foreach=foreach)
        for _ in range(3):
            opt.zero_grad()
            loss = loss_of(p)
            opt.backward({"a": loss, "b": loss})
            opt.step()
        return params

    assert_equal_params(run(Fused.apply), run(lambda p: p.square().sum()))


def test_a_modules_zero_grad_forgets_the_streams_too():
    params, expected = random_params(), random_params()
    a, b = (DecoupledMomentumSGD(p, 0.1, {"x": 0.9, "y": 0.5}) for p in (params, expected))
    a.backward({"x": 100 * linear_loss(params, random_gradients(9, 0))})
    for p in params:
        p.grad = None  # what torch.nn.Module.zero_grad does
    a.backward({"x": linear_loss(params, random_gradients(0, 0))})
    a.step()
    b.backward({"x": linear_loss(expected, random_gradients(0, 0))})
    b.step()
    assert_equal_params(params, expected)
    for p in params:
        p.grad = None
    a.step()  # nothing to do
    assert_equal_params(params, expected)


def test_a_step_that_is_refused_changes_nothing():
    first, second = random_params(1), random_params(2)
    groups = [{"params": first}, {"params": second}]
    opt = DecoupledMomentumSGD(groups, 0.1, {"a": 0.9, "b": 0.9})
    losses = {s: linear_loss(first, random_gradients(0, 0)) + linear_loss(second, random_gradients(0, 1)) for s in "ab"}
    opt.backward(losses)
    before = copy.deepcopy([p.detach() for p in (*first, *second)])
    opt.param_groups[1]["momentum"]["b"] = 1.5
    with pytest.raises(ValueError, match="got 1.5"):
        opt.step()
    opt.param_groups[1]["momentum"]["b"] = 0.5
    with pytest.raises(RuntimeError, match="came to differ"):
        opt.step()
    assert_equal_params([*first, *second], before, 0.0)
    assert not opt.state
    opt.param_groups[1]["momentum"]["b"] = 0.9
    opt.step()
    assert not torch.equal(first[0], before[0])


def test_decay_that_is_raised_later_needs_its_stream():
    opt = DecoupledMomentumSGD(random_params(), 0.1, {"a": 0.9, "b": 0.5})
    opt.param_groups[0]["weight_decay"] = 0.1
    with pytest.raises(ValueError, match="weight_decay_stream must name one of"):
        opt.step()


def test_losses_without_a_graph_are_refused():
    opt = DecoupledMomentumSGD(random_params(), 0.1, {"a": 0.9})
    with pytest.raises(RuntimeError, match="needs a gradient"):
        opt.backward({"a": torch.tensor(1.0)})


def test_the_state_of_sgd_is_refused():
    params = random_params()
    state = torch.optim.SGD(params, 0.1, 0.9).state_dict()
    with pytest.raises(ValueError, match=r"streams None, this optimizer \('a',\); from_sgd as a pre-hook takes"):
        DecoupledMomentumSGD(params, 0.1, {"a": 0.9}).load_state_dict(state)


class TestConversion:
    """torch.optim.SGD's state to ours and back, by pre-hooks of load_state_dict."""

    @staticmethod
    def sgd_step(opt, params, step):
        opt.zero_grad()
        sum(linear_loss(params, random_gradients(step, i)) for i in range(3)).backward()
        opt.step()

    @pytest.mark.parametrize("nesterov", [False, True])
    def test_a_run_goes_on_under_the_other(self, nesterov):
        """SGD, ours with equal momenta, SGD: the steps of SGD alone."""
        params, alone = random_params(), random_params()
        first, expected = (torch.optim.SGD(p, 0.1, 0.9, 0.0, 0.01, nesterov) for p in (params, alone))
        ours = DecoupledMomentumSGD(params, 0.5, dict.fromkeys("xyz", 0.9), 0.5, "y")
        ours.register_load_state_dict_pre_hook(from_sgd)
        last = torch.optim.SGD(params, 0.5, 0.9)
        last.register_load_state_dict_pre_hook(to_sgd)
        for step in range(9):
            self.sgd_step(expected, alone, step)
            if step < 3:
                self.sgd_step(first, params, step)
            elif step < 6:
                if step == 3:
                    ours.load_state_dict(first.state_dict())
                one_step(ours, params, step)
            else:
                if step == 6:
                    last.load_state_dict(ours.state_dict())
                self.sgd_step(last, params, step)
        assert_equal_params(params, alone)

    def test_streams_apart_share_the_buffer(self):
        params = random_params()
        sgd = torch.optim.SGD(params, 0.1, 0.9)
        self.sgd_step(sgd, params, 0)
        past = [sgd.state[p]["momentum_buffer"].clone() for p in params]
        opt = DecoupledMomentumSGD(params, 0.1, {"x": 0.9, "y": 0.5})
        opt.register_load_state_dict_pre_hook(from_sgd)
        opt.load_state_dict(sgd.state_dict())
        assert opt.param_groups[0]["momentum"] == {"x": 0.9, "y": 0.5}
        one_step(opt, params, 1)
        for j, p in enumerate(params):
            for (_, buffer), i, m in zip(opt.state[p].items(), range(2), (0.9, 0.5)):
                torch.testing.assert_close(buffer, m * past[j] / 2 + random_gradients(1, i)[j])

    def test_a_state_of_its_own_kind_is_left_alone(self):
        params = random_params()
        opt = DecoupledMomentumSGD(params, 0.1, {"x": 0.9, "y": 0.5})
        one_step(opt, params, 0)
        state = opt.state_dict()
        assert from_sgd(opt, state) is state
        sgd = torch.optim.SGD(params, 0.1, 0.9)
        state = sgd.state_dict()
        assert to_sgd(sgd, state) is state

    @pytest.mark.parametrize("kind", ["Adam", "RMSprop"])
    def test_the_state_of_another_kind_of_optimizer_is_left_alone(self, kind):
        """Adam's averages are no momentum buffers to add up, and RMSprop has a momentum that means another thing."""
        params = random_params()
        other = getattr(torch.optim, kind)(params)
        linear_loss(params, random_gradients(0, 0)).backward()
        other.step()
        state = other.state_dict()
        assert to_sgd(torch.optim.SGD(params, 0.1, 0.9), state) is state
        opt = DecoupledMomentumSGD(params, 0.1, {"x": 0.9, "y": 0.5})
        opt.register_load_state_dict_pre_hook(from_sgd)
        with pytest.raises(ValueError, match="the state has the streams None"):
            opt.load_state_dict(state)

    def test_a_state_of_0_1_becomes_sgds(self):
        params = random_params()
        opt = DecoupledMomentumSGD(params, 0.1, {"x": 0.9, "y": 0.5})
        one_step(opt, params, 0)
        expected = to_sgd(torch.optim.SGD(params, 0.1, 0.9), opt.state_dict())["state"]
        old = opt.state_dict()
        old["state"] = {i: {"buffers": list(buffers.values())} for i, buffers in old["state"].items()}
        converted = to_sgd(torch.optim.SGD(params, 0.1, 0.9), old)["state"]
        for i, buffers in expected.items():
            torch.testing.assert_close(converted[i], buffers, rtol=0, atol=0)

    def test_another_number_of_groups_is_refused(self):
        a, b = random_params(1), random_params(2)
        sgd = torch.optim.SGD([{"params": a}, {"params": b}], 0.1, 0.9)
        opt = DecoupledMomentumSGD([*a, *b], 0.1, 0.9)
        opt.register_load_state_dict_pre_hook(from_sgd)
        with pytest.raises(ValueError, match="the state has 2 parameter groups, this optimizer 1"):
            opt.load_state_dict(sgd.state_dict())


class TestState:
    def test_buffers_are_tensors_by_name(self):
        params = random_params()
        opt = DecoupledMomentumSGD(params, 0.1, {"tog": 0.9, "tcg": 0.5, "ncg": 0.9})
        one_step(opt, params, 0)
        for p in params:
            assert list(opt.state[p]) == ["momentum_buffer_tog+ncg", "momentum_buffer_tcg"]
            assert all(isinstance(buffer, torch.Tensor) for buffer in opt.state[p].values())
        state = opt.state_dict()
        assert type(state["param_groups"][0]["momentum"]) is dict

    def test_numpys_numbers_are_saved_as_pythons(self, tmp_path):
        """torch.load(weights_only=True) refuses numpy's."""
        params = random_params()
        momentum = {"a": np.float32(0.5), "b": np.float64(0.25)}
        opt = DecoupledMomentumSGD(params, np.float64(0.1), momentum, np.float32(0.5), "a", nesterov=np.bool_(True))
        one_step(opt, params, 0)
        torch.save(opt.state_dict(), tmp_path / "state.pt")
        (group,) = torch.load(tmp_path / "state.pt", weights_only=True)["param_groups"]
        assert group["momentum"] == momentum
        assert (group["lr"], group["weight_decay"], group["nesterov"]) == (0.1, 0.5, True)

    def test_a_state_of_0_1_loads(self):
        """Lists of buffers, whose streams stood in the group; no nesterov, maximize and capturable."""
        params, twins = random_params(), random_params()
        momentum = {"tog": 0.9, "tcg": 0.5, "ncg": 0.9}
        a, b = (DecoupledMomentumSGD(p, 0.1, momentum, 0.01, "tcg") for p in (params, twins))
        for step in range(2):
            one_step(a, params, step)
            one_step(b, twins, step)
        new = a.state_dict()
        known = ("lr", "momentum", "weight_decay", "weight_decay_stream", "dampening", "merge", "foreach", "params")
        old = {
            "state": {i: {"buffers": list(state.values())} for i, state in new["state"].items()},
            "param_groups": [
                {k: group[k] for k in known} | {"buffers": [["tog", "ncg"], ["tcg"]]} for group in new["param_groups"]
            ],
        }
        fresh = DecoupledMomentumSGD(params, 0.3, dict.fromkeys(momentum, 0.1))
        fresh.load_state_dict(old)
        for step in range(2, 5):
            one_step(fresh, params, step)
            one_step(b, twins, step)
        assert all(torch.equal(p, q) for p, q in zip(params, twins))

    @pytest.mark.parametrize(
        "damage",
        [
            lambda state: state.pop("momentum_buffer_a"),
            lambda state: state.update(momentum_buffer_a={}),
            lambda state: state.update(momentum_buffer_a=torch.zeros(7)),
            lambda state: state.update(momentum_buffer_c=state["momentum_buffer_a"]),
        ],
    )
    def test_a_state_that_does_not_fit_is_refused_whole(self, damage):
        params = random_params()
        opt = DecoupledMomentumSGD(params, 0.1, {"a": 0.9, "b": 0.5})
        one_step(opt, params, 0)
        state = copy.deepcopy(opt.state_dict())
        damage(state["state"][1])
        before = copy.deepcopy(opt.state_dict())
        with pytest.raises(ValueError, match="must have a tensor of that shape for each of the streams"):
            opt.load_state_dict(state)
        assert str(opt.state_dict()) == str(before)

    def test_loading_leaves_capturable_as_it_is(self):
        params = random_params()
        plain, captured = (DecoupledMomentumSGD(params, 0.1, 0.9, capturable=c) for c in (False, True))
        captured.load_state_dict(plain.state_dict())
        assert captured.param_groups[0]["capturable"]
        plain.load_state_dict(captured.state_dict())
        assert not plain.param_groups[0]["capturable"]

    @pytest.mark.parametrize("flatten", [False, True])
    @pytest.mark.parametrize("momentum", [{"a": 0.9, "b": 0.5}, {"a": 0.9, "b": 0.9}, {"a": 0.9}])
    def test_distributed_checkpoints_get_and_set_it(self, flatten, momentum, tmp_path):
        options = StateDictOptions(flatten_optimizer_state_dict=flatten)

        def make():
            torch.manual_seed(0)
            net = torch.nn.Linear(3, 2).double()
            return net, DecoupledMomentumSGD(net.parameters(), 0.1, momentum, 0.01, "a", 0.25)

        def steps(net, opt, which):
            for step in which:
                out = net(torch.full((1, 3), step + 1.0, dtype=F64))
                opt.zero_grad()
                opt.backward({"a": out.square().sum(), "b": out.sin().sum()} if len(momentum) > 1 else {"a": out.sum()})
                opt.step()

        net, opt = make()
        steps(net, opt, range(3))
        dcp.save({"optimizer": get_optimizer_state_dict(net, opt, options=options)}, checkpoint_id=tmp_path)
        twin, other = make()
        twin.load_state_dict(net.state_dict())
        start = copy.deepcopy(twin.state_dict())
        state = get_optimizer_state_dict(twin, other, options=options)
        # a step with gradients and rates of 0 made buffers of 0, decay or not, and moved nothing
        assert all(not buffer.any() for own in other.state.values() for buffer in own.values())
        assert all(torch.equal(p, start[name]) for name, p in twin.state_dict().items())
        dcp.load({"optimizer": state}, checkpoint_id=tmp_path)
        set_optimizer_state_dict(twin, other, state, options=options)
        steps(net, opt, range(3, 6))
        steps(twin, other, range(3, 6))
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), twin.parameters()))


class TestScaler:
    """PyTorch's recipes with torch.amp.GradScaler: one scale, one decision to skip."""

    MOMENTA = ({"a": 0.9, "b": 0.5}, {"a": 0.9, "b": 0.9}, {"a": 0.9})

    @staticmethod
    def run(momentum, scaler=None, unscale=False, clip=False, steps=8, overflow=()):
        params = random_params(dtype=torch.float32)
        opt = DecoupledMomentumSGD(params, 0.1, momentum, 0.01, "a")
        for step in range(steps):
            opt.zero_grad()
            losses = {}
            for i, name in enumerate(momentum):
                losses[name] = linear_loss(params, [g.float() for g in random_gradients(step, i)])
            if scaler is None and step in overflow:
                continue
            if scaler is not None:
                losses = {name: scaler.scale(loss) for name, loss in losses.items()}
            opt.backward(losses)
            if step in overflow:
                for p in params[:1]:
                    p.grad.view(-1)[0] = float("inf")
            if unscale:
                scaler.unscale_(opt)
            if clip:
                torch.nn.utils.clip_grad_norm_(params, 1.0)
            if scaler is None:
                opt.step()
            else:
                scaler.step(opt)
                scaler.update()
        return params, opt

    @pytest.mark.parametrize("momentum", MOMENTA)
    @pytest.mark.parametrize(("unscale", "clip"), [(False, False), (True, False), (True, True)])
    def test_its_steps_are_those_without_it(self, momentum, unscale, clip):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        expected, _ = self.run(momentum, clip=clip)
        params, opt = self.run(momentum, scaler, unscale, clip)
        assert_equal_params(params, expected, 1e-5)
        assert not hasattr(opt, "found_inf")
        assert not hasattr(opt, "grad_scale")

    @pytest.mark.parametrize("momentum", MOMENTA)
    @pytest.mark.parametrize("unscale", [False, True])
    def test_an_overflow_skips_the_step_and_leaves_every_buffer(self, momentum, unscale):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        expected, plain = self.run(momentum, overflow=(0, 3, 4))
        params, opt = self.run(momentum, scaler, unscale, overflow=(0, 3, 4))
        assert scaler.get_scale() == 2.0**7
        assert_equal_params(params, expected, 1e-5)
        for p, q in zip(params, expected):
            for ours, theirs in zip(opt.state[p].values(), plain.state[q].values()):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)

    def test_a_scale_of_its_own_is_multiplied_in(self):
        """GradScaler takes the product with an `optimizer.grad_scale` that was set before."""
        params = random_params()
        opt = DecoupledMomentumSGD(params, 1.0, {"a": 0.9, "b": 0.5})
        start = [p.detach().clone() for p in params]
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        losses = {s: linear_loss(params, random_gradients(0, i)) for i, s in enumerate("ab")}
        opt.backward({s: scaler.scale(3.0 * loss) for s, loss in losses.items()})
        opt.grad_scale = torch.tensor(3.0)
        scaler.step(opt)
        moved = [p - a - b for p, a, b in zip(start, random_gradients(0, 0), random_gradients(0, 1))]
        assert_equal_params(params, moved, 1e-6)


def test_unscaling_without_the_scalers_step_is_followed_too():
    params, expected = random_params(), random_params()
    opt, plain = (DecoupledMomentumSGD(p, 0.1, {"a": 0.9, "b": 0.5}) for p in (params, expected))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    opt.backward({s: scaler.scale(linear_loss(params, random_gradients(0, i))) for i, s in enumerate("ab")})
    scaler.unscale_(opt)
    opt.step()
    one_step(plain, expected, 0)
    assert_equal_params(params, expected, 1e-6)


class TestSchedulers:
    """OneCycleLR and CyclicLR write one number: the largest momentum, to which the others keep their ratio."""

    @pytest.mark.parametrize("kind", ["one cycle", "cyclic"])
    @pytest.mark.parametrize("momentum", [0.9, {"a": 0.9, "b": 0.9}, {"a": 0.9, "b": 0.6}])
    def test_momentum_is_cycled(self, kind, momentum):
        def cycle(opt):
            if kind == "one cycle":
                return torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, total_steps=8)
            return torch.optim.lr_scheduler.CyclicLR(opt, 0.01, 0.1, step_size_up=3)

        params, plain = random_params(), random_params()
        opt, sgd = DecoupledMomentumSGD(params, 0.1, momentum), torch.optim.SGD(plain, 0.1, 0.9)
        ours, theirs = cycle(opt), cycle(sgd)
        for step in range(7):
            one_step(opt, params, step)
            for i, p in enumerate(plain):
                p.grad = sum(random_gradients(step, s)[i] for s in range(len(opt.streams)))
            sgd.step()
            now = opt.param_groups[0]["momentum"]
            assert max(now.values()) == pytest.approx(sgd.param_groups[0]["momentum"])
            if now.keys() == {"a", "b"}:
                assert now["b"] == pytest.approx(now["a"] * momentum["b"] / 0.9)
            ours.step()
            theirs.step()
        if momentum != {"a": 0.9, "b": 0.6}:
            assert_equal_params(params, plain, 1e-9)

    def test_a_cycled_state_goes_on(self):
        params, twins = random_params(), random_params()
        ends = []
        for reload in (False, True):
            opt = DecoupledMomentumSGD(params if reload else twins, 0.1, {"a": 0.9, "b": 0.6})
            scheduler = torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, total_steps=8)
            for step in range(6):
                one_step(opt, opt.param_groups[0]["params"], step)
                scheduler.step()
                if reload and step == 2:
                    state, at = copy.deepcopy(opt.state_dict()), scheduler.state_dict()
                    opt = DecoupledMomentumSGD(params, 0.1, {"a": 0.5, "b": 0.5})
                    scheduler = torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, total_steps=8)
                    opt.load_state_dict(state)
                    scheduler.load_state_dict(at)
            ends.append(opt.param_groups[0]["params"])
        assert_equal_params(*ends)

    def test_a_number_out_of_range_is_refused(self):
        opt = DecoupledMomentumSGD(random_params(), 0.1, {"a": 0.9, "b": 0.6})
        for value in (1.0, -0.1, True, "0.9"):
            opt.param_groups[0]["momentum"] = value
            with pytest.raises(ValueError, match=r"momentum"):
                opt.step()

    def test_a_logger_of_one_number_reads_the_largest(self):
        """What Lightning's LearningRateMonitor(log_momentum=True) does with the group's entry."""
        opt = DecoupledMomentumSGD(random_params(), 0.1, {"a": 0.6, "b": 0.9})
        assert torch.tensor(opt.param_groups[0]["momentum"], device="cpu").item() == 0.9
        opt.load_state_dict(opt.state_dict())
        assert torch.tensor(opt.param_groups[0]["momentum"]).item() == 0.9


@pytest.mark.parametrize("foreach", [True, False])
def test_buffers_stay_in_place_for_a_captured_step(foreach):
    """Also of a parameter that one stream does not reach, whose gradient is 0 there."""
    params, twins = random_params(), random_params()
    options = {"foreach": foreach, "capturable": True}
    opt = DecoupledMomentumSGD(params, 0.1, {"a": 0.9, "b": 0.5}, 0.01, "a", **options)
    plain = DecoupledMomentumSGD(twins, 0.1, {"a": 0.9, "b": 0.5}, 0.01, "a", foreach=foreach)
    places = None
    for step in range(4):
        for o, ps in ((opt, params), (plain, twins)):
            o.zero_grad()
            a, b = random_gradients(step, 0), random_gradients(step, 1)
            losses = {"a": linear_loss(ps, a), "b": linear_loss(ps[1:], b[1:])}
            o.backward(losses if step % 2 == 0 else {"b": linear_loss(ps, b)})
            o.step()
        now = [[buffer.data_ptr() for buffer in opt.state[p].values()] for p in params]
        assert places is None or now == places
        places = now
    assert_equal_params(params, twins)


def test_a_rate_that_is_a_tensor_is_no_constant_of_a_compiled_step():
    params, plain = random_params(), random_params()
    opt = DecoupledMomentumSGD(params, torch.tensor(0.1, dtype=F64), {"a": 0.9, "b": 0.5})
    other = DecoupledMomentumSGD(plain, 0.1, {"a": 0.9, "b": 0.5})
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    step = torch.compile(opt.step, backend=backend)
    for i in range(6):
        rate = 0.1 / (i + 1)
        opt.param_groups[0]["lr"].fill_(rate)
        other.param_groups[0]["lr"] = rate
        opt.zero_grad()
        opt.backward({s: linear_loss(params, random_gradients(i, j)) for j, s in enumerate("ab")})
        step()
        one_step(other, plain, i)
    assert len(graphs) == 2  # the first step makes the buffers
    assert_equal_params(params, plain)


@pytest.mark.parametrize("foreach", [True, False])
def test_several_streams_take_nesterovs_and_upward_steps(foreach):
    """θ ← θ ± lr · Σ (g + m · v), against the formula."""
    for maximize in (False, True):
        params = random_params()
        expected = [p.detach().clone() for p in params]
        options = {"nesterov": True, "maximize": maximize, "foreach": foreach}
        momentum = {"a": 0.9, "b": 0.5, "c": 0.0}
        opt = DecoupledMomentumSGD(params, 0.1, momentum, 0.01, "b", **options)
        buffers = {}
        for step in range(4):
            one_step(opt, params, step)
            start = [p.clone() for p in expected]
            for i, (stream, m) in enumerate(momentum.items()):
                for j, g in enumerate(random_gradients(step, i)):
                    g = (-g if maximize else g) + (0.01 * start[j] if stream == "b" else 0)
                    buffers[i, j] = m * buffers[i, j] + g if (i, j) in buffers else g
                    expected[j] -= 0.1 * (g + m * buffers[i, j])
        assert_equal_params(params, expected)


@pytest.mark.parametrize("m", [0.975, 0.825, 0.0])
def test_matched_keeps_the_length_of_plain_sgds_steps(m):
    """Under a constant gradient all streams' steps become lr · g / (1 − μ), whatever their momentum."""
    p = torch.zeros(2, dtype=F64, requires_grad=True)
    opt = DecoupledMomentumSGD([p], 1.0, {"a": m}, dampening="matched", matched_to=0.9)
    for _ in range(800):
        before = p.detach().clone()
        opt.zero_grad()
        opt.backward({"a": p.sum()})
        opt.step()
    torch.testing.assert_close(before - p.detach(), torch.full((2,), 10.0, dtype=F64), rtol=1e-6, atol=0)
    first = DecoupledMomentumSGD([q := torch.zeros(1, dtype=F64, requires_grad=True)], 1.0, {"a": m}, dampening="ema")
    first.backward({"a": q.sum()})
    first.step()
    assert q.item() == pytest.approx(-(1 - m))


def test_clip_returns_the_norm():
    params = random_params()
    opt = DecoupledMomentumSGD(params, 0.1, DECOUPLED)
    opt.backward({s: linear_loss(params, random_gradients(0, i)) for i, s in enumerate(opt.streams)})
    norm = torch.cat([p.grad.flatten() for p in params]).norm()
    torch.testing.assert_close(opt.clip(lambda held: torch.nn.utils.clip_grad_norm_(held, 1.0)), norm)


def test_one_number_is_one_stream():
    opt = DecoupledMomentumSGD(random_params(), 0.1, 0.9)
    assert opt.streams == ("task",)
    assert opt.param_groups[0]["momentum"] == {"task": 0.9}
    opt.add_param_group({"params": random_params(1), "momentum": 0.5})
    assert opt.param_groups[1]["momentum"] == {"task": 0.5}


def test_every_partition_of_four_streams_is_one_formula():
    for coefficients in itertools.product((0.5, 0.9), repeat=4):
        momentum = dict(zip(("tog", "tcg", "ncg", "features"), coefficients))
        params = random_params()
        start = [p.detach().clone() for p in params]
        opt = DecoupledMomentumSGD(params, 0.1, momentum, 0.02, "features")
        for step in range(3):
            one_step(opt, params, step)
        assert_equal_params(params, formula(start, lambda _, m=momentum: m, 0.0, 0.02, "features", 0.1, 3))


DECOUPLED = {"tog": 0.9, "tcg": 0.5, "ncg": 0.7}


@pytest.mark.parametrize("factor", [0.25, torch.tensor(0.25)])
@pytest.mark.parametrize("momentum", [DECOUPLED, dict.fromkeys(DECOUPLED, 0.9)])
def test_scaled_gradients_are_those_of_scaled_losses(momentum, factor):
    """What a GradScaler does: losses times 4, gradients over 4."""
    found = []
    for scaled in (False, True):
        params = random_params()
        opt = DecoupledMomentumSGD(params, 0.1, momentum, 0.01, "tcg")
        for step in range(3):
            opt.zero_grad()
            losses = {s: linear_loss(params, random_gradients(step, i)) for i, s in enumerate(opt.streams)}
            opt.backward({s: 4.0 * loss if scaled else loss for s, loss in losses.items()})
            if scaled:
                opt.scale_gradients(factor)
            opt.step()
        found.append(params)
    for plain, scaled in zip(*found):
        torch.testing.assert_close(scaled, plain, rtol=1e-12, atol=1e-12)


def test_scaling_without_gradients_is_nothing():
    DecoupledMomentumSGD(random_params(), 0.1, DECOUPLED).scale_gradients(0.5)


CLIPPERS = {
    "norm": lambda params: torch.nn.utils.clip_grad_norm_(params, 0.5),
    "norm of each": lambda params: [torch.nn.utils.clip_grad_norm_(p, 0.3) for p in params],
    "value": lambda params: torch.nn.utils.clip_grad_value_(params, 0.2),
}


@pytest.mark.parametrize("name", CLIPPERS)
def test_equal_streams_apart_are_clipped_as_one_stream(name):
    """merge=False takes the streams' own gradients; with equal momenta the result must be plain clipped SGD's."""
    params, plain = random_params(), random_params()
    opt = DecoupledMomentumSGD(params, 0.1, dict.fromkeys(DECOUPLED, 0.9), 0.01, "tog", merge=False)
    sgd = torch.optim.SGD(plain, 0.1, 0.9, weight_decay=0.01)
    for step in range(4):
        opt.zero_grad()
        opt.backward({s: linear_loss(params, random_gradients(step, i)) for i, s in enumerate(opt.streams)})
        opt.clip(CLIPPERS[name])
        opt.step()
        for i, p in enumerate(plain):
            p.grad = sum(random_gradients(step, s)[i] for s in range(3))
        CLIPPERS[name](plain)
        sgd.step()
    for ours, theirs in zip(params, plain):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_clipping_by_norm_scales_every_stream_alike():
    params = random_params()
    opt = DecoupledMomentumSGD(params, 1.0, DECOUPLED)
    opt.backward({s: linear_loss(params, random_gradients(0, i)) for i, s in enumerate(opt.streams)})
    norm = torch.cat([p.grad.flatten() for p in params]).norm()
    opt.clip(lambda held: torch.nn.utils.clip_grad_norm_(held, norm.item() / 4))
    opt.step()
    for i, p in enumerate(params):
        for s in range(3):
            expected = random_gradients(0, s)[i] / 4
            torch.testing.assert_close(list(opt.state[p].values())[s], expected, rtol=1e-5, atol=1e-8)


def test_a_merged_step_reads_the_clipped_gradient():
    params = random_params()
    start = [p.detach().clone() for p in params]
    opt = DecoupledMomentumSGD(params, 1.0, dict.fromkeys(DECOUPLED, 0.9))
    opt.backward({s: linear_loss(params, random_gradients(0, i)) for i, s in enumerate(opt.streams)})
    opt.clip(lambda held: torch.nn.utils.clip_grad_value_(held, 0.1))
    opt.step()
    assert max((p - s).abs().max().item() for p, s in zip(params, start)) == pytest.approx(0.1)


def test_a_zero_sum_leaves_its_streams_as_they_are():
    p = torch.zeros(2, dtype=F64, requires_grad=True)
    opt = DecoupledMomentumSGD([p], 1.0, {"a": 0.9, "b": 0.5})
    up = torch.tensor([1.0, 4.0], dtype=F64)
    opt.backward({"a": (p * up).sum(), "b": -(p * torch.tensor([1.0, 2.0], dtype=F64)).sum()})
    opt.clip(lambda held: torch.nn.utils.clip_grad_value_(held, 1.0))
    opt.step()
    assert [b.tolist() for b in opt.state[p].values()] == [[1.0, 2.0], [-1.0, -1.0]]
