"""`deepkd shrink`: what it makes of images, against PIL; what it keeps; and what it refuses."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms.functional import resize

from deepkd_plugin.commands import cli, shrink
from deepkd_plugin.data import DATASETS
from deepkd_plugin.data.folders import ImageTensors, class_folders
from deepkd_plugin.run import lock


def picture(width, height, mode="RGB"):
    rng = np.random.default_rng(width * height)
    patches = rng.integers(0, 256, (-(-height // 16), -(-width // 16), 3), dtype=np.uint8)
    return Image.fromarray(patches).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def turned_left():
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a caption"
    return exif


@pytest.fixture
def folder(tmp_path):
    """A data set's folder with one image of each kind."""
    top = tmp_path / "set"
    (top / "a" / "deeper").mkdir(parents=True)
    (top / "b").mkdir()
    picture(80, 50).save(top / "a" / "wide.JPEG", quality=95)
    picture(50, 81).save(top / "a" / "deeper" / "tall.jpg", quality=95, exif=turned_left())
    picture(90, 60, "L").save(top / "a" / "grey.jpeg")
    picture(60, 90, "CMYK").save(top / "b" / "cmyk.jpeg")
    picture(70, 70).save(top / "b" / "square.png")
    picture(64, 48).save(top / "b" / "photo.webp", lossless=True)
    picture(70, 70).save(top / "b" / "png.jpeg", "PNG")  # as one of ImageNet's
    picture(100, 32).save(top / "b" / "small.jpeg")
    picture(20, 20).save(top / "b" / "tiny.png")
    (top / "b" / "labels.txt").write_text("no image")
    (top / ".hidden.jpeg").write_text("not looked at")
    (top / ".cache").mkdir()
    picture(80, 50).save(top / ".cache" / "c.jpeg")
    return top


@pytest.fixture
def run(capfd):
    """Run `deepkd shrink` with a short side of 32; returns exit code, stdout, stderr."""

    def call(*words, workers=1):
        code = cli.main(["shrink", *map(str, words), "--side", "32", "--workers", str(workers)])
        return code, *capfd.readouterr()

    return call


def files(folder):
    return {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()}


def test_what_becomes_of_each_image(folder, run, tmp_path):
    before = {name: (folder / name).read_bytes() for name in files(folder)}
    code, out, err = run(folder, workers=2)
    assert (code, err) == (0, "")
    made = tmp_path / "set-32"
    images = {name for name in before if not name.startswith(".") and name != "b/labels.txt"}
    assert files(made) == images | {".shrink.json"}
    assert "9 images (7 resized, 2 as it was, 0 kept), " in out
    assert "; 1 other files left out" in out
    assert {name: (folder / name).read_bytes() for name in files(folder)} == before  # never in place
    for name in images:
        with Image.open(folder / name) as source, Image.open(made / name) as small:
            if min(source.size) <= 32:
                assert (made / name).read_bytes() == before[name]
                assert (made / name).stat().st_ino == (folder / name).stat().st_ino
                continue
            assert small.format == ("JPEG" if source.format == "JPEG" else "PNG")
            expected = resize(source.convert("RGB"), [32])  # the reader's colours, a test's sizes and pixels
            assert small.size == expected.size
            assert min(small.size) == 32
            ours = np.asarray(small.convert("RGB")).astype(int)
            if small.format == "PNG":
                assert (ours == np.asarray(expected)).all()
            else:
                file = io.BytesIO()
                saved = resize(source, [32]) if source.mode == "L" else expected
                saved.save(file, "JPEG", quality=90, subsampling="4:2:0")
                assert (ours == np.asarray(Image.open(file).convert("RGB"))).all()
                assert small.mode == ("L" if source.mode == "L" else "RGB")
            assert dict(small.getexif()) == ({0x0112: 6} if "tall" in name else {})


