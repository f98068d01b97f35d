"""The networks against mdistiller's figures, mdistiller itself and torchvision.

Figures: tests/data/cifar_models.json, and by the same rule larger_models.json for 64×64 and 224×224 images.
"""

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

from deepkd_plugin.errors import UserError
from deepkd_plugin.hosts.builtin.models import cifar_model_dict, imagenet_model_dict, tiny_imagenet_model_dict
from deepkd_plugin.hosts.builtin.models.resnet import ResNet
from deepkd_plugin.hosts.builtin.models.resnetv2 import ResNetV2
from deepkd_plugin.hosts.builtin.models.shufflenet import ShuffleNet, channel_shuffle
from deepkd_plugin.hosts.builtin.models.shufflev2 import ShuffleV2
from deepkd_plugin.hosts.builtin.models.wrn import WideResNet

DATA = Path(__file__).parents[2] / "data"
CIFAR = json.loads((DATA / "cifar_models.json").read_text())
GOLDEN = {f"cifar100/{name}": {"image_size": 32, **figures} for name, figures in CIFAR.items()}
GOLDEN |= json.loads((DATA / "larger_models.json").read_text())

ZOO = {
    "cifar100": cifar_model_dict,
    "tiny_imagenet": tiny_imagenet_model_dict,
    "imagenet": imagenet_model_dict,
}
NETWORKS = [f"{dataset}/{name}" for dataset, models in ZOO.items() for name in models]
IMAGENET_RESNETS = ["ResNet18", "ResNet34", "ResNet50", "ResNet101"]
IMAGENET_RESNET_CASES = {f"imagenet/{name}" for name in IMAGENET_RESNETS}
# One of each kind of network and block, for what takes long and cannot differ by depth or width.
KINDS = [
    *(f"cifar100/{name}" for name in ("resnet8", "resnet8x4", "wrn_16_2", "ResNet18", "ResNet50")),
    *(f"cifar100/{name}" for name in ("vgg11", "MobileNetV2", "ShuffleV1", "ShuffleV2")),
    "tiny_imagenet/MobileNetV2",
    "imagenet/MobileNetV1",
]


def make(case, models=ZOO):
    dataset, name = case.split("/")
    entry = models[dataset][name]
    if dataset == "imagenet":
        return entry(pretrained=False)
    return entry[0](num_classes={"cifar100": 100, "tiny_imagenet": 200}[dataset])


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


def golden_input(size):
    drawn = np.random.RandomState(1234).standard_normal((2, 3, size, size))
    return torch.from_numpy(drawn.astype(np.float32)).double()


def batchnorms(net):
    return {name: m for name, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)}


def classifier(net):
    return next(getattr(net, name) for name in ("fc", "linear", "classifier", "conv2") if hasattr(net, name))


def test_names_and_teachers():
    assert list(cifar_model_dict) == list(CIFAR)
    assert set(tiny_imagenet_model_dict) == {"ResNet18", "MobileNetV2", "ShuffleV2"}
    alias = {"MobileNetV2"}  # there once the plugin is registered
    assert set(imagenet_model_dict) - alias == {*IMAGENET_RESNETS, "MobileNetV1"}
    for case in NETWORKS:
        dataset, name = case.split("/")
        if dataset != "imagenet":
            checkpoint = GOLDEN.get(case, {}).get("teacher_checkpoint")
            assert ZOO[dataset][name][1] == (checkpoint and f"download_ckpts/{checkpoint}")


def test_every_network_has_figures():
    # The ImageNet ResNets are held against torchvision; mdistiller's ShuffleV2 fails on 64×64 images.
    assert set(NETWORKS) - set(GOLDEN) == IMAGENET_RESNET_CASES | {"tiny_imagenet/ShuffleV2"}


