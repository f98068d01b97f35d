"""DecoupledAdamW: torch.optim.AdamW where all momenta are equal, its own formula where they are not."""

import copy
import io

import pytest
import torch

from deepkd_plugin import DecoupledAdamW, DecoupledMomentumSGD, backward

F64 = torch.float64
SHAPES = ((2, 3), (4,), (2, 2, 2))
APART = {"tog": 0.975, "tcg": 0.825, "ncg": 0.95}
PAIRED = {"tog": 0.9, "tcg": 0.5, "ncg": 0.9}
EQUAL = dict.fromkeys(APART, 0.9)


def random_params(dtype=F64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator, dtype=F64).to(dtype).requires_grad_() for s in SHAPES]


def gradients(step, stream, dtype=F64):
    generator = torch.Generator().manual_seed(100 * step + stream + 7)
    return [torch.randn(s, generator=generator, dtype=F64).to(dtype) for s in SHAPES]


def losses(opt, params, step, streams=None, scale=1.0):
    """Losses by stream whose gradients are those of `gradients`."""
    return {
        name: sum((p * g).sum() for p, g in zip(params, gradients(step, i, params[0].dtype))) * scale
        for i, name in enumerate(opt.streams)
        if streams is None or name in streams
    }


def train(opt, params, steps=6, start=0, streams=None):
    for step in range(start, start + steps):
        opt.zero_grad()
        opt.backward(losses(opt, params, step, streams))
        opt.step()
    return params


def formula(momenta, steps, lr=0.1, beta2=0.99, eps=1e-3, decay=0.05, sign=1.0):
    """The update written out, in Python's numbers where they are numbers. momenta: step -> {stream: m}."""
    params = [p.detach() for p in random_params()]
    means = {}
    squares = [torch.zeros_like(p) for p in params]
    for step in range(steps):
        n, momentum = step + 1, momenta(step)
        by_stream = [[sign * g for g in gradients(step, i)] for i in range(len(momentum))]
        for j, p in enumerate(params):
            squares[j] = beta2 * squares[j] + (1 - beta2) * sum(gs[j] for gs in by_stream) ** 2
            root = (squares[j] / (1 - beta2**n)).sqrt() + eps
            move = lr * decay * p
            for gs, (stream, m) in zip(by_stream, momentum.items()):
                means[stream, j] = m * means.get((stream, j), torch.zeros_like(p)) + (1 - m) * gs[j]
                move = move + lr * means[stream, j] / (1 - m**n) / root
            params[j] = p - move
    return params


def make(params, momentum, **options):
    return DecoupledAdamW(params, 0.1, momentum, 0.99, 1e-3, 0.05, **options)


def assert_close(ours, theirs, tolerance=1e-12):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("maximize", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16])
@pytest.mark.parametrize("momentum", [0.9, EQUAL, {"a": 0.0, "b": 0.0}])
def test_equal_momenta_are_adamw_bit_for_bit(foreach, maximize, decay, dtype, momentum):
    ours, theirs = random_params(dtype), random_params(dtype)
    opt = DecoupledAdamW(ours, 0.1, momentum, 0.99, 1e-3, decay, foreach=foreach, maximize=maximize)
    beta1 = next(iter(opt.param_groups[0]["momentum"].values()))
    options = {"betas": (beta1, 0.99), "eps": 1e-3, "weight_decay": decay, "maximize": maximize, "foreach": foreach}
    plain = torch.optim.AdamW(theirs, 0.1, **options)
    for step in range(8):
        for one in (opt, plain):
            one.param_groups[0]["lr"] = 0.1 if step < 5 else 0.03
            one.zero_grad()
        opt.backward(losses(opt, ours, step))
        sum(losses(opt, theirs, step).values()).backward()
        opt.step()
        plain.step()
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    for p, q in zip(ours, theirs):
        state = opt.state[p]
        assert torch.equal(state["exp_avg_sq"], plain.state[q]["exp_avg_sq"])
        assert torch.equal(state["momentum_buffer_" + "+".join(opt.streams)], plain.state[q]["exp_avg"])
        assert state["step"] == 8


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("capturable", [True, False])
@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("maximize", [True, False])
@pytest.mark.parametrize("momentum", [APART, PAIRED, EQUAL, {"tog": 0.0, "tcg": 0.5, "ncg": 0.0}])
def test_follows_the_formula(foreach, capturable, merge, maximize, momentum):
    params = random_params()
    opt = make(params, momentum, foreach=foreach, capturable=capturable, merge=merge, maximize=maximize)
    theirs = formula(lambda step: momentum, 6, sign=-1.0 if maximize else 1.0)
    # of a captured step the bias corrections are float32
    assert_close(train(opt, params), theirs, 1e-6 if capturable else 1e-12)


