"""The epoch loop on a network and data small enough to follow by hand."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from deepkd_plugin.accuracy import evaluate
from deepkd_plugin.config.tree import add_deepkd_config
from deepkd_plugin.device import seed_everything
from deepkd_plugin.distillers import DKD, KD, DeepKD
from deepkd_plugin.distillers.vanilla import Vanilla
from deepkd_plugin.errors import UserError
from deepkd_plugin.hosts import builtin
from deepkd_plugin.run import checkpoint, record
from deepkd_plugin.run.metrics import read_metrics
from deepkd_plugin.trainer import DecoupledMomentumTrainer, Trainer


class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(12, width), nn.BatchNorm1d(width), nn.ReLU())
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        return self.head(self.body(x)), {}


@pytest.fixture
def cfg(tmp_path):
    tree = builtin.CFG.clone()
    add_deepkd_config(tree)
    tree.LOG.PREFIX = str(tmp_path)
    tree.SOLVER.EPOCHS = 4
    tree.SOLVER.BATCH_SIZE = 16
    tree.SOLVER.LR_DECAY_STAGES = [2]
    tree.DeepKD.WARMUP = 2
    return tree


def loaders():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(50, 3, 2, 2, generator=generator)
    labels = (images.flatten(1) @ torch.randn(12, 5, generator=generator)).argmax(1)
    train = TensorDataset(images, labels, torch.arange(50))
    return DataLoader(train, 16, shuffle=True), DataLoader(TensorDataset(images, labels), 16)


def make(cfg, method=DeepKD, trainer=DecoupledMomentumTrainer, name="run"):
    seed_everything(cfg.SOLVER.SEED)
    student = Net()
    distiller = Vanilla(student) if method is Vanilla else method(student, Net(16).requires_grad_(False), cfg)
    made = trainer(name, distiller, *loaders(), cfg)
    made.teacher_acc = 50.0  # as if it had been tested: these teachers know nothing
    return made


def weights(trainer):
    return {name: value.clone() for name, value in trainer.module.student.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("unit", ["epoch", "iteration"])
@pytest.mark.parametrize("deltas", [(0.0, 0.0, 0.0), (0.075, -0.075, 0.05)])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(cfg, deltas, unit):
    cfg.SOLVER.WARMUP_UNIT, cfg.SOLVER.WARMUP_EPOCHS = unit, 3
    for stream, delta in zip(("TOG", "TCG", "NCG"), deltas):
        cfg.SOLVER.DECOUPLED.DELTA[stream] = delta
    whole = make(cfg, name="whole")
    result = whole.train()
    first = make(cfg, name="parts")
    stop_after(first, 2)
    second = make(cfg, name="parts")
    again = second.train(resume=True)
    assert same(weights(whole), weights(second))
    assert result == again
    for a, b in zip(read_metrics(whole.folder), read_metrics(second.folder)):
        timed = ("seconds", "images_per_second", "data_seconds")
        assert {k: v for k, v in a.items() if k not in timed} == {k: v for k, v in b.items() if k not in timed}
    states = [checkpoint.load(t.folder / "latest", "test") for t in (whole, second)]
    for p, q in zip(*(s["optimizer"]["state"].values() for s in states)):
        assert all(torch.equal(a, b) for a, b in zip(p.values(), q.values()))


def watched(trainer):
    """(learning rate, epoch that the distiller gets) of every step that a trainer takes."""
    seen = []
    run = trainer.step.gradients

    def gradients(batch, epoch):
        seen.append((trainer.optimizer.param_groups[0]["lr"], epoch))
        return run(batch, epoch)

    trainer.step.gradients = gradients
    return seen


def test_by_epoch_a_warm_up_is_the_same_in_all_steps_of_an_epoch(cfg):
    cfg.SOLVER.WARMUP_EPOCHS = 2
    trainer = make(cfg)
    seen = watched(trainer)
    trainer.train()
    assert [epoch for _, epoch in seen] == [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4
    assert [rate for rate, _ in seen] == pytest.approx([0.0275] * 4 + [0.05] * 4 + [0.005] * 8)


def test_by_iteration_rate_and_losses_warm_up_within_an_epoch(cfg):
    cfg.SOLVER.WARMUP_UNIT = "iteration"
    cfg.SOLVER.WARMUP_EPOCHS = 1
    cfg.DeepKD.WARMUP = 2
    trainer = make(cfg)
    seen = watched(trainer)
    trainer.train()
    assert [epoch for _, epoch in seen] == [0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, *[3] * 4, *[4] * 4]
    rates = [0.05 * factor for factor in (0.325, 0.55, 0.775, *[1.0] * 5)] + [0.005] * 8
    assert [rate for rate, _ in seen] == pytest.approx(rates)
    records = read_metrics(trainer.folder)
    assert [record["lr"] for record in records] == pytest.approx([0.05, 0.05, 0.005, 0.005])
    assert [record["top_k"] for record in records] == [1, 2, 2, 4]


@pytest.mark.parametrize("method", [DKD, DeepKD])
def test_the_losses_factor_follows_the_iterations(cfg, method):
    cfg.SOLVER.WARMUP_UNIT = "iteration"
    cfg.DKD.WARMUP = cfg.DeepKD.WARMUP = 2
    module = make(cfg, method).module.train()
    image, target = torch.randn(8, 3, 2, 2), torch.arange(8) % 5
    whole, *parts = [module(image=image, target=target, epoch=epoch)[1] for epoch in (2, 0.25, 0.5, 1, 1.75)]
    for epoch, losses in zip((0.25, 0.5, 1, 1.75), parts):
        for name in {"loss_kd", "tcg"} & whole.keys():  # the mask of the non-target classes grows from epoch 1 to 2
            torch.testing.assert_close(losses[name], epoch / 2 * whole[name])
    if method is DeepKD:
        assert [module.top_k(epoch, 5) for epoch in (0.25, 1, 1.25, 2, 4)] == [1, 1, 2, 2, 4]


def test_a_mask_by_iteration_grows_in_every_step_and_leaves_the_rate_to_the_epochs(cfg):
    cfg.DeepKD.MASK.UNIT = "iteration"
    cfg.DeepKD.MASK.INITIAL = 1
    cfg.SOLVER.WARMUP_EPOCHS = 2
    trainer = make(cfg)
    seen = watched(trainer)
    trainer.train()
    assert [epoch for _, epoch in seen] == [step / 4 for step in range(1, 17)]
    assert [rate for rate, _ in seen] == pytest.approx([0.0275] * 4 + [0.05] * 4 + [0.005] * 8)


def test_a_method_that_declares_no_warm_up_gets_whole_epochs(cfg):
    cfg.SOLVER.WARMUP_UNIT = "iteration"
    trainer = make(cfg, Vanilla)
    seen = watched(trainer)
    trainer.train()
    assert {type(epoch) for _, epoch in seen} == {int}


def test_a_method_of_another_host_warms_up_by_iteration_too(cfg):
    """mdistiller's classes declare nothing of ours, and take min(epoch / warm-up, 1) of the epoch that they get."""

    class Theirs(nn.Module):
        def __init__(self, student, teacher, cfg):
            super().__init__()
            self.student = student
            self.warmup = 2  # as mdistiller's DKD has it

        def get_learnable_parameters(self):
            return list(self.student.parameters())

        def forward(self, image, target=None, **kwargs):
            logits = self.student(image)[0]
            if not self.training:
                return logits
            return logits, {
                "tog": min(kwargs["epoch"] / self.warmup, 1.0) * nn.functional.cross_entropy(logits, target)
            }

    cfg.SOLVER.WARMUP_UNIT = "iteration"
    trainer = make(cfg, Theirs)
    seen = watched(trainer)
    trainer.train()
    assert [epoch for _, epoch in seen][:6] == [0.25, 0.5, 0.75, 1.0, 1.25, 1.5]


