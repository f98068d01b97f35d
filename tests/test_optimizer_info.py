"""The checks that PyTorch makes of each of its optimizers, made of DecoupledMomentumSGD: its OptimizerInfo and ours.

They follow what pytorch/pytorch's test/test_optim.py checks with an OptimizerInfo, for one stream fed by
`loss.backward()` and for three fed by `backward` or by `collect`, with the multi-tensor update and the single-tensor
one. Left out are checks that do not apply: several GPUs, fused and differentiable updates, sparse and complex numbers.
"""

import copy
import itertools
import pickle

import pytest
import torch
from torch.nn import Parameter
from torch.optim import lr_scheduler as schedulers
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from deepkd_plugin.optim import DecoupledMomentumSGD

with pytest.MonkeyPatch.context() as patch:
    # the module freezes torch.backends' flags for the whole process
    patch.setattr(torch.backends, "disable_global_flags", lambda: None)
    internal = pytest.importorskip(
        "torch.testing._internal.common_optimizers",
        reason='torch.testing._internal is missing or needs expecttest: pip install -e ".[test]"',
    )

STREAMS = ("tog", "tcg", "ncg")
SHARES = {"tog": 0.5, "tcg": 0.3, "ncg": 0.2}  # of the loss


class Three(DecoupledMomentumSGD):
    """Three streams, each a share of the one loss that a closure or a test made with `loss.backward()`.

    `step` makes the streams' gradients from p.grad, so that code written for any optimizer can use it.
    """

    def __init__(self, params, lr=1e-3, momentum=0.0, **options):
        by_stream = {name: factor * momentum for name, factor in zip(STREAMS, (1.0, 0.6, 0.8))}
        options.setdefault("weight_decay_stream", "tcg")
        super().__init__(params, lr, by_stream, **options)

    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        gradients = [p.grad for p in params]
        if params:
            self.make_streams(params, gradients)
        super().step()
        for p, gradient in zip(params, gradients):
            p.grad = gradient
        return loss


class ThreeByBackward(Three):
    """The streams are made by `backward`."""

    def make_streams(self, params, gradients):
        super().zero_grad()
        with torch.enable_grad():
            loss = sum((p * g).sum() for p, g in zip(params, gradients))
            self.backward({name: share * loss for name, share in SHARES.items()})


class ThreeByCollect(Three):
    """The streams are taken from p.grad by `collect`."""

    def make_streams(self, params, gradients):
        super().zero_grad()
        for p in params:
            p.grad = torch.zeros_like(p)
        for name, share in SHARES.items():
            for p, gradient in zip(params, gradients):
                p.grad = p.grad + share * gradient
            self.collect(name)


class One(DecoupledMomentumSGD):
    """One stream, with torch.optim.SGD's defaults."""

    def __init__(self, params, lr=1e-3, momentum=0.0, **options):
        super().__init__(params, lr, momentum, **options)


def optim_inputs(device, dtype=None):
    """torch.optim.SGD's, and what is ours."""
    ours = [
        {"momentum": 0.9, "dampening": "ema"},
        {"momentum": 0.9, "dampening": "matched", "matched_to": 0.8, "weight_decay": 0.1},
        {"momentum": 0.9, "capturable": True},
    ]
    return internal.optim_inputs_func_sgd(device, dtype) + [
        internal.OptimizerInput(params=None, kwargs=kwargs, desc=str(kwargs)) for kwargs in ours
    ]


SAYS = {  # torch's message -> ours, for what is refused in our words
    "Tensor lr must be 1-element": "lr must be a number or a tensor of shape",
    "Invalid momentum value: -0.5": "momentum of stream .* must be in",
}

