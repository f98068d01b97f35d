"""Several frozen teachers as one: what each of them weighs for a sample, and the logits of their mixture.

A method compares the student with one teacher's logits z at a temperature T, that is with softmax(z / T). The mixture's
logits are those with softmax(z / T) = Σ w · softmax(z_m / T), so every method that reads them at T alone compares with
the weighted mean of the teachers' probabilities. Without T they are the weighted mean of logits, whose softmax is the
normalised geometric mean of the teachers' at every temperature.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FIXED, TARGET, ENTROPY = MIXES = ("fixed", "target", "entropy")
"""What teachers weigh by, see sample_weights."""

PROBABILITIES, LOGITS, STREAMS = POOLS = ("probabilities", "logits", "streams")
"""What a mixture is the mean of; STREAMS: there is none in training, DeepKD has streams of each teacher."""


def sample_weights(each: Tensor, shares: Tensor, by: str = FIXED, target: Tensor | None = None) -> Tensor:
    """Return what each teacher weighs for each sample: (B, M), each row with the sum 1.

    each: the teachers' logits (B, M, C). shares: (M,), above 0. by: FIXED, the shares alone; else they count times
    1 − d / Σ d, over the M teachers' d of the sample. TARGET: d is 1 / p, with p the teacher's probability of the
    target (B,), as CA-MKD has it (Zhang et al., 2022, eq. 3: the softmax of the cross-entropies); of two teachers each
    weighs as p does. ENTROPY: d is the entropy of the teacher's probabilities, as the same authors' code has EBKD. Both
    are of the softmax at temperature 1, as there. Raises ValueError for TARGET without one.
    """
    wide = each.double()
    weights = shares.double().expand(wide.shape[:2])
    if by != FIXED and wide.shape[1] > 1:
        log_p = F.log_softmax(wide, dim=2)
        if by == ENTROPY:
            lacks = torch.special.entr(log_p.exp()).sum(2)
            total = lacks.sum(1, keepdim=True)
            # of teachers that are all sure none lacks more than another
            lack = torch.where(total > 0, lacks / total, torch.full_like(lacks, 1 / lacks.shape[1]))
        elif target is None:
            raise ValueError("weights by the teachers' probability of the target need the target")
        else:
            index = target.long()[:, None, None].expand(-1, log_p.shape[1], 1)
            lack = F.softmax(-log_p.gather(2, index).squeeze(2), dim=1)
        weights = weights * (1 - lack)
    return weights / weights.sum(1, keepdim=True)


def mixed_logits(each: Tensor, weights: Tensor, temperature: float | None) -> Tensor:
    """Return the logits of a mixture of teachers, (B, C) in float32.

    each: the teachers' logits (B, M, C). weights: (B, M), each row with the sum 1. temperature: at which their
    probabilities are averaged; None: their logits are. Equal teachers' mixture is each of them, to rounding.
    """
    wide, weights = each.double(), weights.double()
    if temperature is None:
        return (weights.unsqueeze(2) * wide).sum(1).float()
    log_p = (F.log_softmax(wide / temperature, dim=2) + weights.log().unsqueeze(2)).logsumexp(1)
    # a constant that the softmax does not see: the size of the teachers' own logits, in which float32 has its digits
    largest = (weights * wide.amax(2)).sum(1, keepdim=True)
    return (temperature * (log_p - log_p.amax(1, keepdim=True)) + largest).float()


class Teachers(nn.Module):
    """Several networks that are asked at once: images (B, 3, H, W) -> (each one's logits (B, M, C), no features).

    Their mixture's logits (B, C) are made of them, by `mix`.
    """

    shares: Tensor
    tested: Sequence[float] = ()
    """Each one's top-1 in percent on the test images, once it has been measured."""

    def __init__(
        self, networks: Sequence[nn.Module], shares: Sequence[float], by: str = FIXED, temperature: float | None = None
    ) -> None:
        """networks: all of the same classes. shares, by: see sample_weights. temperature: see mixed_logits."""
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.by, self.temperature = by, temperature
        self.register_buffer("shares", torch.tensor(shares, dtype=torch.float64), persistent=False)

    def forward(self, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return torch.stack([network(image)[0].float() for network in self.networks], dim=1), {}

    def weights(self, each: Tensor, target: Tensor | None) -> Tensor:
        """Return sample_weights of the teachers' logits (B, M, C)."""
        return sample_weights(each, self.shares, self.by, target)

    def mix(self, each: Tensor, target: Tensor | None) -> Tensor:
        """Return the mixture's logits (B, C) of the teachers' (B, M, C). target: the classes (B,)."""
        return mixed_logits(each, self.weights(each, target), self.temperature)

    def mix_unlabelled(self, each: Tensor) -> Tensor:
        """Do as `mix` as far as labels need not be known: weights by TARGET are the shares."""
        weights = sample_weights(each, self.shares, FIXED if self.by == TARGET else self.by)
        return mixed_logits(each, weights, self.temperature)


def members(teacher: Any) -> list[nn.Module]:
    """Return the networks that a teacher is made of: itself, or the several of a mixture."""
    return list(teacher.networks) if isinstance(teacher, Teachers) else [teacher]
