"""The built-in host's networks, under the names of mdistiller's dictionaries."""

from collections.abc import Callable

from torch import nn

from .imagenet import ResNet18, ResNet34, ResNet50, ResNet101
from .resnet import (
    resnet8,
    resnet8x4,
    resnet14,
    resnet20,
    resnet32,
    resnet32x4,
    resnet44,
    resnet56,
    resnet110,
)
from .wrn import wrn_16_1, wrn_16_2, wrn_40_1, wrn_40_2

Entry = tuple[Callable[..., nn.Module], str | None]

# Relative to the working directory, where mdistiller's archive of teachers is unpacked.
_TEACHER = "download_ckpts/cifar_teachers/{}_vanilla/ckpt_epoch_240.pth"

# name -> (constructor(num_classes=), path of the teacher's checkpoint or None)
cifar_model_dict: dict[str, Entry] = {
    "resnet56": (resnet56, _TEACHER.format("resnet56")),
    "resnet110": (resnet110, _TEACHER.format("resnet110")),
    "resnet32x4": (resnet32x4, _TEACHER.format("resnet32x4")),
    "wrn_40_2": (wrn_40_2, _TEACHER.format("wrn_40_2")),
    "resnet8": (resnet8, None),
    "resnet14": (resnet14, None),
    "resnet20": (resnet20, None),
    "resnet32": (resnet32, None),
    "resnet44": (resnet44, None),
    "resnet8x4": (resnet8x4, None),
    "wrn_16_1": (wrn_16_1, None),
    "wrn_16_2": (wrn_16_2, None),
    "wrn_40_1": (wrn_40_1, None),
}

# mdistiller's own three (ResNet18, MobileNetV2, ShuffleV2) are of other families, and it has no Tiny ImageNet
# teachers of these.
tiny_imagenet_model_dict: dict[str, Entry] = {
    name: (make, None) for name, (make, _) in cifar_model_dict.items()
}

# name -> constructor(pretrained=)
imagenet_model_dict: dict[str, Callable[..., nn.Module]] = {
    "ResNet18": ResNet18,
    "ResNet34": ResNet34,
    "ResNet50": ResNet50,
    "ResNet101": ResNet101,
}
