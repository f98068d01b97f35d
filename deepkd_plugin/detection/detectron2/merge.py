"""The start files of mdistiller's detection: a teacher's detector and a student's ImageNet backbone in one file.

mdistiller's RCNNKD loads both from MODEL.WEIGHTS: the student's backbone as `backbone.bottom_up.…`, the teacher as
`teacher.backbone.…`, `teacher.proposal_generator.…` and `teacher.roi_heads.…`. The student's other parts start from
random numbers.
"""

import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import Size, Tensor

from ... import device
from ...errors import UserError
from ...run import array_pickle, checkpoint

BACKBONES = ("resnet18", "resnet50", "mobilenet_v2")
"""The students of mdistiller's configs, under torchvision's names."""

PAIRS = {("resnet18", 23): "R18-R101", ("resnet50", 23): "R50-R101", ("mobilenet_v2", 6): "MV2-R50"}
"""mdistiller's configs, by the student and the number of blocks in the teacher's stage res4."""

CLASSIFIER = "roi_heads.box_predictor.cls_score.weight"

IDENTITY_VARIANCE = 1 - 1e-5
"""With detectron2's epsilon of 1e-5, a frozen BatchNorm with this variance and a mean of 0 only scales and shifts."""


def merge(teacher: Path, student: Path, out: Path, classes: int | None = None) -> str:
    """Write the merged start file and return, in lines, what it took, what it needs and what to run next.

    teacher: a Faster R-CNN with FPN of detectron2, .pth or the model zoo's .pkl. student: one of BACKBONES, .pth or
    .pkl, whose tensors are named as in torchvision, MSRA's caffe2 files or detectron2 (mdistiller for MobileNetV2).
    classes: the teacher's number of classes without the background, if it is to be checked.

    Raises UserError if a file is missing, holds something else or cannot be written. OUT is then what it was before.
    """
    if out.suffix != ".pth":
        raise UserError(f"command line: OUT is {out}; it must end in .pth, which detectron2 reads as it stands")
    for key, file in (("TEACHER", teacher), ("STUDENT", student)):
        if file.exists() and out.exists() and out.samefile(file):
            raise UserError(f"command line: OUT is {out}; it must be another file than {key}")
    detector = read_teacher(teacher, classes)
    backbone = read_student(student)
    merged = {f"backbone.bottom_up.{name}": value for name, value in backbone.tensors.items()}
    merged |= {f"teacher.{name}": value for name, value in detector.tensors.items()}
    # saving a view would save the whole tensor behind it
    merged = {name: value.detach().clone().contiguous() for name, value in merged.items()}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.save({"model": merged}, out)
    except OSError as error:
        raise UserError(f"{out}: OUT must be a file that can be written ({error.strerror})") from None
    return "\n".join(_report(detector, backbone, out))


@dataclass(frozen=True)
class Teacher:
    """A detector's tensors under detectron2's names, and the names of what else its file held."""

    file: Path
    tensors: dict[str, Tensor]
    left_out: list[str]

    @property
    def classes(self) -> int:
        """The number of classes, without the background, which is the classifier's last row."""
        return len(self.tensors[CLASSIFIER]) - 1

    @property
    def blocks(self) -> int:
        """The number of blocks in stage res4: 6 in ResNet-50, 23 in ResNet-101, 0 in any other network."""
        matches = {re.match(r"backbone\.bottom_up\.res4\.(\d+)\.", name) for name in self.tensors}
        width = self.tensors.get("backbone.bottom_up.res4.0.conv2.weight", torch.empty(0)).shape
        return len({match[1] for match in matches if match}) if width == (256, 256, 3, 3) else 0


def read_teacher(file: Path, classes: int | None = None) -> Teacher:
    """Read a teacher from a file of detectron2. Raises UserError if mdistiller's RCNNKD cannot take it."""
    tensors = _read(file, "TEACHER")
    for part in ("backbone.bottom_up.", "backbone.fpn_", "proposal_generator.", "roi_heads."):
        if not any(name.startswith(part) for name in tensors):
            raise UserError(
                f"{file}: TEACHER must be a Faster R-CNN with FPN of detectron2; no tensor of it is named {part}…"
            )
    if CLASSIFIER not in tensors or tensors[CLASSIFIER].ndim != 2:
        raise UserError(f"{file}: TEACHER must have one box head with a classifier {CLASSIFIER}")
    parts = ("backbone.", "proposal_generator.", "roi_heads.")
    # anchors come from the config, and frozen norms count no batches
    made = re.compile(r".*anchor_generator\.|.*num_batches_tracked$")
    taken = {name: value for name, value in tensors.items() if name.startswith(parts) and not made.match(name)}
    left_out = [name for name in tensors if name not in taken]
    teacher = Teacher(file, taken, left_out)
    if classes not in (None, teacher.classes):
        raise UserError(f"{file}: TEACHER has {teacher.classes} classes; --classes says {classes}")
    return teacher


