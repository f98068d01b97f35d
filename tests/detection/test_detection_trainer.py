import copy
import json

import pytest
import torch

from deepkd_plugin import device, streams
from deepkd_plugin.data import draws
from deepkd_plugin.detection import trainer as module
from deepkd_plugin.detection.data import get_detection_sets
from deepkd_plugin.detection.distillers import DISTILLERS, training_pass
from deepkd_plugin.detection.trainer import TRAINERS, evaluate, measure_teacher
from deepkd_plugin.errors import UserError
from deepkd_plugin.run.metrics import read_lines, read_metrics


@pytest.fixture
def make(detector, detection_config, tmp_path):
    """A trainer of a method: make("KD", "KEY", "VALUE", …); three steps are an epoch."""

    def made(method, *options):
        cfg = detection_config("DISTILLER.TYPE", method, "LOG.PREFIX", str(tmp_path / "output"), *options)
        networks = (detector(0),) if method == "NONE" else (detector(0), detector(1).requires_grad_(False))
        train_loader, test_loader, *_ = get_detection_sets(cfg)
        distiller = DISTILLERS[method](*networks, cfg)
        return TRAINERS[cfg.SOLVER.TRAINER]("tiny/run", distiller, train_loader, test_loader, cfg)

    return made


def epochs(trainer, count=1):
    """Train without tests; the records of the epochs."""
    records = []
    for epoch in range(1, count + 1):
        device.seed_everything(0, epoch)
        records.append(trainer.train_epoch(epoch))
        trainer.scheduler.step()
    return records


def weights(trainer):
    return {name: value.clone() for name, value in trainer.module.student.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def every_step(trainer, look):
    """What `look` gives before every update."""
    seen = []
    trainer.optimizer.register_step_pre_hook(lambda *arguments: seen.append(look()))
    return seen


def test_the_losses_warm_up_by_iteration_beside_the_rates_own_warm_up(make):
    options = ("DETECTION.WARMUP_ITERATIONS", "4", "SOLVER.LR", "0.2", "SOLVER.EPOCHS", "3", "DKD.WARMUP", "2")
    seen, rates = {}, {}
    for unit in ("epoch", "iteration"):
        trainer = make("DKD", *options, "SOLVER.WARMUP_UNIT", unit)
        rates[unit] = every_step(trainer, lambda trainer=trainer: trainer.optimizer.param_groups[0]["lr"])
        seen[unit], run = [], trainer.step.gradients

        def gradients(batch, epoch, seen=seen[unit], run=run):
            seen.append(epoch)
            return run(batch, epoch)

        trainer.step.gradients = gradients
        epochs(trainer, 2)
    assert seen["epoch"] == [1, 1, 1, 2, 2, 2]
    assert seen["iteration"] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])
    assert rates["epoch"] == rates["iteration"]


