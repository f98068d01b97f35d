"""Measure the AP of a detector's weights on a data set's test images."""

import os
import sys
from collections.abc import Sequence

from .. import device
from ..config.shipped import find_config
from ..config.tree import wrong
from ..terminal import Parser, guarded
from .average_precision import import_pycocotools
from .data import get_detection_sets
from .launch import EXAMPLE, read_config
from .networks import NETWORKS, trained_network, weights_file
from .trainer import evaluate


def main(argv: Sequence[str] | None = None, tool: str = "tools/eval_detection.py") -> int:
    """`tools/eval_detection.py` and `deepkd detect-eval`: test a detector's file. Returns the exit code."""
    return guarded(lambda: _main(list(sys.argv[1:] if argv is None else argv), tool))


def _main(words: list[str], tool: str) -> None:
    parser = Parser(
        tool,
        description="Test a student file or a teacher under a config.",
        examples=(
            f"--cfg {EXAMPLE} --ckpt output/glyph_canvas/RUN/student_best",
            f"--cfg {EXAMPLE} --ckpt builtin:glyph_canvas_resnet20 --model fasterrcnn_resnet20_fpn",
        ),
    )
    parser.add_argument("--cfg", required=True, metavar="FILE", help="a YAML file, or a name of `deepkd configs`")
    parser.add_argument(
        "--ckpt", required=True, metavar="FILE", type=os.path.expanduser, help="a run's student_best; builtin:NAME"
    )
    parser.add_argument("--model", metavar="NAME", help="the network; by default the config's DISTILLER.STUDENT")
    parser.add_pairs()
    args = parser.parse(words)
    cfg, _ = read_config(find_config(args.cfg), args.options)
    name = args.model or cfg.DISTILLER.STUDENT
    if name not in NETWORKS:
        raise wrong({"--model": "command line"}, "--model", name, f"one of {', '.join(NETWORKS)}")
    weights_file(name, args.ckpt, "--ckpt")  # before images are read
    import_pycocotools()
    _, loader, _, classes = get_detection_sets(cfg)
    torch_device = device.pick()
    detector = trained_network(name, len(classes), cfg.DETECTION, args.ckpt, "--ckpt")
    results = evaluate(device.place(detector, torch_device, False), loader, torch_device)
    numbers = ", ".join(f"{measure} {results[f'test_{measure.lower()}']:.2f} %" for measure in ("AP", "AP50", "AP75"))
    print(f"{name} on {cfg.DATASET.TYPE}: {numbers} over {len(loader.dataset)} images")


if __name__ == "__main__":
    sys.exit(main())
