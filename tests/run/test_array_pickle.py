"""Pickles of arrays: what numpy and Python write is read, and nothing in a file is run."""

import collections
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from deepkd_plugin.errors import UserError
from deepkd_plugin.run import array_pickle

HELD = {
    "float32": np.arange(24, dtype=np.float32).reshape(2, 3, 4) / 7,
    "float16": np.float16([1.5, -2]),
    "float64": np.array(2.5),  # no dimensions
    "fortran": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    "big endian": np.arange(5, dtype=">f4"),
    "int64": np.arange(3),
    "bool": np.array([True, False]),
    "empty": np.zeros((0, 3), np.float32),
}


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_and_containers_come_back(tmp_path, protocol):
    held = {
        **{"model": collections.OrderedDict(HELD), "__author__": "zoo", "count": 3, "rate": 0.5},
        **{"scalar": np.float32(1.25), "list": [1, (2, None)], "bytes": b"\x00\xff"},
    }
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(held, protocol))
    read = array_pickle.load(tmp_path / "w.pkl", "KEY")
    arrays = read.pop("model")
    assert list(arrays) == list(HELD)
    for name, value in HELD.items():
        assert isinstance(arrays[name], np.ndarray)
        assert arrays[name].dtype == value.dtype.newbyteorder("=")
        np.testing.assert_array_equal(arrays[name], value)
        arrays[name][...] = 0  # writable
    del held["model"]
    assert read == held


def test_numpy_s_functions_are_known_by_their_old_and_new_places(tmp_path):
    content = pickle.dumps(HELD["float32"], 2)
    for old, new in ((b"numpy.core.", b"numpy._core."), (b"numpy._core.", b"numpy.core.")):
        (tmp_path / "w.pkl").write_bytes(content.replace(old, new))
        np.testing.assert_array_equal(array_pickle.load(tmp_path / "w.pkl", "KEY"), HELD["float32"])


def test_a_file_of_python_2_is_read(tmp_path):
    """MSRA's files: str for text and for an array's content, and "L" numbers in shapes."""

    def text(value):
        return b"T" + struct.pack("<i", len(value)) + value

    values = np.array([1.5, -200], "<f4")
    dtype = b"cnumpy\ndtype\n(U\x02f4K\x00K\x01tR(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
        b"(K\x01(L2L\ntlK\x00" + text(values.tobytes()) + b"tb"
    ).replace(b"lK\x00", dtype + b"I00\n")
    (tmp_path / "w.pkl").write_bytes(b"\x80\x02}(U\x07conv1_w" + array + b"u.")
    read = array_pickle.load(tmp_path / "w.pkl", "KEY")
    assert list(read) == ["conv1_w"]
    np.testing.assert_array_equal(read["conv1_w"], values)


class Call:
    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    ("function", "named"),
    [
        (os.mkdir, "posix.mkdir"),
        (eval, ".eval"),
        (getattr, ".getattr"),
        (np.load, "numpy.load"),
        (np.frombuffer, "frombuffer"),
        (np.memmap, "numpy.memmap"),
        (collections.Counter, "collections.Counter"),
    ],
)
def test_nothing_else_is_called(tmp_path, protocol, function, named):
    mark = tmp_path / "ran"
    held = {"model": {"w": Call(function, str(mark))}}
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(held, protocol))
    refused(tmp_path, f"it refers to .*{named}")
    assert not mark.exists()


def refused(tmp_path, reason, content=None):
    if content is not None:
        (tmp_path / "w.pkl").write_bytes(content)
    with pytest.raises(UserError, match=reason) as caught:
        array_pickle.load(tmp_path / "w.pkl", "TEACHER")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'w.pkl'}: TEACHER must name a pickle of arrays and plain containers")
    assert "\n" not in message


