"""What a run writes down: sums, lines, TensorBoard's events, the worklog."""

import importlib.util
import json
import struct
import sys
import types

import pytest
import small
import torch
from tensorboardX.proto.event_pb2 import Event

from deepkd_plugin import data
from deepkd_plugin.accuracy import correct
from deepkd_plugin.errors import UserError
from deepkd_plugin.run.metrics import GSNR, METRICS, RunLog, Sums, read_lines, read_metrics, weights_and_biases


def test_sums_are_weighted_by_samples():
    sums = Sums()
    assert sums.means() == {}
    sums.add({"loss": torch.tensor(2.0) * 3}, 3)
    sums.add({"loss": torch.tensor(4.0) * 1}, 1)
    assert sums.means() == {"loss": 2.5}
    assert sums.count == 4


def test_a_value_that_is_not_finite_stays_visible():
    sums = Sums()
    sums.add({"loss": torch.tensor(float("nan"))}, 1)
    sums.add({"loss": torch.tensor(1.0)}, 1)
    assert sums.means()["loss"] != sums.means()["loss"]


def test_accuracy_by_hand():
    logits = torch.tensor([[6.0, 5, 4, 3, 2, 1], [6.0, 5, 4, 3, 2, 1], [6.0, 5, 4, 3, 2, 1]])
    counts = correct(logits, torch.tensor([0, 4, 5]))
    assert {k: v.item() for k, v in counts.items()} == {"top1": 100.0, "top5": 200.0}
    assert correct(torch.tensor([[1.0, 2.0]]), torch.tensor([0]))["top5"].item() == 100.0


def record(epoch):
    return {"epoch": epoch, "lr": 0.1 / epoch, "loss": {"tog": 1.25}, "test_acc": 10.0 * epoch}


def test_records_are_lines_of_json_events_and_a_worklog(tmp_path):
    log = RunLog(tmp_path)
    for epoch in (1, 2, 3):
        log.add(record(epoch))
    log.close()
    assert read_metrics(tmp_path) == [record(1), record(2), record(3)]
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])["test_acc"] == 20.0
    work = (tmp_path / "worklog.txt").read_text()
    assert "epoch: 2\nlr: 0.05\nloss/tog: 1.25\ntest_acc: 20.00\n" in work
    (events,) = (tmp_path / "train.events").iterdir()
    assert b"loss/tog" in events.read_bytes()


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path):
    log = RunLog(tmp_path)
    for epoch in (1, 2, 3):
        log.add(record(epoch))
    log.close()
    again = RunLog(tmp_path, epoch=1)
    again.add(record(2))
    again.close()
    assert [line["epoch"] for line in read_metrics(tmp_path)] == [1, 2]
    assert (tmp_path / "worklog.txt").read_text().count("epoch:") == 2


def test_a_new_run_starts_an_empty_record(tmp_path):
    RunLog(tmp_path).close()
    log = RunLog(tmp_path)
    log.add(record(1))
    log.close()
    RunLog(tmp_path).close()
    assert read_metrics(tmp_path) == []


def window(epoch, iteration):
    """One window of gradient samples, of two streams, one of which has no number."""
    gsnr = {"tog": {"ratio": 0.5 / iteration, "missing": 3}, "tcg": {"ratio": None, "missing": 9}}
    return {"epoch": epoch, "iteration": iteration, "samples": 4, "gsnr": gsnr, "angle": {"tog-tcg": None}}


def events(folder):
    """The scalars of TensorBoard files in their order, as (name, step, value), and the steps they were purged at."""
    scalars, purged = [], []
    for file in sorted(folder.iterdir(), key=lambda f: f.stat().st_mtime_ns):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            scalars += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            purged += [event.step] if event.session_log.status == event.session_log.START else []
    return scalars, purged