@pytest.mark.parametrize("case", GOLDEN)
def test_golden(case):
    golden = GOLDEN[case]
    net = make(case)
    assert [[key, list(value.shape)] for key, value in net.state_dict().items()] == golden["state_dict"]
    assert sum(p.numel() for p in net.parameters()) == golden["params"]

    net.double().eval().load_state_dict(golden_weights(net))
    with torch.no_grad():
        logits, features = net(golden_input(golden["image_size"]))
    for key in ("feats", "preact_feats"):
        assert [list(f.shape) for f in features.get(key, [])] == golden[key]
    assert list(features["pooled_feat"].shape) == golden["pooled_feat"]
    # atol: the golden figures are rounded to 6 digits after the point.
    first8 = golden.get("logits_2x100_first8") or golden["logits_first8"]
    np.testing.assert_allclose(logits[:, :8], first8, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(logits.sum(), golden["logits_sum"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", [case for case in GOLDEN if case != "tiny_imagenet/MobileNetV2"])
def test_channels_and_batchnorms_for_feature_distillers(case):
    with torch.device("meta"):
        net = make(case)
    channels = [shape[1] for shape in GOLDEN[case]["feats"]]
    if isinstance(net, ResNetV2):  # mdistiller has one list for both depths
        assert net.get_stage_channels() == [256, 512, 1024, 2048]
    else:
        assert net.get_stage_channels() == channels

    if isinstance(net, ShuffleNet):
        with pytest.raises(NotImplementedError, match="OFD"):
            net.get_bn_before_relu()
    else:
        without_stem = channels if case == "imagenet/MobileNetV1" else channels[1:]
        assert [bn.num_features for bn in net.get_bn_before_relu()] == without_stem


@pytest.mark.parametrize("case", [c for c in NETWORKS if c not in ("imagenet/ResNet34", "imagenet/ResNet101")])
def test_features_are_consistent_and_running_statistics_move_once(case):
    torch.manual_seed(0)
    net = make(case)
    inputs = {}
    for bn_name, bn in batchnorms(net).items():
        bn.register_forward_pre_hook(lambda _, args, key=bn_name: inputs.update({key: args[0].detach()}))
    size = 64 if case.startswith("tiny_imagenet") else 32
    logits, features = net(torch.randn(2, 3, size, size))
    assert logits.shape == (2, {"c": 100, "t": 200, "i": 1000}[case[0]])

    for bn_name, bn in batchnorms(net).items():
        assert bn.num_batches_tracked == 1, bn_name
        mean = inputs[bn_name].mean((0, 2, 3))
        var = inputs[bn_name].var((0, 2, 3))
        torch.testing.assert_close(bn.running_mean, 0.1 * mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(bn.running_var, 0.9 + 0.1 * var, rtol=1e-4, atol=1e-5)

    # Nothing in the dictionary was overwritten by a ReLU in place.
    pairs = list(zip(features.get("preact_feats", []), features["feats"]))
    assert len(pairs) in (0, len(features["feats"]))
    for i, (preact, feat) in enumerate(pairs):
        if i:
            assert preact.min() < 0
        if isinstance(net, WideResNet):
            standard = F.batch_norm(feat, None, None, training=True)  # BatchNorm starts as weight 1, bias 0
            torch.testing.assert_close(preact, standard if i else feat)
        elif isinstance(net, ShuffleV2) and i:
            assert torch.equal(channel_shuffle(F.relu(preact), 2), feat)
        else:
            assert torch.equal(F.relu(preact), feat)
    torch.testing.assert_close(classifier(net)(features["pooled_feat"]).flatten(1), logits)

    sum(f.sum() for f in (*features["feats"], *features.get("preact_feats", []), logits)).backward()
    assert all(p.grad is not None for p in net.parameters())


def test_channel_shuffle_is_torchs():
    x = torch.randn(2, 12, 3, 5)
    assert torch.equal(channel_shuffle(x, 3), F.channel_shuffle(x, 3))


def test_tiny_mobilenetv2_clips_at_six():
    net = make("tiny_imagenet/MobileNetV2")
    maxima = []
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, 100)  # the figures' activations do not reach 6
        elif type(module).__name__.startswith("ReLU"):
            module.register_forward_hook(lambda *args: maxima.append(args[2].max().item()))
    net(torch.randn(2, 3, 64, 64))
    assert maxima == [6] * (2 * 17 + 2)


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "ResNet18", "vgg8", "MobileNetV2", "ShuffleV1"])
def test_larger_images(name):
    net = cifar_model_dict[name][0](num_classes=7).eval()
    with torch.no_grad():
        small, large = (net(torch.randn(1, 3, size, size)) for size in (32, 64))
    assert large[0].shape == (1, 7)
    assert large[1]["pooled_feat"].shape == small[1]["pooled_feat"].shape
    factors = [b.shape[-1] / a.shape[-1] for a, b in zip(small[1]["feats"], large[1]["feats"])]
    assert factors == ([2, 2, 2, 2, 1] if name == "vgg8" else [2] * len(factors))


@pytest.mark.parametrize("case", KINDS)
def test_channels_last_gives_the_same(case):
    net = make(case).double().eval()
    x = torch.randn(1, 3, 32, 32).double()
    with torch.no_grad():
        expected = net(x)
        last = net.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(last, expected, rtol=1e-9, atol=1e-9)


def test_impossible_depths():
    with pytest.raises(ValueError, match=r"6n \+ 2"):
        ResNet(18, (16, 16, 32, 64))
    with pytest.raises(ValueError, match=r"6n \+ 4"):
        WideResNet(29, 2)


@pytest.fixture(scope="module")
def upstream():
    """mdistiller's dictionaries of networks, from the folder MDISTILLER_ROOT or as installed."""
    root = os.environ.get("MDISTILLER_ROOT")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        if root:
            patch.syspath_prepend(root)
        before = set(sys.modules)
        try:
            models = importlib.import_module("mdistiller.models")
            yield {
                "cifar100": models.cifar_model_dict,
                "tiny_imagenet": models.tiny_imagenet_model_dict,
                "imagenet": models.imagenet_model_dict,
            }
        except ImportError as error:
            pytest.skip(f"mdistiller is not here (MDISTILLER_ROOT or installed): {error}")
        finally:
            for module in set(sys.modules) - before:
                if module.split(".")[0] == "mdistiller":
                    del sys.modules[module]


def test_same_names_as_mdistiller(upstream):
    for dataset, models in ZOO.items():
        # another test may have registered the plugin, which adds an alias of MobileNetV1
        ours = [name for name in models if (dataset, name) != ("imagenet", "MobileNetV2")]
        assert ours == list(upstream[dataset])
        if dataset != "imagenet":
            for name, (_, path) in models.items():
                theirs = upstream[dataset][name][1]
                assert (path and os.path.normpath(theirs).endswith(os.path.normpath(path))) or theirs is None


@pytest.mark.parametrize("case", [c for c in NETWORKS if c not in IMAGENET_RESNET_CASES])
def test_same_as_mdistiller(upstream, case):
    torch.manual_seed(0)
    theirs = make(case, upstream)
    drawn = torch.rand(3)
    torch.manual_seed(0)
    ours = make(case)
    # Equal from one seed: the same distributions, drawn in the same order, and as many numbers.
    states = [net.state_dict() for net in (ours, theirs)]
    assert list(states[0]) == list(states[1])
    assert [key for key, value in states[0].items() if not torch.equal(value, states[1][key])] == []
    assert torch.equal(torch.rand(3), drawn)

    # The others have figures for larger images; mdistiller's ShuffleV2 takes 32×32 alone.
    size = GOLDEN[case]["image_size"] if case in KINDS else 32
    x, target = torch.randn(1, 3, size, size).double(), torch.tensor([3])
    for bn in batchnorms(theirs).values():  # away from 1 and 0, which hide exchanged layers
        nn.init.normal_(bn.weight, 1, 0.1)
        nn.init.normal_(bn.bias, 0, 0.1)
    ours.load_state_dict(theirs.state_dict())
    with torch.set_grad_enabled(case in KINDS):
        outputs = [net.double().train()(x) for net in (ours, theirs)]
    torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-11)
    if case in KINDS:
        for logits, _ in outputs:
            F.cross_entropy(logits, target).backward()
        grads = [{key: p.grad for key, p in net.named_parameters()} for net in (ours, theirs)]
        torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-11)
    if not isinstance(ours, WideResNet):  # theirs moves its running statistics twice a step
        buffers = [dict(net.named_buffers()) for net in (ours, theirs)]
        torch.testing.assert_close(*buffers, rtol=1e-9, atol=1e-11)

    if hasattr(theirs, "get_stage_channels"):
        assert ours.get_stage_channels() == list(theirs.get_stage_channels())
    if hasattr(theirs, "get_feat_modules"):
        for module_a, module_b in zip(ours.get_feat_modules(), theirs.get_feat_modules(), strict=True):
            assert list(module_a.state_dict()) == list(module_b.state_dict())
    if hasattr(theirs, "get_bn_before_relu") and not isinstance(ours, ShuffleNet):
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
    assert features["pooled_feat"].shape == (2, channels[-1])
    assert ours.get_stage_channels() == channels[1:]
    assert [bn.num_features for bn in ours.get_bn_before_relu()] == channels[2:]


def test_imagenet_pretrained_loads_the_first_weights(monkeypatch):
    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    state = torchvision.models.resnet18().state_dict()
    asked = []
    monkeypatch.setattr(type(weights), "get_state_dict", lambda self, *args, **kwargs: asked.append(self) or state)
    net = imagenet_model_dict["ResNet18"](pretrained=True)
    assert asked == [weights]
    torch.testing.assert_close(net.state_dict(), state)


def test_mobilenetv1_without_weights_is_refused():
    with pytest.raises(UserError, match=r"MobileNetV1 has no pretrained .* must name a checkpoint") as caught:
        imagenet_model_dict["MobileNetV1"](pretrained=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", IMAGENET_RESNETS)
def test_imagenet_names(name):
    with torch.device("meta"):
        ours = imagenet_model_dict[name]()
        theirs = getattr(torchvision.models, name.lower())()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
