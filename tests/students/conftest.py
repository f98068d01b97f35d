"""A run that has ended, trained once, and images in files."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

from deepkd_plugin import choice, launch
from deepkd_plugin.data.glyphs import load_glyphs100
from deepkd_plugin.hosts import mdistiller

CONFIG = Path(__file__).parents[2] / "configs" / "glyphs100" / "res20_res8" / "vanilla.yaml"


@pytest.fixture(scope="session")
def trained(data_root, tmp_path_factory):
    """Train a resnet8 for two epochs on the built-in host; it is tested on images kept from training."""
    output = tmp_path_factory.mktemp("students")
    pairs = {"SOLVER.EPOCHS": 2, "DATASET.TRAIN_PER_CLASS": 4, "DATASET.HOLDOUT": 0.04, "DATASET.ROOT": data_root}
    pairs |= {"LOG.PREFIX": output, "EXPERIMENT.NAME": "run", "DATASET.NUM_WORKERS": 0}
    words = [str(part) for pair in pairs.items() for part in pair]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mdistiller, "locate", lambda: None)
        patch.setattr(choice, "medians", lambda passes, images: dict.fromkeys(passes, 1.0))
        assert launch.main(["--cfg", str(CONFIG), *words]) == 0
    return output / "glyphs100" / "run"


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run's folder."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def pictures(data_root, tmp_path):
    """Test images of glyphs100 in files, one of them below another folder, and a file that is no image."""
    images, _ = load_glyphs100(data_root, "test")
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for name, number in (("a.png", 0), ("b.bmp", 1), ("more/c.png", 2)):
        Image.fromarray(images[number]).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder
