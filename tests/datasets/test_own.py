"""A user's own images in class folders: every kind of file, of folder and of key."""

import io
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from made import config, make, refused, write
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.functional import pil_to_tensor

from deepkd_plugin.data import get_dataset, get_test_set, num_classes, own, source
from deepkd_plugin.data.folders import ImageTensors, as_seen
from deepkd_plugin.hosts.host import settle_input

# what an image is


def arrow():
    """A picture that no turn and no mirror leaves as it is."""
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:24, :32] = 250, 20, 20
    pixels[24:, :16] = 20, 20, 250
    return Image.fromarray(pixels)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("held", range(1, 9))
def test_an_image_is_turned_as_its_camera_noted(tmp_path, form, held):
    """Written as a camera that is held so has it, and noted in EXIF, it is read upright."""
    upright = arrow()
    turned = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }[held]
    exif = Image.Exif()
    exif[0x0112] = held
    path = tmp_path / f"a.{form.lower()}"
    lossless = {"lossless": True} if form == "WEBP" else {"quality": 100, "subsampling": 0} if form == "JPEG" else {}
    turned.save(path, form, exif=exif, **lossless)
    read = ImageTensors([str(path)], [0], None)
    read.convert = as_seen
    assert read.image(0).shape == (3, 48, 64)
    assert (read.image(0).int() - pil_to_tensor(upright).int()).abs().max() <= (8 if form == "JPEG" else 0)
    if form != "TIFF":  # which PIL turns itself
        plain = ImageTensors([str(path)], [0], None).image(0)  # ImageNet's readers leave it as it is
        assert plain.shape[1:] == turned.size[::-1]


def grey16():
    return Image.fromarray(np.full((5, 7), 40_000, np.uint16))


KINDS = {
    "grey.jpg": (Image.new("L", (7, 5), 120), {}, 120),
    "grey.png": (Image.new("L", (7, 5), 120), {}, 120),
    "bits.png": (Image.new("1", (7, 5), 1), {}, 255),
    "grey16.png": (grey16(), {}, 156),
    "grey16.tif": (grey16(), {}, 156),
    "palette.png": (Image.new("RGB", (7, 5), (90, 90, 90)).quantize(4), {}, 90),
    "palette.gif": (Image.new("RGB", (7, 5), (90, 90, 90)).quantize(4), {}, 90),
    "cmyk.jpg": (Image.new("CMYK", (7, 5), (0, 0, 0, 155)), {"quality": 100}, 100),
    "cmyk.tif": (Image.new("CMYK", (7, 5), (0, 0, 0, 155)), {}, 100),
    "solid.png": (Image.new("RGBA", (7, 5), (70, 70, 70, 255)), {}, 70),
    "clear.png": (Image.new("RGBA", (7, 5), (70, 70, 70, 0)), {}, 255),
    "half.webp": (Image.new("RGBA", (7, 5), (0, 0, 0, 128)), {"lossless": True}, 127),
    "clear grey.png": (Image.new("LA", (7, 5), (70, 0)), {}, 255),
    "clear palette.png": (Image.new("P", (7, 5), 0), {"transparency": 0}, 255),
    "clear colour.png": (Image.new("RGB", (7, 5), (9, 9, 9)), {"transparency": (9, 9, 9)}, 255),
    "bitmap.BMP": (Image.new("RGB", (7, 5), (70, 70, 70)), {}, 70),
}


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_of_file_is_what_people_see(tmp_path, name):
    image, options, expected = KINDS[name]
    image.save(tmp_path / name, **options)
    read = ImageTensors([str(tmp_path / name)], [0], None)
    read.convert = as_seen
    assert read.image(0).shape == (3, 5, 7)
    assert (read.image(0).int() - expected).abs().max() <= 1


