from types import SimpleNamespace

import numpy as np
import pytest
import torch

from deepkd_plugin.topk import (
    TopKSchedule,
    TopP,
    count_classes,
    mask_size,
    non_target_index,
    recorded,
    shown,
    top_k_index,
    top_k_mask,
    top_p,
)


def test_non_target_index_lists_the_other_classes():
    assert non_target_index(torch.tensor([0, 2, 3]), 4).tolist() == [[1, 2, 3], [0, 1, 3], [0, 1, 2]]


def test_top_k_index_never_holds_the_target():
    teacher = torch.tensor([[9.0, 5.0, 7.0, 1.0], [0.0, 1.0, 2.0, 3.0]])
    target = torch.tensor([0, 1])
    assert top_k_index(teacher, target, 2).tolist() == [[2, 1], [3, 2]]
    assert top_k_mask(teacher, target, 2).tolist() == [[False, True, True, False], [False, False, True, True]]


@pytest.mark.parametrize("k", [0, 4, -1, 1.0, True, np.True_, np.float32(1), np.int8(4), "1", None])
def test_k_out_of_range(k):
    with pytest.raises(ValueError, match="K must be an integer from 1 to 3"):
        top_k_mask(torch.zeros(1, 4), torch.tensor([0]), k)


def test_every_phase_edge():
    schedule = TopKSchedule(100, initial=0.05, optimal=0.5, phases=(0.25, 0.75))
    edges = {0.0: 5, 0.125: 28, 0.25: 50, 0.5: 50, 0.75: 50, 0.875: 74, 1.0: 99}
    assert {u: schedule(u) for u in edges} == edges  # 27.5 and 74.5 are rounded to even
    assert schedule(0.25 - 1e-9) == 50
    assert schedule(0.75 + 1e-9) == 50


def test_defaults_are_five_percent_half_and_thirds():
    schedule = TopKSchedule(1000)
    assert (schedule(0), schedule(1 / 3), schedule(2 / 3), schedule(1)) == (50, 500, 500, 999)


def test_it_never_shrinks_and_stays_in_range():
    for classes in (2, 3, 10, 100):
        schedule = TopKSchedule(classes)
        sizes = [schedule(i / 1000) for i in range(1001)]
        assert sizes == sorted(sizes)
        assert sizes[0] >= 1
        assert sizes[-1] == classes - 1


def test_phases_can_be_left_out():
    no_easy = TopKSchedule(100, 5, 50, (0.0, 0.5))
    assert no_easy(0.0) == 50
    no_hard = TopKSchedule(100, 5, 50, (0.5, 1.0))
    assert no_hard(1.0) == 50


def test_counts_and_fractions():
    assert count_classes(7, 100) == 7
    assert count_classes(0.07, 100) == 7
    assert count_classes(1.0, 100) == 99  # all classes: all but the target
    assert count_classes(0.001, 100) == 1
    assert TopKSchedule(100, initial=1, optimal=99)(0.0) == 1


def test_numpys_integers_count_as_pythons():
    schedule = TopKSchedule(np.int64(100), np.int32(5), np.uint8(50), np.array([0.25, 0.75]))
    assert [schedule(np.float64(u)) for u in (0.0, 0.125, 1.0)] == [5, 28, 99]
    assert repr(schedule) == repr(TopKSchedule(100, 5, 50, (0.25, 0.75)))
    assert {type(schedule(u)) for u in (0.0, 0.125, 0.5, 1.0)} == {int}
    assert count_classes(np.float32(0.07), 100) == 7
    assert top_k_index(torch.zeros(1, 4), torch.tensor([0]), np.int64(2)).shape == (1, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"initial": 0}, "K must be an integer from 1 to 99"),
        ({"optimal": 100}, "K must be an integer from 1 to 99"),
        ({"initial": 0.0}, r"a fraction of the classes must be in \(0, 1\]"),
        ({"optimal": 1.5}, r"a fraction of the classes must be in \(0, 1\]"),
        ({"initial": 60, "optimal": 0.5}, "initial K 60 .* exceeds optimal K 50"),
        ({"phases": (0.6, 0.4)}, "phases must be two ends in order"),
        ({"phases": (0.5, 0.5)}, "phases must be two ends in order"),
        ({"phases": (-0.1, 0.5)}, "phases must be two ends in order"),
        ({"phases": (0.5, 1.1)}, "phases must be two ends in order"),
        ({"phases": (0.5,)}, "phases must be two ends in order"),
        ({"num_classes": 1}, "num_classes must be an integer from 2 on"),
        ({"num_classes": 10.0}, "num_classes must be an integer from 2 on"),
        ({"initial": True}, "K must be an integer from 1 to 99"),
        ({"initial": np.True_}, r"a fraction of the classes must be in \(0, 1\]"),
    ],
)
def test_bad_schedules(arguments, message):
    with pytest.raises(ValueError, match=message):
        TopKSchedule(**({"num_classes": 100} | arguments))


