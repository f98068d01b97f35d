"""Which row won, by how much and how sure: the page's first sentence, and what is known of a number."""

import pytest
from made_up import KD, PAIRS, make_table

from deepkd_plugin.study.report.cells import assemble
from deepkd_plugin.study.report.collect import collect
from deepkd_plugin.study.report.winners import facts, winner, winners

PAIR, OTHER = "res32x4_res8x4", {"name": "other", "teacher": "wrn_40_2", "student": "wrn_16_2"}


@pytest.fixture
def cells_of(tmp_path):
    def make(accuracies, **keywords):
        return assemble(collect(make_table(tmp_path / "table", accuracies, **keywords)))

    return make


@pytest.mark.parametrize(
    ("kd", "deepkd", "sentence"),
    [
        (
            [73.0, 73.2, 73.4],
            [76.0, 76.3, 76.6],
            "KD + DeepKD + DTM is first with 76.30 ± 0.30 over 3 runs. "
            "Before KD, the next: +3.10 [+2.49, +3.71], higher (p 0.0003).",
        ),
        (
            [76.1, 76.3, 76.6],
            [76.0, 76.3, 76.6],
            "KD is first with 76.33 ± 0.25 over 3 runs. "
            "Before KD + DeepKD + DTM, the next: +0.03 [−0.60, +0.67], not distinguishable (p 0.89).",
        ),
        (
            [73.0, 73.2, 73.4],
            [76.0, None, None],
            "KD + DeepKD + DTM is first with 76.00 over 1 run. "
            "Before KD, the next: +2.80, no verdict: a verdict needs 3 runs, KD + DeepKD + DTM has 1.",
        ),
        ([73.0, 73.2, 73.4], [None] * 3, "KD is first with 73.20 ± 0.20 over 3 runs; no other row has runs."),
        ([None], [None], "No run counts yet."),
    ],
)
def test_who_is_first_by_how_much_and_how_sure(cells_of, kd, deepkd, sentence):
    cells = cells_of({(PAIR, "kd"): kd, (PAIR, "deepkd"): deepkd})
    assert winner(cells).replace("\u00a0", " ") == sentence
    assert winners([cells]) == winner(cells)


def test_of_several_pairs_it_is_counted_who_is_first(cells_of):
    runs = {(PAIR, "kd"): [73.0], (PAIR, "deepkd"): [76.0], ("other", "kd"): [73.0], ("other", "deepkd"): [72.0]}
    cells = cells_of(runs, pairs=(*PAIRS, OTHER))
    pairs = [[cell for cell in cells if cell.pair.name == name] for name in (PAIR, "other")]
    assert winners(pairs) == "First of 2 pairs: KD + DeepKD + DTM in 1, KD in 1."


def test_a_number_s_runs_seeds_and_protocol(cells_of):
    (cell,) = cells_of({(PAIR, "kd"): [73.0, None, 73.4]}, methods=(KD,))
    told = dict(facts(cell))
    assert (told["n"], told["Seeds"]) == ("2 of 3 runs", "0, 2")
    assert (told["Epochs"], told["Batch"], told["Precision"]) == ("4", "64 images", "float32")
    assert "79.42 %" in told["Teacher"]
