"""Tables of detectors: what is planned, what could stop it, how long it takes. Nothing is trained here."""

import json
import shlex
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from deepkd_plugin import config
from deepkd_plugin.config.shipped import shipped
from deepkd_plugin.detection import average_precision
from deepkd_plugin.detection import detectron2 as host
from deepkd_plugin.detection import launch as detection_launch
from deepkd_plugin.detection.data import DETECTION_SETS
from deepkd_plugin.detection.networks import SmallFPN
from deepkd_plugin.errors import UserError
from deepkd_plugin.launch import experiment_name
from deepkd_plugin.run import record
from deepkd_plugin.study.kinds import KINDS
from deepkd_plugin.study.kinds import detectron2 as module
from deepkd_plugin.study.measures import MEASURES
from deepkd_plugin.study.reproduce import tables
from deepkd_plugin.study.reproduce.display import LiveDisplay
from deepkd_plugin.study.reproduce.plan import make_plan, problems, with_teachers
from deepkd_plugin.study.reproduce.runs import execute, state
from deepkd_plugin.study.table import Run, Table

DETECTION, DETECTRON2 = KINDS["detection"], KINDS["detectron2"]
CANVAS = tables.find("glyph_canvas")


def plan(out, methods=("kd", "deepkd"), seeds=1, options=(), table=CANVAS):
    return make_plan(table, table.pairs[:1], methods, seeds, options, out)


def cfg(method, *options, table="glyph_canvas", pair="res20_res8"):
    return DETECTION.read(DETECTION.file(table, pair, method), options)


def complaint(call, *arguments):
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def read_by(monkeypatch):
    """Give a set another reader: read_by("coco", read)."""

    def put(name, read):
        monkeypatch.setitem(DETECTION_SETS, name, replace(DETECTION_SETS[name], read=read))

    return put


@pytest.fixture
def pycocotools(monkeypatch):
    """As if it were installed."""
    monkeypatch.setattr(average_precision, "import_pycocotools", lambda: None)


def test_every_kind_has_its_measures():
    assert KINDS.keys() == MEASURES.keys()
    assert {name: MEASURES[kind.name].key for name, kind in KINDS.items()} == {
        "classification": "test_acc",
        "detection": "test_ap",
        "detectron2": "test_ap",
    }


def test_a_folder_of_detection_is_a_table():
    assert CANVAS.kind is DETECTION
    assert (CANVAS.pairs, CANVAS.place) == (("res20_res8",), "configs/detection/glyph_canvas")
    made = make_plan(CANVAS, CANVAS.pairs, [row.name for row in CANVAS.methods], 1, [], Path("nowhere"))
    rows = {method.name: method.base for method in made.document.methods}
    assert rows == {"vanilla": None, "kd": None, "dkd": None, "deepkd": "kd", "deepkd_dkd": "dkd"}
    assert list(rows) == ["vanilla", "kd", "dkd", "deepkd", "deepkd_dkd"]
    coco = tables.find("coco_torchvision")
    assert coco.kind is DETECTION
    assert all(coco.file(pair, method) for pair in coco.pairs for method in coco.methods)


def test_a_run_is_what_the_launcher_makes_of_its_config_and_options(tmp_path):
    made = plan(tmp_path / "out", seeds=2, options=["SOLVER.EPOCHS", "3"])
    assert [run.name for run in made.runs][1:3] == ["res20_res8 kd seed 1", "res20_res8 deepkd seed 0"]
    for run in made.runs:
        held, _ = detection_launch.read_config(str(run.config), run.options)
        assert record.config_hash(held) == run.hash
        assert (held.SOLVER.SEED, held.SOLVER.EPOCHS, run.epochs, run.kind) == (run.seed, 3, 3, "detection")
        assert Path(held.LOG.PREFIX) / experiment_name(held, run.options) == run.folder
    assert len({run.hash for run in made.runs}) == 4


def test_table_json_names_the_kind_and_the_report_reads_it(tmp_path):
    plan(tmp_path / "out", ("vanilla", "dkd", "deepkd_dkd")).document.write()
    table = Table.read(tmp_path / "out")
    assert (table.name, table.kind, table.metric) == ("glyph_canvas", "detection", "AP (%)")
    (pair,) = table.pairs
    assert pair.label == "fasterrcnn_resnet20_fpn → fasterrcnn_resnet8_fpn"
    labels = [(m.name, m.label, m.base) for m in table.methods]
    assert labels == [
        ("vanilla", "student alone", None),
        ("dkd", "DKD", None),
        ("deepkd_dkd", "DKD + DeepKD + DTM", "dkd"),
    ]
    written = json.loads((tmp_path / "out" / "table.json").read_text())
    assert written["runs"][0]["config"] == "configs/detection/glyph_canvas/res20_res8/vanilla.yaml"


