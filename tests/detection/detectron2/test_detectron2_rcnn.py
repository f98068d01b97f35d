"""RCNNDeepKD against mdistiller's own RCNNKD, and what it does where there is nothing to learn from."""

import pytest
import torch

from deepkd_plugin.errors import UserError


@pytest.fixture
def build(host, small):
    """A seeded model and two images of 64 x 64 pixels, one with two objects, one with none."""
    from detectron2.engine import DefaultTrainer
    from detectron2.structures import Boxes, Instances

    from deepkd_plugin.detection.detectron2 import rcnn  # noqa: F401

    def image(boxes, labels):
        truth = Instances((64, 64))
        truth.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
        truth.gt_classes = torch.tensor(labels, dtype=torch.int64)
        pixels = torch.randint(0, 256, (3, 64, 64), generator=torch.Generator().manual_seed(len(labels)))
        return {"image": pixels.to(torch.uint8), "instances": truth, "height": 64, "width": 64}

    def make(name, *pairs):
        torch.manual_seed(0)
        model = DefaultTrainer.build_model(small(name, *pairs))
        with torch.no_grad():  # class logits of a few units, whatever a random teacher without norms makes of an image
            model.roi_heads.box_predictor.cls_score.weight.mul_(50.0)
            model.teacher.roi_heads.box_predictor.cls_score.weight.mul_(0.1)
        return model.train()

    make.images = [image([[4, 4, 40, 40], [20, 10, 60, 50]], [0, 2]), image([], [])]
    return make


def step(model, images, iteration=0, seed=1):
    from detectron2.utils.events import EventStorage

    torch.manual_seed(seed)
    with EventStorage(iteration):
        return model(images)


def gradients(model, losses):
    model.zero_grad()
    sum(losses.values()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_finite(model, losses):
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert all(torch.isfinite(g).all() for g in gradients(model, losses).values())


@pytest.mark.parametrize("weights", [(), ("KD.DKD.ALPHA", "0.5", "KD.DKD.BETA", "2", "KD.DKD.T", "3")])
def test_dkd_is_mdistiller_s_own_and_deepkd_its_parts(build, weights):
    own = build("DKD-R18-R101", "MODEL.META_ARCHITECTURE", "RCNNKD", *weights)
    ours = build("DKD-R18-R101", *weights)
    expected = step(own, build.images)
    losses = step(ours, build.images)
    assert {name: loss.item() for name, loss in losses.items()} == {
        name: loss.item() for name, loss in expected.items()
    }
    assert expected["loss_dkd"] > 0.01
    # the same taken apart, without a mask
    alpha, beta, t = weights[1::2] or ("1", "0.25", "1")
    names = ("KD.DEEPKD.TCG_WEIGHT", "KD.DEEPKD.NCG_WEIGHT", "KD.DEEPKD.T")
    apart = build("DeepKD-R18-R101-noDTM", *(part for pair in zip(names, (alpha, beta, t)) for part in pair))
    parts = step(apart, build.images)
    assert (parts["loss_tcg"] + parts["loss_ncg"]).item() == pytest.approx(expected["loss_dkd"].item(), rel=1e-5)
    assert {name: parts[name].item() for name in parts if name in expected} == {
        name: loss.item() for name, loss in expected.items() if name != "loss_dkd"
    }
    mine, theirs = gradients(apart, parts), gradients(own, expected)
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-3, atol=1e-5)


def test_kd_is_the_sum_of_its_parts(build):
    whole = step(build("KD-R18-R101", "KD.KD.T", "2"), build.images)
    weights = ("KD.DEEPKD.BASE", "KD", "KD.DEEPKD.NCG_WEIGHT", "1", "KD.DEEPKD.T", "2")
    parts = step(build("DeepKD-R18-R101-noDTM", *weights), build.images)
    assert whole["loss_kd"] > 0.01
    assert (parts["loss_tcg"] + parts["loss_ncg"]).item() == pytest.approx(whole["loss_kd"].item(), rel=1e-5)


