"""The folders of files that come with the package and are no Python: configs/ and patches/."""

import difflib
import os
from pathlib import Path

from ..errors import UserError, shown

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


def config_names() -> list[str]:
    """List the configs that ship, as `find_config` takes them: cifar100/res56_res20/kd."""
    folder = shipped("configs")
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def find_config(name: str) -> str:
    """Return the path of a config: `name` itself if there is such a file, else of the one that ships under it.

    Raises UserError if there is neither, but a name that is near. Any other comes back for its reader to refuse.
    """
    name = os.path.expanduser(name)
    try:
        if Path(name).exists():
            return name
    except (OSError, ValueError):  # no name of a file
        return name
    short = name.removesuffix(".yaml").removeprefix("./").removeprefix("configs/")
    names = config_names()
    if short in names:
        return str(shipped("configs") / f"{short}.yaml")
    near = difflib.get_close_matches(short[:200], names, n=3, cutoff=0.8)
    if not near:
        return name
    raise UserError(
        f"command line: --cfg is {shown(name)}, and there is no such file; did you mean {' or '.join(near)}?"
    )
