"""deepkd export: what the files hold, and that none gets its name before it was compared with the network."""

import importlib.util
import json
import zipfile

import pytest
import safetensors
import torch
from descriptions import saved
from PIL import Image
from torch import nn
from torchvision import models

from deepkd_plugin.commands import cli
from deepkd_plugin.data.glyphs import CHARACTERS
from deepkd_plugin.students import export, formats, load

ONNX = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason='pip install -e ".[onnx]" brings what ONNX needs',
)
TIMM = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason='pip install -e ".[networks]" brings timm')
TO = ["safetensors", "torch", pytest.param("onnx", marks=ONNX)]


def names(run):
    return {path.name for path in run.iterdir()}


@pytest.mark.parametrize("to", TO)
def test_a_run_is_exported_and_its_file_says_what_it_is(run, tmp_path, to, capsys):
    out = tmp_path / f"net{formats.SUFFIXES[to]}"
    assert cli.main(["export", str(run), "--to", to, "--out", str(out)]) == 0
    assert "logits agree with the network's to " in capsys.readouterr().out
    student = load.load_student(run)
    about, exported = formats.opened(out, trust=True)
    assert about == student.description
    image = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(exported(image), student(image), rtol=0, atol=1e-4)
    assert str(run.parents[2]).encode() not in out.read_bytes()
    assert b"hosts/builtin" not in out.read_bytes()  # no file of this machine
    if to == "onnx":
        import onnx

        model = onnx.load(out)
        assert json.loads({prop.key: prop.value for prop in model.metadata_props}["class_names"]) == list(CHARACTERS)
        assert (model.graph.input[0].name, model.graph.output[0].name) == ("image", "logits")


def test_where_the_descriptions_are(run, tmp_path):
    assert cli.main(["export", str(run), "--to", "torch"]) == 0
    extra = {formats.DESCRIPTION: ""}
    torch.export.load(run / "student_best.pt2", extra_files=extra)
    assert json.loads(extra[formats.DESCRIPTION])["class_names"] == list(CHARACTERS)
    out = tmp_path / "a.safetensors"
    assert cli.main(["export", str(run), "--to", "safetensors", "--out", str(out)]) == 0
    with safetensors.safe_open(out, "pt") as file:
        assert json.loads(file.metadata()["std"]) == [0.26, 0.2593, 0.2592]


@pytest.mark.parametrize("to", ["safetensors", "torch", pytest.param("onnx", marks=[ONNX, pytest.mark.slow])])
def test_a_file_that_gives_other_logits_is_not_written(run, tmp_path, monkeypatch, to, capsys):
    written = formats.content

    def wrong(network, about, to):
        with torch.no_grad():
            next(part for name, part in network.named_parameters() if name == "fc.bias")[3] += 0.01
        try:
            return written(network, about, to)
        finally:
            with torch.no_grad():
                network.fc.bias[3] -= 0.01

    monkeypatch.setattr(export, "content", wrong)
    before = names(run)
    out = tmp_path / f"net{formats.SUFFIXES[to]}"
    assert cli.main(["export", str(run), "--to", to, "--out", str(out)]) == 2
    assert "was not written, because its logits differ from the network's by 0.01" in capsys.readouterr().err
    assert not list(tmp_path.glob("*net*"))
    assert names(run) == before


def test_real_images_are_compared_too(run, monkeypatch, tmp_path):
    compared = []
    difference = export._difference

    def watch(network, run, about, images, out):
        compared.append(images)
        return difference(network, run, about, images, out)

    monkeypatch.setattr(export, "_difference", watch)
    out = str(tmp_path / "a.safetensors")
    assert cli.main(["export", str(run), "--to", "safetensors", "--out", out]) == 0
    assert compared[0].shape == (16, 3, 32, 32)
    assert compared[0].std() > 0.1


def test_a_file_alone_needs_images(run, pictures, tmp_path, capsys):
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((run / "student_best.safetensors").read_bytes())
    words = ["export", str(alone), "--to", "torch"]
    assert cli.main(words) == 2
    assert "is in no run's folder, so --images must name images" in capsys.readouterr().err
    assert cli.main([*words, "--images", str(pictures)]) == 0
    assert "on noise and on 3 images" in capsys.readouterr().out
    assert (tmp_path / "alone.pt2").is_file()


def test_what_is_there_stays(run, capsys):
    words = ["export", str(run), "--to", "safetensors"]
    assert cli.main(words) == 2
    assert "student_best.safetensors: is there already; --overwrite replaces it" in capsys.readouterr().err
    assert cli.main([*words, "--overwrite"]) == 0
    assert cli.main([*words, "--out", "a.onnx"]) == 2
    assert "--out must end in .safetensors" in capsys.readouterr().err


def test_a_missing_extra_is_told(run, monkeypatch, capsys):
    monkeypatch.setattr(formats.importlib, "import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    assert cli.main(["export", str(run), "--to", "onnx"]) == 2
    assert 'pip install -e ".[onnx]" brings it' in capsys.readouterr().err


def test_a_network_that_cannot_be_exported_is_told(run, tmp_path, capsys, monkeypatch):
    class Fickle(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 7)

        def forward(self, image):
            means = image.mean((2, 3))
            return self.head(means if means.sum().item() > 0 else -means)

    network = Fickle()
    file = saved(tmp_path / "s.safetensors", network, architecture="torchvision:resnet18")
    found = load.find_student(file)
    monkeypatch.setattr(export, "make", lambda found, trust: network.eval())
    with pytest.raises(load.UserError, match="resnet18 cannot be exported"):
        export.export(found, "torch", tmp_path / "s.pt2", torch.zeros(1, 3, 16, 16))


def _of_timm():
    import timm

    return timm.create_model("vit_tiny_patch16_224", num_classes=7, img_size=64)


@pytest.mark.slow
@pytest.mark.parametrize("to", TO)
@pytest.mark.parametrize(
    ("name", "make", "size"),
    [
        ("torchvision:resnet18", lambda: models.resnet18(num_classes=7), 224),
        pytest.param("timm:vit_tiny_patch16_224", _of_timm, 64, marks=TIMM),
    ],
)
def test_resnet18_and_vit_tiny_give_the_same_logits(tmp_path, name, make, size, to):
    torch.manual_seed(0)
    network = make().eval()
    file = saved(tmp_path / "s.safetensors", network, architecture=name, size=size, resize=size)
    Image.effect_mandelbrot((300, 200), (-3, -2.5, 2, 2.5), 100).save(tmp_path / "image.png")
    out = tmp_path / f"net{formats.SUFFIXES[to]}"
    words = ["--to", to, "--images", str(tmp_path / "image.png"), "--out", str(out)]
    assert cli.main(["export", str(file), *words]) == 0
    image = torch.randn(3, 3, size, size)
    _, exported = formats.opened(out, trust=True)
    torch.testing.assert_close(exported(image), network(image), rtol=0, atol=1e-4)


def test_a_program_says_what_it_is_without_torch_s_reader(run, monkeypatch):
    assert cli.main(["export", str(run), "--to", "torch"]) == 0
    monkeypatch.setattr(torch.export, "load", lambda *arguments, **options: pytest.fail("it was read"))
    file = run / "student_best.pt2"
    with pytest.raises(load.UserError, match="can be made to run code that is in the file"):
        formats.opened(file, trust=False)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a", "b")
    with pytest.raises(load.UserError, match="does not say what its images and classes are"):
        formats.opened(file, trust=False)
