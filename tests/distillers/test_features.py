"""Losses on features: against their formulas, as a fourth stream of DeepKD, and what they are refused with."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from deepkd_plugin import config, solver
from deepkd_plugin.device import seed_everything
from deepkd_plugin.distillers import DeepKD
from deepkd_plugin.distillers.features import AT, FitNet
from deepkd_plugin.errors import UserError
from deepkd_plugin.hosts.registry import BUILTIN, register
from deepkd_plugin.launch import read_config
from deepkd_plugin.run import checkpoint
from deepkd_plugin.run.metrics import read_metrics
from deepkd_plugin.trainer import DecoupledMomentumTrainer

FEATURES = ("AT", "FITNET")


class Net(nn.Module):
    """A stem and two stages; the second halves the map."""

    def __init__(self, width):
        super().__init__()
        widths = (3, width, width, 2 * width)
        layers = zip(widths, widths[1:], (1, 1, 2))
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, stride, 1), nn.BatchNorm2d(b)) for a, b, stride in layers
        )
        self.head = nn.Linear(2 * width, 5)

    def forward(self, x):
        feats = []
        for stage in self.stages:
            feats.append(x := stage(x).relu())
        return self.head(x.mean((2, 3))), {"feats": feats}


def numbers(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def said(*maps):
    return torch.zeros(2, 5), {"feats": list(maps)}


def averaged(maps, side):
    """The means of a map's squares of pixels, (B, C, H, W) -> (B, C, side, side)."""
    b, c, h, w = maps.shape
    return maps.reshape(b, c, side, h // side, side, w // side).mean((3, 5))


def attention(maps, power):
    """A map's mean power over channels, of length 1 for each image, by NumPy."""
    vectors = (maps.numpy() ** power).mean(1).reshape(len(maps), -1)
    return vectors / np.sqrt((vectors**2).sum(1, keepdims=True))


@pytest.mark.parametrize("power", [2, 3])
def test_attention_transfer_is_its_formula(cfg, power):
    cfg.AT.P = power
    ours = [numbers(2, 4, 8, 8), numbers(2, 4, 8, 8), numbers(2, 6, 4, 4)]
    theirs = [numbers(2, 3, 8, 8), numbers(2, 5, 4, 4), numbers(2, 7, 8, 8)]
    stages = [(averaged(ours[1], 4), theirs[1]), (ours[2], averaged(theirs[2], 4))]
    wanted = 1000 * sum(((attention(s, power) - attention(t, power)) ** 2).mean() for s, t in stages)
    loss = AT(None, None, cfg)
    assert loss(said(*ours), said(*theirs), {}).item() == pytest.approx(wanted, rel=1e-12)
    # of the network with more stages the last ones count, and never its stem
    assert loss(said(*ours), said(theirs[0], numbers(2, 3, 8, 8), *theirs[1:]), {}).item() == pytest.approx(wanted)


def test_a_hint_is_its_formula(cfg):
    cfg.FITNET.update({"HINT_LAYER": 1, "INPUT_SIZE": [8, 8]})
    loss = FitNet(Net(4), Net(6), cfg).double()
    conv, norm, _ = loss.regressor
    ours, theirs = numbers(2, 4, 8, 8), numbers(2, 6, 4, 4)
    mixed = np.einsum("oc,bchw->bohw", conv.weight[:, :, 0, 0].detach(), averaged(ours, 4))
    mixed += conv.bias.detach().numpy()[:, None, None]
    mean, variance = (part(mixed, (0, 2, 3), keepdims=True) for part in (np.mean, np.var))
    wanted = 100 * ((np.maximum((mixed - mean) / np.sqrt(variance + norm.eps), 0) - theirs.numpy()) ** 2).mean()
    value = loss(said(ours, ours), said(theirs, theirs), {})
    assert value.item() == pytest.approx(wanted, rel=1e-9)
    value.backward()
    assert all(p.grad.abs().sum() > 0 for p in loss.get_learnable_parameters())


def test_a_hint_leaves_the_networks_as_they_were(cfg):
    cfg.FITNET.INPUT_SIZE = [8, 8]
    student, teacher = Net(4), Net(6).eval()
    student.stages[0].eval()
    before = copy.deepcopy(student.state_dict())
    FitNet(student, teacher, cfg)
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())
    assert (student.training, student.stages[0].training, teacher.training) == (True, False, False)


