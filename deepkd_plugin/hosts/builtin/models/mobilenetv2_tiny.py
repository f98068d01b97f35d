"""mdistiller's MobileNetV2 for Tiny ImageNet's 64×64 images: full width, ReLU6, biases, a 1×1 stem.

After Sandler et al., 2018 (arXiv:1801.04381). State-dict keys, initialisation and outputs are mdistiller's.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .mobilenetv2 import inverted_residual


class LinearBottleneck(nn.Module):
    """(B, C_in, H, W) -> (B, C_out, H / stride, W / stride), with an identity beside it if the shapes allow."""

    def __init__(self, c_in: int, c_out: int, stride: int = 1, expansion: int = 6) -> None:
        super().__init__()
        self.has_identity = stride == 1 and c_in == c_out
        self.residual = inverted_residual(c_in, c_out, stride, expansion, nn.ReLU6, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.residual(x)
        if self.has_identity:
            out += x
        return out


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
        self.pre = _conv_bn_relu6(3, 32, padding=1)
        self.stage1 = LinearBottleneck(32, 16, expansion=1)
        self.stage2 = _stage(16, 24, blocks=2, stride=2)
        self.stage3 = _stage(24, 32, blocks=3, stride=2)
        self.stage4 = _stage(32, 64, blocks=4, stride=2)
        self.stage5 = _stage(64, 96, blocks=3, stride=1)
        self.stage6 = _stage(96, 160, blocks=3, stride=1)
        self.stage7 = LinearBottleneck(160, 320)
        self.conv1 = _conv_bn_relu6(320, 1280, padding=0)
        self.conv2 = nn.Conv2d(1280, num_classes, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        f0 = self.pre(x)
        f1 = self.stage2(self.stage1(f0))
        f2 = self.stage3(f1)
        f3 = self.stage4(f2)
        f4 = self.conv1(self.stage7(self.stage6(self.stage5(f3))))
        pooled = F.adaptive_avg_pool2d(f4, 1)
        return self.conv2(pooled).flatten(1), {"feats": [f0, f1, f2, f3, f4], "pooled_feat": pooled}


def _conv_bn_relu6(c_in: int, c_out: int, padding: int) -> nn.Sequential:
    conv = nn.Conv2d(c_in, c_out, 1, padding=padding)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU6(inplace=True))


def _stage(c_in: int, c_out: int, blocks: int, stride: int) -> nn.Sequential:
    rest = (LinearBottleneck(c_out, c_out) for _ in range(blocks - 1))
    return nn.Sequential(LinearBottleneck(c_in, c_out, stride), *rest)
