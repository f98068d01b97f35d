"""ImageNet's ResNets behind a stem for 32×32 images: He et al., 2016 (arXiv:1512.03385), table 1.

The stem is one 3×3 convolution without pooling, so the four stages see 32×32, 16×16, 8×8 and 4×4. State-dict keys,
initialisation and outputs follow mdistiller's networks of the same names, so its teacher checkpoints load here. Pooling
is global, so Tiny ImageNet's 64×64 images work too.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Convolutions (`residual`) beside a shortcut: (B, C_in, H, W) -> (B, C_out, H / stride, W / stride).

    The block that ends a stage leaves out its closing ReLU, because feature distillers want the sum before it.
    """

    expansion: int

    def __init__(self, c_in: int, width: int, stride: int, ends_stage: bool) -> None:
        super().__init__()
        self.ends_stage = ends_stage
        self.add_residual(c_in, width, stride)
        c_out = self.expansion * width
        self.shortcut = nn.Sequential()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.residual(x)
        out += self.shortcut(x)
        return out if self.ends_stage else F.relu(out, inplace=True)


class BasicBlock(Block):
    """Two 3×3 convolutions, the first of which strides."""

    expansion = 1

    def add_residual(self, c_in: int, width: int, stride: int) -> None:
        self.conv1 = nn.Conv2d(c_in, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    @property
    def last_bn(self) -> nn.BatchNorm2d:
        return self.bn2

    def residual(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))


class Bottleneck(Block):
    """1×1, 3×3 and 1×1 convolutions, the second of which strides and the last of which widens by 4."""

    expansion = 4

    def add_residual(self, c_in: int, width: int, stride: int) -> None:
        c_out = self.expansion * width
        self.conv1 = nn.Conv2d(c_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, c_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(c_out)

    @property
    def last_bn(self) -> nn.BatchNorm2d:
        return self.bn3

    def residual(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        return self.bn3(self.conv3(out))


class ResNetV2(nn.Module):
    """Four stages of `blocks` blocks each, 64, 128, 256 and 512 channels wide times the block's expansion e.

    forward: (B, 3, H, W) -> logits (B, num_classes) and
        feats: stem and stages after ReLU, (B, 64, H, W), (B, 64e, H, W), (B, 128e, H/2, W/2),
            (B, 256e, H/4, W/4), (B, 512e, H/8, W/8)
        preact_feats: the same before ReLU, except for the stem, which mdistiller gives after it in both lists
        pooled_feat: (B, 512e)
    """

    def __init__(self, block: type[Block], blocks: Sequence[int], num_classes: int = 100) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        e = block.expansion
        self.layer1 = _stage(block, 64, 64, blocks[0], stride=1)
        self.layer2 = _stage(block, 64 * e, 128, blocks[1], stride=2)
        self.layer3 = _stage(block, 128 * e, 256, blocks[2], stride=2)
        self.layer4 = _stage(block, 256 * e, 512, blocks[3], stride=2)
        self.linear = nn.Linear(512 * e, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @property
    def stages(self) -> list[nn.Sequential]:
        return [self.layer1, self.layer2, self.layer3, self.layer4]

    def get_feat_modules(self) -> nn.ModuleList:
        """Return the layers that make the features, without the classifier."""
        return nn.ModuleList([self.conv1, self.bn1, *self.stages])

    def get_bn_before_relu(self) -> list[nn.BatchNorm2d]:
        """Return the last BatchNorm of each stage, from which OFD takes its margins."""
        return [stage[-1].last_bn for stage in self.stages]

    def get_stage_channels(self) -> list[int]:
        """Return mdistiller's list: ResNet50's stages without the stem, for ResNet18 too; OFD works with neither."""
        return [256, 512, 1024, 2048]

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        feats, preacts = [x], [x]
        for stage in self.stages:
            preacts.append(stage(x))
            feats.append(
                x := F.relu(preacts[-1])
            )  # not in place: the tensors before it stay in the dictionary
        pooled = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.linear(pooled), {"feats": feats, "preact_feats": preacts, "pooled_feat": pooled}


def _stage(block: type[Block], c_in: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    layers = [block(c_in, width, stride, blocks == 1)]
    layers += [block(block.expansion * width, width, 1, i == blocks - 1) for i in range(1, blocks)]
    return nn.Sequential(*layers)


ResNet18 = partial(ResNetV2, BasicBlock, (2, 2, 2, 2))
ResNet50 = partial(ResNetV2, Bottleneck, (3, 4, 6, 3))
