"""A batch that is divided among processes and micro-batches, against one that is not."""

import functools

import pytest
import small
import torch
from processes import in_two_processes
from torch import nn

from deepkd_plugin import solver
from deepkd_plugin.distillers import DISTILLERS, Vanilla
from deepkd_plugin.distributed import process_group, sharding
from deepkd_plugin.divided import DividedStep
from deepkd_plugin.gsnr import GradientMonitor
from deepkd_plugin.step import Step
from deepkd_plugin.streams import assign_losses

BASES = ("KD", "DKD", "MLKD", "CRLD")
ASSIGNED = {"loss_ce": "tog", "loss_kd": "ncg", "loss_cc": "tcg", "loss_bc": "tcg", "ce": "tog"}
STEPS, SIZES = 20, (12, 12, 7, 12, 3, 1)
"""Batches of other sizes, too: of 3 and 1 images a process of two, or a micro-batch, has one or none."""


class Net(nn.Module):
    """Logits of 5 classes. A layer is frozen, a parameter is in no graph, and another only for some images."""

    def __init__(self, width):
        super().__init__()
        self.body = nn.Linear(12, width)
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.some = nn.Linear(12, 5)
        self.head = nn.Linear(width, 5)
        self.none = nn.Parameter(torch.ones(3))

    def forward(self, x):
        x = x.flatten(1)
        logits = self.head(torch.tanh(self.frozen(torch.tanh(self.body(x)))))
        chosen = x[:, 0] > 1.2
        if chosen.any():
            logits = logits.index_add(0, chosen.nonzero()[:, 0], self.some(x[chosen]))
        return logits, {}


def cases():
    """(method, base, variant of momenta, variant of MLKD, micro-batches, dtype), the last ones smaller."""
    methods = [(base, base, "paper", "formula") for base in BASES]
    methods += [("DeepKD", base, variant, "formula") for base in BASES for variant in ("paper", "release")]
    methods += [("MLKD", "MLKD", "paper", "release"), ("NONE", "KD", "paper", "formula")]
    whole = [(*method, n, "float32") for method in methods for n in (1, 3)]
    return whole + [("DeepKD", base, "paper", "formula", n, "float64") for base in ("CRLD", "MLKD") for n in (1, 3)]


def make(case):
    method, base, variant, form, _, dtype = case
    cfg = small.config("", BATCH_SIZE=12)
    cfg.DISTILLER.TYPE, cfg.DeepKD.BASE, cfg.MLKD.VARIANT = method, base, form
    cfg.SOLVER.DECOUPLED.VARIANT = variant
    cfg.CRLD.TAU_W = 0.3
    torch.manual_seed(0)
    student, teacher = (Net(width).to(getattr(torch, dtype)) for width in (6, 9))
    distiller = Vanilla(student) if method == "NONE" else DISTILLERS[method](student, teacher, cfg)
    return distiller.train(), solver.decoupled_momentum(student.parameters(), cfg), cfg


def batch(step, views, dtype):
    generator = torch.Generator().manual_seed(step)
    size = SIZES[step % len(SIZES)]
    images = [torch.randn(size, 3, 2, 2, generator=generator).to(dtype) for _ in range(views)]
    return {"image": images, "target": torch.randint(5, (size,), generator=generator), "index": torch.arange(size)}


def train(case, divided):
    """Train by one kind of step; returns the weights, what the last step measured, and a GSNR window."""
    distiller, optimizer, cfg = make(case)
    by_stream = lambda losses: assign_losses(losses, optimizer.streams, ASSIGNED)  # noqa: E731
    kind = DividedStep if divided else Step
    step = kind(distiller, optimizer, by_stream, False, torch.device("cpu"))
    step.measure = lambda logits, losses, parts: {"right": (logits.argmax(1) == parts["target"]).sum()} | losses
    params = [(name, p) for name, p in distiller.student.named_parameters() if p.requires_grad]
    monitor = GradientMonitor(params, optimizer.streams, every=4, window=STEPS // 4)
    if case[5] == "float64":
        step.monitor = monitor
    if divided:
        step.chunk, step.sum_over = -(-12 // case[4]), process_group.streams()
    for number in range(STEPS):
        parts = batch(number, distiller.views_of(cfg), getattr(torch, case[5]))
        step.count = len(parts["target"])
        if divided:
            own = sharding.own(step.count, step.chunk)
            parts = {n: [t[own] for t in v] if isinstance(v, list) else v[own] for n, v in parts.items()}
        parts["image"] = parts["image"] if len(parts["image"]) > 1 else parts["image"][0]
        monitor.tick()
        outcome = step(parts, epoch=1 + number)
    gsnr = [summary["ratio"] or 0.0 for summary in monitor.finish()["gsnr"].values()]
    state = {f"state {name}": value for name, value in distiller.student.state_dict().items()}
    unused = {"no gradient": torch.tensor([p.grad is None for _, p in params])}
    return state | unused | outcome.sums | {"gsnr": torch.tensor(gsnr, dtype=torch.float64)}


def train_all(rank, chosen):
    return [train(case, divided=True) for case in chosen]


def check(case, ours, expected):
    assert ours.keys() == expected.keys()
    tolerance = 1e-6 if case[5] == "float32" else 1e-12
    for name, value in expected.items():
        # a loss is T² times a small difference, and a GSNR a ratio of such
        loose = tolerance if name.startswith("state") else 50 * tolerance
        torch.testing.assert_close(ours[name], value, rtol=loose, atol=loose, msg=lambda m, n=name: f"{case} {n}: {m}")


@functools.cache
def undivided(*case):
    return train(case, divided=False)


FEW = [("DeepKD", "MLKD", "paper", "formula", 3, "float64"), ("DeepKD", "KD", "release", "formula", 1, "float32")]


@pytest.mark.parametrize("chosen", [FEW, pytest.param(cases(), marks=pytest.mark.slow)], ids=["few", "all"])
def test_two_processes_take_the_steps_of_one(tmp_path, chosen):
    for of_process in in_two_processes(train_all, tmp_path, chosen, one_run=True):
        for case, ours in zip(chosen, of_process):
            check(case, ours, undivided(*case[:4], 1, case[5]))


@pytest.mark.parametrize("case", [case for case in cases() if case[4] > 1], ids=str)
def test_micro_batches_take_the_steps_of_a_batch(case):
    check(case, train(case, divided=True), undivided(*case[:4], 1, case[5]))
