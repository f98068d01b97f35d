"""Gradients that are DTensors: whoever writes to their shards leaves no version behind."""

import copy
import itertools

import pytest
import torch
import torch.distributed.checkpoint as checkpoint
import torch.distributed.checkpoint.state_dict as api
from processes import in_two_processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from deepkd_plugin.optim import DecoupledAdamW, DecoupledMomentumSGD

MOMENTA = {"tog": 0.9, "tcg": 0.5, "ncg": 0.7}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def losses(net, x):
    out = net(x)
    return {"tog": out.square().mean(), "tcg": out.sin().mean(), "ncg": out[:, 0].mean()}


def batch(step):
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def clip(params):
    norm = nn.utils.clip_grad_norm_(params, 0.1)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def make_sgd(params):
    return DecoupledMomentumSGD(params, 0.05, MOMENTA, 0.01, "tcg")


def make_adamw(params):
    return DecoupledAdamW(params, 0.05, MOMENTA, eps=1e-3)


MAKERS = make_sgd, make_adamw


def train(make):
    net = network()
    opt = make(net.parameters())
    norms = []
    for step in range(5):
        opt.zero_grad()
        opt.backward(losses(net, batch(step)))
        norms.append(opt.clip(clip).item())
        opt.step()
    return net.state_dict(), norms


def make_sharded(make):
    net = network()
    mesh = init_device_mesh("cpu", (2,))
    for layer in (net[0], net[2], net):
        fully_shard(layer, mesh=mesh)
    return net, make(net.parameters())


def train_sharded(net, opt, rank, steps):
    norms = []
    for step in steps:
        opt.zero_grad(set_to_none=step % 2 == 0)
        by_stream = losses(net, batch(step)[4 * rank : 4 * rank + 4])
        for stream in MOMENTA:
            by_stream[stream].backward(retain_graph=True)
            opt.collect(stream)
        norms.append(clip(net.parameters()).item())  # not by the optimizer's clip
        opt.step()
    return {k: v.full_tensor() for k, v in net.state_dict().items()}, norms


def sharded(rank):
    return [train_sharded(*make_sharded(make), rank, range(5)) for make in MAKERS]


def resumed(rank, folder):
    """(The weights of a run, those of runs resumed from its states by torch.distributed.checkpoint)."""
    results = []
    ways = {}, {"flatten_optimizer_state_dict": True}, {"full_state_dict": True}
    for i, (make, options) in enumerate(itertools.product(MAKERS, ways)):
        options = api.StateDictOptions(**options)
        net, opt = make_sharded(make)
        train_sharded(net, opt, rank, range(3))
        saved = {
            "net": api.get_model_state_dict(net, options=options),
            "opt": api.get_optimizer_state_dict(net, opt, options=options),
        }
        if options.full_state_dict:
            saved = copy.deepcopy(saved)
        else:
            checkpoint.save(saved, checkpoint_id=f"{folder}/{i}")
        expected, _ = train_sharded(net, opt, rank, range(3, 6))
        net, opt = make_sharded(make)
        if not options.full_state_dict:
            saved = {
                "net": api.get_model_state_dict(net, options=options),
                "opt": api.get_optimizer_state_dict(net, opt, options=options),
            }
            checkpoint.load(saved, checkpoint_id=f"{folder}/{i}")
        api.set_model_state_dict(net, saved["net"], options=options)
        api.set_optimizer_state_dict(net, opt, saved["opt"], options=options)
        results.append((expected, train_sharded(net, opt, rank, range(3, 6))[0]))
    return results


def test_streams_are_collected_and_follow_a_foreign_clip(tmp_path):
    runs = [copy.deepcopy(train(make)) for make in MAKERS]
    for of_process in in_two_processes(sharded, tmp_path):
        for (state, measured), (expected, norms) in zip(of_process, runs, strict=True):
            assert min(norms) > 0.15  # so that every step is clipped
            assert measured == pytest.approx(norms, rel=1e-12)
            for name, value in expected.items():
                torch.testing.assert_close(state[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_distributed_checkpoints_of_shards_go_on_alike(tmp_path):
    for results in in_two_processes(resumed, tmp_path, str(tmp_path)):
        assert len(results) == 6
        for expected, state in results:
            for name, value in expected.items():
                assert torch.equal(state[name], value)
