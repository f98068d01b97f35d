"""What a table's runs look like while they are made, on a screen of 80 columns and in a log."""

import io
import json
import os
import re
from dataclasses import replace

import pytest

from deepkd_plugin.study.reproduce import display as module
from deepkd_plugin.study.reproduce.display import Display, LiveDisplay, PlainDisplay, for_stream


class Screen:
    """A terminal: what is on it after text with the few control sequences that a display may use."""

    def __init__(self, columns=80, rows=24):
        self.columns, self.rows = columns, rows
        self.lines, self.row, self.column = [""], 0, 0

    def feed(self, text):
        for part in re.findall(r"\x1b\[\d*[A-Za-z]|[^\x1b]", text):
            if part == "\r":
                self.column = 0
            elif part == "\n":
                self._down()
            elif part == "\x1b[J":
                assert self.column == 0
                self.lines = [*self.lines[: self.row], ""]
            elif part.endswith("A"):
                self.row -= int(part[2:-1])
                assert self.row >= 0
                assert len(self.lines) - self.row <= self.rows
            else:
                assert part[0] != "\x1b", repr(part)
                if self.column == self.columns:
                    self._down()
                line = self.lines[self.row]
                self.lines[self.row] = line[: self.column] + part + line[self.column + 1 :]
                self.column += 1

    def _down(self):
        self.row, self.column = self.row + 1, 0
        self.lines += [""] * (self.row == len(self.lines))

    def narrow(self, columns):
        """Wrap what is too long, as terminals do when their window is made narrower."""
        kept = []
        for line in self.lines:
            kept += [line[i : i + columns] for i in range(0, max(len(line), 1), columns)]
        self.lines, self.columns = kept, columns
        self.row, self.column = len(kept) - 1, len(kept[-1])


class Stream(io.StringIO):
    """A terminal as a stream."""

    encoding = "utf-8"

    def __init__(self, screen):
        super().__init__()
        self.screen = screen

    def write(self, text):
        self.screen.feed(text)

    def fileno(self):
        return 99

    def isatty(self):
        return True


@pytest.fixture
def screen(monkeypatch):
    made = Screen()
    size = lambda fd: os.terminal_size((made.columns, made.rows))  # noqa: E731
    monkeypatch.setattr(module.os, "get_terminal_size", size)
    return made


@pytest.fixture
def clock(monkeypatch):
    """Seconds that only a test lets pass: clock.now += 1."""

    class Clock:
        now = 1000.0

        def monotonic(self):
            return self.now

    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


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
    train(run, 50.0, 60.0, 62.5, 61.25)
    result = {"best": 62.5, "last": 61.25}
    (run.folder / "run.json").write_text(json.dumps({"result": result, "minutes": minutes}))


def show(live, clock, seconds=1.0):
    clock.now += seconds
    live.refresh()
    return [line.rstrip() for line in live.stream.screen.lines]


