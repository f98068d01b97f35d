"""--reuse: runs of other tables that are copied, those that must not be, and copies that were cut short."""

import json
from dataclasses import replace

import pytest

from deepkd_plugin import record
from deepkd_plugin.errors import UserError
from deepkd_plugin.reproduce import reuse, runs, tables
from deepkd_plugin.reproduce.plan import make_plan, write
from deepkd_plugin.reproduce.runs import execute, locked, state

CODE = record.code_hash()


def plan(table, out, methods, seeds=1, **of):
    found = tables.find(table, **of)
    made = make_plan(found, found.pairs, methods, seeds, [], out)
    write(made)
    return made.runs


def finish(run, **entries):
    """What a finished run leaves, in short; its log names it."""
    run.folder.mkdir(parents=True)
    held = {"finished": True, "code": CODE, "config_hash": run.hash, "minutes": 1.0}
    (run.folder / "run.json").write_text(json.dumps(held | entries))
    (run.folder / "log.txt").write_text(str(run.folder))
    (run.folder / "train.events").mkdir()
    (run.folder / "train.events" / "events").write_text("events")
    (run.folder / "lock").write_text("process 7")


def complaint(call, *arguments):
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def glyphs(tmp_path):
    """Runs of the table glyphs100, planned."""
    return plan("glyphs100", tmp_path / "glyphs", ["kd", "deepkd"], 2)


def test_the_same_config_is_found_whatever_the_tables_call_it(tmp_path, glyphs):
    rows = {
        "ablation-momentum": "paper",
        "ablation-mask": "dynamic-renormalise",
        "ablation-delta": "delta0.075",
        "ablation-phases": "no-easy",
    }
    theirs = [run for run in glyphs if run.method == "deepkd"]
    for table, row in rows.items():
        ours = plan(table, tmp_path / table, [row], 2)
        found = reuse.elsewhere(ours, [tmp_path / "glyphs"])
        assert [found[run.folder].folder for run in ours] == [run.folder for run in theirs]
        assert found[ours[1].folder].name == "glyphs100: res20_res8 deepkd seed 1"
    momentum = plan("ablation-momentum", tmp_path / "more", ["none", "release"])
    assert reuse.elsewhere(momentum, [tmp_path / "glyphs"]) == {}
    delta = plan("ablation-delta", tmp_path / "delta", ["delta0"])
    found = reuse.elsewhere(delta, [tmp_path / "glyphs", tmp_path / "more"])
    assert [other.folder for other in found.values()] == [momentum[0].folder]


def test_the_first_of_several_tables_counts_and_a_table_is_not_its_own(tmp_path, glyphs):
    second = plan("glyphs100", tmp_path / "second", ["deepkd"])
    ours = plan("glyphs100", tmp_path / "ours", ["deepkd"])
    folders = [tmp_path / name for name in ("second", "glyphs")]
    assert reuse.elsewhere(ours, folders)[ours[0].folder].folder == second[0].folder
    assert reuse.elsewhere(glyphs, [tmp_path / "glyphs"]) == {}


def test_only_finished_runs_of_this_code_and_teacher_are_taken(tmp_path, glyphs):
    ours = plan("glyphs100", tmp_path / "ours", ["kd", "deepkd"], 2)
    others = reuse.elsewhere(ours, [tmp_path / "glyphs"])
    assert reuse.finished(ours, others, CODE) == ({}, 0)
    finish(glyphs[0])
    finish(glyphs[1], code="0" * 16)
    finish(glyphs[2], finished=False)
    found, unfit = reuse.finished(ours, others, CODE)
    assert (found, unfit) == ({ours[0]: others[ours[0].folder]}, 1)
    taught = [replace(run, teacher="feed") for run in ours]
    assert reuse.finished(taught, others, CODE) == ({}, 2)
    finish(glyphs[3], teacher="feed")
    found, unfit = reuse.finished(taught, others, CODE)
    assert (list(found), unfit) == ([taught[3]], 2)


