"""What mdistiller's two CIFAR ShuffleNets share: a 1×1 stem and three stages of 4, 8 and 4 units."""

from collections.abc import Sequence

from torch import Tensor, nn

from .staged import Block, StagedNetwork, stage

STEM = 24  # channels


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Move channel i of group g to i · groups + g: (B, C, H, W) -> the same shape."""
    # written out: torch.nn.functional.channel_shuffle has not always had a derivative
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


def add_convolutions(unit: nn.Module, *shapes: tuple[int, int, int, int, int]) -> None:
    """Add conv1, bn1, conv2, bn2, … to a unit. A shape is C_in, C_out, kernel size, stride, groups."""
    for number, (c_in, c_out, side, stride, groups) in enumerate(shapes, 1):
        conv = nn.Conv2d(c_in, c_out, side, stride, padding=side // 2, groups=groups, bias=False)
        unit.add_module(f"conv{number}", conv)
        unit.add_module(f"bn{number}", nn.BatchNorm2d(c_out))


class ShuffleNet(StagedNetwork):
    """Three stages of `unit`, with these channels.

    The features of `StagedNetwork` have the sizes (H, W), (H/2, W/2), (H/4, W/4) and (H/8, W/8).
    """

    def __init__(self, unit: Block, channels: Sequence[int]) -> None:
        stem = nn.Conv2d(3, STEM, 1, bias=False)
        shapes = zip((STEM, *channels), channels, (4, 8, 4))
        super().__init__(stem, (stage(unit, *shape, stride=2) for shape in shapes), (STEM, *channels))

    def get_bn_before_relu(self) -> list[nn.BatchNorm2d]:
        """Raise NotImplementedError, as mdistiller does: no single BatchNorm makes all channels of a stage."""
        raise NotImplementedError("a ShuffleNet cannot be OFD's teacher: no BatchNorm covers a whole stage")
