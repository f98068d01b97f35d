"""What measuring the GSNR costs: DeepKD's step with and without a sample of its gradients, in turn.

    python benchmarks/gsnr.py [--pairs TEACHER:STUDENT …] [--coordinates N] [--write PATH.md]

"share at 200" is what one sample in every 200 iterations adds to the training time, in percent of the steps';
"memory MiB" what the moments hold, "window end ms" what reading a full window costs, once in every 2,000 iterations.
Images are noise, networks untrained, as in step.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from common import conditions, medians_in_turn, report
from step import METHODS, PAIRS, Setting, count_argument, on_imagenet, our_step, pair_argument

from deepkd_plugin import device
from deepkd_plugin.config import all_keys
from deepkd_plugin.gsnr import GradientMonitor
from deepkd_plugin.terminal import Parser, guarded

EVERY = 200
METHOD = "DeepKD, 2 coefficients"


def measure(of: Setting, coordinates: int, rounds: int) -> dict[str, object]:
    """Time a pair and make its row."""
    plain, taken = our_step(of, METHOD), our_step(of, METHOD)
    step = taken.func
    params = step.distiller.student.named_parameters()
    monitor = step.monitor = GradientMonitor(params, METHODS[METHOD].momentum, 1, rounds + 3, coordinates)

    def sampled() -> None:
        monitor.tick()
        taken()

    times = medians_in_turn({"plain": plain, "sampled": sampled}, rounds)
    end = medians_in_turn({"end": monitor.moments.summary}, 3)["end"]
    extra = times["sampled"] - times["plain"]
    return {
        "pair": of.pair.replace(":", " → "),
        "images": f"{of.batch} of {of.size} × {of.size}",
        "parameters": monitor.moments.parameters,
        "coordinates": monitor.moments.coordinates,
        "samples": monitor.moments.samples,
        "step ms": times["plain"],
        "with a sample ms": times["sampled"],
        f"share at {EVERY} %": 100 * extra / (EVERY * times["plain"]),
        "window end ms": end,
        "memory MiB": monitor.moments.nbytes / 2**20,
    }


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", type=pair_argument, default=PAIRS, metavar="TEACHER:STUDENT")
    default = next(key.default for key in all_keys() if key.path == "GSNR.COORDINATES")
    parser.add_argument("--coordinates", type=int, default=default, help=f"0: all ({default})")
    parser.add_argument("--batch", type=count_argument, default=64, help="images for the CIFAR pairs (64)")
    parser.add_argument("--rounds", type=count_argument, default=5)
    parser.add_argument("--write", type=Path, help="Markdown file to write; a .json is written beside it")
    args = parser.parse_args()
    device.tune()
    sizes = {True: (8, 224), False: (args.batch, 32)}
    rows = [
        measure(Setting(pair, *sizes[on_imagenet(pair)]), args.coordinates, args.rounds)
        for pair in (PAIRS if "all" in args.pairs else args.pairs)
    ]
    title = f"Sampling gradients, medians of {args.rounds} rounds in turn"
    report(title, rows, args.write, conditions(False, False))


if __name__ == "__main__":
    sys.exit(guarded(main))