def test_momenta_that_come_apart_are_exact_from_the_first_step_without_merging():
    def momenta(step):
        return EQUAL if step < 3 else APART

    params = random_params()
    opt = make(params, EQUAL, merge=False)
    for step in range(6):
        opt.param_groups[0]["momentum"] = momenta(step)
        train(opt, params, 1, step)
    assert_close(params, formula(momenta, 6))


def test_streams_that_meet_add_their_means_and_share_them_when_they_part():
    params = random_params()
    opt = make(params, APART)
    train(opt, params, 3)
    before = {name: opt.state[params[0]][f"momentum_buffer_{name}"].clone() for name in APART}
    opt.param_groups[0]["momentum"] = EQUAL
    mean = 0.9 * sum(before.values()) + 0.1 * sum(gradients(3, i)[0] for i in range(3))
    train(opt, params, 1, 3)
    torch.testing.assert_close(opt.state[params[0]]["momentum_buffer_tog+tcg+ncg"], mean)
    opt.param_groups[0]["momentum"] = APART
    train(opt, params, 1, 4)
    state = opt.state[params[0]]
    assert sorted(state) == sorted(["step", "exp_avg_sq", *(f"momentum_buffer_{name}" for name in APART)])
    torch.testing.assert_close(state["momentum_buffer_tog"], 0.975 * mean / 3 + 0.025 * gradients(4, 0)[0])


@pytest.mark.parametrize("momentum", [APART, PAIRED, EQUAL])
@pytest.mark.parametrize("capturable", [True, False])
def test_foreach_equals_single(momentum, capturable):
    """Also where streams reach only some parameters, where one has no gradient, and where one starts later."""
    runs = []
    for foreach in (True, False):
        params = random_params(torch.float32)
        opt = make(params, momentum, foreach=foreach, capturable=capturable)
        for step in range(6):
            opt.zero_grad()
            by_stream = losses(opt, params, step)
            by_stream["ncg"] = (params[0] * gradients(step, 2, torch.float32)[0]).sum()
            if step < 2:
                by_stream = {name: (params[0] * params[0]).sum() for name in by_stream}
            opt.backward(by_stream)
            opt.step()
        runs.append(params)
        assert [int(opt.state[p]["step"]) for p in params] == [6, 4, 4]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_equal_streams_cost_one_backward_pass(monkeypatch):
    calls = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(1) or grad(*a, **k))
    for momentum, passes in ((EQUAL, 1), (PAIRED, 2), (APART, 3)):
        params = random_params()
        calls.clear()
        train(make(params, momentum), params, 1)
        assert len(calls) == passes


def test_a_stream_that_is_left_out_has_gradient_zero():
    params, others = random_params(), random_params()
    opt, full = make(params, APART), make(others, APART)
    for step in range(4):
        train(opt, params, 1, step, ["tog", "ncg"])
        full.zero_grad()
        full.backward(losses(full, others, step) | {"tcg": sum((p * 0).sum() for p in others)})
        full.step()
    assert_close(params, others)


