import math

import numpy as np
import pytest
from scipy import stats

from deepkd_plugin.study.report.statistics import compare, compare_paired, compare_published, holm, summarise

NAMES = ("ours", "base")


def test_mean_and_sample_standard_deviation_by_hand():
    # mean (10 + 12 + 14) / 3, variance ((-2)^2 + 0 + 2^2) / (3 - 1) = 4
    summary = summarise([10.0, 12.0, 14.0])

    assert (summary.n, summary.mean, summary.std) == (3, 12.0, 2.0)


def test_one_run_has_a_mean_and_no_standard_deviation():
    assert (summarise([71.5]).mean, summarise([71.5]).std) == (71.5, None)


def test_no_run_has_neither():
    assert (summarise([]).n, summarise([]).mean, summarise([]).std) == (0, None, None)


def test_welch_by_hand():
    # variances 1 and 1: standard error sqrt(1/3 + 1/3), t = 2 / sqrt(2/3) = sqrt(6), 4 degrees of freedom, where
    # F(t) = 1/2 + 3/8 t / sqrt(1 + t²/4) (1 - t² / (12 (1 + t²/4))) and the 97.5 % point is 2.776445
    difference = compare([3.0, 4.0, 5.0], [1.0, 2.0, 3.0], NAMES)
    t, scale = math.sqrt(6), 1 + 6 / 4
    p = 2 * (0.5 - 0.375 * t / math.sqrt(scale) * (1 - 6 / (12 * scale)))

    assert difference.value == pytest.approx(2.0)
    assert (difference.low, difference.high) == pytest.approx((-0.266957, 4.266957), abs=1e-5)
    assert p == pytest.approx(0.070484, abs=1e-6)
    assert difference.p == pytest.approx(p, abs=1e-12)
    assert difference.verdict == "not distinguishable"


def test_welch_with_unequal_variances_and_sizes_by_its_formulas():
    # variances 4/3 of 10, 10, 12, 12 and 1 of 7, 8, 9: squared errors 1/3 and 1/3, so Welch-Satterthwaite gives
    # (2/3)² / ((1/3)² / 3 + (1/3)² / 2) = 4.8 degrees of freedom
    difference = compare([10.0, 12.0, 10.0, 12.0], [7.0, 8.0, 9.0], NAMES)
    half = stats.t.ppf(0.975, 4.8) * math.sqrt(2 / 3)

    assert (difference.low, difference.high) == pytest.approx((3 - half, 3 + half), abs=1e-9)
    assert difference.p == pytest.approx(2 * stats.t.sf(3 / math.sqrt(2 / 3), 4.8), rel=1e-9)
    assert difference.verdict == "higher"
    assert compare([7.0, 8.0, 9.0], [10.0, 12.0, 10.0, 12.0], NAMES).verdict == "lower"


@pytest.mark.parametrize("seed", range(5))
def test_welch_is_scipys(seed):
    draw = np.random.default_rng(seed)
    ours, base = draw.normal(76.3, 0.2, 5).tolist(), draw.normal(76.0, 0.4, 4).tolist()
    test = stats.ttest_ind(ours, base, equal_var=False)
    interval = test.confidence_interval(0.95)

    difference = compare(ours, base, NAMES)

    assert difference.p == test.pvalue
    assert (difference.low, difference.high) == (interval.low, interval.high)
    assert (difference.verdict == "not distinguishable") == (difference.low <= 0 <= difference.high)


@pytest.mark.parametrize(
    ("ours", "base", "reason"),
    [
        ([1.0, 2.0], [1.0, 2.0, 3.0], "a verdict needs 3 runs, ours has 2"),
        ([1.0, 2.0, 3.0], [1.0], "a verdict needs 3 runs, base has 1"),
        ([1.0], [1.0, 2.0], "a verdict needs 3 runs, ours has 1 and base has 2"),
    ],
)
def test_fewer_than_three_runs_give_a_difference_and_no_verdict(ours, base, reason):
    difference = compare(ours, base, NAMES)

    assert difference.value == np.mean(ours) - np.mean(base)
    assert (difference.low, difference.high, difference.p, difference.verdict) == (None, None, None, None)
    assert difference.reason == reason


def test_a_cell_without_runs_has_no_difference():
    assert compare([], [1.0, 2.0, 3.0], NAMES) is None
    assert compare([1.0, 2.0, 3.0], [], NAMES) is None
    assert compare_published([], 70.0) is None


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("other", [70.0, 71.0])
def test_no_spread_in_either_cell_is_no_test(other):
    difference = compare([70.0] * 3, [other] * 4, NAMES)

    assert difference.value == 70.0 - other
    assert (difference.low, difference.high, difference.p, difference.verdict) == (None, None, None, None)
    assert "no spread" in difference.reason