def test_of_equal_epochs_the_first_stays_the_best(cfg):
    trainer = make(cfg)
    tested = iter((50.0, 62.5, 62.5, 40.0))
    trainer.test = lambda: {"test_acc": next(tested)}
    assert trainer.train() == {"best": 62.5, "best_epoch": 2, "last": 40.0, "epochs": 4}
    assert checkpoint.load(trainer.folder / "best", "test")["epoch"] == 2


def stop_after(trainer, epoch):
    """Interrupt a run when the training epoch after `epoch` begins."""
    run = trainer.train_epoch

    def stop(number):
        if number > epoch:
            raise KeyboardInterrupt
        return run(number)

    trainer.train_epoch = stop
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


def test_what_a_run_leaves(cfg):
    cfg.LOG.SAVE_CHECKPOINT_FREQ = 2
    cfg.SOLVER.DECOUPLED.DELTA.TCG = -0.075
    trainer = make(cfg)
    result = trainer.train()
    names = {p.name for p in trainer.folder.iterdir()}
    assert {"metrics.jsonl", "worklog.txt", "train.events", "latest", "best"} <= names
    assert {"student_latest", "student_best", "epoch_2", "student_2", "epoch_4", "student_4"} <= names
    records = read_metrics(trainer.folder)
    assert [r["epoch"] for r in records] == [1, 2, 3, 4]
    assert [r["lr"] for r in records] == pytest.approx([0.05, 0.05, 0.005, 0.005])
    assert [r["top_k"] for r in records] == [1, 2, 2, 4]
    assert set(records[0]["loss"]) == {"tog", "tcg", "ncg"}
    assert records[0]["momentum"] == pytest.approx({"tog": 0.9, "tcg": 0.825, "ncg": 0.9})
    assert records[0]["train_loss"] == pytest.approx(sum(records[0]["loss"].values()))
    assert records[0]["images_per_second"] > 0
    assert 0 <= records[0]["data_seconds"] <= records[0]["seconds"]
    assert result["best"] == max(r["test_acc"] for r in records)
    assert result["last"] == records[-1]["test_acc"]
    assert records[result["best_epoch"] - 1]["test_acc"] == result["best"]
    student = checkpoint.load(trainer.folder / "student_latest", "test")["model"]
    assert same(student, weights(trainer))
    state = checkpoint.load(trainer.folder / "latest", "test")
    assert not any(name.startswith("teacher") for name in state["model"])
    assert state["epoch"] == 4


