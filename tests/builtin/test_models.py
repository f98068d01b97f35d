"""The networks against mdistiller's figures (tests/data/cifar_models.json), mdistiller and torchvision."""

import importlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from deepkd_plugin.builtin.models import cifar_model_dict, imagenet_model_dict, tiny_imagenet_model_dict
from deepkd_plugin.builtin.models.resnet import ResNet
from deepkd_plugin.builtin.models.wrn import WideResNet

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "cifar_models.json").read_text())
FEWEST = ["resnet8", "resnet8x4", "wrn_16_1", "wrn_16_2"]


def golden_weights(net):
    """The rule behind the golden logits: seed i for entry i of the state dict, scaled by its fan."""
    state = net.state_dict()
    for i, (key, old) in enumerate(state.items()):
        if not old.is_floating_point():
            continue
        drawn = np.random.RandomState(i).standard_normal(old.numel()).reshape(old.shape)
        new = torch.from_numpy(drawn) * (old[0].numel() ** -0.5 if old.ndim >= 2 else 0.1)
        if key.endswith("running_var") or (old.ndim == 1 and key.endswith("weight")):
            new = (1 + new).abs()
        state[key] = new
    return state


def golden_input():
    drawn = np.random.RandomState(1234).standard_normal((2, 3, 32, 32))
    return torch.from_numpy(drawn.astype(np.float32)).double()


def batchnorms(net):
    return {name: m for name, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)}


def test_names_and_teachers():
    assert set(cifar_model_dict) == set(tiny_imagenet_model_dict) == set(GOLDEN)
    for name, (_, path) in cifar_model_dict.items():
        checkpoint = GOLDEN[name]["teacher_checkpoint"]
        assert path == (checkpoint and f"download_ckpts/{checkpoint}")


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name):
    golden = GOLDEN[name]
    net = cifar_model_dict[name][0](num_classes=100)
    assert [[key, list(value.shape)] for key, value in net.state_dict().items()] == golden["state_dict"]
    assert sum(p.numel() for p in net.parameters()) == golden["params"]

    net.double().eval().load_state_dict(golden_weights(net))
    with torch.no_grad():
        logits, features = net(golden_input())
    for key in ("feats", "preact_feats"):
        assert [list(f.shape) for f in features[key]] == golden[key]
    assert list(features["pooled_feat"].shape) == golden["pooled_feat"]
    # atol: the golden figures are rounded to 6 digits after the point.
    np.testing.assert_allclose(logits[:, :8], golden["logits_2x100_first8"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(logits.sum(), golden["logits_sum"], rtol=1e-5, atol=1e-5)

    assert net.get_stage_channels() == [shape[1] for shape in golden["feats"]]
    assert [bn.num_features for bn in net.get_bn_before_relu()] == net.get_stage_channels()[1:]


@pytest.mark.parametrize("name", FEWEST)
def test_features_are_consistent_and_running_statistics_move_once(name):
    torch.manual_seed(0)
    net = cifar_model_dict[name][0](num_classes=10).double()
    inputs = {}
    for bn_name, bn in batchnorms(net).items():
        bn.register_forward_pre_hook(lambda _, args, key=bn_name: inputs.update({key: args[0].detach()}))
    logits, features = net(torch.randn(4, 3, 32, 32).double())

    for bn_name, bn in batchnorms(net).items():
        assert bn.num_batches_tracked == 1, bn_name
        mean = inputs[bn_name].mean((0, 2, 3))
        var = inputs[bn_name].var((0, 2, 3))
        torch.testing.assert_close(bn.running_mean, 0.1 * mean)
        torch.testing.assert_close(bn.running_var, 0.9 + 0.1 * var)

    # Nothing in the dictionary was overwritten by a ReLU in place.
    preacts, feats = features["preact_feats"][1:], features["feats"][1:]
    assert all(p.min() < 0 for p in preacts)
    if name.startswith("resnet"):
        for preact, feat in zip(preacts, feats, strict=True):
            assert torch.equal(F.relu(preact), feat)
    else:
        for preact, feat in zip(preacts, feats, strict=True):
            standard = F.batch_norm(feat, None, None, training=True)  # BatchNorm starts as weight 1, bias 0
            torch.testing.assert_close(preact, standard)
    torch.testing.assert_close(net.fc(features["pooled_feat"]), logits)
    sum(f.sum() for f in (*features["feats"], *features["preact_feats"], logits)).backward()


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1"])
def test_other_input_sizes(name):
    net = tiny_imagenet_model_dict[name][0](num_classes=200).eval()
    logits, features = net(torch.randn(2, 3, 64, 64))
    assert logits.shape == (2, 200)
    assert [f.shape[-1] for f in features["feats"]] == [64, 64, 32, 16]


def test_impossible_depths():
    with pytest.raises(ValueError, match=r"6n \+ 2"):
        ResNet(18, (16, 16, 32, 64))
    with pytest.raises(ValueError, match=r"6n \+ 4"):
        WideResNet(29, 2)


@pytest.fixture(scope="module")
def upstream():
    """mdistiller's dictionary of networks, from the folder MDISTILLER_ROOT or as installed."""
    root = os.environ.get("MDISTILLER_ROOT")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        if root:
            patch.syspath_prepend(root)
        before = set(sys.modules)
        try:
            yield importlib.import_module("mdistiller.models.cifar").cifar_model_dict
        except ImportError as error:
            pytest.skip(f"mdistiller is not here (MDISTILLER_ROOT or installed): {error}")
        finally:
            for module in set(sys.modules) - before:
                if module.split(".")[0] == "mdistiller":
                    del sys.modules[module]


@pytest.mark.parametrize("name", ["resnet8", "resnet8x4", "wrn_16_2"])
def test_same_as_mdistiller(upstream, name):
    torch.manual_seed(0)
    theirs = upstream[name][0](num_classes=100)
    torch.manual_seed(0)
    ours = cifar_model_dict[name][0](num_classes=100)
    # Equal from one seed: the same distributions, drawn in the same order.
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)

    x, target = torch.randn(4, 3, 32, 32).double(), torch.tensor([3, 14, 15, 92])
    grads = []
    for net in (theirs, ours):
        net.double().load_state_dict(golden_weights(net))
        F.cross_entropy(net.train()(x)[0], target).backward()
        grads.append({key: p.grad for key, p in net.named_parameters()})
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-9, atol=1e-12)

    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        their_out, our_out = theirs.eval()(x), ours.eval()(x)
    torch.testing.assert_close(our_out, their_out, rtol=1e-9, atol=1e-12)

    assert ours.get_stage_channels() == theirs.get_stage_channels()
    for net_a, net_b in zip(ours.get_feat_modules(), theirs.get_feat_modules(), strict=True):
        assert list(net_a.state_dict()) == list(net_b.state_dict())
    names = [
        [key for bn in net.get_bn_before_relu() for key, m in batchnorms(net).items() if m is bn]
        for net in (ours, theirs)
    ]
    assert names[0] == names[1]


