"""The built-in host's networks, under the names of mdistiller's dictionaries."""

from collections.abc import Callable

from torch import nn

from . import imagenet, resnetv2
from .mobilenetv1 import MobileNetV1
from .mobilenetv2 import mobile_half
from .mobilenetv2_tiny import TinyMobileNetV2
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
from .shufflev1 import ShuffleV1
from .shufflev2 import ShuffleV2
from .vgg import vgg8, vgg11, vgg13, vgg16, vgg19
from .wrn import wrn_16_1, wrn_16_2, wrn_40_1, wrn_40_2

Entry = tuple[Callable[..., nn.Module], str | None]

# relative to the working directory, where mdistiller's archives of teachers are unpacked
_TEACHER = "download_ckpts/cifar_teachers/{}_vanilla/ckpt_epoch_240.pth"
_TINY_TEACHER = "download_ckpts/tiny_imagenet_teachers/ResNet18_vanilla/ti_res18"

# name -> (constructor(num_classes=), path of the teacher's checkpoint or None)
cifar_model_dict: dict[str, Entry] = {
    "resnet56": (resnet56, _TEACHER.format("resnet56")),
    "resnet110": (resnet110, _TEACHER.format("resnet110")),
    "resnet32x4": (resnet32x4, _TEACHER.format("resnet32x4")),
    "ResNet50": (resnetv2.ResNet50, _TEACHER.format("ResNet50")),
    "wrn_40_2": (wrn_40_2, _TEACHER.format("wrn_40_2")),
    "vgg13": (vgg13, _TEACHER.format("vgg13")),
    "resnet8": (resnet8, None),
    "resnet14": (resnet14, None),
    "resnet20": (resnet20, None),
    "resnet32": (resnet32, None),
    "resnet44": (resnet44, None),
    "resnet8x4": (resnet8x4, None),
    "ResNet18": (resnetv2.ResNet18, None),
    "wrn_16_1": (wrn_16_1, None),
    "wrn_16_2": (wrn_16_2, None),
    "wrn_40_1": (wrn_40_1, None),
    "vgg8": (vgg8, None),
    "vgg11": (vgg11, None),
    "vgg16": (vgg16, None),
    "vgg19": (vgg19, None),
    "MobileNetV2": (mobile_half, None),
    "ShuffleV1": (ShuffleV1, None),
    "ShuffleV2": (ShuffleV2, None),
}

# the same for 64×64 images
tiny_imagenet_model_dict: dict[str, Entry] = {
    "ResNet18": (resnetv2.ResNet18, _TINY_TEACHER),
    "MobileNetV2": (TinyMobileNetV2, None),
    "ShuffleV2": (ShuffleV2, None),
}

# name -> constructor(pretrained=)
imagenet_model_dict: dict[str, Callable[..., nn.Module]] = {
    "ResNet18": imagenet.ResNet18,
    "ResNet34": imagenet.ResNet34,
    "ResNet50": imagenet.ResNet50,
    "ResNet101": imagenet.ResNet101,
    "MobileNetV1": MobileNetV1,
}