@dataclass(frozen=True)
class Naming:
    """How a library names a backbone's tensors."""

    owner: str
    sign: str
    """A pattern of one tensor's name that only this naming has."""
    rename: Callable[[str], str]
    """Gives detectron2's name, or mdistiller's for MobileNetV2; anything for a tensor outside the backbone."""


@dataclass(frozen=True)
class Student:
    """A backbone's tensors under the names of mdistiller's detection, without a prefix."""

    file: Path
    network: str
    naming: Naming
    tensors: dict[str, Tensor]
    left_out: list[str]


def read_student(file: Path) -> Student:
    """Read a student's backbone from a file. Raises UserError if it is none of BACKBONES or not whole."""
    tensors = _read(file, "STUDENT")
    naming = next((each for each in NAMINGS if any(re.fullmatch(each.sign, name) for name in tensors)), None)
    if naming is None:
        raise UserError(
            f"{file}: STUDENT must be a {_choice(BACKBONES)} of torchvision, MSRA or detectron2; "
            f"the first of its {len(tensors)} tensors is {next(iter(tensors))}"
        )
    renamed = {name: naming.rename(name) for name in tensors}
    left_out = [name for name in tensors if not _is_backbone(renamed[name])]
    taken = {renamed[name]: value for name, value in tensors.items() if name not in left_out}
    if naming is CAFFE2:
        taken = _with_statistics(taken)
    shapes = {name: value.shape for name, value in taken.items()}
    for network in BACKBONES:
        if shapes == _wanted(network):
            return Student(file, network, naming, taken, left_out)
    raise UserError(f"{file}: STUDENT must be a {_choice(BACKBONES)}; {_difference(shapes)}")


def _torchvision_resnet(name: str) -> str:
    name = re.sub(r"^(conv1|bn1)\.", r"stem.\1.", name)
    name = re.sub(r"^layer(\d)\.", lambda stage: f"res{int(stage[1]) + 1}.", name)
    name = re.sub(r"\bbn(\d)\.", r"conv\1.norm.", name)
    return name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")


def _torchvision_mobilenet(name: str) -> str:
    """Rename a tensor of torchvision, which nests a convolution with its norm; mdistiller's blocks are flat."""
    match = re.fullmatch(r"features\.(\d+)\.conv\.(\d)\.(?:(\d)\.)?(\w+)", name)
    if match is None:
        return name
    block, layer, part, tensor = match.groups()
    nested = 1 if block == "1" else 2  # the first block does not expand its channels
    index = 3 * int(layer) + int(part) if part else int(layer) + 2 * nested
    return f"features.{block}.conv.{index}.{tensor}"


_CAFFE2_LAYERS = {"1": "shortcut", "2a": "conv1", "2b": "conv2", "2c": "conv3"}
_CAFFE2_TENSORS = {
    **{"w": "weight", "bn_s": "norm.weight", "bn_b": "norm.bias"},
    **{"bn_rm": "norm.running_mean", "bn_riv": "norm.running_var"},
}


def _caffe2(name: str) -> str:
    name = re.sub(r"^(res_)?conv1_", "stem.conv1_", name)
    layer = r"^res(\d)_(\d+)_branch(1|2[abc])_"
    name = re.sub(layer, lambda match: f"res{match[1]}.{match[2]}.{_CAFFE2_LAYERS[match[3]]}_", name)
    return re.sub(r"_(w|bn_\w+)$", lambda match: f".{_CAFFE2_TENSORS.get(match[1])}", name)


def _detectron2(name: str) -> str:
    return re.sub(r"^(backbone\.)?(bottom_up\.)?", "", name)


CAFFE2 = Naming("MSRA", r"res2_0_branch2a_w", _caffe2)
NAMINGS = (
    Naming("torchvision", r"layer1\.0\.conv1\.weight", _torchvision_resnet),
    Naming("torchvision", r"features\.1\.conv\.0\.0\.weight", _torchvision_mobilenet),
    CAFFE2,
    Naming("detectron2", r"(backbone\.)?(bottom_up\.)?(stem\.conv1\.weight|features\.1\.conv\.0\.weight)", _detectron2),
)


def _is_backbone(name: str) -> bool:
    """Say whether mdistiller's backbones can have a tensor of this name; MobileNetV2's end before features.18."""
    return bool(re.fullmatch(r"(stem|res[2-5]|features\.(?!18\.)\d+)\..*\.(weight|bias|running_(mean|var))", name))