class Bare(Net):
    def forward(self, x):
        return super().forward(x)[0], {}


@pytest.mark.parametrize(
    ("name", "student", "teacher", "message"),
    [
        ("AT", Bare, Net, "DeepKD.FEATURE is AT, which compares maps of features, and the student gives none"),
        ("AT", Net, Bare, "the teacher gives none ('feats')"),
        ("FITNET", Net, Bare, "DeepKD.FEATURE is FITNET, which compares maps of features, and the teacher gives none"),
    ],
)
def test_networks_without_maps_are_refused(cfg, name, student, teacher, message):
    cfg.DeepKD.FEATURE, cfg.FITNET.INPUT_SIZE = name, [8, 8]
    with pytest.raises(UserError, match=message.replace("(", r"\(").replace(")", r"\)")):
        DeepKD(student(4), teacher(6), cfg).train()(
            image=torch.zeros(2, 3, 8, 8), target=torch.zeros(2).long(), epoch=1
        )
    cfg.DeepKD.FEATURE, cfg.FITNET.HINT_LAYER = "FITNET", 3
    with pytest.raises(UserError, match=r"FITNET.HINT_LAYER is 3; it must be at most 2"):
        DeepKD(Net(4), Net(6), cfg)


def made(cfg, feature, tmp_path, name="run", **keys):
    """A trainer of three epochs of four steps; keys: of DeepKD."""
    cfg = cfg.clone()
    cfg.LOG.PREFIX, cfg.LOG.WANDB = str(tmp_path), False
    cfg.SOLVER.update({"EPOCHS": 3, "BATCH_SIZE": 8, "LR_DECAY_STAGES": [2], "TRAINER": "DecoupledMomentumSGD"})
    cfg.SOLVER.CHANNELS_LAST = cfg.DISTILLER.FOLD_TEACHER = False
    cfg.SOLVER.DECOUPLED.DELTA.update({"TOG": 0.05, "TCG": -0.05, "NCG": 0.05, "FEAT": 0.02 if feature else 0.0})
    cfg.DISTILLER.TYPE, cfg.FITNET.INPUT_SIZE = "DeepKD", [8, 8]
    cfg.DeepKD.update({"FEATURE": feature or "none"} | keys)
    seed_everything(0)
    distiller = DeepKD(Net(4), Net(6).requires_grad_(False), cfg)
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(32, 3, 8, 8, generator=generator), torch.arange(32) % 5
    train = DataLoader(TensorDataset(images, labels, torch.arange(32)), 8, shuffle=True)
    trainer = DecoupledMomentumTrainer(name, distiller, train, DataLoader(TensorDataset(images, labels), 8), cfg)
    trainer.teacher_acc = 50.0
    return trainer


@pytest.mark.parametrize("feature", FEATURES)
def test_without_weight_it_is_deepkd_bit_for_bit(cfg, tmp_path, feature):
    plain, zero, felt = (
        made(cfg, name, tmp_path, f"{name}{weight}", FEAT_WEIGHT=weight)
        for name, weight in (("", 1.0), (feature, 0.0), (feature, 1.0))
    )
    for trainer in (plain, zero, felt):
        trainer.train()
    ours, same, other = (trainer.module.student.state_dict() for trainer in (plain, zero, felt))
    assert all(torch.equal(ours[name], same[name]) for name in ours)
    assert not torch.equal(ours["stages.0.0.weight"], other["stages.0.0.weight"])
    # and BatchNorm saw each batch once
    assert other["stages.0.1.num_batches_tracked"].item() == 12


