"""Files decoded to tensors against PIL's decoding, and what is said of those that cannot be."""

import io

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from deepkd_plugin.data.folders import ImageFiles, ImageTensors
from deepkd_plugin.errors import UserError
from deepkd_plugin.terminal import warn


def photograph(height, width, mode="RGB"):
    """Smooth patches with noise, which is nearer to what JPEG is made for than noise alone."""
    rng = np.random.default_rng(height * width)
    patches = rng.integers(0, 256, (-(-height // 16), -(-width // 16), 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(patches).resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    pixels = (pixels + rng.integers(-12, 13, pixels.shape)).clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


JPEGS = {
    "usual": (photograph(375, 500), {}),
    "no subsampling": (photograph(333, 217), {"subsampling": 0}),
    "4:2:2": (photograph(333, 217), {"subsampling": 1}),
    "progressive": (photograph(333, 217), {"progressive": True, "quality": 50}),
    "restarts": (photograph(100, 100), {"restart_marker_blocks": 2}),
    "one row": (photograph(1, 37), {}),
    "one column": (photograph(37, 1), {}),
    "one pixel": (photograph(1, 1), {}),
    "grey": (photograph(101, 99, "L"), {}),
    "stored as RGB": (photograph(101, 99), {"keep_rgb": True}),
}


def jpeg(image, **options):
    file = io.BytesIO()
    image.save(file, "JPEG", **{"quality": 90} | options)
    return file.getvalue()


@pytest.fixture
def both(tmp_path):
    """Read a file's bytes as a PIL image and as a tensor."""

    def read(content, name="a.jpeg"):
        path = tmp_path / name
        path.write_bytes(content)
        of_pil, of_torch = (kind([str(path)], [0], None).image(0) for kind in (ImageFiles, ImageTensors))
        assert of_torch.dtype == torch.uint8
        return pil_to_tensor(of_pil), of_torch

    return read


@pytest.fixture
def by_pil(monkeypatch):
    """The paths that PIL's own decoding was asked for."""
    asked, read = [], ImageFiles._read

    def noted(self, path):
        asked.append(path)
        return read(self, path)

    monkeypatch.setattr(ImageFiles, "_read", noted)
    return asked


@pytest.mark.parametrize("name", JPEGS)
def test_a_jpeg_is_pils_pixels_without_pil(both, by_pil, name):
    """Bit for bit: the two have libjpeg-turbo, and the largest difference that was seen is 0."""
    image, options = JPEGS[name]
    expected, ours = both(jpeg(image, **options))
    assert torch.equal(expected, ours)
    assert len(by_pil) == 1  # the one for `expected`


def test_a_torchvision_without_the_decoder_is_told_of(both, by_pil, monkeypatch, capsys):
    warn.cache_clear()
    monkeypatch.delattr(torchvision.io, "decode_jpeg")
    expected, ours = both(WHOLE)
    assert torch.equal(expected, ours)
    assert len(by_pil) == 2
    assert capsys.readouterr().err.startswith("deepkd: warning: this torchvision has no decode_jpeg; PIL decodes")


def other_formats():
    picture = photograph(40, 30)
    for name, image, form in (
        ("png", picture, "PNG"),
        ("png of 16 bits", Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(40, 30) * 50), "PNG"),
        ("png with a palette", picture.quantize(), "PNG"),
        ("png with alpha", picture.convert("RGBA"), "PNG"),
        ("webp", picture, "WEBP"),
        ("bmp", picture, "BMP"),
        ("cmyk", picture.convert("CMYK"), "JPEG"),
    ):
        file = io.BytesIO()
        image.save(file, form)
        yield name, file.getvalue()


@pytest.mark.parametrize(("name", "content"), list(other_formats()))
def test_everything_else_is_read_by_pil(both, by_pil, name, content):
    expected, ours = both(content)  # by its content, not by its name
    assert torch.equal(expected, ours)
    assert len(by_pil) == 2


def test_orientation_is_left_as_it_is_stored(both):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    expected, ours = both(jpeg(photograph(20, 30), exif=exif.tobytes()))
    assert ours.shape == (3, 20, 30)
    assert torch.equal(expected, ours)


WHOLE = jpeg(photograph(375, 500))


@pytest.mark.parametrize("left", [0, 2, 10, 200, 700, 0.1, 0.5, 0.9, -100, -3, -2, -1])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_truncated_file_is_refused_and_never_grey(tmp_path, left, progressive):
    whole = jpeg(photograph(375, 500), progressive=True) if progressive else WHOLE
    path = tmp_path / "cut.jpeg"
    path.write_bytes(whole[: int(left * len(whole)) if 0 < left < 1 else left])
    with pytest.raises(UserError) as caught:
        ImageTensors([str(path)], [0], None).image(0)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{path}: DATASET.ROOT has an image that cannot be read (")


def test_damaged_files_are_read_and_refused_as_by_pil(tmp_path):
    """A changed byte is either refused by both, in the same words, or both have the same pixels."""
    rng = np.random.default_rng(0)
    whole, path, outcomes = jpeg(photograph(60, 80)), tmp_path / "a.jpeg", []
    for _ in range(300):
        content = bytearray(whole)
        content[int(rng.integers(len(content)))] = int(rng.integers(256))
        path.write_bytes(content)
        both = []
        for kind, tensor in ((ImageFiles, pil_to_tensor), (ImageTensors, lambda image: image)):
            try:
                both.append(tensor(kind([str(path)], [0], None).image(0)))
            except UserError as error:
                both.append(str(error))
        outcomes.append(isinstance(both[0], str))
        assert both[0] == both[1] if outcomes[-1] else torch.equal(*both)
    assert 10 < sum(outcomes) < 290


def test_a_picture_that_would_fill_the_memory_is_refused(tmp_path):
    """The header is looked at first: torchvision would make 12 GB of this one."""
    content = bytearray(jpeg(photograph(16, 16)))
    place = content.index(b"\xff\xc0") + 5
    content[place : place + 4] = b"\xff\xff\xff\xff"
    path = tmp_path / "bomb.jpeg"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"bomb.jpeg: .* cannot be read .*decompression bomb"):
        ImageTensors([str(path)], [0], None).image(0)


def test_a_missing_file_and_one_that_is_no_image(tmp_path):
    (tmp_path / "text.jpeg").write_text("no image")
    for name in ("text.jpeg", "none.jpeg"):
        with pytest.raises(UserError, match=rf"{name}: DATASET.ROOT has an image that cannot be read"):
            ImageTensors([str(tmp_path / name)], [0], None).image(0)
