"""Runs as processes: what is left on disk, who is at work, what failed, and killing the command at any moment."""

import contextlib
import fcntl
import importlib.util
import json
import os
import random
import select
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from deepkd_plugin import device, launch
from deepkd_plugin.errors import UserError
from deepkd_plugin.hosts.registry import find_host
from deepkd_plugin.run import checkpoint, record
from deepkd_plugin.run.lock import HeldError, keep, locked
from deepkd_plugin.run.metrics import count_epochs, read_metrics
from deepkd_plugin.study.kinds import KINDS
from deepkd_plugin.study.reproduce import runs as module
from deepkd_plugin.study.reproduce import worker
from deepkd_plugin.study.reproduce.display import Display
from deepkd_plugin.study.reproduce.runs import OtherCodeError, execute, state
from deepkd_plugin.study.table import Run
from deepkd_plugin.terminal import guarded

CONFIG = Path(__file__).parents[3] / "configs" / "glyphs100" / "res20_res8" / "kd.yaml"

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def note(run, **entries):
    """Leave a run.json of this code's."""
    run.folder.mkdir(parents=True, exist_ok=True)
    held = {"code": record.code_hash(), "config_hash": run.hash, "finished": False} | entries
    (run.folder / "run.json").write_text(json.dumps(held))


def read(run):
    return json.loads((run.folder / "run.json").read_text())


class Told(Display):
    """Keeps what execute tells."""

    def __init__(self):
        self.events = []

    def begin(self, runs, before):
        self.events.append(("begin", len(runs), before))

    def started(self, run, resumed):
        self.events.append(("resumed" if resumed else "started", run.seed))

    def finished(self, run):
        self.events.append(("finished", run.seed))

    def failed(self, run, why, again):
        self.events.append(("failed", run.seed, why, again))

    def close(self):
        self.events.append(("close",))


def test_what_is_left_of_a_run(fake_run):
    run = fake_run()
    assert state(run) == "new"
    run.folder.mkdir(parents=True)
    (run.folder / "run.json").write_text("{")
    assert state(run) == "new"
    note(run)
    assert state(run) == "new"
    (run.folder / "latest").touch()
    assert state(run) == "resumable"
    note(run, finished=True)
    assert state(run) == "finished"


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({"code": "0123"}, "was made by other code (0123; now "),
        ({"code": None}, "was made by other code (an older version; now "),
        ({"resumed": [{"code": "4567"}]}, "was made by other code (4567; now "),
        ({"resumed": [{}]}, "was made by other code (an older version; now "),
        ({"config_hash": "89ab"}, "was made under another config (89ab; planned 0123abcd)"),
    ],
)
def test_runs_that_do_not_belong_here(fake_run, entries, expected, finished):
    run = fake_run()
    note(run, finished=finished, **entries)
    (run.folder / "latest").touch()
    with pytest.raises(OtherCodeError) as error:
        state(run)
    message = str(error.value)
    assert message.startswith(f"{run.folder}: the run there {expected}")
    assert "another --out" in message
    assert "--overwrite" in message
    assert "\n" not in message
    assert state(run, overwrite=True) == "new"
    with pytest.raises(OtherCodeError):
        execute([fake_run(1), run], 1, worker=fake_run.worker)
    assert not fake_run(1).folder.exists()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("content", [None, "", "[]"])
def test_a_checkpoint_without_a_record_is_nobody_s_to_delete(fake_run, content, overwrite):
    run = fake_run()
    run.folder.mkdir(parents=True)
    (run.folder / "latest").write_text("whole")
    if content is not None:
        (run.folder / "run.json").write_text(content)
    with pytest.raises(UserError, match="holds a checkpoint, and its run.json is empty or missing; put that back, or"):
        execute([run], 1, overwrite=overwrite, worker=fake_run.worker)
    assert (run.folder / "latest").read_text() == "whole"


def test_a_damaged_checkpoint_is_no_dead_end(fake_run):
    run = fake_run()
    note(run)
    torch.save({"epoch": 1}, run.folder / "latest")
    (run.folder / "metrics.jsonl").write_text('{"epoch": 1}\n')
    assert state(run) == state(run, overwrite=True) == "resumable"
    whole = (run.folder / "latest").read_bytes()
    for damaged in (whole[:-30], whole[:1], b"", whole.replace(b"}", b")")):
        (run.folder / "latest").write_bytes(damaged)
        assert (state(run), state(run, overwrite=True)) == ("resumable", "new")


