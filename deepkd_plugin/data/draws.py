"""Random numbers that are a function of (seed, epoch, image): no state, so neither order nor batch nor worker matters.

SplitMix64's finaliser (Steele et al., 2014), taken word by word over what a number is of. `uniforms` makes many at once
in a tensor's int64 arithmetic, which wraps around; `word` and `numbers` are the same in Python's integers.
"""

import contextlib
import random
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

WEAK, STRONG, ORDER, CONTRAST, ERASE, MIX = range(6)
"""What numbers are drawn for: an image's weak view, its strong one, its place in an epoch, its contrast (CRD), what is
erased of it, and how the batch of a step is mixed, which the step stands for."""

_ALL = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FACTORS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


class Draw(NamedTuple):
    """What an image's random numbers depend on. index: its place among all training images of its set."""

    seed: int
    epoch: int
    index: int


class Views(NamedTuple):
    """Whose numbers make the weak views of a run: an epoch's own of the run's seed, or a few epochs' in turn."""

    seed: int
    count: int | None = None
    """How many views an image has, those of the first epochs of `seed`; None: a new one in every epoch."""

    def epoch(self, epoch: int) -> int:
        """Return the epoch of `seed` whose weak views an epoch has."""
        return epoch if self.count is None else (epoch - 1) % self.count + 1


def word(*key: int) -> int:
    """Return 64 random bits of a key, as a number from 0 on."""
    mixed = 0
    for part in key:
        mixed = (mixed ^ (part & _ALL)) + _GOLDEN & _ALL
        for shift, factor in _FACTORS:
            mixed = (mixed ^ mixed >> shift) * factor & _ALL
        mixed ^= mixed >> 31
    return mixed


def numbers(draw: Draw, stream: int, count: int) -> list[float]:
    """Return `count` numbers in [0, 1) of one image."""
    seed, epoch, index = draw
    return [(word(seed, epoch, stream, index, k) >> 11) * 2.0**-53 for k in range(count)]


def uniforms(seed: int, epoch: int, index: Tensor, stream: int, count: int) -> Tensor:
    """Return `numbers` of many images: (B, count) float64 on the device of `index` (B,) int64."""
    # a Python number, since a tensor of it would be copied to the device, which waits for it
    of_image = _mix(index ^ _signed(word(seed, epoch, stream)))[:, None]
    mixed = _mix(of_image ^ torch.arange(count, device=index.device))
    return _shifted(mixed, 11).double() * 2.0**-53


def order(seed: int, epoch: int, index: Tensor) -> Tensor:
    """Return the places (B,) of images in the order of an epoch; of a part of the images, their order in the whole."""
    return uniforms(seed, epoch, index, ORDER, 1)[:, 0].argsort(stable=True)


@contextlib.contextmanager
def seeded(draw: Draw, stream: int) -> Iterator[None]:
    """Give torch's global generator on the CPU the state of a draw, and its own back afterwards (7 µs)."""
    before = torch.get_rng_state()
    # not torch.manual_seed, which would ask for CUDA
    torch.default_generator.manual_seed(word(*draw, stream) >> 1)
    try:
        yield
    finally:
        torch.set_rng_state(before)


@contextlib.contextmanager
def all_seeded(draw: Draw, stream: int) -> Iterator[None]:
    """Do the same to numpy's and Python's global generators too, from which others may draw (150 µs)."""
    before, bits = (np.random.get_state(), random.getstate()), word(*draw, stream)  # noqa: NPY002
    np.random.seed(bits & 0xFFFFFFFF)  # noqa: NPY002
    random.seed(bits)
    try:
        with seeded(draw, stream):
            yield
    finally:
        np.random.set_state(before[0])  # noqa: NPY002
        random.setstate(before[1])


def _mix(mixed: Tensor) -> Tensor:
    mixed = mixed + _signed(_GOLDEN)
    for shift, factor in _FACTORS:
        mixed = (mixed ^ _shifted(mixed, shift)) * _signed(factor)
    return mixed ^ _shifted(mixed, 31)


def _shifted(mixed: Tensor, by: int) -> Tensor:
    """Shift to the right as an unsigned number."""
    return (mixed >> by) & ((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
