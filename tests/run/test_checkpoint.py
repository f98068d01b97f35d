import errno
import hashlib
import io
import math
import os
import pickle
import signal
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from fuzz_pickles import as_network
from torch import nn

from deepkd_plugin.errors import UserError
from deepkd_plugin.run import checkpoint


def network(classes=10, width=4):
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, classes))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"model": s},
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": {f"module.{k}": v for k, v in s.items()}, "best_acc": 71.5},
        lambda s: {"model_state_dict": s, "optimizer_state_dict": {"state": {}}},
        lambda s: {"net": s, "acc": 1.0},
        lambda s: {"state_dict": {"model": s}},
        lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
        lambda s: {f"{('module.', '_orig_mod.module.', '')[i % 3]}{k}": v for i, (k, v) in enumerate(s.items())},
        lambda s: {k: v for k, v in s.items() if "num_batches" not in k},
    ],
)
def test_weights_load_from_every_usual_layout(tmp_path, wrap):
    source, target = network(), network()
    torch.save(wrap(source.state_dict()), tmp_path / "w.pt")
    checkpoint.load_weights(target, tmp_path / "w.pt", "KEY", "net")
    for name, value in source.state_dict().items():
        assert torch.equal(value, target.state_dict()[name])


def test_two_tensors_of_one_name_are_no_network(tmp_path):
    whole = network().state_dict()
    refused(tmp_path, whole | {"module.0.bias": torch.zeros(4)}, "must hold a network's state dictionary")
    around = {}
    around["model"] = around
    refused(tmp_path, around, "holds a mapping with model")


