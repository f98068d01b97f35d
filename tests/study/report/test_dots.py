import re

import pytest
from made_up import make_table

from deepkd_plugin.study.report.cells import assemble, by_base
from deepkd_plugin.study.report.collect import collect
from deepkd_plugin.study.report.dots import dot_plot

PAIR = "res32x4_res8x4"
LOW, HIGH = [73.0, 73.2, 73.4], [76.0, 76.3, 76.6]


def cells(folder, accuracies, **keywords):
    return assemble(collect(make_table(folder / "table", accuracies, **keywords)))


def test_the_dot_plot_has_every_comparison_as_text_beside_its_drawing(tmp_path):
    held = cells(tmp_path, {(PAIR, "kd"): LOW, (PAIR, "deepkd"): HIGH})
    drawn = dot_plot(by_base(held), "last", "Gain")

    assert re.search(r"resnet32x4 → resnet8x4.*\+3\.10 \[\+2\.\d\d,\xa0\+3\.\d\d\].*higher", drawn)
    assert 'class="dot higher"' in drawn
    assert (
        "◇ published +3.36 = KD+DeepKD 76.69 (a reader&#x27;s note on the paper (+3.36); value and pair"
        in drawn
    )


def test_marks_lie_where_their_values_are(tmp_path):
    held = cells(tmp_path, {(PAIR, "kd"): LOW, (PAIR, "deepkd"): LOW[:2]})
    drawn = dot_plot(by_base(held), "last", "Gain")

    # 0, −0.1 and the published +3.36 with 6 % of their range on either side
    low, high = -0.1 - 0.06 * 3.46, 3.36 + 0.06 * 3.46
    (dot,) = re.findall(r'<circle cx="([\d.]+)%"', drawn)
    assert float(dot) == pytest.approx(100 * (-0.1 - low) / (high - low), abs=0.01)
    assert 'class="dot none"' in drawn
    assert "whisker" not in drawn


def test_a_comparison_without_runs_has_no_dot(tmp_path):
    held = cells(tmp_path, {(PAIR, "kd"): LOW, (PAIR, "deepkd"): [None]})
    drawn = dot_plot(by_base(held), "last", "Gain")

    assert "<circle" not in drawn
    assert "no runs" in drawn
