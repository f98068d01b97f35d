"""mdistiller's methods on features as losses of DeepKD's stream `feat`."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..distillers.base import Said
from ..distillers.features import FEATURES, KEY, THEIRS, FeatureLoss
from ..distillers.terms import total
from ..errors import UserError
from ..losses import wide
from .adapter import reason_of


class Replay(nn.Module):
    """Says what a network has said of the batch, in the network's place."""

    said: Said | None = None

    def forward(self, image: Tensor) -> Said:
        assert self.said is not None
        return self.said


class Borrowed(FeatureLoss):
    """One of mdistiller's distillers, asked for its loss and not for its passes.

    It is made of both networks, whose places two replays take then: its forward_train computes its losses of what the
    networks have said already, so each image passes each network once. All its losses but `loss_ce` are added up, with
    its own weight and warm-up. Features that autocast made narrow are widened.
    """

    needs = ("feats", "preact_feats", "pooled_feat")
    by_epoch = True

    def __init__(
        self, make: Any, name: str, student: nn.Module, teacher: nn.Module, cfg: Any, num_data: int | None = None
    ) -> None:
        super().__init__()
        self.name = name
        # some of them pass noise for the shapes of features, in training mode, which moves BatchNorm's means
        before = [(buffer, buffer.clone()) for network in (student, teacher) for buffer in network.buffers()]
        home = next(student.parameters()).device
        try:
            theirs = make(student, teacher, cfg, *((num_data,) if name == "CRD" else ()))
        except Exception as error:  # of networks that it was not made for, it may fail in any way
            raise self.refused(error) from error
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
        theirs.student, theirs.teacher = Replay(), Replay()
        self.theirs = theirs.to(home)

    def get_learnable_parameters(self) -> list[nn.Parameter]:
        return list(self.theirs.get_learnable_parameters())

    def forward(self, student: Said, teacher: Said, batch: Mapping[str, Any]) -> Tensor:
        replays = (self.theirs.student, self.theirs.teacher)
        try:
            for replay, said in zip(replays, (student, teacher)):
                replay.said = _widened(said)
            losses = self.theirs.forward_train(**batch)[1]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise self.refused(error) from error
        finally:
            # a graph would live as long as what holds it, and that could not be copied
            for replay in replays:
                replay.said = None
            for buffer in self.theirs.buffers():  # CRD's constants have one
                buffer.detach_()
        return total(loss.mean() for name, loss in losses.items() if name != "loss_ce")

    def refused(self, error: Exception) -> UserError:
        return UserError(
            f"config: {KEY} is {self.name}, and mdistiller's {self.name} cannot compare these networks "
            f"({reason_of(error)}); the config's node {self.name} must fit them, or it must be another"
        )


def offer(distillers: Mapping[str, Any]) -> None:
    """Let DeepKD.FEATURE take the methods on features of a host's distillers."""
    for name in THEIRS:
        if name in distillers:
            FEATURES[name] = partial(Borrowed, distillers[name], name)


def _widened(value: Any) -> Any:
    """Widen tensors, in lists, pairs and by name."""
    if isinstance(value, Tensor):
        return wide(value)
    if isinstance(value, Mapping):
        return {name: _widened(part) for name, part in value.items()}
    return type(value)(map(_widened, value)) if isinstance(value, (list, tuple)) else value
