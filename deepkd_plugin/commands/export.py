"""`deepkd export`: a student in a form that other programs read."""

from collections.abc import Sequence
from pathlib import Path

from ..terminal import Parser


def main(words: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    parser = Parser(
        "deepkd export",
        description="Write a student as safetensors, ONNX or torch.export's program, with its classes' names, "
        "normalisation and size inside. STUDENT is a run's folder or a student's file. What the file gives is compared "
        "with the network on noise and on test images of the run (KEY VALUE overrides its config), or on --images.",
        examples=(
            "output/glyphs100/RUN --to onnx",
            "output/glyphs100/RUN/student_latest --to safetensors --out student.safetensors",
        ),
    )
    parser.add_argument("student", metavar="STUDENT", type=Path)
    formats = ("safetensors", "onnx", "torch")
    parser.add_argument("--to", choices=formats, help="the kind of file to write; it must be named")
    parser.add_argument("--out", metavar="FILE", type=Path, help="default: beside the student, with another suffix")
    parser.add_argument("--images", metavar="IMAGE", type=Path, nargs="+", default=[], help="images to compare on")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    parser.add_argument("--trust", action="store_true", help="let the file name a module to import")
    parser.add_pairs()
    args = parser.parse(words)
    if args.to is None:
        parser.error(f"--to is missing; it must be one of {', '.join(formats)}")
    if args.images and args.options:
        parser.error("KEY VALUE are of the run's config, which is not read with --images")
    from ..students.export import export, real_images
    from ..students.formats import SUFFIXES
    from ..students.load import find_student

    found = find_student(args.student, trust=args.trust)
    out = args.out or found.weights.with_name(found.name + SUFFIXES[args.to])
    images = real_images(found, args.images, args.options, args.trust)
    difference = export(found, args.to, out, images, args.trust, args.overwrite)
    print(
        f"{out}: {found.description.architecture}, {out.stat().st_size:,} bytes; its logits agree with the network's "
        f"to {difference:.1g} on noise and on {len(images)} images"
    )
    return 0