def test_clipping_scales_every_stream_and_the_second_moment():
    params, others = random_params(), random_params()
    opt, scaled = make(params, APART), make(others, APART)
    for step in range(3):
        opt.zero_grad()
        opt.backward(losses(opt, params, step))
        norm = opt.clip(lambda ps: torch.nn.utils.clip_grad_norm_(ps, 0.5))
        opt.step()
        scaled.zero_grad()
        scaled.backward(losses(scaled, others, step, scale=0.5 / (float(norm) + 1e-6)))
        scaled.step()
    assert_close(params, others, 1e-9)


@pytest.mark.parametrize("momentum", [APART, EQUAL])
def test_a_gradscaler_steps_it_and_skips_a_step_that_overflows(momentum):
    params, others = random_params(torch.float32), random_params(torch.float32)
    opt, plain = make(params, momentum), make(others, momentum)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(4):
        overflows = step == 2
        opt.zero_grad()
        by_stream = losses(opt, params, step)
        opt.backward(
            {name: scaler.scale(loss) * (float("inf") if overflows else 1) for name, loss in by_stream.items()}
        )
        before = copy.deepcopy(opt.state_dict()["state"])
        scaler.step(opt)
        scaler.update()
        if overflows:
            after = opt.state_dict()["state"]
            assert all(torch.equal(before[i][k], after[i][k]) for i in before for k in before[i])
        else:
            train(plain, others, 1, step)
    assert scaler.get_scale() == 2.0**9
    assert_close(params, others, 1e-6)


def test_collect_takes_a_backward_of_ones_own():
    params, others = random_params(), random_params()
    opt, plain = make(params, APART), make(others, APART)
    for step in range(3):
        opt.zero_grad()
        for name, loss in losses(opt, params, step).items():
            loss.backward()
            opt.collect(name)
        opt.step()
        train(plain, others, 1, step)
    assert_close(params, others)


def test_a_wrapper_finds_it():
    params, others = random_params(), random_params()
    opt, plain = make(params, APART), make(others, APART)

    class Wrapper:
        optimizer = opt

    backward(Wrapper(), losses(opt, params, 0))
    opt.step()
    train(plain, others, 1)
    assert_close(params, others)


@pytest.mark.parametrize("momentum", [APART, PAIRED, EQUAL])
def test_a_state_goes_on_bit_for_bit(momentum):
    params = random_params(torch.float32)
    opt = make(params, momentum)
    train(opt, params, 3)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    others = [p.detach().clone().requires_grad_() for p in params]
    again = make(others, EQUAL)
    file.seek(0)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert again.param_groups[0]["momentum"] == momentum
    copied = copy.deepcopy(again)
    assert copied.state_dict()["state"].keys() == again.state_dict()["state"].keys()
    assert all(torch.equal(a, b) for a, b in zip(train(opt, params, 3, 3), train(again, others, 3, 3)))


def test_a_state_takes_the_parameters_dtype_but_for_the_steps():
    params = random_params(torch.float32)
    opt = make(params, APART)
    train(opt, params, 2)
    narrow = random_params(torch.bfloat16)
    again = make(narrow, APART, capturable=True)
    again.load_state_dict(opt.state_dict())
    state = again.state[narrow[0]]
    assert again.param_groups[0]["capturable"] is True
    assert {key: value.dtype for key, value in state.items()} == {
        key: torch.float32 if key == "step" else torch.bfloat16 for key in state
    }
    train(again, narrow, 1, 2)


