import os
import time

import pytest
import small

from deepkd_plugin.errors import UserError
from deepkd_plugin.run import lock


def forked(work):
    """Run a function in a process of its own and return its exit code."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = work()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def is_held(folder):
    try:
        with lock.locked(folder):
            return 0
    except lock.HeldError:
        return 1


pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def test_one_process_is_in_a_folder_and_another_is_told_which(tmp_path):
    folder = tmp_path / "run"
    told = rf"run: process {os.getpid()} on .* is at work"
    with lock.locked(folder), pytest.raises(lock.HeldError, match=told), lock.locked(folder):
        pass
    with lock.locked(folder):
        (folder / "file").touch()
        assert forked(lambda: is_held(folder)) == 1
    assert forked(lambda: is_held(folder)) == 0


def test_a_process_that_has_it_may_ask_again(tmp_path):
    with lock.ours(tmp_path):
        with lock.ours(tmp_path):
            pass
        assert forked(lambda: is_held(tmp_path)) == 1
    assert forked(lambda: is_held(tmp_path)) == 0
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_system_is_not_taken_for_another_process(tmp_path):
    with pytest.raises(OSError, match="full"), lock.ours(tmp_path), lock.ours(tmp_path):
        raise OSError(28, "full")


def test_somebody_s_file_of_that_name_is_left(tmp_path):
    (tmp_path / "lock").write_text("theirs")
    with pytest.raises(UserError, match="lock: must be a file that can be locked"), lock.locked(tmp_path):
        pass
    assert (tmp_path / "lock").read_text() == "theirs"


def test_it_goes_with_a_process_that_is_killed(tmp_path):
    def die():
        with lock.locked(tmp_path):
            os._exit(7)

    assert forked(die) == 7
    assert is_held(tmp_path) == 0


def test_a_folder_in_which_nothing_was_done_is_gone(tmp_path):
    with lock.locked(tmp_path / "a" / "b"):
        pass
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a").mkdir()
    with lock.locked(tmp_path / "a" / "b"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_one_that_was_removed_meanwhile_does_not_count(tmp_path):
    with lock.locked(tmp_path):
        (tmp_path / "lock").unlink()
        with lock.locked(tmp_path):  # it is another file
            pass


def test_a_link_is_no_lock(tmp_path):
    (tmp_path / "lock").symlink_to(tmp_path / "theirs")
    with pytest.raises(UserError, match="lock: must be a file that can be locked"), lock.locked(tmp_path):
        pass
    assert not (tmp_path / "theirs").exists()


@pytest.mark.parametrize("flag", [{}, {"resume": True}, {"overwrite": True}])
def test_a_run_beside_a_live_one_is_refused_before_anything_is_read(tmp_path, flag):
    small.train(small.config(tmp_path))
    before = small.files(tmp_path / "run")
    with lock.locked(tmp_path / "run"):
        started = time.monotonic()
        code, _, err = small.command(lambda: small.train(small.config(tmp_path), **flag))
        assert time.monotonic() - started < 10
    assert code == 2
    assert f"{tmp_path / 'run'}: process {os.getpid()} on " in err
    assert err.count("\n") == 1
    assert small.files(tmp_path / "run") == before


def test_folders_that_were_made_for_a_lock_go_with_it(tmp_path):
    """Also those that a path only goes through."""
    with lock.locked(tmp_path / "a" / ".." / "b" / "run"):
        assert (tmp_path / "b" / "run" / "lock").is_file()
    assert not list(tmp_path.iterdir())