def test_a_table_of_the_first_kind_is_written_as_before(tmp_path):
    plan(tmp_path / "out", table=tables.find("glyphs100")).document.write()
    assert "kind" not in json.loads((tmp_path / "out" / "table.json").read_text())


def test_a_wrong_option_is_one_line(tmp_path):
    line = complaint(plan, tmp_path, ("kd",), 1, ["DETECTION.FLIP", "2.0"])
    assert line == "command line: DETECTION.FLIP is 2.0; it must be a number in [0, 1]"


def test_canvases_are_drawn_once_before_several_processes_would(tmp_path, read_by, pycocotools):
    asked = []
    read_by("glyph_canvas", lambda root, split: asked.append((root, split)))
    made = plan(tmp_path / "out", options=["DATASET.ROOT", "there"])
    assert problems(made, made.runs, prepare=False) == []
    assert asked == []
    assert problems(made, made.runs, prepare=True) == []
    assert asked == [("there", "train"), ("there", "test")]


def test_what_is_missing_is_one_line_each(tmp_path, read_by, pycocotools):
    def read(root, split):
        raise UserError("no such folder")

    read_by("coco", read)
    table = tables.find("coco_torchvision")
    options = ["DATASET.ROOT", str(tmp_path), "DISTILLER.TEACHER_WEIGHTS", "none.pth"]
    made = make_plan(table, table.pairs, ("vanilla", "kd"), 1, options, tmp_path / "out")
    data, teachers = problems(made, made.runs, prepare=False)
    assert data == "no such folder"
    files = f"none.pth ({', '.join(table.pairs)})"
    assert teachers.startswith(f"DISTILLER.TEACHER_WEIGHTS: files of teachers are missing: {files}; ")
    named = make_plan(table, table.pairs, ("vanilla",), 1, ["DETECTION.STUDENT_BACKBONE", "r18.pth"], tmp_path)
    _, backbone = problems(named, named.runs, prepare=False)
    assert backbone == "DETECTION.STUDENT_BACKBONE is 'r18.pth'; it must name a file of ImageNet weights"
    alone = [run for run in made.runs if run.method == "vanilla"]
    assert len(problems(made, alone, prepare=False)) == 1
    assert problems(made, [], prepare=False) == []


def test_a_machine_that_cannot_measure_ap_is_found_at_planning(tmp_path, monkeypatch):
    for name in ("pycocotools", "pycocotools.coco", "pycocotools.cocoeval"):
        monkeypatch.setitem(sys.modules, name, None)
    made = plan(tmp_path / "out")
    (line,) = problems(made, made.runs, prepare=False)
    assert line.endswith('pip install "deepkd_plugin[detection]"')


def test_a_gsnr_window_that_never_fills_is_found_at_planning(tmp_path):
    options = ["GSNR.MEASURE", "True", "GSNR.EVERY", "400"]
    line = complaint(plan, tmp_path, ("kd",), 1, options)
    # 188 steps in each of 8 epochs
    assert line == (
        "glyph_canvas, res20_res8 kd: GSNR.EVERY x GSNR.WINDOW is 400 x 10 = 4000 iterations; it must be at most "
        "1504, all that the run has, so that one window ends"
    )
    assert plan(tmp_path, ("kd",), 1, [*options[:3], "100"]).runs


def test_the_shipped_teacher_is_told_from_another(tmp_path):
    made = plan(tmp_path / "out", ("vanilla", "kd"))
    assert {run.teacher for run in with_teachers(made, {}).runs} == {None}
    for run in made.runs:
        run.folder.mkdir(parents=True)
        held = {"code": record.code_hash(), "config_hash": run.hash, "finished": True}
        held["teacher"] = None if run.method == "vanilla" else "another"
        (run.folder / "run.json").write_text(json.dumps(held))
    alone, taught = with_teachers(made, {}).runs
    assert state(alone) == "finished"
    assert "was taught by another teacher (its weights were another, now " in complaint(state, taught)
    assert state(taught, overwrite=True) == "new"


def test_images_and_steps_are_those_of_the_sets():
    glyph_canvas = DETECTION_SETS["glyph_canvas"]
    whole, part = cfg("kd"), cfg("kd", "DATASET.HOLDOUT", "0.2")
    assert (glyph_canvas.images(whole), glyph_canvas.steps(whole)) == ((1500, 500), 188)
    assert (glyph_canvas.images(part), glyph_canvas.steps(part)) == ((1200, 300), 150)
    assert {name: one.num_classes for name, one in DETECTION_SETS.items()} == {"glyph_canvas": 20, "coco": 80}


