"""load_student: any form of a run's student, and nothing that a file could have run."""

import copy
import json
import sys

import numpy as np
import pytest
import safetensors
import small
import torch
from descriptions import saved
from PIL import Image
from torch import nn

import deepkd_plugin
from deepkd_plugin import data, extensions
from deepkd_plugin.commands import cli
from deepkd_plugin.data.glyphs import CHARACTERS, load_glyphs100
from deepkd_plugin.errors import UserError
from deepkd_plugin.hosts import mdistiller as mdistiller_host
from deepkd_plugin.hosts.builtin.models import cifar_model_dict
from deepkd_plugin.run import checkpoint

OWN = """
from pathlib import Path
from torch import nn

Path(__file__).with_name("imported").touch()


class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.pool, self.head = nn.AdaptiveAvgPool2d(2), nn.Linear(12, num_classes)

    def forward(self, image):
        return {"logits": self.head(self.pool(image).flatten(1))}
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A user's module that leaves a trace if it is imported."""
    (tmp_path / "stranger.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(extensions.VARIABLE, "")
    yield tmp_path / "imported"
    sys.modules.pop("stranger", None)


def test_all_forms_of_a_run_s_student_are_one_network(run):
    image = torch.randn(3, 3, 32, 32)
    plain = cifar_model_dict["resnet8"][0](num_classes=100).eval()
    plain.load_state_dict(torch.load(run / "student_best", weights_only=True)["model"])
    wanted = plain(image)[0]
    for path in (run, run / "student_best", run / "student_best.safetensors", str(run)):
        student = deepkd_plugin.load_student(path)
        assert not student.training
        assert torch.equal(student(image), wanted)
        assert list(student.state_dict()) == list(plain.state_dict())
        assert student.description.class_names == tuple(CHARACTERS)
        assert (student.description.size, student.description.dataset) == (32, "glyphs100")
        assert torch.equal(copy.deepcopy(student)(image), wanted)


def test_a_file_alone_is_enough(run, tmp_path):
    alone = tmp_path / "elsewhere.safetensors"
    (run / "student_best.safetensors").rename(alone)
    assert deepkd_plugin.load_student(alone).description.architecture == "resnet8"


def test_files_hold_contiguous_tensors_and_say_what_they_are(run):
    with safetensors.safe_open(run / "student_best.safetensors", "pt") as file:
        about = file.metadata()
        assert all(file.get_tensor(name).is_contiguous() for name in file.keys())  # noqa: SIM118
    assert torch.load(run / "student_best", weights_only=True)["description"] == {
        name: text for name, text in about.items() if name not in ("format", "deepkd_fingerprint")
    }
    assert about["architecture"] == "resnet8"
    assert json.loads(about["class_names"]) == list(CHARACTERS)
    assert json.loads(about["mean"]) == [0.5009, 0.5017, 0.5007]
    assert (json.loads(about["size"]), json.loads(about["num_classes"])) == (32, 100)


def test_a_loop_of_one_s_own_data_says_nothing_wrong(tmp_path):
    """The config's data set has 100 classes, and the network 5: its file and folder say nothing of it."""
    small.make(small.config(tmp_path)).train()
    with safetensors.safe_open(tmp_path / "run" / "student_best.safetensors", "pt") as file:
        assert "architecture" not in file.metadata()
    assert not (tmp_path / "run" / "README.md").exists()
    with pytest.raises(UserError, match="describes 100 classes, and no tensor of its network has them"):
        deepkd_plugin.load_student(tmp_path / "run")


def test_a_student_that_was_trained_channels_last_is_written_contiguous(tmp_path, monkeypatch):
    trainer = small.make(small.config(tmp_path, EPOCHS=1, LR_DECAY_STAGES=[]))
    monkeypatch.setattr(trainer.scheduler, "step", lambda: None)
    conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    trainer.module.student.extra = conv
    trainer.folder.mkdir()
    numbers = dict.fromkeys(("test_acc", "train_loss", "lr", "images_per_second"), 1.0)
    trainer.finish_epoch(1, {"epoch": 1} | numbers, _NoLog())
    written = torch.load(tmp_path / "run" / "student_latest", weights_only=True)["model"]["extra.weight"]
    assert not conv.weight.is_contiguous()
    assert written.is_contiguous()
    assert torch.equal(written, conv.weight)


class _NoLog:
    def add(self, *entries):
        pass


def test_a_run_from_before_files_said_what_they_are(run):
    weights = torch.load(run / "student_best", weights_only=True)["model"]
    checkpoint.save_weights(weights, run / "student_best.safetensors")
    torch.save({"model": weights}, run / "student_best")
    for path in (run / "student_best.safetensors", run / "student_best"):
        assert deepkd_plugin.load_student(path).description.class_names == tuple(CHARACTERS)
    student = deepkd_plugin.load_student(run)
    assert student.description.class_names == tuple(CHARACTERS)


def test_prepare_makes_what_tests_make(run, data_root):
    student = deepkd_plugin.load_student(run)
    images, _ = load_glyphs100(data_root, "test")
    transform = data.source("glyphs100").test_transform()
    for pixels in images[:3]:
        image = Image.fromarray(pixels)
        assert torch.equal(student.description.prepare(image), transform(image))
    for mode, size in (("L", (50, 20)), ("P", (9, 7)), ("RGBA", (1, 1)), ("CMYK", (4, 80))):
        assert student.description.prepare(Image.new(mode, size)).shape == (3, 32, 32)
    line = Image.fromarray(np.arange(100_000, dtype=np.uint32).astype(np.uint8)[None, :])
    assert student.description.prepare(line).shape == (3, 32, 32)  # the whole would be 3,200,000 pixels wide


def test_imagenet_s_resize_and_crop_are_in_the_description():
    source = data.source("imagenet")
    cfg = _config("imagenet", "ResNet18")
    about = data.describe(cfg)
    assert (about.resize, about.size) == (256, 224)
    assert about.class_names[:2] == ("0", "1")  # no folders to read them from
    pixels = torch.randint(256, (3, 300, 400), dtype=torch.uint8)
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    bytes_of = source.test_transform()(pixels)
    wanted = (bytes_of.float() / 255 - torch.tensor(about.mean)[:, None, None]) / torch.tensor(about.std)[:, None, None]
    torch.testing.assert_close(about.prepare(image), wanted, rtol=0, atol=1e-6)


def _config(dataset, student):
    from deepkd_plugin.config.tree import add_deepkd_config
    from deepkd_plugin.hosts import builtin

    cfg = builtin.CFG.clone()
    add_deepkd_config(cfg)
    cfg.DATASET.TYPE, cfg.DATASET.ROOT, cfg.DISTILLER.STUDENT = dataset, "nowhere", student
    return cfg


def test_what_a_data_set_does_otherwise_is_refused(monkeypatch):
    import dataclasses

    from torchvision.transforms import v2

    other = dataclasses.replace(data.source("imagenet"), resizing=(v2.Pad(3), v2.CenterCrop(224)))
    monkeypatch.setitem(data.DATASETS, "imagenet", other)
    about = data.describe(_config("imagenet", "ResNet18"))
    assert about.resize is None
    with pytest.raises(UserError, match="imagenet: its test images are resized in a way that no file can hold"):
        about.prepare(Image.new("RGB", (224, 224)))


# ---------------------------------------------------------------- strangers' files


def test_a_file_cannot_have_a_module_imported(own, tmp_path):
    network = nn.Module()
    network.head = nn.Linear(12, 7)
    file = saved(tmp_path / "s.safetensors", network, architecture="stranger:Net")
    words = r"architecture is 'stranger:Net', which would import the module stranger; .* trust=True"
    with pytest.raises(UserError, match=words):
        deepkd_plugin.load_student(file)
    assert not own.exists()
    student = deepkd_plugin.load_student(file, trust=True)
    assert own.exists()
    assert student(torch.zeros(2, 3, 16, 16)).shape == (2, 7)


def test_nor_can_a_run_s_config(own, run):
    text = (run / "config.yaml").read_text()
    (run / "student_best.safetensors").unlink()
    torch.save({"model": torch.load(run / "student_best", weights_only=True)["model"]}, run / "student_best")
    for change in (("STUDENT: resnet8", "STUDENT: stranger:Net"), ("TYPE: glyphs100", "TYPE: stranger:read")):
        assert change[0] in text
        (run / "config.yaml").write_text(text.replace(*change))
        with pytest.raises(UserError, match="which would import the module stranger"):
            deepkd_plugin.load_student(run)
    assert not own.exists()


def test_a_module_that_is_allowed_here_may_be_named(own, tmp_path, monkeypatch):
    network = nn.Module()
    network.head = nn.Linear(12, 7)
    file = saved(tmp_path / "s.safetensors", network, architecture="stranger:Net")
    monkeypatch.setenv(extensions.VARIABLE, "stranger")
    assert deepkd_plugin.load_student(file)(torch.zeros(1, 3, 16, 16)).shape == (1, 7)


def test_a_network_that_is_given_takes_the_weights(tmp_path):
    class Given(nn.Module):
        def __init__(self, num_classes=7):
            super().__init__()
            self.head = nn.Linear(3 * 16 * 16, num_classes)

        def forward(self, image):
            return self.head(image.flatten(1)), {}

    network = Given()
    file = saved(tmp_path / "s.safetensors", network, architecture="gone:Given")
    image = torch.randn(2, 3, 16, 16)
    for given in (Given(), Given):
        assert torch.equal(deepkd_plugin.load_student(file, network=given)(image), network(image)[0])
    with pytest.raises(UserError, match="Given gives logits of the shape"):
        deepkd_plugin.load_student(file, network=Given(9))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_classes": 10**9}, "its num_classes is 1000000000"),
        ({"size": 10**6}, "its size is 1000000"),
        ({"class_names": ("a",)}, "its class_names is"),
        ({"std": (0.0, 1.0, 1.0)}, "its std is"),
        ({"mean": (float("nan"),) * 3}, "its mean is"),
        ({"zoo": "no"}, "its zoo is 'no'"),
        ({"resize": -1}, "its resize is -1"),
        ({"num_classes": 9, "class_names": tuple("abcdefghi")}, "describes 9 classes, and no tensor"),
        ({"architecture": "resnet9"}, "architecture is 'resnet9', and builtin has no such network"),
        ({"architecture": "resnet20"}, "holds another network than resnet20"),
        ({"architecture": "torchvision:nope"}, "torchvision has no network of this name"),
    ],
)
def test_a_description_that_cannot_be_meant_is_refused(tmp_path, changes, words):
    network = cifar_model_dict["resnet8"][0](num_classes=7)
    file = saved(tmp_path / "s.safetensors", network, **changes)
    with pytest.raises(UserError, match=words) as told:
        deepkd_plugin.load_student(file)
    assert str(told.value).startswith(str(file))


