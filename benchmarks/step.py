"""A DeepKD training step against a plain KD step of the same pair, in one process and in turn.

    python benchmarks/step.py [--rounds 15] [--batch 64] [--pairs resnet56:resnet20 …] [--write PATH.md]

The KD step is KD's loss, one backward pass and torch.optim.SGD(foreach). The floor is what the arithmetic of
two backward passes costs beyond one: (teacher forward + student forward + 2 backward) over the same with one.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import medians_in_turn, peak_mebibytes, report

from deepkd_plugin import DecoupledMomentumSGD, builtin, device
from deepkd_plugin.config import add_deepkd_config
from deepkd_plugin.distillers import KD, DeepKD

COEFFICIENTS = {
    "DeepKD, 2 coefficients": {"tog": 0.975, "tcg": 0.825, "ncg": 0.975},
    "DeepKD, 3 coefficients": {"tog": 0.975, "tcg": 0.825, "ncg": 0.95},
}


def setting(pair: str, batch: int, method: Any) -> tuple[Any, dict[str, Any]]:
    """A distiller of an untrained pair and a batch of noise."""
    cfg = builtin.CFG.clone()
    add_deepkd_config(cfg)
    at = device.pick()
    torch.manual_seed(0)
    teacher, student = (builtin.cifar_model_dict[name][0](num_classes=100) for name in pair.split(":"))
    distiller = device.place(method(student, teacher.requires_grad_(False), cfg), at, channels_last=False)
    data = {"image": torch.randn(batch, 3, 32, 32).to(at), "target": torch.randint(0, 100, (batch,)).to(at)}
    return distiller.train(), data | {"epoch": 1}


def kd_step(pair: str, batch: int) -> Callable[[], None]:
    distiller, data = setting(pair, batch, KD)
    optimizer = torch.optim.SGD(distiller.student.parameters(), 0.01, 0.9, weight_decay=5e-4, foreach=True)

    def step() -> None:
        optimizer.zero_grad()
        sum(distiller(**data)[1].values()).backward()
        optimizer.step()

    return step


def deepkd_step(pair: str, batch: int, momentum: dict[str, float]) -> Callable[[], None]:
    distiller, data = setting(pair, batch, DeepKD)
    optimizer = DecoupledMomentumSGD(distiller.student.parameters(), 0.01, momentum, 5e-4, "tcg")

    def step() -> None:
        optimizer.zero_grad()
        optimizer.backward(distiller(**data)[1])
        optimizer.step()

    return step


def parts(pair: str, batch: int) -> dict[str, Callable[[], Any]]:
    """The pieces of the floor: both forward passes, and the student's forward with its backward."""
    distiller, data = setting(pair, batch, KD)

    def forward_backward() -> None:
        distiller.student.zero_grad()
        distiller.student(data["image"])[0].sum().backward()

    def teacher() -> None:
        with torch.no_grad():
            distiller.teacher(data["image"])

    return {"F_t": teacher, "F_s": lambda: distiller.student(data["image"]), "F_s + B": forward_backward}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--pairs", nargs="+", default=["resnet56:resnet20", "resnet32x4:resnet8x4"])
    parser.add_argument(
        "--no-memory", action="store_true", help="leave out peak memory, a process for each step"
    )
    parser.add_argument("--write", type=Path, help="Markdown file to write; a .json is written beside it")
    args = parser.parse_args()
    rows = []
    for pair in args.pairs:
        makers = {"KD": functools.partial(kd_step, pair, args.batch)} | {
            name: functools.partial(deepkd_step, pair, args.batch, momentum)
            for name, momentum in COEFFICIENTS.items()
        }
        memory = {} if args.no_memory else {name: peak_mebibytes(make) for name, make in makers.items()}
        steps = {name: make() for name, make in makers.items()}
        times = medians_in_turn(steps | parts(pair, args.batch), args.rounds)
        backward = times["F_s + B"] - times["F_s"]
        once = times["F_t"] + times["F_s + B"]
        for passes, name in enumerate(makers, start=1):
            rows.append(
                {
                    "pair": pair.replace(":", " → "),
                    "step": name,
                    "ms": times[name],
                    "ratio to KD": times[name] / times["KD"],
                    "floor": (once + (passes - 1) * backward) / once,
                }
                | ({"peak MiB": memory[name]} if memory else {})
            )
    report(f"Training step, batch {args.batch}, medians of {args.rounds} rounds in turn", rows, args.write)


if __name__ == "__main__":
    main()
