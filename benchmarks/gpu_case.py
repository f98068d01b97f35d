"""What the rows of gpu_checks.py are made of: the machine, networks, steps and batches, and how runs are compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deepkd_plugin import DecoupledMomentumSGD, data
from deepkd_plugin.config.tree import add_deepkd_config
from deepkd_plugin.distillers import DeepKD
from deepkd_plugin.hosts import builtin, registry
from deepkd_plugin.hosts.networks import trained_network
from deepkd_plugin.speed import STEPS
from deepkd_plugin.step import Step
from deepkd_plugin.streams import assign_losses

MOMENTUM = {"tog": 0.975, "tcg": 0.825, "ncg": 0.95}
SMALL, LARGE = "resnet20:resnet8", "resnet32x4:resnet8x4"
"""Pairs, teacher first; the small one's teacher is trained."""


@dataclass(frozen=True)
class Case:
    """What all rows run on."""

    device: torch.device
    root: Path
    """A folder with glyphs100."""

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def batch(self) -> int:
        return 64 if self.cuda else 8


Finding = tuple[Any, bool]
"""What was measured, and whether it is as claimed."""


class Row(NamedTuple):
    """A claim, and how it is checked."""

    claim: str
    needs_cuda: bool
    check: Callable[[Case], Finding]


ROWS: dict[str, Row] = {}


def row(claim: str, needs_cuda: bool = True) -> Callable[[Callable[[Case], Finding]], Callable[[Case], Finding]]:
    """Make a function a row of its own name."""

    def add(check: Callable[[Case], Finding]) -> Callable[[Case], Finding]:
        ROWS[check.__name__] = Row(claim, needs_cuda, check)
        return check

    return add


# What rows are made of


def config_of(case: Case, **solver: Any) -> Any:
    cfg = builtin.CFG.clone()
    add_deepkd_config(cfg)
    cfg.DATASET.update({"TYPE": "glyphs100", "ROOT": str(case.root), "NUM_WORKERS": 0, "TRAIN_PER_CLASS": 5})
    cfg.SOLVER.update({"EPOCHS": 3, "BATCH_SIZE": case.batch} | solver)
    return cfg


def teacher_of(case: Case) -> nn.Module:
    """Return the trained teacher of the embedded default."""
    made = trained_network(registry.BUILTIN, "glyphs100", "resnet20", 100, "builtin:glyphs100_resnet20", "")
    return made.to(case.device).eval()


def images_of(case: Case, count: int) -> tuple[Tensor, Tensor]:
    """Return test images (B, 3, 32, 32) and labels of glyphs100."""
    loader, _ = data.get_test_set(config_of(case))
    samples = [loader.dataset[i * len(loader.dataset) // count] for i in range(count)]
    image, label = zip(*samples)
    return torch.stack(image).to(case.device), torch.tensor(label, device=case.device)


def step_of(
    case: Case,
    way: str = "eager",
    pair: str = SMALL,
    method: type[nn.Module] = DeepKD,
    momentum: Mapping[str, float] = MOMENTUM,
    amp: bool = False,
    capturable: bool = False,
) -> Step:
    """Make a step of a pair; the same networks for every way."""
    torch.manual_seed(0)
    names = pair.split(":")
    student = builtin.cifar_model_dict[names[1]][0](num_classes=100)
    teacher = builtin.cifar_model_dict[names[0]][0](num_classes=100) if pair != SMALL else teacher_of(case)
    module = method(student, teacher.requires_grad_(False), config_of(case)).to(case.device).train()
    decay_stream = "tcg" if "tcg" in momentum else None
    params = module.get_learnable_parameters()
    optimizer = DecoupledMomentumSGD(params, 0.01, momentum, 5e-4, decay_stream, capturable=capturable)
    streams = optimizer.streams
    return STEPS[way](module, optimizer, lambda losses: assign_losses(losses, streams, {}), amp, case.device)


def batches_of(case: Case, count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        image = torch.randn(case.batch, 3, 32, 32, generator=generator)
        target = torch.randint(100, (case.batch,), generator=generator)
        made.append({"image": image.to(case.device), "target": target.to(case.device)})
    return made


def take(step: Step, batches: Sequence[Mapping[str, Tensor]], epochs: int = 3) -> list[Tensor]:
    """Take steps, of a changing mask and learning rate; returns the losses of each, and all weights as one.

    The rates are low, because training makes any difference of rounding grow.
    """
    seen = []
    for epoch in range(1, epochs + 1):
        step.optimizer.param_groups[0]["lr"] = 1e-3 if epoch < epochs else 1e-4
        for batch in batches:
            seen.append(torch.stack(list(step(batch, epoch).losses.values())))
    return [*seen, torch.cat([p.detach().flatten() for p in step.module.get_learnable_parameters()])]


def distance(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Return the largest difference of two runs, each tensor's in times of its norm."""
    apart = 0.0
    for a, b in zip(one, other, strict=True):
        a, b = a.double(), b.double()
        apart = max(apart, float((a - b).norm() / a.norm().clamp_min(1e-12)))
    return apart if math.isfinite(apart) else math.inf


def buffers_of(step: Step) -> list[Tensor]:
    return [buffer for state in step.optimizer.state.values() for buffer in state.values()]


class exact:  # noqa: N801 (a context)
    """Let convolutions and products of float32 be float32's, by algorithms that do not change between steps."""

    def __enter__(self) -> None:
        self.before = torch.backends.cudnn.conv.fp32_precision, torch.backends.cudnn.benchmark
        torch.backends.cudnn.conv.fp32_precision, torch.backends.cudnn.benchmark = "ieee", False

    def __exit__(self, *error: object) -> None:
        torch.backends.cudnn.conv.fp32_precision, torch.backends.cudnn.benchmark = self.before
