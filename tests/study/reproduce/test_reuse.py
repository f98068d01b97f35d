"""--reuse: runs of other tables that are copied, those that must not be, and copies that were cut short."""

import json
import shutil
from dataclasses import replace

import pytest

from deepkd_plugin.errors import UserError
from deepkd_plugin.run import record
from deepkd_plugin.run.lock import locked
from deepkd_plugin.study.reproduce import reuse, tables
from deepkd_plugin.study.reproduce.plan import make_plan
from deepkd_plugin.study.reproduce.runs import execute, state


def plan(table, out, methods, seeds=1, **of):
    found = tables.find(table, **of)
    made = make_plan(found, found.pairs, methods, seeds, [], out)
    made.document.write()
    return made.runs


def finish(run, **entries):
    """What a finished run leaves, in short; its log names it."""
    run.folder.mkdir(parents=True)
    held = {"finished": True, "code": record.code_hash(), "config_hash": run.hash, "minutes": 1.0}
    (run.folder / "run.json").write_text(json.dumps(held | entries))
    (run.folder / "log.txt").write_text(str(run.folder))
    (run.folder / "train.events").mkdir()
    (run.folder / "train.events" / "events").write_text("events")
    (run.folder / "lock").write_text("process 7 on a machine\n")


def complaint(call, *arguments):
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def places(ours, *folders):
    """The folders where runs of the same config lie, for each of ours."""
    found = reuse.elsewhere(ours, folders)
    return [[other.folder for other in found[run.folder]] for run in ours]


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
    theirs = [[run.folder] for run in glyphs if run.method == "deepkd"]
    for table, row in rows.items():
        assert places(plan(table, tmp_path / table, [row], 2), tmp_path / "glyphs") == theirs
    momentum = plan("ablation-momentum", tmp_path / "more", ["none", "release"])
    assert places(momentum, tmp_path / "glyphs") == [[], []]
    delta = plan("ablation-delta", tmp_path / "delta", ["delta0"])
    assert places(delta, tmp_path / "glyphs", tmp_path / "more") == [[momentum[0].folder]]
    (other,) = reuse.elsewhere(delta, [tmp_path / "more"])[delta[0].folder]
    assert other.name == "ablation-momentum over kd on glyphs100: res20_res8 none seed 0"


def test_a_table_is_not_its_own(tmp_path, glyphs):
    (tmp_path / "link").symlink_to(tmp_path / "glyphs")
    assert not any(reuse.elsewhere(glyphs, [tmp_path / "glyphs", tmp_path / "link"]).values())


def test_only_finished_runs_of_this_code_and_teacher_are_taken(tmp_path, glyphs):
    ours = plan("glyphs100", tmp_path / "ours", ["kd", "deepkd"], 2)
    others = reuse.elsewhere(ours, [tmp_path / "glyphs"])
    assert reuse.usable(ours, others, record.code_hash()) == ({}, 0)
    finish(glyphs[0])
    finish(glyphs[1], code="0" * 16)
    finish(glyphs[2], finished=False, code="0" * 16)
    found, unfit = reuse.usable(ours, others, record.code_hash())
    assert (found, unfit) == ({ours[0]: others[ours[0].folder][0]}, 1)
    taught = [replace(run, teacher="feed") for run in ours]
    assert reuse.usable(taught, others, record.code_hash()) == ({}, 2)
    finish(glyphs[3], teacher="feed")
    found, unfit = reuse.usable(taught, others, record.code_hash())
    assert (list(found), unfit) == ([taught[3]], 2)
    # whose teacher is not known here
    found, unfit = reuse.usable(ours, others, record.code_hash())
    assert (list(found), unfit) == ([ours[0]], 2)


def test_the_first_table_counts_that_has_the_run(tmp_path, glyphs):
    second = plan("glyphs100", tmp_path / "second", ["kd"])
    third = plan("glyphs100", tmp_path / "third", ["kd"])
    ours = plan("glyphs100", tmp_path / "ours", ["kd"])
    others = reuse.elsewhere(ours, [tmp_path / name for name in ("glyphs", "second", "third")])
    finish(glyphs[0], code="0" * 16)
    finish(second[0])
    finish(third[0])
    found, unfit = reuse.usable(ours, others, record.code_hash())
    assert ([other.folder for other in found.values()], unfit) == ([second[0].folder], 0)