def test_broken_exif_leaves_an_image_as_it_is(tmp_path):
    arrow().save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff\x12", quality=95)
    read = ImageTensors([str(tmp_path / "a.jpg")], [0], None)
    read.convert = as_seen
    assert read.image(0).shape == (3, 48, 64)


@pytest.mark.parametrize("size", [(100_000, 1), (1, 100_000), (300, 1), (1, 1), (2, 9000)])
@pytest.mark.parametrize("rule", [{}, {"INPUT__TEST_CROP": 0.0, "INPUT__CROP_AREA": []}])
def test_lines_of_pixels_take_no_memory(tmp_path, size, rule, monkeypatch):
    """Of a resized shorter side the longer one would have 25 million pixels."""
    largest, resize = [], v2.Resize.transform

    def noted(self, image, params):
        made = resize(self, image, params)
        largest.append(made.shape[1] * made.shape[2])
        return made

    monkeypatch.setattr(v2.Resize, "transform", noted)
    make(tmp_path, count=2)
    for part in ("train", "val"):
        write(tmp_path / part / "cat" / "line.png", size)
    cfg = config(tmp_path, **rule)
    train, test = get_dataset(cfg)[:2]
    assert [batch[0].shape[1:] for batch in (*train, *test)] == [(3, 32, 32)] * 2
    assert largest
    assert max(largest) <= own.LONGEST * 40 * 40


def test_the_middle_of_a_long_image_is_what_it_was():
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 10, 1500), np.uint8))
    cut = v2.Compose([own.ShortSide(37), v2.CenterCrop(32)])(image)
    whole = v2.Compose([v2.Resize(37), v2.CenterCrop(32)])(image)
    assert (cut.int() - whole.int()).abs().max() <= 1
    short = image[..., :100]
    assert torch.equal(own.ShortSide(37)(short), v2.Resize(37)(short))


def test_a_picture_that_would_fill_the_memory_is_refused_with_its_path(tmp_path):
    make(tmp_path)
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, "PNG")
    data = bytearray(file.getvalue())
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    path = tmp_path / "train" / "cat" / "0.png"
    path.write_bytes(data)
    refused(lambda: list(get_dataset(config(tmp_path))[0]), str(path), "cannot be read", "decompression bomb")


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_image_that_cannot_be_read_is_named(tmp_path, workers):
    make(tmp_path)
    path = tmp_path / "train" / "dog" / "1.png"
    path.write_bytes(path.read_bytes()[:60])
    cfg = config(tmp_path, DATASET__NUM_WORKERS=workers)
    refused(lambda: list(get_dataset(cfg)[0]), f"{path}: DATASET.ROOT has an image that cannot be read (")


# folders


def test_numbers_are_sorted_as_numbers_and_text_as_text(tmp_path):
    make(tmp_path / "a", ("10", "9", "100"))
    make(tmp_path / "b", ("10", "9", "b"))
    assert source(config(tmp_path / "a")).class_names("") == ["9", "10", "100"]
    assert source(config(tmp_path / "b")).class_names("") == ["10", "9", "b"]
    train, _, count, classes = get_dataset(config(tmp_path / "a"))
    assert (count, classes) == (9, 3)
    assert [Path(path).parent.name for path in train.dataset.images.paths] == ["9"] * 3 + ["10"] * 3 + ["100"] * 3


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test"])
def test_the_part_that_is_tested_on(tmp_path, name):
    make(tmp_path, parts=("train", name))
    assert len(get_test_set(config(tmp_path))[0].dataset) == 6


def test_of_two_parts_to_test_on_one_is_named(tmp_path, capsys):
    make(tmp_path, parts=("train", "test", "val"))
    write(tmp_path / "test" / "cat" / "more.png")
    assert len(get_test_set(config(tmp_path))[0].dataset) == 6
    assert (
        f"{tmp_path / 'val'}: is tested on, and test not; DATASET.TEST.SPLIT can name another"
        in capsys.readouterr().err
    )
    assert len(get_test_set(config(tmp_path, DATASET__TEST__SPLIT="test"))[0].dataset) == 7
    assert not capsys.readouterr().err
    refused(lambda: source(config(tmp_path, DATASET__TEST__SPLIT="other")), f"{tmp_path / 'other'}: DATASET.TEST.SPLIT")