@pytest.mark.parametrize("kind", ["SGD", "AdamW", "no step", "no mean"])
def test_other_states_are_refused(kind):
    params = random_params()
    opt = make(params, APART)
    train(opt, params, 1)
    state = copy.deepcopy(opt.state_dict())
    if kind == "SGD":
        others = random_params()
        sgd = DecoupledMomentumSGD(others, 0.1, APART, 0.0, "tog")
        state = train(sgd, others, 1) and sgd.state_dict()
        with pytest.raises(ValueError, match="it must have a tensor of that shape for each of the streams"):
            sgd.load_state_dict(opt.state_dict())
    elif kind == "AdamW":
        others = random_params()
        plain = torch.optim.AdamW(others)
        sum(p.sum() for p in others).backward()
        plain.step()
        state = plain.state_dict()
    else:
        del state["state"][1]["step" if kind == "no step" else "momentum_buffer_tcg"]
    with pytest.raises(ValueError, match="the streams|must have a tensor"):
        opt.load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta2": 1.0}, r"beta2 must be in \[0, 1\), got 1.0"),
        ({"beta2": "0.9"}, "beta2 must be in"),
        ({"eps": -1e-8}, "eps must be at least 0 and finite"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0"),
        ({"lr": float("nan")}, "lr must be at least 0"),
        ({"momentum": {"a": 1.0}}, r"momentum of stream 'a' must be in \[0, 1\)"),
        ({"momentum": {}}, "momentum must map stream names"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        DecoupledAdamW(random_params(), **options)


def test_what_is_refused_leaves_everything_as_it_was():
    params = random_params()
    opt = make(params, APART)
    train(opt, params, 1)
    before, state = [p.detach().clone() for p in params], copy.deepcopy(opt.state_dict())
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="the gradients by stream are not"):
        opt.step()
    opt.param_groups[0]["beta2"] = 2.0
    with pytest.raises(ValueError, match="beta2"):
        opt.step()
    assert all(torch.equal(p, old) for p, old in zip(params, before))
    after = opt.state_dict()["state"]
    assert all(torch.equal(after[i][k], v) for i, own in state["state"].items() for k, v in own.items())
    table = torch.nn.Embedding(4, 2, sparse=True)
    one = DecoupledAdamW(table.parameters())
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="DecoupledAdamW does not take sparse gradients"):
        one.step()


def test_groups_have_their_own_options():
    params, others = random_params(), random_params()
    opt = DecoupledAdamW(
        [{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.0, "beta2": 0.9, "eps": 1e-4}], momentum=APART
    )
    parts = [
        DecoupledAdamW(others[:1], momentum=APART),
        DecoupledAdamW(others[1:], momentum=APART, weight_decay=0.0, beta2=0.9, eps=1e-4),
    ]
    for step in range(3):
        train(opt, params, 1, step)
        for part in parts:
            part.zero_grad()
            own = losses(part, others, step)
            part.backward(own)
            part.step()
    assert_close(params, others)


def test_a_cycle_of_momenta_keeps_their_ratio():
    params = random_params()
    opt = make(params, PAIRED)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, total_steps=8, base_momentum=0.8, max_momentum=0.9)
    for step in range(4):
        train(opt, params, 1, step)
        momentum = opt.param_groups[0]["momentum"]
        schedule.step()
        assert momentum["tcg"] / momentum["tog"] == pytest.approx(5 / 9)


@pytest.mark.parametrize("foreach", [True, False])
def test_state_stays_in_place_for_a_captured_step(foreach):
    params = random_params()
    opt = make(params, PAIRED, capturable=True, foreach=foreach)
    train(opt, params, 1)
    places = [value.data_ptr() for p in params for value in opt.state[p].values()]
    train(opt, params, 3, 1)
    assert [value.data_ptr() for p in params for value in opt.state[p].values()] == places


@pytest.mark.slow
def test_neither_the_rate_nor_the_steps_are_constants_of_a_compiled_step():
    params, others = random_params(torch.float32), random_params(torch.float32)
    opt, plain = make(params, APART), make(others, APART)
    compilations = []

    def count(module, inputs):
        compilations.append(1)
        return module.forward

    step = torch.compile(opt.step, backend=count)
    seen = []
    for i in range(5):
        opt.param_groups[0]["lr"] = torch.tensor(0.1 / (i + 1))
        plain.param_groups[0]["lr"] = 0.1 / (i + 1)
        opt.zero_grad()
        opt.backward(losses(opt, params, i))
        step()
        train(plain, others, 1, i)
        seen.append(len(compilations))
    assert seen[1] == seen[-1] > 0
    assert_close(params, others, 1e-5)
