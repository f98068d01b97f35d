"""Images that a user names, as a student takes them."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from ..data.description import Description
from ..data.folders import is_image, visible_files
from ..errors import UserError


def files_of(paths: Sequence[Path]) -> list[Path]:
    """List images: files as they are named, and all images below folders, which are not hidden.

    Raises UserError for a path that is not there, and for a folder without an image.
    """
    files: list[Path] = []
    for path in paths:
        if not path.is_dir():
            if not path.is_file():
                raise UserError(f"{path}: no such file; IMAGE must name an image or a folder of images")
            files.append(path)
            continue
        try:
            inside = [Path(name) for name in visible_files(path) if is_image(name)]
        except OSError as error:
            raise UserError(f"{path}: IMAGE must name a folder that can be read ({error.strerror or error})") from None
        if not inside:
            raise UserError(f"{path}: holds no image; IMAGE must name an image or a folder of images")
        files += inside
    return files


def prepared(path: Path, about: Description) -> Tensor:
    """Read an image as a student takes it, (3, size, size); UserError, with its path, if it cannot be read."""
    try:
        with Image.open(path) as file:
            return about.prepare(file)
    except UserError:
        raise
    except Exception as error:  # a damaged image can raise nearly anything
        raise UserError(f"{path}: is no image that can be read ({error})") from None
