import json

import torch

from deepkd_plugin.metrics import RunLog, Sums, correct, read_metrics


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
