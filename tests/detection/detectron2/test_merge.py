"""deepkd merge-detector-weights: names, what is refused, and loading into mdistiller's own modules."""

import logging
import os
import pickle

import pytest
import torch
import torchvision
from torch import nn

from deepkd_plugin.commands import cli
from deepkd_plugin.detection.detectron2 import merge
from deepkd_plugin.errors import UserError

MEAN = "PIXEL_MEAN '[123.675, 116.28, 103.53]'"


@pytest.fixture(scope="module")
def backbones():
    """Each student with random weights and BatchNorm statistics, in eval mode."""
    networks = {}
    for seed, name in enumerate(merge.BACKBONES):
        torch.manual_seed(seed)
        network = torchvision.models.get_model(name).eval()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.1)
        networks[name] = network
    return networks


def detector(classes=3, blocks=23, width=256):
    """Some tensors of a Faster R-CNN with FPN under detectron2's names, and what a model zoo's file has besides."""
    names = {
        **{f"backbone.bottom_up.res4.{i}.conv2.norm.weight": (2,) for i in range(blocks)},
        "backbone.bottom_up.res4.0.conv2.weight": (width, 256, 3, 3),
        "backbone.fpn_lateral2.weight": (2, 2, 1, 1),
        "proposal_generator.rpn_head.conv.weight": (2, 2, 3, 3),
        "roi_heads.box_head.fc1.weight": (2, 2),
        "roi_heads.box_predictor.cls_score.weight": (classes + 1, 2),
        "roi_heads.box_predictor.bbox_pred.weight": (4 * classes, 2),
    }
    besides = {"pixel_mean": (3, 1, 1), "proposal_generator.anchor_generator.cell_anchors.0": (3, 4)}
    return {name: torch.rand(shape) for name, shape in (names | besides).items()}


def caffe2(network):
    """A torchvision ResNet in the form of MSRA's files: their names, BatchNorm's statistics worked in."""
    layers = [("conv1", "res_conv1", network.conv1, network.bn1)]
    for stage in range(1, 5):
        for number, block in enumerate(getattr(network, f"layer{stage}")):
            at = f"res{stage + 1}_{number}_branch"
            for letter, place in zip("abc", "123"):
                name = f"{at}2{letter}"
                layers.append((name, name, getattr(block, f"conv{place}"), getattr(block, f"bn{place}")))
            if block.downsample is not None:
                layers.append((f"{at}1", f"{at}1", *block.downsample))
    blobs = {"conv1_b": torch.zeros(64), "fc1000_w": network.fc.weight, "fc1000_b": network.fc.bias}
    for name, norm_name, conv, norm in layers:
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        blobs[f"{name}_w"] = conv.weight
        blobs[f"{norm_name}_bn_s"] = scale
        blobs[f"{norm_name}_bn_b"] = norm.bias - norm.running_mean * scale
    return {name: value.detach().numpy() for name, value in blobs.items()}


def as_pickle(path, content, protocol=4):
    path.write_bytes(pickle.dumps(content, protocol))
    return path


def as_torch(path, content):
    torch.save(content, path)
    return path


def arrays(tensors):
    return {name: value.numpy() for name, value in tensors.items()}


