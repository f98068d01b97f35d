import numpy as np
import pytest
import torch

from deepkd_plugin.detection.data import DETECTION_SETS, canvas, get_detection_sets
from deepkd_plugin.detection.data.samples import Boxes, mirror
from deepkd_plugin.errors import UserError


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(canvas, "COUNTS", {"train": 20, "test": 7})
    monkeypatch.setattr(canvas, "EMPTY", 0.3)
    return tmp_path


def targets(loader):
    return [target for _, batch in loader for target in batch]


def test_glyph_canvas_as_batches(root, detection_cfg):
    train, test, count, names = get_detection_sets(detection_cfg("glyph_canvas", root))
    assert (count, names) == (20, tuple(canvas.CLASSES))
    pixels, boxes, labels = canvas.load_glyph_canvas(root, "train")
    seen = {}
    for images, batch in train:
        assert (type(images), type(batch), len(images), len(batch)) == (list, list, 4, 4)
        for image, target in zip(images, batch):
            assert set(target) == {"boxes", "labels", "image_id"}
            seen[int(target["image_id"])] = image, target
    assert sorted(seen) == list(range(20))
    assert list(seen) != list(range(20))  # shuffled
    for place, (image, target) in seen.items():
        assert (image.shape, image.dtype) == ((3, 96, 96), torch.float32)
        assert torch.equal((image * 255).round().to(torch.uint8), torch.from_numpy(pixels[place]).permute(2, 0, 1))
        assert np.array_equal(target["boxes"].numpy(), boxes[place])
        assert np.array_equal(target["labels"].numpy(), labels[place])
    assert any(len(target["boxes"]) == 0 for _, target in seen.values())  # empty canvases are trained on
    tested = targets(test)
    assert [int(target["image_id"]) for target in tested] == list(range(7))
    assert [len(batch) for _, batch in test] == [3, 3, 1]
    assert all(target["iscrowd"].tolist() == [0] * len(target["labels"]) for target in tested)


def test_a_sample_may_be_changed_without_changing_the_set(root, detection_cfg):
    samples = get_detection_sets(detection_cfg("glyph_canvas", root))[0].dataset
    place = next(place for place in range(20) if len(samples[place][1]["boxes"]))
    before = samples[place][1]["boxes"].clone()
    image, target = samples[place]
    image.zero_()
    target["boxes"].zero_()
    assert torch.equal(samples[place][1]["boxes"], before)
    assert samples[place][0].sum() > 0


def test_holdout_is_kept_from_training_and_tested_on(root, detection_cfg):
    cfg = detection_cfg("glyph_canvas", root, HOLDOUT=0.2)
    train, test, count, _ = get_detection_sets(cfg)
    assert count == 16
    assert sorted(int(target["image_id"]) for target in targets(train)) == list(range(16))
    held = targets(test)
    assert [int(target["image_id"]) for target in held] == [16, 17, 18, 19]
    boxes = canvas.load_glyph_canvas(root, "train")[1]
    assert np.array_equal(held[1]["boxes"].numpy(), boxes[17])


@pytest.mark.parametrize("holdout", [0.01, 0.99])
def test_a_holdout_that_leaves_nothing_is_one_line(root, detection_cfg, holdout):
    with pytest.raises(
        UserError, match=r"DATASET\.HOLDOUT is 0\.\d+, which leaves \d+ images to train on and \d+ held"
    ):
        get_detection_sets(detection_cfg("glyph_canvas", root, HOLDOUT=holdout))


@pytest.mark.parametrize("holdout", [0.0, 0.25])
def test_nothing_to_find_on_the_test_set_is_one_line(root, detection_cfg, monkeypatch, holdout):
    load = canvas.load_glyph_canvas

    def without_boxes(root, split):
        pixels, boxes, labels = load(root, split)
        first = 15 if split == "train" else 0
        boxes, labels = ([one[: 0 if i >= first else None] for i, one in enumerate(held)] for held in (boxes, labels))
        return pixels, boxes, labels

    monkeypatch.setattr(canvas, "load_glyph_canvas", without_boxes)
    with pytest.raises(UserError, match=r"none of the \d images of glyph_canvas to test on has a box"):
        get_detection_sets(detection_cfg("glyph_canvas", root, HOLDOUT=holdout))


