"""The only module that knows which device a run is on."""

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def pick() -> torch.device:
    """Return the CUDA device if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def tune() -> None:
    """Let cuDNN find the fastest algorithms for batches of one size, as mdistiller's scripts do."""
    torch.backends.cudnn.benchmark = True


def count() -> int:
    """Return how many CUDA devices there are."""
    return torch.cuda.device_count()


def use_threads(number: object) -> None:
    """Compute with so many threads on the CPU, if it is a number: sums in another order round otherwise."""
    if type(number) is int and number > 0:
        torch.set_num_threads(number)


def describe(device: torch.device) -> str:
    """Name the device, for the record of a run."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def place(module: nn.Module, device: torch.device, channels_last: bool) -> nn.Module:
    """Move a module to the device, its weights in channels-last order if asked for."""
    return module.to(device, memory_format=torch.channels_last if channels_last else torch.preserve_format)


def place_batch(batch: Any, device: torch.device, channels_last: bool) -> Any:
    """Move a batch (tensors or lists of them) to the device; images (B, C, H, W) in channels-last order if asked."""
    if isinstance(batch, Tensor):
        images = channels_last and batch.ndim == 4
        order = torch.channels_last if images else torch.preserve_format
        return batch.to(device, non_blocking=True, memory_format=order)
    return [place_batch(part, device, channels_last) for part in batch]


def parallel(module: nn.Module, always: bool = False) -> nn.Module:
    """Wrap a module in DataParallel if there are several GPUs, or `always`, as mdistiller's trainers expect."""
    return nn.DataParallel(module) if always or count() > 1 else module


def tolerate_cuda_calls() -> None:
    """Without CUDA, let `.cuda()` leave tensors and modules where they are.

    mdistiller calls it in 21 places; all of them are mended here.
    """
    if torch.cuda.is_available():
        return

    def stay(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self

    Tensor.cuda = stay
    nn.Module.cuda = stay


def synchronise(device: torch.device) -> None:
    """Wait until the device has done everything it was asked to do, before reading a clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release() -> None:
    """Release cached GPU memory before other processes on this machine need it."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def compile_options(device: torch.device) -> dict[str, Any]:
    """Return torch.compile's options: on a GPU it uses its CUDA graphs."""
    return {"mode": "reduce-overhead"} if device.type == "cuda" else {}


@contextlib.contextmanager
def side_stream() -> Iterator[None]:
    """Run on a CUDA stream of its own, which warm-up before a capture needs; the current stream then waits."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def capture(function: Callable[[], Any]) -> tuple[Any, Any]:
    """Capture what a function launches as a CUDA graph, not yet run; returns it and the tensors that a replay fills."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


def autocast(device: torch.device, enabled: bool) -> contextlib.AbstractContextManager[Any]:
    """Return bfloat16 autocast, or nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def shapes_only() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which networks are built with shapes but without memory."""
    return torch.device("meta")


def seed_everything(seed: int, epoch: int = 0) -> None:
    """Seed Python, numpy and torch for one epoch (0: before the first).

    Every epoch starts from its own state, so a resumed run sees the same images in the same order as an uninterrupted
    one, and no generator's state needs to be stored.
    """
    words = np.random.SeedSequence((seed, epoch)).generate_state(3)
    random.seed(int(words[0]))
    # torchvision's and other people's transforms may draw from numpy's global generator
    np.random.seed(int(words[1]))  # noqa: NPY002
    torch.manual_seed(int(words[2]))