def test_the_merged_file_has_both_under_the_names_of_rcnnkd(tmp_path, capsys, backbones):
    tensors, network = detector(), backbones["resnet18"]
    teacher = as_pickle(tmp_path / "t.pkl", {"model": arrays(tensors), "__author__": "Detectron2 Model Zoo"}, 2)
    student, out = (
        as_torch(tmp_path / "s.pth", network.state_dict()),
        tmp_path / "pretrained" / "r18-r101.pth",
    )
    words = [str(path) for path in (teacher, student, out)]
    assert cli.main(["merge-detector-weights", *words, "--classes", "3"]) == 0
    file = torch.load(out, weights_only=True)
    assert list(file) == ["model"]
    merged = file["model"]
    taken = {name for name in tensors if name != "pixel_mean" and "cell_anchors" not in name}
    assert {name for name in merged if name.startswith("teacher.")} == {f"teacher.{name}" for name in taken}
    for name in taken:
        assert torch.equal(merged[f"teacher.{name}"], tensors[name])
    named = {
        "stem.conv1.weight": network.conv1.weight,
        "stem.conv1.norm.running_var": network.bn1.running_var,
        "res2.1.conv2.norm.bias": network.layer1[1].bn2.bias,
        "res4.0.shortcut.weight": network.layer3[0].downsample[0].weight,
        "res5.0.shortcut.norm.running_mean": network.layer4[0].downsample[1].running_mean,
    }
    for name, value in named.items():
        assert torch.equal(merged[f"backbone.bottom_up.{name}"], value)
    assert sum(name.startswith("backbone.bottom_up.") for name in merged) == 100
    assert len(merged) == 100 + len(taken)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        f"teacher  {teacher}: {len(taken)} tensors, 3 classes; left out: pixel_mean, "
        "proposal_generator.anchor_generator.cell_anchors.0"
    )
    assert lines[1] == (
        f"student  {student}: 100 tensors of a resnet18 as torchvision names them; left out: fc.weight, fc.bias, "
        "20 num_batches_tracked"
    )
    assert lines[2] == f"written  {out} ({len(merged)} tensors)"
    assert lines[3].startswith("pixels   RGB with ImageNet's mean [123.675, 116.28, 103.53]")
    assert lines[4] == (
        "next     python detection/train_net.py --config-file configs/DeepKD/DeepKD-R18-R101.yaml --num-gpus 4 "
        f"MODEL.WEIGHTS {out}"
    )
    assert [path.name for path in out.parent.iterdir()] == [out.name]


@pytest.mark.parametrize(
    ("name", "blocks", "pair", "options"),
    [
        ("resnet50", 23, "R50-R101", ["MODEL.PIXEL_STD '[58.395, 57.12, 57.375]'", "STRIDE_IN_1X1 False"]),
        (
            *("mobilenet_v2", 6, "MV2-R50"),
            [f"INPUT.FORMAT RGB MODEL.{MEAN}", f"TEACHER.MODEL.{MEAN}"],
        ),
        ("mobilenet_v2", 23, None, []),
    ],
)
def test_what_a_student_of_torchvision_needs(tmp_path, backbones, name, blocks, pair, options):
    teacher = as_torch(tmp_path / "t.pth", {"model": detector(blocks=blocks), "iteration": 5})
    student = as_torch(tmp_path / "s.pth", backbones[name].state_dict())
    said = merge.merge(teacher, student, tmp_path / "o.pth")
    assert (f"configs/DeepKD/DeepKD-{pair}.yaml" if pair else "--config-file CONFIG") in said
    for option in options:
        assert option in said.splitlines()[-1]


def test_a_wider_teacher_is_not_taken_for_one_of_mdistiller_s(tmp_path, backbones):
    teacher = as_torch(tmp_path / "t.pth", detector(width=512))
    student = as_torch(tmp_path / "s.pth", backbones["resnet18"].state_dict())
    assert "--config-file CONFIG" in merge.merge(teacher, student, tmp_path / "o.pth")


def test_mobilenet_s_blocks_are_flat_in_mdistiller(tmp_path, backbones):
    network = backbones["mobilenet_v2"]
    student = merge.read_student(as_torch(tmp_path / "s.pth", network.state_dict()))
    first, second = network.features[1].conv, network.features[2].conv
    named = {
        "features.0.1.bias": network.features[0][1].bias,
        **{"features.1.conv.0.weight": first[0][0].weight, "features.1.conv.1.bias": first[0][1].bias},
        **{"features.1.conv.3.weight": first[1].weight, "features.1.conv.4.bias": first[2].bias},
        **{"features.2.conv.0.weight": second[0][0].weight, "features.2.conv.1.bias": second[0][1].bias},
        **{"features.2.conv.3.weight": second[1][0].weight, "features.2.conv.4.bias": second[1][1].bias},
        **{"features.2.conv.6.weight": second[2].weight, "features.2.conv.7.bias": second[3].bias},
        "features.17.conv.7.running_var": network.features[17].conv[3].running_var,
    }
    for name, value in named.items():
        assert torch.equal(student.tensors[name], value)
    assert len(student.tensors) == 255
    assert {name.split(".")[0] for name in student.left_out} == {"features", "classifier"}
    counted = [name for name in student.left_out if name.endswith("num_batches_tracked")]
    rest = [name for name in student.left_out if name not in counted]
    assert all(name.startswith(("features.18.", "classifier.")) for name in rest)