@pytest.mark.parametrize("name", ["ResNet18", "ResNet50"])
def test_imagenet_same_as_torchvision(name):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name.lower())(weights=None)
    ours = imagenet_model_dict[name](pretrained=False)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())

    x = torch.randn(2, 3, 64, 64)
    for mode in (True, False):
        with torch.no_grad():
            logits, features = ours.train(mode)(x)
            torch.testing.assert_close(logits, theirs.train(mode)(x))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())

    width = 1 if name == "ResNet18" else 4
    channels = [64, *(width * c for c in (64, 128, 256, 512))]
    expected = [(2, c, size, size) for c, size in zip(channels, (32, 16, 8, 4, 2), strict=True)]
    assert [tuple(f.shape) for f in features["feats"]] == expected
    for preact, feat in zip(features["preact_feats"], features["feats"], strict=True):
        assert preact.min() < 0
        assert torch.equal(F.relu(preact), feat)
    assert features["pooled_feat"].shape == (2, channels[-1])
    assert ours.get_stage_channels() == channels[1:]
    assert [bn.num_features for bn in ours.get_bn_before_relu()] == channels[2:]


def test_imagenet_pretrained_loads_the_first_weights(monkeypatch):
    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    state = torchvision.models.resnet18().state_dict()
    asked = []
    monkeypatch.setattr(
        type(weights), "get_state_dict", lambda self, *args, **kwargs: asked.append(self) or state
    )
    net = imagenet_model_dict["ResNet18"](pretrained=True)
    assert asked == [weights]
    torch.testing.assert_close(net.state_dict(), state)


@pytest.mark.parametrize("name", imagenet_model_dict)
def test_imagenet_names(name):
    with torch.device("meta"):
        ours = imagenet_model_dict[name]()
        theirs = getattr(torchvision.models, name.lower())()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
