"""`deepkd predict`: what a student says of images."""

from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError
from ..terminal import Parser, count


def main(words: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    parser = Parser(
        "deepkd predict",
        description="Print the most likely classes of images, by name. STUDENT is a run's folder, a student's file or "
        "what deepkd export wrote; IMAGE is a file, or a folder with all images below it, which gives CSV.",
        examples=("output/glyphs100/RUN photo.jpg --top 3", "output/glyphs100/RUN photos --out classes.csv"),
    )
    parser.add_argument("student", metavar="STUDENT", type=Path)
    parser.add_argument("images", metavar="IMAGE", type=Path, nargs="+")
    parser.add_argument("--format", choices=("text", "csv", "json"), help="default: text; csv for a folder")
    parser.add_argument("--top", type=count, default=5, metavar="N", help="how many classes (default: 5)")
    parser.add_argument("--out", metavar="FILE", type=Path, help="write there, not to the terminal")
    parser.add_argument("--trust", action="store_true", help="let the file name a module to import, or be a program")
    args = parser.parse(words)
    from ..run.checkpoint import write_text
    from ..students import predict
    from ..students.formats import opened
    from ..students.images import files_of

    files = files_of(args.images)
    about, run = opened(args.student, args.trust)
    kind = args.format or ("csv" if any(path.is_dir() for path in args.images) else "text")
    form = {"text": predict.as_text, "csv": predict.as_csv, "json": predict.as_json}[kind]
    text = form(list(predict.predict(run, about, files, args.top)))
    if args.out is None:
        print(text, end="")
        return 0
    try:
        write_text(args.out, text)
    except OSError as error:
        raise UserError(f"{args.out}: --out must name a file that can be written ({error.strerror or error})") from None
    print(f"{args.out}: {len(files)} images")
    return 0