def test_msra_s_names_and_statistics(tmp_path, backbones):
    network = backbones["resnet50"]
    student = merge.read_student(as_pickle(tmp_path / "R-50.pkl", caffe2(network)))
    assert (student.network, student.left_out) == ("resnet50", ["conv1_b", "fc1000_w", "fc1000_b"])
    assert len(student.tensors) == 265
    named = {
        "stem.conv1.weight": network.conv1.weight,
        "res2.0.shortcut.weight": network.layer1[0].downsample[0].weight,
        "res4.5.conv1.weight": network.layer3[5].conv1.weight,
        "res5.2.conv3.weight": network.layer4[2].conv3.weight,
    }
    for name, value in named.items():
        assert torch.equal(student.tensors[name], value)
    norm = nn.BatchNorm2d(2048).eval()
    own = {name: student.tensors[f"res5.2.conv3.norm.{name}"] for name in list(norm.state_dict())[:4]}
    norm.load_state_dict(own, strict=False)
    images = torch.randn(2, 2048, 2, 2)
    torch.testing.assert_close(norm(images), network.layer4[2].bn3(images))
    said = merge.merge(as_torch(tmp_path / "t.pth", detector()), student.file, tmp_path / "o.pth")
    assert "a resnet50 as MSRA names them; left out: conv1_b, fc1000_w, fc1000_b\n" in said
    assert "pixels   BGR with a standard deviation of 1, detectron2's defaults\n" in said
    assert said.endswith(f"MODEL.WEIGHTS {tmp_path / 'o.pth'}")


@pytest.mark.parametrize("prefix", ["", "bottom_up.", "backbone.bottom_up."])
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_detectron2_s_names_are_taken_as_they_are(tmp_path, backbones, name, prefix):
    first = merge.read_student(as_torch(tmp_path / "s.pth", backbones[name].state_dict()))
    own = {f"{prefix}{tensor}": value for tensor, value in first.tensors.items()}
    # a detector's other parts stay behind
    rest = {
        "backbone.fpn_lateral2.weight": torch.zeros(1),
        "teacher.backbone.bottom_up.stem.conv1.weight": own,
    }
    rest["teacher.backbone.bottom_up.stem.conv1.weight"] = torch.zeros(1)
    again = merge.read_student(as_pickle(tmp_path / "s.pkl", {"model": arrays(own | rest)}))
    assert (again.network, again.naming.owner, again.left_out) == (name, "detectron2", list(rest))
    assert again.tensors.keys() == first.tensors.keys()
    assert all(torch.equal(again.tensors[tensor], value) for tensor, value in first.tensors.items())


def refused(match, read, *arguments):
    with pytest.raises(UserError, match=match) as caught:
        read(*arguments)
    assert "\n" not in str(caught.value)