def test_the_logged_numbers_are_the_epochs_own(cfg):
    """One epoch, one batch: the record must hold the loss and accuracy of the untouched student."""
    cfg.SOLVER.EPOCHS = 1
    trainer = make(cfg, Vanilla, Trainer)
    data = trainer.train_loader.dataset
    trainer.train_loader = DataLoader(data, 50)
    logits, losses = trainer.module.train()(image=data.tensors[0], target=data.tensors[1], epoch=1)
    trainer = make(cfg, Vanilla, Trainer)
    trainer.train_loader = DataLoader(data, 50)
    record = trainer.train_epoch(1)
    assert record["loss"]["task"] == pytest.approx(losses["ce"].item(), rel=1e-6)
    assert record["train_acc"] == pytest.approx(100 * (logits.argmax(1) == data.tensors[1]).float().mean().item())
    assert record["train_acc_top5"] == 100.0


def test_the_base_trainer_is_plain_sgd(cfg):
    trainer = make(cfg, KD, Trainer)
    student, teacher = Net(), trainer.module.teacher
    student.load_state_dict(trainer.module.student.state_dict())
    sgd = torch.optim.SGD(student.parameters(), 0.05, 0.9, weight_decay=1e-4)
    by_hand = KD(student, teacher, cfg).train()
    trainer.train()
    loader = loaders()[0]
    for epoch in range(1, 5):
        seed_everything(0, epoch)
        for group in sgd.param_groups:
            group["lr"] = 0.05 * 0.1 ** (epoch > 2)
        for image, target, _ in loader:
            sgd.zero_grad()
            sum(by_hand(image=image, target=target, epoch=epoch)[1].values()).backward()
            sgd.step()
    for a, b in zip(student.state_dict().values(), trainer.module.student.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", [Vanilla, KD, DeepKD])
def test_without_deltas_the_decoupled_trainer_is_the_base_trainer(cfg, method):
    base, decoupled = make(cfg, method, Trainer, "base"), make(cfg, method, name="decoupled")
    base.train()
    decoupled.train()
    for a, b in zip(weights(base).values(), weights(decoupled).values()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_deepkd_trains_under_the_base_trainer(cfg):
    trainer = make(cfg, DeepKD, Trainer)
    trainer.train()
    assert set(read_metrics(trainer.folder)[0]["loss"]) == {"task"}


def test_deltas_change_the_student_and_variants_differ(cfg):
    ends = []
    for variant, delta in (("paper", 0.0), ("paper", 0.05), ("release", 0.05)):
        cfg.SOLVER.DECOUPLED.VARIANT = variant
        cfg.SOLVER.DECOUPLED.DELTA.update({"TOG": delta, "TCG": -delta, "NCG": delta})
        trainer = make(cfg, name=f"{variant}{delta}")
        trainer.train()
        ends.append(weights(trainer))
    assert not same(ends[0], ends[1])
    assert not same(ends[1], ends[2])


def test_losses_of_other_methods_are_assigned_by_config(cfg):
    cfg.SOLVER.DECOUPLED.DELTA.TOG = -0.075
    trainer = make(cfg, KD)
    before = weights(trainer)
    with pytest.raises(UserError, match=r"LOSS_STREAMS: loss 'loss_ce' belongs to no stream.*'loss:stream'"):
        trainer.rehearse()
    assert same(weights(trainer), before)
    cfg.SOLVER.DECOUPLED.LOSS_STREAMS = ["loss_ce:tog", "loss_kd:ncg"]
    trainer = make(cfg, KD)
    trainer.train()
    assert set(read_metrics(trainer.folder)[0]["loss"]) == {"tog", "ncg"}


@pytest.mark.parametrize(
    ("how", "dampening", "matched_to"), [("none", 0.0, None), ("ema", "ema", None), ("matched", "matched", 0.8)]
)
def test_dampening_reaches_the_optimizer(cfg, how, dampening, matched_to):
    cfg.SOLVER.DECOUPLED.DAMPENING = how
    cfg.SOLVER.MOMENTUM = 0.8
    group = make(cfg).optimizer.param_groups[0]
    assert (group["dampening"], group["matched_to"]) == (dampening, matched_to)


def test_a_matched_decay_reaches_the_optimizer_in_the_variants_stream(cfg):
    cfg.SOLVER.DECOUPLED.WEIGHT_DECAY_STREAM = "matched"
    cfg.SOLVER.MOMENTUM = 0.8
    group = make(cfg).optimizer.param_groups[0]
    assert (group["weight_decay_stream"], group["decay_matched_to"]) == ("tcg", 0.8)
    cfg.SOLVER.DECOUPLED.WEIGHT_DECAY_STREAM = "ncg"
    group = make(cfg).optimizer.param_groups[0]
    assert (group["weight_decay_stream"], group["decay_matched_to"]) == ("ncg", None)


def test_a_loss_that_is_not_finite_stops_the_run_before_anything_is_saved(cfg):
    trainer = make(cfg)
    run = trainer.train_epoch

    def poison(number):
        if number == 2:
            with torch.no_grad():
                trainer.module.student.head.weight.fill_(math.inf)
        return run(number)

    trainer.train_epoch = poison
    with pytest.raises(UserError, match=r"loss 'tog' became nan in epoch 2.*SOLVER.LR.*latest \(epoch 1\)") as caught:
        trainer.train()
    assert "\n" not in str(caught.value)
    assert checkpoint.load(trainer.folder / "latest", "test")["epoch"] == 1
    assert [r["epoch"] for r in read_metrics(trainer.folder)] == [1]


def test_a_run_that_ended_before_its_result_was_noted_gets_the_note(cfg):
    trainer = make(cfg)
    result = trainer.train()
    record.note(trainer.folder, {"finished": False, "result": None})
    assert make(cfg).train(resume=True) == result
    held = record.read_run(trainer.folder)
    assert (held["finished"], held["result"]) == (True, result)
    with pytest.raises(UserError, match=f"--resume finds all {cfg.SOLVER.EPOCHS} epochs done"):
        make(cfg).train(resume=True)


def test_resuming_needs_the_same_config(cfg):
    stop_after(make(cfg), 1)
    cfg.SOLVER.MOMENTUM = 0.8
    with pytest.raises(UserError, match=r"needs the run's own config: SOLVER.MOMENTUM was 0.9, is 0.8"):
        make(cfg).train(resume=True)
    cfg.SOLVER.MOMENTUM = 0.9
    cfg.DATASET.ROOT = "elsewhere"  # where, not what
    make(cfg).train(resume=True)


def test_a_key_that_is_gone_does_not_end_a_run(cfg):
    """A checkpoint of before, with its way to make several backward passes."""
    trainer = make(cfg)
    stop_after(trainer, 1)
    latest = trainer.folder / "latest"
    state = checkpoint.load(latest, "test")
    state["config"]["SOLVER.GRADIENTS"] = "auto"
    del state["outline"]
    checkpoint.save(state | {"gradients": "sequential"}, latest)
    assert make(cfg).train(resume=True)["epochs"] == cfg.SOLVER.EPOCHS


def test_an_operation_that_cannot_be_repeated_ends_a_run_in_one_line(cfg):
    class Unrepeatable(KD):
        def forward_train(self, image, target, epoch, **batch):
            raise RuntimeError("bincount_cuda does not have a deterministic implementation, but you set …")

    with pytest.raises(UserError, match="SOLVER.DETERMINISTIC is True, and bincount_cuda does not"):
        make(cfg, Unrepeatable).train()


def test_resuming_needs_the_same_teacher(cfg):
    stop_after(make(cfg), 1)
    other = make(cfg)
    with torch.no_grad():
        other.module.teacher.head.bias[0] += 1.0
    other = DecoupledMomentumTrainer("run", other.module, *loaders(), cfg)
    other.teacher_acc = 50.0
    with pytest.raises(UserError, match="needs the run's own teacher"):
        other.train(resume=True)


def test_weights_that_the_last_step_ruined_are_not_saved(cfg):
    cfg.SOLVER.LR = 1e38
    trainer = make(cfg, Vanilla, Trainer)
    trainer.train_loader = DataLoader(trainer.train_loader.dataset, 50)
    with pytest.raises(UserError, match=r"loss 'test_loss' became nan after epoch 1.*no checkpoint"):
        trainer.train()
    assert not {"latest", "best", "student_latest", "student_best"} & {p.name for p in trainer.folder.iterdir()}
    assert read_metrics(trainer.folder) == []


def test_resuming_from_something_else(cfg):
    trainer = make(cfg)
    trainer.folder.mkdir()
    torch.save({"epoch": 3}, trainer.folder / "latest")
    with pytest.raises(UserError, match="--resume finds no run.json of this package beside 'latest'"):
        trainer.train(resume=True)
    record.write_run(trainer.folder, {"config_hash": "0", "finished": False})
    with pytest.raises(UserError, match="a checkpoint that this trainer wrote"):
        trainer.train(resume=True)


def test_autocast_keeps_losses_in_float32(cfg):
    cfg.SOLVER.AMP = True
    seen = []
    trainer = make(cfg)
    original = trainer.losses_by_stream
    trainer.losses_by_stream = lambda losses: seen.extend(v.dtype for v in losses.values()) or original(losses)
    trainer.train()
    assert set(seen) == {torch.float32}


def test_the_seed_decides_the_run(cfg):
    """The same seed gives the same student, another seed another one."""
    ends = []
    for seed in (0, 0, 1):
        cfg.SOLVER.SEED = seed
        trainer = make(cfg)
        trainer.train(overwrite=True)
        ends.append(weights(trainer))
    assert same(ends[0], ends[1])
    assert not same(ends[0], ends[2])


def test_evaluate_weights_batches_by_their_size(cfg):
    net = Net().eval()
    _, loader = loaders()
    images, labels = loader.dataset.tensors
    with torch.no_grad():
        logits = net(images)[0]
    got = evaluate(Vanilla(net), loader, torch.device("cpu"), cfg.SOLVER)
    assert got["test_acc"] == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())
    assert got["test_loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-6)


def test_data_parallel_is_looked_through(cfg):
    trainer = make(cfg)
    wrapped = Trainer("dp", nn.DataParallel(trainer.module), *loaders(), cfg)
    assert wrapped.module is trainer.module
