"""Gradients that two processes sum in buckets, or average, against one process: torch.distributed's gloo."""

import torch
import torch.distributed as dist
from processes import in_two_processes
from torch import nn

from deepkd_plugin.distributed import buckets
from deepkd_plugin.optim import DecoupledAdamW, DecoupledMomentumSGD

MOMENTA = {
    "apart": {"tog": 0.9, "tcg": 0.5, "ncg": 0.7},
    "equal": dict.fromkeys(("tog", "tcg", "ncg"), 0.9),
}


def network():
    torch.manual_seed(0)
    # a branch for one sign of the first number, so that a process may have no gradient for it; one is never used
    return nn.ModuleDict({name: nn.Linear(3, 2).double() for name in ("all", "some", "none")})


def batch(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    x[:, 0] = x[:, 0].abs()
    x[:4, 0] *= -1  # the first process's half
    return x


def losses(net, x, scale):
    out = net["all"](x)
    by_stream = {
        "tog": out.square().sum() / scale,
        "tcg": out.sin().sum() / scale,
        "ncg": out[:, 0].sum() / scale,
    }
    chosen = x[x[:, 0] > 0]
    if len(chosen):
        by_stream["ncg"] = by_stream["ncg"] + net["some"](chosen).square().sum() / scale
    return by_stream


def make_sgd(params, momenta):
    return DecoupledMomentumSGD(params, 0.05, momenta, 0.01, "tcg")


def make_adamw(params, momenta):
    return DecoupledAdamW(params, 0.05, momenta, eps=1e-3)


RUNS = [(make, momenta) for make in (make_sgd, make_adamw) for momenta in MOMENTA]


def train(run, mine=slice(None), scale=8, processes=1, sum_over=None):
    net = network()
    make, momenta = run
    opt = make(net.parameters(), MOMENTA[momenta])
    for step in range(5):
        opt.zero_grad()
        by_stream = losses(net, batch(step)[mine], scale)
        # in two calls, of which the first is of this process alone
        opt.backward({"tog": 0.25 * by_stream["tog"], "ncg": 0.5 * by_stream["ncg"]}, retain_graph=True)
        rest = by_stream | {"tog": 0.75 * by_stream["tog"], "ncg": 0.5 * by_stream["ncg"]}
        opt.backward(rest, sum_over=sum_over)
        if processes > 1 and sum_over is None:
            opt.average_gradients()
        opt.step()
    return net.state_dict(), [p.grad is None for p in net.parameters()]


def share(rank):
    buckets.BUCKET = 40  # so that there are several
    mine = slice(4 * rank, 4 * rank + 4)
    return {
        how: [train(run, mine, *scaled) for run in RUNS]
        for how, scaled in {"averaged": (4, 2), "summed": (8, 2, dist.group.WORLD)}.items()
    }


def test_two_processes_train_as_one(tmp_path):
    """They average their gradients between backward and step, or sum them while the passes go on."""
    expected = [train(run) for run in RUNS]
    for of_process in in_two_processes(share, tmp_path):
        for how, results in of_process.items():
            for (state, missing), (whole, without) in zip(results, expected):
                assert missing == without, how
                assert sum(missing) == 2
                for name, value in whole.items():
                    torch.testing.assert_close(state[name], value, rtol=1e-12, atol=1e-12)


def test_buckets_are_reduced_while_the_passes_go_on(monkeypatch):
    """A layer is a bucket here; the second stream's pass begins while the first one's sums are on their way."""
    monkeypatch.setattr(buckets, "BUCKET", 40)
    events = []
    monkeypatch.setattr(dist, "all_reduce", lambda flat, group, async_op: events.append((group, async_op)))
    net = nn.Sequential(*(nn.Linear(3, 3).double() for _ in range(3)))
    for number, layer in enumerate(net):
        layer.weight.register_hook(lambda gradient, number=number: events.append(number))
    opt = DecoupledMomentumSGD(net.parameters(), 0.05, {"tog": 0.9, "ncg": 0.5})
    out = net(torch.ones(2, 3, dtype=torch.float64))
    opt.backward({"tog": out.sum(), "ncg": out.sin().sum()}, sum_over="streams")
    reduced = ("streams", True)
    assert events == [2, reduced, 1, reduced, 0, reduced] * 2


def test_sums_are_views_of_the_buckets(monkeypatch):
    def doubled(flat, group, async_op):
        flat.mul_(2)

    monkeypatch.setattr(dist, "all_reduce", doubled)
    net = nn.Sequential(nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), nn.Linear(3, 2))
    loss, params = net(torch.ones(1, 3, 5, 5)).square().sum(), list(net.parameters())
    expected = torch.autograd.grad(loss, params, retain_graph=True)
    sums = buckets.Summation(params, {})
    with sums.following():
        torch.autograd.grad(loss, params)
    (bucket,) = sums.buckets
    for p, summed, one in zip(params, sums.finish(), expected):
        torch.testing.assert_close(summed, 2 * one)
        assert summed.untyped_storage().data_ptr() == bucket.flat.untyped_storage().data_ptr()
        assert summed.stride() == p.stride()