def test_a_terminal_gets_live_lines_and_a_log_plain_ones(screen, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    assert type(for_stream(Stream(screen))) is LiveDisplay
    assert type(for_stream(io.StringIO())) is PlainDisplay
    monkeypatch.setenv("TERM", "dumb")
    assert type(for_stream(Stream(screen))) is PlainDisplay


def test_nothing_is_shown_without_a_display(fake_run, capsys):
    nothing = Display()
    nothing.begin([fake_run()], 0)
    nothing.started(fake_run(), False)
    nothing.refresh()
    nothing.failed(fake_run(), "exit code 1", False)
    nothing.finished(fake_run())
    nothing.close()
    assert capsys.readouterr() == ("", "")


def test_plain_lines(fake_run):
    out = io.StringIO()
    plain, runs = PlainDisplay(out), [fake_run(seed) for seed in range(2)]
    plain.begin(runs, 3)
    plain.started(runs[0], resumed=False)
    plain.started(runs[1], resumed=True)
    plain.refresh()
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


def test_live_lines(fake_run, screen, clock):
    runs = [fake_run(seed) for seed in range(3)]
    live = LiveDisplay(Stream(screen))
    live.begin(runs, 1)
    live.started(runs[0], resumed=False)
    train(runs[1], 40.0, minutes=2.0)
    live.started(runs[1], resumed=True)
    assert show(live, clock, 60) == [
        "1 of 4 runs were finished before",
        "run                 epoch    test    best     time     left",
        "pair kd seed 0        0/4       -       -    1 min        -",
        "pair kd seed 1        1/4   40.00   40.00    3 min        -",
        "━━━━━━━─────────────────  1 of 4 runs   1 min",
    ]
    train(runs[0], 50.0)
    train(runs[1], 40.0, 30.0)
    show(live, clock, 60)
    # a half minute after its first epoch, which took 2 minutes, run 0 has 5.5 left; 9 epochs of all are ahead, of
    # which 2.5 minutes made 2
    assert show(live, clock, 30) == [
        "1 of 4 runs were finished before",
        "run                 epoch    test    best     time     left",
        "pair kd seed 0        1/4   50.00   50.00    2 min    6 min",
        "pair kd seed 1        2/4   30.00   40.00    4 min    4 min",
        "━━━━━━━━━━──────────────  1 of 4 runs   2 min   11 min left",
    ]
    live.failed(runs[1], "exit code 1, try 3 of 3: the reason", again=False)
    finish(runs[0], 8.0)
    live.finished(runs[0])
    assert show(live, clock) == [
        "1 of 4 runs were finished before",
        "failed    pair kd seed 1: exit code 1, try 3 of 3: the reason",
        "finished  pair kd seed 0: best 62.50, last 61.25, 8 min",
        "━━━━━━━━━━━━────────────  2 of 4 runs   1 failed   3 min   2 min left",
    ]
    live.close()
    assert [line.rstrip() for line in screen.lines[-2:]] == [
        "━━━━━━━━━━━━────────────  2 of 4 runs   1 failed   3 min   2 min left",
        "",
    ]
    assert (screen.row, screen.column) == (4, 0)


@pytest.mark.parametrize("columns", [20, 50, 80, 200])
def test_live_lines_fit_the_window(fake_run, screen, clock, columns):
    screen.columns = columns
    runs = [fake_run(seed) for seed in range(3)]
    live = LiveDisplay(Stream(screen))
    live.begin(runs, 0)
    for run in runs:
        live.started(run, resumed=False)
        train(run, 10.0)
    for _ in range(3):
        lines = show(live, clock)
        assert len(lines) == 5
        assert max(map(len, lines)) < columns
    assert lines[1].startswith("pair kd seed 0")


def test_a_window_that_becomes_narrower_keeps_nothing_of_before(fake_run, screen, clock):
    live = LiveDisplay(Stream(screen))
    live.begin([fake_run()], 0)
    live.started(fake_run(), resumed=False)
    show(live, clock)
    screen.narrow(40)
    assert len(show(live, clock)) == 3


def test_more_runs_than_rows(fake_run, screen, clock):
    screen.rows = 5
    runs = [fake_run(seed) for seed in range(6)]
    live = LiveDisplay(Stream(screen))
    live.begin(runs, 0)
    for run in runs:
        live.started(run, resumed=False)
    lines = show(live, clock)
    assert len(lines) == 4
    assert "4 more running" in lines[-1]


def test_a_long_name_keeps_its_seed(fake_run, screen, clock):
    run = replace(fake_run(12), pair="res32x4_wrn_40_2", method="deepkd_crld_and_more")
    live = LiveDisplay(Stream(screen))
    live.begin([run], 0)
    live.started(run, resumed=False)
    assert show(live, clock)[1].startswith("res32x4_wrn_40_2 deepkd_c… seed 12  ")


def test_the_record_of_a_run_that_is_replaced_does_not_count(fake_run, screen, clock):
    run = fake_run()
    train(run, 80.0, 90.0)
    live = LiveDisplay(Stream(screen))
    live.begin([run], 0)
    live.started(run, resumed=False)
    assert "0/4       -       -" in show(live, clock)[1]
    train(run, 10.0)
    assert "1/4   10.00   10.00" in show(live, clock)[1]


def test_a_stream_without_such_characters(fake_run, screen, clock):
    stream = Stream(screen)
    stream.encoding = "ascii"
    live = LiveDisplay(stream)
    live.begin([fake_run()], 1)
    (line,) = show(live, clock)[1:]
    assert line.startswith("============------------  1 of 2 runs")


def test_a_window_of_unknown_size(fake_run, clock, monkeypatch):
    screen = Screen()
    for size in (lambda fd: os.terminal_size((0, 0)), lambda fd: os.close(-1)):
        monkeypatch.setattr(module.os, "get_terminal_size", size)
        live = LiveDisplay(Stream(screen))
        live.begin([fake_run()], 0)
        assert "0 of 1 runs" in show(live, clock)[-1]


@pytest.mark.parametrize(
    ("minutes", "text"),
    [(None, "-"), (0.5, "30 s"), (2.4, "2 min"), (99.4, "99 min"), (150, "2.5 h"), (9000, "6.2 d")],
)
def test_durations(minutes, text):
    assert module._duration(minutes) == text
