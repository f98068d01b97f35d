"""`deepkd push`: a student and its model card on the Hugging Face hub."""

from collections.abc import Sequence
from pathlib import Path

from ..terminal import Parser


def main(words: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    parser = Parser(
        "deepkd push",
        description="Upload README.md and the best student of a run, with what was exported of it, to a repository of "
        "the Hugging Face hub, which is made if it is not there. `hf auth login` must have been run once.",
        examples=("output/glyphs100/RUN me/my-student --private",),
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="the folder of a run that has ended")
    parser.add_argument("repository", metavar="REPOSITORY", help="for example me/my-student")
    parser.add_argument("--private", action="store_true", help="of a new repository: only you see it")
    args = parser.parse(words)
    from ..students.push import push

    files, address = push(args.run, args.repository, args.private)
    print(f"{address}: has {', '.join(files)}")
    return 0
