"""Losses on the tokens of a language model: memory and computing time beside a plain KL and TRL's.

    python benchmarks/tokens.py [--vocabularies 32000 151936] [--tokens 128] [--top-k 100] [--write PATH.md]

Every row is one forward and one backward pass of a loss on float32 logits of student and teacher: the gradient by the
student's logits, which the networks would take from there. "peak" is what it holds at most beyond both networks'
logits, its gradient included: every tensor that PyTorch's allocator gave out, so it is exact and the same each time.
"× logits" is that over the bytes of one network's logits. Times are medians of the processor time of this process, the
rows in turn, so that what else the machine does counts for less; read the ratios to the plain KL, not the milliseconds.

KL is torch.nn.functional.kl_div of two log_softmax. TRL's is GKDTrainer.generalized_jsd_loss, called if `trl` can be
imported: β = 0 is the same KL, β = 0.5 its Jensen-Shannon divergence. It comes with many packages, so it is no extra of
this one: `pip install --no-deps --target FOLDER trl`, and FOLDER on PYTHONPATH. Before the clock starts, all rows that
are KL, decoupled or not, are compared in value and gradient. A DeepKD row is two backward passes from one forward pass,
a loss and a gradient for each of TCG and NCG.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from common import Rows, medians_in_turn, peak_mebibytes, report
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import profile

from deepkd_plugin import decoupled_kd, device, per_sample, token_kd
from deepkd_plugin.terminal import Parser, guarded

TEMPERATURE = 2.0
Losses = tuple[Tensor, ...]
"""Scalars, each of which has a backward pass."""


def kl(student: Tensor, teacher: Tensor, target: Tensor, top_k: int) -> Losses:
    logs = (F.log_softmax(z.flatten(0, 1) / TEMPERATURE, -1) for z in (student, teacher))
    return (TEMPERATURE**2 * F.kl_div(*logs, reduction="batchmean", log_target=True),)


def trl_loss(beta: float, student: Tensor, teacher: Tensor, target: Tensor, top_k: int) -> Losses:
    loss = trl().generalized_jsd_loss(student, teacher, target, beta, TEMPERATURE)
    return (TEMPERATURE**2 * loss,)


def samples_masked(student: Tensor, teacher: Tensor, target: Tensor, top_k: int) -> Losses:
    samples = per_sample(student, teacher, target, class_dim=-1)
    tckd, nckd, p = decoupled_kd(samples.student, samples.teacher, samples.target, TEMPERATURE, top_k)
    return samples.mean(tckd), samples.mean((1 - p) * nckd)


def tokens_whole(student: Tensor, teacher: Tensor, target: Tensor, top_k: int) -> Losses:
    tckd, nckd, p = token_kd(student, teacher, target, TEMPERATURE)
    return ((tckd + (1 - p) * nckd).mean(),)


def tokens_masked(student: Tensor, teacher: Tensor, target: Tensor, top_k: int) -> Losses:
    tckd, nckd, p = token_kd(student, teacher, target, TEMPERATURE, top_k)
    return tckd.mean(), ((1 - p) * nckd).mean()


def tokens_masked_whole(student: Tensor, teacher: Tensor, target: Tensor, top_k: int) -> Losses:
    return (sum(tokens_masked(student, teacher, target, top_k), torch.zeros(())),)


KL = "KL"
WAYS: dict[str, Callable[..., Losses]] = {
    KL: kl,
    "TRL, β = 0": functools.partial(trl_loss, 0.0),
    "TRL, β = 0.5": functools.partial(trl_loss, 0.5),
    "token_kd without a mask": tokens_whole,
    "token_kd, top K": tokens_masked_whole,
    "token_kd, top K, DeepKD": tokens_masked,
    "decoupled_kd, top K, DeepKD": samples_masked,
}
SAME = (KL, "TRL, β = 0", "token_kd without a mask")
"""Those that are the same number."""


def trl() -> Any:
    """Return TRL's GKDTrainer; ImportError if it is not there."""
    return importlib.import_module("trl.experimental.gkd").GKDTrainer


