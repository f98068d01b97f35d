"""What a run goes on from, and with which keys."""

import json
import zipfile

import pytest
import small
import torch

from deepkd_plugin import device
from deepkd_plugin.errors import UserError
from deepkd_plugin.run import checkpoint, record
from deepkd_plugin.run.metrics import read_metrics


def stopped(prefix, after=3, **keys):
    """Train so many epochs of a run; returns its folder."""
    trainer = small.make(small.config(prefix, **keys))
    epoch = trainer.train_epoch

    def stop(number):
        if number > after:
            raise KeyboardInterrupt
        return epoch(number)

    trainer.train_epoch = stop
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    return prefix / "run"


def refused(folder, match, **keys):
    before = small.files(folder)
    with pytest.raises(UserError, match=match) as caught:
        small.train(small.config(folder.parent, **keys), resume=True)
    assert "\n" not in str(caught.value)
    assert small.files(folder) == before


def damage(path):
    """Flip a bit of a tensor."""
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size * ("data/" in entry.filename))
    raw = bytearray(path.read_bytes())
    raw[largest.header_offset + 64 + largest.file_size // 2] ^= 1
    path.write_bytes(raw)


def test_a_damaged_latest_goes_on_from_the_newest_whole_state_and_says_so(tmp_path, capsys):
    whole = tmp_path / "whole"
    small.train(small.config(whole))
    folder = stopped(tmp_path)
    damage(folder / "latest")
    small.train(small.config(tmp_path), resume=True)
    assert "latest: is damaged; going on from " in capsys.readouterr().out
    assert small.same(small.weights(folder), small.weights(whole / "run"))
    assert [line["epoch"] for line in read_metrics(folder)] == [1, 2, 3, 4]


def test_without_a_whole_state_a_damaged_latest_is_refused(tmp_path):
    folder = stopped(tmp_path)
    for name in ("latest", "best"):
        damage(folder / name)
    refused(folder, "latest: is damaged, and neither is a whole 'best' beside it; start again with --overwrite")
    small.train(small.config(tmp_path), overwrite=True)  # which is no dead end
    assert record.read_run(folder)["finished"]


def edit(folder, change):
    state = checkpoint.load(folder / "latest", "test")
    del state["outline"]  # as a version before it leaves
    change(state)
    checkpoint.save(state, folder / "latest")


def group(state):
    return state["optimizer"]["param_groups"][0]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda state: state.pop("model"), "its entry 'model' is missing; it must be a network's tensors by name"),
        (lambda state: state.update(epoch="3"), "its entry 'epoch' is not a whole number from 1 on"),
        (lambda state: state.update(best_acc=float("nan")), "its entry 'best_acc' is not a finite number"),
        (lambda state: state.update(best_epoch=4), "its best epoch is 4, and it ends with epoch 3"),
        (lambda state: state["model"].pop("student.head.bias"), "its networks lack student.head.bias"),
        (lambda state: state["model"].update(x=torch.zeros(1)), "its networks have an unknown x"),
        (
            lambda state: state["model"].update({"student.head.bias": torch.zeros(4)}),
            r"has the shape \(4,\), not \(5,\)",
        ),
        (lambda state: state["model"]["student.head.bias"].fill_(float("inf")), "holds NaN or an infinite number"),
        (lambda state: state["optimizer"].pop("state"), "its entry 'optimizer' cannot be taken up"),
        (lambda state: group(state).update(weight_decay=1.0), "has weight_decay 1.0, the"),
        (
            lambda state: state["optimizer"]["param_groups"][0].update(momentum={"tog": "x"}),
            "'optimizer' cannot|momenta",
        ),
        (lambda state: state.update(epoch=7), "metrics.jsonl: must hold|7 epochs done"),
    ],
)
def test_a_state_that_is_not_whole_is_refused_before_anything_is_changed(tmp_path, change, match):
    folder = stopped(tmp_path)
    edit(folder, change)
    refused(folder, match)


def test_a_state_that_was_changed_by_hand_is_refused(tmp_path):
    folder = stopped(tmp_path)
    state = checkpoint.load(folder / "latest", "test")
    checkpoint.save(state | {"best_acc": 99.0}, folder / "latest")
    refused(folder, "it was changed since")


