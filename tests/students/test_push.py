"""A run's model card, and deepkd push. No hub is asked: an object that notes what it is told stands for its API."""

import dataclasses
import re
import types

import pytest
import yaml
from descriptions import Hub
from PIL import Image

from deepkd_plugin import card, data
from deepkd_plugin.commands import cli
from deepkd_plugin.run import folder, record
from deepkd_plugin.run.metrics import read_metrics
from deepkd_plugin.students import push


def test_a_run_s_card_says_what_it_is(run):
    text = (run / "README.md").read_text(encoding="utf-8")
    head = yaml.safe_load(text.split("---")[1])
    epochs = read_metrics(run)
    best = max(epochs, key=lambda epoch: epoch["test_acc"])
    (measured,) = head["model-index"][0]["results"]
    assert head["pipeline_tag"] == "image-classification"
    assert measured["dataset"] == {"name": "glyphs100", "type": "glyphs100", "split": "train"}
    assert [metric["value"] for metric in measured["metrics"]] == [best["test_acc"], best["test_acc_top5"]]
    assert "# resnet8 on glyphs100\n" in text
    assert "| teacher | none |" in text
    assert "| data | glyphs100, 100 classes, 400 training and 200 test images |" in text
    assert f"| last epoch | {epochs[-1]['test_acc']:.2f} % top-1" in text
    assert "images kept from training (`DATASET.HOLDOUT` 0.04)" in text
    assert str(run.parents[2]) not in text


def test_its_code_runs(run, pictures, monkeypatch, capsys):
    code = re.search(r"```python\n(.*?)```", (run / "README.md").read_text(encoding="utf-8"), re.DOTALL).group(1)
    Image.open(pictures / "a.png").save(run / "image.jpg")
    monkeypatch.chdir(run)
    exec(code, {})
    assert len(capsys.readouterr().out.strip()) == 1


def test_the_hub_s_own_reader_takes_it(run):
    hub = pytest.importorskip("huggingface_hub")
    about = hub.ModelCard.load(run / "README.md").data
    assert about.library_name == "deepkd_plugin"
    assert [result.metric_name for result in about.eval_results] == ["top-1", "top-5"]


def test_a_card_that_somebody_has_changed_stays(run):
    cfg = types.SimpleNamespace()
    path = run / "README.md"
    assert path in folder.own_files(run)
    path.write_text("mine")
    card.write(run, cfg, None, 1, (1, 1), {})
    assert path.read_text() == "mine"
    assert path not in folder.own_files(run)


def test_a_card_of_a_distilled_student_of_a_user_s_own(run):
    from deepkd_plugin.hosts.registry import BUILTIN, register
    from deepkd_plugin.students.load import read_config

    register(BUILTIN)
    cfg = read_config(run, ["DISTILLER.TYPE", "DeepKD", "DISTILLER.TEACHER", "resnet20"])
    about = dataclasses.replace(data.describe(cfg), architecture="mine:Net", dataset="cifar100")
    result = record.read_run(run)["result"]
    text = card.text(cfg, about, 5, (1, 1), result, record.read_run(run) | {"teacher_acc": 50.0}, read_metrics(run))
    assert "# mine:Net on cifar100, distilled from resnet20" in text
    assert "DeepKD over KD (arXiv 2505.15133)" in text
    assert ", trust=True)" in text
    assert yaml.safe_load(text.split("---")[1])["datasets"] == ["uoft-cs/cifar100"]


def test_push_uploads_the_card_and_the_student(run, monkeypatch, capsys):
    hub = Hub()
    monkeypatch.setattr(push, "_api", lambda: hub)
    (run / "student_best.onnx").touch()
    assert cli.main(["push", str(run), "me/small", "--private"]) == 0
    files = ["README.md", "student_best.safetensors", "student_best.onnx"]
    assert hub.calls == [("create", "me/small", True, True), ("upload", "me/small", str(run), files)]
    assert capsys.readouterr().out == f"https://hub/me/small: has {', '.join(files)}\n"


def test_the_hub_s_methods_take_what_they_are_given():
    hub = pytest.importorskip("huggingface_hub")
    import inspect

    for name in ("create_repo", "upload_folder"):
        ours = inspect.signature(getattr(Hub, name)).parameters
        assert ours.keys() <= inspect.signature(getattr(hub.HfApi, name)).parameters.keys()


def test_what_the_hub_refuses_is_one_line(run, monkeypatch, capsys):
    monkeypatch.setattr(push, "_api", lambda: Hub(ConnectionError("nobody\nanswers")))
    assert cli.main(["push", str(run), "me/small"]) == 2
    assert "me/small: the hub did not take it (ConnectionError: nobody answers)" in capsys.readouterr().err
    (run / "README.md").unlink()
    assert cli.main(["push", str(run), "me/small"]) == 2
    assert "must hold README.md and student_best.safetensors" in capsys.readouterr().err
