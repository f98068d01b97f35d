"""Compiled and captured steps are the eager one under what a config changes of a method's terms."""

import pytest
import torch
from captures import Captures
from test_speed import MOMENTUM, Toy, assert_same, run
from torch import nn

from deepkd_plugin import config, device, speed
from deepkd_plugin.distillers import DISTILLERS
from deepkd_plugin.hosts import builtin
from deepkd_plugin.optim import DecoupledMomentumSGD

CHANGED = {
    "entropy weights": ("DISTILLER.ENTROPY_WEIGHT", "formula"),
    "top-p mask": ("DeepKD.MASK.TYPE", "top_p", "DeepKD.MASK.INITIAL", 0.6, "DeepKD.MASK.OPTIMAL", 0.8),
}
"""What is changed, and the options."""


class Plain(nn.Module):
    """Toy's network as a host's: logits and features."""

    def __init__(self):
        super().__init__()
        self.network = Toy().student

    def forward(self, image):
        return self.network(image), {}


def step_of(kind, method, options):
    cfg = builtin.CFG.clone()
    config.add_deepkd_config(cfg)
    cfg.merge_from_list([*options])
    student, teacher = Plain(), Plain().requires_grad_(False)
    for p in teacher.parameters():
        p.mul_(1.5)
    module = DISTILLERS[method](student, teacher, cfg).train()
    optimizer = DecoupledMomentumSGD(module.get_learnable_parameters(), 0.1, MOMENTUM, 1e-2, "tcg")

    def by_stream(losses):
        return losses if "tog" in losses else {"tog": sum(losses.values())}

    return kind(module, optimizer, by_stream, False, torch.device("cpu"))


@pytest.mark.parametrize("what", CHANGED)
def test_a_compiled_step_is_the_eager_one(monkeypatch, capsys, what):
    monkeypatch.setattr(device, "compile_options", lambda at: {"backend": "aot_eager"})
    plain, options = step_of(speed.Step, "DeepKD", ()), CHANGED[what]
    eager, compiled = (step_of(kind, "DeepKD", options) for kind in (speed.Step, speed.CompiledStep))
    taken = run(eager, 1, (6, 6))
    assert sum(taken[2:4]) != sum(run(plain, 1, (6, 6))[2:4])  # the option does something
    assert_same(taken, run(compiled, 1, (6, 6)), 1e-10)
    assert (compiled.name, capsys.readouterr().out) == ("compile", "")


@pytest.mark.parametrize("what", CHANGED)
def test_a_captured_step_is_the_eager_one(monkeypatch, capsys, what):
    monkeypatch.setattr(device, "Captures", Captures)
    monkeypatch.setattr(Captures, "made", [])
    eager, graphed = (step_of(kind, "DeepKD", CHANGED[what]) for kind in (speed.Step, speed.GraphedStep))
    assert_same(run(eager, 2), run(graphed, 2))
    assert (graphed.name, capsys.readouterr().out) == ("graphs", "")
    assert Captures.made[0].count > 0
