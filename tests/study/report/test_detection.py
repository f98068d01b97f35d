"""Tables of detectors: AP in the place of accuracy, with AP50 and AP75 beside it."""

import csv
import html
import json
import re

import pytest
import yaml
from made_up import DETECTION, MASK, ON_DETECTRON2, change, make_detection_table

from deepkd_plugin.errors import UserError
from deepkd_plugin.study.report import report
from deepkd_plugin.study.report.cells import assemble
from deepkd_plugin.study.report.collect import collect
from deepkd_plugin.study.report.columns import columns
from deepkd_plugin.study.report.detectron2 import HOW, NAMES, SEED, settings
from deepkd_plugin.study.report.protocol import cautions, protocol

LOW, HIGH = [64.0, 64.5, 65.0], [70.0, 70.4, 70.8]
PAIR, THEIRS = "res20_res8", "r101_r18"


@pytest.fixture
def folder(tmp_path):
    return make_detection_table(tmp_path / "table", {(PAIR, "kd"): LOW, (PAIR, "deepkd"): HIGH})


@pytest.fixture
def theirs(tmp_path):
    accuracies = {(THEIRS, "kd"): LOW, (THEIRS, "deepkd"): HIGH}
    return make_detection_table(tmp_path / "theirs", accuracies, ON_DETECTRON2)


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def texts(folder):
    return [path.read_text() for path in report(folder) if path.suffix in (".md", ".html")]


def test_a_record_has_ap_and_the_others_of_the_same_epochs(folder):
    record = collect(folder).records[0]

    assert (record.last, record.best, record.best_epoch) == (64.0, 64.25, 3)
    assert record.curve[4] == 64.0
    assert record.further == {
        "last": {"AP50": 84.0, "AP75": 59.0},
        "best": {"AP50": 84.25, "AP75": 59.25},
    }


def test_ap50_and_ap75_are_beside_ap_in_both_tables(folder):
    cells = assemble(collect(folder))
    for number, ap50, ap75 in (("last", "84.50", "59.50"), ("best", "84.75", "59.75")):
        said = {column.title: column.words(cells[0]) for column in columns(cells, number)}
        assert list(said)[2:5] == [f"Ours, {number} epoch", "AP50", "AP75"]
        assert said["AP50"] == (f"{ap50}\u00a0±\u00a00.50",)
        assert said["AP75"] == (f"{ap75}\u00a0±\u00a00.50",)


def test_the_csv_files_have_every_measure(folder):
    report(folder)
    kd, deepkd = rows(folder / "report.csv")
    assert (kd["metric"], kd["last_mean"], kd["last_ap50_mean"], kd["last_ap50_std"]) == (
        "AP (%)",
        "64.5",
        "84.5",
        "0.5",
    )
    assert (kd["best_ap75_mean"], deepkd["last_verdict"]) == ("59.75", "higher")
    first = rows(folder / "runs.csv")[0]
    assert (first["last"], first["last_ap50"], first["best_ap75"]) == ("64", "84", "59.25")
    assert first["teacher_ap"] == "79.42"
    assert "teacher_acc" not in first


def test_nothing_of_a_detection_report_speaks_of_classification(folder, theirs):
    for text in (*texts(folder), *texts(theirs)):
        shown = re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL)
        assert not re.search(r"accurac|top-?1\b", shown, re.IGNORECASE)
        assert "AP (%)" in shown


def test_the_teacher_s_number_is_its_ap(folder, theirs):
    told = dict(protocol(assemble(collect(folder))))
    assert told["Teacher"] == ["AP 79.42 % on the test images (weights feed00000000feed)"]
    # a run on detectron2 does not test it
    assert dict(protocol(assemble(collect(theirs))))["Teacher"] == ["weights feed00000000feed"]


