"""Faster ways to run a training step. Every way takes the same step, to rounding."""

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config

from . import device
from .step import Batch, Outcome, Step


class CompiledStep(Step):
    """A step with both networks under torch.compile; if the first cannot be compiled, eager from there on."""

    name = "compile"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        module = getattr(self.distiller, "module", self.distiller)
        self.networks = [getattr(module, part) for part in ("student", "teacher") if hasattr(module, part)]
        for network in self.networks:
            network.compile(**device.compile_options(self.device))
        # several backward passes read what a compiled one would give away
        functorch_config.donated_buffer = False
        self.tried = False

    def gradients(self, batch: Batch, epoch: float) -> Outcome:
        if self.tried:
            return super().gradients(batch, epoch)
        self.tried = True
        buffers = [(b, b.clone()) for network in self.networks for b in network.buffers()]
        try:
            return super().gradients(batch, epoch)
        except Exception as error:  # the compiler's own errors have no common class
            for buffer, before in buffers:
                buffer.copy_(before)
            for network in self.networks:
                network._compiled_call_impl = None
            self.name = "eager"
            reason = " ".join(str(error).split())[:200]
            print(f"SOLVER.EXECUTION compile: falls back to eager ({type(error).__name__}: {reason})")
            return super().gradients(batch, epoch)


class GraphedStep(Step):
    """A step that is captured whole as a CUDA graph, anew in every epoch, and replayed.

    Learning rate, mask size and warm-up are constants of an epoch, so a capture may contain them. Momenta that the
    GSNR sets end it. The first steps after either run eagerly, as a capture needs. So do batches of another size, such
    as the last, and steps in which gradients are sampled. While a warm-up by SOLVER.WARMUP_UNIT iteration lasts, the
    learning rate or the losses' factor is another in every step; so is `epoch`, and none of them is captured.
    """

    name = "graphs"
    EAGER = 3

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.optimizer.capturable = True
        self.constants: Any = None
        self.seen = 0
        self.graph: Any = None

    def __call__(self, batch: Batch, epoch: float) -> Outcome:
        tensors = _tensors(batch)
        if self.constants is None or epoch != self.constants[0]:
            self.shapes = [t.shape for t in tensors]
        constants = (epoch, dict(self.optimizer.param_groups[0]["momentum"]))
        if constants != self.constants:
            self.constants, self.seen, self.graph = constants, 0, None
        if self.samples or [t.shape for t in tensors] != self.shapes:
            return super().__call__(batch, epoch)
        self.seen += 1
        if self.seen <= self.EAGER:
            with device.side_stream():
                return super().__call__(batch, epoch)
        if self.graph is None:
            self.inputs = {k: [t.clone() for t in v] if isinstance(v, list) else v.clone() for k, v in batch.items()}
            run = super().__call__
            self.graph, self.outcome = device.capture(lambda: run(self.inputs, epoch))
        torch._foreach_copy_(_tensors(self.inputs), tensors)
        self.graph.replay()
        return self.outcome


STEPS: dict[str, type[Step]] = {"eager": Step, "compile": CompiledStep, "graphs": GraphedStep}
"""By SOLVER.EXECUTION."""


def make_step(execution: str, distiller: nn.Module, *arguments: Any) -> Step:
    """Make the step of SOLVER.EXECUTION; if that cannot be, an eager one, and print the reason."""
    home = next(distiller.parameters()).device
    reason = ""
    if execution == "graphs" and home.type != "cuda":
        reason = f"it needs CUDA, and this run is on {home.type}"
    elif execution != "eager" and isinstance(distiller, nn.DataParallel) and distiller.device_ids:
        reason = "it takes one device, and DataParallel has several"
    if reason:
        print(f"SOLVER.EXECUTION {execution}: falls back to eager ({reason})")
        execution = "eager"
    return STEPS[execution](distiller, *arguments, home)


def choose_gradients(wanted: str, step: Step, batch: Callable[[], Batch], apart: bool = False) -> str:
    """Choose how a step makes several backward passes: "sequential" or "batched" (see streams.backward_by_set).

    wanted: SOLVER.GRADIENTS. "auto" measures both on copies on a GPU. On a CPU sequential was the faster in
    every row of docs/performance.md, and with equal coefficients there is one pass. apart: streams that are equal
    now will not stay so.
    """
    if wanted != "auto":
        return wanted
    one_pass = len(set(step.optimizer.param_groups[0]["momentum"].values())) == 1 and not apart
    if step.device.type != "cuda" or one_pass:
        return "sequential"
    return faster(step, batch(), apart)


def faster(step: Step, batch: Batch, apart: bool = False, rounds: int = 10) -> str:
    """Return the faster of the two on copies of the networks, by medians of `rounds` taken in turn."""
    distiller, optimizer = copy.deepcopy((step.distiller, step.optimizer))
    for group in optimizer.param_groups:
        group["merge"] &= not apart
    trial = Step(distiller.train(), optimizer, step.by_stream, step.amp, step.device)
    times: dict[str, list[float]] = {"sequential": [], "batched": []}
    for turn in range(rounds + 3):
        for name, taken in times.items():
            optimizer.batched = name == "batched"
            device.synchronise(step.device)
            start = time.perf_counter()
            try:
                trial.gradients(batch, 1)
            except RuntimeError as error:  # an operation that cannot be mapped over stacked gradients
                print(f"SOLVER.GRADIENTS auto: sequential ({str(error).split(chr(10))[0]})")
                return "sequential"
            device.synchronise(step.device)
            if turn >= 3:
                taken.append(time.perf_counter() - start)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    best = min(medians, key=medians.get)
    shown = ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in medians.items())
    print(f"SOLVER.GRADIENTS auto: {best} ({shown} for forward and backward)")
    return best


def _tensors(batch: Batch) -> list[Tensor]:
    return [t for part in batch.values() for t in (part if isinstance(part, list) else [part])]