def test_an_unknown_set_is_one_line(root, detection_cfg):
    with pytest.raises(UserError, match=r"DATASET\.TYPE is 'voc'; for detection .* glyph_canvas, coco"):
        get_detection_sets(detection_cfg("voc", root))


def test_mirroring_twice_gives_the_sample_back():
    image, boxes = torch.rand(3, 5, 9), torch.tensor([[1.0, 2.0, 4.5, 5.0], [0.0, 0.0, 9.0, 5.0]])
    flipped, mirrored = mirror(image, boxes)
    assert mirrored.tolist() == [[4.5, 2.0, 8.0, 5.0], [0.0, 0.0, 9.0, 5.0]]
    back, same = mirror(flipped, mirrored)
    assert torch.equal(back, image)
    assert torch.equal(same, boxes)


def test_flips_and_order_follow_seed_and_epoch_whatever_loads_them(root, detection_cfg):
    def drawn(seed, epoch, workers):
        cfg = detection_cfg("glyph_canvas", root, flip=0.5, NUM_WORKERS=workers)
        cfg.SOLVER.SEED = seed
        loader = get_detection_sets(cfg)[0]
        loader.sampler.set_epoch(epoch)
        torch.manual_seed(workers)  # must not matter
        return torch.cat([torch.stack(images) for images, _ in loader])

    first = drawn(1, 1, 0)
    assert torch.equal(first, drawn(1, 1, 2))
    assert not torch.equal(first, drawn(1, 2, 0))
    assert not torch.equal(first, drawn(2, 1, 0))


def test_no_random_number_is_drawn_without_flips(root, detection_cfg):
    train, test, _, _ = get_detection_sets(detection_cfg("glyph_canvas", root))
    before = torch.get_rng_state()
    assert len([samples[0] for samples in (train.dataset, test.dataset)]) == 2
    assert torch.equal(torch.get_rng_state(), before)


def test_about_the_asked_share_is_mirrored(root, detection_cfg):
    plain = get_detection_sets(detection_cfg("glyph_canvas", root))[0].dataset
    half = get_detection_sets(detection_cfg("glyph_canvas", root, flip=0.5))[0].dataset
    turned = sum(not torch.equal(plain[i % 20][0], half[i // 20, i % 20][0]) for i in range(100))
    assert 35 <= turned <= 65


def test_boxes_to_train_on_keep_their_images():
    held = Boxes(
        np.array([[-3, 0, 5, 5], [2, 2, 2, 9], [0, 0, 4, 4], [8, 8, 30, 30], [20, 1, 25, 4]], np.float32),
        np.array([1, 2, 3, 4, 5]),
        np.array([False, False, True, False, False]),
        np.array([0, 2, 2, 3, 5]),
    )
    kept = held.to_train_on(np.array([(10, 10), (10, 10), (10, 10), (20, 12)]))
    assert kept.boxes.tolist() == [[0, 0, 5, 5], [8, 8, 20, 12]]  # the last one is right of its image
    assert kept.labels.tolist() == [1, 4]
    assert kept.offsets.tolist() == [0, 1, 1, 1, 2]
    assert kept.counts().tolist() == [1, 0, 0, 1]


def test_noise_has_the_form_of_the_loader_s_batches(root, detection_cfg):
    batch = next(iter(get_detection_sets(detection_cfg("glyph_canvas", root))[0]))
    noise = DETECTION_SETS["glyph_canvas"].noise(4)
    for images, targets in (batch, noise):
        assert [(image.shape, image.dtype) for image in images] == [((3, 96, 96), torch.float32)] * 4
        assert len(targets) == 4
        for target in targets:
            assert {"boxes", "labels"} <= target.keys()
            assert target["boxes"].shape == (len(target["labels"]), 4)
            assert (target["boxes"].dtype, target["labels"].dtype) == (torch.float32, torch.int64)
    assert DETECTION_SETS["coco"].noise(1)[0][0].shape == (3, 480, 640)


def test_sets_say_what_is_particular_to_them():
    """A mirrored glyph is another, canvases are drawn, and students of COCO start from ImageNet weights."""
    canvases, coco = DETECTION_SETS["glyph_canvas"], DETECTION_SETS["coco"]
    assert (canvases.no_mirror, canvases.drawn, canvases.pretrained) == ("a mirrored b is a d", True, False)
    assert (coco.no_mirror, coco.drawn, coco.pretrained) == ("", False, True)