def test_arrays_of_other_things_are_refused(tmp_path):
    for held in (
        np.array([{}]),
        np.array(["a"]),
        np.zeros(2, "i4,f4"),
        np.zeros(1, "M8[s]"),
        np.zeros(1, "c8"),
    ):
        refused(tmp_path, "only arrays of numbers are read", pickle.dumps(held))
    refused(tmp_path, "only arrays of numbers are read", pickle.dumps(np.dtype("O")))


ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tC\x01btR"
FLOAT = b"cnumpy\ndtype\n(X\x02\x00\x00\x00f4tR"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"the quick brown fox",
        b"PK\x03\x04",
        pickle.dumps(HELD)[:300],
        # a shape that its bytes do not fill, a negative one, one that is no tuple, a type that is none
        ARRAY + b"(K\x01K\x09\x85" + FLOAT + b"\x89C\x04aaaatb.",
        ARRAY + b"(K\x01J\xff\xff\xff\xff\x85" + FLOAT + b"\x89C\x04aaaatb.",
        ARRAY + b"(K\x01]" + FLOAT + b"\x89C\x04aaaatb.",
        ARRAY + b"(K\x01K\x01\x85X\x02\x00\x00\x00f4\x89C\x04aaaatb.",
        ARRAY + b"}b.",
        # the stand-in for the class is no class, codecs are not for choosing, no dotted names, no persistent ids
        b"\x80\x02cnumpy\nndarray\n(K\x01t\x81.",
        b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x03\x00\x00\x00hextR.",
        b"\x80\x04\x8c\x05numpy\x8c\x0bdtype.names\x93.",
        b"P0\n.",
        b"}" * 10 + b"R.",
    ],
)
def test_damaged_and_made_up_files_are_one_line(tmp_path, content):
    refused(tmp_path, "this file is not one", content)


@pytest.mark.parametrize(
    "target", [b"cnumpy.core.multiarray\nscalar\n", b"cnumpy\ndtype\n", b"ccollections\nOrderedDict\n)R", b"]"]
)
def test_only_arrays_and_their_types_have_a_state(tmp_path, target):
    """BUILD would set attributes of what a pickle was given, the stand-ins among them."""
    refused(tmp_path, "it sets the state of a", target + b"(N}X\x04\x00\x00\x00codeX\x01\x00\x00\x00Ostb.")


def test_an_array_that_is_named_twice_is_one(tmp_path):
    array = np.arange(3.0)
    (tmp_path / "w.pkl").write_bytes(pickle.dumps([array, {"again": array}], 2))
    first, second = array_pickle.load(tmp_path / "w.pkl", "KEY")
    assert second["again"] is first
    np.testing.assert_array_equal(first, array)


def test_arrays_are_no_larger_than_their_file(tmp_path):
    """A file may name the same bytes again and again."""
    start = b"\x80\x04B\xe8\x03\x00\x00" + b"a" * 1000 + b"\x94" + FLOAT.replace(b"f4", b"u1") + b"\x940("
    array = ARRAY + b"(K\x01M\xe8\x03\x85h\x01\x89h\x00tb"
    refused(tmp_path, "its arrays are larger than the file", start + array * 3 + b"l.")
    (tmp_path / "w.pkl").write_bytes(start + array + b"l.")
    assert array_pickle.load(tmp_path / "w.pkl", "KEY")[0].tobytes() == b"a" * 1000


@pytest.mark.parametrize("code", [b"\x8d", b"\x8e", b"\x96", b"\x95", b"r"])
def test_a_length_in_a_file_reserves_no_memory(tmp_path, code):
    (tmp_path / "w.pkl").write_bytes(b"\x80\x05N" + code + struct.pack("<Q", (1 << 31) - 1) + b"abc.")
    tracemalloc.start()
    with pytest.raises(UserError):
        array_pickle.load(tmp_path / "w.pkl", "KEY")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_keys_are_text_or_numbers(tmp_path):
    """The hash of a deep enough tuple ends the interpreter."""
    for content in (b"}N\x85Ns.", b"}(N\x85Nu.", b"(N\x85Nd.", b"ccollections\nOrderedDict\n]N\x85N\x86a\x85R."):
        refused(tmp_path, "keys that are neither text nor numbers", content)
    refused(tmp_path, "an instruction that arrays and plain containers do not need", b"\x8f(N\x90.")


def test_a_file_that_is_missing(tmp_path):
    with pytest.raises(UserError, match=r"none\.pkl: no such file; STUDENT must name a pickle of arrays"):
        array_pickle.load(tmp_path / "none.pkl", "STUDENT")


@pytest.mark.parametrize("count", [150, pytest.param(2000, marks=pytest.mark.slow)])
def test_made_up_files_never_end_the_interpreter(tmp_path, count):
    """numpy's own dtype takes file bytes for pointers: of these files it crashes on one of the first hundred."""
    script = Path(__file__).with_name("fuzz_pickles.py")
    ended = subprocess.run(
        [sys.executable, str(script), str(count), "0", str(tmp_path)], capture_output=True, text=True, timeout=900
    )
    assert ended.returncode == 0, ended.stderr
    read, refused = map(int, ended.stdout.split())
    assert read + refused == 3 * count
    assert min(read, refused) > count / 15  # sound ones are among them
