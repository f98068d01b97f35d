import pytest
from made_up import CONFIG, DEEPKD, KD, PAIRS, change, make_table
from scipy import stats

from deepkd_plugin.study.report.cells import agreement, assemble, by_base, comparisons, headline
from deepkd_plugin.study.report.collect import collect

PAIR = "res32x4_res8x4"
OTHER = {"name": "wrn40_2_wrn_16_2", "teacher": "wrn_40_2", "student": "wrn_16_2"}
DKD = {"name": "dkd", "label": "DKD", "base": None}
DEEPDKD = {"name": "deepkd_dkd", "label": "DKD + DeepKD + DTM", "base": "dkd"}
METHODS = (KD, DKD, DEEPKD, DEEPDKD)
LOW, HIGH = [73.0, 73.2, 73.4], [76.0, 76.3, 76.6]


@pytest.fixture
def cells_of(tmp_path):
    def make(accuracies, **keywords):
        table = collect(make_table(tmp_path / "table", accuracies, **keywords))
        return {(cell.pair.name, cell.method.name): cell for cell in assemble(table)}

    return make


def test_a_cell_is_compared_with_its_base_by_either_number(cells_of):
    cell = cells_of({(PAIR, "kd"): LOW, (PAIR, "deepkd"): HIGH})[PAIR, "deepkd"]

    assert cell.numbers["last"].summary.mean == pytest.approx(76.3)
    assert cell.numbers["best"].summary.mean == pytest.approx(76.55)
    assert cell.numbers["last"].gain.value == pytest.approx(3.1)
    assert cell.numbers["last"].gain.p == stats.ttest_ind(HIGH, LOW, equal_var=False).pvalue
    assert cell.numbers["last"].gain.verdict == "higher"


def test_a_gain_is_paired_if_the_base_has_the_same_seeds(cells_of):
    cells = cells_of({(PAIR, "kd"): [None, *LOW], (PAIR, "deepkd"): [None, *HIGH]})
    paired, expected = cells[PAIR, "deepkd"].numbers["last"].paired, stats.ttest_rel(HIGH, LOW)

    assert (paired.low, paired.high) == pytest.approx(tuple(expected.confidence_interval()))
    assert cells[PAIR, "kd"].numbers["last"].paired is None


def test_a_gain_over_a_base_with_another_seed_is_not_paired(cells_of):
    number = cells_of({(PAIR, "kd"): [*LOW, None], (PAIR, "deepkd"): [None, *HIGH]})[PAIR, "deepkd"].numbers["last"]

    assert number.gain.verdict == "higher"
    assert number.paired is None


def test_a_cell_without_a_base_or_a_base_without_runs_has_no_gain(cells_of):
    cells = cells_of({(PAIR, "kd"): [None] * 3, (PAIR, "deepkd"): HIGH})

    assert cells[PAIR, "kd"].numbers["last"].gain is None
    assert cells[PAIR, "deepkd"].numbers["last"].gain is None


def test_a_pair_that_lacks_the_base_has_a_cell_without_gain(cells_of):
    assert cells_of({(PAIR, "deepkd"): HIGH})[PAIR, "deepkd"].numbers["last"].gain is None


@pytest.mark.usefixtures("vouched")
def test_the_published_gain_is_that_of_both_published_numbers(cells_of):
    cells = cells_of({(PAIR, "kd"): LOW, (PAIR, "deepkd"): HIGH})

    assert cells[PAIR, "deepkd"].published_gain == pytest.approx(76.69 - 73.33)
    assert cells[PAIR, "deepkd"].numbers["last"].minus_published.value == pytest.approx(76.3 - 76.69)
    assert cells[PAIR, "kd"].published_gain is None


def test_a_subset_is_not_compared_with_what_was_published(cells_of):
    few = {"settings": {"DATASET.TRAIN_PER_CLASS": 50}}
    cells = cells_of({(PAIR, "kd"): LOW, (PAIR, "deepkd"): HIGH}, runs={(PAIR, "kd"): few})

    assert cells[PAIR, "kd"].published is not None
    assert cells[PAIR, "kd"].numbers["last"].minus_published is None
    assert cells[PAIR, "deepkd"].published_gain is None


def test_holms_correction_is_over_all_of_a_tables_comparisons(cells_of):
    cells = cells_of(
        {
            (PAIR, "kd"): LOW,
            (PAIR, "dkd"): LOW,
            (PAIR, "deepkd"): HIGH,
            (PAIR, "deepkd_dkd"): [73.3, 73.4, 73.6],
            (OTHER["name"], "kd"): LOW,
            (OTHER["name"], "deepkd"): [73.9, 74.0],
        },
        methods=METHODS,
        pairs=(*PAIRS, OTHER),
    )
    small = stats.ttest_ind(HIGH, LOW, equal_var=False).pvalue
    large = stats.ttest_ind([73.3, 73.4, 73.6], LOW, equal_var=False).pvalue

    assert comparisons(cells.values(), "last") == 2
    assert cells[PAIR, "deepkd"].numbers["last"].holm_p == pytest.approx(2 * small)
    assert cells[PAIR, "deepkd_dkd"].numbers["last"].holm_p == pytest.approx(max(2 * small, large))
    assert cells[OTHER["name"], "deepkd"].numbers["last"].holm_p is None


