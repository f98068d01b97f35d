"""ShuffleNet V2 for 32×32 and 64×64 images: Ma et al., 2018 (arXiv:1807.11164), table 5, width 1.

State-dict keys, initialisation and outputs follow mdistiller's network of the same name. Pooling is global;
mdistiller's covers 4×4 pixels and so takes 32×32 images only.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .shufflenet import ShuffleNet, add_convolutions, channel_shuffle


class Unit(nn.Module):
    """Three convolutions over half of the channels; the other half stays: (B, C, H, W) -> the same shape.

    The unit that ends a stage leaves out its closing ReLU and shuffle. The half that stays has been through a ReLU, so
    the network can apply both to all channels.
    """

    def __init__(self, channels: int, ends_stage: bool) -> None:
        super().__init__()
        half = channels // 2
        add_convolutions(self, (half, half, 1, 1, 1), (half, half, 3, 1, half), (half, half, 1, 1, 1))
        self.ends_stage = ends_stage

    def forward(self, x: Tensor) -> Tensor:
        stays, out = x.chunk(2, 1)
        out = F.relu(self.bn1(self.conv1(out)), inplace=True)
        out = self.bn3(self.conv3(self.bn2(self.conv2(out))))
        if self.ends_stage:
            return torch.cat([stays, out], 1)
        return channel_shuffle(torch.cat([stays, F.relu(out, inplace=True)], 1), 2)


class DownUnit(nn.Module):
    """Two branches that each make half of the channels: (B, C_in, H, W) -> (B, C_out, H/2, W/2)."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        half = c_out // 2
        add_convolutions(
            self,
            *((c_in, c_in, 3, 2, c_in), (c_in, half, 1, 1, 1)),
            *((c_in, half, 1, 1, 1), (half, half, 3, 2, half), (half, half, 1, 1, 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        short = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        long = F.relu(self.bn3(self.conv3(x)), inplace=True)
        long = self.bn5(self.conv5(self.bn4(self.conv4(long))))
        return channel_shuffle(F.relu(torch.cat([short, long], 1), inplace=True), 2)


class ShuffleV2(ShuffleNet):
    """`ShuffleNet` with stages of `DownUnit` and `Unit`, 116, 232 and 464 channels, and 1024 before pooling."""

    def __init__(self, num_classes: int = 100) -> None:
        super().__init__(_unit, (116, 232, 464))
        self.conv2 = nn.Conv2d(464, 1024, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1024)
        self.linear = nn.Linear(1024, num_classes)

    def close(self, preact: Tensor) -> Tensor:
        return channel_shuffle(super().close(preact), 2)

    def head(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(x)), inplace=True)


def _unit(c_in: int, c_out: int, stride: int, ends_stage: bool) -> nn.Module:
    return DownUnit(c_in, c_out) if stride == 2 else Unit(c_out, ends_stage)
