"""mdistiller's methods on features as DeepKD's fourth stream, beside what mdistiller's own distillers say."""

import copy
import shlex
from pathlib import Path

import pytest
import torch

from deepkd_plugin import data
from deepkd_plugin.config import contrasts
from deepkd_plugin.distillers import DeepKD
from deepkd_plugin.distillers.features import THEIRS
from deepkd_plugin.errors import UserError
from deepkd_plugin.hosts import builtin
from deepkd_plugin.hosts import mdistiller as mdistiller_host
from deepkd_plugin.hosts.registry import BUILTIN, register
from deepkd_plugin.launch import make_distiller, read_config
from deepkd_plugin.study.kinds import classification

ROOT = Path(__file__).parents[2]
NODES = {
    "CRD": {"FEAT": {"DIM": 8, "STUDENT_DIM": 64, "TEACHER_DIM": 64}},
    "REVIEWKD": {"SHAPES": [1, 8, 16, 32], "OUT_SHAPES": [1, 8, 16, 32], "WARMUP_EPOCHS": 4}
    | {"IN_CHANNELS": [16, 32, 64, 64], "OUT_CHANNELS": [16, 32, 64, 64]},
}
"""What the config nodes of methods must say of this pair of networks."""


def networks(zoo):
    torch.manual_seed(0)
    return zoo["resnet8"][0](num_classes=10), zoo["resnet14"][0](num_classes=10).requires_grad_(False).eval()


def batch(name, images=6):
    torch.manual_seed(1)
    made = {"image": torch.randn(images, 3, 32, 32), "target": torch.arange(images) % 10, "epoch": 2}
    contrast = {"index": torch.arange(images), "contrastive_index": torch.randint(12, (images, 5))}
    contrast["contrastive_index"][:, 0] = contrast["index"]
    return made | (contrast if name == "CRD" else {})


def settled(host, name):
    cfg = host.cfg.clone()
    cfg.DISTILLER.TYPE, cfg.DeepKD.FEATURE, cfg.DeepKD.FEAT_WEIGHT = "DeepKD", name, 0.5
    for key, value in NODES.get(name, {}).items():
        cfg[name][key].update(value) if isinstance(value, dict) else cfg[name].update({key: value})
    cfg.CRD.NCE.K = 4
    return cfg


@pytest.mark.parametrize("zoo", ["mdistiller", "builtin"])
@pytest.mark.parametrize("name", ["AT", "FITNET", *THEIRS])
def test_the_fourth_loss_is_mdistillers_own(mdistiller, name, zoo):
    cfg = settled(mdistiller, name)
    zoo = builtin.cifar_model_dict if zoo == "builtin" else mdistiller.cifar_models
    rest = (12,) if name == "CRD" else ()
    student, teacher = networks(zoo)
    before = copy.deepcopy(student.state_dict())
    ours = DeepKD(student, teacher, cfg, *rest)
    # they are made without a trace in the networks
    assert all(torch.equal(before[part], value) for part, value in ours.student.state_dict().items())
    theirs = mdistiller.distillers[name](*networks(zoo), cfg, *rest)
    theirs.student.load_state_dict(before)  # some of theirs move its BatchNorm's means
    connectors = {
        part: value for part, value in theirs.state_dict().items() if not part.startswith(("student.", "teacher."))
    }
    if name == "FITNET":
        connectors = {
            {"conv": "regressor.0.", "bn": "regressor.1."}[part.split(".")[1]] + part.split(".")[2]: value
            for part, value in connectors.items()
        }
        ours.feature.load_state_dict(connectors)
    elif name != "AT":
        ours.feature.theirs.load_state_dict(connectors)
    ours.train()
    theirs.train()
    theirs.teacher.eval()  # mdistiller's own OFD leaves it in training mode
    logits, losses = ours(**copy.deepcopy(batch(name)))
    with torch.no_grad() if name == "KDSVD" else torch.enable_grad():
        their_logits, their_losses = theirs(**copy.deepcopy(batch(name)))
    assert torch.equal(logits, their_logits)
    assert losses["feat"].item() > 0 or name == "KDSVD"
    torch.testing.assert_close(losses["feat"], 0.5 * their_losses["loss_kd"].squeeze(), rtol=1e-5, atol=1e-7)
    assert ours.student.bn1.num_batches_tracked.item() == 1

    if name == "KDSVD":
        return
    assert ours.get_extra_parameters() == sum(p.numel() for p in theirs.get_learnable_parameters()) - sum(
        p.numel() for p in theirs.student.parameters()
    )
    losses["feat"].backward()
    their_losses["loss_kd"].backward()
    torch.testing.assert_close(
        ours.student.conv1.weight.grad, 0.5 * theirs.student.conv1.weight.grad, rtol=1e-3, atol=1e-6
    )
    assert all(p.grad is not None for p in ours.get_learnable_parameters()[len(list(student.parameters())) :])
    copy.deepcopy(ours)  # no graph is left in it


