import math

import pytest
import torch
from yacs.config import CfgNode

from deepkd_plugin.run.schedule import lr_factor, make_scheduler

STEP = {
    "LR": 0.05,
    "EPOCHS": 240,
    "LR_SCHEDULE": "step",
    "WARMUP_EPOCHS": 0,
    "MIN_LR": 0.0,
    "LR_DECAY_STAGES": [150, 180, 210],
    "LR_DECAY_RATE": 0.1,
}
COSINE = STEP | {"LR": 0.2, "EPOCHS": 100, "LR_SCHEDULE": "cosine", "WARMUP_EPOCHS": 20, "MIN_LR": 5e-5}


def rates(settings):
    """The rate that an optimizer has in each epoch under our scheduler."""
    solver = CfgNode(settings)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=solver.LR)
    scheduler = make_scheduler(optimizer, solver)
    used = []
    for _ in range(solver.EPOCHS):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return used


def test_step_is_mdistillers_rule_exactly():
    for epoch, rate in enumerate(rates(STEP), start=1):
        steps = sum(epoch > stage for stage in STEP["LR_DECAY_STAGES"])
        assert rate == 0.05 * 0.1**steps


def test_cosine_with_warm_up_is_the_releases_rule():
    used = rates(COSINE)
    for epoch, rate in enumerate(used, start=1):
        if epoch < 20:
            expected = 0.02 + 0.18 * epoch / 20
        else:
            expected = 5e-5 + 0.5 * (0.2 - 5e-5) * (1 + math.cos(math.pi * (epoch - 20) / 80))
        assert rate == pytest.approx(expected, rel=1e-12)
    assert used[0] == pytest.approx(0.029)
    assert used[19] == pytest.approx(0.2)
    assert used[-1] == pytest.approx(5e-5)


def test_cosine_without_warm_up_starts_below_the_top_and_ends_at_the_floor():
    solver = CfgNode(COSINE | {"WARMUP_EPOCHS": 0})
    assert lr_factor(solver, 1) < 1.0
    assert lr_factor(solver, 100) * 0.2 == pytest.approx(5e-5)


def test_state_continues():
    solver = CfgNode(COSINE)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=solver.LR)
    scheduler = make_scheduler(optimizer, solver)
    for _ in range(30):
        optimizer.step()
        scheduler.step()
    again = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=solver.LR)
    other = make_scheduler(again, solver)
    again.load_state_dict(optimizer.state_dict())
    other.load_state_dict(scheduler.state_dict())
    for _ in range(10):
        optimizer.step(), scheduler.step(), again.step(), other.step()
        assert optimizer.param_groups[0]["lr"] == again.param_groups[0]["lr"]
