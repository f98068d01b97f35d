import numpy as np
import pytest
import torch

from deepkd_plugin.topk import TopKSchedule, count_classes, non_target_index, top_k_index, top_k_mask


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
    with pytest.raises(ValueError, match="progress must be in"):
        TopKSchedule(100)(progress)
