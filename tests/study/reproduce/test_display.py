"""What a table's runs look like while they are made, in a terminal and in a log."""

import io
import json
import os
import time
from dataclasses import replace

import pytest
from rich.console import Console

from deepkd_plugin.study.reproduce.display import Display, LiveDisplay, for_stream


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds that only a test lets pass: clock.now += 1."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr(time, "monotonic", lambda: Clock.now)
    return Clock


@pytest.fixture
def live(clock):
    """A display on a terminal of 80 columns; live.lines() is what it shows of its runs."""
    terminal = Terminal()
    console = Console(file=terminal, force_terminal=True, width=80, height=24, get_time=lambda: clock.now, _environ={})
    made = LiveDisplay(console)

    def lines(width=80, height=24):
        console.size = (width, height)
        page = Console(file=io.StringIO(), width=width, height=height)
        page.print(made.view(), end="")
        return [line.rstrip() for line in page.file.getvalue().splitlines()]

    made.lines, made.terminal = lines, terminal
    yield made
    made.close()


def train(run, *accuracies, **entries):
    """Leave the record of a run's epochs so far."""
    run.folder.mkdir(parents=True, exist_ok=True)
    path = run.folder / "metrics.jsonl"
    before = path.stat().st_mtime_ns if path.exists() else 0
    lines = [json.dumps({"epoch": i, "test_acc": value}) for i, value in enumerate(accuracies, 1)]
    path.write_text("".join(f"{line}\n" for line in lines))
    os.utime(path, ns=(before + 10**9, before + 10**9))
    if entries:
        (run.folder / "run.json").write_text(json.dumps(entries))


def finish(run, minutes):
    train(run, 50.0, 60.0, 62.5, 61.25, result={"best": 62.5, "last": 61.25}, minutes=minutes)


def test_a_terminal_gets_live_lines_and_a_log_plain_ones(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert type(for_stream(Terminal())) is LiveDisplay
    assert type(for_stream(io.StringIO())) is Display
    monkeypatch.setenv("TERM", "dumb")
    assert type(for_stream(Terminal())) is Display


def test_plain_lines(fake_run):
    out = io.StringIO()
    plain, runs = Display(out), [fake_run(seed) for seed in range(2)]
    plain.begin(runs, 3)
    plain.started(runs[0], resumed=False)
    plain.started(runs[1], resumed=True)
    finish(runs[1], 130.0)
    plain.finished(runs[1])
    plain.failed(runs[0], "exit code 1, try 1 of 3: the reason", again=True)
    plain.close()
    assert out.getvalue().splitlines() == [
        "3 of 5 runs were finished before",
        "started   pair kd seed 0",
        "resumed   pair kd seed 1",
        "finished  pair kd seed 1: best 62.50, last 61.25, 2.2 h, 4 of 5 runs",
        "failed    pair kd seed 0: exit code 1, try 1 of 3: the reason",
    ]


def test_live_lines(fake_run, live, clock):
    runs = [fake_run(seed) for seed in range(3)]
    live.begin(runs, 1)
    live.started(runs[0], resumed=False)
    train(runs[1], 40.0)
    live.started(runs[1], resumed=True)
    clock.now += 60
    assert live.lines() == [
        "run                 epoch   test   best    time    left",
        "pair kd   seed 0      0/4      -      -   1 min       -",
        "pair kd   seed 1      1/4  40.00  40.00   1 min       -",
        "━━━━━━━╸                  1 of 4 runs   1 min",  # colours draw the rest of the bar
    ]
    train(runs[0], 50.0)
    train(runs[1], 40.0, 30.0)
    clock.now += 60
    # each makes an epoch in two minutes; together they make one a minute, and 9 are left
    assert live.lines() == [
        "run                 epoch   test   best    time    left",
        "pair kd   seed 0      1/4  50.00  50.00   2 min   6 min",
        "pair kd   seed 1      2/4  30.00  40.00   2 min   4 min",
        "━━━━━━━━━━╸               1 of 4 runs   2 min   9 min left",
    ]
    live.failed(runs[1], "exit code 1, try 3 of 3: [the] reason", again=False)
    finish(runs[0], 8.0)
    clock.now += 60
    live.finished(runs[0])
    # 4 of run 0 and 1 of run 1 in three minutes, and run 2 is left
    assert live.lines() == ["━━━━━━━━━━━━              2 of 4 runs   1 failed   3 min   2 min left"]
    live.close()
    written = live.terminal.getvalue()
    for line in (
        "1 of 4 runs were finished before\n",
        "failed    pair kd seed 1: exit code 1, try 3 of 3: [the] reason\n",
        "finished  pair kd seed 0: best 62.50, last 61.25, 8 min, 2 of 4 runs\n",
    ):
        assert line in written
    assert "\x1b[2K" in written  # it is redrawn in place
    assert written.endswith("2 min left\n\x1b[?25h")  # the bar stays, and the cursor is there again


def test_a_run_that_is_tried_again_goes_on_with_its_epochs(fake_run, live, clock):
    live.begin([fake_run()], 0)
    live.started(fake_run(), resumed=False)
    clock.now += 60
    train(fake_run(), 10.0, 20.0)
    live.failed(fake_run(), "exit code 1", again=True)
    assert live.lines() == ["                          0 of 1 runs   1 min   1 min left"]
    live.started(fake_run(), resumed=True)
    assert "  2/4  " in live.lines()[1]
    assert live.lines()[-1].endswith("1 min   1 min left")


@pytest.mark.parametrize("width", [50, 60, 80, 200])
def test_live_lines_fit_the_window(fake_run, live, width):
    runs = [replace(fake_run(seed), pair="res32x4_wrn_40_2", method="deepkd_crld") for seed in range(3)]
    live.begin(runs, 0)
    for run in runs:
        live.started(run, resumed=False)
        train(run, 10.0)
    lines = live.lines(width)
    assert len(lines) == 5
    assert max(map(len, lines)) < width
    assert ["seed 0" in lines[1], "seed 2" in lines[3]] == [True, True]  # what tells runs apart


def test_more_runs_than_rows(fake_run, live):
    runs = [fake_run(seed) for seed in range(6)]
    live.begin(runs, 0)
    for run in runs:
        live.started(run, resumed=False)
    lines = live.lines(height=6)
    assert len(lines) == 4
    assert "4 more running" in lines[-1]


def test_the_record_of_a_run_that_is_replaced_does_not_count(fake_run, live):
    run = fake_run()
    train(run, 80.0, 90.0)
    live.begin([run], 0)
    live.started(run, resumed=False)
    assert "0/4      -      -" in live.lines()[1]
    train(run, 10.0)
    assert "1/4  10.00  10.00" in live.lines()[1]


def test_a_record_that_is_being_written_is_read_later(fake_run, live):
    live.begin([fake_run()], 0)
    live.started(fake_run(), resumed=False)
    train(fake_run(), 10.0)
    (fake_run().folder / "metrics.jsonl").write_text('{"epoch": 1, "test')
    assert " 0/4 " in live.lines()[1]


def test_a_terminal_without_such_characters(fake_run, clock):
    terminal = Terminal()
    terminal.encoding = "ascii"
    console = Console(file=terminal, force_terminal=True, width=30, height=24, _environ={})
    live = LiveDisplay(console)
    run = replace(fake_run(), method="deepkd_crld_and_more")
    live.begin([run], 1)
    live.started(run, resumed=False)
    live.close()
    assert terminal.getvalue().isascii()