@pytest.mark.parametrize("content", [None, "", "garbage", '{"epoch": 1}\n'])
def test_a_damaged_record_is_no_dead_end(fake_run, content):
    run = fake_run()
    note(run)
    torch.save({"epoch": 2}, run.folder / "latest")
    if content is not None:
        (run.folder / "metrics.jsonl").write_text(content)
    assert (state(run), state(run, overwrite=True)) == ("resumable", "new")
    assert count_epochs(run.folder) == (1 if content and "epoch" in content else 0)


def test_a_run_that_went_on_under_another_config_does_not_belong_here(fake_run):
    run = fake_run()
    session = {"code": record.code_hash(), "changed": {"SOLVER.LR": [0.1, 0.05]}, "after": 3}
    note(run, finished=True, resumed=[session])
    with pytest.raises(OtherCodeError, match=r"the run there went on under another config \(SOLVER.LR\), and a table"):
        state(run)
    assert state(run, overwrite=True) == "new"


def test_a_run_whose_place_is_being_taken_is_the_one_that_will_be_back(fake_run):
    run = fake_run()
    (run.folder / "replaced").mkdir(parents=True)
    note(run)
    (run.folder / "run.json").rename(run.folder / "replaced" / "run.json")
    (run.folder / "latest").touch()
    assert state(run) == "resumable"  # killed while it was moved aside
    (run.folder / "latest").rename(run.folder / "replaced" / "latest")
    note(run, code="0123")
    assert state(run) == "resumable"  # killed before the new one's first epoch
    (run.folder / "latest").touch()
    with pytest.raises(OtherCodeError):
        state(run)


def test_a_start_without_a_checkpoint_is_of_no_code(fake_run):
    note(fake_run(), code="0123")
    assert state(fake_run()) == "new"


def test_runs_are_made_once(fake_run):
    runs, told = [fake_run(seed) for seed in range(3)], Told()
    assert execute(runs, 2, display=told, worker=fake_run.worker) == []
    assert all(state(run) == "finished" for run in runs)
    assert told.events[0] == ("begin", 3, 0)
    assert told.events[-1] == ("close",)
    assert sorted(told.events[1:-1]) == sorted([(what, seed) for what in ("started", "finished") for seed in range(3)])
    assert {event[1] for event in told.events[1:3]} == {0, 1}  # the first two at once
    command, *written = (runs[0].folder / "log.txt").read_text().splitlines()
    assert command.startswith("--- 20")
    assert " python tools/train.py --cfg " in command
    assert written == ["from epoch 0"]
    told = Told()
    before = [(run.folder / "run.json").stat().st_mtime_ns for run in runs]
    assert execute(runs, 2, display=told, worker=fake_run.worker) == []
    assert told.events == [("begin", 0, 3), ("close",)]
    assert before == [(run.folder / "run.json").stat().st_mtime_ns for run in runs]


def test_overwrite_makes_only_the_runs_of_other_code_anew(fake_run):
    runs = [fake_run(0), fake_run(1)]
    execute(runs, 2, worker=fake_run.worker)
    note(runs[0], finished=True, code="0123")
    told = Told()
    assert execute(runs, 2, overwrite=True, display=told, worker=fake_run.worker) == []
    assert told.events[:2] == [("begin", 1, 1), ("started", 0)]
    assert state(runs[0]) == "finished"


def test_a_failure_goes_on_from_its_checkpoint(fake_run):
    run, told = fake_run(FAIL="1:2"), Told()
    assert execute([run], 1, display=told, worker=fake_run.worker) == []
    assert told.events[1:-1] == [
        ("started", 0),
        ("failed", 0, "exit code 1, try 1 of 3: the reason", True),
        ("resumed", 0),
        ("failed", 0, "exit code 1, try 2 of 3: the reason", True),
        ("resumed", 0),
        ("finished", 0),
    ]
    words = [line for line in (run.folder / "log.txt").read_text().splitlines() if "from epoch" in line]
    assert words == ["from epoch 0", "from epoch 1", "from epoch 2"]
    assert [line["epoch"] for line in read_metrics(run.folder)] == [1, 2, 3, 4]


