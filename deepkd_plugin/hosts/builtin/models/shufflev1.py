"""ShuffleNet for 32×32 images: Zhang et al., 2018 (arXiv:1707.01083), table 1, three groups.

State-dict keys, initialisation and outputs follow mdistiller's network of the same name. Pooling is global, so larger
images work too.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .shufflenet import STEM, ShuffleNet, add_convolutions, channel_shuffle

_GROUPS = 3


class Unit(nn.Module):
    """Grouped 1×1, shuffle, depthwise 3×3, grouped 1×1: (B, C_in, H, W) -> (B, C_out, H / stride, W / stride).

    With stride 1 the input is added. With stride 2 it is pooled and appended, so the convolutions make only the other
    C_out − C_in channels. The unit that ends a stage leaves out its closing ReLU.
    """

    def __init__(self, c_in: int, c_out: int, stride: int, ends_stage: bool) -> None:
        super().__init__()
        self.appends = stride == 2
        made = c_out - c_in if self.appends else c_out
        mid = made // 4
        # the stem has too few channels to split (the paper, section 3.2)
        self.groups = 1 if c_in == STEM else _GROUPS
        add_convolutions(self, (c_in, mid, 1, 1, self.groups), (mid, mid, 3, stride, mid), (mid, made, 1, 1, _GROUPS))
        self.ends_stage = ends_stage

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        if self.groups > 1:
            out = channel_shuffle(out, self.groups)
        # the paper has no ReLU after the depthwise convolution, mdistiller has
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        if self.appends:
            out = torch.cat([out, F.avg_pool2d(x, 3, stride=2, padding=1)], 1)
        else:
            out += x
        return out if self.ends_stage else F.relu(out, inplace=True)


class ShuffleV1(ShuffleNet):
    """`ShuffleNet` with stages of `Unit`, 240, 480 and 960 channels wide."""

    def __init__(self, num_classes: int = 100) -> None:
        super().__init__(Unit, (240, 480, 960))
        self.linear = nn.Linear(960, num_classes)
