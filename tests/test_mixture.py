"""The mixture of several teachers' logits, against what it means and the articles' own formulas."""

import pytest
import torch
from torch.nn import functional as F

from deepkd_plugin.losses import kd_divergence
from deepkd_plugin.mixture import MIXES, Teachers, members, mixed_logits, sample_weights


@pytest.fixture
def each():
    """Logits of 6 samples by 3 teachers for 7 classes, and the targets."""
    generator = torch.Generator().manual_seed(0)
    return 5 * torch.randn(6, 3, 7, generator=generator), torch.randint(7, (6,), generator=generator)


SHARES = torch.tensor([1.0, 2.0, 5.0])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 1000.0])
def test_its_probabilities_are_the_weighted_mean_of_the_teachers_at_that_temperature(each, temperature):
    weights = sample_weights(each[0], SHARES)
    assert torch.allclose(weights, SHARES.double() / 8)
    mixed = mixed_logits(each[0], weights, temperature)
    meant = (weights.unsqueeze(2) * F.softmax(each[0].double() / temperature, dim=2)).sum(1)
    assert torch.allclose(F.softmax(mixed.double() / temperature, dim=1), meant, atol=1e-7)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_without_one_they_are_the_geometric_mean_at_every_temperature(each, temperature):
    weights = sample_weights(each[0], SHARES)
    mixed = mixed_logits(each[0], weights, None)
    product = F.softmax(each[0].double() / temperature, dim=2).pow(weights.unsqueeze(2)).prod(1)
    meant = product / product.sum(1, keepdim=True)
    assert torch.allclose(F.softmax(mixed.double() / temperature, dim=1), meant, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("temperature", [None, 1.0, 4.0])
@pytest.mark.parametrize("by", MIXES)
def test_equal_teachers_are_one(each, count, temperature, by):
    one, target = each[0][:, :1], each[1]
    several = one.expand(-1, count, -1)
    mixed = mixed_logits(several, sample_weights(several, SHARES[:count], by, target), temperature)
    assert (mixed - one[:, 0]).abs().max() < 1e-6 * one.abs().max()


def test_the_student_learns_from_it_as_from_the_weighted_sum_of_the_teachers_losses(each):
    """KL(Σ w q ‖ p) and Σ w KL(q ‖ p) differ by what does not depend on the student."""
    logits, target = each[0].double(), each[1]
    weights = sample_weights(logits, SHARES, "target", target)
    student = torch.randn(6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    of_mixture = kd_divergence(student, mixed_logits(logits, weights, 4.0).double(), 4.0).sum()
    of_each = sum((weights[:, m] * kd_divergence(student, logits[:, m], 4.0)).sum() for m in range(3))
    ours, theirs = (torch.autograd.grad(loss, student)[0] for loss in (of_mixture, of_each))
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_weights_by_the_target_are_those_of_the_article(each):
    """CA-MKD, eq. 3: of K teachers (1 − softmax of the cross-entropies) / (K − 1)."""
    logits, target = each
    losses = torch.stack([F.cross_entropy(logits[:, m], target, reduction="none") for m in range(3)], dim=1)
    meant = (1 - F.softmax(losses, dim=1)) / 2
    assert torch.allclose(sample_weights(logits, torch.ones(3), "target", target).float(), meant, atol=1e-6)
    two = sample_weights(logits[:, :2], torch.ones(2), "target", target)
    p = F.softmax(logits[:, :2].double(), dim=2)[torch.arange(6), :, target]
    assert torch.allclose(two, p / p.sum(1, keepdim=True))
    shared = sample_weights(logits[:, :2], torch.tensor([1.0, 3.0]), "target", target)
    assert torch.allclose(shared[:, 1] / shared[:, 0], 3 * p[:, 1] / p[:, 0])


def test_weights_by_entropy_are_those_of_its_authors_code(each):
    """EBKD: (1 − the share of all entropies) / (K − 1)."""
    p = F.softmax(each[0], dim=2)
    entropy = -(p * p.log()).sum(2)
    meant = (1 - entropy / entropy.sum(1, keepdim=True)) / 2
    assert torch.allclose(sample_weights(each[0], torch.ones(3), "entropy").float(), meant, atol=1e-5)


def test_teachers_that_are_all_sure_weigh_their_shares(each):
    sure = torch.zeros(2, 2, 5, dtype=torch.float64)
    sure[:, :, 3] = 1e6
    assert torch.allclose(
        sample_weights(sure, torch.tensor([1.0, 3.0]), "entropy"), torch.tensor([0.25, 0.75]).double()
    )
    sure[0, 1, 3] = 0.0  # this one knows nothing
    weights = sample_weights(sure, torch.ones(2), "entropy")
    assert weights[0].tolist() == [1, 0]
    assert torch.isfinite(mixed_logits(sure, weights, 4.0)).all()


def test_a_module_of_several_gives_each_ones_logits_and_needs_labels_only_to_mix_by_them(each):
    nets = [Fixed(each[0][:, m]) for m in range(3)]
    teacher = Teachers(nets, [1.0, 2.0, 5.0], "target", 4.0)
    logits, features = teacher(torch.zeros(6, 3, 2, 2))
    assert torch.equal(logits, each[0])
    assert not features
    assert torch.equal(teacher.mix_unlabelled(logits), mixed_logits(each[0], sample_weights(each[0], SHARES), 4.0))
    with pytest.raises(ValueError, match="need the target"):
        teacher.mix(each[0], None)
    weights = sample_weights(each[0], SHARES, "target", each[1])
    assert torch.equal(teacher.mix(*each), mixed_logits(each[0], weights, 4.0))
    assert members(teacher) == nets
    assert members(nets[0]) == nets[:1]
    assert not teacher.state_dict()


class Fixed(torch.nn.Module):
    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, image):
        return self.logits, {}
