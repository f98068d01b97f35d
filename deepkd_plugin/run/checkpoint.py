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
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ..errors import UserError
from ..mixture import Teachers, members
from ..terminal import warn
from . import array_pickle

SAFE = ".safetensors"
"""End of the name of a file in the format of that name: tensors by name and nothing else."""

DESCRIPTION = "description"
"""What a student's file of torch has beside its weights: what a file in that format has as metadata."""

_FINGERPRINT = "deepkd_fingerprint"
"""Of a file's weights, in its metadata; the format has no checksum of its own."""


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


def temporaries(folder: Path) -> list[tuple[Path, str, int]]:
    """List the temporary files of `write_whole` in a folder, of writers that were killed and of any at work.

    Each comes with the name that it was meant to get and the id of its writer.
    """
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = [(folder / name, _TEMPORARY.fullmatch(name)) for name in names]
    return [(path, match[1], int(match[2])) for path, match in found if match]


_TEMPORARY = re.compile(r"\.(.+)\.(\d{1,9})\.tmp")


def is_running(process: int) -> bool:
    """Tell whether there is a process of this id on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def write_text(path: Path, text: str) -> None:
    """Write a text file whole."""
    write_whole(path, lambda file: file.write(text.encode()))


def save(state: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint whole; OSError, with nothing written, if a disk is full, say."""
    write_whole(path, lambda file: write_state(state, file))


def write_state(state: Mapping[str, Any], file: IO[bytes]) -> None:
    """Write a checkpoint to an open file; OSError if the file cannot take it."""
    try:
        torch.save(state, file)
    except RuntimeError as error:  # torch's own, over the one that tells why
        raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def save_weights(weights: Mapping[str, Tensor], path: Path, about: Mapping[str, str] | None = None) -> None:
    """Write a network's state dictionary whole in the safetensors format; OSError as `save`.

    about: what its metadata are to say of the network.
    """
    write_whole(path, lambda file: file.write(safe_content(weights, about or {})))


def safe_content(weights: Mapping[str, Tensor], about: Mapping[str, str]) -> bytes:
    """Return the bytes of a file in the safetensors format."""
    # tensors of one storage, such as tied weights, become tensors of their own: the format has no other way
    own = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in weights.items()}
    of_format = {"format": "pt", _FINGERPRINT: hash_weights(dict(sorted(own.items())))}
    content: bytes = safetensors.torch.save(own, {**about, **of_format})
    return content


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

    `key` is the config key or option that named the file, for the UserError that a missing file, a damaged one, one
    that is no checkpoint and a checkpoint that would run code raise.
    """
    path = there(path, key)
    if path.suffix == SAFE:
        return _load_safe(path, key)
    try:
        damage = find_damage(path)
    except OSError as error:
        raise UserError(f"{path}: {key} must name a file that can be read ({error.strerror})") from None
    if damage:
        raise UserError(f"{path}: {key} names a damaged file ({damage}); it must be copied or made again")
    try:
        _check_pickles(path)
        # torch warns of foreign pickles; the error below says it in one line
        with warnings.catch_warnings(), torch.serialization.safe_globals(_numpy_numbers()):
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no checkpoint make the unpickler raise nearly anything
        named = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it refers to {named[1]}" if named else str(error).split("\n")[0].split(". ")[0].strip()[:200]
        raise UserError(
            f"{path}: {key} must name a checkpoint of tensors and plain containers, and this file is not one "
            f"({type(error).__name__}: {reason})"
        ) from None


def there(path: str | Path, key: str) -> Path:
    """Return a checkpoint's path; UserError if there is no such file."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; {key} must name a checkpoint")
    return path


def _load_safe(path: Path, key: str) -> dict[str, Tensor]:
    """Read a file of the safetensors format, as `load` does."""
    with _opened(path, key) as file:
        metadata = file.metadata() or {}
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    if (written := metadata.get(_FINGERPRINT)) and written != hash_weights(dict(sorted(weights.items()))):
        raise UserError(
            f"{path}: {key} names a damaged file (its weights are others than were written); it must be copied or "
            f"made again"
        )
    return weights


