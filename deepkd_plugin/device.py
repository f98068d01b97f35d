"""The only module that knows which device a run is on."""

import contextlib
import functools
import os
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .errors import UserError

WORKSPACE, REPEATABLE = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")
"""The environment variable that cuBLAS reads when CUDA starts, and its values under which equal sums repeat."""

NOT_REPEATABLE = "does not have a deterministic implementation"
"""What PyTorch says of an operation that deterministic algorithms are asked of in vain."""


def pick() -> torch.device:
    """Return the CUDA device if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def take(number: int) -> None:
    """Make one of the machine's CUDA devices this process's; UserError if there are not so many. Nothing on a CPU."""
    if torch.cuda.is_available():
        if number >= torch.cuda.device_count():
            raise UserError(
                f"environment: LOCAL_RANK is {number}; it must be below the CUDA devices here, "
                f"{torch.cuda.device_count()}"
            )
        torch.cuda.set_device(number)


def generators(device: torch.device) -> Tensor:
    """Return the states of torch's generators of the CPU and of a device, as bytes (n,) on the CPU."""
    states = [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])
    return torch.cat(states)


def set_generators(device: torch.device, states: Tensor) -> None:
    """Put back what `generators` returned."""
    length = len(torch.get_rng_state())
    torch.set_rng_state(states[:length].clone())
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[length:].clone(), device)


def tune(deterministic: bool = False) -> None:
    """Let cuDNN find the fastest algorithms for batches of one size, as mdistiller's scripts do.

    deterministic: take algorithms that repeat their results bit for bit instead, in all of PyTorch. Raises UserError
    if cuBLAS cannot do so any more: it reads WORKSPACE when CUDA starts.
    """
    torch.backends.cudnn.benchmark = not deterministic
    if not deterministic:
        return
    given = os.environ.get(WORKSPACE, REPEATABLE[0])
    late = WORKSPACE not in os.environ and torch.cuda.is_initialized()
    if late or given not in REPEATABLE:
        found = "not set, and CUDA has started already" if late else repr(given)
        raise UserError(
            f"environment: {WORKSPACE} is {found}; it must be {' or '.join(REPEATABLE)} with SOLVER.DETERMINISTIC"
        )
    os.environ[WORKSPACE] = given
    torch.backends.cudnn.deterministic = True
    torch.use_deterministic_algorithms(True)


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Turn PyTorch's error for an operation without a deterministic algorithm into a UserError that names both."""
    try:
        yield
    except RuntimeError as error:
        if NOT_REPEATABLE not in str(error):
            raise
        operation = str(error).split(NOT_REPEATABLE)[0].split()[-1]
        raise UserError(
            f"SOLVER.DETERMINISTIC is True, and {operation} {NOT_REPEATABLE} on this device; set it to False, or take "
            f"networks without this operation"
        ) from error


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
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}, {torch.backends.cpu.get_cpu_capability()}"


def place(module: nn.Module, device: torch.device, channels_last: Any) -> nn.Module:
    """Move a module to the device, its weights in channels-last order if that is True (not if it is still `auto`)."""
    return module.to(device, memory_format=torch.channels_last if channels_last is True else torch.preserve_format)


def place_batch(batch: Any, device: torch.device, channels_last: Any) -> Any:
    """Move a batch (tensors or lists of them) to the device; images (B, C, H, W) in channels-last order if True."""
    if isinstance(batch, Tensor):
        images = channels_last is True and batch.ndim == 4
        order = torch.channels_last if images else torch.preserve_format
        return batch.to(device, non_blocking=True, memory_format=order)
    return [place_batch(part, device, channels_last) for part in batch]


def settings(device: torch.device) -> dict[str, str]:
    """Return what numbers on a GPU depend on beside the code: CUDA, cuDNN, float32 products; {} on a CPU."""
    if device.type != "cuda":
        return {}
    precisions = {"matmul": torch.backends.cuda.matmul, "convolution": torch.backends.cudnn.conv}
    return {
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        # "none" is the default: matmul in float32
        **{f"{name} precision": backend.fp32_precision for name, backend in precisions.items()},
    }


def parallel(module: nn.Module, asked: bool, always: bool = False) -> nn.Module:
    """Wrap a module in DataParallel if it is asked for and there are several GPUs.

    asked: SOLVER.DATA_PARALLEL. If it is False, all but one of several GPUs stay idle, and this is said. always: wrap
    it in any case, as mdistiller's trainers expect.
    """
    if always or (asked and count() > 1):
        return nn.DataParallel(module)
    if count() > 1:
        print(f"uses 1 of {count()} GPUs; SOLVER.DATA_PARALLEL True splits each batch over all")
    return module


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
    """Return torch.compile's options: a network for each size of batch, on a GPU with its CUDA graphs."""
    return {"dynamic": False} | ({"mode": "reduce-overhead"} if device.type == "cuda" else {})