def test_teachers_that_are_something_else(tmp_path):
    file, tensors = tmp_path / "t.pth", detector()
    refused(r"t\.pth: no such file; TEACHER must name a checkpoint", merge.read_teacher, file)
    refused(r"t\.pkl: no such file; TEACHER must name a pickle", merge.read_teacher, tmp_path / "t.pkl")
    for part in ("roi_heads.", "proposal_generator.", "backbone.fpn_", "backbone.bottom_up."):
        as_torch(file, {name: value for name, value in tensors.items() if not name.startswith(part)})
        refused(rf"FPN of detectron2; no tensor of it is named {part}…", merge.read_teacher, file)
    for scores in ({}, {merge.CLASSIFIER: torch.zeros(4)}):
        others = {name: value for name, value in tensors.items() if name != merge.CLASSIFIER}
        as_torch(file, others | scores)
        refused(r"one box head with a classifier roi_heads\.box_pred", merge.read_teacher, file)
    as_torch(file, tensors)
    assert merge.read_teacher(file, 3).classes == 3
    refused(r"t\.pth: TEACHER has 3 classes; --classes says 80", merge.read_teacher, file, 80)
    for content in ([1, 2], {"model": {"a": 1}}, {}):
        refused("TEACHER must hold a network's tensors by name", merge.read_teacher, as_torch(file, content))
        as_pickle(tmp_path / "t.pkl", content)
        refused("TEACHER must hold a network's tensors by name", merge.read_teacher, tmp_path / "t.pkl")


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("read", [merge.read_teacher, merge.read_student])
def test_code_in_a_file_is_not_run(tmp_path, read):
    content = {"model": detector() | {"x": Payload(tmp_path / "ran")}}
    refused("refers to posix.mkdir", read, as_pickle(tmp_path / "t.pkl", {"model": content["model"]["x"]}))
    refused("refers to posix.mkdir", read, as_torch(tmp_path / "t.pth", content))
    assert not (tmp_path / "ran").exists()


def test_students_that_are_something_else(tmp_path, backbones):
    file = tmp_path / "s.pth"

    def read(content):
        return merge.read_student, as_torch(file, content)

    refused(r"s\.pth: no such file; STUDENT must name", merge.read_student, file)
    whole = backbones["resnet18"].state_dict()
    refused("must be a resnet18, resnet50 or mobilenet_v2 of torchvision", *read(detector()))
    refused("the first of its 1 tensors is a$", *read({"a": torch.zeros(1)}))
    short = {name: value for name, value in whole.items() if name != "layer4.1.bn2.running_var"}
    refused(r"; resnet18's res5\.1\.conv2\.norm\.running_var is missing$", *read(short))
    deeper = whole | {"layer3.2.conv1.weight": torch.zeros(256, 256, 3, 3)}
    refused(r"; res4\.2\.conv1\.weight is more than resnet18 has$", *read(deeper))
    wide = whole | {"layer1.0.conv1.weight": torch.zeros(128, 64, 3, 3)}
    refused(r"; resnet18's res2\.0\.conv1\.weight is \(128, 64, 3, 3\), not \(64, 64, 3, 3\)$", *read(wide))
    with torch.device("meta"):
        others = [torchvision.models.resnet34(), torchvision.models.mobilenet_v2(width_mult=0.25)]
    for network in others:
        tensors = {name: torch.zeros(value.shape) for name, value in network.state_dict().items()}
        refused("STUDENT must be a resnet18, resnet50 or mobilenet_v2; ", *read(tensors))


def test_out_that_cannot_be_written(tmp_path, backbones):
    teacher = as_torch(tmp_path / "t.pth", detector())
    student = as_torch(tmp_path / "s.pth", backbones["resnet18"].state_dict())
    before = teacher.read_bytes()
    refused(r"OUT is .*o\.pkl; it must end in \.pth", merge.merge, teacher, student, tmp_path / "o.pkl")
    refused(r"it must be another file than TEACHER", merge.merge, teacher, student, tmp_path / "." / "t.pth")
    refused(r"it must be another file than STUDENT", merge.merge, teacher, student, student)
    (tmp_path / "folder.pth").mkdir()
    for out in (teacher / "o.pth", teacher / "a" / "o.pth", tmp_path / "folder.pth"):
        refused(r"OUT must be a file that can be written \(", merge.merge, teacher, student, out)
    out = tmp_path / "o.pth"
    out.write_text("old")
    refused("TEACHER has 3 classes", merge.merge, teacher, student, out, 4)
    assert (out.read_text(), teacher.read_bytes()) == ("old", before)
    assert {path.name for path in tmp_path.iterdir()} == {"t.pth", "s.pth", "o.pth", "folder.pth"}


