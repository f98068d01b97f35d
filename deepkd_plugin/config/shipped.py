"""The folders of files that come with the package and are no Python: configs/ and patches/."""

from pathlib import Path

from ..errors import UserError

PACKAGE = Path(__file__).parents[1]


def shipped(name: str) -> Path:
    """Return the folder `name` ("configs" or "patches"): in an installed package, or beside it in a checkout.

    An installed package looks only inside itself, because any other package may have put a folder
    `configs` beside it. Raises UserError if an installation lacks the folder.
    """
    for folder in (PACKAGE / "_shipped" / name, PACKAGE.parent / name):
        if folder.is_dir():
            return folder
    raise UserError(f"{PACKAGE}: its {name}/ are missing; the package must be installed with pip")
