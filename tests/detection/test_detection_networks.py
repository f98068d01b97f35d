import pytest
import torch
from torch import nn
from torchvision import models
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.misc import FrozenBatchNorm2d

from deepkd_plugin.detection.distillers import training_pass
from deepkd_plugin.detection.networks import COCO_IDS, NETWORKS, count_classes, network, trained_network
from deepkd_plugin.errors import UserError
from deepkd_plugin.hosts.builtin.models import cifar_model_dict

KEY = "DISTILLER.TEACHER_WEIGHTS"
SMALL = "fasterrcnn_resnet8_fpn"
SAMPLING = {
    "min_size": 64,
    "max_size": 64,
    "box_batch_size_per_image": 8,
    "rpn_pre_nms_top_n_train": 30,
    "rpn_pre_nms_top_n_test": 20,
    "rpn_post_nms_top_n_train": 16,
    "rpn_post_nms_top_n_test": 8,
}


def _resnet18(weights_backbone, num_classes, **options):
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=weights_backbone, norm_layer=nn.BatchNorm2d, trainable_layers=5
    )
    return detection.FasterRCNN(backbone, num_classes, **options)


THEIRS = {
    "fasterrcnn_resnet50_fpn": detection.fasterrcnn_resnet50_fpn,
    "fasterrcnn_resnet18_fpn": _resnet18,
    "fasterrcnn_mobilenet_v3_large_320_fpn": detection.fasterrcnn_mobilenet_v3_large_320_fpn,
}


@pytest.fixture
def node(detection_config):
    return detection_config("DETECTION.MIN_SIZE", "[64]", "DETECTION.MAX_SIZE", "64").DETECTION


@pytest.mark.parametrize("name", THEIRS)
def test_tensors_have_torchvisions_names_and_shapes(name, node):
    with torch.device("meta"):
        ours = network(name, 90, node).state_dict()
        theirs = THEIRS[name](weights_backbone=None, num_classes=91).state_dict()
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}


@pytest.mark.parametrize("name", THEIRS)
def test_outputs_and_losses_are_torchvisions(name, node, batch):
    images, targets = batch
    theirs = THEIRS[name](weights_backbone=None, num_classes=6, **SAMPLING)
    ours = network(name, 5, node)
    ours.load_state_dict(theirs.state_dict())
    assert ours.rpn.score_thresh == theirs.rpn.score_thresh  # these untrained ones are all above it
    torch.manual_seed(3)
    expected = theirs.train()(images, targets)
    torch.manual_seed(3)
    losses = training_pass(ours.train(), images, targets).losses
    assert losses.keys() == expected.keys()
    assert all(torch.equal(losses[name], loss) for name, loss in expected.items())
    with torch.no_grad():
        for one, other in zip(ours.eval()(images), theirs.eval()(images)):
            assert len(other["boxes"]) > 0
            assert all(torch.equal(one[part], other[part]) for part in ("boxes", "scores", "labels"))


@pytest.mark.parametrize("name", sorted(set(NETWORKS) - set(THEIRS)))
def test_small_networks_find_boxes_inside_images_of_any_size(name, node):
    outputs = network(name, 5, node).eval()([torch.rand(3, 40, 60), torch.rand(3, 33, 31)])
    for one, (height, width) in zip(outputs, ((40, 60), (33, 31))):
        assert len(one["boxes"]) > 0
        assert one["boxes"].min() >= 0
        assert (one["boxes"][:, 2] <= width).all()
        assert (one["boxes"][:, 3] <= height).all()
        assert 1 <= one["labels"].min() <= one["labels"].max() <= 5


def test_sampling_is_by_the_config(detector):
    made = detector(0, "DETECTION.PROPOSALS", "12", "DETECTION.FOREGROUND", "0.5", "DETECTION.KEPT_TEST", "7")
    heads, rpn = made.roi_heads, made.rpn
    assert (heads.fg_bg_sampler.batch_size_per_image, heads.fg_bg_sampler.positive_fraction) == (12, 0.5)
    assert (rpn._pre_nms_top_n, rpn._post_nms_top_n) == (
        {"training": 30, "testing": 20},
        {"training": 16, "testing": 7},
    )
    assert (made.transform.min_size, made.transform.max_size) == ([48], 48)