def test_the_rate_warms_up_by_iteration_and_then_is_the_schedules(make):
    trainer = make("NONE", "DETECTION.WARMUP_ITERATIONS", "4", "SOLVER.LR", "0.2", "SOLVER.EPOCHS", "3")
    trainer.rehearse()
    rates = every_step(trainer, lambda: trainer.optimizer.param_groups[0]["lr"])
    epochs(trainer, 3)
    schedule = [0.2 * factor for factor in (0.75, 0.25, 0.0)]  # cosine over three epochs
    factors = [0.001 + 0.999 * i / 4 for i in range(4)] + [1.0] * 5
    expected = [factor * schedule[i // 3] for i, factor in enumerate(factors)]
    assert rates == pytest.approx(expected, abs=1e-12)


def test_the_masks_k_follows_the_iterations_and_is_logged(make):
    trainer = make("DeepKD", "SOLVER.EPOCHS", "2")
    asked = []
    top_k = trainer.module.top_k
    trainer.module.top_k = lambda progress, classes: asked.append(progress) or top_k(progress, classes)
    records = epochs(trainer, 2)
    # the method in each step, and the log after each epoch's last
    assert asked == pytest.approx([0.0, 0.2, 0.4, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert [record["top_k"] for record in records] == [top_k(0.4, 6), top_k(1.0, 6)] == [3, 5]
    assert "top_k" not in epochs(make("DeepKD", "DeepKD.MASK.TYPE", "none"))[0]
    assert "top_k" not in epochs(make("KD"))[0]


@pytest.mark.parametrize("apart", [False, True])
def test_clipping_is_of_the_whole_gradient_and_the_streams_follow(make, momenta, apart):
    options = (*(momenta if apart else ()), "SOLVER.WEIGHT_DECAY", "0.0", "DETECTION.WARMUP_ITERATIONS", "0")
    free = make("DeepKD", *options)
    norms = every_step(free, lambda: norm(free))
    epochs(free)
    assert min(norms) > 0.5
    clipped = make("DeepKD", *options, "DETECTION.CLIP_NORM", "0.5", "SOLVER.WEIGHT_DECAY", "0.0")
    norms = every_step(clipped, lambda: norm(clipped))
    rates = every_step(clipped, lambda: clipped.optimizer.param_groups[0]["lr"])
    params = clipped.module.get_learnable_parameters()
    steps = every_step(clipped, lambda: [p.detach().clone() for p in params])
    epochs(clipped)
    assert norms == pytest.approx([0.5] * 3, rel=1e-4)
    assert not same(weights(free), weights(clipped))
    # the first step, without a momentum yet, is that of the streams' gradients, and they are clipped too
    moved = torch.stack([(new - old).norm() for new, old in zip(steps[1], steps[0])]).norm()
    assert float(moved) / rates[0] == pytest.approx(0.5, rel=1e-3)
    loose = make("DeepKD", *options, "DETECTION.CLIP_NORM", "1e6")
    epochs(loose)
    assert same(weights(loose), weights(free))


def norm(trainer):
    grads = [p.grad for p in trainer.module.get_learnable_parameters() if p.grad is not None]
    return float(torch.stack([g.norm() for g in grads]).norm())


@pytest.mark.parametrize("method", ["NONE", "KD", "DKD", "DeepKD"])
def test_with_all_deltas_0_a_method_is_torchs_sgd(make, method, monkeypatch):
    """One backward pass, and the same weights, bit for bit, as a loop written with torch.optim.SGD."""
    passes = []
    monkeypatch.setattr(streams.torch.autograd, "grad", counted(streams.torch.autograd.grad, passes))
    options = ("SOLVER.WEIGHT_DECAY", "0.01", "SOLVER.EPOCHS", "2")
    trainer = make(method, *options)
    plain = copy.deepcopy(trainer.module)
    records = epochs(trainer, 2)
    assert len(passes) == 6
    assert set(records[0]["momentum"].values()) == {0.9}
    if method != "DeepKD":  # its losses have no names but the streams'
        base = make(method, *options, "SOLVER.TRAINER", "base")
        epochs(base, 2)
        assert same(weights(base), weights(trainer))
    plain.train()
    sgd = torch.optim.SGD(plain.get_learnable_parameters(), 0.005, momentum=0.9, weight_decay=0.01)
    for epoch, rate in ((1, 0.005), (2, 0.0)):
        device.seed_everything(0, epoch)
        sgd.param_groups[0]["lr"] = rate
        trainer.train_loader.sampler.set_epoch(epoch)
        for step, (images, targets) in enumerate(trainer.train_loader, 1):
            progress = (3 * (epoch - 1) + step - 1) / 5
            seeds = [draws.word(0, epoch, int(target["image_id"])) for target in targets]
            _, losses = plain(image=images, target=targets, seeds=seeds, epoch=epoch, progress=progress)
            sgd.zero_grad()
            sum(losses.values()).backward()
            sgd.step()
    for name, value in plain.student.state_dict().items():
        torch.testing.assert_close(trainer.module.student.state_dict()[name], value, rtol=1e-5, atol=1e-7)
    if method == "NONE":
        assert same(dict(plain.student.state_dict()), weights(trainer))


def counted(function, calls):
    def count(*arguments, **named):
        calls.append(1)
        return function(*arguments, **named)

    return count


def test_momenta_of_their_own_cost_a_second_pass_and_change_the_weights(make, momenta, monkeypatch):
    passes = []
    monkeypatch.setattr(streams.torch.autograd, "grad", counted(streams.torch.autograd.grad, passes))
    apart, together = make("DeepKD", *momenta), make("DeepKD")
    (record,) = epochs(apart)
    assert len(passes) == 6  # tog and ncg share one
    assert record["momentum"] == pytest.approx({"tog": 0.95, "tcg": 0.85, "ncg": 0.95})
    assert set(record["loss"]) == {"tog", "tcg", "ncg"}
    epochs(together)
    assert not same(weights(apart), weights(together))


def test_losses_without_a_stream_are_refused_where_streams_differ(make, momenta):
    with pytest.raises(UserError, match=r"SOLVER.DECOUPLED.LOSS_STREAMS: loss 'loss_objectness' belongs to no"):
        make("KD", *momenta).rehearse()


def test_measuring_the_gsnr_changes_no_weight(make, momenta):
    plain = make("DeepKD", *momenta)
    epochs(plain, 2)
    measured = make("DeepKD", *momenta, "GSNR.MEASURE", "True", "GSNR.EVERY", "1", "GSNR.WINDOW", "3")
    record = epochs(measured, 2)[-1]
    assert same(weights(plain), weights(measured))
    assert set(record["gsnr"]) == {"tog", "tcg", "ncg"}
    assert all(found["ratio"] > 0 for found in record["gsnr"].values())


def test_bfloat16_is_close_to_float32(make, momenta):
    (wide,), (narrow,) = (epochs(make("DeepKD", *momenta, "SOLVER.AMP", str(amp))) for amp in (False, True))
    assert narrow["loss"] != wide["loss"]
    assert narrow["loss"] == pytest.approx(wide["loss"], rel=0.1, abs=0.01)


def test_a_teachers_own_numbers(detector, detection_config, any_teacher, monkeypatch, capsys):
    cfg = detection_config("DISTILLER.TYPE", "KD")
    *_, loader = get_detection_sets(cfg)[:2]
    distiller = DISTILLERS["KD"](detector(0), detector(1), cfg)
    numbers = {"AP": 41.0, "AP50": 62.0, "AP75": 43.0}
    monkeypatch.setattr(module, "average_precision", lambda detections, truths, classes: numbers)
    assert measure_teacher(distiller, loader, cfg, "file.yaml") == 41
    assert capsys.readouterr().out == "teacher   fasterrcnn_resnet8_fpn AP 41.00 % on the test set\n"
    assert measure_teacher(DISTILLERS["NONE"](detector(0), cfg), loader, cfg, "file.yaml") is None
    monkeypatch.undo()
    monkeypatch.setattr(module, "average_precision", lambda detections, truths, classes: numbers | {"AP": 0.99})
    with pytest.raises(UserError) as error:
        measure_teacher(distiller, loader, cfg, "file.yaml")
    assert str(error.value) == (
        "file.yaml: the teacher fasterrcnn_resnet8_fpn from DISTILLER.TEACHER_WEIGHTS finds nothing on tiny "
        "(AP 0.99 %); it must be trained on this data set"
    )


class Oracle(torch.nn.Module):
    """Finds what it is told, image by image; its classes are counted as any detector's."""

    def __init__(self, detector, found):
        super().__init__()
        self.roi_heads, self.found = detector.roi_heads, list(found)

    def forward(self, images):
        return [self.found.pop(0) for _ in images]


def test_ap_is_of_the_test_set(detector, detection_config):
    pytest.importorskip("pycocotools", reason="AP needs pycocotools")
    _, loader, *_ = get_detection_sets(detection_config("DATASET.TEST.BATCH_SIZE", "3"))
    truths = [target for _, targets in loader for target in targets]
    assert len(truths) == 4
    right = [{"boxes": t["boxes"], "labels": t["labels"], "scores": torch.ones(len(t["labels"]))} for t in truths]
    oracle = Oracle(detector(0), right)
    numbers = evaluate(oracle, loader, torch.device("cpu"))
    assert numbers == pytest.approx({"test_ap": 100, "test_ap50": 100, "test_ap75": 100})
    assert not oracle.roi_heads.training
    # a third of the width is cut off: an IoU of 2/3, so right at 0.50, 0.55, 0.60 and 0.65 of ten
    loose = [dict(one) for one in right]
    for one in loose:
        x1, y1, x2, y2 = one["boxes"].unbind(1)
        one["boxes"] = torch.stack([x1, y1, x2 - (x2 - x1) / 3, y2], 1)
    numbers = evaluate(Oracle(detector(0), loose), loader, torch.device("cpu"))
    assert numbers == pytest.approx({"test_ap": 40, "test_ap50": 100, "test_ap75": 0})


def test_a_trainer_on_its_own_tests_its_teacher(make, any_teacher, capsys):
    pytest.importorskip("pycocotools", reason="AP needs pycocotools")
    trainer = make("KD", "SOLVER.EPOCHS", "1")
    result = trainer.train()
    assert capsys.readouterr().out.startswith("teacher   fasterrcnn_resnet8_fpn AP ")
    assert trainer.teacher_acc is not None
    assert set(result) == {"best", "best_epoch", "last", "epochs"}


# whole runs, with AP after each epoch


def test_what_a_run_leaves(detect, any_teacher, momenta):
    code, _, err = detect("DeepKD", *momenta, "GSNR.MEASURE", "True", "GSNR.EVERY", "1", "GSNR.WINDOW", "2")
    assert code == 0, err
    records = read_metrics(detect.folder)
    assert [record["epoch"] for record in records] == [1, 2]
    assert [record["lr"] for record in records] == pytest.approx([0.005, 0])
    for record in records:
        assert {"test_ap", "test_ap50", "test_ap75", "top_k", "loss", "train_loss", "gsnr"} <= set(record)
        assert "test_acc" not in record
        assert "train_acc" not in record
        assert 0 <= record["test_ap"] <= record["test_ap50"] <= 100
    run = json.loads((detect.folder / "run.json").read_text())
    aps = [record["test_ap"] for record in records]
    assert run["result"] == {
        "best": max(aps),
        "best_epoch": aps.index(max(aps)) + 1,
        "last": aps[-1],
        "epochs": 2,
    }
    assert len(read_lines(detect.folder, "gsnr.jsonl")) == 3
    assert "test_ap50: " in (detect.folder / "worklog.txt").read_text()


def student(folder):
    return torch.load(folder / "student_latest", weights_only=True)["model"]


def test_a_resumed_run_is_the_uninterrupted_one(detect, any_teacher, momenta, monkeypatch):
    """Interrupted in the middle of its warm-up, of a window of gradient samples, and of an epoch."""
    options = [
        *(*momenta, "SOLVER.EPOCHS", "3", "DETECTION.WARMUP_ITERATIONS", "5", "DETECTION.CLIP_NORM", "5.0"),
        *("GSNR.MEASURE", "True", "GSNR.EVERY", "1", "GSNR.WINDOW", "4"),
    ]
    assert detect("DeepKD", *options, name="whole")[0] == 0
    whole = detect.folder
    prepare = module.DetectionTrainer.prepare

    def stop(trainer, batch, epoch, step):
        if (epoch, step) == (2, 2):
            raise KeyboardInterrupt
        return prepare(trainer, batch, epoch, step)

    with monkeypatch.context() as patch:
        patch.setattr(module.DetectionTrainer, "prepare", stop)
        code, _, err = detect("DeepKD", *options, name="parts")
    assert code == 130
    assert err.startswith("deepkd: interrupted in epoch 2. The last checkpoint is whole: ")
    assert "Resume with: python tools/train_detection.py --cfg " in err
    assert err.endswith("--resume\n")
    code, _, err = detect("DeepKD", *options, flags=["--resume"], name="parts")
    assert code == 0, err
    assert same(student(whole), student(detect.folder))
    timed = ("seconds", "images_per_second", "data_seconds")
    one, other = (
        [{name: value for name, value in record.items() if name not in timed} for record in read_metrics(f)]
        for f in (whole, detect.folder)
    )
    assert one == other
    code, _, err = detect("DeepKD", *options, flags=["--resume"], name="parts")
    assert code == 2
    assert "--resume finds all 3 epochs done" in err


def test_a_run_that_diverges_is_one_line(detect, any_teacher):
    code, _, err = detect("KD", "SOLVER.LR", "1e30")
    assert code == 2
    (line,) = err.splitlines()
    assert "became nan in epoch 1" in line or "became inf in epoch 1" in line
    assert "No epoch was finished" in line


def test_one_seed_gives_one_student_whatever_the_method(detect, any_teacher):
    """With a rate of nearly 0 the students stay what the seed made them."""
    ends = []
    for method in ("NONE", "KD"):
        assert detect(method, "SOLVER.LR", "1e-30", "SOLVER.EPOCHS", "1", name=method)[0] == 0
        weights = {n: t for n, t in student(detect.folder).items() if "running" not in n and "num_" not in n}
        ends.append(weights)
    assert same(*ends)


def test_a_training_step_uses_the_configs_images(make):
    trainer = make("NONE")
    parts = trainer.samples(2)
    assert set(parts) == {"image", "target", "seeds", "count", "counted", "progress"}
    assert len(training_pass(trainer.module.student, parts["image"], parts["target"]).logits) == 16
