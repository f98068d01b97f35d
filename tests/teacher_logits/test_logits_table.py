"""The file of teacher logits: nothing is read that was not written, whatever happens to the file."""

import json
import multiprocessing
import os
import shutil
import signal
import time
from dataclasses import replace

import numpy as np
import pytest

from deepkd_plugin.errors import UserError
from deepkd_plugin.teacher_logits import table as tables
from deepkd_plugin.teacher_logits.record import DTYPES
from deepkd_plugin.teacher_logits.table import HEADER, Damaged, Key, Table

KEY = Key("resnet20", "ab" * 8, "glyphs100", "cd" * 8, 7, 5, "crop", 3, "float32", "float16")


def places(key=KEY):
    images, views = np.divmod(np.arange(key.count * key.views), key.views)
    return images, views


def logits_of(images, views, key=KEY):
    """Logits that say which view they are of."""
    return np.stack([1 + images, 1 + views, -1 - images * key.views - views], 1).astype(DTYPES[key.dtype])


def filled(folder, key=KEY):
    table = Table.make(folder, key)
    table.write(*places(key), logits_of(*places(key), key))
    return table


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_was_written_is_read(tmp_path, dtype):
    key = replace(KEY, dtype=dtype)
    table = Table.make(tmp_path / "new", key)
    images, views = np.array([6, 0, 3]), np.array([4, 0, 2])
    assert not table.read(images, views)[1].any()
    table.write(images, views, logits_of(images, views, key))
    asked = np.array([6, 6, 3, 0]), np.array([4, 3, 2, 0])
    logits, there = Table.make(tmp_path / "new", key).read(*asked)
    assert there.tolist() == [True, False, True, True]
    assert np.array_equal(logits[there], logits_of(*asked, key)[there])
    assert logits.dtype == DTYPES[dtype]
    assert not logits[1].any()


def test_of_any_flipped_byte_no_wrong_logit_is_read(tmp_path):
    """Every byte of the file in turn: in the header the file is refused, in a record that record is not there."""
    table = filled(tmp_path)
    path, whole = table.path, table.path.read_bytes()
    truth = logits_of(*places())
    assert len(whole) == KEY.size
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        if place < HEADER:
            with pytest.raises(Damaged, match="its header is damaged"):
                Table.open(path)
            continue
        table = Table.open(path)
        logits, there = table.read(*places())
        table.close()
        assert np.flatnonzero(~there).tolist() == [(place - HEADER) // KEY.record]
        assert np.array_equal(logits[there], truth[there])
    damaged = Table.open(path)
    assert list(damaged.counts())[-1] == (35, 34, 1)


def test_a_record_counts_only_in_its_own_place_of_its_own_table(tmp_path):
    table, other = filled(tmp_path), Table.make(tmp_path, replace(KEY, teacher="ef" * 8))
    content = bytearray(table.path.read_bytes())
    first, second = (slice(HEADER + n * KEY.record, HEADER + (n + 1) * KEY.record) for n in (0, 1))
    copied = bytearray(other.path.read_bytes())
    copied[second] = content[second]
    other.path.write_bytes(copied)
    content[second] = content[first]
    table.path.write_bytes(content)
    assert not table.read(np.array([0]), np.array([1]))[1].any()
    assert not other.read(np.array([0]), np.array([1]))[1].any()
    assert table.damaged == other.damaged == 1


def test_a_truncated_table_lacks_its_end_and_can_be_filled_again(tmp_path):
    table = filled(tmp_path)
    os.truncate(table.path, KEY.size - KEY.record - 1)
    logits, there = table.read(*places())
    assert there.sum() == 33
    assert list(table.counts())[-1] == (35, 33, 1)
    table.write(*places(), logits_of(*places()))
    logits, there = table.read(*places())
    assert there.all()
    assert np.array_equal(logits, logits_of(*places()))


def test_a_table_of_something_else_is_refused_with_what_differs(tmp_path):
    path = filled(tmp_path).path
    for change in ({"teacher": "0" * 16}, {"images": "1" * 16}, {"views": 6}, {"dtype": "float32"}):
        ((name, value),) = change.items()
        other = replace(KEY, **change)
        with pytest.raises(UserError) as refused:
            Table.make(path, other)
        assert f"{name} is {getattr(KEY, name)!r}, not {value!r}" in str(refused.value)
        assert Table.make(tmp_path, other).path != path  # in a folder it has a file of its own
    os.rename(path, tmp_path / replace(KEY, classes=4).name)
    with pytest.raises(UserError, match="classes is 3, not 4"):
        Table.make(tmp_path, replace(KEY, classes=4))


def test_a_newer_table_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as newer:
        newer.setattr(tables, "FORMAT", 3)
        path = filled(tmp_path, replace(KEY, seed=0)).path
    for read in (lambda: Table.open(path), lambda: Table.make(tmp_path, replace(KEY, seed=0))):
        with pytest.raises(UserError, match="of format 3, and this version reads up to 2"):
            read()
    assert json.loads(path.read_bytes()[26:HEADER].rstrip(b"\0"))["format"] == 3


def test_a_disk_without_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=KEY.size - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"takes up to 0.0 MB, and the disk has 0.0 MB left"):
        Table.make(tmp_path, KEY)
    assert not list(tmp_path.iterdir())