def test_boxes_are_float32_under_autocast(detector):
    """In bfloat16, which torchvision would take, coordinates above 1,000 come in steps of 4 pixels."""
    made = detector(0, "DETECTION.MAX_SIZE", "1200")
    images = [torch.rand(3, 48, 1200)]
    targets = [{"boxes": torch.tensor([[1000.3, 3.3, 1020.7, 30.1]]), "labels": torch.tensor([1])}]
    anchors, passes = [], {}
    made.rpn.anchor_generator.register_forward_hook(lambda module, inputs, output: anchors.append(output[0]))
    for amp in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            passes[amp] = training_pass(made.train(), images, targets)
    assert torch.equal(*anchors)
    step = passes[True]
    assert step.proposals[0].dtype == step.logits.dtype == torch.float32
    for name, loss in passes[False].losses.items():
        assert step.losses[name].item() == pytest.approx(loss.item(), rel=0.03), name
    with torch.autocast("cpu", torch.bfloat16):
        linear = made.roi_heads.box_head.fc6(torch.rand(1, 1600))
    assert linear.dtype == torch.bfloat16  # the networks themselves are not widened


# files of detectors


@pytest.fixture
def saved(tmp_path, node):
    """The file of a detector: saved(name, classes, trained=False) -> (path, detector)."""

    def save(name=SMALL, classes=5, trained=False, file="detector.pth"):
        torch.manual_seed(classes)
        made = network(name, classes, node, trained=trained)
        torch.save({"model": made.state_dict()}, tmp_path / file)
        return tmp_path / file, made

    return save


def test_weights_of_a_file(saved, node):
    file, saved_network = saved()
    made = trained_network(SMALL, 5, node, str(file), KEY)
    assert all(torch.equal(made.state_dict()[n], t) for n, t in saved_network.state_dict().items())
    assert not any(p.requires_grad for p in made.parameters())
    assert count_classes(made) == 5
    assert any(isinstance(m, nn.BatchNorm2d) for m in made.modules())


@pytest.mark.parametrize(("file", "eps"), [("fasterrcnn_resnet50_fpn_coco-258fb6c6.pth", 0.0), ("other.pth", 1e-5)])
def test_frozen_norms_of_a_file_and_their_epsilon(saved, node, file, eps):
    path, _ = saved(trained=True, file=file)
    made = trained_network(SMALL, 5, node, str(path), KEY)
    norms = [m for m in made.modules() if isinstance(m, FrozenBatchNorm2d)]
    assert norms
    assert not any(isinstance(m, nn.BatchNorm2d) for m in made.modules())
    assert {m.eps for m in norms} == {eps}


