import pytest
from made_up import DEEPKD, KD, make_table

from deepkd_plugin.study.report.cells import assemble
from deepkd_plugin.study.report.collect import collect
from deepkd_plugin.study.report.columns import columns, title, verdict

PAIR = "res32x4_res8x4"
LOW, HIGH = [73.0, 73.2, 73.4], [76.0, 76.3, 76.6]


@pytest.fixture
def cells_of(tmp_path):
    return lambda accuracies, **keywords: assemble(collect(make_table(tmp_path / "table", accuracies, **keywords)))


def said(cells, number, row):
    return {column.title: column.words(cells[row]) for column in columns(cells, number)}


@pytest.mark.usefixtures("vouched")
def test_the_main_table_has_the_published_value_with_source_and_certainty(cells_of):
    fields = said(cells_of({(PAIR, "kd"): LOW, (PAIR, "deepkd"): HIGH}), "last", 1)

    assert fields["Method"] == ("KD + DeepKD + DTM",)
    assert fields["Runs"] == ("3\u00a0of\u00a03",)
    assert fields["Ours, last epoch"] == ("76.30\u00a0±\u00a00.30",)
    assert fields["Published"] == (
        "76.69",
        "KD+DeepKD; a note; value and pair inferred; published without DTM, ours with it",
    )
    assert fields["Ours − published [95\u00a0%]"][0].startswith("−0.39 [−1.14,")
    assert fields["Gain over KD [95\u00a0%]"][0].startswith("+3.10 [+2.")
    # differences 3.0, 3.1, 3.2: 4.302653 · 0.1 / sqrt(3) = 0.248
    assert fields["Gain over KD [95\u00a0%]"][1:] == ("paired\u00a0[+2.85,\u00a0+3.35]",)
    assert fields["p, and Holm's"][1].startswith("Holm\u00a0")
    assert fields["Verdict"] == ("higher",)
    assert fields["Best epoch*"] == ("76.55\u00a0±\u00a00.30",)


def test_the_best_epochs_table_says_which_epochs(cells_of):
    fields = said(cells_of({(PAIR, "kd"): LOW, (PAIR, "deepkd"): HIGH}), "best", 1)

    assert fields["Ours, best epoch"] == ("76.55\u00a0±\u00a00.30", "epoch 3")
    assert "Published" not in fields
    assert "Best epoch*" not in fields


def test_columns_that_would_be_empty_are_left_out(cells_of):
    pair = {"name": "p", "teacher": "a", "student": "b"}
    fields = said(cells_of({("p", "kd"): LOW}, methods=(KD,), pairs=(pair,)), "last", 0)

    assert list(fields) == ["Method", "Runs", "Ours, last epoch", "Best epoch*"]


def test_several_bases_are_named_in_the_fields(cells_of):
    methods = (KD, {"name": "dkd", "label": "DKD", "base": "kd"}, DEEPKD | {"base": "dkd"})
    cells = cells_of({(PAIR, name): LOW for name in ("kd", "dkd", "deepkd")}, methods=methods)

    assert said(cells, "last", 1)["Gain over the base [95\u00a0%]"][1] == "over KD"
    assert said(cells, "last", 2)["Gain over the base [95\u00a0%]"][1] == "over DKD"


@pytest.mark.parametrize(
    ("base", "ours", "words"),
    [
        (LOW, [None], ("no verdict", "KD + DeepKD + DTM has no runs")),
        ([None], HIGH, ("no verdict", "KD has no runs")),
        (LOW[:2], HIGH, ("no verdict", "a verdict needs 3 runs, KD has 2")),
        (LOW, LOW, ("not distinguishable",)),
        (HIGH, LOW, ("lower",)),
    ],
)
def test_verdicts_or_why_there_is_none(cells_of, base, ours, words):
    cells = cells_of({(PAIR, "kd"): base, (PAIR, "deepkd"): ours})

    assert verdict(cells[1], "last") == words
    assert verdict(cells[0], "last") == ("–",)


def test_a_cell_without_runs_says_so(cells_of):
    fields = said(cells_of({(PAIR, "kd"): [None, None]}), "last", 0)

    assert (fields["Runs"], fields["Ours, last epoch"]) == (("0\u00a0of\u00a02",), ("no runs",))


def test_one_that_cannot_be_compared_with_the_published_value_says_so(cells_of):
    few = {(PAIR, "kd"): {"settings": {"DATASET.TRAIN_PER_CLASS": 50}}}
    fields = said(cells_of({(PAIR, "kd"): LOW}, runs=few), "last", 0)

    assert fields["Ours − published [95\u00a0%]"] == ("–", "not comparable")


def test_titles_name_the_number():
    assert title("last", "top-1 (%)") == "Last epoch: top-1 (%)"
    assert title("best", "top-1 (%)") == "Best of all epochs, chosen on the test images: top-1 (%)"
