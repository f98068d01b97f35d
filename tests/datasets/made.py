"""Folders of images, and the config that reads them."""

import pytest
from PIL import Image

from deepkd_plugin.config.tree import add_deepkd_config
from deepkd_plugin.errors import UserError
from deepkd_plugin.hosts import builtin


def config(root, **keys):
    """The built-in host's config for folders in `root`; keys: DATASET__HOLDOUT=0.2."""
    cfg = builtin.CFG.clone()
    add_deepkd_config(cfg)
    cfg.DATASET.TYPE, cfg.DATASET.ROOT, cfg.DATASET.NUM_WORKERS = "folder", str(root), 0
    cfg.DISTILLER.TYPE, cfg.DISTILLER.STUDENT, cfg.INPUT.SIZE = "NONE", "resnet8", 32
    for path, value in keys.items():
        *parents, leaf = path.split("__")
        node = cfg
        for name in parents:
            node = node[name]
        node[leaf] = value
    return cfg


def write(path, size=(40, 30), colour=(200, 30, 30), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path, **options)


def make(root, classes=("cat", "dog"), parts=("train", "val"), count=3):
    for part in parts:
        for label, name in enumerate(classes):
            for number in range(count):
                write(root / part / name / f"{number}.png", (36 + number, 33), (80 * label, 40 * number, 90))
    return root


def refused(call, *words):
    with pytest.raises(UserError) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)
