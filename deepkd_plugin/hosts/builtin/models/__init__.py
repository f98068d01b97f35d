"""The built-in host's networks, under the names of mdistiller's dictionaries."""

from collections.abc import Callable

from torch import nn

from . import imagenet, resnetv2
from .mobilenetv1 import MobileNetV1
from .mobilenetv2 import TinyMobileNetV2, mobile_half
from .resnet import RESNETS
from .shufflev1 import ShuffleV1
from .shufflev2 import ShuffleV2
from .vgg import VGGS
from .wrn import WIDE_RESNETS

Entry = tuple[Callable[..., nn.Module], str | None]

# relative to the working directory, where mdistiller's archives of teachers are unpacked
_TEACHER = "download_ckpts/cifar_teachers/{}_vanilla/ckpt_epoch_240.pth"
_TINY_TEACHER = "download_ckpts/tiny_imagenet_teachers/ResNet18_vanilla/ti_res18"

_CIFAR = {
    **RESNETS,
    "ResNet18": resnetv2.ResNet18,
    "ResNet50": resnetv2.ResNet50,
    **WIDE_RESNETS,
    **VGGS,
    "MobileNetV2": mobile_half,
    "ShuffleV1": ShuffleV1,
    "ShuffleV2": ShuffleV2,
}
_TEACHERS = ("resnet56", "resnet110", "resnet32x4", "ResNet50", "wrn_40_2", "vgg13")

# name -> (constructor(num_classes=), path of the teacher's checkpoint or None), in mdistiller's order
cifar_model_dict: dict[str, Entry] = {
    **{name: (_CIFAR[name], _TEACHER.format(name)) for name in _TEACHERS},
    **{name: (make, None) for name, make in _CIFAR.items() if name not in _TEACHERS},
}

# the same for 64×64 images
tiny_imagenet_model_dict: dict[str, Entry] = {
    "ResNet18": (resnetv2.ResNet18, _TINY_TEACHER),
    "MobileNetV2": (TinyMobileNetV2, None),
    "ShuffleV2": (ShuffleV2, None),
}

# name -> constructor(pretrained=)
imagenet_model_dict: dict[str, Callable[..., nn.Module]] = {**imagenet.RESNETS, "MobileNetV1": MobileNetV1}