def make(way: str, vocabulary: int, tokens: int, top_k: int) -> Callable[[], list[Tensor]]:
    """Make logits (2, tokens / 2, C), and return the step that gives the gradients by the student's."""
    torch.manual_seed(0)
    torch_device = device.pick()
    student, teacher = (3 * torch.randn(2, tokens // 2, vocabulary, device=torch_device) for _ in range(2))
    target = torch.randint(vocabulary, (2, tokens // 2), device=torch_device)
    student.requires_grad_()
    if way.startswith("TRL"):
        trl()  # its import is no part of a step

    def step() -> list[Tensor]:
        losses = WAYS[way](student, teacher, target, top_k)
        gradient = None
        for number, loss in enumerate(losses):
            del gradient  # networks take it on from the logits
            (gradient,) = torch.autograd.grad(loss, student, retain_graph=number + 1 < len(losses))
        return [*losses, gradient]

    return step


def peak_allocated(make: Callable[[], Callable[[], Any]]) -> float:
    """Return the most MiB that tensors of a step take at once, beyond what was there before it."""
    if torch.cuda.is_available():
        return peak_mebibytes(make)
    step = make()
    step()
    with profile(profile_memory=True) as profiler:
        results = step()
    del results
    held = peak = 0
    events = profiler.profiler.kineto_results.events()
    for event in sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**20


def measure(ways: list[str], vocabulary: int, tokens: int, top_k: int, rounds: int) -> Rows:
    peaks = {way: peak_allocated(functools.partial(make, way, vocabulary, tokens, top_k)) for way in ways}
    steps = {way: make(way, vocabulary, tokens, top_k) for way in ways}
    for way in SAME:
        for one, other in zip(steps[way]() if way in steps else (), steps[KL]()):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-7)
    times = medians_in_turn(steps, rounds, warmup=1, clock=time.process_time)
    logits = 4 * tokens * vocabulary / 2**20
    return [
        {
            "vocabulary": vocabulary,
            "loss": way,
            "passes": 2 if way.endswith("DeepKD") else 1,
            "peak MiB": peaks[way],
            "× logits": peaks[way] / logits,
            "CPU ms": times[way],
            "ratio to KL": times[way] / times[KL],
        }
        for way in ways
    ]


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabularies", nargs="+", type=int, default=[32_000, 151_936], metavar="C")
    parser.add_argument("--tokens", type=int, default=128, help="of a batch of 2 sequences, an even number")
    parser.add_argument("--top-k", type=int, default=100, help="non-target classes under the mask")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", type=Path, help="Markdown file to write; a .json is written beside it")
    args = parser.parse_args()
    if args.tokens < 2 or args.tokens % 2 or args.rounds < 1 or not 1 <= args.top_k < min(args.vocabularies):
        parser.error(
            "--tokens must be even and at least 2, --rounds at least 1, --top-k from 1 to below each vocabulary"
        )
    ways, theirs = list(WAYS), "left out"
    try:
        trl()
        theirs = metadata.version("trl")
    except ImportError as error:
        print(f"TRL's rows are left out: {error}", file=sys.stderr)
        ways = [way for way in ways if not way.startswith("TRL")]
    load = os.getloadavg()[0]
    rows = [row for size in args.vocabularies for row in measure(ways, size, args.tokens, args.top_k, args.rounds)]
    settings = {
        "tokens": str(args.tokens),
        "K": str(args.top_k),
        "temperature": str(TEMPERATURE),
        "precision": "float32",
        "TRL": theirs,
        "clock": "processor time of the process",
        "load of the machine before and after": f"{load:.1f}, {os.getloadavg()[0]:.1f}",
    }
    report("Losses on tokens, forward and backward", rows, args.write, settings)


if __name__ == "__main__":
    sys.exit(guarded(main))