def read_metadata(path: Path, key: str) -> dict[str, str]:
    """Read what a file of weights says of them, as text by name; UserError as `load`."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; {key} must name a checkpoint")
    if path.suffix != SAFE:
        content = load(path, key)
        about = content.get(DESCRIPTION) if isinstance(content, Mapping) else None
        texts = isinstance(about, Mapping) and all(isinstance(text, str) for pair in about.items() for text in pair)
        return dict(about) if texts else {}  # type: ignore[arg-type]
    with _opened(path, key) as file:
        return dict(file.metadata() or {})


@contextlib.contextmanager
def _opened(path: Path, key: str) -> Iterator[Any]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            yield file
    except OSError as error:
        raise UserError(f"{path}: {key} must name a file that can be read ({error.strerror or error})") from None
    except Exception as error:  # its own error, and whatever tensors that cannot be raise
        raise UserError(f"{path}: {key} names a damaged file ({error}); it must be copied or made again") from None


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


def find_damage(path: Path) -> str | None:
    """Say what is wrong with the bytes of a checkpoint file; None if nothing can be found.

    The zip archives that torch has written since 1.6 hold a sum of each entry. Older files hold none, and are only
    held against the hash in a name such as resnet18-f37072fd.pth, torchvision's.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for entry in archive.infolist():
                    if entry.compress_type != zipfile.ZIP_STORED:  # torch's are, and a packed one may be of any size
                        return f"its entry {entry.filename} is packed"
                broken = archive.testzip()
            return broken and f"its entry {broken} has another checksum than when it was written"
        with open(path, "rb") as file:
            if file.read(2) == b"PK":
                return "it ends too early"
        hashed = re.search(r"-([0-9a-f]{8,64})\.", path.name)
        if hashed:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            return None if digest.startswith(hashed[1]) else f"its hash is {digest[: len(hashed[1])]}, not its name's"
    except OSError:
        raise
    except Exception as error:  # a damaged archive makes zipfile raise nearly anything
        return f"{type(error).__name__}: {error}"
    return None


def is_whole(path: Path) -> bool:
    """Tell whether a file is a checkpoint as `save` wrote it."""
    return zipfile.is_zipfile(path) and find_damage(path) is None


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
    """Load a network's weights from a file, as `read_weights` and `fit_weights` do it."""
    fit_weights(module, read_weights(path, key), path, key, network)


def read_weights(path: str | Path, key: str) -> dict[str, Tensor]:
    """Read a network's state dictionary from a file, which holds it as `network_weights` finds it.

    Of weights beside their moving average the weights are taken, and this is said. Raises UserError as `load` does, and
    for a trainer's state or several networks.
    """
    content = load(path, key)
    if isinstance(content, Mapping):
        names = [name for name in (*WRAPPERS, *AVERAGES) if network_weights(content.get(name)) is not None]
        if len(set(names) & set(WRAPPERS)) > 1:
            raise UserError(f"{path}: {key} holds several networks, {', '.join(names)}; it must hold one of them")
        if len(names) > 1:
            warn(f"{path}: holds {' and '.join(names)}; {key} takes {names[0]} (a file of the other alone gives that)")
    weights = network_weights(content)
    if weights is None:
        raise UserError(f"{path}: {key} must hold a network's state dictionary, holds {_kind(content)}")
    if any(name.startswith("student.") for name in weights):
        beside = Path(path).name.removeprefix("epoch_")
        raise UserError(f"{path}: {key} holds a trainer's state; use student_{beside}, which is beside it")
    return weights


def fit_weights(module: nn.Module, weights: dict[str, Tensor], path: str | Path, key: str, network: str) -> None:
    """Load weights that a file held into a network.

    They may lack the counters num_batches_tracked, which nothing here reads. Raises UserError, with the first
    differences, for those of another network or another number of classes, and for numbers that no network can have;
    the module is then unchanged.
    """
    wanted = module.state_dict()
    weights = {name: wanted[name] for name in wanted if name.endswith("num_batches_tracked")} | weights
    for name, value in weights.items():
        if name in wanted and (reason := unfit(value, wanted[name])):
            raise UserError(f"{path}: {key} must hold plain numbers, and {name} {reason}")
    missing = [name for name in wanted if name not in weights]
    extra = [name for name in weights if name not in wanted]
    other = [name for name in wanted if name in weights and wanted[name].shape != weights[name].shape]
    if missing or extra:
        example = f"no {missing[0]}" if missing else f"an unknown {extra[0]}"
        raise UserError(
            f"{path}: {key} holds another network than {network}: {len(missing)} of its {len(wanted)} "
            f"tensors are missing and {len(extra)} are unknown to it ({example})"
        )
    if other and (classes := count_classes(weights, wanted)):
        raise UserError(f"{path}: {key} holds a {network} of {classes[0]} classes; this run has {classes[1]}")
    if other:
        first = other[0]
        raise UserError(
            f"{path}: {key} holds another network than {network}: {first} is "
            f"{tuple(weights[first].shape)}, not {tuple(wanted[first].shape)}"
        )
    # names and shapes are of this version of the network, which some ask for
    loaded = OrderedDict(weights)
    loaded._metadata = getattr(wanted, "_metadata", {})  # type: ignore[attr-defined]
    module.load_state_dict(loaded)


