"""A detector trained in several processes: what they write is what one process writes."""

import json
import multiprocessing
from functools import partial
from pathlib import Path

import pytest
import small_detectors as tiny
import torch
import yaml
from processes import in_two_processes

from deepkd_plugin.detection import launch, trainer
from deepkd_plugin.detection.data.samples import DetectionSamples
from deepkd_plugin.detection.networks import network
from deepkd_plugin.detection.sampling import Sampler
from deepkd_plugin.distributed import collectives
from deepkd_plugin.errors import UserError

DELTAS = {"TOG": "0.05", "TCG": "-0.05", "NCG": "0.05"}
MOMENTA = [word for stream, delta in DELTAS.items() for word in (f"SOLVER.DECOUPLED.DELTA.{stream}", delta)]
METHODS = {
    "KD": [],
    "DKD": ["DETECTION.CLIP_NORM", "1.0", "DETECTION.FLIP", "0.5"],
    "DeepKD": [*MOMENTA, "GSNR.MEASURE", "True", "GSNR.EVERY", "1", "GSNR.WINDOW", "2"],
}
# an epoch has a batch of 5 images and one of a single image, tests have batches of 3 and 1
SHARED = ["SOLVER.BATCH_SIZE", "5", "DATASET.TEST.BATCH_SIZE", "3", "DETECTION.MIN_SIZE", "[40, 48]"]


def train(folder, method, *options, resume=False):
    """Train a detector with frozen norms, on images of two extents."""
    tiny.register()
    launch.network = partial(network, trained=True)
    trainer.LEAST_AP = 0.0
    DetectionSamples.__getitem__ = cut
    file = Path(folder) / "method.yaml"
    words = ["DISTILLER.TYPE", method, "DISTILLER.TEACHER_WEIGHTS", f"{folder}/teacher.pt", "EXPERIMENT.NAME", method]
    words += ["LOG.PREFIX", str(folder), *SHARED, *METHODS[method], *options]
    launch.train(str(file), words, resume, False, "torchrun")


WHOLE = DetectionSamples.__getitem__


def cut(samples, key):
    """Cut some images, so that a batch has more than one extent."""
    image, target = WHOLE(samples, key)
    if int(target["image_id"]) % 3 == 0 or samples.for_ap:
        return image, target
    return image[:, :36], target


def in_several(rank, folder, one):
    for method in METHODS:
        train(folder, method)
    # another process's run goes on here
    train(one, "DKD", "SOLVER.EPOCHS", "3", resume=True)
    failures = []
    try:
        train(folder, "KD", "SOLVER.LR", "1e30", "EXPERIMENT.NAME", "diverges")
    except UserError as error:
        failures.append(str(error))
    return {"failures": failures, "all": collectives.of_all({"rank": rank, "row": torch.full((rank,), rank)})}


def in_one(one, third):
    torch.set_num_threads(1)
    for method in METHODS:
        train(one, method)
    train(third, "DKD")


def prepare(folder):
    folder.mkdir()
    (folder / "method.yaml").write_text(yaml.safe_dump(tiny.CONFIG))
    torch.manual_seed(7)
    cfg = launch.read_config(str(folder / "method.yaml"), [])[0]
    torch.save({"model": network(tiny.TEACHER, len(tiny.CLASSES), cfg.DETECTION).state_dict()}, folder / "teacher.pt")
    return folder


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """The runs of two processes, and the same in one."""
    pytest.importorskip("pycocotools", reason="a whole run measures AP, by pycocotools")
    folder = tmp_path_factory.mktemp("several")
    with pytest.MonkeyPatch.context() as patch:
        for holder, name in ((launch, "network"), (trainer, "LEAST_AP"), (DetectionSamples, "__getitem__")):
            patch.setattr(holder, name, getattr(holder, name))
        patch.setitem(tiny.DETECTION_SETS, "tiny", None)
        tiny.register()
        one, two, third = (prepare(folder / name) for name in ("one", "two", "third"))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        # in a process of its own: a test that forks cannot do so where torch's threads for gradients have begun
        alone = multiprocessing.get_context("spawn").Process(target=in_one, args=(one, third))
        alone.start()
        alone.join()
        assert alone.exitcode == 0
        results = in_two_processes(in_several, folder, str(two), str(third), one_run=True)
        torch.set_num_threads(threads)
    return folder, results


def weights(folder, method):
    return torch.load(folder / "tiny" / method / "student_latest", weights_only=True)["model"]


def lines(folder, method):
    timed = ("images_per_second", "seconds", "data_seconds")
    text = (folder / "tiny" / method / "metrics.jsonl").read_text()
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in text.splitlines()]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(several, method):
    folder, _ = several
    ours, expected = (weights(folder / part, method) for part in ("two", "one"))
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-6, atol=1e-6)
    mine, other = (lines(folder / part, method) for part in ("two", "one"))
    for line, right in zip(mine, other, strict=True):
        assert line.keys() == right.keys()
        assert line["loss"] == pytest.approx(right["loss"], rel=1e-4)
        assert line["test_ap"] == pytest.approx(right["test_ap"], abs=1e-3)


@pytest.mark.slow
def test_gradient_samples_are_of_the_whole_batch(several):
    folder, _ = several
    mine, other = (lines(folder / part, "DeepKD")[-1]["gsnr"] for part in ("two", "one"))
    for stream, summary in other.items():
        # coordinates whose two samples hardly differ rule the mean of the ratios, and rounding rules these
        found, expected = ({k: v for k, v in of.items() if k != "mean"} for of in (mine[stream], summary))
        assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_all_stop_together_and_the_first_alone_writes(several):
    folder, results = several
    for result in results:
        (failure,) = result["failures"]
        assert "became" in failure
    assert json.loads((folder / "two/tiny/KD/run.json").read_text())["processes"] == 2
    assert not (folder / "two/tiny/diverges/latest").exists()


@pytest.mark.slow
def test_a_run_goes_on_in_another_number_of_processes(several):
    folder, _ = several
    run = json.loads((folder / "third/tiny/DKD/run.json").read_text())
    assert "processes" not in run
    assert run["resumed"][0]["processes"] == 2
    assert [line["epoch"] for line in lines(folder / "third", "DKD")] == [1, 2, 3]


@pytest.mark.slow
def test_each_process_has_what_all_have(several):
    _, results = several
    for result in results:
        assert [one["rank"] for one in result["all"]] == [0, 1]
        assert [one["row"].tolist() for one in result["all"]] == [[], [1]]


def test_an_images_samples_depend_on_its_seed_alone():
    labels = [torch.tensor([1, 1, 0, 0, 0, 0, -1, 2]), torch.tensor([0, 0, 0, 1, 0, 0, 0, 0])]
    sampler = Sampler(4, 0.5)
    sampler.seeds = [5, 6]
    positive, negative = sampler(labels)
    assert [int(mask.sum()) for mask in positive] == [2, 1]
    assert [int(mask.sum()) for mask in negative] == [2, 3]
    assert all(bool((one[mask.bool()] > 0).all()) for one, mask in zip(labels, positive))
    assert all(bool((one[mask.bool()] == 0).all()) for one, mask in zip(labels, negative))
    sampler.seeds = [6]
    (alone,), (rest,) = sampler(labels[1:])
    assert torch.equal(alone, positive[1])
    assert torch.equal(rest, negative[1])