def test_the_detectors_of_a_pair_are_timed(monkeypatch):
    """By a clock of our own: every call to a detector's backbone is a second."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    forward = SmallFPN.forward

    def counted(backbone, images):
        now[0] += 1.0
        return forward(backbone, images)

    monkeypatch.setattr(SmallFPN, "forward", counted)
    options = ("SOLVER.BATCH_SIZE", "2", "DATASET.TEST.BATCH_SIZE", "2", "SOLVER.EPOCHS", "9")
    made = [cfg(method, *options) for method in ("vanilla", "kd", "deepkd")]
    tested = 500 / 2
    alone = 9 * (750 * 1.0 + tested)
    taught = 9 * (750 * 2.0 + tested) + tested
    assert DETECTION.seconds(made, 1, [1, 1, 1]) == [alone, taught, taught]


def fake(tmp_path, kind, states, **options):
    above = tmp_path / "runs"
    given = {"SOLVER.EPOCHS": "4", "LOG.PREFIX": str(above), "EXPERIMENT.PROJECT": "kd"}
    given |= {"EXPERIMENT.NAME": "seed0", "FAKE.STATES": str(states), **options}
    words = tuple(word for pair in given.items() for word in pair)
    return Run("pair", "kd", 0, Path("kd.yaml"), words, "0123", 4, above / "kd" / "seed0", kind)


@pytest.mark.parametrize(
    ("kind", "start"),
    [
        ("detection", "python tools/train_detection.py --cfg kd.yaml --overwrite SOLVER.EPOCHS 4 "),
        ("detectron2", "python detection/train_net.py --config-file kd.yaml SOLVER.EPOCHS 4 "),
    ],
)
def test_a_run_s_log_says_what_a_user_would_start(tmp_path, fake_run, fake_states, kind, start):
    run = fake(tmp_path, kind, fake_states)
    assert execute([run], 1, worker=fake_run.worker) == []
    first = (run.folder / "log.txt").read_text().splitlines()[0]
    assert first.split(" ", 3)[3].startswith(start)


def test_a_kind_s_own_checkpoint_says_that_a_run_can_go_on(tmp_path, fake_states):
    run = fake(tmp_path, "detectron2", fake_states)
    run.folder.mkdir(parents=True)
    held = {"code": record.code_hash(), "config_hash": run.hash, "finished": False}
    (run.folder / "run.json").write_text(json.dumps(held))
    (run.folder / "latest").touch()
    assert state(run) == "new"
    (run.folder / "last_checkpoint").touch()
    assert state(run) == "resumable"


def test_what_is_shown_of_a_run_is_its_ap(tmp_path, fake_states, capsys):
    run = fake(tmp_path, "detection", fake_states)
    run.folder.mkdir(parents=True)
    live = LiveDisplay(Console(width=80))
    live.begin([run], 0)
    live.started(run, resumed=False)
    lines = [{"epoch": e, "test_ap": ap, "test_acc": 99.0} for e, ap in ((1, 40.0), (2, 35.0))]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Console(width=80).print(live.view())
    assert " 2/4  35.00  40.00 " in capsys.readouterr().out


# mdistiller's detectors


def test_a_place_without_mdistiller_or_detectron2_is_told_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(host, "_loaded", None)
    line = complaint(tables.find, "coco")
    assert line.startswith("environment: MDISTILLER_ROOT must name a checkout of mdistiller, whose detection/ ")
    for folder in ("detection/model", "mdistiller/distillers"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "detection/model/rcnn.py").touch()
    monkeypatch.setitem(sys.modules, "detectron2", None)
    line = complaint(tables.find, "coco")
    assert line.startswith("detectron2 is not installed; pip install ")


def test_a_checkout_without_the_plugin_is_told_to_apply_it(tmp_path, monkeypatch):
    monkeypatch.setattr(host, "locate", lambda: tmp_path)
    line = complaint(DETECTRON2.file, "coco", "r101_r18", "DeepKD-{}-noDTM")
    assert line == (
        f"{tmp_path}: has no detection/configs/DeepKD/DeepKD-R18-R101-noDTM.yaml; the plugin must be in the "
        f"checkout: deepkd apply {tmp_path}"
    )


def test_every_row_of_coco_has_a_shipped_config_for_every_pair():
    folder = shipped("configs") / "detectron2"
    for method in tables._ON_DETECTRON2:
        for *_, called in module.PAIRS.values():
            assert (folder / f"{method.config.format(called)}.yaml").is_file()


def test_a_start_anew_goes_over_the_run_that_is_there(tmp_path, monkeypatch):
    from deepkd_plugin.detection.detectron2 import launch

    said = []
    monkeypatch.setattr(launch, "main", lambda words, overwrite: said.append((shlex.join(words), overwrite)) or 0)
    options = ["SEED", "1", "OUTPUT_DIR", str(tmp_path)]
    assert DETECTRON2.train("a.yaml", True, options) == 0
    assert DETECTRON2.train("a.yaml", False, options) == 0
    start = f"--config-file a.yaml --resume SEED 1 OUTPUT_DIR {tmp_path}"
    assert said == [(start, False), (start.replace("--resume ", ""), True)]


@pytest.fixture
def checkout(tmp_path, monkeypatch, mdistiller_root):
    """mdistiller's checkout with the plugin's configs, imported; skips without detectron2."""
    pytest.importorskip("detectron2.engine", reason="detectron2 is not installed", exc_type=ImportError)
    if not (mdistiller_root / "detection/model/rcnn.py").is_file():
        pytest.skip(f"{mdistiller_root} has no detection branch")
    root = tmp_path / "mdistiller"
    (root / "detection").mkdir(parents=True)
    (root / "mdistiller").symlink_to(mdistiller_root / "mdistiller")
    (root / "detection/model").symlink_to(mdistiller_root / "detection/model")
    shutil.copytree(mdistiller_root / "detection/configs", root / "detection/configs")
    folder = shipped("configs") / "detectron2"
    shutil.copytree(folder, root / module.CONFIGS, dirs_exist_ok=True)
    host.require(mdistiller_root)
    monkeypatch.setattr(host, "locate", lambda: root)
    return root


def test_coco_has_the_paper_s_pairs_and_its_rows_with_their_bases(checkout, tmp_path):
    table = tables.find("coco")
    assert table.pairs == ("r101_r18", "r101_r50", "r50_mv2")
    names = [method.name for method in table.methods]
    made = make_plan(table, table.pairs, names, 2, ["SOLVER.IMS_PER_BATCH", "16"], tmp_path / "out")
    assert len(made.runs) == len({run.hash for run in made.runs}) == 42
    kinds_of = {method: made.cfgs["r50_mv2", method].KD.TYPE for method in names}
    assert kinds_of == {
        "kd": "KD",
        "dkd": "DKD",
        "reviewkd": "ReviewKD",
        "reviewdkd": "ReviewDKD",
        "deepkd_dkd_nodtm": "DeepKD",
        "deepkd_dkd": "DeepKD",
        "deepkd_reviewdkd": "ReviewDeepKD",
    }
    masks = [made.cfgs["r101_r18", m].KD.DEEPKD.MASK.TYPE for m in ("deepkd_dkd_nodtm", "deepkd_dkd")]
    assert masks == ["none", "dynamic"]
    review = [made.cfgs["r101_r50", m].KD.REVIEWKD.LOSS_WEIGHT for m in names if "review" in m]
    assert len(review) == 3
    assert len(set(review)) == 1
    assert {cfg.SOLVER.IMS_PER_BATCH for cfg in made.cfgs.values()} == {16}
    made.document.write()
    written = Table.read(tmp_path / "out")
    assert written.kind == "detectron2"
    assert written.pairs[0].label == "ResNet101 → ResNet18"
    entry = json.loads((tmp_path / "out/table.json").read_text())["runs"][0]
    assert entry["config"] == "detection/configs/DeepKD/KD-R18-R101.yaml"
    assert entry["options"] == ["SOLVER.IMS_PER_BATCH", "16"]


def test_a_run_on_detectron2_has_the_hash_that_its_record_will_have(checkout, tmp_path):
    from deepkd_plugin.detection.detectron2.recorder import Computed

    table = tables.find("coco")
    made = make_plan(table, ("r101_r18",), ("deepkd_dkd",), 2, ["TEST.EVAL_PERIOD", "50000"], tmp_path / "out")
    for run in made.runs:
        held = DETECTRON2.read(run.config, run.options)
        assert record.config_hash(Computed(held)) == run.hash
        assert (run.seed, str(run.folder)) == (held.SEED, held.OUTPUT_DIR)
        assert run.epochs == 4  # three on the way and one at the end of 180,000 iterations
    assert config.flatten(held)["MODEL.META_ARCHITECTURE"] == "RCNNDeepKD"


def test_on_detectron2_what_is_missing_is_what_the_launcher_says(checkout, tmp_path):
    table = tables.find("coco")
    options = ["MODEL.DEVICE", "cpu", "DATASETS.TRAIN", "()"]
    made = make_plan(table, ("r101_r18",), ("kd", "dkd"), 2, options, tmp_path / "out")
    (line,) = problems(made, made.runs, prepare=False)
    assert "DATASETS.TRAIN" in line