def test_a_file_of_several_networks_says_which_is_taken(tmp_path, capsys):
    one, other, target = network(), network(), network()
    for name in checkpoint.AVERAGES:
        torch.save({"state_dict": one.state_dict(), name: other.state_dict()}, tmp_path / "w.pt")
        checkpoint.warn.cache_clear()
        checkpoint.load_weights(target, tmp_path / "w.pt", "KEY", "net")
        assert checkpoint.fingerprint(target) == checkpoint.fingerprint(one)
        assert f"w.pt: holds state_dict and {name}; KEY takes state_dict" in capsys.readouterr().err
    several = {"net": one.state_dict(), "model": other.state_dict()}
    refused(tmp_path, several, "holds several networks, model, net; it must hold one of them")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (lambda: torch.full((4, 3), math.nan), "0.weight holds NaN or an infinite number"),
        (lambda: torch.full((4, 3), -math.inf), "0.weight holds NaN or an infinite number"),
        (lambda: torch.zeros(4, 3).to_sparse(), "0.weight is a sparse or nested tensor"),
        (lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]), "0.weight is a sparse or nested tensor"),
        (lambda: torch.quantize_per_tensor(torch.zeros(4, 3), 0.1, 0, torch.qint8), "0.weight is of torch.qint8"),
        (lambda: torch.zeros(4, 3, dtype=torch.complex64), "0.weight is of torch.complex64"),
        (lambda: torch.zeros(4, 3, dtype=torch.int8), "0.weight is of torch.int8, not of floating point"),
        (lambda: torch.zeros(4, 3, device="meta"), "0.weight holds nothing"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_no_weights(tmp_path, value, reason):
    refused(tmp_path, network().state_dict() | {"0.weight": value()}, reason)


def test_half_precision_is_read(tmp_path):
    torch.save(network().half().state_dict(), tmp_path / "w.pt")
    checkpoint.load_weights(network(), tmp_path / "w.pt", "KEY", "net")


@pytest.mark.parametrize(("name", "student"), [("best", "student_best"), ("epoch_40", "student_40")])
def test_a_trainer_s_state_names_the_student_s_file(tmp_path, name, student):
    content = {"model": {f"student.{k}": v for k, v in network().state_dict().items()}, "config": {}, "epoch": 3}
    torch.save(content, tmp_path / name)
    with pytest.raises(UserError, match=f"holds a trainer's state; use {student}, which is beside it"):
        checkpoint.load_weights(network(), tmp_path / name, "-c", "net")


def test_one_flipped_bit_is_found(tmp_path):
    """In any tensor, anywhere."""
    torch.save({"model": network(width=64).state_dict()}, tmp_path / "w.pt")
    raw = (tmp_path / "w.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "w.pt") as archive:
        entries = [(entry.header_offset + 64, entry.file_size) for entry in archive.infolist() if entry.file_size > 64]
    assert len(entries) > 5
    for start, size in entries:
        flipped = bytearray(raw)
        flipped[start + size // 2] ^= 4
        refused(tmp_path, None, r"names a damaged file \(its entry \S+ has another checksum", raw=bytes(flipped))


def test_weights_in_the_safetensors_format(tmp_path):
    """Ours and other people's, which hold no hash; tied weights become tensors of their own."""
    source, target = network(), network()
    source[2].weight = nn.Parameter(source[2].weight.detach().T.contiguous().T)
    checkpoint.save_weights(source.state_dict(), tmp_path / "w.safetensors")
    checkpoint.load_weights(target, tmp_path / "w.safetensors", "KEY", "net")
    assert checkpoint.fingerprint(target) == checkpoint.fingerprint(source)
    theirs = {f"module.{name}": value.bfloat16() for name, value in target.state_dict().items() if value.ndim}
    safetensors.torch.save_file(theirs, tmp_path / "theirs.safetensors")
    checkpoint.load_weights(target, tmp_path / "theirs.safetensors", "KEY", "net")
    assert torch.equal(target[0].weight, source[0].weight.bfloat16().float())
    checkpoint.save_weights({"a": source[0].weight, "b": source[0].weight}, tmp_path / "tied.safetensors")
    tied = checkpoint.load(tmp_path / "tied.safetensors", "KEY")
    assert torch.equal(tied["a"], tied["b"])


@pytest.mark.parametrize("place", [4, 60, -1])
def test_one_flipped_bit_is_found_in_the_safetensors_format_too(tmp_path, place):
    """In the size of its header, in the header, and in a number."""
    checkpoint.save_weights(network().state_dict(), tmp_path / "w.safetensors")
    raw = bytearray((tmp_path / "w.safetensors").read_bytes())
    raw[place] ^= 4
    (tmp_path / "w.safetensors").write_bytes(raw)
    with pytest.raises(UserError, match=r"w.safetensors: KEY names a damaged file \(.+\); it must be copied"):
        checkpoint.load_weights(network(), tmp_path / "w.safetensors", "KEY", "net")
    (tmp_path / "w.safetensors").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(UserError, match="KEY names a damaged file"):
        checkpoint.load(tmp_path / "w.safetensors", "KEY")


def test_an_older_file_is_held_against_the_hash_in_its_name(tmp_path):
    torch.save(network().state_dict(), tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    raw = (tmp_path / "w.pth").read_bytes()
    whole = tmp_path / f"net-{hashlib.sha256(raw).hexdigest()[:8]}.pth"
    whole.write_bytes(raw)
    checkpoint.load_weights(network(), whole, "KEY", "net")
    whole.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(UserError, match="names a damaged file .its hash is "):
        checkpoint.load_weights(network(), whole, "KEY", "net")


def test_a_full_disk_is_an_error_of_the_system(tmp_path):
    """torch hides it behind one of its own."""

    class Full(io.RawIOBase):
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        checkpoint.write_state({"a": torch.zeros(10_000)}, Full())


def test_temporary_files_are_known_by_their_names(tmp_path):
    for name in (".latest.12.tmp", ".a.b.7.tmp", "latest", ".latest.tmp", "x.12.tmp"):
        (tmp_path / name).touch()
    assert sorted(checkpoint.temporaries(tmp_path)) == [
        (tmp_path / ".a.b.7.tmp", "a.b", 7),
        (tmp_path / ".latest.12.tmp", "latest", 12),
    ]
    assert checkpoint.temporaries(tmp_path / "nowhere") == []
    assert checkpoint.is_running(os.getpid())


def test_an_outline_is_of_all_but_the_numbers_of_tensors():
    state = {"a": [1, {"b": torch.zeros(2)}], "c": (0.5, "x", None)}
    same = {"a": [1, {"b": torch.ones(2)}], "c": (0.5, "x", None)}
    assert checkpoint.outline(state) == checkpoint.outline(same)
    others = [
        {"a": [1, {"b": torch.zeros(3)}], "c": (0.5, "x", None)},
        {"a": [1, {"b": torch.zeros(2).double()}], "c": (0.5, "x", None)},
        {"a": [2, {"b": torch.zeros(2)}], "c": (0.5, "x", None)},
        {"a": [1, {"b_": torch.zeros(2)}], "c": (0.5, "x", None)},
        {"a": [1, {}], "c": (0.5, "x", None)},
    ]
    assert len({checkpoint.outline(one) for one in [state, *others]}) == 6


@pytest.mark.parametrize("place", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_numpys_numbers_are_read_under_old_and_new_names(tmp_path, place):
    """RepDistiller's teacher files hold their accuracy as a numpy scalar, pickled under numpy's old names."""
    held = {"model": network().state_dict(), "epoch": 240, "best_acc": np.float64(72.5)}
    path = tmp_path / "w.pth"
    torch.save(held, path, _use_new_zipfile_serialization=False)
    other = {"numpy.core.multiarray", "numpy._core.multiarray"} - {place}
    path.write_bytes(path.read_bytes().replace(f"c{other.pop()}\n".encode(), f"c{place}\n".encode()))
    before = set(torch.serialization.get_safe_globals())
    read = checkpoint.load(path, "KEY")
    assert (read["best_acc"], read["epoch"]) == (72.5, 240)
    assert set(torch.serialization.get_safe_globals()) == before
    checkpoint.load_weights(network(), path, "KEY", "net")


def test_numpys_arrays_are_not(tmp_path):
    for held in ({"a": np.zeros(2)}, {"a": np.asarray([{}], dtype=object)}):
        torch.save(held, tmp_path / "w.pth")
        with pytest.raises(UserError, match="this file is not one"):
            checkpoint.load(tmp_path / "w.pth", "KEY")


def refused(tmp_path, content, match, raw=None):
    path = tmp_path / "w.pt"
    if raw is None:
        torch.save(content, path)
    elif raw is not False:
        path.write_bytes(raw)
    target = network()
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(UserError, match=match) as caught:
        checkpoint.load_weights(target, path, "DISTILLER.TEACHER_WEIGHTS", "net")
    assert str(path) in str(caught.value)
    assert "DISTILLER.TEACHER_WEIGHTS" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


def test_files_that_are_something_else(tmp_path):
    refused(tmp_path, None, "no such file", raw=False)
    refused(tmp_path, None, "this file is not one", raw=b"not a checkpoint")
    refused(tmp_path, None, "this file is not one", raw=b"")
    refused(tmp_path, [1, 2], "must hold a network's state dictionary, holds a list")
    refused(tmp_path, {"epoch": 3}, "holds a mapping with epoch")
    refused(tmp_path, {1: torch.zeros(1)}, "holds a mapping with 1")
    for text in (b".", b"a", b"R", b"b\n", b"]", b"h\x00", b"the quick brown fox"):
        refused(tmp_path, None, "this file is not one", raw=text)
    whole = tmp_path / "whole.pt"
    torch.save(network().state_dict(), whole)
    refused(tmp_path, None, r"names a damaged file \(it ends too early\)", raw=whole.read_bytes()[:600])


def test_an_archive_that_would_grow_is_refused_before_it_is_unpacked(tmp_path):
    """torch packs nothing; a few kB of zeros that are packed can be many GB."""
    with zipfile.ZipFile(tmp_path / "w.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w/data/0", bytes(10**7))
    refused(tmp_path, None, r"names a damaged file \(its entry w/data/0 is packed\)", raw=False)


def test_weights_of_another_network_or_class_count(tmp_path):
    refused(tmp_path, network(classes=7).state_dict(), "holds a net of 7 classes; this run has 10")
    refused(
        tmp_path,
        network(width=5).state_dict(),
        r"another network than net: 0.weight is \(5, 3\), not \(4, 3\)",
    )
    short = dict(list(network().state_dict().items())[2:])
    refused(tmp_path, short, r"2 of its 9 tensors are missing and 0 are unknown to it \(no 0.weight\)")
    more = network().state_dict() | {"extra": torch.zeros(1)}
    refused(tmp_path, more, r"1 are unknown to it \(an unknown extra\)")
    *_, last = network().state_dict()
    for value in (torch.tensor(0.0), torch.zeros(1, 1, 1, 1, 1)):
        held = network().state_dict() | {last: value}
        refused(tmp_path, held, rf"another network than net: {last} is \(")


def test_a_fingerprint_is_of_the_numbers(tmp_path):
    net = network()
    before = checkpoint.fingerprint(net)
    assert checkpoint.fingerprint(net.to(memory_format=torch.channels_last)) == before
    with torch.no_grad():
        net[0].weight[0, 0] += 1e-6
    assert checkpoint.fingerprint(net) != before


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    mark = tmp_path / "ran"
    refused(tmp_path, {"model": Payload(mark)}, "this file is not one")
    refused(tmp_path, None, "this file is not one", raw=pickle.dumps(Payload(mark)))
    assert not mark.exists()


def test_writing_leaves_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "latest"
    checkpoint.save({"epoch": 1}, path)

    def broken(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.write_whole(path, broken)
    assert checkpoint.load(path, "KEY") == {"epoch": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["latest"]
    checkpoint.save({"epoch": 2}, path)
    assert checkpoint.load(path, "KEY") == {"epoch": 2}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_end_of_an_uninterrupted_block(number):
    """The handlers before are the ones that get it, and they are back afterwards."""
    got, steps = [], []
    before = signal.signal(number, lambda n, frame: got.append((n, list(steps))))
    try:
        with checkpoint.uninterrupted():
            os.kill(os.getpid(), number)
            steps.append("first")
            os.kill(os.getpid(), number)
            steps.append("second")
        assert got == [(number, ["first", "second"])]
        os.kill(os.getpid(), number)
        assert len(got) == 2
    finally:
        signal.signal(number, before)


def test_an_interruption_by_keyboard_is_raised_after_the_block():
    done = []

    def work():
        with checkpoint.uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            done.append(1)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == [1]


@pytest.mark.parametrize("packed", [True, False])
def test_a_key_of_many_levels_does_not_end_the_interpreter(tmp_path, packed):
    """torch's reader hashes it, tuple in tuple, until the stack is full; so it must not come so far."""
    deep = b"}N" + b"\x85" * 200_000 + b"Ns."
    for content in (deep if packed else b"K\x01." + deep, b"Nq\x00" + b"0h\x00\x85q\x00" * 200 + b"}h\x00Ns."):
        as_network(tmp_path / "w.pth", content, packed)
        with pytest.raises(UserError, match="KEY must name a checkpoint of tensors and plain containers"):
            checkpoint.load(tmp_path / "w.pth", "KEY")


def test_the_form_of_a_file_is_told_as_torch_tells_it(tmp_path):
    torch.save({}, tmp_path / "sound.pth")
    (tmp_path / "w.pth").write_bytes(b"}N" + b"\x85" * 200_000 + b"Ns." + (tmp_path / "sound.pth").read_bytes())
    with pytest.raises(UserError, match="tuples in more than 100 levels"):
        checkpoint.load(tmp_path / "w.pth", "KEY")


@pytest.mark.parametrize("packed", [True, False])
def test_tuples_of_a_few_levels_are_read(tmp_path, packed):
    held = {("a", (1, (2, 3))): [(torch.ones(2),)], "again": ((((), ()),),)}
    torch.save(held, tmp_path / "w.pth", _use_new_zipfile_serialization=packed)
    assert str(checkpoint.load(tmp_path / "w.pth", "KEY")) == str(held)
