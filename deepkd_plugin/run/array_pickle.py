"""Reading a pickle of numpy arrays without running any code from it.

This is the package's own safe unpickler: for model zoos' weights and CIFAR-100. Checkpoints are read by torch's
(run/checkpoint.py), which takes numpy's numbers from here.

A file may be made to harm its reader, so nothing in it is trusted. numpy rebuilds no type and no array from what a
file says: its own functions take such states for true, pointers and lengths among them. Python's reader in C reserves
what a file says that it needs, and hashing a deep enough tuple ends the interpreter. So the reader in Python is used,
with the few instructions that arrays and plain containers need.
"""

import math
import pickle
import pickletools
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..errors import UserError

MOST_DIMENSIONS = 32
DEEPEST = 100
"""Levels of tuples in a pickle that another reader reads."""


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
    """Read as `load` does. Bytes that are no such pickle make it raise nearly any kind of exception.

    What is read takes memory in proportion to the file, whatever the file says.
    """
    size = file.seek(0, 2)
    file.seek(0)
    return _Arrays(file, size).load()


def stand_ins(most: float = math.inf) -> dict[tuple[str, str], Any]:
    """Return what stands in for each (module, name) that a pickled array or number refers to.

    numpy's own functions see only what has been checked. The stand-ins are made anew for each file. most: how many
    bytes they make in all; more raises ValueError, for a file may name the same bytes again and again.
    """
    left = most

    def spend(content: bytes) -> bytes:
        nonlocal left
        left -= len(content)
        if left < 0:
            raise ValueError("its arrays are larger than the file")
        return content

    def array(shape: Any, dtype: Any, fortran: bool, data: Any) -> np.ndarray:
        return _array(shape, dtype, fortran, spend(_content(data)))

    multiarray = "numpy.core.multiarray"
    return {
        (multiarray, "_reconstruct"): lambda kind, shape, code: _Pending(array),
        (multiarray, "scalar"): lambda dtype, data: array((), dtype, False, data).item(),
        ("numpy.core.numeric", "_frombuffer"): lambda data, dtype, shape, order: array(
            shape, dtype, order == "F", data
        ),
        ("numpy", "dtype"): DType,
        ("numpy", "ndarray"): "ndarray",  # only ever handed to _reconstruct
        ("_codecs", "encode"): lambda text, codec: spend(_bytes(text, codec)),
        ("__builtin__", "bytes"): lambda: b"",  # how protocol 2 keeps no bytes
        ("collections", "OrderedDict"): lambda pairs=(): OrderedDict(_checked(pairs)),
    }


def check_depth(file: IO[bytes]) -> None:
    """Raise UnpicklingError, ValueError or IndexError if a pickle nests tuples more deeply than DEEPEST.

    For pickles that another reader is to read: the hash of such a tuple, as a key, ends the interpreter. Nothing is
    built. file: of the bytes in memory; what is behind the pickle stays unread.
    """
    mark = object()
    depths: list[Any] = []  # of what the reader will have on its stack
    memo: dict[int, Any] = {}
    for code, argument, _ in pickletools.genops(file):
        if code.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if argument is None else argument] = depths[-1]
        elif code.name in ("GET", "BINGET", "LONG_BINGET", "DUP"):
            depths.append(depths[-1] if argument is None else memo.get(argument, 0))
        elif code.name == "MARK":
            depths.append(mark)
        elif code.name == "POP":
            depths.pop()
        else:
            taken, needs = [], list(code.stack_before)
            if pickletools.markobject in needs:
                while (depth := depths.pop()) is not mark:
                    taken.append(depth)
                del needs[needs.index(pickletools.markobject) :]
            taken += [depths.pop() for _ in needs]
            made = 1 + max(taken, default=0) if code.name.startswith("TUPLE") else 0
            if made > DEEPEST:
                raise pickle.UnpicklingError(f"tuples in more than {DEEPEST} levels")
            depths += [made] * len(code.stack_after)


class _Pending:
    """What stands for an array until its state arrives, and where it has been remembered."""

    def __init__(self, make: Callable[..., np.ndarray]) -> None:
        self.make = make
        self.places: list[int] = []


class _Memo(dict[int, Any]):
    """What a pickle remembers, by number."""

    def __setitem__(self, place: int, value: Any) -> None:
        super().__setitem__(place, value)
        if isinstance(value, _Pending):
            value.places.append(place)