@pytest.fixture(scope="module")
def rcnnkd(mdistiller_root, mdistiller):
    """Builds mdistiller's RCNNKD by one of its configs, its teacher narrow: rcnnkd("R18-R101", "KEY", value, …)."""
    # tests/detection/detectron2 is a package of that name without these
    pytest.importorskip("detectron2.config", reason="detectron2 is not installed")
    if not (mdistiller_root / "detection").is_dir():
        pytest.skip("the mdistiller that is here has no detection/")
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(mdistiller_root / "detection"))
        import model

    def build(pair, *options):
        cfg = get_cfg()
        model.add_distillation_cfg(cfg)
        cfg.TEACHER = get_cfg()
        cfg.merge_from_file(str(mdistiller_root / "detection/configs/DKD" / f"DKD-{pair}.yaml"))
        narrow = {
            **{"TEACHER.MODEL.RESNETS.STEM_OUT_CHANNELS": 8, "TEACHER.MODEL.RESNETS.RES2_OUT_CHANNELS": 16},
            **{"TEACHER.MODEL.RESNETS.WIDTH_PER_GROUP": 4, "TEACHER.MODEL.FPN.OUT_CHANNELS": 16},
            **{"TEACHER.MODEL.ROI_BOX_HEAD.FC_DIM": 16, "MODEL.ROI_BOX_HEAD.FC_DIM": 16},
            **{"MODEL.FPN.OUT_CHANNELS": 16, "MODEL.DEVICE": "cpu"},
        }
        cfg.merge_from_list([word for pair in narrow.items() for word in pair] + list(options))
        return build_model(cfg).eval()

    return build


@pytest.mark.parametrize(
    ("pair", "name", "form"),
    [
        ("R18-R101", "resnet18", "torchvision"),
        ("R50-R101", "resnet50", "MSRA"),
        ("R50-R101", "resnet50", "torchvision"),
        ("MV2-R50", "mobilenet_v2", "torchvision"),
    ],
)
def test_detectron2_loads_the_file_into_mdistiller_s_modules(tmp_path, caplog, rcnnkd, backbones, pair, name, form):
    from detectron2.checkpoint import DetectionCheckpointer

    network = backbones[name]
    # torchvision's ResNet-50, whose strides are elsewhere than MSRA's, is what the outputs are compared with
    built = rcnnkd(pair, *(["MODEL.RESNETS.STRIDE_IN_1X1", False] if name == "resnet50" else []))
    tensors = {key: torch.rand_like(value) for key, value in built.teacher.state_dict().items()}
    besides = {
        "pixel_mean": torch.zeros(3, 1, 1),
        "proposal_generator.anchor_generator.cell_anchors.0": torch.ones(3),
    }
    teacher = as_pickle(tmp_path / "t.pkl", {"model": arrays(tensors | besides), "__author__": "zoo"})
    if form == "MSRA":
        student = as_pickle(tmp_path / "s.pkl", caffe2(network))
    else:
        student = as_torch(tmp_path / "s.pth", network.state_dict())
    said = merge.merge(teacher, student, tmp_path / "o.pth", classes=80)
    assert f" as {form} names them" in said

    checkpointer, incompatible = DetectionCheckpointer(built), []
    checkpointer._log_incompatible_keys = incompatible.append
    with caplog.at_level(logging.ERROR):
        checkpointer.load(str(tmp_path / "o.pth"))
    (keys,) = incompatible
    assert (keys.unexpected_keys, keys.incorrect_shapes) == ([], [])
    # what is not in the file is the student's, from its FPN on
    assert {key.split("_")[0].split(".")[0] for key in keys.missing_keys} == {"backbone", "proposal", "roi"}
    assert all(key.startswith(("backbone.fpn_", "proposal_generator.", "roi_heads.")) for key in keys.missing_keys)
    loaded = built.teacher.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in tensors.items())

    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        last = list(built.backbone.bottom_up(image).values())[-1]
        if name == "mobilenet_v2":
            expected = network.features[:18](image)
        else:
            children = dict(network.named_children())
            expected = nn.Sequential(*(children[part] for part in list(children)[:8]))(image)
    torch.testing.assert_close(last, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
