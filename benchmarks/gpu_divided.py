"""Rows of gpu_checks.py about steps whose batch is divided, among processes or in micro-batches, and about float16."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from gpu_case import MOMENTUM, Case, Finding, batches_of, config_of, distance, exact, row, take
from torch import Tensor, nn

from deepkd_plugin import DecoupledMomentumSGD
from deepkd_plugin.distillers import DeepKD
from deepkd_plugin.divided import DividedStep
from deepkd_plugin.step import Step
from deepkd_plugin.streams import assign_losses


class Plain(nn.Module):
    """A network without BatchNorm, which would see parts of a batch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 4, 4), nn.Tanh(), nn.Flatten(), nn.Linear(64 * width, 100))

    def forward(self, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.body(image), {}


def plain_step(case: Case, way: type[Step] = Step, amp: bool | str = False) -> Step:
    """Make a step of DeepKD on such networks; the same ones for every way."""
    torch.manual_seed(0)
    student, teacher = Plain(8), Plain(16).requires_grad_(False)
    module = DeepKD(student, teacher, config_of(case)).to(case.device).train()
    optimizer = DecoupledMomentumSGD(module.get_learnable_parameters(), 0.01, MOMENTUM, 5e-4, "tcg")
    return way(module, optimizer, lambda losses: assign_losses(losses, optimizer.streams, {}), amp, case.device)


@row("SOLVER.ACCUMULATE: steps of four micro-batches are those of the whole batch to 1e-5", needs_cuda=False)
def accumulation(case: Case) -> Finding:
    batches = batches_of(case, 6)
    with exact():
        expected = take(plain_step(case), batches)
        step = plain_step(case, DividedStep)
        step.chunk = case.batch // 4
        apart = distance(expected, take(step, batches))
    return {"difference": apart}, apart <= 1e-5


@row("SOLVER.AMP float16: float32's steps to 2e-2; an overflow moves nothing and halves the scale", needs_cuda=False)
def float16(case: Case) -> Finding:
    batches = batches_of(case, 6)
    with exact():
        expected = take(plain_step(case), batches)
    found = {"difference": distance(expected, take(plain_step(case, amp="float16"), batches))}
    step = plain_step(case, amp="float16")
    step.scaler = torch.amp.GradScaler(case.device.type, init_scale=2.0**100)
    before = [p.detach().clone() for p in step.module.get_learnable_parameters()]
    step(batches[0], 1)
    moved = sum(not torch.equal(p, was) for p, was in zip(step.module.get_learnable_parameters(), before))
    found |= {"moved by an overflow": moved, "scale": step.scaler.get_scale() / 2.0**100}
    return found, found["difference"] <= 2e-2 and not moved and not step.optimizer.state and found["scale"] == 0.5


@row("gradients summed by stream over processes: the steps of one to 1e-5 (NCCL; gloo on a CPU)", needs_cuda=False)
def processes(case: Case) -> Finding:
    """With one card it is NCCL's sum over one process, by the same path; with more cards, and on a CPU, over two."""
    count = min(torch.cuda.device_count(), 2) if case.cuda else 2
    with exact():
        expected = take(plain_step(case), batches_of(case, 6))[-1]
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_take_share, (count, case.device.type, str(case.root), folder), nprocs=count)
        taken = torch.load(f"{folder}/weights.pt", weights_only=True)
    apart = distance([expected.cpu()], [taken])
    return {"difference": apart, "processes": count, "backend": _backend(case.device.type)}, apart <= 1e-5


def _backend(kind: str) -> str:
    return "nccl" if kind == "cuda" else "gloo"


def _take_share(rank: int, count: int, kind: str, root: str, folder: str) -> None:
    """Take the steps of one of several processes, each with its part of every batch."""
    home = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(home)
    dist.init_process_group(_backend(kind), init_method=f"file://{folder}/meeting", rank=rank, world_size=count)
    case = Case(home, Path(root))
    step = plain_step(case)
    whole, step.sum_over = step.by_stream, dist.group.WORLD
    step.by_stream = lambda losses: {stream: loss / count for stream, loss in whole(losses).items()}
    shares = [{name: part.chunk(count)[rank] for name, part in batch.items()} for batch in batches_of(case, 6)]
    with exact():
        weights = take(step, shares)[-1]
    if not rank:
        torch.save(weights.cpu(), f"{folder}/weights.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # a thread of gloo may end a process that shuts down with SIGABRT