class _Arrays(pickle._Unpickler):
    """Knows the stand-ins, the instructions of arrays and plain containers, and nothing else."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        super().__init__(file, encoding="latin1")
        # a length in the file is no reason to reserve memory
        self._file_read = lambda count: file.read(min(count, size))
        self._known = stand_ins(2 * size)  # bytes that were kept as text are made twice, as bytes and as an array
        self.memo = _Memo()

    def find_class(self, module: str, name: str) -> Any:
        # numpy 2 moved numpy.core to numpy._core; files keep the name of their day
        known = self._known.get((module.replace("numpy._core.", "numpy.core."), name))
        if known is None:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return known

    def _build(self) -> None:
        state, made = self.stack.pop(), self.stack[-1]
        if isinstance(made, _Pending):
            shape, dtype, fortran, data = state[-4:]  # without a version in very old files
            self.stack[-1] = array = made.make(shape, dtype, bool(fortran), data)
            for place in made.places:
                self.memo[place] = array
        elif isinstance(made, DType):
            made.__setstate__(state)
        else:
            raise pickle.UnpicklingError(f"it sets the state of a {type(made).__name__}")

    def _add(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise pickle.UnpicklingError(f"it appends to a {type(self.stack[-1]).__name__}")
        self.stack[-1].extend(items)

    def _set(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], dict):
            raise pickle.UnpicklingError(f"it sets items of a {type(self.stack[-1]).__name__}")
        self.stack[-1].update(_checked(zip(items[::2], items[1::2], strict=True)))

    def _make_dictionary(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set(items)

    def _make_bytes(self) -> None:
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    def _refuse(self) -> None:
        raise pickle.UnpicklingError("an instruction that arrays and plain containers do not need")

    _PLAIN = (
        *("PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "DUP", "GLOBAL", "STACK_GLOBAL", "REDUCE"),
        *("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "GET", "BINGET", "LONG_BINGET", "NONE", "NEWTRUE", "NEWFALSE"),
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
        *("LIST", "EMPTY_LIST", "EMPTY_DICT"),
    )
    dispatch = (
        dict.fromkeys(range(256), _refuse)
        | {code: pickle._Unpickler.dispatch[code] for code in (getattr(pickle, name)[0] for name in _PLAIN)}
        | {
            pickle.BUILD[0]: _build,
            pickle.APPEND[0]: lambda self: self._add([self.stack.pop()]),
            pickle.APPENDS[0]: lambda self: self._add(self.pop_mark()),
            pickle.SETITEM[0]: lambda self: self._set([self.stack.pop(-2), self.stack.pop()]),
            pickle.SETITEMS[0]: lambda self: self._set(self.pop_mark()),
            pickle.DICT[0]: _make_dictionary,
            pickle.BYTEARRAY8[0]: _make_bytes,
        }
    )


def _checked(pairs: Iterable[Any]) -> list[tuple[Any, Any]]:
    """Return what a dictionary shall hold; ValueError for keys that are more than text or a number."""
    checked = [(key, value) for key, value in pairs]
    if not {type(key) for key, _ in checked} <= {str, bytes, int, float, bool, type(None)}:
        raise ValueError("a dictionary with keys that are neither text nor numbers")
    return checked


class DType:
    """The type of an array's numbers: pickled as a code such as "f4", and a state that has the byte order."""

    def __init__(self, code: Any, align: Any = False, copy: Any = True) -> None:
        if not (isinstance(code, str) and re.fullmatch(r"b1|[iu][1248]|f[248]", code)):
            raise ValueError("only arrays of numbers are read")
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        _, order, *structure = state[:5]
        if order not in ("<", ">", "=", "|") or any(part is not None for part in structure):
            raise ValueError("an array of records; only arrays of numbers are read")
        self.order = order


def _array(shape: Any, dtype: Any, fortran: bool, content: bytes) -> np.ndarray:
    """Make an array of checked parts."""
    if not (isinstance(dtype, DType) and isinstance(shape, tuple)):
        raise TypeError("an array without a shape or a type")
    if len(shape) > MOST_DIMENSIONS or not all(type(length) is int and 0 <= length < 2**40 for length in shape):
        raise ValueError("an array of a shape that none can have")
    kind = np.dtype(dtype.order + dtype.code)
    if len(content) != math.prod(shape) * kind.itemsize:
        raise ValueError(f"an array of the shape {shape} in {len(content)} bytes")
    flat = np.frombuffer(content, kind).astype(kind.newbyteorder("="))
    return flat.reshape(shape, order="F" if fortran else "C")


def _content(data: Any) -> bytes:
    if isinstance(data, str):
        return _bytes(data, "latin1")
    if not isinstance(data, bytes | bytearray):
        raise TypeError("an array without bytes")
    return data


def _bytes(text: Any, codec: Any) -> bytes:
    """Encode text as Python 2 and pickle protocol 2 keep bytes; other codecs are not for files of numbers."""
    if not isinstance(text, str) or codec != "latin1":
        raise ValueError("a codec other than latin1")
    return text.encode("latin1")
