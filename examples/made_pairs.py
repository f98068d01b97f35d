"""What the example across modalities needs: drawings and the texts that they are of, and encoders of both."""

import torch
import torch.nn.functional as F
from torch import nn

SHAPES, COLOURS, PLACES = 4, 4, 9
COUNT = SHAPES * COLOURS * PLACES


class Encoders(nn.Module):
    """An encoder of images (B, 3, 12, 12), and one of texts (B, 3) of words. `forward` returns their logits (B, B)."""

    def __init__(self, width):
        super().__init__()
        self.image = nn.Sequential(nn.Flatten(), nn.Linear(432, width), nn.GELU(), nn.Linear(width, 16))
        words = nn.Embedding(SHAPES + COLOURS + PLACES, width)
        self.text = nn.Sequential(words, nn.Flatten(), nn.Linear(3 * width, width), nn.GELU(), nn.Linear(width, 16))
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, images, texts):
        image, text = F.normalize(self.image(images)), F.normalize(self.text(texts))
        return self.log_scale.exp() * image @ text.T


def pairs(seed):
    """Make every text (shape, colour, place) once, in the seed's order, and an image of it with noise."""
    made = torch.Generator().manual_seed(seed)
    order = torch.randperm(COUNT, generator=made)  # no text comes twice in a batch
    shape, colour, place = torch.unravel_index(order, (SHAPES, COLOURS, PLACES))
    drawings = torch.randint(2, (SHAPES, 1, 4, 4), generator=torch.Generator().manual_seed(0)).float()
    tints = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]])[:, :, None, None]
    images = 0.3 * torch.randn(len(order), 3, 12, 12, generator=made)
    for image, x, y, drawing in zip(images, place % 3, place // 3, drawings[shape] * tints[colour]):
        image[:, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4] += drawing
    return images, torch.stack([shape, SHAPES + colour, SHAPES + COLOURS + place], 1)
