import csv
import json
import os
import re

import pytest
from made_up import DEEPKD, KD, PAIRS, change, make_table
from scipy import stats

from deepkd_plugin.errors import UserError
from deepkd_plugin.study.report import report

PAIR = "res32x4_res8x4"
LOW, HIGH = [73.0, 73.2, 73.4], [76.0, 76.3, 76.6]
FILES = ["report.md", "report.csv", "runs.csv", "report.html"]


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_file_is_written_whole_and_named(tmp_path):
    folder = make_table(tmp_path / "table", {(PAIR, "kd"): LOW, (PAIR, "deepkd"): HIGH})

    assert report(folder) == [folder / name for name in FILES]
    assert sorted(path.name for path in folder.iterdir()) == sorted(["runs", "table.json", *FILES])


def test_the_same_runs_give_the_same_files(tmp_path):
    folder = make_table(tmp_path / "table", {(PAIR, "kd"): LOW, (PAIR, "deepkd"): HIGH})

    first = [path.read_bytes() for path in report(folder)]
    assert [path.read_bytes() for path in report(folder)] == first


@pytest.mark.usefixtures("vouched")
def test_report_csv_has_a_row_for_each_cell(tmp_path):
    folder = make_table(tmp_path / "table", {(PAIR, "kd"): [*LOW, None], (PAIR, "deepkd"): HIGH})
    report(folder)
    kd, deepkd = rows(folder / "report.csv")
    test = stats.ttest_ind(HIGH, LOW, equal_var=False)
    interval = test.confidence_interval()

    assert (kd["method"], kd["n"], kd["planned"], kd["missing"], kd["base"]) == ("kd", "3", "4", "1", "")
    assert (kd["last_mean"], kd["last_std"], kd["best_mean"]) == ("73.2", "0.2", "73.45")
    assert (kd["published_value"], kd["published_source"], kd["published_certainty"]) == (
        "73.33",
        "logit-standardization-KD README",
        "stated",
    )
    assert float(kd["last_minus_published"]) == pytest.approx(-0.13)
    assert kd["last_gain"] == kd["last_verdict"] == ""
    assert float(deepkd["last_gain"]) == pytest.approx(3.1)
    assert float(deepkd["last_gain_low"]) == pytest.approx(interval.low)
    assert float(deepkd["last_gain_high"]) == pytest.approx(interval.high)
    paired = stats.ttest_rel(HIGH, LOW).confidence_interval()  # KD's fourth seed has no run, so both have three
    ends = [float(deepkd[f"{number}_paired_{end}"]) for number in ("last", "best") for end in ("low", "high")]
    assert ends == pytest.approx([*paired, *paired])
    assert kd["last_paired_low"] == ""
    assert float(deepkd["last_p"]) == float(deepkd["last_holm_p"]) == pytest.approx(test.pvalue)
    assert (deepkd["last_verdict"], deepkd["best_verdict"]) == ("higher", "higher")
    assert (deepkd["teacher"], deepkd["student"]) == ("resnet32x4", "resnet8x4")
    assert float(deepkd["published_gain"]) == pytest.approx(3.36)
    for name in ("report.md", "report.html"):
        text = (folder / name).read_text()
        assert "published top-1 for this pair, under protocols of their own" in text
        assert "LSKD over MLKD: 78.28" in text


def test_runs_csv_has_a_row_for_each_planned_run(tmp_path):
    folder = make_table(tmp_path / "table", {(PAIR, "kd"): [73.0, None], (PAIR, "deepkd"): [76.0]})
    change(next((folder / f"runs/{PAIR}/deepkd").iterdir()) / "run.json", {"config_hash": "other"})
    taken = {"taken_from": "another: pair kd seed 0"}
    change(next((folder / f"runs/{PAIR}/kd").iterdir()) / "run.json", taken)
    report(folder)
    counted, missing, other = rows(folder / "runs.csv")

    assert [row["taken_from"] for row in (counted, missing, other)] == [taken["taken_from"], "", ""]

    assert (counted["status"], counted["last"], counted["best"], counted["best_epoch"]) == (
        "counted",
        "73",
        "73.25",
        "3",
    )
    assert (counted["teacher_acc"], counted["code"], counted["reason"]) == ("79.42", "c0de00000000c0de", "")
    assert (counted["processes"], missing["processes"]) == ("1", "")
    assert (folder / counted["folder"] / "run.json").is_file()
    assert (missing["status"], missing["last"]) == ("not started", "")
    assert other["status"] == "other config"
    assert "its hash is other" in other["reason"]