def test_a_table_takes_no_space_before_it_is_used(tmp_path):
    key = replace(KEY, count=10_000_000)
    table = Table.make(tmp_path, key)
    assert table.path.stat().st_size == key.size > 400e6
    assert table.path.stat().st_blocks * 512 < 1e6


def test_a_making_that_was_interrupted_is_done_again(tmp_path):
    (tmp_path / KEY.name).touch()
    assert Table.make(tmp_path, KEY).key == KEY
    os.truncate(tmp_path / KEY.name, 0)
    os.truncate(tmp_path / KEY.name, KEY.size)
    assert filled(tmp_path).read(*places())[1].all()


def test_other_files_are_no_tables(tmp_path):
    path = tmp_path / "notes.logits"
    path.write_text("notes")
    for read in (lambda: Table.open(path), lambda: Table.make(path, KEY)):
        with pytest.raises(Damaged):
            read()
    assert path.read_text() == "notes"


def test_the_share_is_estimated(tmp_path):
    key = replace(KEY, count=4000)
    table = Table.make(tmp_path, key)
    images, views = places(key)
    table.write(images[::4], views[::4], logits_of(images[::4], views[::4], key))
    assert table.share() == pytest.approx(0.25, abs=0.03)
    assert Table.make(tmp_path, KEY).share() == 0
    assert filled(tmp_path).share() == 1


def fill_in_order(folder, order, ready):
    ready.wait()
    table = Table.make(folder, BIG)
    images, views = places(BIG)
    for start in range(0, len(images), 50):
        rows = order[start : start + 50]
        table.write(images[rows], views[rows], logits_of(images[rows], views[rows], BIG))
        logits, there = table.read(images, views)
        assert np.array_equal(logits[there], logits_of(images, views, BIG)[there])
        assert not table.damaged


BIG = replace(KEY, count=200)


def test_two_processes_make_and_fill_one_table_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    ready = context.Barrier(2)
    orders = np.arange(1000), np.arange(1000)[::-1].copy()
    processes = [context.Process(target=fill_in_order, args=(tmp_path, order, ready)) for order in orders]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    (path,) = tmp_path.iterdir()
    assert list(Table.open(path).counts())[-1] == (1000, 1000, 0)


def fill_for_ever(folder):
    table = Table.make(folder, BIG)
    while True:
        table.write(*places(BIG), logits_of(*places(BIG), BIG))


def test_a_kill_while_filling_leaves_no_wrong_logit(tmp_path):
    for _ in range(3):
        process = multiprocessing.get_context("fork").Process(target=fill_for_ever, args=(tmp_path,))
        process.start()
        while not list(tmp_path.iterdir()):
            time.sleep(0.001)
        time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        table = Table.make(tmp_path, BIG)
        logits, there = table.read(*places(BIG))
        assert np.array_equal(logits[there], logits_of(*places(BIG), BIG)[there])
    assert list(table.counts())[-1].damaged == 0
