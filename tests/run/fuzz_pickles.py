"""Read COUNT made-up and damaged pickles of arrays: python fuzz_pickles.py COUNT SEED FOLDER.

Each must be read or be one UserError, in 10 s and little memory. If one ends the interpreter or lasts, this process
ends, and the test sees it.
"""

import pickle
import pickletools
import random
import resource
import signal
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deepkd_plugin.data.cifar100 import read_cifar100
from deepkd_plugin.errors import UserError
from deepkd_plugin.run import array_pickle, checkpoint

CONTENT = {
    "filenames": ["a.png", "b.png"],
    "fine_labels": [3, np.int64(5)],
    "data": np.arange(2 * 3072, dtype=np.uint8).reshape(2, 3072),
    "more": [np.asfortranarray(np.ones((2, 2), ">f4")), np.float64(0.5), b"\x00\xff"],
}


class Made:
    """Pickles as a call and a state."""

    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> Any:
        return self.reduced


def dtype(draw: random.Random) -> Any:
    """Make a type of numbers, or of anything else, whose state may contradict it."""
    code = draw.choice(["f4", "u1", "O", "O8", "V8", "V16", "S8", "U2", "M8[s]", "c16", "i8,i8", "(2,)f4", 8, None])
    place = draw.choice([0, 8, -8, 1 << 40])
    fields = draw.choice(
        [None, None, {"a": (np.dtype("O"), 0)}, {"a": (np.dtype("f4"), 0), "b": (np.dtype("O"), place)}]
    )
    names = tuple(fields) if fields else None
    inner = draw.choice([None, None, (np.dtype("O"), (draw.choice([1, 2, 1 << 40]),))])
    size = draw.choice([-1, 0, 8, 16, 1 << 40])
    flags = draw.choice([0, 1, 27, 63])
    state = (draw.choice([3, 4]), draw.choice(["<", ">", "|", "O"]), inner, names, fields, size, 1, flags)
    return Made(np.dtype, (code, False, True), state)


def array(draw: random.Random) -> Any:
    """Make an array whose shape, type and content may not go together."""
    make = np.ndarray.__reduce__(np.zeros(1))[0]
    shape = draw.choice([(), (1,), (2, 1), (-1,), (1 << 40,), (1 << 62, 4), [2]])
    of = draw.choice([dtype(draw), dtype(draw), np.dtype("O"), np.dtype("f4")])
    content = draw.choice([b"A" * 8, b"A" * 16, b"", "AAAAAAAA", [1], np.ones(2), None])
    return Made(make, (np.ndarray, (0,), b"b"), (1, shape, of, draw.choice([True, False]), content))


def scalar(draw: random.Random) -> Any:
    """Make a number out of a type and bytes."""
    return Made(np.float64(0).__reduce__()[0], (dtype(draw), draw.choice([b"A" * 8, b"A" * 16, b"", "A" * 8])))


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Change a few bytes, or move a piece to elsewhere."""
    mutant = bytearray(content)
    for _ in range(draw.randint(1, 3)):
        place, piece = draw.randrange(len(mutant)), draw.randint(1, 20)
        way = draw.randrange(3)
        if way == 0:
            mutant[place] = draw.randrange(256)
        elif way == 1:
            mutant[place:place] = mutant[draw.randrange(len(mutant)) :][:piece]
        else:
            del mutant[place : place + piece]
    return bytes(mutant)


CODES = [code.code.encode("latin1") for code in pickletools.opcodes]
MANY = struct.pack("<Q", 1 << 40)
BOMBS = (
    b"}N" + b"\x85" * 300_000 + b"Ns.",  # a dictionary's key whose hash needs a deeper stack than there is
    b"\x8f(N" + b"\x85" * 300_000 + b"\x90.",  # the same in a set
    b"Nr\xff\xff\xff\x7f.",  # a place in the memo that the reader in C makes room for
    *(b"\x80\x05" + code + MANY + b"x." for code in (b"\x8d", b"\x8e", b"\x96", b"\x95")),
    b"\x8b\xff\xff\xff\x7f.",
    b"I" + b"9" * 300_000 + b"\n.",
    b"]" + b"2(e" * 300_000 + b".",
    # a text that is encoded again and again
    b"c_codecs\nencode\np0\n0X"
    + struct.pack("<I", 100_000)
    + b"a" * 100_000
    + b"X\6\0\0\0latin1\x86p1\n0("
    + b"g0\ng1\nR" * 20_000
    + b"l.",
)


def instructions(draw: random.Random) -> bytes:
    """Make a run of instructions, most of them with what they need."""
    parts = [b"\x80\x04"]
    for _ in range(draw.randint(1, 30)):
        parts.append(
            draw.choice(
                [
                    draw.choice(CODES),
                    draw.choice(CODES) + draw.randbytes(draw.choice([1, 2, 4, 8])),
                    b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\0\x85C\1btR",
                    b"cnumpy\ndtype\n(X\2\0\0\0u1\x89\x88tR",
                    b"cnumpy.core.multiarray\nscalar\n",
                    b"ccollections\nOrderedDict\n)R",
                    b"(K\1K\4\x85h\1\x89C\4abcdtb",
                    b"C\4abcd",
                    b"K\1",
                    b"(",
                    b"}",
                    b"]",
                    b"\x94",
                    b"h\0",
                    b"R",
                    b"b",
                    b"s",
                ]
            )
        )
    return b"".join(parts) + b"."


def as_network(file: Path, content: bytes, packed: bool) -> None:
    """Put a pickle where torch's reader looks for it."""
    if not packed:
        file.write_bytes(content)
        return
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3")


def main(count: int, seed: int, folder: Path) -> None:
    """Print how many were read and how many refused."""
    # a damaged length must not take the machine's memory either
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
    draw = random.Random(seed)
    (folder / "cifar-100-python").mkdir(parents=True)
    file, network = folder / "cifar-100-python" / "train", folder / "network.pth"
    readers = (
        lambda: array_pickle.load(file, "KEY"),
        lambda: read_cifar100(folder, "train"),
        lambda: checkpoint.load(network, "KEY"),
    )
    refused = 0
    for i in range(count):
        made = draw.choice([array, scalar])(draw)
        content = pickle.dumps(CONTENT | ({"more": made} if i % 2 else {}), draw.randrange(6))
        content = content if i % 2 else damaged(content, draw)
        if i < len(BOMBS):
            content = BOMBS[i]
        elif i % 5 == 0:
            content = instructions(draw)
        file.write_bytes(content)
        torch.save({"best_acc": scalar(draw)}, network, _use_new_zipfile_serialization=i % 3 == 0)
        if i < len(BOMBS):
            as_network(network, BOMBS[i], i % 2 == 0)
        for read in readers:
            signal.alarm(10)  # its default ends the process
            try:
                repr(read())
            except (UserError, RecursionError) as error:  # what is nested too deeply for repr has been read
                refused += 1
                if "\n" in str(error):
                    sys.exit(f"more than one line: {error}")
            signal.alarm(0)
        if not i:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    if more > 300:
        sys.exit(f"reading took {more} MiB")
    print(len(readers) * count - refused, refused)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