def test_values_that_differ_by_rounding_have_no_spread():
    assert compare([0.1 + 0.2, 0.3, 0.3], [0.4] * 3, NAMES).p is None


@pytest.mark.filterwarnings("error")
def test_spread_in_one_of_the_cells_is_enough():
    # only the first cell's error counts: 1 / sqrt(3) with 2 degrees of freedom, 97.5 % point 4.302653
    difference = compare([70.0, 71.0, 72.0], [70.0] * 5, NAMES)

    assert (difference.low, difference.high) == pytest.approx((1 - 2.484138, 1 + 2.484138), abs=1e-5)


def test_difference_from_a_published_number_by_hand():
    # standard error 2 / sqrt(3), 97.5 % point with 2 degrees of freedom 4.302653
    difference = compare_published([10.0, 12.0, 14.0], 11.0)

    assert difference.value == pytest.approx(1.0)
    assert (difference.low, difference.high) == pytest.approx((1 - 4.968275, 1 + 4.968275), abs=1e-5)
    assert (difference.p, difference.verdict) == (None, None)


def test_difference_from_a_published_number_is_scipys_interval_of_our_mean():
    ours = [76.1, 76.4, 76.2, 76.9]
    interval = stats.ttest_1samp(ours, 0.0).confidence_interval(0.95)

    difference = compare_published(ours, 76.0)

    assert (difference.low, difference.high) == pytest.approx((interval.low - 76.0, interval.high - 76.0), abs=1e-10)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("ours", "reason"),
    [
        ([71.0], "an interval needs 3 runs, there is 1"),
        ([71.0, 73.0], "an interval needs 3 runs, there are 2"),
        ([71.0] * 3, "no seed differs from another, so there is no spread to make an interval of"),
    ],
)
def test_no_interval_around_few_runs_or_without_spread(ours, reason):
    difference = compare_published(ours, 70.0)

    assert difference.value == pytest.approx(np.mean(ours) - 70.0)
    assert (difference.low, difference.high, difference.reason) == (None, None, reason)


def test_paired_by_hand_is_narrow_if_runs_of_a_seed_go_together():
    # differences 1, 2, 3: standard error 1 / sqrt(3), 97.5 % point with 2 degrees of freedom 4.302653
    ours, base = {0: 11.0, 1: 22.0, 2: 33.0}, {0: 10.0, 1: 20.0, 2: 30.0}
    difference, welch = compare_paired(ours, base), compare([*ours.values()], [*base.values()], NAMES)

    assert difference.value == welch.value == pytest.approx(2.0)
    assert (difference.low, difference.high) == pytest.approx((2 - 2.484138, 2 + 2.484138), abs=1e-5)
    assert (difference.p, difference.verdict) == (None, None)
    assert welch.high - welch.low > 40


@pytest.mark.parametrize("seed", range(3))
def test_paired_is_scipys_and_goes_by_seed_not_by_place(seed):
    draw = np.random.default_rng(seed)
    ours, base = draw.normal(76.3, 0.2, 5), draw.normal(76.0, 0.4, 5)
    interval = stats.ttest_rel(ours, base).confidence_interval(0.95)

    difference = compare_paired(dict(zip(range(5), ours)), dict(reversed([*zip(range(5), base)])))

    assert difference.value == pytest.approx(np.mean(ours) - np.mean(base), abs=1e-12)
    assert (difference.low, difference.high) == pytest.approx((interval.low, interval.high), abs=1e-10)


@pytest.mark.parametrize(
    ("ours", "base"),
    [((0, 1, 2), (0, 1, 3)), ((0, 1, 2), (0, 1, 2, 3)), ((0, 1, 2, 3), (0, 1, 2)), ((), (0, 1, 2)), ((), ())],
)
def test_cells_of_other_seeds_are_not_paired(ours, base):
    assert compare_paired({seed: seed**2 for seed in ours}, {seed: 0.0 for seed in base}) is None


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("ours", "reason"),
    [
        ((71.0, 72.0), "an interval needs 3 runs, there are 2"),
        ((71.0, 73.0, 75.0), "no seed differs from another, so there is no spread to make an interval of"),
    ],
)
def test_few_pairs_or_equal_differences_have_no_interval(ours, reason):
    difference = compare_paired(dict(enumerate(ours)), {seed: value - 0.3 for seed, value in enumerate(ours)})

    assert difference.value == pytest.approx(0.3)
    assert (difference.low, difference.high, difference.reason) == (None, None, reason)


def test_holm_by_hand():
    # sorted 0.005 · 4, 0.01 · 3, 0.03 · 2, 0.04 · 1, each at least the one before it
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_stops_at_one_and_skips_what_has_no_p():
    assert holm([None, 0.6, 0.7, None]) == [None, 1.0, 1.0, None]
    assert holm([None]) == [None]
    assert holm([]) == []
