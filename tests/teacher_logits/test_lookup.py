"""What a step is given of its teacher: the logits of the views it sees, whatever the table has."""

import errno
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deepkd_plugin.errors import UserError
from deepkd_plugin.hosts.builtin import cifar_model_dict
from deepkd_plugin.teacher_logits import lookup
from deepkd_plugin.teacher_logits.lookup import TeacherLogits, check_teacher
from deepkd_plugin.teacher_logits.table import Key

IMAGES, VIEWS, BATCH, CLASSES = 64, 4, 32, 10


def view_index(epoch, index):
    """Half of the images have another view in every epoch."""
    return torch.where(index % 2 == 0, 0, (index + epoch) % VIEWS)


def find(epoch, index):
    return index, view_index(epoch, index)


class Set:
    """A teacher and what it makes of every view of 64 images of noise."""

    def __init__(self):
        torch.manual_seed(0)
        self.teacher = cifar_model_dict["resnet8"][0](num_classes=CLASSES).eval().requires_grad_(False)
        self.views = torch.randn(IMAGES, VIEWS, 3, 32, 32)

    def batch(self, epoch, channels_last=False):
        index = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(epoch))[:BATCH]
        order = torch.channels_last if channels_last else torch.contiguous_format
        return self.views[index, view_index(epoch, index)].contiguous(memory_format=order), index

    def logits(self, place, dtype="float16", amp=False, teacher=None):
        key = Key("resnet8", "t", "noise", "i", IMAGES, VIEWS, "v", CLASSES, "float32", dtype)
        return TeacherLogits(key, place, teacher or self.teacher, find, amp)

    def truth(self, image):
        with torch.inference_mode():
            return self.teacher(image)[0].clone()


@pytest.fixture(scope="module")
def noise():
    return Set()


@pytest.fixture(autouse=True)
def warnings(monkeypatch):
    """What was warned of."""
    said = []
    monkeypatch.setattr(lookup, "warn", lambda text: text in said or said.append(text))
    return said


@pytest.mark.parametrize("channels_last", [False, True])
def test_in_float32_every_bit_is_the_teacher_s_own(noise, tmp_path, channels_last):
    """Empty, partly filled and full: the numbers of images that went through the teacher are all there are."""
    logits, shares = noise.logits(tmp_path, "float32"), []
    teacher = noise.teacher.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    logits.teacher = teacher
    for epoch in range(1, 60):
        image, index = noise.batch(epoch % 20, channels_last)
        logits.checked = epoch % 20  # no batch is computed whole to compare it
        assert torch.equal(logits(image, index, epoch % 20), noise.truth(image))
        shares.append(logits.share_computed())
    assert shares[0] == 1
    assert 0 < min(share for share in shares if share) <= 1 / BATCH
    assert shares[20:] == [0.0] * 39
    noise.teacher.to(memory_format=torch.contiguous_format)


def test_float16_differs_by_its_rounding_and_never_by_what_the_table_has(noise, tmp_path):
    first, closed = noise.logits(tmp_path), noise.logits(tmp_path / "closed")
    closed.table = None
    for epoch in [1, 2, 3, 1, 2, 3]:
        image, index = noise.batch(epoch)
        logits, truth = first(image, index, epoch), noise.truth(image)
        assert torch.equal(logits, truth.half().float())
        assert torch.equal(logits, closed(image, index, epoch))
        assert (logits - truth).abs().max() <= 2**-11 * truth.abs().max()
    assert not torch.equal(logits, truth)


def test_of_two_views_it_gives_the_weak_one_s(noise, tmp_path):
    image, index = noise.batch(1)
    assert torch.equal(noise.logits(tmp_path, "float32")([image, image + 1], index, 1), noise.truth(image))


def test_few_missing_images_are_computed_with_others(noise, tmp_path):
    logits, sizes = noise.logits(tmp_path), []
    hook = noise.teacher.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    image, index = noise.batch(1)
    logits(image[3:], index[3:], 1)
    logits(image, index, 1)
    logits(image, index, 1)
    hook.remove()
    assert sizes == [BATCH - 3, BATCH]  # the second compares, as an epoch's first that has some
    logits.checked = 2
    hook = noise.teacher.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    logits.table.write(index[:1].numpy(), np.array([1]), np.full((1, CLASSES), np.nan))
    image, index = noise.batch(2)
    seen = logits(image, index, 2)
    hook.remove()
    assert lookup.LEAST <= sizes[2] < BATCH
    assert torch.equal(seen, noise.truth(image).half().float())


def test_images_that_are_not_the_table_s_end_the_run(noise, tmp_path):
    logits = noise.logits(tmp_path)
    image, index = noise.batch(1)
    logits(image, index, 1)
    with pytest.raises(UserError, match="its logits are not those of the images of this run"):
        logits(image.roll(1, -1), index, 1)
    logits(image, index, 1)


def test_on_a_full_disk_logits_are_computed(noise, tmp_path, monkeypatch, warnings):
    logits = noise.logits(tmp_path)
    image, index = noise.batch(1)
    written, write = [], os.pwrite

    def full(*arguments):
        if len(written) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(arguments)
        return write(*arguments)

    monkeypatch.setattr(os, "pwrite", full)
    for _ in range(3):
        assert torch.equal(logits(image, index, 1), noise.truth(image).half().float())
    assert logits.computed == BATCH + 2 * (BATCH - 5)
    (line,) = warnings
    assert line.endswith(": No space left on device; logits that are not there are computed each time")