def test_a_run_is_given_up_after_three_times_and_the_others_go_on(fake_run):
    runs, told = [fake_run(0, FAIL="1:9"), fake_run(1), fake_run(2)], Told()
    (failure,) = execute(runs, 1, display=told, worker=fake_run.worker)
    assert (failure.run, failure.code, failure.attempts) == (runs[0], 1, 3)
    assert failure.lines == ("from epoch 2", "the reason")
    assert str(failure) == (
        f"pair kd seed 0 failed 3 times (exit code 1), log {runs[0].folder / 'log.txt'}:\n"
        f"    from epoch 2\n    the reason"
    )
    assert state(runs[1]) == state(runs[2]) == "finished"
    # a second try comes after the other runs' first
    order = [event[1] for event in told.events if event[0] in ("started", "resumed")]
    assert order == [0, 1, 2, 0, 0]


def test_a_mistake_of_the_user_is_not_tried_again(fake_run):
    (failure,) = execute([fake_run(FAIL="2:9")], 1, worker=fake_run.worker)
    assert (failure.code, failure.attempts) == (2, 1)


def test_a_log_that_cannot_be_written_is_one_runs_failure(fake_run):
    runs = [fake_run(seed) for seed in range(2)]
    (runs[0].folder / "log.txt").mkdir(parents=True)
    (failure,) = execute(runs, 1, display=Told(), worker=fake_run.worker)
    assert failure.run is runs[0]
    assert failure.lines[0].startswith(f"{runs[0].folder}: its process cannot be started (")
    assert state(runs[1]) == "finished"


def test_a_record_of_another_form_is_no_run(fake_run):
    run = fake_run()
    run.folder.mkdir(parents=True)
    (run.folder / "run.json").write_text("[]")
    assert state(run) == "new"


def test_files_changed_after_the_start_are_told_of(fake_run):
    """A process that loaded other code than the command did leaves a run that does not count, and the reason."""
    other = "import os, sys; words = sys.argv[1:]; words[words.index('--cfg') - 3] = 'other'; os.execv(words[0], words)"
    worker = (sys.executable, "-c", other, *fake_run.worker)
    (failure,) = execute([fake_run()], 1, attempts=1, worker=worker)
    assert failure.code == 0
    assert failure.lines[0].startswith(f"{fake_run().folder}: the run there was made by other code (other; now ")


def test_a_process_that_ends_well_without_a_result_has_failed(fake_run):
    (failure,) = execute([fake_run(FAIL="0:9")], 1, attempts=2, worker=fake_run.worker)
    assert (failure.code, failure.attempts) == (0, 2)


def test_how_a_process_was_killed_is_said(fake_run):
    run = fake_run()
    (failure,) = execute([run], 1, attempts=1, worker=("sh", "-c", "kill -9 $$"))
    assert failure.code == -signal.SIGKILL
    assert str(failure).startswith("pair kd seed 0 failed once (killed by SIGKILL), log ")


def environment(run):
    return json.loads((run.folder / "env.json").read_text())