def test_a_run_without_its_measures_is_left_out(folder):
    run = next(folder.glob(f"runs/{PAIR}/kd/seed0-*"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    del lines[-1]["test_ap75"]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    (left,) = collect(folder).left_out
    assert (left.run.seed, left.kind, left.reason) == (
        0,
        "unreadable",
        "cannot be read: KeyError: 'test_ap75'",
    )


def test_on_detectron2_the_protocol_is_read_from_its_own_keys(theirs):
    cells = assemble(collect(theirs))
    told = dict(protocol(cells))

    assert told["Evaluations"] == ["4"]
    assert told["Learning rate"] == ["0.01, times 0.1 after 120,000 and 160,000 iterations"]
    assert (told["Batch"], told["Precision"], told["Iterations"]) == (["8 images"], ["float32"], ["180,000"])
    assert told["Images"] == ["coco_2017_train to train on, coco_2017_val to test on"]
    assert told["Proposals"] == ["512 an image, at most 25 % of them foreground"]
    assert told["Mask"] == ["dynamic, K 0.05 to 0.5, phases end at 0.333 and 0.667, renormalise"]
    assert told["Momentum variant"] == ["paper"]
    assert cautions(cells) == []


def test_on_detectron2_loss_weights_are_compared_too(theirs):
    def weigh(method, text):
        for config in theirs.glob(f"runs/{THEIRS}/{method}/*/config.yaml"):
            tree = yaml.safe_load(config.read_text())
            tree["KD"] |= text
            config.write_text(yaml.safe_dump(tree))

    weigh("kd", {"TYPE": "DKD", "DKD": {"ALPHA": 1.0, "BETA": 0.25}})
    ours = {"BASE": "DKD", "TASK_WEIGHT": 1.0, "TCG_WEIGHT": 1.0, "NCG_WEIGHT": 0.25, "MASK": MASK}
    weigh("deepkd", {"DEEPKD": ours})
    assert cautions(assemble(collect(theirs))) == []
    weigh("deepkd", {"DEEPKD": ours | {"NCG_WEIGHT": 8.0}})
    (said,) = cautions(assemble(collect(theirs)))
    assert said.endswith(" are CE 1, TCKD 1, NCKD 8, of its base CE 1, TCKD 1, NCKD 0.25")


def test_on_detectron2_runs_may_be_and_start_elsewhere_but_not_compute_something_else(theirs):
    def set_in(seed, was, now):
        config = next(theirs.glob(f"runs/{THEIRS}/kd/seed{seed}-*")) / "config.yaml"
        assert was in config.read_text()
        config.write_text(config.read_text().replace(was, now))

    set_in(0, "OUTPUT_DIR: somewhere", "OUTPUT_DIR: elsewhere")
    set_in(1, "pretrained/r18-r101.pth", "/abs/pretrained/r18-r101.pth")
    set_in(1, "SEED: 0", "SEED: 1")
    assert collect(theirs).left_out == []
    set_in(2, "BASE_LR: 0.01", "BASE_LR: 0.02")
    (left,) = collect(theirs).left_out
    assert left.reason == "SOLVER.BASE_LR is 0.02, in the rest of its cell 0.01"


def test_what_detectron2_s_recorder_leaves_out_is_left_out_here():
    recorder = pytest.importorskip(
        "deepkd_plugin.detection.detectron2.recorder",
        reason="detectron2 is not installed",
        exc_type=ImportError,
    )
    assert set(HOW) == {*recorder.HOW, "MODEL.WEIGHTS"}


def test_other_kinds_keep_the_names_of_their_settings():
    flat = {"OUTPUT_DIR": 1, "SEED": 2, "KD.DEEPKD.T": 3}
    assert settings("detection", flat) == flat
    assert settings("detectron2", flat) == {SEED: 2, "DeepKD.T": 3}
    assert len(set(NAMES.values())) == len(NAMES)


def test_a_step_on_detectron2_is_an_evaluation(theirs):
    for text in texts(theirs):
        assert "Best of all evaluations, chosen on the test images: AP (%)" in text
        assert "Last evaluation: the AP at the end of training." in text
        assert not re.search(r"(last|best|all|by|of) epochs?\b(?!\))", text.replace("Momenta, last epoch", ""))


def test_published_values_of_no_pair_are_apart(theirs, folder):
    for text in texts(theirs):
        assert "Published for a pair that is not named, so beside no cell of ours:" in text
        said = html.unescape(text.replace("\\", ""))
        assert (
            "DKD+DeepKD+DTM: AP 34.20 (a reader's note on the paper that cannot be found again (+1.86); hearsay; pair"
            in said
        )
    assert all(cell.published is None for cell in assemble(collect(theirs)))
    assert {row["published_value"] for row in rows(theirs / "report.csv")} == {""}
    assert not any("Published for a pair" in text for text in texts(folder))


def test_an_unknown_kind_is_refused(folder):
    change(folder / "table.json", {"kind": "segmentation"})
    line = "kind is 'segmentation'; it must be one of classification, detection, detectron2"
    with pytest.raises(UserError, match=line):
        collect(folder)


@pytest.mark.parametrize("plan", [DETECTION, ON_DETECTRON2])
@pytest.mark.parametrize("values", [[None, None], [64.0], [64.0, 64.5, None]])
def test_any_detection_table_has_a_report_without_nan(tmp_path, plan, values):
    pair = plan["pairs"][0]["name"]
    folder = make_detection_table(tmp_path / "t", {(pair, "kd"): values, (pair, "deepkd"): values}, plan)
    for path in report(folder):
        assert re.findall(r"\b(?:nan|inf|None)\b", path.read_text()) == []
