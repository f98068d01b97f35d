"""Folding against the network itself: the same logits, for every network that can be a teacher."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deepkd_plugin.data.glyphs import load_glyphs100
from deepkd_plugin.data.sources import source
from deepkd_plugin.fold import CannotFoldError, differences, fold, pairs
from deepkd_plugin.hosts import builtin
from deepkd_plugin.hosts.networks import trained_network

QUICK = ("resnet8", "wrn_16_1", "vgg8", "MobileNetV2", "ShuffleV1")
CIFAR = [
    pytest.param("cifar", name, id=f"cifar-{name}", marks=() if name in QUICK else pytest.mark.slow)
    for name in builtin.cifar_model_dict
]
OTHERS = [
    pytest.param(zoo, name, id=f"{zoo}-{name}", marks=pytest.mark.slow)
    for zoo, names in (("tiny", builtin.tiny_imagenet_model_dict), ("imagenet", builtin.imagenet_model_dict))
    for name in names
]
SIDES = {"cifar": 32, "tiny": 64, "imagenet": 64}
PREACTIVATION = {"wrn_16_1": 6, "wrn_16_2": 6, "wrn_40_1": 18, "wrn_40_2": 18}
"""Networks that normalise first: only the BatchNorms between the two convolutions of a block follow one directly."""


def make(zoos, zoo, name):
    entry = zoos[zoo][name]
    if isinstance(entry, tuple):
        return entry[0](num_classes=200 if zoo == "tiny" else 100)
    return entry(pretrained=False)


def lived_in(network):
    """Give every BatchNorm statistics and weights as training leaves them: none is the identity."""
    generator = torch.Generator().manual_seed(0)

    def drawn(tensor, low, high):
        tensor.data.copy_(torch.empty(tensor.shape).uniform_(low, high, generator=generator))

    for module in network.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            drawn(module.running_mean, -0.5, 0.5), drawn(module.running_var, 0.3, 3.0)
            drawn(module.weight, 0.3, 1.5), drawn(module.bias, -0.5, 0.5)
    return network.eval().requires_grad_(False)


def check(network, side, name):
    torch.manual_seed(0)
    network, images = lived_in(network), torch.randn(2, 3, side, side)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    folded = fold(network, images[:2])
    with torch.inference_mode():
        logits, ours = network(images)[0], folded(images)[0]
    assert (logits - ours).abs().max() <= 1e-5 * logits.abs().max()
    assert torch.equal(logits.topk(50).indices.sort().values, ours.topk(50).indices.sort().values)
    assert differences(logits, ours) == ""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    left = [module for module in folded.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) - len(left) == PREACTIVATION.get(name, len(norms))
    # the network itself stays as it was, and what is not folded is not there twice
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    ours = {id(p) for p in folded.parameters()}
    assert all(id(p) in ours for norm in left for p in norm.parameters())


@pytest.mark.parametrize(("zoo", "name"), CIFAR + OTHERS)
def test_every_network_of_ours_says_the_same(zoo, name):
    zoos = {"cifar": builtin.cifar_model_dict, "tiny": builtin.tiny_imagenet_model_dict}
    check(make(zoos | {"imagenet": builtin.imagenet_model_dict}, zoo, name), SIDES[zoo], name)


@pytest.mark.slow
@pytest.mark.parametrize("zoo", ["cifar", "tiny", "imagenet"])
def test_so_does_every_network_of_mdistiller_s(mdistiller, zoo):
    zoos = {"cifar": mdistiller.cifar_models, "tiny": mdistiller.tiny_imagenet_models}
    zoos |= {"imagenet": mdistiller.imagenet_models}
    for name in zoos[zoo]:
        if name != "MobileNetV2" or zoo != "imagenet":  # an alias
            # mdistiller's for ImageNet pool 7 x 7
            check(make(zoos, zoo, name), 224 if zoo == "imagenet" else SIDES[zoo], name)


def test_so_does_the_shipped_teacher_on_glyphs(data_root):
    from deepkd_plugin.hosts.registry import find_host

    teacher = trained_network(find_host(), "glyphs100", "resnet20", 100, "builtin:glyphs100_resnet20", "key").eval()
    images, glyphs = load_glyphs100(data_root, "test")[0], source("glyphs100")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (glyphs.mean, glyphs.std))
    images = (torch.from_numpy(images[::20]).permute(0, 3, 1, 2) / 255 - mean) / std
    folded = fold(teacher, images[:2])
    with torch.inference_mode():
        logits, ours = teacher(images)[0], folded(images)[0]
    assert len(images) >= 50
    assert (logits - ours).abs().max() <= 1e-5 * logits.abs().max()
    assert torch.equal(logits.topk(50).indices.sort().values, ours.topk(50).indices.sort().values)


class Block(nn.Module):
    """A convolution, its BatchNorm and a head; a subclass says what else happens."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3))), {}

    def features(self, x):
        return self.bn(self.conv(x))


