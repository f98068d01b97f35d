import pytest
from made_up import CODE, DECOUPLED, DEEPKD, KD, VERSIONS, change, make_table

from deepkd_plugin.study.report.cells import assemble
from deepkd_plugin.study.report.collect import collect
from deepkd_plugin.study.report.protocol import cautions, protocol

PAIR = "res32x4_res8x4"
ACCURACIES = {(PAIR, "kd"): [73.0, 73.2], (PAIR, "deepkd"): [76.0, 76.3]}
MOMENTA = {"tog": 0.975, "tcg": 0.825, "ncg": 0.975}


def cells(folder, accuracies=ACCURACIES, **keywords):
    return assemble(collect(make_table(folder / "table", accuracies, **keywords)))


def test_everything_that_the_numbers_depend_on_is_told(tmp_path):
    told = dict(protocol(cells(tmp_path, runs={(PAIR, "deepkd"): {"momentum": MOMENTA}})))

    assert told == {
        "Seeds planned": ["0–1"],
        "Epochs": ["4"],
        "Learning rate": ["0.05 to 0.0005 step"],
        "Batch": ["64 images"],
        "Precision": ["float32"],
        "Training images": ["all"],
        "Test images": ["the data set's own"],
        "Teacher": ["79.42 % on the test images (weights feed00000000feed)"],
        "Momentum variant": ["paper"],
        "Momenta, last epoch": ["0.9 (KD)", "TOG 0.975, TCG 0.825, NCG 0.975 (KD + DeepKD + DTM)"],
        "Mask": ["dynamic, K 0.05 to 0.5, phases end at 0.333 and 0.667, renormalise"],
        "Execution": ["eager, sequential gradients"],
        "Processes": ["1"],
        "Versions": ["python 3.11.7, torch 2.15.0, torchvision 0.29.2, numpy 2.4.6, deepkd_plugin 0.1.0"],
        "Hardware": ["NVIDIA H200; AMD EPYC"],
        "Commit": ["ae39fbd"],
        "Code": ["c0de00000000c0de"],
    }


@pytest.mark.parametrize(
    ("settings", "what", "answer"),
    [
        ({"SOLVER.AMP": True}, "Precision", "bfloat16 autocast"),
        ({"DATASET.TRAIN_PER_CLASS": 50}, "Training images", "the first 50 of each class"),
        ({"DATASET.HOLDOUT": 0.2}, "Test images", "20 % of the training images, held out"),
        ({"SOLVER.DECOUPLED.VARIANT": "release"}, "Momentum variant", "release"),
        ({"DeepKD.MASK.TYPE": "none"}, "Mask", "none"),
        (
            {"DeepKD.MASK.TYPE": "static", "DeepKD.MASK.K": 0.25, "DeepKD.MASK.READING": "multiply"},
            "Mask",
            "static, K 0.25, multiply",
        ),
    ],
)
def test_settings_that_change_the_protocol_show(tmp_path, settings, what, answer):
    made = cells(tmp_path, {(PAIR, "deepkd"): [76.0]}, runs={(PAIR, "deepkd"): {"settings": DECOUPLED | settings}})

    assert dict(protocol(made))[what] == [answer]


def test_what_most_methods_share_comes_first_and_exceptions_are_named(tmp_path):
    third = {"name": "mlkd", "label": "MLKD, shorter", "base": None}
    made = cells(
        tmp_path,
        ACCURACIES | {(PAIR, "mlkd"): [77.0]},
        methods=(KD, DEEPKD, third),
        runs={(PAIR, "mlkd"): {"epochs": 8}},
    )

    assert dict(protocol(made))["Epochs"] == ["4", "8 (“MLKD, shorter”)"]


def test_many_answers_stand_by_row(tmp_path):
    rows = [{"name": f"row{i}", "label": f"row {i}", "base": None} for i in range(5)]
    masks = {(PAIR, f"row{i}"): {"settings": DECOUPLED | {"DeepKD.MASK.OPTIMAL": 0.5 + i / 10}} for i in range(5)}
    made = cells(tmp_path, {cell: [60.0] for cell in masks}, methods=rows, runs=masks)

    told = dict(protocol(made))["Mask"]
    assert told[0] == "by row: dynamic, K 0.05 to 0.5, phases end at 0.333 and 0.667, renormalise"
    assert len(told) == 5


def test_a_plan_without_runs_tells_seeds_and_epochs(tmp_path):
    made = cells(tmp_path, {(PAIR, "kd"): [None, None, None]})

    assert protocol(made) == [("Seeds planned", ["0–2"]), ("Epochs", ["4"])]


