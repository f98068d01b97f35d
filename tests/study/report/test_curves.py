import re

from made_up import DEEPKD, KD, make_table

from deepkd_plugin.study.report.cells import assemble
from deepkd_plugin.study.report.collect import collect
from deepkd_plugin.study.report.curves import MOST_POINTS, curves

PAIR = "res32x4_res8x4"
LOW, HIGH = [73.0, 73.2, 73.4], [76.0, 76.3, 76.6]


def cells(folder, accuracies, **keywords):
    return assemble(collect(make_table(folder / "table", accuracies, **keywords)))


def test_curves_have_mean_band_label_and_a_text_alternative(tmp_path):
    held = cells(tmp_path, {(PAIR, "kd"): LOW, (PAIR, "deepkd"): HIGH})
    drawn = curves({"KD and DeepKD": held}, "top-1 (%)", "the pair")

    assert drawn.count('class="line s0"') == 2  # curve and swatch
    assert (drawn.count('class="band s0"'), drawn.count('class="band s1"')) == (1, 1)
    assert "<title>KD and DeepKD: top-1 (%), the pair by epoch</title>" in drawn
    assert "KD + DeepKD + DTM: 3 runs, " in drawn
    assert "<b>76.30</b>" in drawn


def test_the_mean_of_a_curve_is_that_of_its_runs(tmp_path):
    held = cells(tmp_path, {(PAIR, "kd"): [70.0, 80.0]}, methods=(KD,), epochs=2)
    drawn = curves({"KD": held}, "top-1 (%)", "the pair")

    # runs of 70.25, 70 and 80.25, 80: an axis from 70 − 6 % to 80.25 + 6 %, the mean in its middle
    (path,) = re.findall(r'd="M([^"]+)" class="line s0"', drawn)
    assert path == f"0,{_y(75.25)} 1000,{_y(75.0)}"


def _y(value, low=70.0 - 0.06 * 10.25, high=80.25 + 0.06 * 10.25):
    return f"{1000 * (high - value) / (high - low):.1f}".removesuffix(".0")


def test_one_run_has_no_band_and_one_epoch_is_a_dot(tmp_path):
    held = cells(tmp_path, {(PAIR, "kd"): [70.0]}, methods=(KD,), epochs=1)
    drawn = curves({"KD": held}, "top-1 (%)", "the pair")

    assert 'class="band' not in drawn
    assert 'h0"' in drawn
    assert "nan" not in drawn


def test_long_curves_are_thinned_and_keep_their_ends(tmp_path):
    held = cells(tmp_path, {(PAIR, "kd"): [70.0]}, methods=(KD,), epochs=500)
    drawn = curves({"KD": held}, "top-1 (%)", "the pair")

    (path,) = re.findall(r'd="M([^"]+)" class="line s0"', drawn)
    points = path.split()
    assert len(points) <= MOST_POINTS + 1
    assert points[0].startswith("0,")
    assert points[-1].startswith("1000,")
    assert "At least every third epoch is drawn." in drawn


def test_no_curves_without_runs(tmp_path):
    held = cells(tmp_path, {(PAIR, "kd"): [None]}, methods=(KD, DEEPKD))

    assert curves({"KD": held}, "top-1 (%)", "the pair") is None
