"""ImageNet's ResNets behind a stem for 32×32 images: He et al., 2016 (arXiv:1512.03385), table 1.

The stem is one 3×3 convolution without pooling, so the four stages see 32×32, 16×16, 8×8 and 4×4. State-dict keys,
initialisation and outputs follow mdistiller's networks of the same names, so its teacher checkpoints load here. Pooling
is global, so Tiny ImageNet's 64×64 images work too.
"""

from collections.abc import Sequence
from functools import partial

from torch import nn

from .staged import BasicBlock, Bottleneck, ResidualNetwork


class ResNetV2(ResidualNetwork):
    """Four stages of `blocks` blocks each, 64, 128, 256 and 512 channels wide times the block's expansion.

    The features of `StagedNetwork` have the sizes (H, W), (H, W), (H/2, W/2), (H/4, W/4) and (H/8, W/8).
    """

    classifier, shortcut = "linear", "shortcut"

    def __init__(self, block: type[nn.Module], blocks: Sequence[int], num_classes: int = 100) -> None:
        stem = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        super().__init__(stem, block, (64, 128, 256, 512), blocks, num_classes)

    def get_stage_channels(self) -> list[int]:
        """Return mdistiller's list: ResNet50's stages without the stem, for ResNet18 too; OFD works with neither."""
        return [256, 512, 1024, 2048]


ResNet18 = partial(ResNetV2, BasicBlock, (2, 2, 2, 2))
ResNet50 = partial(ResNetV2, Bottleneck, (3, 4, 6, 3))
