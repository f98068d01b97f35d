"""What a step on many cards waits for: a simulation of the gradients' all-reduce beside the backward passes.

    python benchmarks/scale.py [--cards 8 32] [--bandwidth 25 100 400] [--teraflops 60] [--write PATH.md]

Measured here, on a CPU: the parameters of the student, the order in which a backward pass finishes their gradients, and
the floating-point operations of every layer. Assumed: what a card sustains (--teraflops), what each of the links
between cards carries in one direction (--bandwidth, GB/s), what a message costs beside its bytes (--latency). A pass of
the student's gradients takes twice its forward pass. An all-reduce of S bytes over N cards is a ring's: 2 (N − 1)
messages, and 2 (N − 1)/N · S bytes from each card.

As in training, the gradients of all streams but the last are reduced while the next pass runs, and those of the last
one bucket by bucket, as soon as a bucket is full. All-reduces come one after the other. "apart" is the step that
reduces everything after the last pass. Loading, losses and the update are left out. Nothing here was run on a GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from common import Rows, report
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from deepkd_plugin.hosts import builtin
from deepkd_plugin.terminal import Parser, guarded

PAIRS = ("ResNet34:ResNet18", "ResNet50:MobileNetV1")
BATCH, IMAGES = 512, 1_281_167
"""The recipe's batch over all cards, and ImageNet's training images."""

SIDE = 224


@dataclass(frozen=True)
class Network:
    """What a network's passes over one image cost, and what its gradients weigh."""

    forward: float
    """Floating-point operations."""
    gradients: tuple[tuple[float, int], ...]
    """In the order in which a backward pass finishes them: the share of the pass that is done by then, and bytes."""

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.gradients)


@dataclass(frozen=True)
class Cluster:
    """Cards in a ring. bandwidth: bytes a second. latency: seconds of a message."""

    cards: int
    bandwidth: float
    latency: float

    def sent(self, size: float) -> float:
        """Return the bytes that each card sends in an all-reduce of so many."""
        return 2 * (self.cards - 1) / self.cards * size

    def seconds(self, size: float) -> float:
        """Return the time of an all-reduce."""
        return 2 * (self.cards - 1) * self.latency + self.sent(size) / self.bandwidth


def look_at(name: str) -> Network:
    """Count a network's operations by layer, and see in which order its gradients are finished."""
    torch.manual_seed(0)
    network = builtin.imagenet_model_dict[name]()
    leaves = {path: module for path, module in network.named_modules() if not list(module.children())}
    layer_of = {parameter: path for path, module in leaves.items() for parameter in module.parameters()}
    finished: list[nn.Parameter] = []
    for parameter in network.parameters():
        parameter.register_post_accumulate_grad_hook(finished.append)
    with FlopCounterMode(display=False) as counter:
        logits = network(torch.randn(2, 3, SIDE, SIDE))[0]
    counts = {path: sum(ops.values()) for path, ops in counter.get_flop_counts().items()}
    logits.sum().backward()
    total = sum(counts.get(f"{type(network).__name__}.{path}", 0) for path in leaves)
    done, seen, gradients = 0.0, set(), []
    for parameter in finished:
        path = layer_of[parameter]
        done += 0 if path in seen else counts.get(f"{type(network).__name__}.{path}", 0) / total
        seen.add(path)
        gradients.append((done, 4 * parameter.numel()))
    return Network(counts["Global"] / 2, tuple(gradients))


def buckets(network: Network, size: int) -> list[tuple[float, int]]:
    """Return when in a backward pass each bucket of gradients is full, and its bytes."""
    full: list[tuple[float, int]] = []
    held = 0
    for done, gradient in network.gradients:
        held += gradient
        if held >= size:
            full.append((done, held))
            held = 0
    return [*full, (network.gradients[-1][0], held)] if held else full


def step_seconds(
    before: float, backward: float, passes: int, parts: Sequence[tuple[float, int]], cluster: Cluster, overlap: bool
) -> float:
    """Return the time of a step.

    before: of the forward passes. backward: of one backward pass. parts: buckets(). overlap: False reduces everything
    behind the last pass.
    """
    computed = before + passes * backward
    whole = sum(size for _, size in parts)
    free = computed if not overlap else 0.0  # when the network is free again
    for number in range(1, passes):
        free = max(free, before + number * backward) + cluster.seconds(whole)
    for done, size in parts:
        free = max(free, before + (passes - 1 + done) * backward) + cluster.seconds(size)
    return max(free, computed)


def rows_of(pair: str, clusters: Sequence[Cluster], flops: float, bucket: int) -> Rows:
    teacher, student = (look_at(name) for name in pair.split(":"))
    parts, rows = buckets(student, bucket), []
    for cluster in clusters:
        images = BATCH / cluster.cards
        before = images * (teacher.forward + student.forward) / flops
        backward = images * 2 * student.forward / flops
        for passes in (1, 2, 3):
            computed = before + passes * backward
            step, apart = (step_seconds(before, backward, passes, parts, cluster, overlap) for overlap in (True, False))
            rows.append(
                {
                    "pair": pair.replace(":", " → "),
                    "cards": cluster.cards,
                    "GB/s": cluster.bandwidth / 1e9,
                    "buffers": passes,
                    "MB sent a step": passes * cluster.sent(student.bytes) / 1e6,
                    "computing ms": 1e3 * computed,
                    "step ms": 1e3 * step,
                    "waiting": step / computed - 1,
                    "waiting if apart": apart / computed - 1,
                    "minutes an epoch": IMAGES / BATCH * step / 60,
                }
            )
    return rows


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", default=PAIRS, choices=PAIRS, metavar="TEACHER:STUDENT")
    parser.add_argument("--cards", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--bandwidth", nargs="+", type=float, default=[25.0, 100.0, 400.0], help="GB/s of a link")
    parser.add_argument("--teraflops", type=float, default=60.0, help="that a card sustains in these networks")
    parser.add_argument("--latency", type=float, default=5.0, help="microseconds of a message")
    parser.add_argument("--bucket", type=float, default=25.0, help="MiB in a bucket")
    parser.add_argument("--write", type=Path, help="Markdown file to write; a .json is written beside it")
    args = parser.parse_args()
    if min(args.cards) < 2 or min(*args.bandwidth, args.teraflops, args.bucket) <= 0 or args.latency < 0:
        parser.error("--cards must be 2 or more, the other numbers above 0")
    clusters = [Cluster(n, 1e9 * rate, 1e-6 * args.latency) for n in args.cards for rate in args.bandwidth]
    rows = [
        row for pair in args.pairs for row in rows_of(pair, clusters, 1e12 * args.teraflops, int(args.bucket * 2**20))
    ]
    settings = {
        "assumed TFLOP/s a card": str(args.teraflops),
        "assumed latency": f"{args.latency} µs",
        "buckets": f"{args.bucket} MiB",
        "batch": str(BATCH),
    }
    report("Simulated training steps on many cards", rows, args.write, settings)


if __name__ == "__main__":
    sys.exit(guarded(main))
