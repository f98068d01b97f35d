"""detection/train_net.py's way in: what is missing in one line, and whole runs."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from deepkd_plugin.commands import apply
from deepkd_plugin.detection import detectron2 as package
from deepkd_plugin.detection.detectron2 import launch
from deepkd_plugin.errors import UserError
from deepkd_plugin.hosts import mdistiller as mdistiller_host


@pytest.fixture
def train_net(host, configs, deepkd_tiny, options, mdistiller_root, monkeypatch, capsys):
    """The launcher in this process: train_net("DeepKD-R18-R101", "KEY", "VALUE", …, flags=()) -> (code, stderr)."""
    monkeypatch.setattr(launch, "locate", lambda: mdistiller_root)

    def run(name, *pairs, flags=()):
        code = launch.main(
            ["--config-file", str(configs / f"{name}.yaml"), "--num-gpus", "0", *flags, *options(*pairs)]
        )
        return code, capsys.readouterr().err.replace("deepkd: error: ", "", 1)

    return run


def test_train_resume_and_test(train_net, tmp_path, monkeypatch):
    from deepkd_plugin.detection.detectron2.trainer import StreamTrainer

    folder = tmp_path / "run"
    often = ("TEST.EVAL_PERIOD", "1", "SOLVER.CHECKPOINT_PERIOD", "1")
    step = StreamTrainer.run_step

    def interrupted(self):
        if self.iter == 1:
            raise KeyboardInterrupt
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(StreamTrainer, "run_step", interrupted)
        code, err = train_net("DeepKD-R18-R101", *often)
    assert code == 130
    assert "interrupted at iteration 1. Resume from the last checkpoint with: python" in err
    (line,) = (folder / "metrics.jsonl").read_text().splitlines()
    config = (folder / "config.yaml").read_text()
    code, err = train_net("DeepKD-R18-R101", *often)
    assert (code, err) == (
        2,
        f"{folder}: OUTPUT_DIR holds a run already; go on with --resume, name another, or remove it\n",
    )
    code, err = train_net("DeepKD-R18-R101", *often, "SOLVER.BASE_LR", "0.5", flags=["--resume"])
    assert code == 2
    assert f"{folder}: --resume needs the run's own config: SOLVER.BASE_LR was " in err
    assert ", is 0.5" in err
    code, err = train_net("KD-R18-R101", *often, flags=["--resume"])
    assert code == 2
    assert "--resume needs the run's own config: " in err
    assert (folder / "config.yaml").read_text() == config
    code, _ = train_net("DeepKD-R18-R101", *often, flags=["--resume"])
    assert code == 0
    assert [json.loads(text)["iteration"] for text in (folder / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    assert (folder / "metrics.jsonl").read_text().startswith(line)
    run = json.loads((folder / "run.json").read_text())
    assert run["command"].startswith("python detection/train_net.py --config-file ")
    (folder / "inference").rename(tmp_path / "before")
    code, _ = train_net("DeepKD-R18-R101", "MODEL.WEIGHTS", str(folder / "model_final.pth"), flags=["--eval-only"])
    assert code == 0
    again, before = (path / "coco_instances_results.json" for path in (folder / "inference", tmp_path / "before"))
    assert json.loads(again.read_text()) == json.loads(before.read_text())
    weights = torch.load(folder / "model_final.pth", weights_only=True)["model"]
    lost = [name for name in weights if name.startswith("roi_heads.")]
    torch.save({"model": {name: weights[name] for name in weights if name not in lost}}, tmp_path / "part.pth")
    code, err = train_net("DeepKD-R18-R101", "MODEL.WEIGHTS", str(tmp_path / "part.pth"), flags=["--eval-only"])
    assert code == 2
    assert f"lacks {len(lost)} tensors of the student, {lost[0]} for one; it must be the checkpoint" in err


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        (
            ("MODEL.WEIGHTS", "pretrained/gone.pth"),
            "command line: MODEL.WEIGHTS is 'pretrained/gone.pth'; it must be a file, here or in {detection}; make it "
            "with `deepkd merge-detector-weights TEACHER STUDENT pretrained/gone.pth`",
        ),
        (
            ("MODEL.DEVICE", "cuda"),
            "command line: MODEL.DEVICE is 'cuda'; it must be cpu on a machine without CUDA: add `MODEL.DEVICE cpu` to "
            "the command line",
        ),
        (
            ("DATASETS.TEST", "('nope',)"),
            "DATASETS.TEST is ('nope',); it must be names of sets that detectron2 knows",
        ),
        (
            ("DATASETS.TRAIN", "()"),
            "DATASETS.TRAIN is (); it must be the name of a set that detectron2 knows",
        ),
        (
            ("DATASETS.TRAIN", "('coco_2017_train',)"),
            "is missing; DETECTRON2_DATASETS must name the folder with coco/",
        ),
        (("KD.TYPE", "nope"), "KD.TYPE is 'nope'; it must be one of"),
    ],
)
def test_mistakes_end_in_one_line(train_net, monkeypatch, tmp_path, mdistiller_root, pairs, expected):
    monkeypatch.setattr("deepkd_plugin.device.count", lambda: 0)
    monkeypatch.chdir(tmp_path)
    code, err = train_net("DeepKD-R18-R101", *pairs)
    assert code == 2
    assert expected.format(detection=mdistiller_root / "detection") in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_more_gpus_than_there_are(train_net, monkeypatch):
    monkeypatch.setattr("deepkd_plugin.device.count", lambda: 1)
    code, err = train_net("DeepKD-R18-R101", "MODEL.DEVICE", "cuda", flags=["--num-gpus", "4"])
    assert (code, err) == (2, "command line: --num-gpus is 4; it must be at most 1, what there is\n")


@pytest.mark.parametrize("period", ["5000", "1"])
def test_an_interruption_says_how_to_go_on(train_net, monkeypatch, period):
    from deepkd_plugin.detection.detectron2.trainer import StreamTrainer

    take_step = StreamTrainer.run_step

    def interrupted(trainer):
        if trainer.iter == 1:
            raise KeyboardInterrupt
        take_step(trainer)

    monkeypatch.setattr(StreamTrainer, "run_step", interrupted)
    code, err = train_net("DeepKD-R18-R101", "SOLVER.CHECKPOINT_PERIOD", period)
    assert code == 130
    line = err.splitlines()[-1]
    assert line.startswith("deepkd: interrupted at iteration 1. ")
    expected = "No checkpoint was written yet; start again with: python detection/train_net.py --config-file "
    resume = "Resume from the last checkpoint with: python detection/train_net.py --resume --config-file "
    assert (resume if period == "1" else expected) in line


def test_a_run_that_is_made_anew_is_kept_until_the_new_one_has_finished(train_net, tmp_path, monkeypatch):
    """`reproduce --overwrite` asks for it; detectron2's command line has no such flag."""
    folder = tmp_path / "output"
    pairs = ("SOLVER.MAX_ITER", "4", "SOLVER.STEPS", "(2,)", "TEST.EVAL_PERIOD", "0", "OUTPUT_DIR", str(folder))
    assert train_net("DeepKD-R18-R101", *pairs)[0] == 0

    def names():
        return {path.name.partition(".tfevents.")[0] for path in folder.iterdir()}  # the rest is a time

    old = names()
    before = (folder / "run.json").read_bytes()
    main = launch.main
    monkeypatch.setattr(launch, "main", lambda words: main(words, overwrite=True))

    def fail(*arguments):
        assert (folder / "replaced" / "run.json").read_bytes() == before
        raise UserError("no start file")

    with monkeypatch.context() as patch:
        patch.setattr(launch, "work", fail)
        assert train_net("DeepKD-R18-R101", *pairs) == (2, "no start file\n")
    assert names() == old
    assert (folder / "run.json").read_bytes() == before
    written = (folder / "run.json").stat().st_mtime_ns
    assert train_net("DeepKD-R18-R101", *pairs)[0] == 0
    assert (folder / "run.json").stat().st_mtime_ns > written
    assert names() == old