def test_a_verdict_may_not_stand_after_holms_correction(cells_of):
    # p is 0.033 for each of two comparisons of the same values
    values = [73.5, 73.7, 73.9]
    assert stats.ttest_ind(values, LOW, equal_var=False).pvalue == pytest.approx(0.0376, abs=1e-3)
    cells = cells_of(
        {(PAIR, "kd"): LOW, (PAIR, "dkd"): LOW, (PAIR, "deepkd"): values, (PAIR, "deepkd_dkd"): values},
        methods=METHODS,
    )
    number = cells[PAIR, "deepkd"].numbers["last"]

    assert (number.gain.verdict, number.after_holm) == ("higher", "not distinguishable")
    assert headline([cells[PAIR, "deepkd"]]).endswith("; not after Holm's correction")


def test_groups_are_by_base_and_named_by_a_single_method(cells_of):
    cells = cells_of({(PAIR, name): LOW for name in ("kd", "dkd", "deepkd", "deepkd_dkd")}, methods=METHODS)

    assert list(by_base(cells.values())) == ["KD + DeepKD + DTM over KD", "DKD + DeepKD + DTM over DKD"]


def test_an_ablations_rows_are_one_group_in_their_order(cells_of):
    rows = ({"name": "delta0", "label": "Δ = 0", "base": None},)
    rows += tuple({"name": f"delta{x}", "label": f"Δ = {x}", "base": "delta0"} for x in (0.1, 0.05))
    cells = cells_of({(PAIR, row["name"]): LOW for row in rows}, methods=rows)

    groups = by_base(cells.values())
    assert list(groups) == ["Gain over Δ = 0"]
    assert [cell.method.name for cell in groups["Gain over Δ = 0"]] == ["delta0.1", "delta0.05"]


def test_headline_of_one_comparison(cells_of):
    cell = cells_of({(PAIR, "kd"): LOW, (PAIR, "deepkd"): HIGH})[PAIR, "deepkd"]
    gain = cell.numbers["last"].gain

    low, high = f"+{gain.low:.2f}", f"+{gain.high:.2f}"
    assert headline([cell]) == f"higher; gain +3.10 [{low},\u00a0{high}]; also after Holm's correction"


def test_headline_of_several_comparisons_counts_and_names_what_is_missing(cells_of):
    cells = cells_of(
        {
            (PAIR, "kd"): LOW,
            (PAIR, "deepkd"): HIGH,
            (OTHER["name"], "kd"): HIGH,
            (OTHER["name"], "deepkd"): LOW,
            ("third", "kd"): LOW,
            ("third", "deepkd"): [73.1, 73.2, 73.4],
            ("fourth", "kd"): LOW,
            ("fourth", "deepkd"): [70.0],
        },
        pairs=(
            *PAIRS,
            OTHER,
            *({"name": name, "teacher": "a", "student": name} for name in ("third", "fourth")),
        ),
    )
    (group,) = by_base(cells.values()).values()

    assert headline(group) == (
        "higher in 1, lower in 1, not distinguishable in 1 of 3 comparisons; gain −3.10 to +3.10; "
        "2 of 2 also after Holm's correction; 1 without a verdict"
    )


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([76.0, 76.1], "no verdict yet: a verdict needs 3 runs, KD + DeepKD + DTM has 2"),
        ([None], "no verdict yet: one of them has no runs"),
    ],
)
def test_headline_without_a_verdict(cells_of, values, said):
    assert headline([cells_of({(PAIR, "kd"): LOW, (PAIR, "deepkd"): values})[PAIR, "deepkd"]]) == said


@pytest.mark.usefixtures("vouched")
def test_agreement_counts_published_values_inside_our_intervals(cells_of):
    cells = cells_of({(PAIR, "kd"): LOW, (PAIR, "deepkd"): [75.0, 75.1, 75.2]})

    # 73.2 against 73.33 and 75.1 against 76.69
    assert agreement(cells.values()) == (
        "1 of 2 published values lie in the 95\u00a0% interval of our mean (ours minus published: −1.59 to −0.13)"
    )


def test_no_agreement_without_intervals(cells_of):
    assert agreement(cells_of({(PAIR, "kd"): [73.0, 73.1]}).values()) == ""


def test_options_reach_the_published_numbers(tmp_path):
    folder = make_table(tmp_path / "table", {(PAIR, "kd"): LOW})
    change(folder / "table.json", {"options": ["SOLVER.EPOCHS", "2"]})

    (cell,) = assemble(collect(folder))
    assert not cell.published.comparable


def test_made_up_configs_are_not_changed_by_making_tables():
    assert CONFIG["SOLVER"]["DECOUPLED"]["DELTA"]["TOG"] == 0.0