def test_windows_have_lines_and_events_of_their_own(tmp_path):
    log = RunLog(tmp_path)
    log.add(record(1))
    assert not (tmp_path / GSNR).exists()
    assert not (tmp_path / "gsnr.events").exists()
    log.add(record(2), [window(2, 8), window(2, 16)])
    log.add(record(3))
    log.close()
    assert read_lines(tmp_path, GSNR) == [window(2, 8), window(2, 16)]
    assert read_lines(tmp_path, METRICS) == read_metrics(tmp_path) == [record(1), record(2), record(3)]
    scalars, _ = events(tmp_path / "gsnr.events")
    names = ["samples", "gsnr/tog/ratio", "gsnr/tog/missing", "gsnr/tcg/missing"]
    assert [(name, step) for name, step, _ in scalars] == [(n, step) for step in (8, 16) for n in names]
    assert dict((n, v) for n, s, v in scalars if s == 16)["gsnr/tog/ratio"] == 0.5 / 16
    assert not any(name.startswith("gsnr") for name, _, _ in events(tmp_path / "train.events")[0])
    assert "gsnr" not in (tmp_path / "worklog.txt").read_text()


def test_a_resumed_run_drops_windows_that_came_after_its_checkpoint(tmp_path):
    log = RunLog(tmp_path)
    log.add(record(1), [window(1, 5)])
    log.add(record(2), [window(2, 10)])
    log.close()
    assert events(tmp_path / "gsnr.events")[1] == [1]
    again = RunLog(tmp_path, epoch=1)
    assert read_lines(tmp_path, GSNR) == [window(1, 5)]
    again.add(record(2), [window(2, 9)])
    again.close()
    assert read_lines(tmp_path, GSNR) == [window(1, 5), window(2, 9)]
    # TensorBoard hides the first run's from iteration 6 on
    assert events(tmp_path / "gsnr.events")[1][-1] == 6


def test_a_resumed_run_drops_even_its_only_window(tmp_path):
    log = RunLog(tmp_path)
    log.add(record(1))
    log.add(record(2), [window(2, 10)])
    log.close()
    again = RunLog(tmp_path, epoch=1)
    again.add(record(2))
    again.close()
    assert read_lines(tmp_path, GSNR) == []


def test_windows_go_to_weights_and_biases_too(tmp_path, monkeypatch):
    sent = []
    run = types.SimpleNamespace(log=sent.append)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(run=run))
    log = RunLog(tmp_path, cfg=types.SimpleNamespace(LOG=types.SimpleNamespace(WANDB=True)))
    log.add(record(2), [window(2, 10)])
    log.close()
    assert sent[0] == {
        "iteration": 10, "samples": 4, "gsnr/tog/ratio": 0.05, "gsnr/tog/missing": 3, "gsnr/tcg/missing": 9,
    }  # fmt: skip
    assert sent[1]["epoch"] == 2


@pytest.mark.parametrize("fault", ["no login", "no network"])
def test_weights_and_biases_that_cannot_be_reached_leave_nothing(tmp_path, monkeypatch, fault):
    def init(**named):
        assert fault == "no network"
        raise RuntimeError("cannot\nconnect")

    api = types.SimpleNamespace(api_key=None if fault == "no login" else "key")
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(run=None, api=api, init=init))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    cfg = small.config(tmp_path / "output")
    cfg.LOG.WANDB = True
    reason = "nobody is logged in" if fault == "no login" else "cannot connect"
    with pytest.raises(
        UserError, match=f"LOG.WANDB is True and Weights & Biases cannot be reached .{reason}.; it must"
    ):
        small.train(cfg)
    assert list(tmp_path.iterdir()) == []


def test_a_login_is_asked_for_before_images_are_read(tmp_path, train, monkeypatch):
    fake = types.SimpleNamespace(run=None, api=types.SimpleNamespace(api_key=None))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(data, "get_dataset", lambda cfg: pytest.fail("images are read"))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    code, out, err = train("kd", "LOG.WANDB", "True")
    assert (code, out, "nobody is logged in" in err) == (2, "", True)


def test_without_a_login_runs_can_be_kept_offline(tmp_path, monkeypatch):
    opened = types.SimpleNamespace(log=lambda numbers: None)
    fake = types.SimpleNamespace(run=None, api=types.SimpleNamespace(api_key=None), init=lambda **named: opened)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert weights_and_biases(tmp_path, small.config(tmp_path)) is opened
