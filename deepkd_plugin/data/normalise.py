"""Pixels in bytes become what networks take: on the device, whole batches at once."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..device import place_batch


class Normalise:
    """Do what ToTensor and Normalize do, operation by operation: (…, C, H, W) uint8 to float32, on one device."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device | str) -> None:
        # the divisor too, since CUDA multiplies by the reciprocal of a Python number
        constants = (torch.full((len(mean),), 255.0), torch.tensor(mean), torch.tensor(std))
        self.white, self.mean, self.std = (c.to(device)[:, None, None] for c in constants)

    def __call__(self, images: Tensor) -> Tensor:
        return images.float().div_(self.white).sub_(self.mean).div_(self.std)


class NormalisingLoader:
    """A loader whose batches begin with images in bytes, (B, C, H, W) or a list of views; used like a DataLoader.

    It gives the same batches on a device, images normalised, to whoever iterates: a byte of a pixel crosses from
    processes and to a GPU, not the four of a float. `collate_fn` makes such a batch of samples of `dataset`.
    """

    def __init__(self, loader: DataLoader, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        self.loader, self.device, self.normalise = loader, device, Normalise(mean, std, device)
        self.dataset, self.sampler, self.batch_size = loader.dataset, loader.sampler, loader.batch_size
        self.batch_sampler = loader.batch_sampler

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[list[Any]]:
        return map(self._finish, self.loader)

    def collate_fn(self, samples: Sequence[Any]) -> list[Any]:
        """Make a batch of samples, as iterating does."""
        return self._finish(self.loader.collate_fn(samples))

    def _finish(self, batch: Sequence[Any]) -> list[Any]:
        image, *rest = place_batch(batch, self.device, channels_last=False)
        views = [self.normalise(view) for view in image] if isinstance(image, list) else self.normalise(image)
        return [views, *rest]