def test_threads_are_shared_out(fake_run, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(13), raising=False)
    for out, count, jobs, expected in (("a", 3, 3, "4"), ("b", 1, 4, "13"), ("c", 2, 20, "6")):
        runs = [fake_run(seed, out) for seed in range(count)]
        execute(runs, jobs, worker=fake_run.worker)
        assert {environment(run)["OMP_NUM_THREADS"] for run in runs} == {expected}
    execute([fake_run(0, "together")], 1, worker=fake_run.worker, together=3)
    assert environment(fake_run(0, "together"))["OMP_NUM_THREADS"] == "4"
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(1))
    runs = [fake_run(seed, "d") for seed in range(2)]
    execute(runs, 2, worker=fake_run.worker)
    assert environment(runs[0])["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    execute([fake_run(0, "e")], 1, worker=fake_run.worker)
    assert environment(fake_run(0, "e"))["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize(
    ("count", "named", "jobs", "expected"),
    [
        (0, None, 2, {None}),
        (0, "", 2, {""}),
        (2, None, 2, {"0", "1"}),
        (2, None, 4, {"0", "1"}),
        (4, None, 2, {"0", "1"}),
        (2, "5, GPU-7", 2, {"5", "GPU-7"}),
        (1, "5,-1,6", 2, {"5"}),
    ],
)
def test_gpus_are_shared_out(fake_run, monkeypatch, count, named, jobs, expected):
    monkeypatch.setattr(device, "count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    runs = [fake_run(seed, SECONDS="0.05") for seed in range(4)]
    execute(runs, jobs, worker=fake_run.worker)
    assert {environment(run)["CUDA_VISIBLE_DEVICES"] for run in runs} == expected


@pytest.mark.parametrize(
    ("count", "named", "together", "expected"),
    [
        (4, None, 2, {"0,1", "2,3"}),
        (5, None, 2, {"0,1", "2,3"}),
        (4, None, 4, {"0,1,2,3"}),
        (3, "5, GPU-7,1", 2, {"5,GPU-7"}),
        (0, None, 2, {None}),
    ],
)
def test_a_run_of_several_processes_has_a_gpu_for_each(fake_run, monkeypatch, count, named, together, expected):
    monkeypatch.setattr(device, "count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    runs = [fake_run(seed, SECONDS="0.05") for seed in range(4)]
    execute(runs, 2, worker=fake_run.worker, together=together)
    assert {environment(run)["CUDA_VISIBLE_DEVICES"] for run in runs} == expected
    assert {environment(run)["together"] for run in runs} == {str(together)}
    first, *_ = (runs[0].folder / "log.txt").read_text().splitlines()
    assert f" torchrun --standalone --nproc_per_node {together} tools/train.py --cfg " in first


def test_what_a_process_says_that_another_has_ended_is_not_the_reason(fake_run):
    """The one that failed has said why, before or after."""
    say = "echo the reason; echo deepkd: another process of this run has ended. Resume with: …; exit 1"
    told = Told()
    execute([fake_run()], 1, attempts=1, display=told, worker=("sh", "-c", say))
    assert told.events[-2] == ("failed", 0, "exit code 1, try 1 of 1: the reason", False)


def test_a_gpu_goes_to_the_next_run_when_it_is_free(fake_run, monkeypatch):
    monkeypatch.setattr(device, "count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    runs = [fake_run(0, SECONDS="0.5"), fake_run(1), fake_run(2)]
    execute(runs, 2, worker=fake_run.worker)
    assert [environment(run)["CUDA_VISIBLE_DEVICES"] for run in runs] == ["0", "1", "1"]


def test_a_folder_has_one_process(tmp_path):
    held = f"out: process {os.getpid()} on .* is at work there; call again"
    with locked(tmp_path / "out"), pytest.raises(HeldError, match=held), locked(tmp_path / "out"):
        pass
    with locked(tmp_path / "out"):
        pass
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match="file: must be a folder that can be written"),
        locked(tmp_path / "file"),
    ):
        pass


def test_a_run_that_another_process_trains_is_left_alone(fake_run, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 0.2)
    runs = [fake_run(0), fake_run(1)]
    with locked(runs[1].folder), pytest.raises(HeldError, match=f"seed1-0123abcd: process {os.getpid()} on "):
        execute(runs, 2, worker=fake_run.worker)
    assert not runs[0].folder.exists()
    assert not runs[1].folder.exists()  # nothing was ever written there
    assert execute(runs, 2, worker=fake_run.worker) == []


def test_code_that_changes_meanwhile_is_not_mixed_in(fake_run, monkeypatch):
    run = fake_run()
    monkeypatch.setattr(record, "code_hash", lambda: "before")
    (failure,) = execute([run], 1)  # the real worker, which reads the files
    assert (failure.code, failure.attempts) == (2, 1)
    (line,) = failure.lines
    assert line.startswith("deepkd: error: the package's code was changed since the table was started: it was before")
    assert not (run.folder / "run.json").exists()


def test_a_worker_checks_that_it_has_the_planned_run():
    words = ["--cfg", str(CONFIG), "--resume", "SOLVER.SEED", "3"]
    cfg, _ = launch.read_config(find_host(), str(CONFIG), words[3:])
    planned = record.config_hash(cfg)
    worker.check(record.code_hash(), planned, KINDS["classification"], words)
    with pytest.raises(UserError, match="kd.yaml: its config was changed since .*: its hash was .* host builtin"):
        worker.check(record.code_hash(), planned, KINDS["classification"], words[:3])


def forked(work):
    """Run a function in a process of its own, its return value the exit code; returns the process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        code = work()
    finally:
        os._exit(code)


def ended(pid):
    """The exit code of a process, negative for a signal, when it has ended."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def command(runs, jobs, **options):
    """execute as a command that can be killed: exit code 0, 1 with failures, or guarded's."""

    def work():
        failures = []
        code = guarded(lambda: failures.extend(execute(runs, jobs, **options)))
        return code or int(bool(failures))

    return forked(work)


def wait_for(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_free(run):
    with contextlib.suppress(HeldError), locked(run.folder):
        return True
    return False


def test_a_lock_is_not_inherited_by_a_process_that_outlives_its_holder(tmp_path):
    lock = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    read_end, write_end = os.pipe()

    def holder():
        keep(lock)
        os.close(read_end)
        forked(lambda: time.sleep(20) or 0)  # a loader's worker
        return 0

    pid = forked(holder)
    os.close(lock)
    os.close(write_end)
    assert ended(pid) == 0
    with locked(tmp_path):
        pass
    os.close(read_end)


@pytest.mark.skipif(not hasattr(signal, "SIGRTMIN"), reason="Linux's PR_SET_PDEATHSIG")
def test_a_process_ends_with_its_parent(tmp_path):
    read_end, write_end = os.pipe()

    def child(parent):
        worker.end_with(parent)
        os.write(write_end, b"x")
        time.sleep(60)

    def parent():
        mine = os.getpid()
        forked(lambda: child(mine))
        time.sleep(60)
        return 0

    pid = forked(parent)
    os.close(write_end)
    assert os.read(read_end, 1) == b"x"
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    # the child's end of the pipe is closed, so it is gone
    assert select.select([read_end], [], [], 20)[0]
    assert os.read(read_end, 1) == b""
    os.close(read_end)
    assert ended(forked(lambda: worker.end_with(pid) or 0)) == -signal.SIGTERM


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_ends_the_processes(fake_run, number, code):
    runs = [fake_run(seed, SECONDS="60") for seed in range(2)]
    pid = command(runs, 2, worker=fake_run.worker)
    wait_for(lambda: all((run.folder / "env.json").exists() for run in runs))
    started = time.monotonic()
    os.kill(pid, number)
    assert ended(pid) == code
    assert time.monotonic() - started < module.GRACE / 2  # they were told, not only killed in the end
    assert all(is_free(run) for run in runs)


def test_a_process_that_does_not_end_is_killed(fake_run, monkeypatch):
    monkeypatch.setattr(module, "GRACE", 0.3)
    run = fake_run(SECONDS="60", DEAF="")
    pid = command([run], 1, worker=fake_run.worker)
    wait_for(lambda: (run.folder / "env.json").exists())
    os.kill(pid, signal.SIGTERM)
    assert ended(pid) == 143
    assert is_free(run)


def test_a_second_ctrl_c_does_not_wait(fake_run):
    run = fake_run(SECONDS="60", DEAF="")
    pid = command([run], 1, worker=fake_run.worker)
    wait_for(lambda: (run.folder / "env.json").exists())
    started = time.monotonic()
    os.kill(pid, signal.SIGINT)
    time.sleep(0.5)
    assert os.waitpid(pid, os.WNOHANG) == (0, 0)  # it gives the process its time
    os.kill(pid, signal.SIGINT)
    assert ended(pid) == 130
    assert time.monotonic() - started < module.GRACE / 2
    assert is_free(run)


def test_a_killed_command_leaves_a_run_that_the_next_waits_for_or_names(fake_run, monkeypatch, capfd):
    run = fake_run(SECONDS="0.5", ALONE="")
    pid = command([run], 1, worker=fake_run.worker)
    wait_for(lambda: (run.folder / "env.json").exists())
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    words = (run.folder / "lock").read_text().split()
    monkeypatch.setattr(module, "PATIENCE", 0.1)
    assert ended(command([run], 1, worker=fake_run.worker)) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"deepkd: error: {run.folder}: process {words[1]} on ")
    os.kill(int(words[1]), 0)  # it lives, and goes on
    monkeypatch.setattr(module, "PATIENCE", 20.0)
    assert execute([run], 1, worker=fake_run.worker) == []
    assert (run.folder / "log.txt").read_text().count("from epoch") == 1  # it ended by itself


def test_killed_at_random_moments_the_command_ends_with_the_same_results(fake_run):
    undisturbed = [fake_run(seed, "whole") for seed in range(6)]
    assert execute(undisturbed, 4, worker=fake_run.worker) == []
    # one outlives the command, one fails once by itself
    special = {1: {"ALONE": ""}, 2: {"FAIL": "1:1"}}
    runs = [fake_run(seed, SECONDS="0.06", **special.get(seed, {})) for seed in range(6)]
    seed = random.SystemRandom().randrange(10**6)  # training seeds the global generator
    print("seed", seed)
    draw = random.Random(seed)
    kills = 0
    for _ in range(60):
        pid = command(runs, 2, worker=fake_run.worker)
        time.sleep(draw.uniform(0.0, 0.3))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
        code = ended(pid)
        if code == 0:
            break
        assert code in (-signal.SIGKILL, -signal.SIGTERM, 130, 143), code
        kills += 1
    else:
        assert execute(runs, 2, worker=fake_run.worker) == []
    print(kills, "kills")
    assert kills >= 2
    for run, whole in zip(runs, undisturbed):
        assert not (run.folder / "two at once").exists()
        assert read(run)["finished"]
        assert read(run)["result"] == read(whole)["result"]
        assert read_metrics(run.folder) == read_metrics(whole.folder)


def tiny_runs(out, data_root, count, options=()):
    """Real runs of 3 epochs of 8 steps, as plan.py makes them."""
    made = []
    for seed in range(count):
        above, name = out / "runs" / "res20_res8", f"seed{seed}"
        given = {"SOLVER.EPOCHS": "3", "DATASET.TRAIN_PER_CLASS": "5", "DATASET.HOLDOUT": "0.02"}
        given |= {"DATASET.ROOT": str(data_root), "SOLVER.SEED": str(seed), "LOG.PREFIX": str(above)}
        given |= {
            "EXPERIMENT.PROJECT": "kd",
            "EXPERIMENT.NAME": name,
            "DISTILLER.FOLD_TEACHER": "False",
        }  # as plans settle
        options = (*options, *(word for pair in given.items() for word in pair))
        held = record.config_hash(launch.read_config(find_host(), str(CONFIG), list(options))[0])
        made.append(Run("res20_res8", "kd", seed, CONFIG, options, held, 3, above / "kd" / name))
    return made


def numbers(run):
    """A run's metrics without the times that it took."""
    return [{key: value for key, value in line.items() if "second" not in key} for line in read_metrics(run.folder)]


@pytest.mark.skipif(
    importlib.util.find_spec("mdistiller") is not None,
    reason="processes of their own would train on the installed mdistiller as host",
)
@pytest.mark.slow
def test_real_runs_killed_at_random_moments_end_with_the_same_weights(tmp_path, data_root, monkeypatch):
    monkeypatch.delenv("MDISTILLER_ROOT", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    undisturbed = tiny_runs(tmp_path / "whole", data_root, 2)
    runs = tiny_runs(tmp_path / "killed", data_root, 2)
    torch.set_num_threads(1)
    for run in undisturbed:  # as a user would
        assert launch.main(["--cfg", str(run.config), *run.options]) == 0
    seed = random.SystemRandom().randrange(10**6)  # training seeds the global generator
    print("seed", seed)
    draw = random.Random(seed)
    for number, epochs in ((signal.SIGKILL, 1), (signal.SIGTERM, 3)):
        pid = command(runs, 2)
        wait_for(lambda least=epochs: sum(len(read_metrics(run.folder)) for run in runs) >= least, 120)
        time.sleep(draw.uniform(0.0, 0.6))
        os.kill(pid, number)
        assert ended(pid) in (0, 143, -number)
        wait_for(lambda: all(is_free(run) for run in runs), 20)  # no process of it is left
    told = Told()
    assert execute(runs, 2, display=told) == []
    print(told.events)
    for run, whole in zip(runs, undisturbed):
        assert state(run) == "finished"
        ours, expected = (checkpoint.load(r.folder / "student_latest", "test")["model"] for r in (run, whole))
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[name], expected[name]) for name in ours)
        assert numbers(run) == numbers(whole)
        assert read(run)["result"] == read(whole)["result"]

    # killed between the last checkpoint and the note of the result
    (run, _), told = runs, Told()
    before = read(run)
    record.note(run.folder, {"finished": False, "result": None})
    assert execute(runs, 1, display=told) == []
    assert told.events[-2:] == [("finished", 0), ("close",)]
    assert (read(run)["finished"], read(run)["result"]) == (True, before["result"])
