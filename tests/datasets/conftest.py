"""Configs and small image folders for the tests of data sets."""

import numpy as np
import pytest
from PIL import Image
from yacs.config import CfgNode


@pytest.fixture(scope="session")
def data_cfg():
    """The part of a config that data sets read: data_cfg("cifar100", root, method="MLKD", HOLDOUT=0.1)."""

    def make(kind, root, method="KD", base="KD", **node):
        dataset = {
            "TYPE": kind,
            "ROOT": str(root),
            "DOWNLOAD": False,
            "NUM_WORKERS": 0,
            "PIPELINE": "workers",
            "TRAIN_PER_CLASS": 0,
            "HOLDOUT": 0.0,
            "TEST": {"BATCH_SIZE": 50},
        }
        return CfgNode(
            {
                "DATASET": dataset | node,
                "SOLVER": {"BATCH_SIZE": 32, "SEED": 0},
                "DISTILLER": {"TYPE": method, "TEACHER_LOGITS": "compute"},
                "DeepKD": {"BASE": base},
                "AUGMENT": {"MIXUP": 0.0, "CUTMIX": 0.0, "RANDAUGMENT": "", "ERASING": 0.0},
            }
        )

    return make


@pytest.fixture(scope="session")
def imagenet_folders():
    """Write imagenet/{train,val} with one image in each of so many classes; returns the root."""

    def write(root, classes):
        for split in ("train", "val"):
            for label in range(classes):
                folder = root / "imagenet" / split / f"n{label:08d}"
                folder.mkdir(parents=True)
                Image.new("RGB", (40, 30), (label % 256, label // 256, 0)).save(folder / "a.jpeg")
        return root

    return write


@pytest.fixture(scope="session")
def tiny_folders():
    """Write tiny-imagenet-200 with `count` training images and 1 validation image of each class.

    Class i's images are of brightness i. layout: "official" as the archive has it, "folders" as mdistiller
    expects it. The wnids are made in another order than the alphabetical one.
    """

    def write(root, layout="official", count=2, classes=200):
        top = root / "tiny-imagenet-200"
        lines = []
        for label in np.random.default_rng(0).permutation(classes):
            wnid, image = f"n{label:08d}", Image.new("RGB", (64, 64), (int(label),) * 3)
            train = top / "train" / wnid / ("images" if layout == "official" else "")
            train.mkdir(parents=True)
            for number in range(count):
                image.save(train / f"{wnid}_{number}.JPEG", quality=95)
            val = top / "val" / ("images" if layout == "official" else wnid)
            val.mkdir(parents=True, exist_ok=True)
            name = f"val_{len(lines)}.JPEG"
            image.convert("L").save(val / name, quality=95)  # some images of the real set are grey
            lines.append(f"{name}\t{wnid}\t0\t0\t62\t62\n")
        if layout == "official":
            (top / "val" / "val_annotations.txt").write_text("".join(lines))
        return root

    return write


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory, tiny_folders):
    """Tiny ImageNet as the official archive has it, 4 training images of each class."""
    return tiny_folders(tmp_path_factory.mktemp("tiny"), count=4)
