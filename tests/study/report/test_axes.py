import pytest

from deepkd_plugin.study.report.axes import signed_tick, spread, tick, ticks


@pytest.mark.parametrize(
    ("low", "high", "most", "wanted"),
    [
        (0.0, 1.0, 6, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (-0.3, 3.6, 6, [0.0, 1.0, 2.0, 3.0]),
        (51.0, 77.0, 8, [55.0, 60.0, 65.0, 70.0, 75.0]),
        (1.0, 240.0, 5, [50.0, 100.0, 150.0, 200.0]),
        (5.0, 5.0, 5, [5.0]),
    ],
)
def test_ticks_are_round_and_few(low, high, most, wanted):
    assert ticks(low, high, most) == pytest.approx(wanted)


@pytest.mark.parametrize("span", [1e-4, 0.03, 1.0, 7.7, 1234.5])
def test_ticks_lie_within_their_range(span):
    found = ticks(-span / 3, span, 6)

    assert 2 <= len(found) <= 6
    assert -span / 3 <= found[0]
    assert found[-1] <= span


def test_tick_labels_have_the_digits_of_their_step():
    assert [tick(value, [0.0, 0.5, 1.0]) for value in (0.0, 0.5)] == ["0.0", "0.5"]
    assert tick(20.0, [10.0, 20.0]) == "20"
    assert [signed_tick(value, [-1.0, 0.0, 1.0]) for value in (-1.0, 0.0, 1.0)] == ["−1", "0", "+1"]


def test_labels_keep_their_place_where_there_is_room():
    assert spread([10.0, 500.0, 90.0], 20.0, 0.0, 1000.0) == [10.0, 500.0, 90.0]


def test_labels_that_would_overlap_are_moved_apart_in_their_order():
    placed = spread([990.0, 985.0, 100.0, 995.0], 50.0, 0.0, 1000.0)

    assert placed == [950.0, 900.0, 100.0, 1000.0]