def test_the_fourth_stream_has_a_momentum_of_its_own_and_is_measured(cfg, tmp_path):
    cfg.GSNR.update({"MEASURE": True, "EVERY": 1, "WINDOW": 4})
    trainer = made(cfg, "FITNET", tmp_path)
    trainer.train()
    line = read_metrics(trainer.folder)[-1]
    assert list(line["loss"]) == list(line["gsnr"]) == ["tog", "tcg", "ncg", "feat"]
    assert line["momentum"]["feat"] == pytest.approx(0.92)
    assert line["gsnr"]["feat"]["ratio"] > 0
    # of the student's weights alone; the loss on features does not reach its head
    head = sum(p.numel() for p in trainer.module.student.head.parameters())
    counted = sum(p.numel() for p in trainer.module.student.parameters())
    assert trainer.monitor.moments.parameters == counted
    assert (line["gsnr"]["tog"]["missing"], line["gsnr"]["feat"]["missing"]) == (0, head)


def test_gsnr_sets_the_fourth_momentum_too(cfg, tmp_path):
    cfg.GSNR.update({"EVERY": 1, "WINDOW": 4})
    cfg.SOLVER.DECOUPLED.ALLOCATION = "gsnr"
    trainer = made(cfg, "AT", tmp_path)
    trainer.train()
    momenta = [line["momentum"]["feat"] for line in read_metrics(trainer.folder)]
    assert all(0.88 <= m <= 0.92 for m in momenta)
    assert any(m != 0.9 for m in momenta)


@pytest.mark.parametrize("equal", [True, False])
def test_connectors_are_trained_by_the_fourth_stream_alone(cfg, tmp_path, equal):
    trainer = made(cfg, "FITNET", tmp_path)
    if equal:  # then the streams share a buffer, and a pass
        for group in trainer.optimizer.param_groups:
            group["momentum"] = dict.fromkeys(group["momentum"], 0.9)
    connector = trainer.module.feature.regressor[0].weight
    assert any(p is connector for p in trainer.module.get_learnable_parameters())
    assert trainer.module.get_extra_parameters() == sum(p.numel() for p in trainer.module.feature.parameters())
    before = connector.detach().clone()
    batch = next(iter(trainer.train_loader))
    _, losses = trainer.module.train()(image=batch[0], target=batch[1], epoch=1)
    alone = torch.autograd.grad(losses["feat"], connector, retain_graph=True)[0]
    others = losses["tog"] + losses["tcg"] + losses["ncg"]
    assert torch.autograd.grad(others, connector, allow_unused=True) == (None,)
    trainer.optimizer.backward(trainer.losses_by_stream(losses))
    assert torch.equal(connector.grad, alone)
    trainer.optimizer.step()
    assert not torch.equal(connector, before)


def test_connectors_are_in_checkpoints_and_in_no_student(cfg, tmp_path):
    cfg.DeepKD.MASK.TYPE = "none"  # the schedule of another depends on the number of epochs
    whole, parts = made(cfg, "FITNET", tmp_path, "whole"), made(cfg, "FITNET", tmp_path, "parts")
    whole.train()
    parts.cfg.SOLVER.EPOCHS = 2
    parts.train()
    again = made(cfg, "FITNET", tmp_path, "parts")
    again.train(resume=True)
    for name in ("latest", "student_latest"):
        ours, theirs = (checkpoint.load(t.folder / name, "test")["model"] for t in (whole, again))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[part], theirs[part]) for part in ours)
        assert any(part.startswith("feature.regressor") for part in ours) == (name == "latest")
    assert set(ours) == set(whole.module.student.state_dict())