@cache
def _wanted(network: str) -> dict[str, Size]:
    """Return the shapes of a backbone's tensors by name, taken from torchvision's network."""
    with device.shapes_only():
        tensors = torchvision.models.get_model(network).state_dict()
    rename = _torchvision_mobilenet if network == "mobilenet_v2" else _torchvision_resnet
    named = {rename(name): value.shape for name, value in tensors.items()}
    return {name: shape for name, shape in named.items() if _is_backbone(name)}


def _with_statistics(taken: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add the statistics of BatchNorms to a file of MSRA, which has them worked into scale and shift."""
    complete = dict(taken)
    for name, scale in taken.items():
        if name.endswith("norm.weight"):
            norm = name.removesuffix("weight")
            complete.setdefault(f"{norm}running_mean", torch.zeros_like(scale))
            complete.setdefault(f"{norm}running_var", torch.full_like(scale, IDENTITY_VARIANCE))
    return complete


def _difference(shapes: Mapping[str, Size]) -> str:
    """Name the first tensor in which a file differs from the backbone that is closest to it."""
    closest = max(BACKBONES, key=lambda network: len(shapes.items() & _wanted(network).items()))
    wanted = _wanted(closest)
    for name, shape in wanted.items():
        if name not in shapes:
            return f"{closest}'s {name} is missing"
        if shapes[name] != shape:
            return f"{closest}'s {name} is {tuple(shapes[name])}, not {tuple(shape)}"
    return f"{next(name for name in shapes if name not in wanted)} is more than {closest} has"


def _read(file: Path, key: str) -> dict[str, Tensor]:
    """Read the tensors of a .pth of torch or a .pkl of numpy arrays, by name."""
    if file.suffix == ".pkl":
        content = array_pickle.load(file, key)
        for part in ("model", "blobs"):
            if isinstance(content, Mapping) and isinstance(content.get(part), Mapping):
                content = content[part]
        if isinstance(content, Mapping):
            content = {
                name: torch.from_numpy(np.asarray(value)) if isinstance(value, np.ndarray) else value
                for name, value in content.items()
                if not str(name).endswith("_momentum")
            }
    else:
        content = checkpoint.load(file, key)
    weights = checkpoint.network_weights(content)
    if weights is None:
        raise UserError(f"{file}: {key} must hold a network's tensors by name, and this file does not")
    return weights


def _report(teacher: Teacher, student: Student, out: Path) -> list[str]:
    pair = PAIRS.get((student.network, teacher.blocks))
    config = f"configs/DeepKD/DeepKD-{pair}.yaml" if pair else "CONFIG"
    pixels, options = _pixels(student)
    command = ["python", "detection/train_net.py", "--config-file", config, "--num-gpus", "4"]
    command += ["MODEL.WEIGHTS", str(out.resolve()), *options]
    return [
        f"teacher  {teacher.file}: {len(teacher.tensors)} tensors, {teacher.classes} classes{_left(teacher.left_out)}",
        f"student  {student.file}: {len(student.tensors)} tensors of a {student.network} as {student.naming.owner} "
        f"names them{_left(student.left_out)}",
        f"written  {out} ({len(teacher.tensors) + len(student.tensors)} tensors)",
        f"pixels   {pixels}",
        f"next     {shlex.join(command)}",
    ]


def _left(names: list[str]) -> str:
    counts = [name for name in names if name.endswith("num_batches_tracked")]
    rest = [name for name in names if name not in counts]
    parts = rest[:4] + ([f"{len(rest) - 4} more"] if len(rest) > 4 else [])
    if counts:
        parts.append(f"{len(counts)} num_batches_tracked")
    return f"; left out: {', '.join(parts)}" if parts else ""


def _pixels(student: Student) -> tuple[str, list[str]]:
    """Say what a student's input must be, in words and as options that mdistiller's config of it lacks."""
    if student.naming is CAFFE2:
        return "BGR with a standard deviation of 1, detectron2's defaults", []
    if student.naming.owner == "detectron2":
        return "as in the config that the student's file was trained with", []
    words = "RGB with ImageNet's mean [123.675, 116.28, 103.53] and standard deviation [58.395, 57.12, 57.375]"
    if student.network == "resnet18":
        return (
            f"{words}; mdistiller's R18 configs say RGB and have the numbers in the order BGR "
            "(PIXEL_STD [57.375, 57.12, 58.395])",
            [],
        )
    mean = "[123.675, 116.28, 103.53]"
    options = ["INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", mean, "MODEL.PIXEL_STD", "[58.395, 57.12, 57.375]"]
    # mdistiller subtracts the teacher's mean before it turns the student's RGB into the teacher's BGR
    options += ["TEACHER.MODEL.PIXEL_MEAN", mean]
    if student.network == "resnet50":
        options += ["MODEL.RESNETS.STRIDE_IN_1X1", "False"]  # torchvision's strides are in the 3x3 convolutions
    return words, options


def _choice(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
