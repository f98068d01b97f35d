"""Wide residual networks for 32×32 images: Zagoruyko and Komodakis, 2016 (arXiv:1605.07146), depth 6n + 4.

State-dict keys, initialisation and outputs follow mdistiller's networks of the same names, so its teacher checkpoints
load here. Pooling is global, so larger images, such as Tiny ImageNet's 64×64, work too.
"""

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


class PreActBlock(nn.Module):
    """Twice BatchNorm, ReLU and a 3×3 convolution, beside a shortcut.

    forward: (B, C_in, H, W) -> (B, C_out, H / stride, W / stride); `normed` is bn1(x) if the caller has it.
    """

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.convShortcut = None if c_in == c_out else nn.Conv2d(c_in, c_out, 1, stride, bias=False)

    def forward(self, x: Tensor, normed: Tensor | None = None) -> Tensor:
        # the caller keeps its tensor as a feature; only our own may be overwritten
        act = F.relu(self.bn1(x), inplace=True) if normed is None else F.relu(normed)
        out = self.conv2(F.relu(self.bn2(self.conv1(act)), inplace=True))
        # a shortcut that widens starts after the first BatchNorm and ReLU, the identity before them
        out += x if self.convShortcut is None else self.convShortcut(act)
        return out


class Stage(nn.Module):
    """Blocks of one width. The first one strides and takes `normed`."""

    def __init__(self, c_in: int, c_out: int, blocks: int, stride: int) -> None:
        super().__init__()
        first = PreActBlock(c_in, c_out, stride)
        self.layer = nn.Sequential(first, *(PreActBlock(c_out, c_out, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor, normed: Tensor | None = None) -> Tensor:
        for block in self.layer:
            x, normed = block(x, normed), None
        return x


class WideResNet(nn.Module):
    """Three stages of `PreActBlock`, 16, 32 and 64 times `widen_factor` channels wide.

    forward: (B, 3, H, W) -> logits (B, num_classes) and, with w = widen_factor,
        feats: stem and stages, (B, 16, H, W), (B, 16w, H, W), (B, 32w, H/2, W/2), (B, 64w, H/4, W/4)
        preact_feats: the stem, then each stage after the BatchNorm that follows it, before ReLU
        pooled_feat: (B, 64w)
    """

    def __init__(self, depth: int, widen_factor: int, num_classes: int = 100) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 4, 6)
        if rest or blocks < 1:
            raise ValueError(f"a wide ResNet has depth 6n + 4 (10, 16, 22, ...), not {depth}")
        c0, c1, c2, c3 = self.stage_channels = [16, *(c * widen_factor for c in (16, 32, 64))]
        self.conv1 = nn.Conv2d(3, c0, 3, padding=1, bias=False)
        self.block1 = Stage(c0, c1, blocks, stride=1)
        self.block2 = Stage(c1, c2, blocks, stride=2)
        self.block3 = Stage(c2, c3, blocks, stride=2)
        self.bn1 = nn.BatchNorm2d(c3)
        self.fc = nn.Linear(c3, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def get_feat_modules(self) -> nn.ModuleList:
        """Return the layers that make the features, without the last BatchNorm and the classifier."""
        return nn.ModuleList([self.conv1, self.block1, self.block2, self.block3])

    def get_bn_before_relu(self) -> list[nn.BatchNorm2d]:
        """Return the BatchNorm after each stage, from which OFD takes its margins."""
        return [self.block2.layer[0].bn1, self.block3.layer[0].bn1, self.bn1]

    def get_stage_channels(self) -> list[int]:
        """Return the channels of the entries of `feats`."""
        return self.stage_channels

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        # mdistiller runs the three BatchNorms again for preact_feats and so updates their running statistics twice a
        # step; here each runs once, and its output is both the feature and what the network continues with
        norm1, norm2, norm3 = self.get_bn_before_relu()
        f0 = self.conv1(x)
        f1 = self.block1(f0)
        p1 = norm1(f1)
        f2 = self.block2(f1, p1)
        p2 = norm2(f2)
        f3 = self.block3(f2, p2)
        p3 = norm3(f3)
        pooled = F.adaptive_avg_pool2d(F.relu(p3), 1).flatten(1)
        features = {"feats": [f0, f1, f2, f3], "preact_feats": [f0, p1, p2, p3], "pooled_feat": pooled}
        return self.fc(pooled), features


WIDE_RESNETS = {f"wrn_{depth}_{factor}": partial(WideResNet, depth, factor) for depth in (16, 40) for factor in (1, 2)}
"""By name; num_classes is still to be given."""