def reuses_memory(device: torch.device) -> bool:
    """Tell whether networks with compile_options write their results where those of the step before are."""
    return device.type == "cuda"


def begin_step() -> None:
    """Tell compiled networks that what they returned so far is no longer needed, and all that follows is."""
    torch.compiler.cudagraph_mark_step_begin()


class Captures:
    """What the CUDA graphs of a run share: the stream that they are captured on, and a pool of memory.

    A graph must not be replayed once another was captured after it. It must live until then, and the pool with it.
    """

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.pool = torch.cuda.graph_pool_handle()

    @contextlib.contextmanager
    def warm_up(self) -> Iterator[None]:
        """Run on the captures' stream, which what is captured later must have done; the current stream then waits."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield
        torch.cuda.current_stream().wait_stream(self.stream)

    def capture(self, function: Callable[[], Any]) -> tuple[Any, Any]:
        """Capture what a function launches as a CUDA graph, not yet run; returns it and what a replay fills.

        Other threads, as the one that pins memory for a loader, may call CUDA meanwhile. If the function fails, nothing
        was launched, and stream, allocator and generator of random numbers are as before.
        """
        graph, stream, index = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), torch.cuda.current_device()
        generator = torch.cuda.default_generators[index]
        before = generator.clone_state()
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                result = function()
        except Exception:
            # torch.cuda.graph leaves its own stream current, and an older PyTorch its pool, if it ends by an error
            torch.cuda.set_stream(stream)
            with contextlib.suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(index, self.pool)
            generator.graphsafe_set_state(before)
            raise
        return graph, result


def precision(amp: bool | str) -> str:
    """Name what networks compute in under a value of SOLVER.AMP: float32, bfloat16 or float16."""
    return amp if isinstance(amp, str) else "bfloat16" if amp else "float32"


def autocast(device: torch.device, amp: bool | str) -> contextlib.AbstractContextManager[Any]:
    """Return the autocast of SOLVER.AMP; False: nothing."""
    dtype = torch.float16 if precision(amp) == "float16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=bool(amp))


def autocast_within(module: nn.Module, device: torch.device, amp: bool | str = True) -> None:
    """Let every forward pass of a module run under the autocast of SOLVER.AMP, whichever thread calls it.

    Autocast is a setting of a thread, and DataParallel calls the module in a thread for each device.
    """
    thread = threading.local()

    def enter(module: nn.Module, inputs: Any) -> None:
        thread.context = autocast(device, amp)
        thread.context.__enter__()

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        thread.context.__exit__(None, None, None)

    module.register_forward_pre_hook(enter)
    # first of all, so that of several such pairs the last to enter is the first to leave
    module.register_forward_hook(leave, always_call=True, prepend=True)


@contextlib.contextmanager
def whole_float32() -> Iterator[None]:
    """Compute convolutions in all bits of float32, where a GPU would round their inputs to TensorFloat-32."""
    convolutions = torch.backends.cudnn.conv
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "ieee"
    try:
        yield
    finally:
        convolutions.fp32_precision = before


@functools.cache
def _in_float32(cls: type[nn.Module]) -> type[nn.Module]:
    """Return a kind of layer that computes in float32 under autocast, and is `cls` otherwise."""

    def forward(self: nn.Module, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return cls.forward(self, features.float())

    return type(cls.__name__, (cls,), {"forward": forward, "__module__": __name__, "in_float32": True})


def classify_in_float32(network: nn.Module) -> None:
    """Let a network's last linear layer compute in float32 under autocast; one without such a layer stays as it is.

    bfloat16 has 8 bits, so among 100 logits many would be equal, and which are the largest would be chance. Weights,
    their names and what the network computes without autocast do not change. A second call changes nothing.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
    if layers and not hasattr(layers[-1], "in_float32"):
        layers[-1].__class__ = _in_float32(type(layers[-1]))


def shapes_only() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which networks are built with shapes but without memory."""
    return torch.device("meta")


def seed_everything(seed: int, epoch: int = 0, process: int = 0) -> None:
    """Seed Python, numpy and torch for one epoch (0: before the first), in one of the processes of a run.

    Every epoch starts from its own state, so a resumed run sees the same images in the same order as an uninterrupted
    one, and no generator's state needs to be stored.
    """
    key = (seed, epoch, process) if process else (seed, epoch)
    words = np.random.SeedSequence(key).generate_state(3)
    random.seed(int(words[0]))
    # torchvision's and other people's transforms may draw from numpy's global generator
    np.random.seed(int(words[1]))  # noqa: NPY002
    torch.manual_seed(int(words[2]))
