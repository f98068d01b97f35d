"""torch.compile of `step`: the update is a graph, and a learning rate that is a tensor does not compile it anew."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from deepkd_plugin.optim import DecoupledMomentumSGD

MOMENTA = {"three": {"tog": 0.9, "tcg": 0.5, "ncg": 0.7}, "one": {"task": 0.9}}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()


def train(momenta, compiled, cycled=False, **options):
    """Weights after 5 steps, and how many frames had been compiled after each. cycled: the fourth's momenta differ."""
    torch.manual_seed(0)
    net = nn.Linear(4, 3).double()
    lr = torch.tensor(0.1, dtype=torch.float64)
    opt = DecoupledMomentumSGD(net.parameters(), lr, momenta, 0.01, next(iter(momenta)), **options)
    step, frames = torch.compile(opt.step, backend="aot_eager") if compiled else opt.step, []
    for i in range(5):
        opt.zero_grad()
        out = net(torch.randn(8, 4, dtype=torch.float64))
        opt.backward({name: (out - j).square().mean() for j, name in enumerate(momenta)})
        lr.fill_(0.1 / (1 + i))
        if cycled and i == 3:
            opt.param_groups[0]["momentum"] = 0.6
        step()
        frames.append(counters["frames"]["total"])
    return net.state_dict(), frames


@pytest.mark.parametrize("foreach", [True, False], ids=["foreach", "single"])
@pytest.mark.parametrize("capturable", [True, False], ids=["capturable", "plain"])
@pytest.mark.parametrize("streams", MOMENTA)
def test_a_tensor_rate_changes_without_compiling_again(streams, capturable, foreach):
    options = {"capturable": capturable, "foreach": foreach}
    expected, _ = train(MOMENTA[streams], False, **options)
    state, frames = train(MOMENTA[streams], True, **options)
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=1e-12, atol=1e-12)
    assert frames[1] == frames[-1]  # the first step makes the buffers, the second moves them
    assert counters["stats"]["unique_graphs"] >= 2  # none if the update cannot be traced


def test_a_changed_momentum_reaches_a_compiled_step():
    expected, _ = train(MOMENTA["three"], False, cycled=True)
    state, _ = train(MOMENTA["three"], True, cycled=True)
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=1e-12, atol=1e-12)
