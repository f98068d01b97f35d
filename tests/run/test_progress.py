"""The bar of an epoch and the texts beside it."""

import io
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


@pytest.mark.parametrize(("seconds", "left"), [(0.9, "00:00"), (125.0, "02:05"), (36125.0, "10:02:05")])
def test_a_step_s_text(seconds, left):
    assert step_text(MEANS, {}, 99.6, seconds) == f"tog 1.250 tcg 0.500 top-1 12.35 100 images/s {left} left"
    assert step_text({"task": 2.0}, {"top_k": 50}, 8.0, seconds) == f"task 2.000 K 50 8 images/s {left} left"


def test_an_epoch_s_line():
    entry = {"epoch": 7, "train_loss": 1.23456, "test_acc": 61.5, "lr": 0.05, "images_per_second": 1234.5}
    assert epoch_line(entry, "test_acc", "test", 62.25) == (
        "epoch   7  loss 1.2346  test 61.50  best 62.25  lr 0.05  1234 images/s"
    )
    entry |= {"train_acc": 70.0, "top_k": 31}
    assert epoch_line(entry, "test_acc", "AP", 62.25) == (
        "epoch   7  loss 1.2346  train 70.00  AP 61.50  best 62.25  K 31  lr 0.05  1234 images/s"
    )
    entry["top_p"] = entry.pop("top_k") / 100
    assert "  best 62.25  p 0.31  lr" in epoch_line(entry, "test_acc", "AP", 62.25)
