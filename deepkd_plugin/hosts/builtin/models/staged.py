"""What several networks share: a stem and stages with the features of distillers, residual blocks, initialisation."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet

Block = Callable[[int, int, int, bool], nn.Module]
"""(C_in, C_out, stride, ends_stage) -> module; one that ends a stage leaves out its closing ReLU (and shuffle)."""


def stage(block: Block, c_in: int, c_out: int, blocks: int, stride: int) -> nn.Sequential:
    """Build a stage, whose first block takes other channels and strides."""
    rest = (block(c_out, c_out, 1, i == blocks - 1) for i in range(1, blocks))
    return nn.Sequential(block(c_in, c_out, stride, blocks == 1), *rest)


class StagedNetwork(nn.Module):
    """A stem `conv1` and `bn1`, then `layer1`, `layer2`, …, pooling, and a classifier that the subclass adds.

    forward: (B, 3, H, W) -> logits (B, num_classes) and
        feats: stem and stages after ReLU, (B, c, H', W') with the `stage_channels` c
        preact_feats: the same before ReLU, except for the stem, which mdistiller gives after it in both lists
        pooled_feat: (B, C), the classifier's input
    """

    classifier = "linear"
    """The classifier's name."""

    def __init__(self, stem: nn.Conv2d, stages: Iterable[nn.Module], channels: Sequence[int]) -> None:
        super().__init__()
        self.conv1 = stem
        self.bn1 = nn.BatchNorm2d(stem.out_channels)
        for number, layers in enumerate(stages, 1):
            self.add_module(f"layer{number}", layers)
        self.stage_channels = list(channels)

    @property
    def stages(self) -> list[nn.Sequential]:
        return [layers for name, layers in self.named_children() if name.startswith("layer")]

    def get_feat_modules(self) -> nn.ModuleList:
        """Return the layers that make the features, without the classifier."""
        return nn.ModuleList([self.conv1, self.bn1, *self.stages])

    def get_stage_channels(self) -> list[int]:
        """Return the channels of the entries of `feats`."""
        return self.stage_channels

    def stem(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the stem's entries of preact_feats and of feats, and the input of the first stage."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return x, x, x

    def close(self, preact: Tensor) -> Tensor:
        """Apply what a stage leaves out: preact_feats -> feats."""
        return F.relu(preact)  # not in place: the tensors before it stay in the dictionary

    def head(self, x: Tensor) -> Tensor:
        """Map the last feature to what is pooled."""
        return x

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        preact, feat, x = self.stem(x)
        preacts, feats = [preact], [feat]
        for layers in self.stages:
            preacts.append(layers(x))
            feats.append(x := self.close(preacts[-1]))
        pooled = F.adaptive_avg_pool2d(self.head(x), 1).flatten(1)
        logits = getattr(self, self.classifier)(pooled)
        return logits, {"feats": feats, "preact_feats": preacts, "pooled_feat": pooled}


class _Residual(nn.Module):
    """A mixin for torchvision's blocks: (B, C_in, H, W) -> (B, C_out, H / stride, W / stride)."""

    def __init__(self, shortcut: str, c_in: int, c_out: int, stride: int, ends_stage: bool) -> None:
        """shortcut: the name of the convolution and norm beside the block, if it has them."""
        super().__init__(c_in, c_out // self.expansion, stride)
        self.shortcut_name, self.ends_stage = shortcut, ends_stage
        if stride != 1 or c_in != c_out:
            conv = nn.Conv2d(c_in, c_out, 1, stride, bias=False)
            setattr(self, shortcut, nn.Sequential(conv, nn.BatchNorm2d(c_out)))

    @property
    def last_bn(self) -> nn.BatchNorm2d:
        return self.bn3 if isinstance(self, resnet.Bottleneck) else self.bn2

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if isinstance(self, resnet.Bottleneck):
            out = self.bn3(self.conv3(self.relu(out)))
        shortcut = getattr(self, self.shortcut_name, None)
        out += x if shortcut is None else shortcut(x)
        return out if self.ends_stage else self.relu(out)


class BasicBlock(_Residual, resnet.BasicBlock):
    """Two 3×3 convolutions beside a shortcut."""


class Bottleneck(_Residual, resnet.Bottleneck):
    """1×1, 3×3 and 1×1 convolutions beside a shortcut; the second strides and the last widens by 4."""


class ResidualNetwork(StagedNetwork):
    """Stages of residual blocks: He et al., 2016 (arXiv:1512.03385).

    widths: channels of the stages' 3×3 convolutions; a stage's own are `block.expansion` times that. blocks: of each
    stage. All stages but the first stride.
    """

    classifier = "fc"
    shortcut = "downsample"
    """The name of the convolution and norm beside a block."""

    def __init__(
        self, stem: nn.Conv2d, block: type[_Residual], widths: Sequence[int], blocks: Sequence[int], num_classes: int
    ) -> None:
        channels = [stem.out_channels, *(block.expansion * width for width in widths)]
        shapes = zip(channels, channels[1:], blocks, [1] + [2] * (len(blocks) - 1))
        stages = [stage(partial(block, self.shortcut), *shape) for shape in shapes]
        super().__init__(stem, stages, channels)
        self.add_module(self.classifier, nn.Linear(channels[-1], num_classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def get_bn_before_relu(self) -> list[nn.BatchNorm2d]:
        """Return the last BatchNorm of each stage, from which OFD takes its margins."""
        return [layers[-1].last_bn for layers in self.stages]


def fan_out_normal_(net: nn.Module) -> None:
    """Fill, in place, convolutions from N(0, 2 / (k² · C_out)), linear layers from N(0, 0.01²) and biases with 0.

    This is how mdistiller initialises its VGGs and its CIFAR MobileNetV2.
    Layers draw in the order of `net.modules()`, so a seed determines the network.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            fan = math.prod(module.kernel_size) * module.out_channels
            nn.init.normal_(module.weight, 0, math.sqrt(2 / fan))
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)