@pytest.mark.parametrize("progress", [-0.01, 1.01, float("nan")])
def test_progress_outside_training(progress):
    with pytest.raises(ValueError, match=r"progress must be in .* such as epoch / \(epochs - 1\)"):
        TopKSchedule(100)(progress)


def log_q(*rows):
    return torch.tensor(rows, dtype=torch.float64).log()


def test_top_p_keeps_the_fewest_classes_that_hold_the_share():
    rows = log_q([0.1, 0.6, 0.1, 0.2], [0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0])
    kept = {share: top_p(rows, share).long().tolist() for share in (0.01, 0.6, 0.61, 0.8, 0.95, 1.0)}
    uniform = [[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]
    peaked = [[0, 1, 0, 0], [0, 1, 0, 0], [0, 1, 0, 1], [0, 1, 0, 1], [1, 1, 1, 1], [1, 1, 1, 1]]
    for wanted, first, second in zip(kept.values(), peaked, uniform):
        assert wanted[:2] == [first, second]
    assert kept[0.95][2] == [1, 0, 0, 0]
    assert kept[1.0][2] == [1, 1, 1, 1]  # also classes of probability 0


def test_top_p_is_the_smallest_set_by_a_search_over_all_sizes():
    torch.manual_seed(0)
    rows = torch.log_softmax(3 * torch.randn(64, 40, dtype=torch.float64), 1)
    for share in (0.05, 0.5, 0.9, 0.999):
        kept = top_p(rows, share)
        mass = torch.where(kept, rows.exp(), 0.0).sum(1)
        assert (mass >= share - 1e-12).all()
        smallest = torch.where(kept, rows.exp(), 2.0).amin(1)
        assert (mass - smallest < share).all()  # one class less would not do
        largest_left = torch.where(kept, -1.0, rows.exp()).amax(1)
        assert (smallest >= largest_left).all()


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, float("nan")])
def test_a_share_out_of_range(share):
    with pytest.raises(ValueError, match=r"a share of the mass must be in \(0, 1\]"):
        top_p(torch.zeros(1, 4), share)


def test_the_share_goes_through_the_phases_to_all():
    mask = SimpleNamespace(TYPE="top_p", INITIAL=0.3, OPTIMAL=0.8, PHASES=(0.25, 0.75))
    edges = {0.0: 0.3, 0.125: 0.55, 0.25: 0.8, 0.5: 0.8, 0.75: 0.8, 0.875: 0.9, 1.0: 1.0}
    for progress, share in edges.items():
        assert mask_size(mask, 100, progress) == (pytest.approx(share),)
    assert mask_size(mask, 100, 1.0) == TopP(1.0)


def test_what_a_mask_keeps_is_recorded_and_shown():
    assert [recorded(kept) for kept in (None, 5, TopP(0.25))] == [{}, {"top_k": 5}, {"top_p": 0.25}]
    assert [shown({"loss": 1.0} | recorded(kept)) for kept in (None, 1000, TopP(1 / 3))] == ["", " K 1000", " p 0.3333"]
