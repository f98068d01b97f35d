"""The bar of an epoch and the texts beside it."""

import io
import re
import sys

import pytest

from deepkd_plugin.run.progress import EpochBar, epoch_line, step_text

MEANS = {"tog": 1.25, "tcg": 0.5, "train_acc": 12.345, "train_acc_top5": 40.0}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_counts_steps_and_is_gone_when_it_ends(monkeypatch, capsys):
    terminal = Terminal()
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal)
    with EpochBar("epoch 2/3", 40) as bar:
        bar.update(20, "task 1.250 [x]")
        shown = terminal.getvalue()
        print("out")
    for text in ("epoch 2/3", "20/40", "task 1.250 [x]", "━"):
        assert text in shown
    assert terminal.getvalue().endswith("\x1b[1A\x1b[2K")  # one line up, cleared
    assert capsys.readouterr().out == "out\n"  # stdout stays itself, whatever stderr is


@pytest.mark.parametrize("forced", [False, True])
def test_no_bar_without_a_terminal(monkeypatch, forced):
    if forced:
        monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with EpochBar("epoch 1/1", 4) as bar:
        bar.update(4, "text")
    assert sys.stderr.getvalue() == ""


def test_a_line_is_said_above_the_bar(monkeypatch, capsys):
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal)
    with EpochBar("epoch 1/3", 40) as bar:
        before = terminal.getvalue()
        bar.say("time")
        assert terminal.getvalue()[len(before) :].startswith("\x1b[1A\x1b[2K") or "\x1b[2K" in terminal.getvalue()
    assert capsys.readouterr().out == "time\n"


@pytest.mark.parametrize("columns", [80, 160])
@pytest.mark.parametrize("no_color", [False, True])
def test_an_epoch_s_bar_fits_the_terminal(monkeypatch, columns, no_color):
    pyte = pytest.importorskip("pyte")
    terminal = Terminal()
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stderr", terminal)
    means = {"tog": 10.474, "tcg": 11.592, "ncg": 14.391, "train_acc": 10.98}
    with EpochBar("epoch 100/240", 1563) as bar:
        bar.update(1200, step_text(means, {"top_k": 50}, 1063.0, 36125.0, bar.room))
        screen = pyte.Screen(columns, 5)
        pyte.Stream(screen).feed(terminal.getvalue().replace("\n", "\r\n"))
        shown = [line.rstrip() for line in screen.display]
    assert shown[1:] == [""] * 4
    assert shown[0].startswith("epoch 100/240 ━")
    assert "1200/1563" in shown[0]
    assert shown[0].endswith("10:02:05 left")
    losses = "tog 10.474 tcg 11.592 ncg 14.391" if columns == 160 else "loss 36.457"
    assert losses in shown[0]
    if no_color:  # bold or dim it may be
        assert not re.search(r"\x1b\[[\d;]*[349]\d", terminal.getvalue())


@pytest.mark.parametrize(("seconds", "left"), [(0.9, "00:00"), (125.0, "02:05"), (36125.0, "10:02:05")])
def test_a_step_s_text(seconds, left):
    assert step_text(MEANS, {}, 99.6, seconds, 80) == f"tog 1.250 tcg 0.500 top-1 12.35 100 images/s {left} left"
    assert step_text({"task": 2.0}, {"top_k": 50}, 8.0, seconds) == f"task 2.000 K 50 8 images/s {left} left"


@pytest.mark.parametrize(
    ("room", "text"),
    [
        (55, "loss 1.750 top-1 12.35 K 50 100 images/s 02:05 left"),
        (40, "loss 1.750 top-1 12.35 K 50 02:05 left"),
        (35, "loss 1.750 top-1 12.35 02:05 left"),
        (1, "loss 1.750 02:05 left"),
    ],
)
def test_a_step_s_text_leaves_out_what_has_no_room(room, text):
    assert step_text(MEANS, {"top_k": 50}, 99.6, 125.0, room) == text


def test_an_epoch_s_line():
    entry = {"epoch": 7, "train_loss": 1.23456, "test_acc": 61.5, "lr": 0.05}
    assert epoch_line(entry, 9, "test_acc", "test", 62.25) == "epoch 7/9  loss 1.235  test 61.50  best 62.25  lr 0.05"
    entry |= {"train_acc": 70.0, "top_k": 31}
    assert epoch_line(entry, 240, "test_acc", "AP", 62.25) == (
        "epoch   7/240  loss 1.235  train 70.00  AP 61.50  best 62.25  K 31  lr 0.05"
    )
    entry["top_p"] = entry.pop("top_k") / 100
    assert "  best 62.25  p 0.31  lr" in epoch_line(entry, 240, "test_acc", "AP", 62.25)


def test_the_longest_line_of_an_epoch_fits_eighty_columns():
    entry = {"epoch": 100, "train_loss": 16.912, "test_acc": 70.0, "train_acc": 77.12, "top_k": 999, "lr": 0.0122}
    assert len(epoch_line(entry, 100, "test_acc", "test", 70.0)) <= 80
