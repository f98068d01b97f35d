"""`deepkd merge-detector-weights`: a teacher's detector and a student's backbone in one file."""

from collections.abc import Sequence
from pathlib import Path

from ..terminal import Parser, count


def main(words: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    parser = Parser(
        "deepkd merge-detector-weights",
        description="Put a teacher's detector and a student's ImageNet backbone into one file, which "
        "MODEL.WEIGHTS of mdistiller's detection configs names.",
        examples=("R-101.pkl resnet18.pth r18-r101.pth",),
    )
    parser.add_argument(
        "teacher", metavar="TEACHER", type=Path, help="a Faster R-CNN with FPN of detectron2, .pth or .pkl"
    )
    parser.add_argument(
        "student",
        metavar="STUDENT",
        type=Path,
        help="a resnet18, resnet50 or mobilenet_v2 of torchvision (.pth), or MSRA's R-50.pkl",
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="the file to write, .pth")
    parser.add_argument("--classes", metavar="N", type=count, help="refuse a teacher of another number of classes")
    args = parser.parse(words)
    from ..detection.detectron2.merge import merge

    print(merge(args.teacher, args.student, args.out, args.classes))
    return 0