def test_quality_and_subsampling_are_those_that_are_told(folder, run, tmp_path):
    for quality in (50, 100):
        run(folder, "--quality", quality, "--to", tmp_path / str(quality))
    low, high = (Image.open(tmp_path / q / "a/wide.JPEG") for q in ("50", "100"))
    assert sum(low.quantization[0]) > 4 * sum(high.quantization[0])
    assert set(high.quantization[0]) == {1}
    assert [layer[1:3] for layer in low.layer] == [(2, 2), (1, 1), (1, 1)]  # 4:2:0


def test_readers_find_the_result(run, tmp_path, imagenet_like):
    """As docs/performance.md says: DATASET.ROOT holds imagenet/."""
    code, *_ = run(imagenet_like / "imagenet", "--to", tmp_path / "small" / "imagenet")
    assert code == 0
    paths, labels = class_folders(tmp_path / "small" / "imagenet" / "train", 3, "imagenet")
    assert labels == [0, 1, 2]
    image = ImageTensors(paths, labels, DATASETS["imagenet"].test_transform()).image(0)
    assert image.shape == (3, 32, 43)


@pytest.fixture
def imagenet_like(tmp_path):
    root = tmp_path / "data"
    for label in range(3):
        (root / "imagenet" / "train" / f"n{label}").mkdir(parents=True)
        picture(80, 59).save(root / "imagenet" / "train" / f"n{label}" / "a.JPEG")
    return root


def test_it_goes_on_with_what_is_missing(folder, run, tmp_path):
    run(folder)
    made = tmp_path / "set-32"
    times = {name: (made / name).stat().st_mtime_ns for name in files(made)}
    (made / "a" / "wide.JPEG").unlink()
    (made / "a" / "grey.jpeg").write_bytes(b"")  # what a crash of the machine can leave
    (made / "b" / ".png.jpeg.12345.tmp").write_bytes(b"half")  # and a killed process
    code, out, _ = run(folder)
    assert code == 0
    assert "9 images (2 resized, 0 as it was, 7 kept), " in out
    assert set(times) == files(made)
    changed = {name for name in times if (made / name).stat().st_mtime_ns != times[name]}
    assert changed == {"a/wide.JPEG", "a/grey.jpeg"}


def test_sizes_are_told(folder, run, tmp_path):
    _, out, _ = run(folder)
    images = [name for name in files(tmp_path / "set-32") if name != ".shrink.json"]
    before, after = (sum((top / name).stat().st_size for name in images) for top in (folder, tmp_path / "set-32"))
    assert f"{before / 1e6:.1f} MB before, {after / 1e6:.1f} MB now" in out


def test_unreadable_images_are_named_and_the_rest_is_made(folder, run, tmp_path):
    whole = (folder / "a" / "wide.JPEG").read_bytes()
    (folder / "a" / "cut.jpeg").write_bytes(whole[:-50])
    (folder / "b" / "small_cut.jpeg").write_bytes((folder / "b" / "small.jpeg").read_bytes()[:-50])
    (folder / "b" / "text.png").write_text("no image")
    code, out, err = run(folder)
    *told, last = err.splitlines()
    assert code == 2
    assert sorted(line.split(": cannot be read (")[0] for line in told) == [
        str(folder / name) for name in ("a/cut.jpeg", "b/small_cut.jpeg", "b/text.png")
    ]
    assert last == (
        f"deepkd: error: {folder}: 3 images cannot be read, as told above; {tmp_path / 'set-32'} has all others"
    )
    assert "9 images (7 resized, 2 as it was, 0 kept)" in out
    assert len(files(tmp_path / "set-32")) == 10