def test_one_folder_is_divided(tmp_path):
    """The last share of each class is tested on, the same in every run, whatever its seed."""
    make(tmp_path, parts=("",), count=5)
    refused(
        lambda: source(config(tmp_path)), f"{tmp_path}: DATASET.ROOT has class folders alone", "DATASET.HOLDOUT must"
    )
    for seed in (0, 7):
        cfg = config(tmp_path, DATASET__HOLDOUT=0.2, SOLVER__SEED=seed)
        _, test, count, classes = get_dataset(cfg)
        assert (count, len(test.dataset), classes) == (8, 2, 2)
        files = [test.dataset.dataset.paths[i] for i in test.dataset.indices]
        assert [Path(file).name for file in files] == ["4.png", "4.png"]
        assert source(cfg).images(cfg) == (8, 2)
    # the folder that tables of logits are in by default is no class
    (tmp_path / "teacher_logits").mkdir()
    assert num_classes(cfg) == 2
    assert get_dataset(cfg)[3] == 2


def test_train_alone_is_divided_too(tmp_path):
    make(tmp_path, parts=("train",), count=5)
    refused(lambda: get_dataset(config(tmp_path)), "has train/, and none of val, valid", "DATASET.HOLDOUT must")
    assert get_dataset(config(tmp_path, DATASET__HOLDOUT=0.4))[2] == 6


def test_a_class_of_one_image(tmp_path, capsys):
    make(tmp_path, parts=("",), count=5)
    write(tmp_path / "rare" / "a.jpg")
    cfg = config(tmp_path, DATASET__HOLDOUT=0.2)
    assert get_dataset(cfg)[2:] == (9, 3)
    assert "leaves no image of the class 'rare' to test on, and 0 other classes have none" in capsys.readouterr().err
    refused(
        lambda: get_dataset(config(tmp_path, DATASET__HOLDOUT=0.7)), "leaves no image of the class 'rare' to train on"
    )


def test_images_without_classes_are_no_part_to_test_on(tmp_path, capsys):
    """As competitions have them: classes in train, images of nobody knows what in test."""
    make(tmp_path, parts=("train",), count=5)
    write(tmp_path / "test" / "1.png")
    refused(lambda: get_dataset(config(tmp_path)), "has train/, and none of val")
    assert get_dataset(config(tmp_path, DATASET__HOLDOUT=0.2))[2] == 8
    make(tmp_path, parts=("val",))
    assert len(get_dataset(config(tmp_path))[1].dataset) == 6
    assert not capsys.readouterr().err


def test_what_is_hidden_or_no_image_is_left_out(tmp_path):
    make(tmp_path)
    for place in ("train/.cache", "train/cat/.thumbnails", ".git"):
        write(tmp_path / place / "a.png")
    write(tmp_path / "train" / "cat" / "._0.png")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("")
    (tmp_path / "train" / "README.md").write_text("")
    assert get_dataset(config(tmp_path))[2:] == (6, 2)


@pytest.mark.parametrize("name", ["a.JPG", "b.Jpeg", "c.PNG", "d.WebP", "e.TIFF", "f.jpe", "g.bmp", "below/h.png"])
def test_every_suffix_and_case(tmp_path, name):
    make(tmp_path)
    write(tmp_path / "train" / "cat" / name)
    assert get_dataset(config(tmp_path))[2] == 7


