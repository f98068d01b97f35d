"""Runs that are killed, that find no room and that find damaged files: nothing is lost, nothing wrong is taken.

docs/reliability.md has what is promised; the counts there are of these tests, which print their own.
"""

import collections
import contextlib
import copy
import io
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from functools import partial

import pytest
import small
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepkd_plugin.run import checkpoint, lock
from deepkd_plugin.run import folder as run_folder

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing has disturbed: its folder."""
    torch.set_num_threads(1)
    prefix = tmp_path_factory.mktemp("whole")
    assert small.command(lambda: small.train(small.config(prefix)))[0] == 0
    return prefix / "run"


def go_on(prefix, before=lambda: None):
    """Do what the last line of a run tells: --resume with a checkpoint, else from the beginning."""
    resume = (prefix / "run" / "latest").is_file()
    return small.command(lambda: small.train(small.config(prefix), resume, not resume), before)


def in_one_line(err):
    return "Traceback" not in err and err.count("\n") <= 1


def check_same(folder, whole):
    for name in ("student_latest", "student_best", "student_2"):
        assert small.same(small.weights(folder, name), small.weights(whole, name)), name
    assert not list(folder.glob(".*.tmp"))
    assert not (folder / run_folder.REPLACED).exists()


def test_a_run_killed_at_any_change_of_its_folder_goes_on_bitwise(tmp_path, whole):
    for number in range(1, 200):
        prefix = tmp_path / str(number)
        prefix.mkdir()
        cfg = small.config(prefix)
        code, _, err = small.command(partial(small.train, cfg), partial(small.kill_at, number))
        if code == 0:
            break
        assert (code, err) == (-signal.SIGKILL, "")
        code, _, err = go_on(prefix)
        done = "--resume finds all 4 epochs done" in err  # killed after its last word
        assert code == 0 or (code == 2 and done), err
        check_same(prefix / "run", whole)
        shutil.rmtree(prefix)
    print(f"killed at each of {number - 1} changes")
    assert number > 30


def test_a_run_killed_while_it_takes_another_s_place_loses_neither(tmp_path, whole):
    """At every moment the old run is back, bit for bit, or the new one has a checkpoint to go on from."""
    back = kept = 0
    for number in range(1, 200):
        prefix = tmp_path / str(number)
        shutil.copytree(whole, prefix / "run", ignore=shutil.ignore_patterns("lock"))
        (prefix / "run" / "notes.txt").write_text("mine")
        old = small.files(prefix / "run")
        cfg = small.config(prefix, EPOCHS=2)
        over = partial(small.train, cfg, overwrite=True, width=9)
        code, _, err = small.command(over, partial(small.kill_at, number))
        if code == 0:
            break
        assert (code, err) == (-signal.SIGKILL, "")
        with lock.locked(prefix / "run"):
            run_folder.settle(prefix / "run")
        now = small.files(prefix / "run")
        assert now["notes.txt"] == b"mine"
        if now == old:
            back += 1
        else:
            kept += 1
            resume = small.command(partial(small.train, cfg, resume=True, width=9))
            assert resume[0] == 0 or "all 2 epochs done" in resume[2], resume
            assert small.weights(prefix / "run")["body.1.weight"].shape == (9, 12)
            assert "epoch_4" not in small.files(prefix / "run")
        assert not (prefix / "run" / run_folder.REPLACED).exists()
        shutil.rmtree(prefix)
    print(f"killed at each of {number - 1} changes: {back} times the old run was back, {kept} times the new one stayed")
    assert back > 20
    assert kept > 10


def test_a_run_killed_at_random_moments_goes_on_bitwise(tmp_path, whole):
    draw, kills, runs = random.Random(0), 0, 0
    while kills < 20:
        runs += 1
        prefix = tmp_path / str(runs)
        prefix.mkdir()
        for attempt in range(50):
            moment = draw.uniform(0.0, 0.35 + 0.05 * attempt)  # a machine that is busy needs longer for an epoch
            code, _, err = go_on(prefix, partial(signal.setitimer, signal.ITIMER_REAL, moment))
            if code != -signal.SIGALRM:
                break
            kills += 1
        assert code == 0 or "epochs done" in err, err
        check_same(prefix / "run", whole)
    print(f"killed at {kills} random moments of {runs} runs")


@pytest.fixture
def disk(tmp_path):
    """A disk of a size in KiB: disk(100) -> its folder; disk(1000) gives it more room."""
    mounted = tmp_path / "disk"
    mounted.mkdir()

    def make(size):
        how = "remount," if os.path.ismount(mounted) else ""
        words = ["mount", "-t", "tmpfs", "-o", f"{how}size={size}k", "tmpfs", str(mounted)]
        if subprocess.run(words, capture_output=True).returncode:
            pytest.skip("mounting a tmpfs needs root")
        return mounted

    yield make
    if os.path.ismount(mounted):
        subprocess.run(["umount", "-l", str(mounted)], check=True)


@pytest.mark.parametrize("size", [4, 8, 16, 32, 48, 64, 96, 128])
def test_a_full_disk_is_one_line_and_the_run_goes_on_with_room(disk, whole, size):
    prefix = disk(size)
    code, _, err = small.command(lambda: small.train(small.config(prefix)))
    assert code == 2
    assert in_one_line(err), err
    assert "No space left on device" in err
    if (prefix / "run" / "latest").is_file():
        assert f"Resume with: {small.COMMAND} --resume" in err
    for name in small.files(prefix / "run"):
        assert not name.endswith(".tmp")
    disk(10_000)
    code, _, err = go_on(prefix)
    assert code == 0, err
    check_same(prefix / "run", whole)


@pytest.mark.parametrize("size", [8, 40])
def test_a_disk_that_fills_while_a_run_is_made_anew_gives_the_old_one_back(disk, whole, size):
    used = sum(-(-path.stat().st_size // 4096) * 4 for path in whole.rglob("*"))
    prefix = disk(used + 20 + size)
    shutil.copytree(whole, prefix / "run", ignore=shutil.ignore_patterns("lock"))
    old = small.files(prefix / "run")
    code, out, err = small.command(lambda: small.train(small.config(prefix), overwrite=True, width=40))
    assert code == 2
    assert in_one_line(err), err
    assert small.files(prefix / "run") == old
    assert "the run that was there before is back" in out


def test_too_few_open_files_are_one_line(tmp_path, whole):
    def few():
        small.train(small.config(tmp_path / "before"))  # what torch reads once of the machine
        resource.setrlimit(resource.RLIMIT_NOFILE, (5, 5))

    code, _, err = small.command(lambda: small.train(small.config(tmp_path)), few)
    assert code == 2
    assert in_one_line(err), err
    assert "ulimit -n" in err


ODD = (None, "x", -1, 3, float("nan"), [], {}, torch.zeros(3, 1, 2), torch.full((1,), float("inf")), b"", True)


def with_an_odd_entry(data, state):
    """Rename, remove or replace an entry, somewhere in a state; returns the bytes of its file."""
    state = copy.deepcopy(state)
    place = state
    while True:
        key = data.draw(st.sampled_from(sorted(place, key=str) if isinstance(place, dict) else range(len(place))))
        inner = place[key]
        if not (isinstance(inner, (dict, list)) and inner and data.draw(st.booleans())):
            break
        place = inner
    how = data.draw(st.sampled_from(["rename", "remove", "replace"]))
    if how == "replace":
        place[key] = data.draw(st.sampled_from(ODD))
    else:
        value = place.pop(key)
        if how == "rename" and isinstance(place, dict):
            place[f"{key}_"] = value
    content = io.BytesIO()
    torch.save(state, content)
    return content.getvalue()


def damaged(data, state, raw):
    """Draw the bytes of a damaged checkpoint."""
    kind = data.draw(st.sampled_from(["bit", "cut", "entry"]))
    if kind == "entry":
        return with_an_odd_entry(data, state)
    content = bytearray(raw)
    if kind == "cut":
        return bytes(content[: data.draw(st.integers(0, len(raw) - 1))])
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    return bytes(content)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run after its second epoch; `latest` is all that it has to go on from."""
    prefix = tmp_path_factory.mktemp("stopped")

    def stop():
        trainer = small.make(small.config(prefix))
        epoch = trainer.train_epoch
        trainer.train_epoch = lambda number: epoch(number) if number < 3 else os.kill(os.getpid(), signal.SIGKILL)
        trainer.train()

    assert small.command(stop)[0] == -signal.SIGKILL
    for name in ("best", "epoch_2", "lock"):
        (prefix / "run" / name).unlink()
    return prefix / "run"


