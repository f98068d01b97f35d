"""The one place that knows which device a run is on."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def pick() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def tune() -> None:
    """Let cuDNN measure which algorithms suit the batches' one size, as mdistiller's scripts do."""
    torch.backends.cudnn.benchmark = True


def count() -> int:
    """How many CUDA devices there are."""
    return torch.cuda.device_count()


def describe(device: torch.device) -> str:
    """The device's name, for the record of a run."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def place(module: nn.Module, device: torch.device, channels_last: bool) -> nn.Module:
    """The module on the device, its weights in channels-last order if asked for."""
    return module.to(device, memory_format=torch.channels_last if channels_last else torch.preserve_format)


def place_batch(batch: Any, device: torch.device, channels_last: bool) -> Any:
    """A batch (tensors, or lists of them) on the device; images (B, C, H, W) in channels-last order if asked for."""
    if isinstance(batch, Tensor):
        images = channels_last and batch.ndim == 4
        order = torch.channels_last if images else torch.preserve_format
        return batch.to(device, non_blocking=True, memory_format=order)
    return [place_batch(part, device, channels_last) for part in batch]


def parallel(module: nn.Module, always: bool = False) -> nn.Module:
    """The module in DataParallel where there are several GPUs, or always (mdistiller's trainers expect it)."""
    return nn.DataParallel(module) if always or count() > 1 else module


def tolerate_cuda_calls() -> None:
    """On a machine without CUDA, let `.cuda()` leave tensors and modules where they are.

    mdistiller calls it in 21 places; this is the one place where they all meet.
    """
    if torch.cuda.is_available():
        return

    def stay(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self

    Tensor.cuda = stay
    nn.Module.cuda = stay


def synchronise(device: torch.device) -> None:
    """Wait for everything that the device was asked to do, before reading a clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release() -> None:
    """Give cached GPU memory back, before other processes of this machine need it."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def compile_options(device: torch.device) -> dict[str, Any]:
    """torch.compile's: on a GPU with its CUDA graphs."""
    return {"mode": "reduce-overhead"} if device.type == "cuda" else {}


@contextlib.contextmanager
def side_stream() -> Iterator[None]:
    """A CUDA stream beside the current one, which waits for it: what runs before a capture has to run there."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def capture(function: Callable[[], Any]) -> tuple[Any, Any]:
    """A CUDA graph of what the function launches, not yet run, and the tensors that a replay fills."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


def autocast(device: torch.device, enabled: bool) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 autocast, or nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def shapes_only() -> contextlib.AbstractContextManager[Any]:
    """Networks made inside have shapes and no memory."""
    return torch.device("meta")


def seed_everything(seed: int, epoch: int = 0) -> None:
    """Seed Python, numpy and torch for one epoch (0: before the first).

    Every epoch starts from a state of its own, so that a resumed run sees the same images in the same
    order as one that was never interrupted, without any generator's state being stored.
    """
    words = np.random.SeedSequence((seed, epoch)).generate_state(3)
    random.seed(int(words[0]))
    # torchvision's and other people's transforms may draw from numpy's global generator
    np.random.seed(int(words[1]))  # noqa: NPY002
    torch.manual_seed(int(words[2]))
