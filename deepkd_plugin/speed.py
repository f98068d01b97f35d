"""Faster ways to run a training step. Every way takes the same step, to rounding."""

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config

from . import device
from .distillers.base import Distiller
from .distributed import process_group
from .divided import DividedStep
from .optim import StreamOptimizer
from .step import Batch, Outcome, Step


class CompiledStep(Step):
    """A step with both networks under torch.compile; if the first cannot be compiled, eager from there on."""

    name = "compile"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        # several backward passes read what a compiled one would give away
        functorch_config.donated_buffer = False
        self.hooks = []
        if device.reuses_memory(self.device):
            _keep_buffers(self.optimizer)
            # at every pass of the distiller, of training and of tests: what came before it is no longer needed
            self.hooks.append(self.module.register_forward_pre_hook(lambda *_: device.begin_step()))
        self.tried = False

    def gradients(self, batch: Batch, epoch: float) -> tuple[Tensor, dict[str, Tensor], Batch]:
        if self.tried:
            return super().gradients(batch, epoch)
        self.tried = True
        teacher = "teacher" if getattr(self.module, "folded", None) is None else "folded"
        networks = [getattr(self.module, part) for part in ("student", teacher) if hasattr(self.module, part)]
        for network in networks:
            network.compile(**device.compile_options(self.device))
        before = _copies(buffer for network in networks for buffer in network.buffers())
        try:
            return super().gradients(batch, epoch)
        except Exception as error:  # the compiler's own errors have no common class
            _restore(before)
            for network in networks:
                network._compiled_call_impl = None
            for hook in self.hooks:
                hook.remove()
            _say_eager(self, error)
            return super().gradients(batch, epoch)


class GraphedStep(Step):
    """A step that is captured whole as a CUDA graph and replayed.

    Its numbers are constants of the capture: the optimizer's options, such as learning rate and momenta, and what the
    distiller's `constants` names. A capture is good until one of them changes. The first steps after that run eagerly,
    as a capture needs. So do batches of another size, such as an epoch's last, and steps in which gradients are
    sampled. In a warm-up by SOLVER.WARMUP_UNIT iteration a constant changes in every step, so none of them is captured.
    If a capture fails, all steps from there on are eager.
    """

    name = "graphs"
    EAGER = 3

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        _keep_buffers(self.optimizer)
        self.captures = device.Captures()
        self.shapes: Any = None
        self.classes: int | None = None
        self.constants: Any = None
        self.seen = 0
        self.inputs: Batch = {}
        self.graph: Any = None

    def __call__(self, batch: Batch, epoch: float) -> Outcome:
        if self.name != "graphs":
            return super().__call__(batch, epoch)
        shapes = [t.shape for t in _tensors(batch)]
        self.shapes = self.shapes or shapes
        constants = self.constants_of(epoch)
        if constants != self.constants:
            self.constants, self.seen = copy.deepcopy(constants), 0
        if self.samples or shapes != self.shapes:
            return super().__call__(batch, epoch)
        self.seen += 1
        if self.seen <= self.EAGER:
            with self.captures.warm_up():
                outcome = super().__call__(batch, epoch)
            self.classes = outcome.logits.shape[1]
            return outcome
        if self.seen == self.EAGER + 1 and not self.capture(batch, epoch):
            return super().__call__(batch, epoch)
        torch._foreach_copy_(_tensors(self.inputs), _tensors(batch))
        self.graph.replay()
        return self.outcome

    def constants_of(self, epoch: float) -> Any:
        """Return every number that a capture in this epoch would contain; without a distiller's word, the epoch."""
        options = [{k: v for k, v in group.items() if k not in BOOKKEEPING} for group in self.optimizer.param_groups]
        if self.classes is None or not isinstance(self.module, Distiller):
            return options, epoch
        return options, self.module.constants(epoch, self.classes)

    def capture(self, batch: Batch, epoch: float) -> bool:
        """Capture a step on inputs of its own, in the place of the capture before; returns whether that went well."""
        if not self.inputs:
            self.inputs = {k: [t.clone() for t in v] if isinstance(v, list) else v.clone() for k, v in batch.items()}
        run = super().__call__
        before = _copies([*self.optimizer_tensors(), *self.module.buffers()])
        try:
            # the graph before lives until there is another, or their pool would end with it
            self.graph, self.outcome = self.captures.capture(lambda: run(self.inputs, epoch))
        except Exception as error:  # whatever a distiller does that a graph cannot hold
            _restore(before)
            self.graph, self.inputs = None, {}
            _say_eager(self, error)
        return self.graph is not None

    def optimizer_tensors(self) -> Iterator[Tensor]:
        """Yield the weights that the optimizer moves, and what it remembers of each."""
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                yield p
                yield from self.optimizer.state.get(p, {}).values()


class CompiledDividedStep(CompiledStep, DividedStep):
    """A divided step with both networks under torch.compile."""


STEPS: dict[str, type[Step]] = {"eager": Step, "compile": CompiledStep, "graphs": GraphedStep}
"""By SOLVER.EXECUTION."""

DIVIDED: dict[str, type[DividedStep]] = {"eager": DividedStep, "compile": CompiledDividedStep}
"""The same if the batch is divided."""

BOOKKEEPING = ("params", "momentum_shares")
"""Entries of a parameter group that are no options."""


def make_step(execution: str, distiller: nn.Module, *arguments: Any, chunk: int | None = None) -> Step:
    """Make the step of SOLVER.EXECUTION; if that cannot be, an eager one, and print the reason.

    chunk: most images in a micro-batch; None if the batch is not divided, by micro-batches or processes.
    """
    home = next(distiller.parameters()).device
    reason = ""
    if execution == "graphs" and home.type != "cuda":
        reason = f"it needs CUDA, and this run is on {home.type}"
    elif execution == "graphs" and chunk is not None:
        reason = "it takes a batch whole, and this is divided among processes or micro-batches"
    elif execution == "graphs" and device.precision(arguments[-1]) == "float16":
        reason = "the decision to skip a step of SOLVER.AMP float16 waits for the device"
    elif execution != "eager" and isinstance(distiller, nn.DataParallel) and distiller.device_ids:
        reason = "it takes one device, and DataParallel has several"
    if reason:
        print(f"SOLVER.EXECUTION {execution}: falls back to eager ({reason})")
        execution = "eager"
    if chunk is None:
        step = STEPS[execution](distiller, *arguments, home)
    else:
        step = DIVIDED[execution](distiller, *arguments, home)
        step.chunk = chunk
    step.sum_over = process_group.streams()
    return step


def _say_eager(step: Step, error: Exception) -> None:
    """Name a step eager from here on, and print in one line why."""
    reason = " ".join(str(error).split())[:200]
    print(f"SOLVER.EXECUTION {step.name}: falls back to eager ({type(error).__name__}: {reason})")
    step.name = "eager"


def _keep_buffers(optimizer: StreamOptimizer) -> None:
    """Let gradients never become buffers: the next step writes its own where they are."""
    for group in optimizer.param_groups:
        group["capturable"] = True


def _copies(tensors: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [(t, t.detach().clone()) for t in tensors]


def _restore(copies: Iterable[tuple[Tensor, Tensor]]) -> None:
    for t, before in copies:
        t.detach().copy_(before)


def _tensors(batch: Batch) -> list[Tensor]:
    return [t for part in batch.values() for t in (part if isinstance(part, list) else [part])]