def test_torchvisions_coco_files_keep_the_columns_of_the_80_classes(saved, node):
    categories = detection.FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    assert [categories[i] for i in COCO_IDS] == [c for c in categories[1:] if c != "N/A"]
    file, saved_network = saved(classes=90)
    made = trained_network(SMALL, 80, node, str(file), KEY)
    assert count_classes(made) == 80
    columns = [0, *COCO_IDS]
    x = torch.rand(3, 128)
    (scores, boxes), (all_scores, all_boxes) = (m.roi_heads.box_predictor(x) for m in (made, saved_network))
    torch.testing.assert_close(scores, all_scores[:, columns])
    torch.testing.assert_close(boxes.view(3, 81, 4), all_boxes.view(3, 91, 4)[:, columns])
    assert not any(p.requires_grad for p in made.parameters())


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("", "DISTILLER.TEACHER_WEIGHTS names no file; it must name a checkpoint of fasterrcnn_resnet8_fpn"),
        ("none.pth", "none.pth: no such file; DISTILLER.TEACHER_WEIGHTS must name a checkpoint"),
        ("builtin:none", "'builtin:none' do not ship with the package; these do: builtin:glyph_canvas_resnet20"),
    ],
)
def test_no_file(node, weights, message):
    with pytest.raises(UserError) as error:
        trained_network(SMALL, 5, node, weights, KEY)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_do_not_fit(saved, node, tmp_path):
    file, saved_network = saved(classes=6)
    with pytest.raises(UserError, match=rf"{KEY} holds a {SMALL} of 6 classes; this run has 5"):
        trained_network(SMALL, 5, node, str(file), KEY)
    with pytest.raises(UserError, match="fasterrcnn_resnet8_fpn of 90 classes; this run has 5"):
        trained_network(SMALL, 5, node, str(saved(classes=90)[0]), KEY)
    file, _ = saved("fasterrcnn_resnet20_fpn")
    with pytest.raises(UserError, match=rf"{KEY} holds another network than {SMALL}: .* are unknown to it"):
        trained_network(SMALL, 5, node, str(file), KEY)
    state = saved_network.state_dict()
    for number, scores in enumerate((torch.zeros(9), torch.zeros(0, 128), torch.zeros(1, 128))):
        file = tmp_path / f"{number}.pth"
        torch.save(state | {"roi_heads.box_predictor.cls_score.weight": scores}, file)
        with pytest.raises(UserError, match=f"{KEY} holds another network"):
            trained_network(SMALL, 5, node, str(file), KEY)
    for content in ({}, [1], {"epoch": 3}, {"model": {"a": 1}}):
        torch.save(content, file)
        with pytest.raises(UserError, match=f"{KEY} must hold a network's state dictionary"):
            trained_network(SMALL, 5, node, str(file), KEY)


# DETECTION.STUDENT_BACKBONE


@pytest.mark.parametrize(
    ("name", "classifier", "prefix", "fixed", "trained"),
    [
        (
            "fasterrcnn_resnet18_fpn",
            models.resnet18,
            "",
            {"conv1", "layer1"},
            {"layer2", "layer3", "layer4"},
        ),
        (
            "fasterrcnn_mobilenet_v3_large_320_fpn",
            models.mobilenet_v3_large,
            "features.",
            {"0", "1", "2", "3", "4", "5", "6"},
            {str(i) for i in range(7, 17)},
        ),
    ],
)
def test_a_student_that_starts_from_imagenet_weights(name, classifier, prefix, fixed, trained, node, tmp_path):
    torch.manual_seed(0)
    state = classifier(weights=None).state_dict()
    torch.save(state, tmp_path / "backbone.pth")
    student = network(name, 5, node, str(tmp_path / "backbone.pth"))
    body = student.backbone.body
    assert all(torch.equal(tensor, state[prefix + n]) for n, tensor in body.state_dict().items())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in student.modules())
    by_stage = {}
    for n, p in body.named_parameters():
        by_stage.setdefault(n.split(".")[0], set()).add(p.requires_grad)
    assert {stage for stage, flags in by_stage.items() if flags == {False}} == fixed
    assert {stage for stage, flags in by_stage.items() if flags == {True}} == trained
    rest = [p for n, p in student.named_parameters() if not n.startswith("backbone.body.")]
    assert all(p.requires_grad for p in rest)


def test_a_small_student_starts_from_a_classifier_of_ours(node, tmp_path):
    classifier = cifar_model_dict["resnet8"][0](num_classes=100)
    torch.save({"model": classifier.state_dict()}, tmp_path / "student_best")
    student = network(SMALL, 5, node, str(tmp_path / "student_best"))
    body, state = student.backbone.body.state_dict(), classifier.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in body.items())
    assert "fc.weight" not in body


def test_a_backbone_that_does_not_fit(node, tmp_path):
    option = "DETECTION.STUDENT_BACKBONE"
    with pytest.raises(UserError, match=f"no such file; {option} must name a checkpoint"):
        network(SMALL, 5, node, str(tmp_path / "none.pth"))
    file = tmp_path / "other.pth"
    for content in (cifar_model_dict["resnet20"][0](num_classes=10).state_dict(), {"a": 1}):
        torch.save(content, file)
        with pytest.raises(UserError, match=f"{option} must hold ImageNet weights of the backbone") as error:
            network("fasterrcnn_resnet18_fpn", 5, node, str(file))
        assert str(error.value).startswith(f"{file}: ")
