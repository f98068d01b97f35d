"""mdistiller's MobileNetV2 for Tiny ImageNet's 64×64 images: full width, ReLU6, biases, a 1×1 stem.

After Sandler et al., 2018 (arXiv:1801.04381). State-dict keys, initialisation and outputs are mdistiller's.
"""

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import Conv2dNormActivation

from .mobilenetv2 import InvertedResidual, stage


class LinearBottleneck(InvertedResidual):
    """`InvertedResidual` under another name, with ReLU6 and biases."""

    name, relu, bias = "residual", nn.ReLU6, True


class TinyMobileNetV2(nn.Module):
    """Seven stages of `LinearBottleneck`.

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