def test_the_task_s_weight(build):
    one, half = (step(build("DeepKD-R18-R101", "KD.DEEPKD.TASK_WEIGHT", w), build.images) for w in ("1", "0.5"))
    for name in one:
        factor = 1.0 if name in ("loss_tcg", "loss_ncg") else 0.5
        assert half[name].item() == pytest.approx(factor * one[name].item())


def test_the_mask_grows_with_the_iterations(build):
    model = build("DeepKD-R18-R101", "SOLVER.MAX_ITER", "31", "KD.DEEPKD.MASK.INITIAL", "2")
    assert [model.top_k(81, i) for i in (0, 10, 15, 20, 30, 31)] == [2, 40, 40, 40, 80, 80]
    first, last = (step(model, build.images, i)["loss_ncg"].item() for i in (0, 30))
    plain = step(build("DeepKD-R18-R101-noDTM"), build.images)["loss_ncg"].item()
    assert last == pytest.approx(plain, rel=1e-5)
    assert first > 0.0
    assert first != pytest.approx(plain, rel=1e-2)
    assert build("DeepKD-R18-R101-noDTM").top_k(81, 0) is None


def test_the_teacher_stays_as_it_is(build):
    model = build("DeepKD-R18-R101")
    assert not any(part.training for part in model.teacher.modules())
    assert model.roi_heads.training
    before = {name: tensor.clone() for name, tensor in model.teacher.state_dict().items()}
    reached = gradients(model, step(model, build.images))
    assert reached
    assert not any(name.startswith("teacher.") for name in reached)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.teacher.state_dict().items())
    model.train(False)
    assert "instances" in model(build.images[:1])[0]


def test_features_are_a_stream_of_their_own(build):
    model = build("ReviewDeepKD-R18-R101")
    losses = step(model, build.images)
    check_finite(model, losses)
    theirs = build(
        "ReviewDeepKD-R18-R101",
        *("MODEL.META_ARCHITECTURE", "RCNNKD", "KD.TYPE", "ReviewKD"),
        *(part for s in ("TOG", "TCG", "NCG", "FEAT") for part in (f"SOLVER.DECOUPLED.DELTA.{s}", "0")),
    )
    theirs.load_state_dict(model.state_dict())
    assert losses["loss_feat"].item() == pytest.approx(step(theirs, build.images)["loss_reviewkd"].item())


@pytest.mark.parametrize("name", ["KD-R18-R101", "DeepKD-R18-R101"])
def test_images_without_objects(build, name):
    model = build(name)
    check_finite(model, step(model, [build.images[1]] * 2))


@pytest.mark.parametrize("name", ["KD-R18-R101", "DeepKD-R18-R101", "DeepKD-R18-R101-noDTM"])
def test_a_batch_without_proposals(build, name, monkeypatch):
    from detectron2.structures import Boxes, Instances

    model = build(name, "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT", "False")

    def none(images, features, truths):
        empty = Instances((64, 64))
        empty.proposal_boxes, empty.objectness_logits = Boxes(torch.zeros(0, 4)), torch.zeros(0)
        return [empty, empty], {"loss_rpn_cls": 0.0 * sum(f.sum() for f in features.values())}

    monkeypatch.setattr(model.proposal_generator, "forward", none)
    losses = step(model, build.images)
    check_finite(model, losses)
    assert all(losses[name].item() == 0.0 for name in losses if name in ("loss_kd", "loss_tcg", "loss_ncg"))


def test_a_teacher_of_other_classes(host, configs, deepkd_tiny, options):
    from detectron2.modeling import build_model

    from deepkd_plugin.detection.detectron2 import config, rcnn  # noqa: F401

    cfg, _ = config.load(configs / "DeepKD-R18-R101.yaml", options("TEACHER.MODEL.ROI_HEADS.NUM_CLASSES", "4"))
    with pytest.raises(UserError, match=r"TEACHER.MODEL.ROI_HEADS.NUM_CLASSES is 4; it must be 3, the student's MODEL"):
        build_model(cfg)
