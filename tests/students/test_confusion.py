"""deepkd eval: a run's own accuracy, by class, and what is taken for what."""

import csv

import numpy as np
import pytest
import yaml
from PIL import Image

from deepkd_plugin.commands import cli
from deepkd_plugin.run.metrics import read_metrics
from deepkd_plugin.students.confusion import Confusion, worst, write


def test_a_run_is_tested_on_the_images_that_it_was_tested_on(run, capsys):
    assert cli.main(["eval", str(run)]) == 0
    out = capsys.readouterr().out
    epochs = read_metrics(run)
    best = max(epochs, key=lambda epoch: epoch["test_acc"])
    assert "(student_best) on glyphs100 (images kept from training, DATASET.HOLDOUT): top-1 " in out
    assert f": top-1 {best['test_acc']:.2f} %, " in out
    assert f"top-5 {best['test_acc_top5']:.2f} %, loss {best['test_loss']:.4f} over 200 images" in out
    assert f"run.json  best {best['test_acc']:.2f} %" in out
    rows = list(csv.DictReader((run / "eval_best.csv").open(encoding="utf-8")))
    assert len(rows) == 100
    assert sum(int(row["images"]) for row in rows) == 200
    assert sum(int(row["right"]) for row in rows) == round(2 * best["test_acc"])
    assert Image.open(run / "confusion_best.png").width > 500


@pytest.mark.slow
def test_so_is_its_last_epoch(run, capsys):
    epochs = read_metrics(run)
    assert cli.main(["eval", str(run / "student_latest")]) == 0
    assert f"top-1 {epochs[-1]['test_acc']:.2f} %" in capsys.readouterr().out
    assert (run / "confusion_latest.svg").is_file()


def test_its_data_may_have_moved(run, data_root, tmp_path, capsys):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["DATASET"]["ROOT"] = str(tmp_path / "gone")
    config["DATASET"]["TYPE"] = "cifar100"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert cli.main(["eval", str(run)]) == 2
    assert "holds no CIFAR-100" in capsys.readouterr().err
    assert not (run / "eval_best.csv").exists()
    assert cli.main(["eval", str(run), "DATASET.TYPE", "glyphs100", "DATASET.ROOT", str(data_root)]) == 0


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "needs RUN, or -m MODEL"),
        (["RUN", "-m", "resnet8"], "needs RUN, or -m MODEL"),
        (["RUN", "-d", "imagenet"], "--dataset goes with -m MODEL"),
        (["no/such/run"], "no such file; STUDENT must name a run's folder"),
    ],
)
def test_mistakes(run, words, complaint, capsys):
    assert cli.main(["eval", *(str(run) if word == "RUN" else word for word in words)]) == 2
    err = capsys.readouterr().err
    assert complaint in err
    assert err.count("\n") == 1


def test_counts_of_a_small_matrix(tmp_path):
    targets, predicted = np.array([0, 0, 0, 0, 1, 1, 2]), np.array([0, 1, 1, 2, 1, 1, 0])
    found = Confusion(targets, predicted, ["a", "b", "c", "d"], {})
    assert [found.accuracy(label) for label in range(4)] == [25.0, 100.0, 0.0, None]
    assert [found.mistaken(label) for label in range(4)] == [(1, 2), None, (0, 1), None]
    shares = found.matrix([0, 1, 2, 3])
    np.testing.assert_array_equal(shares[:3], [[0.25, 0.5, 0.25, 0], [0, 1, 0, 0], [1, 0, 0, 0]])
    assert np.isnan(shares[3]).all()
    assert found.by_mistakes() == [0, 1, 2, 3]
    assert worst(found) == "c 0.0 % (taken for a), a 25.0 % (taken for b), b 100.0 %"
    table, *_ = write(found, "title", tmp_path / "new", "x")
    rows = ["0,a,4,1,25.0,b,2", "1,b,2,2,100.0,,0", "2,c,1,0,0.0,a,1", "3,d,0,0,,,0"]
    assert table.read_text().splitlines()[1:] == rows


def test_a_picture_of_many_classes_has_the_worst(tmp_path):
    targets = np.repeat(np.arange(500), 2)
    predicted = targets.copy()
    predicted[[100, 101, 300]] = 7
    found = Confusion(targets, predicted, [f"class {label}" for label in range(500)], {})
    assert found.by_mistakes()[:3] == [7, 50, 150]
    *_, drawing = write(found, "title", tmp_path, "x")
    text = drawing.read_text()
    assert "the 40 of 500 classes with the most mistakes" in text
    assert "class 150" in text
    assert "class 151" not in text