def test_a_student_alone_can_be_tested(train_net, make_trainer, tmp_path):
    weights = make_trainer("DeepKD-R18-R101").model.state_dict()
    student = {name: tensor for name, tensor in weights.items() if not name.startswith("teacher.")}
    torch.save({"model": student}, tmp_path / "student.pth")
    pairs = ("MODEL.WEIGHTS", str(tmp_path / "student.pth"), "DATASETS.TRAIN", "()")
    assert train_net("DeepKD-R18-R101", *pairs, flags=["--eval-only"])[0] == 0
    assert (tmp_path / "run/inference/coco_instances_results.json").is_file()


def test_losses_that_are_not_finite(train_net):
    code, err = train_net("DeepKD-R18-R101", "SOLVER.BASE_LR", "1e30", "SOLVER.WARMUP_FACTOR", "1.0")
    assert code == 2
    assert "SOLVER.BASE_LR must be lower" in err.splitlines()[-1]


def test_files_are_found_here_or_in_detection(tmp_path, monkeypatch):
    (tmp_path / "root/detection").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "root/detection/a.yaml").write_text("")
    root = tmp_path / "root"
    assert launch.find_file("a.yaml", root, "x") == root / "detection/a.yaml"
    (tmp_path / "here/a.yaml").write_text("")
    assert launch.find_file("a.yaml", root, "x").resolve() == tmp_path / "here/a.yaml"
    for name in ("b.yaml", ""):
        with pytest.raises(UserError, match=f"x is '{name}'; it must name a file, here or in {root / 'detection'}"):
            launch.find_file(name, root, "x")


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Nothing imported yet, as far as `require` knows, and an empty current folder."""
    monkeypatch.setattr(package, "_loaded", None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)


def ends_in(message, capsys):
    """Whether the launcher ends in this one line and exit code 2."""
    assert launch.main(["--config-file", "a.yaml"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert message in err


def test_without_detectron2(fresh, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(launch, "locate", lambda: tmp_path)
    monkeypatch.setitem(sys.modules, "detectron2", None)
    ends_in("detectron2 is not installed; pip install git+https://github.com/facebookresearch/detectron2", capsys)


def test_a_detectron2_that_is_too_old(fresh, monkeypatch, tmp_path, host, capsys):
    monkeypatch.setattr(launch, "locate", lambda: tmp_path)
    from detectron2.engine.train_loop import TrainerBase

    monkeypatch.delattr(TrainerBase, "after_backward")
    message = "has no detectron2.engine.train_loop.TrainerBase.after_backward; its main branch of March 2023 or later"
    ends_in(message, capsys)


def test_without_mdistiller(fresh, monkeypatch, tmp_path, capsys):
    ends_in("MDISTILLER_ROOT must name a checkout of mdistiller, whose detection/ this builds on", capsys)
    monkeypatch.setattr(mdistiller_host, "locate", lambda: tmp_path)
    ends_in(f"{tmp_path}: has no detection/model/rcnn.py; a whole checkout of mdistiller is needed", capsys)


def test_another_package_named_model(fresh, host, tmp_path, mdistiller_root):
    with pytest.raises(UserError, match="another package named model is imported already, from"):
        package.require(tmp_path)
    assert package.require(mdistiller_root) is host


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, mdistiller_root, host):
    """A copy of mdistiller with the plugin applied, and a COCO of two images in its detection/datasets."""
    from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
    from PIL import Image

    root = tmp_path_factory.mktemp("checkout") / "mdistiller"
    for name in ("detection", "mdistiller", "tools"):
        shutil.copytree(mdistiller_root / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "*.ipynb"))
    apply.apply(root)
    things = [{"id": c["id"], "name": c["name"]} for c in COCO_CATEGORIES if c["isthing"]]
    coco = root / "detection/datasets/coco"
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 64, "height": 64} for i in (1, 2)]
    box = {"category_id": 1, "bbox": [5, 5, 40, 40], "area": 1600, "iscrowd": 0, "segmentation": []}
    boxes = [box | {"id": i, "image_id": i} for i in (1, 2)]
    (coco / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        (coco / split).mkdir()
        for image in images:
            Image.new("RGB", (64, 64), (200, 30, 30)).save(coco / split / image["file_name"])
        document = {"info": {}, "images": images, "annotations": boxes, "categories": things}
        (coco / f"annotations/instances_{split}.json").write_text(json.dumps(document))
    return root


def run_script(cwd, script, *words):
    environment = {name: value for name, value in os.environ.items() if name != mdistiller_host.ENVIRONMENT}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *PYTHONPATH])}
    command = [sys.executable, "-W", "ignore", script, *words]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


ROOT = apply.shipped("configs").parent
PYTHONPATH = [path for path in [os.environ.get("PYTHONPATH")] if path]


@pytest.mark.slow
def test_the_issue_s_command(checkout, tmp_path):
    """In a checkout after `deepkd apply`: one line without the merged weights, and two processes that train."""
    words = ("--config-file", "configs/DeepKD/DeepKD-R18-R101.yaml", "--num-gpus", "2", "MODEL.DEVICE", "cpu")
    done = run_script(checkout, "detection/train_net.py", *words)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()[-1:]
    assert "MODEL.WEIGHTS is 'pretrained/r18-r101.pth'; it must be a file" in line
    assert "deepkd merge-detector-weights TEACHER STUDENT pretrained/r18-r101.pth" in line
    small = {
        "MODEL.WEIGHTS": "",
        "MODEL.BACKBONE.FREEZE_AT": "0",
        "MODEL.RPN.POST_NMS_TOPK_TRAIN": "12",
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": "8",
        "TEACHER.MODEL.RESNETS.DEPTH": "50",
        "INPUT.MIN_SIZE_TRAIN": "(64,)",
        "DATALOADER.NUM_WORKERS": "0",
        "DATASETS.TEST": "('coco_2017_val',)",
        "TEST.DETECTIONS_PER_IMAGE": "5",
        "INPUT.MIN_SIZE_TEST": "64",
        "SOLVER.IMS_PER_BATCH": "2",
        "SOLVER.BASE_LR": "1e-6",
        "SOLVER.MAX_ITER": "1",
        "SOLVER.STEPS": "()",
        "OUTPUT_DIR": str(tmp_path / "run"),
    }
    pairs = [part for pair in small.items() for part in pair]
    done = run_script(checkout / "detection", "train_net.py", "--dist-url", "auto", *words, *pairs)
    assert done.returncode == 0, done.stderr
    run = json.loads((tmp_path / "run/run.json").read_text())
    assert (run["processes"], run["finished"]) == (2, True)
    (line,) = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["loss"].keys() == {"tog", "tcg", "ncg"}
