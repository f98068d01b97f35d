import torch
from torch import nn


class Table(nn.Module):
    """A network that gives stored logits: `image` is the row to look up."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.clone())
        self.norm = nn.BatchNorm1d(1)

    def forward(self, image):
        return self.logits[image], {}