def test_adamw_decays_what_it_decays_of_the_student(cfg):
    cfg.DeepKD.FEATURE, cfg.FITNET.INPUT_SIZE, cfg.DISTILLER.TYPE = "FITNET", [8, 8], "DeepKD"
    distiller = DeepKD(Net(4), Net(6), cfg)
    groups = solver.decoupled_adamw(distiller.student, distiller.get_learnable_parameters(), cfg).param_groups
    assert [{p.ndim < 2 for p in group["params"]} for group in groups] == [{False}, {True}]
    assert sum(len(group["params"]) for group in groups) == len(distiller.get_learnable_parameters())


def test_weak_views_alone_are_compared(cfg):
    cfg.DeepKD.update({"FEATURE": "AT", "BASE": "MLKD"})
    distiller = DeepKD(Net(4), Net(6), cfg).train()
    weak, strong, target = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.arange(4)
    _, losses = distiller(image=[weak, strong], target=target, epoch=1)
    ours, theirs = copy.deepcopy(distiller.student)(weak), distiller.teacher(weak)
    assert losses["feat"].item() == pytest.approx(distiller.feature(ours, theirs, {}).item(), rel=1e-5)
    assert distiller.student.stages[0][1].num_batches_tracked.item() == 2  # one for each view


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["DISTILLER.TEACHER_LOGITS", "table"], "'compute' with DeepKD.FEATURE AT, which needs more of the teacher"),
        (["DISTILLER.FOLD_TEACHER", "True"], "auto or False: DeepKD.FEATURE AT needs more of the teacher"),
        (["SOLVER.ACCUMULATE", "2"], "SOLVER.ACCUMULATE is 2; it must be 1 with DeepKD.FEATURE AT"),
        (["DISTILLER.TYPE", "KD"], "DeepKD.FEATURE is 'AT'; it must be 'none' with DISTILLER.TYPE KD"),
        (
            ["DeepKD.FEATURE", "none", "SOLVER.DECOUPLED.DELTA.FEAT", "0.05"],
            "it must be 0.0: the run's streams are tog",
        ),
        (["DeepKD.FEATURE", "REVIEWKD"], "none, AT or FITNET; REVIEWKD is mdistiller's, which is not here"),
        (["DeepKD.FEATURE", "KD"], "DeepKD.FEATURE is 'KD'; it must be one of none, AT, FITNET, OFD"),
        (
            ["DeepKD.FEATURE", "FITNET", "FITNET.INPUT_SIZE", "[64, 64]"],
            "FITNET.INPUT_SIZE is [64, 64]; it must be [32",
        ),
        (["DeepKD.FEAT_WEIGHT", "-1"], "DeepKD.FEAT_WEIGHT is -1.0; it must be a number from 0 on"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(keys, message):
    register(BUILTIN)
    with pytest.raises(UserError) as error:
        read_config(BUILTIN, "configs/glyphs100/res20_res8/deepkd.yaml", ["DeepKD.FEATURE", "AT", *keys])
    assert message in str(error.value)


def test_several_processes_are_refused(cfg, monkeypatch):
    cfg.DISTILLER.TYPE, cfg.DeepKD.FEATURE = "DeepKD", "AT"
    monkeypatch.setattr(config.checks.process_group, "size", lambda: 2)
    with pytest.raises(UserError, match="must be 'none' in 2 processes, which exchange logits alone"):
        config.checks.check_feature(cfg, {})


def test_what_a_config_asks_for(cfg):
    cfg.DISTILLER.TYPE, cfg.DeepKD.FEATURE = "DeepKD", "AT"
    assert config.streams(cfg) == ("tog", "tcg", "ncg", "feat")
    assert config.plain_teacher(cfg) == "DeepKD.FEATURE AT needs more of the teacher than its logits"
    assert DeepKD.loss_weights(cfg)["FEAT (AT)"] == 1.0
    cfg.DeepKD.FEATURE = "none"
    assert config.streams(cfg) == ("tog", "tcg", "ncg")
    assert config.plain_teacher(cfg) == ""
