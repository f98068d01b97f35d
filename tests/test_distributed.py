"""Several processes against one: torch.distributed's gloo, on this machine."""

import pytest
import torch
from processes import in_two_processes
from torch import nn

from deepkd_plugin.optim import DecoupledMomentumSGD

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


def train(momenta, mine=slice(None), scale=8, processes=1):
    net = network()
    opt = DecoupledMomentumSGD(net.parameters(), 0.05, MOMENTA[momenta], 0.01, "tcg")
    for step in range(5):
        opt.zero_grad()
        opt.backward(losses(net, batch(step)[mine], scale))
        if processes > 1:
            opt.average_gradients()
        opt.step()
    return net.state_dict(), [p.grad is None for p in net.parameters()]


def share(rank, momenta):
    return train(momenta, slice(4 * rank, 4 * rank + 4), 4, 2)


@pytest.mark.parametrize("momenta", MOMENTA)
def test_two_processes_train_as_one(tmp_path, momenta):
    expected, without = train(momenta)
    for state, missing in in_two_processes(share, tmp_path, momenta):
        assert missing == without
        assert sum(missing) == 2
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=1e-12, atol=1e-12)