def test_images_that_are_left_out_are_told(tmp_path, capsys):
    make(tmp_path)
    write(tmp_path / "train" / "overview.jpg")
    (tmp_path / "train" / "cat" / "phone.HEIC").write_bytes(b"")
    assert get_dataset(config(tmp_path))[2] == 6
    told = capsys.readouterr().err
    assert f"{tmp_path / 'train' / 'overview.jpg'}: is in no class's folder and is left out" in told
    assert f"{tmp_path / 'train' / 'cat' / 'phone.HEIC'}: is of a kind that is not read, and is left out" in told


def test_classes_of_one_part_alone_are_named(tmp_path):
    make(tmp_path)
    write(tmp_path / "val" / "emu" / "a.png")
    for part in ("train", "test"):
        refused(lambda part=part: source(config(tmp_path)).load(config(tmp_path).DATASET, part), "'emu' is only in")


def test_folders_that_cannot_be_meant(tmp_path):
    def told(root, *words, **keys):
        refused(lambda: get_dataset(config(root, **keys)), *words)

    told(tmp_path / "none", f"{tmp_path / 'none'}: DATASET.ROOT must be a folder of class folders")
    (tmp_path / "empty").mkdir()
    told(tmp_path / "empty", "has no folders; there must be train/<class>/* and val/<class>/*, or <class>/*")
    make(tmp_path / "one", ("cat",))
    told(tmp_path / "one", "has 1 class, 'cat'; there must be 2 to 21,841")
    make(tmp_path / "stray")
    (tmp_path / "stray" / "val" / "dog" / "0.png").rename(tmp_path / "stray" / "0.png")
    for file in (tmp_path / "stray" / "val" / "dog").iterdir():
        file.unlink()
    told(tmp_path / "stray", f"{tmp_path / 'stray' / 'val' / 'dog'}: DATASET.ROOT has no image of this class")
    make(tmp_path / "flat", parts=("",))
    (tmp_path / "flat" / "masks").mkdir()
    told(tmp_path / "flat", f"{tmp_path / 'flat' / 'masks'}: DATASET.ROOT has no image of", DATASET__HOLDOUT=0.3)
    for part in ("train", "test"):
        write(tmp_path / "bare" / part / "a.png")
    told(
        tmp_path / "bare",
        f"{tmp_path / 'bare' / 'test'}: DATASET.ROOT has no class folders there",
        DATASET__HOLDOUT=0.3,
    )
    make(tmp_path / "steam", ("diesel", "steam"), parts=("train",))
    write(tmp_path / "steam" / "bus" / "a.png")
    told(tmp_path / "steam", "has train/ with folders in it, and bus/", DATASET__HOLDOUT=0.3)


def test_many_classes(tmp_path, monkeypatch):
    assert own.MOST == 21_841  # of ImageNet-21k
    monkeypatch.setattr(own, "MOST", 40)
    for number in range(40):
        (tmp_path / "train" / str(number)).mkdir(parents=True)
    assert num_classes(config(tmp_path)) == 40
    (tmp_path / "train" / "40").mkdir()
    refused(lambda: num_classes(config(tmp_path)), "has 41 classes; there must be 2 to 40")


# what an image becomes


def test_keys_of_the_input(tmp_path):
    make(tmp_path)
    of = source(config(tmp_path, INPUT__SIZE=0))
    assert (of.side, of.mean, of.std) == (224, own.MEAN, own.STD)
    assert [part.size for part in of.resizing] == [[256], (224, 224)]
    assert of.zoo == "imagenet"
    mine = {"INPUT__MEAN": [0.1, 0.2, 0.3], "INPUT__STD": [0.5, 0.5, 0.5]}
    of = source(config(tmp_path, INPUT__SIZE=64, INPUT__CROP_AREA=[0.5, 1.0], INPUT__FLIP=0.0, **mine))
    assert (of.side, of.mean, of.std, of.zoo) == (64, (0.1, 0.2, 0.3), (0.5, 0.5, 0.5), "tiny_imagenet")
    (crop,) = of.augmentation
    assert crop.scale == (0.5, 1.0)


