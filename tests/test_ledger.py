"""What others do to p.grad between backward and step: followed exactly, or refused in one line."""

import copy

import pytest
import torch
import torch.distributed as dist
from processes import in_two_processes
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from deepkd_plugin import DecoupledMomentumSGD, backward, ledger

APART = {"tog": 0.9, "tcg": 0.5, "ncg": 0.7}
EQUAL = dict.fromkeys(APART, 0.9)


def make(momentum=APART, **options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    return net, DecoupledMomentumSGD(net.parameters(), 0.1, momentum, **options)


def losses_of(net, step=0):
    generator = torch.Generator().manual_seed(step)
    out = net(torch.randn(5, 3, generator=generator, dtype=torch.float64))
    return {"tog": out.square().mean(), "tcg": out.sin().mean(), "ncg": 3 * out[:, 0].mean()}


def train(change=None, momentum=APART, steps=3, scale=1.0):
    """Three steps, with `change(net, opt)` between backward and step; losses times `scale`."""
    net, opt = make(momentum)
    for step in range(steps):
        opt.zero_grad()
        opt.backward({name: scale * loss for name, loss in losses_of(net, step).items()})
        if change is not None:
            change(net, opt)
        opt.step()
    return net


def assert_same(a, b, tolerance=1e-12):
    for p, q in zip(a.parameters(), b.parameters()):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


def times(factor):
    def change(net, opt):
        for p in net.parameters():
            p.grad.mul_(factor)

    return change


FACTORS = {
    "in place": times(0.25),
    "replaced": lambda net, opt: [setattr(p, "grad", p.grad * 0.25) for p in net.parameters()],
    "without a trace": lambda net, opt: torch._amp_foreach_non_finite_check_and_unscale_(
        [p.grad for p in net.parameters()], torch.zeros(1), torch.tensor(0.25)
    ),
    "twice": lambda net, opt: [times(0.5)(net, opt), times(0.5)(net, opt)],
    "after ours": lambda net, opt: [opt.scale_gradients(0.5), times(0.5)(net, opt)],
}


@pytest.mark.parametrize("momentum", [APART, EQUAL], ids=["apart", "equal"])
@pytest.mark.parametrize("name", FACTORS)
def test_a_common_factor_is_followed(name, momentum):
    assert_same(train(FACTORS[name], momentum, scale=4.0), train(momentum=momentum))


@pytest.mark.parametrize("limit", [0.1, 1e9], ids=["clips", "does not"])
def test_clip_grad_norm_is_followed(limit):
    """A limit that is never reached multiplies by 1, as the Transformers' Trainer does to log the norm: no change."""
    ours = train(lambda net, opt: opt.clip(lambda params: clip_grad_norm_(params, limit)))
    theirs = train(lambda net, opt: clip_grad_norm_(net.parameters(), limit))
    assert_same(theirs, ours)
    if limit > 1:
        assert_same(theirs, train(), 0.0)


def test_a_part_of_the_parameters_may_be_scaled():
    def change(net, opt):
        for p in net[2].parameters():
            p.grad.mul_(0.5)

    net, opt = make()
    expected = [[0.5 * g if p.shape[0] == 2 else g for p, g in zip(net.parameters(), gs)] for gs in by_stream(net)]
    opt.backward(losses_of(net))
    change(net, opt)
    opt.step()
    for i, p in enumerate(net.parameters()):
        for buffer, gradients in zip(opt.state[p].values(), expected):
            torch.testing.assert_close(buffer, gradients[i], rtol=1e-12, atol=1e-15)


def by_stream(net, step=0):
    params = list(net.parameters())
    return [torch.autograd.grad(loss, params, retain_graph=True) for loss in losses_of(net, step).values()]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_factor_is_followed_in_any_precision(dtype):
    net, opt = make()
    net.to(dtype)
    for step in range(3):  # several backward passes, whose sums round
        opt.backward({name: 64 * loss for name, loss in losses_of_type(net, step, dtype).items()})
    clip_grad_norm_(net.parameters(), 0.01)
    total = [p.grad.clone() for p in net.parameters()]
    opt.step()
    for p, g in zip(net.parameters(), total):
        torch.testing.assert_close(sum(opt.state[p].values()), g, rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16])