class UsedTwice(Block):
    def features(self, x):
        made = self.conv(x)
        return self.bn(made) + made


class ChangedInPlace(Block):
    def features(self, x):
        made = self.conv(x)
        F.relu(made, inplace=True)
        return self.bn(made)


class Returned(Block):
    def forward(self, x):
        made = self.conv(x)
        return self.head(self.bn(made).mean((2, 3))), {"feats": [made]}


class CalledTwice(Block):
    def features(self, x):
        return self.bn(self.conv(x)) + self.conv(x[..., :1, :1].expand_as(x))


class NormCalledTwice(Block):
    def features(self, x):
        return self.bn(self.bn(self.conv(x)))


class ReadElsewhere(Block):
    def features(self, x):
        return self.bn(self.conv(x)) * self.conv.weight.abs().mean()


class ByHand(Block):
    def features(self, x):
        return self.bn(F.conv2d(x, self.conv.weight, self.conv.bias, stride=2))


class Behind(Block):
    """A BatchNorm that follows the convolution in the list of modules, but not in the computation."""

    def features(self, x):
        return self.bn(F.relu(self.conv(x)))


@pytest.mark.parametrize(
    "kind", [UsedTwice, ChangedInPlace, Returned, CalledTwice, NormCalledTwice, ReadElsewhere, ByHand, Behind]
)
def test_what_is_used_elsewhere_is_not_folded(kind):
    images = torch.randn(2, 3, 6, 6)
    assert pairs(lived_in(Block()), images) == [("conv", "bn")]
    assert pairs(lived_in(kind()), images) == []
    with pytest.raises(CannotFoldError, match="no BatchNorm"):
        fold(lived_in(kind()), images)


def test_neither_is_what_somebody_watches_or_what_trains():
    images, watched, training = torch.randn(2, 3, 6, 6), lived_in(Block()), lived_in(Block())
    watched.conv.register_forward_hook(lambda *_: None)
    training.bn.train()
    without = lived_in(Block())
    without.bn = nn.BatchNorm2d(4, track_running_stats=False).eval()
    assert pairs(watched, images) == pairs(training, images) == pairs(without, images) == []


def test_a_linear_layer_takes_its_batchnorm_too():
    network = lived_in(nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5)))
    images = torch.randn(3, 3, 2, 2)
    folded = fold(network, images)
    assert not any(isinstance(module, nn.BatchNorm1d) for module in folded.modules())
    torch.testing.assert_close(folded(images), network(images))
    assert folded[4].weight is network[4].weight


def test_a_network_that_looks_at_its_images_cannot_be_followed():
    class Looking(Block):
        def features(self, x):
            return super().features(x if x.sum() > 0 else -x)

    with pytest.raises(CannotFoldError, match=r"^torch\.export cannot follow it"):
        fold(lived_in(Looking()), torch.randn(2, 3, 6, 6))


def test_differences_name_what_differs():
    logits = torch.arange(60.0).repeat(2, 1)
    assert differences(logits, logits + 1e-5) == ""
    assert "off by 0.01" in differences(logits, logits + 0.01)
    assert "off by nan" in differences(logits, logits * float("nan"))
    close = logits.clone()
    close[0, 9], close[0, 10] = 10.0, 10.00001  # two logits at the edge of the 50 largest change places
    assert differences(close, close + torch.zeros_like(close).index_fill(1, torch.tensor(9), 1e-4)).startswith("the 50")
    assert differences(close[:, :50], close[:, :50]) == ""
