"""CRD's contrast indices: one place of the sample's own, then places of other classes."""

import numpy as np
import pytest
import torch

from deepkd_plugin.data.arrays import Contrast

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(5), 8))


def contrast(count, relaxed=False):
    return Contrast([(f"image {i}", int(label), i) for i, label in enumerate(LABELS)], LABELS, count, relaxed)


@pytest.mark.parametrize("count", [1, 32, 100])
def test_negatives_are_of_other_classes(count):
    torch.manual_seed(0)
    data = contrast(count)
    for index in range(len(data)):
        image, label, place, indices = data[index]
        assert (image, label, place) == (f"image {index}", LABELS[index], index)
        assert indices.shape == (1 + count,)
        assert indices[0] == index
        assert (LABELS[indices[1:]] != label).all()
        # all 32 others once, or with replacement where there are not enough
        assert (len(set(indices[1:])) == count) == (count <= 32)


def test_every_negative_is_as_likely_and_the_seed_decides():
    data = contrast(4)
    torch.manual_seed(1)
    first = [data[3][3] for _ in range(2000)]
    counts = np.bincount(np.concatenate([drawn[1:] for drawn in first]), minlength=40)
    others = LABELS[3] != LABELS
    assert (counts[~others] == 0).all()
    assert abs(counts[others] - 250).max() < 5 * 250**0.5
    torch.manual_seed(1)
    assert all((data[3][3] == drawn).all() for drawn in first)


def test_a_relaxed_positive_is_any_of_the_same_class():
    torch.manual_seed(0)
    own = [contrast(1, relaxed=True)[3][3][0] for _ in range(200)]
    assert set(own) == set(np.flatnonzero(LABELS[3] == LABELS))
