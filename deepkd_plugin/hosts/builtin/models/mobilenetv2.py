"""MobileNetV2 for 32×32 and for 64×64 images: Sandler et al., 2018 (arXiv:1801.04381), table 2, with fewer strides.

State-dict keys, initialisation and outputs follow mdistiller's networks of the same name. Pooling is global, so larger
images work too.
"""

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import Conv2dNormActivation

from .staged import fan_out_normal_

# expansion, channels at full width, blocks, stride
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
_FEATURES = (1, 2, 4, 6)  # the stages whose outputs are features


class InvertedResidual(nn.Module):
    """A 1×1 convolution that widens, a 3×3 depthwise convolution that strides and a linear 1×1 convolution.

    forward: (B, C_in, H, W) -> (B, C_out, H / stride, W / stride), with an identity beside it if the shapes allow.
    """

    name, relu, bias = "conv", nn.ReLU, False
    """The convolutions' name, what follows the first two, and whether they have biases."""

    def __init__(self, c_in: int, c_out: int, stride: int, expansion: int) -> None:
        super().__init__()
        self.has_identity = stride == 1 and c_in == c_out
        c_mid = c_in * expansion
        made = partial(Conv2dNormActivation, bias=self.bias)
        layers = (
            *made(c_in, c_mid, 1, activation_layer=self.relu),
            *made(c_mid, c_mid, 3, stride, groups=c_mid, activation_layer=self.relu),
            *made(c_mid, c_out, 1, activation_layer=None),
        )
        self.add_module(self.name, nn.Sequential(*layers))

    def forward(self, x: Tensor) -> Tensor:
        out = getattr(self, self.name)(x)
        return x + out if self.has_identity else out


def stage(
    block: type[InvertedResidual], c_in: int, c_out: int, blocks: int, stride: int, expansion: int = 6
) -> nn.Sequential:
    """Build a stage, whose first block takes other channels and strides."""
    rest = (block(c_out, c_out, 1, expansion) for _ in range(blocks - 1))
    return nn.Sequential(block(c_in, c_out, stride, expansion), *rest)


class MobileNetV2(nn.Module):
    """Seven stages of `InvertedResidual`, `width_mult` times the paper's width, behind a stem of stride 2.

    forward: (B, 3, H, W) -> logits (B, num_classes) and, with w = width_mult,
        feats: stem after ReLU and stages 2, 3, 5 and 7, (B, 32w, H/2, W/2), (B, 24w, H/2, W/2),
            (B, 32w, H/4, W/4), (B, 96w, H/8, W/8), (B, 320w, H/16, W/16)
            (no ReLU follows these stages, so there are no preact_feats)
        pooled_feat: (B, 1280)
    """

    def __init__(self, width_mult: float, num_classes: int = 100) -> None:
        super().__init__()
        c_out = int(32 * width_mult)
        self.conv1 = Conv2dNormActivation(3, c_out, 3, stride=2)
        self.blocks = nn.ModuleList()
        for expansion, channels, blocks, stride in _STAGES:
            c_in, c_out = c_out, int(channels * width_mult)
            self.blocks.append(stage(InvertedResidual, c_in, c_out, blocks, stride, expansion))
        self.conv2 = Conv2dNormActivation(c_out, 1280, 1)  # never narrower than in the paper
        self.classifier = nn.Sequential(nn.Linear(1280, num_classes))
        fan_out_normal_(self)

    def get_feat_modules(self) -> nn.ModuleList:
        """Return the layers that make the features, without the last convolution and the classifier."""
        return nn.ModuleList([self.conv1, self.blocks])

    def get_bn_before_relu(self) -> list[nn.BatchNorm2d]:
        """Return the last BatchNorm of the stages in `feats`, from which OFD takes its margins."""
        return [self.blocks[i][-1].conv[-1] for i in _FEATURES]

    def get_stage_channels(self) -> list[int]:
        """Return the channels of the entries of `feats`."""
        return [self.conv1[0].out_channels, *(bn.num_features for bn in self.get_bn_before_relu())]

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        x = self.conv1(x)
        feats = [x]
        for i, layers in enumerate(self.blocks):
            x = layers(x)
            if i in _FEATURES:
                feats.append(x)
        pooled = F.adaptive_avg_pool2d(self.conv2(x), 1).flatten(1)
        return self.classifier(pooled), {"feats": feats, "pooled_feat": pooled}


mobile_half = partial(MobileNetV2, 0.5)


class LinearBottleneck(InvertedResidual):
    """`InvertedResidual` under another name, with ReLU6 and biases."""

    name, relu, bias = "residual", nn.ReLU6, True


class TinyMobileNetV2(nn.Module):
    """The network for Tiny ImageNet's 64×64 images: seven stages of `LinearBottleneck` at full width, a 1×1 stem.

    forward: (B, 3, H, W) -> logits (B, num_classes) and, with H' = H + 2, because the stem pads its 1×1 convolution,
        feats: stem after ReLU6, stages 2, 3 and 4, and the last convolution after ReLU6, (B, 32, H', W'),
            (B, 24, H'/2, W'/2), (B, 32, H'/4, W'/4), (B, 64, H'/8, W'/8), (B, 1280, H'/8, W'/8), sizes rounded
            up (there are no preact_feats)
        pooled_feat: (B, 1280, 1, 1), the input of the classifier, which is a convolution
    """

    def __init__(self, num_classes: int = 200) -> None:
        super().__init__()
        made = partial(Conv2dNormActivation, kernel_size=1, activation_layer=nn.ReLU6, bias=True)
        staged = partial(stage, LinearBottleneck)
        self.pre = made(3, 32, padding=1)
        self.stage1 = LinearBottleneck(32, 16, stride=1, expansion=1)
        self.stage2 = staged(16, 24, blocks=2, stride=2)
        self.stage3 = staged(24, 32, blocks=3, stride=2)
        self.stage4 = staged(32, 64, blocks=4, stride=2)
        self.stage5 = staged(64, 96, blocks=3, stride=1)
        self.stage6 = staged(96, 160, blocks=3, stride=1)
        self.stage7 = LinearBottleneck(160, 320, stride=1, expansion=6)
        self.conv1 = made(320, 1280)
        self.conv2 = nn.Conv2d(1280, num_classes, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        f0 = self.pre(x)
        f1 = self.stage2(self.stage1(f0))
        f2 = self.stage3(f1)
        f3 = self.stage4(f2)
        f4 = self.conv1(self.stage7(self.stage6(self.stage5(f3))))
        pooled = F.adaptive_avg_pool2d(f4, 1)
        return self.conv2(pooled).flatten(1), {"feats": [f0, f1, f2, f3, f4], "pooled_feat": pooled}