@pytest.mark.parametrize(
    "content",
    [
        *(None, "", '{"epoch": 1}\n', '{"epoch": 1}\n{"epoch": 3}\n', '{"epo', "[]\n[]\n[]\n", "[" * 100_000),
        "".join(f'{{"epoch": {epoch}, "test_acc": NaN}}\n' for epoch in (1, 2, 3)),
        "".join(f'{{"epoch": {epoch}}}\n' for epoch in (1, 2, 3, 1, 2, 3)),
    ],
)
def test_a_record_that_lacks_epochs_is_refused(tmp_path, content):
    folder = stopped(tmp_path)
    (folder / "metrics.jsonl").unlink()
    if content is not None:
        (folder / "metrics.jsonl").write_text(content)
    refused(folder, "metrics.jsonl: must hold the records of the 3 epochs that --resume goes on from")


@pytest.mark.parametrize(
    "changes",
    [{"seed": 7}, {"teacher": "0123"}, {"minutes": None}, {"threads": "many"}, {"threads": 10**9}, {"resumed": {}}],
)
def test_another_run_s_record_is_refused(tmp_path, changes):
    folder = stopped(tmp_path)
    record.note(folder, changes)
    refused(folder, "run.json: --resume needs the record of this run, and it is another's or was changed")


def test_keys_that_only_the_future_reads_may_change_and_are_noted(tmp_path):
    folder = stopped(tmp_path, after=2)
    cfg = small.config(tmp_path, LR=0.001, EPOCHS=5, LR_DECAY_STAGES=[4])
    cfg.DATASET.NUM_WORKERS = 1  # which changes nothing
    cfg.LOG.SAVE_CHECKPOINT_FREQ = 1
    small.train(cfg, resume=True)
    assert [line["lr"] for line in read_metrics(folder)] == pytest.approx([0.05, 0.05, 0.001, 0.001, 0.0001])
    (session,) = record.read_run(folder)["resumed"]
    assert session["after"] == 2
    assert session["changed"] == {
        "SOLVER.EPOCHS": [4, 5],
        "SOLVER.LR": [0.05, 0.001],
        "SOLVER.LR_DECAY_STAGES": [[2], [4]],
    }
    assert record.read_run(folder)["finished"]


def test_a_run_that_goes_on_as_it_was_notes_no_change(tmp_path):
    folder = stopped(tmp_path)
    small.train(small.config(tmp_path), resume=True)
    assert "changed" not in record.read_run(folder)["resumed"][0]


@pytest.mark.parametrize("key", ["MOMENTUM", "WEIGHT_DECAY", "BATCH_SIZE", "SEED"])
def test_other_keys_may_not(tmp_path, key):
    folder = stopped(tmp_path)
    refused(
        folder,
        f"--resume needs the run's own config: SOLVER.{key} was ",
        **{key: small.config(tmp_path).SOLVER[key] / 2 or 3},
    )


def test_fewer_epochs_than_are_done(tmp_path):
    refused(stopped(tmp_path), "finds 3 epochs done; SOLVER.EPOCHS is 2 and must be more", EPOCHS=2)


def test_a_longer_run_is_not_finished_until_it_is(tmp_path):
    small.train(small.config(tmp_path))
    folder = tmp_path / "run"
    trainer = small.make(small.config(tmp_path, EPOCHS=6))
    trainer.train_epoch = lambda number: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(resume=True)
    assert record.read_run(folder)["finished"] is False


def test_the_number_of_threads_stays(tmp_path, capsys):
    torch.set_num_threads(2)
    folder = stopped(tmp_path)
    assert record.read_run(folder)["threads"] == 2
    torch.set_num_threads(1)
    trainer = small.make(small.config(tmp_path))
    trainer.train(resume=True)
    assert torch.get_num_threads() == 2
    assert "no longer bitwise" not in capsys.readouterr().out


def test_another_machine_is_told_of(tmp_path, capsys, monkeypatch):
    stopped(tmp_path)
    monkeypatch.setattr(device, "describe", lambda of: "another")
    small.train(small.config(tmp_path), resume=True)
    assert "goes on with another device: no longer bitwise the uninterrupted run" in capsys.readouterr().out


def test_what_a_nan_advises_can_be_done(tmp_path):
    folder = stopped(tmp_path)
    trainer = small.make(small.config(tmp_path))
    trainer.load()
    with pytest.raises(
        UserError, match=r"lower SOLVER.LR.* --resume takes a lower SOLVER.LR, with EXPERIMENT.NAME run\."
    ):
        trainer.check_finite({"tog": float("nan")}, "in epoch 4")
    small.train(small.config(tmp_path, LR=0.01), resume=True)
    assert json.loads((folder / "run.json").read_text())["resumed"][0]["changed"] == {"SOLVER.LR": [0.05, 0.01]}
