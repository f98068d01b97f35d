import itertools
import math

import pytest
import torch
from yacs.config import CfgNode

from deepkd_plugin.run.schedule import lr_factor, make_scheduler, set_rate, warmup_point

STEP = {
    "LR": 0.05,
    "EPOCHS": 240,
    "LR_SCHEDULE": "step",
    "WARMUP_EPOCHS": 0,
    "WARMUP_START": 0.1,
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


def test_warm_up_rises_from_its_start():
    used = rates(COSINE | {"WARMUP_START": 0.001, "WARMUP_EPOCHS": 5})
    assert used[:5] == pytest.approx([0.2 * (0.001 + 0.999 * epoch / 5) for epoch in range(1, 6)], rel=1e-12)
    assert lr_factor(CfgNode(COSINE | {"WARMUP_START": 0.0}), 0) == 0.0


def test_cosine_without_warm_up_starts_below_the_top_and_ends_at_the_floor():
    solver = CfgNode(COSINE | {"WARMUP_EPOCHS": 0})
    assert lr_factor(solver, 1) < 1.0
    assert lr_factor(solver, 100) * 0.2 == pytest.approx(5e-5)


def test_warm_up_of_one_epoch_is_none_by_epoch_and_one_by_iteration():
    solver = CfgNode(STEP | {"WARMUP_EPOCHS": 1})
    assert lr_factor(solver, 1) == 1.0
    points = [warmup_point("iteration", 1, 1, step, 4) for step in (1, 2, 3, 4)]
    assert [lr_factor(solver, point) for point in points] == pytest.approx([0.325, 0.55, 0.775, 1.0])


@pytest.mark.parametrize("settings", [STEP | {"WARMUP_EPOCHS": 3}, COSINE])
def test_both_units_agree_at_the_end_of_an_epoch_and_after_warm_up(settings):
    solver = CfgNode(settings)
    for epoch in range(1, solver.EPOCHS + 1):
        points = [warmup_point("iteration", solver.WARMUP_EPOCHS, epoch, step, 7) for step in range(1, 8)]
        assert points[-1] == epoch
        rates = [lr_factor(solver, point) for point in points]
        assert rates[-1] == lr_factor(solver, epoch)
        if epoch > solver.WARMUP_EPOCHS:
            assert points == [epoch] * 7
        elif epoch < solver.WARMUP_EPOCHS:
            steps = [b - a for a, b in itertools.pairwise(rates)]
            assert steps == pytest.approx([0.9 / solver.WARMUP_EPOCHS / 7] * 6)
        assert [warmup_point("epoch", solver.WARMUP_EPOCHS, epoch, step, 7) for step in range(1, 8)] == [epoch] * 7


def test_only_warm_up_changes_within_an_epoch():
    """The losses' warm-up may be longer than the rate's."""
    for settings, point in ((COSINE, 30.25), (STEP, 150.5), (STEP | {"WARMUP_EPOCHS": 2}, 2.5)):
        solver = CfgNode(settings)
        assert lr_factor(solver, point) == lr_factor(solver, math.ceil(point))


def test_a_rate_is_set_for_every_group_and_the_scheduler_goes_on_by_epochs():
    solver = CfgNode(STEP | {"WARMUP_EPOCHS": 2})
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in (0.1, 0.4)]
    optimizer = torch.optim.SGD(groups)
    scheduler = make_scheduler(optimizer, solver)
    set_rate(scheduler, solver, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.0325, 0.13])
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.4]


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