EVERY_SCHEDULER = {
    "StepLR": lambda opt: schedulers.StepLR(opt, gamma=0.9, step_size=10),
    "MultiStepLR": lambda opt: schedulers.MultiStepLR(opt, [5, 10]),
    "LambdaLR": lambda opt: schedulers.LambdaLR(opt, lambda step: 0.99**step),
    "MultiplicativeLR": lambda opt: schedulers.MultiplicativeLR(opt, lambda step: 0.99),
    "ConstantLR": lambda opt: schedulers.ConstantLR(opt, factor=0.4, total_iters=4),
    "LinearLR": lambda opt: schedulers.LinearLR(opt, start_factor=0.4, end_factor=0.8, total_iters=4),
    "ExponentialLR": lambda opt: schedulers.ExponentialLR(opt, gamma=0.99),
    "PolynomialLR": lambda opt: schedulers.PolynomialLR(opt, power=0.9, total_iters=40),
    "CosineAnnealingLR": lambda opt: schedulers.CosineAnnealingLR(opt, T_max=20),
    "CosineAnnealingWarmRestarts": lambda opt: schedulers.CosineAnnealingWarmRestarts(opt, T_0=7),
    "SequentialLR": lambda opt: schedulers.SequentialLR(
        opt, [schedulers.ConstantLR(opt, 0.1, 3), schedulers.ExponentialLR(opt, 0.9)], [3]
    ),
    "ChainedScheduler": lambda opt: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(opt, 0.1, 3), schedulers.ExponentialLR(opt, 0.9)]
    ),
    "ReduceLROnPlateau": lambda opt: schedulers.ReduceLROnPlateau(opt, patience=2),
    "OneCycleLR": lambda opt: schedulers.OneCycleLR(opt, max_lr=0.02, total_steps=40),
    "CyclicLR": lambda opt: schedulers.CyclicLR(opt, 1e-3, 0.02, step_size_up=5, cycle_momentum=True),
    "SWALR": lambda opt: torch.optim.swa_utils.SWALR(opt, swa_lr=1e-3),
}

INFOS = [
    internal.OptimizerInfo(
        optimizer,
        optim_inputs_func=optim_inputs,
        scheduler_inputs=next(i for i in internal.optim_db if i.optim_cls is torch.optim.SGD).scheduler_inputs,
        optim_error_inputs_func=internal.optim_error_inputs_func_sgd,
        supported_impls=("foreach",),
        # what a state of 0.1 does not have
        not_og_supported_flags=("maximize", "nesterov", "matched_to", "capturable"),
        supports_complex=False,
    )
    for optimizer in (One, ThreeByBackward, ThreeByCollect)
]

each = pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
foreach = pytest.mark.parametrize("foreach", [True, False], ids=["foreach", "single"])


def inputs(info, foreach):
    """Each way to make the optimizer, as keyword arguments of its own."""
    return [{**copy.deepcopy(one.kwargs), "foreach": foreach} for one in info.optim_inputs_func("cpu", torch.float64)]