def test_a_table_that_cannot_be_written_is_read(noise, tmp_path, monkeypatch, warnings):
    image, index = noise.batch(1)
    noise.logits(tmp_path)(image, index, 1)
    content = next(tmp_path.iterdir()).read_bytes()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    logits = noise.logits(tmp_path)
    assert torch.equal(logits(image, index, 1), noise.truth(image).half().float())
    assert logits.share_computed() == 0
    other, others = noise.batch(2)
    assert torch.equal(logits(other, others, 2), noise.truth(other).half().float())
    assert next(tmp_path.iterdir()).read_bytes() == content
    assert "cannot be written" in warnings[0]


def test_without_a_folder_to_write_logits_are_computed(noise, tmp_path, warnings):
    (tmp_path / "file").touch()
    logits = noise.logits(tmp_path / "file")
    image, index = noise.batch(1)
    assert torch.equal(logits(image, index, 1), noise.truth(image).half().float())
    assert logits.share_computed() == 1
    (line,) = warnings
    assert line.endswith("the teacher's logits are computed in every step (DISTILLER.TEACHER_LOGITS table)")


def test_damage_is_computed_again_and_said(noise, tmp_path, warnings):
    logits = noise.logits(tmp_path)
    image, index = noise.batch(1)
    logits(image, index, 1)
    path = logits.table.path
    content = bytearray(path.read_bytes())
    for place in np.random.default_rng(0).integers(4096, len(content), size=200):
        content[place] ^= 1 << place % 8
    path.write_bytes(content)
    logits = noise.logits(tmp_path)
    assert torch.equal(logits(image, index, 1), noise.truth(image).half().float())
    assert 0 < logits.share_computed() < 1
    assert warnings == [f"{path}: has damaged logits; they are not used, and computed again"]
    assert noise.logits(tmp_path).table.read(index.numpy(), view_index(1, index).numpy())[1].all()  # and mended
    content[0] ^= 1
    path.write_bytes(content)
    assert torch.equal(noise.logits(tmp_path)(image, index, 1), noise.truth(image).half().float())
    assert "its header is damaged; the teacher's logits are computed in every step" in warnings[1]


class Large(nn.Module):
    """A teacher with logits that float16 cannot hold, of some images."""

    def forward(self, image):
        mean = image.mean((1, 2, 3))
        return torch.where(mean > 0, 1e5, mean)[:, None].expand(-1, CLASSES) + torch.arange(CLASSES), None


def test_logits_that_float16_cannot_hold_are_computed(noise, tmp_path, warnings):
    image, index = noise.batch(1)
    logits = noise.logits(tmp_path, teacher=Large().eval())
    truth = Large()(image)[0]
    large = (truth > 65504).any(1)
    assert 0 < large.sum() < BATCH
    for _ in range(2):
        given = logits(image, index, 1)
        assert torch.equal(given[large], truth[large])
        assert torch.equal(given[~large], truth[~large].half().float())
    assert logits.computed == BATCH + large.sum()
    assert "float16: cannot hold the logits of resnet8, which reach" in warnings[0]


def test_an_endless_logit_is_kept(noise, tmp_path):
    class Masked(nn.Module):
        def forward(self, image):
            logits = image.flatten(1)[:, :CLASSES].clone()
            logits[:, 3] = -torch.inf
            return logits, None

    image, index = noise.batch(1)
    logits = noise.logits(tmp_path, teacher=Masked())
    assert torch.equal(logits(image, index, 1), Masked()(image)[0].half().float())
    assert torch.equal(logits(image, index, 1), Masked()(image)[0].half().float())
    assert logits.computed == BATCH


class Chance(nn.Module):
    """A network whose dropout never rests."""

    def forward(self, image):
        return F.dropout(image.flatten(1)[:, :CLASSES], 0.5), None


class Statistics(nn.Module):
    """A network that normalises by the batch it sees, in evaluation mode too."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3, track_running_stats=False)

    def forward(self, image):
        scale = torch.arange(len(image))[:, None, None, None]
        return self.norm(scale * image).flatten(1)[:, :CLASSES], None


def dropout_left_on(teacher):
    teacher.add_module("drop", nn.Dropout())
    return teacher


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: cifar_model_dict["resnet8"][0](num_classes=10).train(), "ResNet is in training mode"),
        (lambda: dropout_left_on(cifar_model_dict["resnet8"][0](num_classes=10).eval()), "drop is in training mode"),
        (lambda: Chance().eval(), "the same images gave others"),
        (lambda: Statistics().eval(), "the same images gave others"),
    ],
)
def test_a_teacher_whose_logits_depend_on_more_than_the_image_is_refused(make, reason):
    with pytest.raises(UserError, match=f"must depend on the image alone, and {reason}"):
        check_teacher(make(), torch.randn(8, 3, 32, 32))


def test_a_teacher_in_evaluation_mode_is_taken(noise):
    check_teacher(noise.teacher, noise.views[:8, 0])
