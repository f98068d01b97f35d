"""Reading a pickle of numpy arrays without running any code from it.

This is the package's own safe unpickler: for model zoos' weights and CIFAR-100. Checkpoints are read by torch's
(run/checkpoint.py), which takes numpy's numbers from here.
"""

import math
import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..errors import UserError


def load(path: str | Path, key: str) -> Any:
    """Read a pickle of numpy arrays of numbers, numbers, text and plain containers, and nothing else.

    Bytes of Python 2 are read as text (latin1), as detectron2 reads them. Arrays are copies in the machine's
    byte order. `key` is the option that named the file, for the UserError that a missing file, a file that is
    no pickle and one that asks for anything else raise.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; {key} must name a pickle of arrays")
    try:
        with open(path, "rb") as file:
            return read(file)
    except OSError as error:
        raise UserError(f"{path}: {key} must name a file that can be read ({error.strerror})") from None
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise UserError(
            f"{path}: {key} must name a pickle of arrays and plain containers, and this file is not one "
            f"({type(error).__name__}: {reason})"
        ) from None


def read(file: IO[bytes]) -> Any:
    """Read as `load` does. Bytes that are no such pickle make it raise nearly any kind of exception."""
    return _Arrays(file).load()


def stand_ins() -> dict[tuple[str, str], Any]:
    """Return what stands in for each (module, name) that a pickled array or number refers to.

    numpy's own functions see only what has been checked: several of them trust the state that they are given. The
    stand-ins are made anew for each file, because a pickle can set attributes of what it was given.
    """
    multiarray = "numpy.core.multiarray"
    return {
        (multiarray, "_reconstruct"): lambda kind, shape, code: _Array(0),
        (multiarray, "scalar"): lambda dtype, data: _array((), dtype, False, data).item(),
        ("numpy.core.numeric", "_frombuffer"): lambda data, dtype, shape, order: _array(
            shape, dtype, order == "F", data
        ),
        ("numpy", "dtype"): DType,
        ("numpy", "ndarray"): "ndarray",  # only ever handed to _reconstruct
        ("_codecs", "encode"): lambda text, codec: _bytes(text, codec),
        ("__builtin__", "bytes"): lambda: b"",  # how protocol 2 keeps no bytes
        ("collections", "OrderedDict"): OrderedDict,
    }


class _Arrays(pickle.Unpickler):
    """Knows the stand-ins and nothing else."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, encoding="latin1")
        self._known = stand_ins()

    def find_class(self, module: str, name: str) -> Any:
        # numpy 2 moved numpy.core to numpy._core; files keep the name of their day
        known = self._known.get((module.replace("numpy._core.", "numpy.core."), name))
        if known is None:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return known


class DType:
    """The type of an array's numbers: pickled as a code such as "f4", and a state that has the byte order."""

    def __init__(self, code: Any, align: Any = False, copy: Any = True) -> None:
        if not (isinstance(code, str) and re.fullmatch(r"b1|[iu][1248]|f[248]", code)):
            raise ValueError(f"an array of {code!r}; only arrays of numbers are read")
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        _, order, *structure = state[:5]
        if order not in ("<", ">", "=", "|") or any(part is not None for part in structure):
            raise ValueError("an array of records; only arrays of numbers are read")
        self.order = order


class _Array(np.ndarray):
    """An array that takes its shape and content from a pickled state once both have been checked."""

    def __setstate__(self, state: Any) -> None:
        shape, dtype, fortran, data = state[-4:]  # without a version in very old files
        if not (isinstance(dtype, DType) and isinstance(shape, tuple)):
            raise TypeError("an array without a shape or a type")
        if not all(isinstance(length, int) and length >= 0 for length in shape):
            raise ValueError(f"an array of the shape {shape}")
        kind = np.dtype(dtype.order + dtype.code)
        content = _bytes(data, "latin1") if isinstance(data, str) else bytes(memoryview(data))
        if len(content) != math.prod(shape) * kind.itemsize:
            raise ValueError(f"an array of the shape {shape} in {len(content)} bytes")
        native = np.frombuffer(content, kind).astype(kind.newbyteorder("="))
        super().__setstate__((1, shape, native.dtype, bool(fortran), native.tobytes()))


def _array(shape: Any, dtype: Any, fortran: bool, data: Any) -> _Array:
    array = _Array(0)
    array.__setstate__((shape, dtype, fortran, data))
    return array


def _bytes(text: Any, codec: Any) -> bytes:
    """Encode text as Python 2 and pickle protocol 2 keep bytes; other codecs are not for files of numbers."""
    if not isinstance(text, str) or codec != "latin1":
        raise ValueError(f"the codec {codec!r}")
    return text.encode("latin1")
