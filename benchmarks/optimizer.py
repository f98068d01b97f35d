"""The optimizer's step alone against torch.optim.SGD(foreach), on 330 tensors.

    python benchmarks/optimizer.py [--rounds 50] [--widths 16 64] [--write PATH.md]

330 tensors are 110 layers of a 3 × 3 convolution and a BatchNorm, of the given width. Gradients by stream are
put in place before each timed step. "per buffer" is the ratio to SGD over the number of buffers. State: what the
optimizer keeps between steps, beyond the parameters; peak: what a few steps with their backward passes hold.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from common import medians_in_turn, peak_mebibytes, report
from torch import Tensor

from deepkd_plugin import DecoupledMomentumSGD, device

Parts = tuple[torch.optim.Optimizer, Callable[[], None]]
"""An optimizer and the backward pass that gives it gradients."""

MOMENTA = {
    "1 buffer": {"tog": 0.9, "tcg": 0.9, "ncg": 0.9},
    "2 buffers": {"tog": 0.975, "tcg": 0.825, "ncg": 0.975},
    "3 buffers": {"tog": 0.975, "tcg": 0.825, "ncg": 0.95},
}


def tensors(width: int) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(width, width, 3, 3), (width,), (width,)] * 110
    torch_device = device.pick()
    return [torch.randn(shape, device=torch_device).requires_grad_() for shape in shapes]


def linear_losses(params: list[Tensor]) -> Callable[[], dict[str, Tensor]]:
    """Make losses of three streams whose gradients are fixed, so that backward is the same work for all."""
    gradients = [torch.randn_like(p) for p in params]
    return lambda: {s: sum((p * g).sum() for p, g in zip(params, gradients)) for s in ("tog", "tcg", "ncg")}


def sgd_parts(width: int) -> Parts:
    params = tensors(width)
    optimizer = torch.optim.SGD(params, 1e-3, 0.9, weight_decay=5e-4, foreach=True)
    losses = linear_losses(params)

    def backward() -> None:
        optimizer.zero_grad()
        sum(losses().values()).backward()

    return optimizer, backward


def ours_parts(width: int, momentum: dict[str, float]) -> Parts:
    params = tensors(width)
    optimizer = DecoupledMomentumSGD(params, 1e-3, momentum, 5e-4, "tcg")
    losses = linear_losses(params)

    def backward() -> None:
        optimizer.zero_grad()
        optimizer.backward(losses())

    return optimizer, backward


def whole_step(make: Callable[[], Parts]) -> Callable[[], None]:
    optimizer, backward = make()

    def step() -> None:
        backward()
        optimizer.step()

    return step


def state_mebibytes(optimizer: torch.optim.Optimizer) -> float:
    """Return the size of the optimizer's state."""
    values = [value for state in optimizer.state.values() for value in state.values()]
    flat = [t for value in values for t in (value if isinstance(value, list) else [value]) if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in flat) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--widths", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--write", type=Path, help="Markdown file to write; a .json is written beside it")
    args = parser.parse_args()
    rows = []
    for width in args.widths:
        makers = {"torch.optim.SGD": functools.partial(sgd_parts, width)} | {
            name: functools.partial(ours_parts, width, momentum) for name, momentum in MOMENTA.items()
        }
        memory = {name: peak_mebibytes(functools.partial(whole_step, make)) for name, make in makers.items()}
        built = {name: make() for name, make in makers.items()}
        steps = {}
        for name, (optimizer, backward) in built.items():
            steps[f"{name} gradients"] = backward
            steps[name] = optimizer.step
        times = medians_in_turn(steps, args.rounds)
        parameters = sum(p.numel() * p.element_size() for p in tensors(width)) / 2**20
        for name, (optimizer, _) in built.items():
            ratio = times[name] / times["torch.optim.SGD"]
            buffers = len(set(MOMENTA[name].values())) if name in MOMENTA else 1
            rows.append(
                {
                    "width": width,
                    "parameters MiB": parameters,
                    "step": name,
                    "ms": times[name],
                    "ratio to SGD": ratio,
                    "per buffer": ratio / buffers,
                    "state MiB": state_mebibytes(optimizer),
                    "peak MiB": memory[name],
                }
            )
    report(f"Optimizer step on 330 tensors, medians of {args.rounds} rounds in turn", rows, args.write)


if __name__ == "__main__":
    main()
