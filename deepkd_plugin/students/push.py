"""A student and its model card on the Hugging Face hub, by huggingface_hub's own upload."""

import importlib
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..hosts.adapter import reason_of
from ..run.checkpoint import SAFE
from ..run.folder import CARD
from .formats import ONNX, TORCH
from .load import BEST, refuse_detector

FILES = (CARD, *(f"{BEST}{suffix}" for suffix in (SAFE, ONNX, TORCH)))
"""What is uploaded of a run's folder if it is there; config.yaml and run.json name folders of this machine."""


def push(folder: Path, repository: str, private: bool = False) -> tuple[list[str], str]:
    """Upload the card and the best student of a run, with what was exported of it; returns the files and the address.

    Raises UserError if the run has not ended or trained a detector, if huggingface_hub is missing, and for whatever the
    hub refuses.
    """
    refuse_detector(folder)
    files = [name for name in FILES if (folder / name).is_file()]
    if files[:2] != list(FILES[:2]):
        raise UserError(f"{folder}: must hold {CARD} and {FILES[1]}, which a run leaves when it ends")
    api = _api()
    try:
        made = api.create_repo(repository, private=private, exist_ok=True)
        message = f"{BEST} and its card, by deepkd_plugin"
        api.upload_folder(repo_id=made.repo_id, folder_path=str(folder), allow_patterns=files, commit_message=message)
    except Exception as error:  # a network's errors, the hub's and those of a name have no base class in common
        raise UserError(f"{repository}: the hub did not take it ({reason_of(error)})") from None
    return files, str(made)


def _api() -> Any:
    try:
        return importlib.import_module("huggingface_hub").HfApi()
    except ImportError as error:
        raise UserError(
            f'deepkd push needs huggingface_hub, which cannot be imported ({error}); pip install -e ".[hub]" brings it'
        ) from None