def test_files_that_are_no_student(run, tmp_path):
    bare = tmp_path / "w.pt"
    torch.save({}, bare)
    for path, words in (
        (tmp_path, "holds no student_best"),
        (tmp_path / "none.safetensors", "no such file"),
        (bare, "nothing says which network it is of"),
        (run / "latest", "use student_latest, which is beside it"),
    ):
        with pytest.raises(UserError, match=words):
            deepkd_plugin.load_student(path)


@pytest.mark.parametrize(
    ("words", "node", "files"),
    [
        (["export", "RUN", "--to", "onnx"], "DETECTION", ["student_best"]),
        (["export", "RUN/student_best", "--to", "torch"], "DETECTION", ["student_best"]),
        (["predict", "RUN", "IMAGE"], "DETECTION", ["student_best", "student_best.safetensors"]),
        (["predict", "RUN/student_best.safetensors", "IMAGE"], "DETECTION", ["student_best.safetensors"]),
        (["eval", "RUN"], "DETECTION", ["student_best"]),
        (["push", "RUN", "me/detector"], "DETECTION", ["student_best"]),
        (["export", "RUN", "--to", "safetensors"], "MODEL", ["model_final.pth"]),  # detectron2's
        (["push", "RUN", "me/detector"], "MODEL", ["model_final.pth"]),
    ],
)
def test_a_detector_s_run_is_refused_in_one_line(tmp_path, words, node, files, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    (folder / "config.yaml").write_text(f"{node}:\n  PROPOSALS: 8\n")
    Image.new("RGB", (9, 9)).save(tmp_path / "image.png")
    weights = {"backbone.body.conv1.weight": torch.ones(2, 3)}
    for name in files:
        if name.endswith(".safetensors"):
            checkpoint.save_weights(weights, folder / name)
        else:
            torch.save({"model": weights}, folder / name)
    before = sorted(folder.iterdir())
    words = [word.replace("RUN", str(folder)).replace("IMAGE", str(tmp_path / "image.png")) for word in words]
    assert cli.main(words) == 2
    captured = capsys.readouterr()
    assert captured.err == (
        f"deepkd: error: {folder}: its run trained a detector; STUDENT must be of a run that classifies images (deepkd "
        f"detect-eval, or detectron2's --eval-only, tests a detector)\n"
    )
    assert captured.out == ""
    assert sorted(folder.iterdir()) == before


def test_mdistillers_students_load_under_it(mdistiller, tmp_path, monkeypatch):
    monkeypatch.setattr(mdistiller_host, "locate", lambda: mdistiller.root)
    network = mdistiller.cifar_models["resnet8"][0](num_classes=7).eval()
    student = deepkd_plugin.load_student(saved(tmp_path / "s.safetensors", network, size=32))
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(student(image), network(image)[0])