def test_networks_that_a_method_cannot_compare_are_refused(mdistiller):
    cfg = settled(mdistiller, "REVIEWKD")
    cfg.REVIEWKD.IN_CHANNELS = [1, 2, 3, 4]
    distiller = DeepKD(*networks(builtin.cifar_model_dict), cfg).train()
    with pytest.raises(UserError, match=r"mdistiller's REVIEWKD cannot compare these networks \(RuntimeError"):
        distiller(**batch("REVIEWKD"))
    cfg = settled(mdistiller, "OFD")
    with pytest.raises(UserError, match=r"FEATURE is OFD, and mdistiller's OFD cannot compare .* \(AttributeError"):
        DeepKD(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), cfg)


def test_the_contrast_of_crd_gets_its_indices(mdistiller, data_root):

    options = ["DeepKD.FEATURE", "CRD", "DATASET.ROOT", str(data_root), "DATASET.TRAIN_PER_CLASS", "1"]
    options += ["CRD.FEAT.STUDENT_DIM", "64", "CRD.FEAT.TEACHER_DIM", "64", "CRD.NCE.K", "4"]
    cfg, _ = read_config(mdistiller, "configs/glyphs100/res20_res8/deepkd.yaml", options)
    assert contrasts(cfg) == "DeepKD.FEATURE CRD"
    loader, _, count, num_classes = data.get_dataset(cfg)
    distiller = make_distiller(mdistiller, cfg, count, num_classes).train()
    assert len(distiller.feature.theirs.contrast.memory_v1) == count
    image, target, index, contrast = next(iter(loader))
    _, losses = distiller(image=image, target=target, index=index, contrastive_index=contrast, epoch=1)
    assert list(losses) == ["tog", "tcg", "ncg", "feat"]
    for keys, message in (
        (["AUGMENT.MIXUP", "0.2"], "DeepKD.FEATURE is 'CRD'; it must be another with mixed images or soft labels"),
        (["DATASET.PIPELINE", "device"], "must be 'workers' with DeepKD.FEATURE CRD: its contrast indices"),
    ):
        with pytest.raises(UserError, match=message):
            read_config(mdistiller, "configs/glyphs100/res20_res8/deepkd.yaml", options + keys)


def test_the_command_of_the_docs_has_a_fourth_loss(mdistiller, data_root):
    text = (ROOT / "docs/feature_streams.md").read_text(encoding="utf-8").replace("\\\n", "")
    (command,) = (line for line in text.splitlines() if "DeepKD.FEATURE REVIEWKD" in line)
    tool, flag, file, *options = shlex.split(command)[1:]
    assert (tool, flag) == ("tools/train.py", "--cfg")
    options += ["DATASET.ROOT", str(data_root), "DATASET.TRAIN_PER_CLASS", "1", "SOLVER.BATCH_SIZE", "4"]
    cfg, _ = read_config(mdistiller, str(ROOT / file), options)
    loader, _, count, num_classes = data.get_dataset(cfg)
    distiller = make_distiller(mdistiller, cfg, count, num_classes).train()
    image, target, index = next(iter(loader))
    _, losses = distiller(image=image, target=target, index=index, epoch=1)
    assert list(losses) == ["tog", "tcg", "ncg", "feat"]
    assert losses["feat"].item() > 0


def test_how_long_a_run_with_crd_takes_can_be_told(mdistiller, data_root, monkeypatch):
    """Its steps are timed with contrast indices of noise."""
    monkeypatch.setattr(classification, "find_host", lambda: mdistiller)
    options = ["DeepKD.FEATURE", "CRD", "DATASET.ROOT", str(data_root), "DATASET.TRAIN_PER_CLASS", "1"]
    options += ["CRD.FEAT.STUDENT_DIM", "64", "CRD.FEAT.TEACHER_DIM", "64", "CRD.NCE.K", "4", "SOLVER.BATCH_SIZE", "4"]
    cfg, _ = read_config(mdistiller, "configs/glyphs100/res20_res8/deepkd.yaml", options)
    (seconds,) = classification.Classification().seconds([cfg], 1, [1])
    assert seconds > 0


def test_their_launcher_has_all_but_crd(mdistiller):
    cfg = settled(mdistiller, "CRD")
    cfg.DISTILLER.TEACHER, cfg.DISTILLER.STUDENT = "resnet14", "resnet8"
    with pytest.raises(UserError, match="DeepKD.FEATURE is 'CRD'; it must be another under mdistiller's own launcher"):
        mdistiller_host.check_launcher(mdistiller, cfg, {})
    cfg.DeepKD.FEATURE = "OFD"
    mdistiller_host.check_launcher(mdistiller, cfg, {})


def test_without_mdistiller_its_methods_are_refused(mdistiller):
    register(BUILTIN)
    cfg = BUILTIN.cfg.clone()
    cfg.DISTILLER.TYPE, cfg.DeepKD.FEATURE = "DeepKD", "NST"
    with pytest.raises(UserError, match="NST is mdistiller's, which is not here"):
        BUILTIN.check_feature(cfg, {})
    mdistiller.check_feature(cfg, {})