def test_batches_are_what_the_keys_say(tmp_path):
    """A grey image is one number, whatever is cut of it."""
    for part in ("train", "val"):
        for name in "ab":
            write(tmp_path / part / name / "a.png", (50, 41), (51, 102, 204))
    cfg = config(tmp_path, INPUT__MEAN=[0.1, 0.2, 0.3], INPUT__STD=[0.5, 0.25, 1.0])
    train, test = get_dataset(cfg)[:2]
    for image, *_ in (*train, *test):
        expected = torch.tensor([0.2, 0.8, 0.5])[None, :, None, None].expand(2, 3, 32, 32)
        torch.testing.assert_close(image, expected)


def test_an_image_of_an_epoch_is_a_function_of_seed_and_epoch(tmp_path):
    make(tmp_path)
    rng = np.random.default_rng(0)
    for path in tmp_path.rglob("*.png"):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(path)

    def views(method, seed=0, size=2):
        cfg = config(tmp_path, DISTILLER__TYPE=method, SOLVER__SEED=seed, SOLVER__BATCH_SIZE=size)
        train = get_dataset(cfg)[0]
        sampler = train.sampler
        found = {}
        for epoch in (1, 2):
            sampler.set_epoch(epoch)
            for image, _, index in train:
                for view, images in enumerate(image if isinstance(image, list) else [image]):
                    found |= {(epoch, view, int(i)): one for i, one in zip(index, images)}
        return found

    for method in ("KD", "MLKD"):
        torch.manual_seed(1)
        first = views(method)
        torch.manual_seed(2)
        again = views(method, size=3)
        assert first.keys() == again.keys()
        assert all(torch.equal(first[key], again[key]) for key in first)
        other = views(method, seed=1)
        assert not any(torch.equal(first[key], other[key]) for key in first)
        assert not any(torch.equal(first[1, view, i], first[2, view, i]) for _, view, i in first)


def test_the_teachers_normalisation_is_the_default(tmp_path):
    pytest.importorskip("timm")
    make(tmp_path)
    half = [0.5, 0.5, 0.5]

    def settled(**keys):
        cfg = config(tmp_path, **keys)
        settle_input(cfg, {})
        return cfg.INPUT.MEAN, cfg.INPUT.STD

    assert settled() == (list(own.MEAN), list(own.STD))
    vit = "timm:vit_tiny_patch16_224"
    assert settled(DISTILLER__STUDENT=vit) == (half, half)
    taught = {"DISTILLER__TYPE": "KD", "DISTILLER__TEACHER": "torchvision:resnet18"}
    assert settled(DISTILLER__STUDENT=vit, **taught) == (list(own.MEAN), list(own.STD))
    assert settled(**taught | {"DISTILLER__TEACHER": vit}) == (half, half)
    assert settled(INPUT__MEAN=[0.1, 0.1, 0.1], **taught | {"DISTILLER__TEACHER": vit}) == ([0.1, 0.1, 0.1], half)


@pytest.mark.parametrize(
    ("path", "value"),
    [("INPUT__SIZE", 64), ("INPUT__FLIP", 0.0), ("DATASET__TEST__SPLIT", "test"), ("DATASET__COLUMNS", ["a", "b"])],
)
def test_keys_of_own_images_are_refused_with_other_sets(tmp_path, path, value):
    cfg = config(tmp_path, DATASET__TYPE="cifar100", INPUT__SIZE=0)
    settle_input(cfg, {})
    cfg = config(tmp_path, DATASET__TYPE="cifar100", **{"INPUT__SIZE": 0} | {path: value})
    refused(lambda: settle_input(cfg, {}), path.replace("__", "."), "with DATASET.TYPE cifar100")


def test_an_unknown_type_lists_what_there_is(tmp_path):
    words = "'folders'; it must be one of cifar100", "folder", "huggingface", "package.module:function"
    refused(lambda: source(config(tmp_path, DATASET__TYPE="folders")), *words)
