"""Residual networks for 32×32 images, depth 6n + 2: He et al., 2016 (arXiv:1512.03385), section 4.2.

State-dict keys, initialisation and outputs follow mdistiller's networks of the same names, so its teacher checkpoints
load here. Pooling is global, so larger images, such as Tiny ImageNet's 64×64, work too.
"""

from collections.abc import Sequence
from functools import partial

from torch import nn

from .staged import BasicBlock, ResidualNetwork


class ResNet(ResidualNetwork):
    """Three stages of `BasicBlock` behind a 3×3 stem; `widths` are the channels of the stem and the stages.

    The features of `StagedNetwork` have the sizes (H, W), (H, W), (H/2, W/2) and (H/4, W/4).
    """

    def __init__(self, depth: int, widths: Sequence[int], num_classes: int = 100) -> None:
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"a CIFAR ResNet has depth 6n + 2 (8, 14, 20, ...), not {depth}")
        stem = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        super().__init__(stem, BasicBlock, widths[1:], [blocks] * 3, num_classes)
        self.relu = nn.ReLU(inplace=True)

    def get_feat_modules(self) -> nn.ModuleList:
        """Return the layers that make the features, without the classifier."""
        return nn.ModuleList([self.conv1, self.bn1, self.relu, *self.stages])


_NARROW, _WIDE = (16, 16, 32, 64), (32, 64, 128, 256)

RESNETS = {f"resnet{depth}": partial(ResNet, depth, _NARROW) for depth in (8, 14, 20, 32, 44, 56, 110)}
RESNETS |= {f"resnet{depth}x4": partial(ResNet, depth, _WIDE) for depth in (8, 32)}
"""By name; num_classes is still to be given."""
