import inspect
import math

import pytest
import yaml
from torchvision.models.detection import FasterRCNN

from deepkd_plugin.config.tree import get
from deepkd_plugin.detection.keys import DETECTION_KEYS
from deepkd_plugin.detection.launch import read_config
from deepkd_plugin.errors import UserError

BAD = {
    "MIN_SIZE": ["[]", "[0]", "[48, -1]", "['a']", "[48.0]", "48", "[49]"],
    "MAX_SIZE": ["0", "-1", "47", "48.5"],
    "FLIP": ["-0.1", "1.1", "nan", "often"],
    "PROPOSALS": ["0", "-8", "2.5"],
    "FOREGROUND": ["0.0", "1.5", "-0.5"],
    "RANKED_TRAIN": ["0", "none"],
    "RANKED_TEST": ["0"],
    "KEPT_TRAIN": ["0"],
    "KEPT_TEST": ["-3"],
    "WARMUP_ITERATIONS": ["-1", "0.5"],
    "CLIP_NORM": ["-1.0", "inf", "nan"],
    "STUDENT_BACKBONE": ["7"],
}


def test_every_key_has_a_bad_value_here():
    assert {f"DETECTION.{name}" for name in BAD} == {key.path for key in DETECTION_KEYS}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BAD.items() for v in values])
def test_a_bad_value_is_one_line_with_its_source_and_key(config_file, name, value):
    path = "DETECTION.MAX_SIZE" if (name, value) == ("MIN_SIZE", "[49]") else f"DETECTION.{name}"
    given = float(value) if value in ("nan", "inf") else yaml.safe_load(value)
    if not (value in ("nan", "inf") or name == "STUDENT_BACKBONE"):  # on the command line these are words
        with pytest.raises(UserError, match="must") as error:
            read_config(str(config_file), (f"DETECTION.{name}", value))
        source = "command line" if path == f"DETECTION.{name}" else config_file
        assert str(error.value).startswith(f"{source}: {path} is ")
        assert "\n" not in str(error.value)
    tree = yaml.safe_load(config_file.read_text())
    tree["DETECTION"][name] = given
    config_file.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match="must") as error:
        read_config(str(config_file), ())
    assert str(error.value).startswith(f"{config_file}: {path} is ")
    assert "\n" not in str(error.value)


def test_defaults_are_torchvisions(tmp_path):
    empty = tmp_path / "defaults.yaml"
    empty.write_text(
        yaml.safe_dump(
            {
                "DATASET": {"TYPE": "coco"},
                "DISTILLER": {"TYPE": "NONE", "STUDENT": "fasterrcnn_resnet18_fpn"},
            }
        )
    )
    node = read_config(str(empty), ())[0].DETECTION
    theirs = {n: p.default for n, p in inspect.signature(FasterRCNN.__init__).parameters.items()}
    assert [theirs["min_size"]] == node.MIN_SIZE
    assert theirs["max_size"] == node.MAX_SIZE
    assert theirs["box_batch_size_per_image"] == node.PROPOSALS
    assert theirs["box_positive_fraction"] == node.FOREGROUND
    for split in ("TRAIN", "TEST"):
        assert theirs[f"rpn_pre_nms_top_n_{split.lower()}"] == node[f"RANKED_{split}"]
        assert theirs[f"rpn_post_nms_top_n_{split.lower()}"] == node[f"KEPT_{split}"]
    assert node.STUDENT_BACKBONE == ""
    assert math.isclose(node.FLIP, 0.5)


def test_every_key_says_what_it_is(detection_config):
    cfg = detection_config()
    for key in DETECTION_KEYS:
        assert key.meaning
        assert key.valid(key.default), key.path
        assert type(get(cfg, key.path)) is type(key.default)