def problem(contiguous=True):
    """A weight (10, 5), a bias (10,) and an input (5,) -> the parameters and their loss."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        if contiguous:
            return torch.randn(shape, generator=generator, dtype=torch.float64)
        return torch.randn((*shape, 2), generator=generator, dtype=torch.float64)[..., 0]

    weight, bias, x = Parameter(draw(10, 5)), Parameter(draw(10)), draw(5)
    return [weight, bias], lambda: (weight.mv(x) + bias).pow(2).sum()


def closure(opt, loss):
    def call():
        opt.zero_grad()
        value = loss()
        value.backward()
        return value

    return call


def steps(opt, loss, count):
    for _ in range(count):
        opt.step(closure(opt, loss))


def goes_right(opt, loss, rounds=60, after=lambda loss: None):
    maximize = opt.defaults["maximize"]
    before = loss().item()
    for _ in range(rounds):
        opt.step(closure(opt, loss))
        after(loss)
    now = loss().item()
    assert now > before if maximize else now < before, (before, now)


@each
@foreach
@pytest.mark.parametrize("contiguous", [True, False])
def test_goes_the_right_direction(info, foreach, contiguous):
    for kwargs in inputs(info, foreach):
        params, loss = problem(contiguous)
        opt = info.optim_cls(params, **kwargs)
        assert info.name in repr(opt)
        goes_right(opt, loss)


@each
@foreach
def test_goes_the_right_direction_with_torchs_schedulers(info, foreach):
    """Every input with each of SGD's sets of schedulers, as in torch's test."""
    for kwargs, made in itertools.product(inputs(info, foreach), info.scheduler_inputs):
        params, loss = problem()
        opt = info.optim_cls(params, **copy.deepcopy(kwargs))  # a scheduler writes to a rate that is a tensor
        running = [make(opt) for make in made]

        def after(loss, running=running):
            for one in running:
                one.step(loss().item()) if isinstance(one, schedulers.ReduceLROnPlateau) else one.step()

        goes_right(opt, loss, 20, after)


@each
@foreach
@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor rate"])
@pytest.mark.parametrize("name", EVERY_SCHEDULER)
def test_every_scheduler_sets_what_it_sets_for_sgd(info, foreach, tensor, name):
    """Rate and momentum of every step: what SGD gets is the largest momentum, and the others keep their ratio to it."""
    params, loss = problem()
    lr = torch.tensor(1e-3, dtype=torch.float64) if tensor else 1e-3
    opt = info.optim_cls(params, lr=lr, momentum=0.9, foreach=foreach)
    ratios = {stream: m / 0.9 for stream, m in opt.defaults["momentum"].items()}
    sgd = torch.optim.SGD([Parameter(p.detach().clone()) for p in params], lr=lr.item() if tensor else lr, momentum=0.9)
    ours, theirs = (EVERY_SCHEDULER[name](one) for one in (opt, sgd))
    opt.step(closure(opt, loss))
    for _ in range(30):
        sgd.step()
        for scheduler in (ours, theirs):
            metric = [1.0] if isinstance(scheduler, schedulers.ReduceLROnPlateau) else []
            scheduler.step(*metric)
        mine, group = opt.param_groups[0], sgd.param_groups[0]
        assert float(mine["lr"]) == pytest.approx(group["lr"], rel=1e-12)
        opt.step(closure(opt, loss))  # which spreads a number over the streams
        expected = {stream: share * group["momentum"] for stream, share in ratios.items()}
        assert opt.param_groups[0]["momentum"] == pytest.approx(expected, rel=1e-12)


@each
@foreach
def test_a_tensor_rate_is_a_rate(info, foreach):
    for kwargs in inputs(info, foreach):
        results = []
        for lr in (0.01, torch.tensor(0.01, dtype=torch.float64)):
            params, loss = problem()
            opt = info.optim_cls(params, **{**kwargs, "lr": lr})
            steps(opt, loss, 5)
            results.append(params)
        for number, tensor in zip(*results):
            torch.testing.assert_close(number, tensor, rtol=1e-12, atol=1e-12)


@each
@foreach
def test_decay_of_one_group(info, foreach):
    """A group's weight decay pulls its weight to 0, and leaves the other group's bias alone."""
    for kwargs in inputs(info, foreach):
        generator = torch.Generator().manual_seed(0)
        weight, bias = (Parameter(torch.randn(n, generator=generator, dtype=torch.float64)) for n in (10, 3))
        kwargs["weight_decay"] = 0.0
        groups = [{"params": [weight], "weight_decay": 0.5}, {"params": [bias]}]
        opt = info.optim_cls(groups, **{**kwargs, "maximize": False})
        weight.grad, bias.grad = torch.zeros_like(weight), torch.zeros_like(bias)
        norm, before = weight.norm().item(), bias.detach().clone()
        for _ in range(10):
            opt.step()
        assert weight.norm() < norm
        assert torch.equal(bias, before)


@each
@foreach
def test_rate_of_one_group(info, foreach):
    """A group of rate 0 stays; the other moves."""
    for kwargs in inputs(info, foreach):
        params, loss = problem()
        before = [p.detach().clone() for p in params]
        opt = info.optim_cls([{"params": params[:1], "lr": 0.01}, {"params": params[1:]}], **{**kwargs, "lr": 0.0})
        steps(opt, loss, 5)
        assert not torch.equal(params[0], before[0])
        assert torch.equal(params[1], before[1])


@each
def test_foreach_matches_the_loop(info):
    """Weights and buffers after each of 7 steps, every step from the same ones, also with a step without gradients."""
    for loop, multi in zip(inputs(info, False), inputs(info, True)):
        made = []
        for kwargs in (loop, multi):
            params, loss = problem()
            made.append((info.optim_cls(params, **kwargs), params, loss))
        for step in range(7):
            for opt, _, loss in made:
                call = closure(opt, loss)
                if step == 3:  # as torch's test has it, a step without a gradient
                    opt.zero_grad()
                    opt.step()
                else:
                    opt.step(call)
            (ours, params, _), (theirs, others, _) = made
            for p, q in zip(params, others):
                torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
                assert ours.state[p].keys() == theirs.state[q].keys()
                for name, buffer in ours.state[p].items():
                    torch.testing.assert_close(buffer, theirs.state[q][name], rtol=1e-12, atol=1e-12)


@each
@foreach
def test_state_dict_is_deterministic(info, foreach):
    for kwargs in inputs(info, foreach):
        params, loss = problem()
        opt = info.optim_cls(params, **kwargs)
        steps(opt, loss, 3)
        saved = copy.deepcopy(opt.state_dict())
        twins, other_loss = problem()
        with torch.no_grad():
            for p, q in zip(params, twins):
                q.copy_(p)
        twin = info.optim_cls(twins, **kwargs)
        twin.load_state_dict(copy.deepcopy(opt.state_dict()))
        steps(opt, loss, 3)
        steps(twin, other_loss, 3)
        for p, q in zip(params, twins):
            assert torch.equal(p, q)
        assert_same(opt.state_dict(), twin.state_dict())
        fresh = info.optim_cls(problem()[0], **kwargs)
        fresh.load_state_dict(saved)
        assert_same(fresh.state_dict(), saved)  # and what was loaded has not changed it
        # groups that stand twice are written alike
        twin.param_groups.extend(twin.param_groups)
        assert opt.state_dict()["param_groups"][-1] == twin.state_dict()["param_groups"][-1]


def assert_same(one, other):
    assert one["param_groups"] == other["param_groups"]
    assert one["state"].keys() == other["state"].keys()
    for i, state in one["state"].items():
        assert state.keys() == other["state"][i].keys()
        for name, buffer in state.items():
            assert torch.equal(buffer, other["state"][i][name])


@each
@foreach
def test_older_state_dict_loads(info, foreach):
    for kwargs in inputs(info, foreach):
        params, loss = problem()
        opt = info.optim_cls(params, **kwargs)
        steps(opt, loss, 3)
        state = copy.deepcopy(opt.state_dict())
        for flag, group in itertools.product(info.not_og_supported_flags, state["param_groups"]):
            if not group[flag]:
                del group[flag]
        opt.load_state_dict(state)
        assert not any(flag not in opt.param_groups[0] for flag in info.not_og_supported_flags)
        steps(opt, loss, 1)


@each
@pytest.mark.parametrize("named", [(True, True), (True, False), (False, True)])
def test_names_of_parameters_are_kept_as_sgd_keeps_them(info, named):
    groups = []
    for optimizer in (info.optim_cls, torch.optim.SGD):
        made = []
        for names in named:
            params, loss = problem()
            opt = optimizer(list(zip(("weight", "bias"), params)) if names else params, lr=0.01, momentum=0.9)
            steps(opt, loss, 2)
            made.append(opt)
        one, other = made
        other.load_state_dict(one.state_dict())
        groups.append([opt.param_groups[0].get("param_names") for opt in made])
    assert groups[0] == groups[1]


@each
@foreach
@pytest.mark.parametrize("how", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))], ids=["copy", "pickle"])
def test_copies_go_on_alike(info, foreach, how):
    for kwargs in inputs(info, foreach):
        params, loss = problem()
        opt = info.optim_cls(params, **kwargs)
        steps(opt, loss, 3)
        other = how(opt)
        public = [{name for name in vars(one) if not name.startswith("_")} for one in (opt, other)]
        assert public[0] == public[1]
        assert_same(opt.state_dict(), other.state_dict())
        twins = [p for group in other.param_groups for p in group["params"]]
        assert not {id(p) for p in params} & {id(p) for p in twins}
        for _ in range(3):
            for one, mine in ((opt, params), (other, twins)):
                one.zero_grad()
                for p in mine:
                    p.grad = p.detach() * 0.5
                one.step()
        for p, q in zip(params, twins):
            assert torch.equal(p, q)


@each
def test_hooks_of_step_and_state_dict(info):
    params, loss = problem()
    opt = info.optim_cls(params, lr=0.01, momentum=0.9)
    called = []
    handles = [
        opt.register_step_pre_hook(lambda opt, args, kwargs: called.append("step pre")),
        opt.register_step_post_hook(lambda opt, args, kwargs: called.append("step post")),
        register_optimizer_step_pre_hook(lambda opt, args, kwargs: called.append("all pre")),
        register_optimizer_step_post_hook(lambda opt, args, kwargs: called.append("all post")),
        opt.register_state_dict_pre_hook(lambda opt: called.append("state pre")),
        opt.register_state_dict_post_hook(lambda opt, state: {**state, "more": 1}),
        opt.register_load_state_dict_pre_hook(lambda opt, state: called.append("load pre")),
        opt.register_load_state_dict_post_hook(lambda opt: called.append("load post")),
    ]
    opt.step(closure(opt, loss))
    assert sorted(set(called[: len(called) // 2])) == ["all pre", "step pre"]
    assert sorted(set(called[len(called) // 2 :])) == ["all post", "step post"]
    called.clear()
    state = opt.state_dict()
    assert state.pop("more") == 1
    opt.load_state_dict(state)
    assert called == ["state pre", "load pre", "load post"]
    for handle in handles:
        handle.remove()
    called.clear()
    opt.step(closure(opt, loss))
    opt.load_state_dict(opt.state_dict())
    assert called == []


@each
def test_order_of_hooks_that_are_put_first(info):
    opt = info.optim_cls(problem()[0], lr=0.01, momentum=0.9)
    order = []
    opt.register_load_state_dict_pre_hook(lambda opt, state: order.append(1))
    opt.register_load_state_dict_pre_hook(lambda opt, state: order.append(0), prepend=True)
    opt.load_state_dict(opt.state_dict())
    assert order == [0, 1]


@each
@foreach
def test_state_is_there_after_a_step(info, foreach):
    for kwargs in inputs(info, foreach):
        params, loss = problem()
        opt = info.optim_cls(params, **kwargs)
        steps(opt, loss, 2)
        assert all(opt.state[p] for p in params)


@each
@foreach
def test_steps_with_empty_or_no_gradient(info, foreach):
    for kwargs in inputs(info, foreach):
        empty, missing, frozen = Parameter(torch.randn(2, 0)), Parameter(torch.randn(3)), torch.randn(2)
        params, loss = problem()
        opt = info.optim_cls([*params, empty, missing, frozen], **kwargs)
        kept = missing.detach().clone(), frozen.clone()
        steps(opt, lambda loss=loss, empty=empty: loss() + empty.sum(), 3)
        assert torch.equal(missing, kept[0])
        assert torch.equal(frozen, kept[1])
        opt.zero_grad()
        opt.step()  # with no gradient at all


@each
def test_the_multi_tensor_update_is_the_default(info, monkeypatch):
    params, loss = problem()
    opt = info.optim_cls(params, lr=0.01, momentum=0.9)
    assert opt.defaults["foreach"] is True
    called = []
    monkeypatch.setattr("deepkd_plugin.optim.sgd.update_single", lambda *a: called.append(a))
    opt.step(closure(opt, loss))
    assert called == []


@each
@foreach
def test_params_of_several_kinds_take_one_step_each(info, foreach):
    """Of two dtypes, and one with another layout in memory."""
    for kwargs in inputs(info, foreach):
        params = [
            Parameter(torch.randn(3, 4, dtype=torch.float64)),
            Parameter(torch.randn(3, 4, dtype=torch.float32)),
            Parameter(torch.randn(4, 3, dtype=torch.float32).t()),
        ]
        before = [p.detach().clone() for p in params]
        together = info.optim_cls(params, **kwargs)
        alone = [Parameter(p.detach().clone(memory_format=torch.preserve_format)) for p in params]
        separate = [info.optim_cls([p], **copy.deepcopy(kwargs)) for p in alone]
        for _ in range(3):
            for p, q in zip(params, alone):
                p.grad, q.grad = p.detach() * 0.3, q.detach() * 0.3
            for opt in (together, *separate):
                opt.step()
        for p, q, old in zip(params, alone, before):
            torch.testing.assert_close(p, q, rtol=1e-6 if p.dtype == torch.float32 else 1e-12, atol=1e-7)
            assert not torch.equal(p, old)


@each
def test_errors_are_torchs(info):
    for bad in info.optim_error_inputs_func("cpu", torch.float64):
        made = bad.optimizer_error_input
        params = [Parameter(torch.randn(1, dtype=torch.float64))] if made.params is None else made.params
        says = SAYS.get(bad.error_regex, bad.error_regex)
        if issubclass(bad.error_type, Warning):
            with pytest.warns(bad.error_type, match=says):
                info.optim_cls(params, **made.kwargs)
            continue
        with pytest.raises(bad.error_type, match=says):
            info.optim_cls(params, **made.kwargs)
