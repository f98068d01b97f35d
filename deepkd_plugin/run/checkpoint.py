"""Reading and writing checkpoints: whole files or none, and never any code from them."""

import contextlib
import hashlib
import io
import mmap
import os
import re
import signal
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from . import array_pickle


def write_whole(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Let `write` fill a file so that `path` holds either its old content or all of the new.

    The content goes to a temporary name beside it, is synced to disk and renamed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole."""
    write_whole(path, lambda file: file.write(text.encode()))


def save(state: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint whole."""
    write_whole(path, lambda file: torch.save(state, file))


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM take effect after the block instead of inside it.

    An exception raised in the middle of torch.save surfaces as an error of its own, and an epoch's records
    and checkpoints belong together. Signals reach Python's main thread only, so elsewhere nothing is done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.signal(number, lambda got, frame: arrived.append(got)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, handlers):
            signal.signal(number, handler)
    if arrived:
        signal.raise_signal(arrived[0])


def load(path: str | Path, key: str) -> Any:
    """Read a checkpoint onto the CPU. Only tensors, numbers and plain containers are ever unpickled.

    `key` is the config key or option that named the file, for the UserError that a missing file, a file that is no
    checkpoint and a checkpoint that would run code raise.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; {key} must name a checkpoint")
    try:
        _check_pickles(path)
        # torch warns of foreign pickles; the error below says it in one line
        with warnings.catch_warnings(), torch.serialization.safe_globals(_numpy_numbers()):
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no checkpoint make the unpickler raise nearly anything
        named = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it refers to {named[1]}" if named else str(error).split("\n")[0].split(". ")[0].strip()
        raise UserError(
            f"{path}: {key} must name a checkpoint of tensors and plain containers, and this file is not one "
            f"({type(error).__name__}: {reason})"
        ) from None


def _check_pickles(path: Path) -> None:
    """Raise, as array_pickle.check_depth does, for pickles that would end the interpreter in torch's reader."""
    with open(path, "rb") as file:
        packed = file.read(4) == b"PK\x03\x04"  # as torch tells its two forms apart
    if packed:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.filename.endswith(".pkl"):
                    if entry.file_size > path.stat().st_size:
                        raise ValueError(f"{entry.filename} is packed")
                    array_pickle.check_depth(io.BytesIO(archive.read(entry)))
        return
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for _ in range(5):  # in torch's old form: three numbers, the content, the names of storages
            if content.tell() < len(content):
                array_pickle.check_depth(content)


def _numpy_numbers() -> list[tuple[Any, str]]:
    """Name what the safe unpickler needs for numpy's numbers: RepDistiller's teacher files keep an accuracy as one."""
    known = array_pickle.stand_ins()
    scalar, dtype = known["numpy.core.multiarray", "scalar"], known["numpy", "dtype"]
    return [
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        (dtype, "numpy.dtype"),
        (known["_codecs", "encode"], "_codecs.encode"),
    ]


def load_weights(module: nn.Module, path: str | Path, key: str, network: str) -> None:
    """Load a network's weights from a file.

    The file holds a state dictionary, bare or under "model" or "state_dict", its names with or without
    DataParallel's "module." in front. Raises UserError, with the first differences, for a file of another
    network or another number of classes; the module is then unchanged.
    """
    content = load(path, key)
    weights = network_weights(content)
    if weights is None:
        raise UserError(f"{path}: {key} must hold a network's state dictionary, holds {_kind(content)}")
    wanted = module.state_dict()
    missing = [name for name in wanted if name not in weights]
    extra = [name for name in weights if name not in wanted]
    other = [name for name in wanted if name in weights and wanted[name].shape != weights[name].shape]
    if missing or extra:
        example = f"no {missing[0]}" if missing else f"an unknown {extra[0]}"
        raise UserError(
            f"{path}: {key} holds another network than {network}: {len(missing)} of its {len(wanted)} "
            f"tensors are missing and {len(extra)} are unknown to it ({example})"
        )
    if other:
        first = other[0]
        # a tensor without dimensions has no classes
        ends = {(wanted[name].shape[:1], weights[name].shape[:1]) for name in other if weights[name].ndim}
        only_classes = all(wanted[name].shape[1:] == weights[name].shape[1:] for name in other)
        if only_classes and len(ends) == 1 and other == list(wanted)[-len(other) :]:
            ((ours,), (theirs,)) = ends.pop()
            raise UserError(f"{path}: {key} holds a {network} of {theirs} classes; this run has {ours}")
        raise UserError(
            f"{path}: {key} holds another network than {network}: {first} is "
            f"{tuple(weights[first].shape)}, not {tuple(wanted[first].shape)}"
        )
    module.load_state_dict(weights)


def network_weights(content: Any) -> dict[str, Tensor] | None:
    """Find a network's state dictionary in the content of a file; None if there is none.

    It is there bare, or under "model" or "state_dict" or both, with or without DataParallel's "module." in front of
    its names.
    """
    for name in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    named = isinstance(content, Mapping) and bool(content) and all(isinstance(name, str) for name in content)
    if not named or not all(isinstance(value, Tensor) for value in content.values()):
        return None
    return {name.removeprefix("module."): value for name, value in content.items()}


def fingerprint(module: nn.Module) -> str:
    """Hash a network's weights: the same for the same numbers, whatever file they came from."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _kind(content: Any) -> str:
    if isinstance(content, Mapping):
        return f"a mapping with {', '.join(map(str, list(content)[:4])) or 'nothing'}"
    return f"a {type(content).__name__}"