def test_a_file_system_without_links_gets_copies(folder, run, tmp_path, monkeypatch):
    def fail(*names):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", fail)
    assert run(folder)[0] == 0
    small = tmp_path / "set-32" / "b" / "small.jpeg"
    assert small.read_bytes() == (folder / "b" / "small.jpeg").read_bytes()
    assert small.stat().st_ino != (folder / "b" / "small.jpeg").stat().st_ino


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["{set}", "--to", "{set}/b/small"], "{set}/b/small: is in DIR, {set}; --to must name a folder outside it"),
        (["{set}", "--to", "{set}"], "{set}: is in DIR, {set}; --to"),
        (["{set}", "--to", "{top}/link"], "{set}/b: is in DIR, {set}; --to"),
        (["{set}/a", "--to", "{set}"], "{set}: holds 'a'; OUT must be new or empty (--to)"),
        (["{set}", "--to", "{top}/full"], "{top}/full: holds 'thing.txt'; OUT must be new or empty (--to)"),
        (["{set}", "--to", "{top}/full/thing.txt"], "thing.txt: must be a folder that can be written"),
        (["{top}/none"], "{top}/none: no such folder; DIR must hold images"),
        (["{top}/full"], "{top}/full: holds no image"),
        (["{set}", "--quality", "101"], "command line: --quality is 101; it must be at most 100"),
        (["{set}", "--quality", "0"], "--quality: is '0'; it must be a whole number from 1"),
        ([], "the following arguments are required: DIR"),
    ],
)
def test_refusals(folder, run, tmp_path, words, expected):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thing.txt").write_text("mine")
    (tmp_path / "link").symlink_to(folder / "b")
    before = files(tmp_path)
    names = {"set": folder, "top": tmp_path}
    code, _, err = run(*(word.format(**names) for word in words))
    assert code == 2
    (line,) = err.splitlines()
    assert expected.format(**names) in line
    assert files(tmp_path) == before


def test_an_out_of_other_settings_is_refused(folder, run, tmp_path):
    run(folder)
    code, _, err = run(folder, "--quality", 80)
    assert code == 2
    assert "set-32: its images were made otherwise (quality was 90, is 80); take another OUT (--to)" in err
    (tmp_path / "set-32" / ".shrink.json").write_text("[")
    code, _, err = run(folder)
    assert code == 2
    assert ".shrink.json: must be what deepkd shrink wrote (" in err
    (tmp_path / "set-32" / ".shrink.json").write_text("[]")
    assert "its images were made otherwise (unknown)" in run(folder)[2]


def test_two_at_once_are_told_of_each_other(folder, run, tmp_path):
    with lock.locked(tmp_path / "set-32"):
        code, _, err = run(folder)
    assert code == 2
    assert "is at work there; call again when it has ended" in err


def test_a_full_disk_is_one_line(folder, run, tmp_path, monkeypatch):
    def full(path, write):
        if path.name == shrink.NOTE:
            return path.write_text(json.dumps({"from": str(folder), "side": 32, "quality": 90}))
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(shrink.checkpoint, "write_whole", full)
    monkeypatch.setattr(shrink.checkpoint, "write_text", lambda path, text: full(path, None))
    code, _, err = run(folder)
    assert code == 2
    (line,) = err.splitlines()
    assert "No space left on device" in line
    assert str(tmp_path / "set-32") in line


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_an_interruption_leaves_whole_files_and_the_rest_follows(run, tmp_path, number, code):
    source, made = tmp_path / "many", tmp_path / "many-32"
    source.mkdir()
    picture(700, 600).save(source / "0.jpeg", quality=95)
    for i in range(1, 120):
        shutil.copy(source / "0.jpeg", source / f"{i}.jpeg")
    words = [sys.executable, "-m", "deepkd_plugin", "shrink", str(source), "--side", "32", "--workers", "2"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while len(files(made) if made.exists() else ()) < 40:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code
    # its processes have the pipe too, so all of them have ended
    assert code < 0 or err == "deepkd: interrupted; the same command starts again\n"
    finished = [name for name in files(made) if name.endswith(".jpeg")]
    assert 30 < len(finished) < 120
    for name in finished:
        with Image.open(made / name) as image:
            image.load()
            assert min(image.size) == 32
    again, out, _ = run(source)
    assert again == 0
    assert f"120 images ({120 - len(finished)} resized, 0 as it was, {len(finished)} kept)" in out
    assert len(files(made)) == 121