def test_a_factor_is_followed_in_a_network_of_two_precisions(narrow):
    """The rounding of a narrow body is no part of the factor of a wide head."""

    def train(change):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(50, dtype=dtype)) for dtype in (narrow, torch.float32)]
        opt = DecoupledMomentumSGD(params, 0.1, APART)
        scales = zip(APART, (1.0, 3.0, 0.5))
        opt.backward({stream: sum((k * p.float()).sin().sum() for p in params) for stream, k in scales})
        change(params, opt)
        opt.step()
        return [buffer for p in params for buffer in opt.state[p].values()]

    theirs = train(lambda params, opt: clip_grad_norm_(params, 0.3))
    ours = train(lambda params, opt: opt.clip(lambda grads: clip_grad_norm_(grads, 0.3)))
    for one, other in zip(theirs, ours):
        torch.testing.assert_close(one, other, rtol=4 * torch.finfo(one.dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_change_of_small_gradients_is_seen(dtype):
    """float16's gradients may all be below its smallest normal number."""

    def train(change):
        net, opt = make()
        net.to(dtype)
        opt.backward({name: 1e-5 * loss for name, loss in losses_of_type(net, 0, dtype).items()})
        change(net, opt)
        opt.step()
        return [buffer for p in net.parameters() for buffer in opt.state[p].values()]

    for theirs, ours in zip(train(times(0.25)), train(lambda net, opt: opt.scale_gradients(0.25))):
        torch.testing.assert_close(theirs, ours, rtol=0.05, atol=1e-7)
    with pytest.raises(RuntimeError, match="more than one common factor"):
        train(lambda net, opt: (1e-5 * losses_of_type(net, 1, dtype)["ncg"]).backward())


def losses_of_type(net, step, dtype):
    out = net(torch.randn(5, 3, generator=torch.Generator().manual_seed(step)).to(dtype))
    return {"tog": out.square().mean(), "tcg": out.sin().mean(), "ncg": out[:, 0].mean()}


REFUSED = {
    "values are clipped": lambda net, opt: clip_grad_value_(net.parameters(), 0.01),
    "norm of each is clipped": lambda net, opt: [clip_grad_norm_(p, 0.01) for p in net.parameters()],
    "another backward": lambda net, opt: net(torch.ones(1, 3, dtype=torch.float64)).sum().backward(),
    "noise is added": lambda net, opt: net[0].weight.grad.add_(torch.randn(4, 3, dtype=torch.float64)),
    "one bias is changed": lambda net, opt: net[2].bias.grad[0].mul_(0.5),
}


@pytest.mark.parametrize("name", REFUSED)
def test_any_other_change_is_refused(name):
    net, opt = make()
    opt.backward(losses_of(net))
    REFUSED[name](net, opt)
    before = copy.deepcopy(net)
    for call in (
        opt.step,
        lambda: opt.backward(losses_of(net)),
        lambda: opt.scale_gradients(0.5),
        lambda: opt.clip(lambda params: None),
    ):
        with pytest.raises(RuntimeError, match="more than one common factor"):
            call()
    assert_same(net, before, 0.0)
    assert not opt.state
    opt.zero_grad()
    opt.backward(losses_of(net))
    opt.step()


def test_a_lone_coordinate_tells_nothing():
    """Any change of one number is a factor, so it is refused, unless it is none."""
    p = torch.tensor(2.0, requires_grad=True)
    opt = DecoupledMomentumSGD([p], 0.1, {"a": 0.9, "b": 0.5})
    opt.backward({"a": p * 2, "b": p.square()})
    p.grad.mul_(1.0)
    opt.step()
    opt.zero_grad()
    opt.backward({"a": p * 2, "b": p.square()})
    p.grad.mul_(0.5)
    with pytest.raises(RuntimeError, match="more than one common factor"):
        opt.step()


def test_what_others_zero_is_zero():
    """A module's zero_grad(set_to_none=False), before and after our backward."""
    net, opt = make()
    plain, sgd = make()
    opt.backward({name: 100 * loss for name, loss in losses_of(net, 7).items()})
    for step in range(3):
        net.zero_grad(set_to_none=False)
        opt.backward(losses_of(net, step))
        opt.step()
        sgd.zero_grad()
        sgd.backward(losses_of(plain, step))
        sgd.step()
    assert_same(net, plain)


def test_a_gradient_that_is_not_finite_stays_so():
    """As under torch.optim.SGD: a norm that is infinite or NaN is the weights' end."""
    net, opt = make()
    opt.backward({name: loss * float("inf") for name, loss in losses_of(net).items()})
    clip_grad_norm_(net.parameters(), 1.0)
    opt.step()
    assert all(p.isnan().all() for p in net.parameters())


@pytest.mark.parametrize("momentum", [APART, EQUAL], ids=["apart", "equal"])
def test_a_parameter_without_grad_loses_its_own_gradients_alone(momentum):
    net, opt = make(momentum)
    expected = by_stream(net)
    start = copy.deepcopy(net)
    opt.backward(losses_of(net))
    net[0].bias.grad = None
    opt.step()
    for i, (p, q) in enumerate(zip(net.parameters(), start.parameters())):
        total = sum(gradients[i] for gradients in expected)
        torch.testing.assert_close(p, q if p is net[0].bias else q - 0.1 * total, rtol=1e-12, atol=1e-12)
    assert net[0].bias not in opt.state


@pytest.mark.parametrize("forget", ["ours", "module's"])
def test_a_gradient_left_over_is_refused(forget):
    """torch.optim.SGD would add to it; the streams are used up, so they could not."""
    net, opt = make()
    opt.backward(losses_of(net))
    opt.step()
    with pytest.raises(RuntimeError, match=r"call zero_grad\(\) after step\(\)"):
        opt.backward(losses_of(net))
    (opt if forget == "ours" else net).zero_grad(set_to_none=False)
    opt.backward(losses_of(net))
    opt.step()


def test_a_gradient_of_a_parameter_that_no_stream_reaches_is_refused():
    net, _ = make()
    extra = nn.Parameter(torch.ones(3, dtype=torch.float64))
    opt = DecoupledMomentumSGD([*net.parameters(), extra], 0.1, APART)
    opt.backward(losses_of(net))
    extra.square().sum().backward()
    with pytest.raises(RuntimeError, match="take a gradient of your own into a stream by collect"):
        opt.step()


@pytest.mark.parametrize("zeros", [False, True])
def test_parameters_without_a_gradient_coast_alike(zeros):
    """p.grad of zeros moves by momentum, as under torch.optim.SGD; p.grad None does not. Merged or not."""

    def run(momentum, merge):
        net, opt = make(momentum, merge=merge)
        head = list(net[2].parameters())
        for step in range(4):
            opt.zero_grad(set_to_none=not zeros)
            hidden = net[:2](torch.randn(5, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64))
            out = net[2](hidden) if step % 2 == 0 else hidden
            opt.backward({"tog": out.square().mean(), "tcg": out.sin().mean(), "ncg": out[:, 0].mean()})
            before = [p.detach().clone() for p in head]
            opt.step()
            moved = any(not torch.equal(p, q) for p, q in zip(head, before))
            assert moved == (zeros or step % 2 == 0)
        return net

    equal = dict.fromkeys(APART, 0.9)
    assert_same(run(equal, True), run(equal, False))
    sgd = torch.optim.SGD
    net, _ = make()
    opt = sgd(net.parameters(), 0.1, 0.9)
    for step in range(4):
        opt.zero_grad(set_to_none=not zeros)
        hidden = net[:2](torch.randn(5, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64))
        out = net[2](hidden) if step % 2 == 0 else hidden
        (out.square().mean() + out.sin().mean() + out[:, 0].mean()).backward()
        opt.step()
    assert_same(run(equal, True), net)


class TestRefusedBackward:
    CALLS = (
        (lambda losses: losses["tog"], TypeError, r"losses must map streams to scalar tensors, as in \{'tog': loss\}"),
        (lambda losses: 1.0, TypeError, "losses must map streams to scalar tensors, .* got float"),
        (
            lambda losses: losses | {"tcg": 1.0},
            TypeError,
            "the loss of stream 'tcg' must be a scalar tensor, got float",
        ),
        (lambda losses: losses | {"feat": losses["tog"]}, ValueError, "unknown stream 'feat'; the streams are"),
        (lambda losses: losses | {"tcg": losses["tcg"].repeat(2)}, ValueError, r"must be a scalar, got shape \(2,\)"),
        (lambda losses: {"tog": losses["tog"].detach()}, RuntimeError, "needs a gradient"),
        (lambda losses: {"tog": torch.ones((), requires_grad=True) * 2}, RuntimeError, "reach none of the parameters"),
    )

    @pytest.mark.parametrize("case", range(len(CALLS)))
    @pytest.mark.parametrize("waiting", [False, True])
    def test_it_leaves_no_trace(self, case, waiting):
        make_losses, error, message = self.CALLS[case]
        net, opt = make()
        if waiting:
            opt.backward(losses_of(net, 1))
        before = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
        with pytest.raises(error, match=message):
            opt.backward(make_losses(losses_of(net)))
        for p, was in zip(net.parameters(), before):
            assert (p.grad is None and was is None) or torch.equal(p.grad, was)
        twin, other = make()
        if waiting:
            other.backward(losses_of(twin, 1))
        opt.backward(losses_of(net))
        other.backward(losses_of(twin))
        opt.step()
        other.step()
        assert_same(net, twin, 0.0)

    @pytest.mark.parametrize("key", ["added", "deleted"])
    def test_a_stream_that_is_added_to_or_deleted_from_a_group(self, key):
        net, opt = make()
        momentum = opt.param_groups[0]["momentum"]
        momentum.update(feat=0.9) if key == "added" else momentum.pop("tcg")
        message = r"every parameter group needs the streams \('tog', 'tcg', 'ncg'\)"
        with pytest.raises(ValueError, match=message):
            opt.backward(losses_of(net))
        with pytest.raises(ValueError, match=message):
            opt.step()
        assert all(p.grad is None for p in net.parameters())

    @pytest.mark.parametrize("shape", [(1,), (2,)])
    def test_a_rate_of_another_shape(self, shape):
        net, opt = make()
        opt.param_groups[0]["lr"] = torch.full(shape, 0.1)
        with pytest.raises(ValueError, match="lr must be a number or a tensor of shape"):
            opt.step()
        with pytest.raises(ValueError, match="lr must be a number or a tensor of shape"):
            opt.backward(losses_of(net))


def test_replaced_parameters_are_not_reached():
    net, opt = make()
    net.load_state_dict(copy.deepcopy(net.state_dict()), assign=True)
    with pytest.raises(RuntimeError, match=r"After load_state_dict\(assign=True\)"):
        opt.backward(losses_of(net))


def test_a_network_that_is_frozen_whole_is_named():
    net, opt = make()
    losses = losses_of(net)
    net.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"no parameter needs a gradient: all are frozen"):
        opt.backward(losses)


class Wrapper:
    """As Lightning's and Fabric's: a dynamic subclass that reads from the optimizer and writes to itself."""

    def __new__(cls, optimizer):
        kind = type("Wrapped", (cls, type(optimizer)), {"__init__": lambda self, _: None})
        wrapper = object.__new__(kind)
        object.__setattr__(wrapper, "_inner", optimizer)
        return wrapper

    def __getattr__(self, name):
        return getattr(object.__getattribute__(self, "_inner"), name)

    def step(self):
        return self._inner.step()


@pytest.mark.parametrize("momentum", [APART, EQUAL], ids=["apart", "equal"])
def test_a_wrapper_that_forwards_reads_only(momentum):
    net, opt = make(momentum)
    wrapper = Wrapper(opt)
    for step in range(3):
        wrapper.zero_grad()
        wrapper.backward(losses_of(net, step))
        wrapper.clip(lambda params: clip_grad_norm_(params, 0.5))
        wrapper.step()
    expected = train(lambda net, opt: opt.clip(lambda params: clip_grad_norm_(params, 0.5)), momentum)
    assert_same(net, expected, 0.0)


class Outer:
    """As Accelerate's: an object with the optimizer inside, no backward, and perhaps a scaler and accumulation."""

    def __init__(self, optimizer, steps=1, scaler=None):
        self.optimizer = optimizer
        self.scaler = scaler
        self.gradient_state = type("State", (), {"num_steps": steps})()


def test_backward_finds_the_optimizer_inside():
    net, opt = make()
    twin, other = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    backward(Outer(Outer(opt, steps=4, scaler=scaler)), losses_of(net))
    other.backward({name: 2.0 * loss for name, loss in losses_of(twin).items()})
    for p, q in zip(net.parameters(), twin.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12)
    backward(other, losses_of(twin))
    with pytest.raises(TypeError, match="a DecoupledAdamW or a wrapper of one, got Outer"):
        backward(Outer(torch.optim.SGD(net.parameters(), 0.1)), losses_of(net))
    with pytest.raises(TypeError, match="losses must map streams"):
        backward(Outer(opt, steps=4), losses_of(net)["tog"])
    with pytest.raises(TypeError, match="the loss of stream 'tog' must be a scalar tensor, got NoneType"):
        backward(Outer(opt, steps=4), {"tog": None})


def collected(momentum, steps=3):
    net, opt = make(momentum)
    for step in range(steps):
        opt.zero_grad()
        for stream, loss in losses_of(net, step).items():
            loss.backward(retain_graph=True)
            opt.collect(stream)
        opt.step()
    return net


@pytest.mark.parametrize("momentum", [APART, EQUAL], ids=["apart", "equal"])
def test_collected_gradients_are_those_of_backward(momentum):
    assert_same(collected(momentum), train(momentum=momentum))


def test_collect_may_be_mixed_with_backward_and_clipped():
    net, opt = make()
    losses = losses_of(net)
    opt.backward({"tcg": losses["tcg"]}, retain_graph=True)
    (losses["tog"] + losses["ncg"]).backward(retain_graph=True)
    opt.collect("ncg")
    sums = [sum(g) for g in zip(*by_stream(net))]
    for p, total in zip(net.parameters(), sums):
        torch.testing.assert_close(p.grad, total, rtol=1e-12, atol=1e-12)
    clip_grad_norm_(net.parameters(), 0.1)
    opt.step()
    scale = min(1.0, 0.1 / (torch.cat([s.flatten() for s in sums]).norm().item() + 1e-6))
    gradients = by_stream(make()[0])
    for i, p in enumerate(net.parameters()):
        tog, tcg, ncg = opt.state[p].values()
        assert not tog.any()
        torch.testing.assert_close(tcg, scale * gradients[1][i], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(ncg, scale * (gradients[0][i] + gradients[2][i]), rtol=1e-9, atol=1e-12)


def test_collect_says_what_is_missing():
    _, opt = make()
    with pytest.raises(RuntimeError, match=r"collect\('tog'\) finds no gradient: call loss.backward\(\) before it"):
        opt.collect("tog")
    with pytest.raises(ValueError, match="unknown stream 'feat'"):
        opt.collect("feat")


def test_collect_without_a_backward_since_the_last_one_is_refused():
    net, opt = make()
    losses_of(net)["tog"].backward()
    opt.collect("tog")
    with pytest.raises(RuntimeError, match=r"collect\('tcg'\) finds no gradient: call loss.backward\(\) before it"):
        opt.collect("tcg")


UNSCALED = {
    "step": lambda net, opt: None,
    "clip": lambda net, opt: opt.clip(lambda params: clip_grad_norm_(params, 1e9)),
    "average": lambda net, opt: opt.average_gradients(),
}


@pytest.mark.parametrize("dead", [(), (0,), (1,)], ids=["none", "no element", "zero"])
@pytest.mark.parametrize("call", UNSCALED)
def test_gradients_that_a_scaler_unscaled_are_found_whatever_is_smallest(monkeypatch, call, dead):
    """A parameter without elements, or one with a gradient of 0, looks the same after a factor as before."""
    monkeypatch.setattr(dist, "all_reduce", lambda *arguments, **options: None)
    monkeypatch.setattr(dist, "get_world_size", lambda *arguments: 1)

    def step(scale):
        net, opt = make()
        if dead:
            net.dead = nn.Parameter(torch.zeros(dead, dtype=torch.float64))
            opt.add_param_group({"params": [net.dead]})
        losses = losses_of(net)
        if dead:
            losses["tog"] = losses["tog"] + 0 * net.dead.sum()
        opt.backward({stream: scale * loss for stream, loss in losses.items()})
        if scale != 1:
            grads = [p.grad for p in net.parameters()]
            torch._amp_foreach_non_finite_check_and_unscale_(grads, torch.zeros(1), torch.tensor(1 / scale))
        UNSCALED[call](net, opt)
        opt.step()
        return net

    assert_same(step(1024.0), step(1))


def test_averaging_follows_what_a_scaler_unscaled_on_a_gpu(monkeypatch):
    """On a GPU no copy of a gradient is compared, but averaging would write the sets' sum over p.grad."""
    monkeypatch.setattr(dist, "all_reduce", lambda *arguments, **options: None)
    monkeypatch.setattr(dist, "get_world_size", lambda *arguments: 1)
    monkeypatch.setattr(ledger, "_is_plain", lambda grad: False)

    def change(net, opt):
        FACTORS["without a trace"](net, opt)
        opt.average_gradients()

    assert_same(train(change, scale=4.0), train())


@pytest.mark.parametrize("momentum", [APART, EQUAL], ids=["apart", "equal"])
def test_a_backward_after_the_averaging_is_warned_of(monkeypatch, momentum):
    """Gradients that come after the average are this process's own again."""
    monkeypatch.setattr(dist, "all_reduce", lambda *arguments, **options: None)
    monkeypatch.setattr(dist, "get_world_size", lambda *arguments: 2)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    net, opt = make(momentum)
    opt.backward(losses_of(net))
    opt.average_gradients()
    opt.backward(losses_of(net, 1))
    with pytest.warns(UserWarning, match="in 2 processes without average_gradients"):
        opt.step()


def alone(rank, momentum, call):
    net, opt = make(momentum)
    opt.backward(losses_of(net))
    with pytest.warns(UserWarning, match=r"DecoupledMomentumSGD.step\(\) in 2 processes without average_gradients"):
        opt.step()
    for _ in range(2):  # once
        opt.zero_grad()
        opt.backward(losses_of(net))
        opt.step()
    again, opt = make(momentum)
    for step in range(2):  # never where it is called, nor for a backward whose hooks average
        opt.zero_grad()
        if call == "average":
            opt.backward(losses_of(again, step))
            opt.average_gradients()
        else:
            for stream, loss in losses_of(again, step).items():
                loss.backward(retain_graph=True)
                opt.collect(stream)
        opt.step()
    return {"ranks": dist.get_world_size()}


@pytest.mark.parametrize(("momentum", "call"), [(APART, "average"), (EQUAL, "average"), (APART, "collect")])
def test_several_processes_that_do_not_average_are_warned_once(tmp_path, momentum, call):
    assert in_two_processes(alone, tmp_path, momentum, call) == [{"ranks": 2}] * 2
