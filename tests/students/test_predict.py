"""deepkd predict: the likeliest classes of images by name, of every form of a student."""

import csv
import importlib.util
import io
import json

import pytest
import torch
from PIL import Image

import deepkd_plugin
from deepkd_plugin.commands import cli


def wanted(run, path):
    """Return the names and probabilities of an image's classes, the likeliest first."""
    student = deepkd_plugin.load_student(run)
    shares = student(student.description.prepare(Image.open(path))[None]).softmax(1)[0].sort(descending=True)
    return [student.description.class_names[label] for label in shares.indices.tolist()], shares.values.tolist()


def test_an_image_s_top_five(run, pictures, capsys):
    assert cli.main(["predict", str(run), str(pictures / "a.png")]) == 0
    first, *rows = capsys.readouterr().out.splitlines()
    names, shares = wanted(run, pictures / "a.png")
    assert first == str(pictures / "a.png")
    assert rows == [f"  {share:7.2%}  {name}" for name, share in zip(names[:5], shares)]


def test_a_folder_is_csv(run, pictures, capsys):
    assert cli.main(["predict", str(run), str(pictures)]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["file"] for row in rows] == [str(pictures / name) for name in ("a.png", "b.bmp", "more/c.png")]
    for row in rows:
        names, shares = wanted(run, row["file"])
        assert [row[f"class_{place}"] for place in range(1, 6)] == names[:5]
        assert float(row["probability_1"]) == pytest.approx(shares[0], abs=1e-6)


def test_json_into_a_file(run, pictures, tmp_path, capsys):
    out = tmp_path / "out.json"
    words = ["--format", "json", "--top", "2", "--out", str(out)]
    assert cli.main(["predict", str(run / "student_latest"), str(pictures), *words]) == 0
    assert capsys.readouterr().out == f"{out}: 3 images\n"
    listed = json.loads(out.read_text(encoding="utf-8"))
    assert len(listed) == 3
    assert [len(one["top"]) for one in listed] == [2, 2, 2]
    assert set(listed[0]["top"][0]) == {"class", "label", "probability"}


@pytest.mark.parametrize(
    ("to", "file", "flags"),
    [
        ("torch", "student_best.pt2", ["--trust"]),
        pytest.param("onnx", "student_best.onnx", [], marks=pytest.mark.slow),
    ],
)
def test_exported_files_say_the_same(run, pictures, capsys, to, file, flags):
    if to == "onnx" and importlib.util.find_spec("onnxruntime") is None:
        pytest.skip('pip install -e ".[onnx]" brings onnxruntime')
    assert cli.main(["export", str(run), "--to", to]) == 0
    capsys.readouterr()
    assert cli.main(["predict", str(run), str(pictures), "--format", "text"]) == 0
    told = capsys.readouterr().out
    assert cli.main(["predict", str(run / file), str(pictures), "--format", "text", *flags]) == 0
    assert capsys.readouterr().out == told


@pytest.mark.parametrize("make", ["none.png", "empty", "broken.png"])
def test_images_that_are_none_are_named(run, pictures, capsys, make):
    (pictures / "empty").mkdir()
    (pictures / "broken.png").write_bytes(b"\x89PNG")
    assert cli.main(["predict", str(run), str(pictures / "a.png"), str(pictures / make)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"deepkd: error: {pictures / make}: ")
    assert captured.err.count("\n") == 1


def test_a_network_that_gives_no_numbers_is_told(run, pictures, capsys):
    weights = torch.load(run / "student_best", weights_only=True)
    weights["model"]["fc.weight"].fill_(3e38)
    torch.save(weights, run / "student_latest")
    assert cli.main(["predict", str(run / "student_latest"), str(pictures)]) == 2
    assert "or no finite numbers" in capsys.readouterr().err