def test_markdown_has_protocol_numbers_and_what_is_missing(tmp_path):
    folder = make_table(tmp_path / "table", {(PAIR, "kd"): LOW, (PAIR, "deepkd"): [76.0, 76.3, None]})
    report(folder)
    text = (folder / "report.md").read_text()

    assert text.count("- Number: ") == text.count("- Code: c0de00000000c0de") == 2
    assert "- Number: best of all epochs, chosen on the test images" in text
    assert "| KD | 3 of 3 | 73.20 ± 0.20 | 73.33 (KD; logit-standardization-KD README; stated) |" in text
    assert "no verdict (a verdict needs 3 runs, KD + DeepKD + DTM has 2)" in text
    assert "| resnet32x4 → resnet8x4 | KD + DeepKD + DTM | 2 | not started |" in text
    assert "a difference from them has only the 95 % t interval of our mean" in text


def test_markdown_tables_have_as_many_fields_in_every_row(tmp_path):
    label = "a|b `c` <i>\nnew"
    folder = make_table(
        tmp_path / "table",
        {(PAIR, "kd"): LOW, (PAIR, "deepkd"): HIGH},
        methods=(KD | {"label": label}, DEEPKD),
    )
    report(folder)
    text = (folder / "report.md").read_text()

    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 2
    for lines in tables:
        assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert "a\\|b \\`c\\` \\<i\\> new" in text
    assert "<i>" not in text


@pytest.mark.parametrize(
    "accuracies",
    [
        {},
        {(PAIR, "kd"): [None] * 3, (PAIR, "deepkd"): [None] * 3},
        {(PAIR, "kd"): [73.0], (PAIR, "deepkd"): [76.0]},
        {(PAIR, "kd"): [73.0, 73.2], (PAIR, "deepkd"): [76.0, 76.3]},
        {(PAIR, "kd"): [73.0, None, 73.4, 73.1], (PAIR, "deepkd"): [76.0, 76.3, 76.1, None]},
        {(PAIR, "kd"): [73.0] * 3, (PAIR, "deepkd"): [76.0] * 3},
        {(PAIR, "deepkd"): HIGH},
    ],
    ids=["no plan", "no runs", "one seed", "two seeds", "holes", "no spread", "no base"],
)
@pytest.mark.filterwarnings("error")
def test_any_table_has_a_report_without_nan(tmp_path, accuracies):
    folder = make_table(tmp_path / "table", accuracies)

    for path in report(folder):
        text = path.read_text()
        assert re.findall(r"\b(?:nan|inf|None)\b", text) == []
        if not any(values[2:] for values in accuracies.values()):
            assert "higher in" not in text


def test_a_broken_run_is_listed_and_the_others_count(tmp_path):
    folder = make_table(tmp_path / "table", {(PAIR, "kd"): [*LOW, 73.1], (PAIR, "deepkd"): [*HIGH, 76.2]})
    (next((folder / f"runs/{PAIR}/kd").glob("seed3*")) / "run.json").write_text("{broken")
    change(next((folder / f"runs/{PAIR}/deepkd").glob("seed1*")) / "run.json", {"code": "other"})
    report(folder)

    kd, deepkd = rows(folder / "report.csv")
    assert (kd["n"], deepkd["n"]) == ("3", "3")
    for name in ("report.md", "report.html"):
        text = (folder / name).read_text()
        assert "cannot be read: " in text
        assert "made by code other, the rest of its cell by c0de00000000c0de" in text


def test_a_folder_that_is_no_table_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no table.json"):
        report(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    folder = make_table(tmp_path / "table", {(PAIR, "kd"): LOW})
    folder.chmod(0o500)
    try:
        with pytest.raises(UserError, match="report.md: must be a file that can be written"):
            report(folder)
    finally:
        folder.chmod(0o700)


def test_a_report_in_the_way_of_a_folder_is_refused(tmp_path):
    folder = make_table(tmp_path / "table", {(PAIR, "kd"): LOW})
    (folder / "report.csv").mkdir()

    with pytest.raises(UserError, match=r"report\.csv: must be a file that can be written"):
        report(folder)


def test_a_report_is_made_of_a_plan_that_grew(tmp_path):
    folder = make_table(tmp_path / "table", {(PAIR, "kd"): LOW})
    report(folder)
    plan = json.loads((folder / "table.json").read_text())
    other = {"name": "wrn40_2_wrn_16_2", "teacher": "wrn_40_2", "student": "wrn_16_2"}
    run = plan["runs"][0] | {"pair": other["name"], "folder": "runs/other"}
    change(folder / "table.json", {"pairs": [*PAIRS, other], "runs": [*plan["runs"], run]})
    report(folder)

    assert [row["pair"] for row in rows(folder / "report.csv")] == [PAIR, other["name"]]


def test_finished_runs_that_do_not_count_are_told_of(tmp_path, capsys):
    folder = make_table(tmp_path / "table", {(PAIR, "kd"): [*LOW, None]})
    report(folder)
    assert capsys.readouterr().err == ""  # one that is not there yet is no loss
    change(next(folder.glob("runs/*/kd/seed0-*")) / "run.json", {"code": "another"})
    report(folder)
    err = capsys.readouterr().err
    assert err.startswith(f"{folder}: 1 of the runs there do not count, the first {folder}/runs/{PAIR}/kd/seed0-")
    assert err.count("\n") == 1
