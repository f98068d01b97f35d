"""Whose files are in a run's folder, and what a run that is started over another one does to them."""

import json

import pytest
import small

from deepkd_plugin.distributed import process_group
from deepkd_plugin.errors import UserError
from deepkd_plugin.run import folder as run_folder
from deepkd_plugin.run import record


@pytest.fixture
def run(tmp_path):
    """The folder of a finished run."""
    small.train(small.config(tmp_path))
    return tmp_path / "run"


def put(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("theirs")


def refused(prefix, match, **how):
    before = small.files(prefix)
    with pytest.raises(UserError, match=match) as caught:
        small.train(small.config(prefix), **how)
    assert "\n" not in str(caught.value)
    assert small.files(prefix) == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "names", [["best"], ["epoch_240"], ["metrics.jsonl"], ["train.events/events.out.tfevents.1"], ["config.yaml"]]
)
def test_files_of_others_that_are_named_like_a_run_s_are_left(tmp_path, names, overwrite):
    put(tmp_path / "run", *names, "notes.jsonl")
    refused(tmp_path, "and no run.json of this package says that they are its own; move them away", overwrite=overwrite)


def test_a_run_of_mdistiller_is_not_started_over(tmp_path):
    put(
        tmp_path / "run",
        "latest",
        "best",
        "epoch_40",
        "student_best",
        "worklog.txt",
        "train.events/events.out.tfevents.1",
    )
    refused(tmp_path, "holds a run already")
    refused(tmp_path, "and no run.json of this package says", overwrite=True)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"finished": true}'])
def test_a_record_that_proves_nothing_is_none(run, content):
    (run / "run.json").write_text(content)
    refused(run.parent, "and no run.json of this package says", overwrite=True)
    refused(run.parent, "--resume finds no run.json of this package", resume=True)


@pytest.mark.parametrize("name", ["train.events", "best", "epoch_7"])
def test_no_link_is_followed(run, tmp_path, name):
    there = tmp_path / "there"
    put(there, "events.out.tfevents.7", "file")
    if (run / name).is_dir():
        (run / name).rename(tmp_path / "away")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(there if name == "train.events" else there / "file")
    refused(tmp_path, f"{name} must be the run's own, and is a link", overwrite=True)


def test_what_is_not_the_run_s_stays_when_it_is_started_again(run):
    put(run, "notes.txt", "more.jsonl", "train.events/notes", "replaced/mine")
    small.train(small.config(run.parent, EPOCHS=1), overwrite=True)
    files = small.files(run)
    assert {files[name] for name in ("notes.txt", "more.jsonl", "train.events/notes", "replaced/mine")} == {b"theirs"}
    assert "epoch_4" not in files
    assert [name for name in files if name.startswith("replaced")] == ["replaced/mine"]


def test_the_old_run_is_kept_until_the_new_one_has_finished_an_epoch(run):
    old = small.files(run)
    trainer, seen = small.make(small.config(run.parent, EPOCHS=2)), []
    epoch = trainer.train_epoch
    trainer.train_epoch = lambda number: seen.append(small.files(run)) or epoch(number)
    trainer.train(overwrite=True)
    first, second = seen
    kept = {name.removeprefix("replaced/"): content for name, content in first.items() if name.startswith("replaced/")}
    assert kept == old
    assert not [name for name in second if name.startswith("replaced")]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
def test_the_old_run_is_back_if_the_new_one_fails_before_that(run, error, capsys):
    old = small.files(run)
    trainer = small.make(small.config(run.parent), width=9)

    def fail(number):
        raise error

    trainer.train_epoch = fail
    with pytest.raises(error):
        trainer.train(overwrite=True)
    assert small.files(run) == old
    assert f"{run}: the run that was there before is back" in capsys.readouterr().out


def test_files_of_others_in_replaced_are_left(run):
    put(run / "replaced", "latest", "best", "train.events/events.out.tfevents.1")
    refused(run.parent, "replaced: --overwrite keeps the old run there .* move it away", overwrite=True)
    refused(run.parent, "--resume finds all", resume=True)


@pytest.mark.parametrize("kind", ["link", "file"])
def test_replaced_is_no_link_or_file(run, tmp_path, kind):
    put(tmp_path / "theirs", "latest", "run.json")
    if kind == "link":
        (run / "replaced").symlink_to(tmp_path / "theirs", target_is_directory=True)
    else:
        put(run, "replaced")
    refused(run.parent, "replaced: --overwrite keeps the old run there .* move it away", overwrite=True)


def test_a_run_that_had_finished_no_epoch_is_not_kept(tmp_path, capsys):
    trainer = small.make(small.config(tmp_path))
    trainer.train_epoch = lambda number: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    small.train(small.config(tmp_path), overwrite=True)
    assert "replaced" not in capsys.readouterr().out


def test_what_killed_writers_left_is_removed_and_other_temporary_files_are_not(run):
    put(run, ".latest.123.tmp", ".run.json.7.tmp", ".theirs.123.tmp", "a.tmp")
    with run_folder.held(run, resume=True, overwrite=False):
        assert {".theirs.123.tmp", "a.tmp"} == {name for name in small.files(run) if name.endswith(".tmp")}


def test_a_copy_that_was_cut_short_is_no_run(run):
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(
        json.dumps({"copying": True, "config_hash": record["config_hash"], "finished": False})
    )
    assert run_folder.left(run)[1] is False


@pytest.mark.parametrize("flags", [(False, False), (True, False), (False, True)])
def test_a_later_attempt_of_the_same_launcher_goes_on(run, monkeypatch, flags):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert run_folder.restarted(run, *flags) == flags  # of another launcher, or none
    record.note(run, {"launcher": process_group.launcher()})
    assert run_folder.restarted(run, *flags) == (True, False)
    (run / "latest").unlink()
    assert run_folder.restarted(run, *flags) == (False, True)
    monkeypatch.setattr("os.getppid", lambda: 1)
    assert run_folder.restarted(run, *flags) == flags
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert process_group.launcher() is None
    assert run_folder.restarted(run, *flags) == flags


def test_the_states_of_a_run_that_has_ended_go_and_its_records_stay(tmp_path):
    states = ("latest", "best", "epoch_40", "student_latest", "student_40", "student_best.safetensors")
    records = ("run.json", "metrics.jsonl", "config.yaml", "log.txt", "latest.txt")
    for name in (*states, *records):
        (tmp_path / name).write_text("{}")
    run_folder.drop_states(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(records)
