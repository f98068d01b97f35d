import pytest

from deepkd_plugin.study.report.formats import interval, mean_std, p_value, paired, ranges, signed, span
from deepkd_plugin.study.report.statistics import Difference, Summary


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.234, "+1.23"), (-0.5, "−0.50"), (0.001, "0.00"), (-0.001, "0.00"), (10.0, "+10.00")],
)
def test_differences_have_a_sign(value, text):
    assert signed(value) == text


def test_a_span_of_one_is_written_once():
    assert span([1.0]) == "+1.00"
    assert span([1.0, -2.0, 0.5]) == "−2.00 to +1.00"


def test_a_difference_has_its_interval_if_there_is_one():
    assert interval(Difference(1.0, -0.5, 2.5)) == "+1.00 [−0.50,\u00a0+2.50]"
    assert interval(Difference(1.0)) == "+1.00"


def test_a_paired_interval_is_named_and_left_out_if_there_is_none():
    assert paired(Difference(1.0, -0.5, 2.5)) == ("paired\u00a0[−0.50,\u00a0+2.50]",)
    assert paired(Difference(1.0, reason="two runs")) == paired(None) == ()


def test_mean_and_deviation():
    assert mean_std(Summary(3, 76.299, 0.3)) == "76.30\u00a0±\u00a00.30"
    assert mean_std(Summary(1, 76.3, None)) == "76.30"
    assert mean_std(Summary(0, None, None)) == "no runs"


@pytest.mark.parametrize(
    ("p", "text"),
    [(3e-7, "<\u00a00.0001"), (0.00123, "0.0012"), (0.0504, "0.050"), (0.31, "0.31"), (1.0, "1.00")],
)
def test_p_values(p, text):
    assert p_value(p) == text


@pytest.mark.parametrize(("numbers", "text"), [([0, 1, 2], "0–2"), ([4, 0, 2, 1], "0–2, 4"), ([7], "7"), ([], "")])
def test_ranges(numbers, text):
    assert ranges(numbers) == text