def test_settings_that_are_missing_or_odd_are_left_out(tmp_path):
    odd = {(PAIR, "kd"): {"settings": {"SOLVER.BATCH_SIZE": 64, "DATASET": {"HOLDOUT": "much"}}}}
    told = dict(protocol(cells(tmp_path, {(PAIR, "kd"): [73.0]}, runs=odd)))

    assert "Training images" not in told
    assert told["Batch"] == ["64 images"]


def test_cells_that_were_made_alike_need_no_caution(tmp_path):
    assert cautions(cells(tmp_path, runs={(PAIR, "deepkd"): {"momentum": MOMENTA}})) == []


@pytest.mark.parametrize(
    ("entries", "what"),
    [
        ({"code": "other"}, "Code differ: c0de00000000c0de (KD); other (KD + DeepKD + DTM)"),
        ({"versions": VERSIONS | {"torch": "2.4.0"}}, "Versions differ: "),
        ({"teacher_acc": 70.0}, "Teacher differ: "),
        ({"processes": 8}, "Processes differ: 1 (KD); 8 (KD + DeepKD + DTM)"),
        ({"processes": 2, "resumed": [{"code": CODE}]}, "Processes differ: 1 (KD); 2, then 1 (KD + DeepKD + DTM)"),
    ],
)
def test_cells_of_other_code_versions_or_teacher_are_cautioned_of(tmp_path, entries, what):
    folder = make_table(tmp_path / "table", ACCURACIES)
    for run in (folder / f"runs/{PAIR}/deepkd").iterdir():
        change(run / "run.json", entries)

    (said,) = cautions(assemble(collect(folder)))
    assert said.startswith(what)


def test_runs_of_one_seed_that_several_processes_trained_are_cautioned_of_too(tmp_path):
    """All cells say the same then: each has a run of one process and one of four."""
    folder = make_table(tmp_path / "table", ACCURACIES)
    for run in folder.glob("runs/*/*/seed1-*"):
        change(run / "run.json", {"processes": 4})

    assert cautions(assemble(collect(folder))) == ["Processes differ: 1 and 4"]


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("SOLVER.BATCH_SIZE", 128, "Batch of KD + DeepKD + DTM is 128 images, of its base 64 images"),
        (
            "SOLVER.LR_SCHEDULE",
            "cosine",
            "Learning rate of KD + DeepKD + DTM is 0.05 to 0.0005 cosine, of its base ",
        ),
    ],
)
def test_a_gain_over_a_base_of_another_protocol_is_cautioned_of(tmp_path, key, value, what):
    (said,) = cautions(cells(tmp_path, runs={(PAIR, "deepkd"): {"settings": {key: value}}}))
    assert said.startswith(what)


KD_WEIGHTS = {"KD.LOSS.CE_WEIGHT": 0.1, "KD.LOSS.KD_WEIGHT": 0.9, "SOLVER.WARMUP_UNIT": "epoch"}
DEEPKD_WEIGHTS = KD_WEIGHTS | DECOUPLED
DEEPKD_WEIGHTS |= {f"DeepKD.{name}": value for name, value in (("CE_WEIGHT", 0.1), ("WARMUP", 0))}


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({}, None),
        ({"DeepKD.CE_WEIGHT": 0.5}, "CE 0.5, KD 0.9"),
        ({"DeepKD.TCG_WEIGHT": 1.0, "DeepKD.NCG_WEIGHT": 1.0}, "CE 0.1, KD 1"),
        ({"DeepKD.NCG_WEIGHT": 2.0}, "CE 0.1, TCKD 0.9, (1 − p) NCKD 2"),
        ({"DeepKD.WARMUP": 20}, "CE 0.1, KD 0.9, epochs of warm-up 20"),
        ({"DeepKD.WARMUP": 1}, None),
        ({"DISTILLER.TYPE": "SomebodysDeepKD"}, "not known"),
    ],
)
def test_loss_weights_that_differ_from_the_base_s_are_cautioned_of(tmp_path, changes, what):
    settings = DEEPKD_WEIGHTS | {"DeepKD.TCG_WEIGHT": 0.9, "DeepKD.NCG_WEIGHT": 0.9} | changes
    runs = {(PAIR, "kd"): {"settings": KD_WEIGHTS}, (PAIR, "deepkd"): {"settings": settings}}
    line = f"Loss weights of KD + DeepKD + DTM are {what}, of its base CE 0.1, KD 0.9"
    assert cautions(cells(tmp_path, runs=runs)) == ([line] if what else [])


def test_epochs_that_differ_from_the_base_s_are_cautioned_of(tmp_path):
    (said,) = cautions(cells(tmp_path, runs={(PAIR, "deepkd"): {"epochs": 8}}))
    assert said == "Epochs of KD + DeepKD + DTM are 8, of its base 4"
