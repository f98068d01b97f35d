"""Residual networks for 32×32 images, depth 6n + 2: He et al., 2016 (arXiv:1512.03385), section 4.2.

State-dict keys, initialisation and outputs follow mdistiller's networks of the same names, so its teacher checkpoints
load here. Pooling is global, so larger images, such as Tiny ImageNet's 64×64, work too.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut: (B, C_in, H, W) -> (B, C_out, H / stride, W / stride).

    The block that ends a stage leaves out its closing ReLU, because feature distillers want the sum before it.
    """

    def __init__(self, c_in: int, c_out: int, stride: int = 1, ends_stage: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.downsample = None
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(
                nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out)
            )
        self.ends_stage = ends_stage

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return out if self.ends_stage else F.relu(out, inplace=True)


class ResNet(nn.Module):
    """Three stages of `BasicBlock` behind a 3×3 stem; `widths` are the channels of the stem and the stages.

    forward: (B, 3, H, W) -> logits (B, num_classes) and
        feats: stem and stages after ReLU, (B, widths[0], H, W), (B, widths[1], H, W),
            (B, widths[2], H/2, W/2), (B, widths[3], H/4, W/4)
        preact_feats: the same before ReLU, except for the stem, which mdistiller gives after it in both lists
        pooled_feat: (B, widths[3])
    """

    def __init__(self, depth: int, widths: Sequence[int], num_classes: int = 100) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"a CIFAR ResNet has depth 6n + 2 (8, 14, 20, ...), not {depth}")
        stem, *stages = self.stage_channels = list(widths)
        self.conv1 = nn.Conv2d(3, stem, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(stem, stages[0], blocks, stride=1)
        self.layer2 = _stage(stages[0], stages[1], blocks, stride=2)
        self.layer3 = _stage(stages[1], stages[2], blocks, stride=2)
        self.fc = nn.Linear(stages[2], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def get_feat_modules(self) -> nn.ModuleList:
        """Return the layers that make the features, without the classifier."""
        return nn.ModuleList([self.conv1, self.bn1, self.relu, self.layer1, self.layer2, self.layer3])

    def get_bn_before_relu(self) -> list[nn.BatchNorm2d]:
        """Return the last BatchNorm of each stage, from which OFD takes its margins."""
        return [layer[-1].bn2 for layer in (self.layer1, self.layer2, self.layer3)]

    def get_stage_channels(self) -> list[int]:
        """Return the channels of the entries of `feats`."""
        return self.stage_channels

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        f0 = self.relu(self.bn1(self.conv1(x)))
        # these three ReLUs are not in place: the sums before them stay in the dictionary
        p1 = self.layer1(f0)
        f1 = F.relu(p1)
        p2 = self.layer2(f1)
        f2 = F.relu(p2)
        p3 = self.layer3(f2)
        f3 = F.relu(p3)
        pooled = F.adaptive_avg_pool2d(f3, 1).flatten(1)
        features = {"feats": [f0, f1, f2, f3], "preact_feats": [f0, p1, p2, p3], "pooled_feat": pooled}
        return self.fc(pooled), features


def _stage(c_in: int, c_out: int, blocks: int, stride: int) -> nn.Sequential:
    layers = [
        BasicBlock(c_out if i else c_in, c_out, 1 if i else stride, ends_stage=i == blocks - 1)
        for i in range(blocks)
    ]
    return nn.Sequential(*layers)


_NARROW, _WIDE = (16, 16, 32, 64), (32, 64, 128, 256)

resnet8 = partial(ResNet, 8, _NARROW)
resnet14 = partial(ResNet, 14, _NARROW)
resnet20 = partial(ResNet, 20, _NARROW)
resnet32 = partial(ResNet, 32, _NARROW)
resnet44 = partial(ResNet, 44, _NARROW)
resnet56 = partial(ResNet, 56, _NARROW)
resnet110 = partial(ResNet, 110, _NARROW)
resnet8x4 = partial(ResNet, 8, _WIDE)
resnet32x4 = partial(ResNet, 32, _WIDE)
