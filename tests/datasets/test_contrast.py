"""CRD's contrast indices: one place of the sample's own, then places of other classes."""

import numpy as np
import pytest

from deepkd_plugin.data.arrays import Contrast
from deepkd_plugin.data.draws import Draw

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(5), 8))


class Samples(list):
    """Training samples, with what their random numbers depend on."""

    def __getitem__(self, key):
        return super().__getitem__(key[1])

    def draw(self, key):
        return Draw(0, *key)


def contrast(count, relaxed=False):
    samples = Samples((f"image {i}", int(label), i) for i, label in enumerate(LABELS))
    return Contrast(samples, LABELS, count, relaxed)


@pytest.mark.parametrize("count", [1, 32, 100])
def test_negatives_are_of_other_classes(count):
    data = contrast(count)
    for index in range(len(data)):
        image, label, place, indices = data[1, index]
        assert (image, label, place) == (f"image {index}", LABELS[index], index)
        assert indices.shape == (1 + count,)
        assert indices[0] == index
        assert (LABELS[indices[1:]] != label).all()
        # all 32 others once, or with replacement where there are not enough
        assert (len(set(indices[1:])) == count) == (count <= 32)


def test_every_negative_is_as_likely_and_the_seed_decides():
    data = contrast(4)
    first = [data[epoch, 3][3] for epoch in range(2000)]
    counts = np.bincount(np.concatenate([drawn[1:] for drawn in first]), minlength=40)
    others = LABELS[3] != LABELS
    assert (counts[~others] == 0).all()
    assert abs(counts[others] - 250).max() < 5 * 250**0.5
    assert all((data[epoch, 3][3] == drawn).all() for epoch, drawn in enumerate(first))


def test_a_relaxed_positive_is_any_of_the_same_class():
    own = [contrast(1, relaxed=True)[epoch, 3][3][0] for epoch in range(200)]
    assert set(own) == set(np.flatnonzero(LABELS[3] == LABELS))