def test_a_run_is_taken_over_with_its_files_and_says_where_it_is_from(tmp_path, glyphs):
    finish(glyphs[0])
    (ours,) = plan("glyphs100", tmp_path / "ours", ["kd"])
    ours.folder.mkdir(parents=True)
    (ours.folder / "epoch_1").write_text("of an earlier try")
    (ours.folder / "gsnr.events").mkdir()
    other = reuse.elsewhere([ours], [tmp_path / "glyphs"])[ours.folder]
    reuse.take_over(ours, other)
    assert state(ours) == "finished"
    names = {path.relative_to(ours.folder).as_posix() for path in ours.folder.rglob("*")}
    assert names == {"run.json", "log.txt", "lock", "train.events", "train.events/events"}
    assert (ours.folder / "log.txt").read_text() == str(glyphs[0].folder)
    assert (ours.folder / "lock").read_text() != "process 7"
    held, theirs = (json.loads((run.folder / "run.json").read_text()) for run in (ours, glyphs[0]))
    assert held == theirs | {"taken_from": "glyphs100: res20_res8 kd seed 0"}
    # taken once more, it is still from where it was trained
    (third,) = plan("glyphs100", tmp_path / "third", ["kd"])
    reuse.take_over(third, reuse.elsewhere([third], [tmp_path / "ours"])[third.folder])
    assert json.loads((third.folder / "run.json").read_text()) == held | {
        "taken_from": "glyphs100: res20_res8 kd seed 0"
    }


def test_a_copy_that_is_cut_short_is_no_finished_run(tmp_path, glyphs, monkeypatch):
    finish(glyphs[0])
    (ours,) = plan("glyphs100", tmp_path / "ours", ["kd"])
    finish(ours, finished=False)
    (ours.folder / "latest").touch()
    other = reuse.elsewhere([ours], [tmp_path / "glyphs"])[ours.folder]

    def full(*arguments, **named):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(reuse, "write_whole", full)
        said = complaint(reuse.take_over, ours, other)
    assert said.startswith(f"{glyphs[0].folder}: its files cannot be copied to {ours.folder} (")
    assert "No space left" in said
    assert state(ours) == "new"
    reuse.take_over(ours, other)
    assert state(ours) == "finished"


def test_a_run_that_is_being_trained_is_not_touched(tmp_path, glyphs, monkeypatch):
    monkeypatch.setattr(runs, "PATIENCE", 0.0)
    finish(glyphs[0])
    (ours,) = plan("glyphs100", tmp_path / "ours", ["kd"])
    other = reuse.elsewhere([ours], [tmp_path / "glyphs"])[ours.folder]
    with locked(ours.folder):
        assert "is at work there" in complaint(reuse.take_over, ours, other)
    assert [path.name for path in ours.folder.iterdir()] == ["lock"]


def test_a_folder_without_a_table_is_one_line(tmp_path):
    (ours,) = plan("glyphs100", tmp_path / "ours", ["kd"])
    assert complaint(reuse.elsewhere, [ours], [tmp_path]) == (
        f"{tmp_path}: --reuse must name a folder that deepkd reproduce made; this has no table.json"
    )
    (tmp_path / "table.json").write_text("{}")
    assert complaint(reuse.elsewhere, [ours], [tmp_path]).startswith(
        f"{tmp_path / 'table.json'}: must be the plan that deepkd reproduce wrote there, and is damaged ("
    )
    (tmp_path / "file").write_text("")
    assert "--reuse must be a folder" in complaint(reuse.elsewhere, [ours], [tmp_path / "file"])


def test_runs_that_were_taken_are_not_trained(fake_run, tmp_path):
    """Two tables of made-up runs; the second starts only what the first has not."""
    first = [fake_run(seed) for seed in (0, 1)]
    assert execute(first, 2, worker=fake_run.worker) == []
    ours = [fake_run(seed, out="ours") for seed in (0, 1, 2)]
    for run, other in zip(ours, first):
        reuse.take_over(run, reuse.Other(other.folder, other.name))
    assert execute(ours, 2, worker=fake_run.worker) == []
    assert [(run.folder / "metrics.jsonl").read_text() for run in ours[:2]] == [
        (run.folder / "metrics.jsonl").read_text() for run in first
    ]
    logs = [(run.folder / "log.txt").read_text() for run in ours]
    assert ["LOG.PREFIX" in log and str(tmp_path / "out") in log for log in logs] == [True, True, False]