def test_a_run_is_taken_over_with_its_files_and_says_where_it_is_from(tmp_path, glyphs):
    finish(glyphs[0])
    (ours,) = plan("glyphs100", tmp_path / "ours", ["kd"])
    finish(ours, finished=False)
    (ours.folder / "epoch_1").write_text("of an earlier try")
    (other,) = reuse.elsewhere([ours], [tmp_path / "glyphs"])[ours.folder]
    reuse.take_over(ours, other, record.code_hash())
    assert state(ours) == "finished"
    names = {path.relative_to(ours.folder).as_posix() for path in ours.folder.rglob("*")}
    assert names == {"run.json", "log.txt", "lock", "train.events", "train.events/events"}
    assert (ours.folder / "log.txt").read_text() == str(glyphs[0].folder)
    assert (ours.folder / "lock").read_text() != "process 7 on a machine\n"
    held, theirs = (json.loads((run.folder / "run.json").read_text()) for run in (ours, glyphs[0]))
    assert held == theirs | {"taken_from": "glyphs100: res20_res8 kd seed 0"}
    # taken once more, it is still from where it was trained
    (third,) = plan("ablation-delta", tmp_path / "third", ["delta0"])
    reuse.take_over(replace(third, hash=ours.hash), reuse.Other(ours.folder, "ours"), record.code_hash())
    assert json.loads((third.folder / "run.json").read_text()) == held


@pytest.mark.parametrize("cut", ["copying", "recording"])
def test_after_a_copy_that_is_cut_short_the_run_of_before_is_back(tmp_path, glyphs, monkeypatch, cut):
    finish(glyphs[0])
    (ours,) = plan("glyphs100", tmp_path / "ours", ["kd"])
    finish(ours, finished=False)
    (ours.folder / "latest").touch()
    assert state(ours) == "resumable"
    (other,) = reuse.elsewhere([ours], [tmp_path / "glyphs"])[ours.folder]

    def full(*arguments, **named):
        raise OSError(28, "No space left on device")

    broken = {
        "copying": (shutil, "copytree"),
        "recording": (record, "write_run"),
    }
    with monkeypatch.context() as patch:
        patch.setattr(*broken[cut], full)
        said = complaint(reuse.take_over, ours, other, record.code_hash())
    assert said.startswith(f"{glyphs[0].folder}: its files cannot be copied to {ours.folder} (")
    assert "No space left" in said
    assert state(ours) == "resumable"
    reuse.take_over(ours, other, record.code_hash())
    assert state(ours) == "finished"
    assert not (ours.folder / "replaced").exists()


def test_what_changed_since_the_plan_is_left_alone(tmp_path, glyphs):
    finish(glyphs[0])
    (ours,) = plan("glyphs100", tmp_path / "ours", ["kd"])
    (other,) = reuse.elsewhere([ours], [tmp_path / "glyphs"])[ours.folder]
    with locked(ours.folder):  # another process trains it
        reuse.take_over(ours, other, record.code_hash())
    assert not ours.folder.exists()
    ours.folder.mkdir(parents=True)
    (ours.folder / "run.json").write_text(
        json.dumps({"finished": True, "code": record.code_hash(), "config_hash": ours.hash, "minutes": 2.0})
    )
    reuse.take_over(ours, other, record.code_hash())  # it has finished it
    assert json.loads((ours.folder / "run.json").read_text())["minutes"] == 2.0
    (ours.folder / "run.json").unlink()
    theirs = json.loads((glyphs[0].folder / "run.json").read_text())
    (glyphs[0].folder / "run.json").write_text(json.dumps(theirs | {"finished": False}))
    reuse.take_over(ours, other, record.code_hash())  # and the other one is being made anew
    assert list(ours.folder.iterdir()) == []


@pytest.mark.parametrize("text", [None, "{}", '{"runs": [{"hash": []}]}'])
def test_a_folder_without_a_table_is_one_line(tmp_path, text):
    (ours,) = plan("glyphs100", tmp_path / "ours", ["kd"])
    there = "holds no table.json; it must be a folder that 'deepkd reproduce' made"
    if text is not None:
        (tmp_path / "table.json").write_text(text)
        there = "must be the plan of a table ("
    said = complaint(reuse.elsewhere, [ours], [tmp_path])
    assert said.startswith(f"command line: --reuse: {tmp_path}")
    assert there in said


def test_runs_that_were_taken_are_not_trained(fake_run):
    """Two tables of made-up runs; the second starts only what the first has not."""
    first = [fake_run(seed) for seed in (0, 1)]
    assert execute(first, 2, worker=fake_run.worker) == []
    ours = [fake_run(seed, out="ours") for seed in (0, 1, 2)]
    for run, other in zip(ours, first):
        reuse.take_over(run, reuse.Other(other.folder, other.name), record.code_hash())
    assert execute(ours, 2, worker=fake_run.worker) == []
    assert [state(run) for run in ours] == ["finished"] * 3
    for run, other in zip(ours, first):
        assert (run.folder / "log.txt").read_bytes() == (other.folder / "log.txt").read_bytes()