def count_classes(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """Return the classes of a file's network and of ours if these alone differ; None if nothing does, or more does."""
    other = [name for name in wanted if name in weights and wanted[name].shape != weights[name].shape]
    # a tensor without dimensions has no classes
    ends = {(weights[name].shape[:1], wanted[name].shape[:1]) for name in other if weights[name].ndim}
    only_classes = all(wanted[name].shape[1:] == weights[name].shape[1:] for name in other)
    if not (other and only_classes and len(ends) == 1):
        return None
    ((theirs,), (ours,)) = ends.pop()
    return theirs, ours


def unfit(value: Tensor, wanted: Tensor) -> str | None:
    """Say why a tensor of a file cannot be a network's; None if it can."""
    if value.layout != torch.strided or value.is_nested:
        return "is a sparse or nested tensor"
    if value.is_quantized or value.is_complex() or value.dtype == torch.bool:
        return f"is of {value.dtype}"
    if wanted.is_floating_point() and not value.is_floating_point():
        return f"is of {value.dtype}, not of floating point"
    if value.is_meta:
        return "holds nothing"
    if value.shape == wanted.shape and not bool(torch.isfinite(value.float()).all()):
        return "holds NaN or an infinite number"
    return None


WRAPPERS = ("model", "state_dict", "model_state_dict", "net")
"""What training scripts put a network's state dictionary under."""

AVERAGES = ("model_ema", "state_dict_ema", "ema")
"""What they put a moving average of it under, beside it."""


def network_weights(content: Any) -> dict[str, Tensor] | None:
    """Find a network's state dictionary in the content of a file; None if there is none.

    It is there bare, or under one or more of WRAPPERS, with or without "module." (DataParallel) and "_orig_mod."
    (torch.compile) in front of some of its names.
    """
    for _ in WRAPPERS:  # a file may hold itself
        wrapped = [content[name] for name in WRAPPERS if name in content] if isinstance(content, Mapping) else []
        content = next((inner for inner in wrapped if isinstance(inner, Mapping)), content)
    named = isinstance(content, Mapping) and bool(content) and all(isinstance(name, str) for name in content)
    if not named or not all(isinstance(value, Tensor) for value in content.values()):
        return None
    weights = {re.sub(r"^(module\.|_orig_mod\.)+", "", name): value for name, value in content.items()}
    # two tensors of one name would be a choice
    return weights if len(weights) == len(content) else None


def outline(state: Any) -> str:
    """Hash what a checkpoint holds where: names, shapes and types of tensors, and all that is no tensor.

    A file's own checksums are of its tensors' numbers; this tells whether somebody has changed the rest.
    """
    digest = hashlib.sha256()

    def walk(value: Any) -> None:
        if isinstance(value, Mapping):
            parts: Any = [part for pair in value.items() for part in pair]
        elif isinstance(value, (list, tuple)):
            parts = value
        elif isinstance(value, Tensor):
            parts, value = (), f"{value.dtype} {tuple(value.shape)}"
        else:
            parts = ()
        digest.update(f"{len(parts)} {'' if parts else repr(value)}\n".encode())
        for part in parts:
            walk(part)

    walk(state)
    return digest.hexdigest()[:16]


def fingerprint(module: nn.Module) -> str:
    """Hash a network's weights: the same for the same numbers, whatever file they came from.

    A network that is fed otherwise than it would be itself (hosts/adapter.py) has another hash. Of several teachers it
    is theirs, in their order, with a + between.
    """
    if isinstance(module, Teachers):
        return "+".join(map(fingerprint, members(module)))
    changes = module.deepkd_changes() if hasattr(module, "deepkd_changes") else {}
    return hash_weights(module.state_dict() | changes)


def hash_weights(weights: Mapping[str, Tensor]) -> str:
    """Hash tensors by their names, in their order, and their numbers."""
    digest = hashlib.sha256()
    for name, value in weights.items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _kind(content: Any) -> str:
    if isinstance(content, Mapping):
        return f"a mapping with {', '.join(map(str, list(content)[:4])) or 'nothing'}"
    return f"a {type(content).__name__}"