def test_a_damaged_checkpoint_is_refused_before_anything_is_changed(stopped, whole, tmp_path):
    """Or its damage is none: then the run ends bitwise as it would have."""
    raw = (stopped / "latest").read_bytes()
    state = checkpoint.load(stopped / "latest", "test")
    outcomes = collections.Counter()

    @settings(max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def check(data):
        content = damaged(data, state, raw)  # first, because hypothesis may end an example here
        prefix = tmp_path / str(outcomes.total())
        shutil.copytree(stopped, prefix / "run")
        (prefix / "run" / "latest").write_bytes(content)
        before = small.files(prefix / "run")
        started = time.monotonic()
        code, _, err = small.command(lambda: small.train(small.config(prefix), resume=True))
        assert time.monotonic() - started < 10
        outcomes[code] += 1
        if code == 0:
            assert small.same(small.weights(prefix / "run"), small.weights(whole))
        else:
            assert code == 2, err
            assert in_one_line(err), err
            assert small.files(prefix / "run") == before
        shutil.rmtree(prefix)

    check()
    print(f"damaged checkpoints: {outcomes[2]} refused, {outcomes[0]} without effect")
    assert outcomes[2] > 200


def children(pid):
    return [int(word) for word in subprocess.run(["pgrep", "-P", str(pid)], capture_output=True).stdout.split()]


@pytest.mark.skipif(shutil.which("pgrep") is None, reason="finds a loader's processes by pgrep")
@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("what", ["group", "worker"])
def test_a_signal_to_the_group_or_a_killed_loader_process_is_one_line(tmp_path, what, number):
    cfg = small.config(tmp_path, EPOCHS=60)
    cfg.DATASET.NUM_WORKERS = 2

    def end(pid):
        while not (tmp_path / "run/latest").exists():
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return  # it ended by itself, and says why
            time.sleep(0.01)
        time.sleep(0.03 * number)
        if what == "group":
            os.killpg(pid, signal.SIGTERM)
            return
        with contextlib.suppress(ProcessLookupError, IndexError):
            while (tmp_path / "run/latest").exists():
                os.kill(children(pid)[0], signal.SIGKILL)
                break

    code, _, err = small.command(lambda: small.train(cfg), os.setsid, end)
    # a process that is killed when its epoch is over is missed by nobody
    assert code == 143 if what == "group" else code in (0, 1), err
    if code:
        *_, line = err.splitlines()
        assert f"{tmp_path / 'run/latest'} (epoch " in line
        assert line.endswith(f"Resume with: {small.COMMAND} --resume")
        assert ("interrupted in epoch" if what == "group" else "DATASET.NUM_WORKERS 2 must be lower") in line
    if what == "group":
        assert in_one_line(err), err
