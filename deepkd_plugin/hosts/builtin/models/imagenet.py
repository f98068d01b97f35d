"""torchvision's ImageNet ResNets, with its state-dict keys and the outputs of mdistiller's networks."""

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import ResNet18_Weights, ResNet34_Weights, ResNet50_Weights, ResNet101_Weights
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet, WeightsEnum


class _OpenEnd:
    """A mixin: the block that ends a stage leaves out its closing ReLU, so that the network has both sides of it."""

    ends_stage = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.ends_stage:
            return super().forward(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if isinstance(self, Bottleneck):
            out = self.bn3(self.conv3(self.relu(out)))
        out += x if self.downsample is None else self.downsample(x)
        return out


class _BasicBlock(_OpenEnd, BasicBlock):
    pass


class _Bottleneck(_OpenEnd, Bottleneck):
    pass


class ImageNetResNet(ResNet):
    """He et al., 2016 (arXiv:1512.03385), with torchvision's stride in the 3×3 convolution of a bottleneck.

    forward: (B, 3, H, W) -> logits (B, 1000) and, with e = 4 for bottlenecks, else 1,
        feats: stem (before pooling) and stages after ReLU, (B, 64, H/2, W/2), (B, 64e, H/4, W/4),
            (B, 128e, H/8, W/8), (B, 256e, H/16, W/16), (B, 512e, H/32, W/32)
        preact_feats: the same before ReLU
        pooled_feat: (B, 512e)
    """

    def __init__(
        self, block: type, layers: list[int], weights: WeightsEnum, pretrained: bool = False
    ) -> None:
        super().__init__(block, layers)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            stage[-1].ends_stage = True
        if pretrained:
            self.load_state_dict(weights.get_state_dict(check_hash=True))

    def get_bn_before_relu(self) -> list[nn.BatchNorm2d]:
        """Return the last BatchNorm of stages 2 to 4, from which OFD takes its margins."""
        ends = (self.layer2[-1], self.layer3[-1], self.layer4[-1])
        return [end.bn3 if isinstance(end, Bottleneck) else end.bn2 for end in ends]

    def get_stage_channels(self) -> list[int]:
        """Return the channels of the four stages."""
        return [width * self.fc.in_features // 512 for width in (64, 128, 256, 512)]

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        preacts = [self.bn1(self.conv1(x))]
        feats = [F.relu(preacts[0])]  # not in place: the tensors before it stay in the dictionary
        x = self.maxpool(feats[0])
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            preacts.append(stage(x))
            feats.append(x := F.relu(preacts[-1]))
        pooled = self.avgpool(x).flatten(1)
        return self.fc(pooled), {"feats": feats, "preact_feats": preacts, "pooled_feat": pooled}


ResNet18 = partial(ImageNetResNet, _BasicBlock, [2, 2, 2, 2], ResNet18_Weights.IMAGENET1K_V1)
ResNet34 = partial(ImageNetResNet, _BasicBlock, [3, 4, 6, 3], ResNet34_Weights.IMAGENET1K_V1)
ResNet50 = partial(ImageNetResNet, _Bottleneck, [3, 4, 6, 3], ResNet50_Weights.IMAGENET1K_V1)
ResNet101 = partial(ImageNetResNet, _Bottleneck, [3, 4, 23, 3], ResNet101_Weights.IMAGENET1K_V1)
