import json
import shutil
import sys

import pytest
import torch

from deepkd_plugin.detection.data import get_detection_sets
from deepkd_plugin.detection.data.coco import load_coco
from deepkd_plugin.errors import UserError


def annotations(root, part="train2017"):
    return root / "coco" / "annotations" / f"instances_{part}.json"


def edit(root, change, part="train2017"):
    path = annotations(root, part)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_training_has_images_with_boxes_only_cut_at_the_edges(coco_root, detection_cfg, capsys):
    train, _, count, names = get_detection_sets(detection_cfg("coco", coco_root))
    assert (count, names) == (3, ("person", "sign", "brush"))
    samples = [train.dataset[i] for i in range(3)]
    assert [int(target["image_id"]) for _, target in samples] == [12, 21, 30]
    assert [set(target) for _, target in samples] == [{"boxes", "labels", "image_id"}] * 3
    image, target = samples[0]
    assert image.shape == (3, 20, 50)
    assert image[0, 5, 5].item() == pytest.approx(12 / 255)
    assert target["boxes"].tolist() == [[0, 3, 15, 20]]  # a box without area and a crowd are gone
    assert target["labels"].tolist() == [1]
    target = samples[2][1]
    assert target["boxes"].tolist() == [[1, 2, 11, 22], [5, 5, 13, 9.5]]
    assert target["labels"].tolist() == [2, 3]
    assert (target["boxes"].dtype, target["labels"].dtype) == (torch.float32, torch.int64)
    assert capsys.readouterr().out == ""


def test_tests_keep_all_images_and_boxes(coco_root, detection_cfg):
    _, loader, _, names = get_detection_sets(detection_cfg("coco", coco_root))
    targets = [target for _, batch in loader for target in batch]
    assert [int(target["image_id"]) for target in targets] == [4, 9, 12, 21, 30]
    assert len(names) == 3
    assert targets[0]["boxes"].shape == (0, 4)
    assert targets[2]["boxes"].tolist() == [[-5, 3, 15, 43], [10, 10, 10, 15], [0, 0, 9, 9]]
    assert targets[2]["iscrowd"].tolist() == [0, 0, 1]


def test_holdout_takes_the_last_training_images_whole(coco_root, detection_cfg):
    shutil.rmtree(coco_root / "coco" / "val2017")  # not asked for
    train, test, count, _ = get_detection_sets(detection_cfg("coco", coco_root, HOLDOUT=0.4))
    assert [int(train.dataset[i][1]["image_id"]) for i in range(count)] == [12]
    assert [int(test.dataset[i][1]["image_id"]) for i in range(2)] == [21, 30]
    assert "iscrowd" in test.dataset[0][1]


def test_the_flip_mirrors_image_and_boxes(coco_root, detection_cfg):
    plain = get_detection_sets(detection_cfg("coco", coco_root))[0].dataset[2]
    image, target = get_detection_sets(detection_cfg("coco", coco_root, flip=1.0))[0].dataset[2]
    assert torch.equal(image, plain[0].flip(2))
    assert image[0, 0, -1] == 1
    assert target["boxes"].tolist() == [[29, 2, 39, 22], [27, 5, 35, 9.5]]


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (
            lambda root: shutil.rmtree(root / "coco" / "train2017"),
            r"train2017: DATASET\.ROOT holds no COCO; there must be coco/train2017/",
        ),
        (
            lambda root: annotations(root).unlink(),
            r"instances_train2017\.json: DATASET\.ROOT lacks this file",
        ),
        (lambda root: annotations(root).write_text('{"images": ['), "JSON.*JSONDecodeError"),
        (lambda root: annotations(root).write_bytes(b"\xff\xfe\x00"), "JSON.*UnicodeDecodeError"),
        (lambda root: annotations(root).write_text("[]"), "must be COCO's annotations in JSON"),
        (lambda root: annotations(root).write_text("{}"), "names 0 categories and 0 images"),
        (lambda root: annotations(root).write_text('{"images": 3}'), "must be COCO's annotations in JSON"),
        (
            lambda root: edit(root, lambda content: content["images"][0].pop("file_name")),
            "an image must have .* a file_name",
        ),
        (
            lambda root: edit(root, lambda content: content["annotations"][0].update(bbox=[1, 2, 3])),
            "annotation 1 must have a bbox of 4 numbers",
        ),
        (
            lambda root: edit(root, lambda content: content["annotations"][1].update(category_id=5)),
            "annotation 2 must have .* the category_id of one of the 3 categories",
        ),
        (
            lambda root: edit(root, lambda content: content["annotations"][1].update(bbox=[0, 0, 1e999, 1])),
            "annotation 2 has a bbox that is not finite",
        ),
        (
            lambda root: edit(root, lambda content: content.update(annotations=[])),
            "no training image of coco has a box",
        ),
        (
            lambda root: edit(root, lambda content: content["categories"][0].update(name="broom")),
            "the training and the test set of coco have other classes",
        ),
    ],
)
def test_a_set_that_cannot_be_used_is_one_line(coco_root, detection_cfg, harm, message):
    harm(coco_root)
    with pytest.raises(UserError, match=message) as caught:
        get_detection_sets(detection_cfg("coco", coco_root))
    assert "\n" not in str(caught.value)


def test_an_image_is_read_when_it_is_asked_for_and_named_if_it_is_bad(coco_root, detection_cfg):
    folder = coco_root / "coco" / "train2017"
    (folder / "000000000012.png").unlink()
    (folder / "000000000021.png").write_bytes(b"no image")
    shutil.copy(folder / "000000000009.png", folder / "000000000030.png")
    images = get_detection_sets(detection_cfg("coco", coco_root))[0].dataset
    for place, message in enumerate(
        (
            r"000000000012\.png: .*cannot be read",
            r"000000000021\.png: .*cannot be read",
            r"is 24 x 24; .* 40 x 30",
        )
    ):
        with pytest.raises(UserError, match=message):
            images[place]


def test_a_loader_process_names_the_missing_image_in_one_line(coco_root, detection_cfg):
    for file in (coco_root / "coco" / "train2017").iterdir():
        file.unlink()
    train = get_detection_sets(detection_cfg("coco", coco_root, NUM_WORKERS=1))[0]
    with pytest.raises(UserError, match=r"\.png: DATASET\.ROOT has an image that cannot be read") as caught:
        next(iter(train))
    assert "\n" not in str(caught.value)


def test_without_pycocotools_it_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(UserError, match=r'pip install "deepkd_plugin\[detection\]"') as caught:
        load_coco(tmp_path, "train")
    assert "\n" not in str(caught.value)
