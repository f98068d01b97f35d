"""The plan: runs that are what the launcher makes of them, table.json over several calls, what stops a table."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from deepkd_plugin import choice, config, data
from deepkd_plugin.config.shipped import shipped
from deepkd_plugin.errors import UserError
from deepkd_plugin.hosts import registry
from deepkd_plugin.launch import experiment_name, read_config
from deepkd_plugin.run import record
from deepkd_plugin.study.reproduce import tables
from deepkd_plugin.study.reproduce.plan import make_plan, problems
from deepkd_plugin.study.table import Table

GLYPHS = tables.find("glyphs100")
PAIR = GLYPHS.pairs


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def make(out, methods=("kd", "deepkd"), seeds=2, options=(), table=GLYPHS, pairs=PAIR):
    return make_plan(table, pairs, methods, seeds, options, out)


def complaint(call, *arguments, **named):
    with pytest.raises(UserError) as error:
        call(*arguments, **named)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_folder_that_is_no_text_under_the_locale_is_refused_before_any_run(tmp_path):
    """As a path in Chinese is where neither the locale nor PYTHONUTF8 says UTF-8."""
    where = tmp_path / "\u4e2d".encode().decode("ascii", "surrogateescape")
    said = complaint(make, where)
    assert "is no text under this locale; set PYTHONUTF8=1" in said
    said.encode()


def keys(runs):
    return [(run.method, run.seed) for run in runs]


def planned(out):
    """The runs of table.json as the report reads them: (method, seed) -> hash."""
    return {(run.method, run.seed): run.hash for run in Table.read(out).runs}


def test_a_run_is_what_the_launcher_makes_of_its_config_and_options(out):
    made = make(out, options=["SOLVER.EPOCHS", "3", "DATASET.ROOT", "elsewhere"])
    assert keys(made.runs) == [("kd", 0), ("kd", 1), ("deepkd", 0), ("deepkd", 1)]
    assert {run.pair for run in made.runs} == set(PAIR)
    for run in made.runs:
        cfg, _ = read_config(registry.BUILTIN, str(run.config), run.options)
        assert record.config_hash(cfg) == run.hash
        assert run.seed == cfg.SOLVER.SEED
        assert cfg.SOLVER.EPOCHS == run.epochs == 3
        assert cfg.DATASET.ROOT == "elsewhere"
        assert Path(cfg.LOG.PREFIX) / experiment_name(cfg, run.options) == run.folder
        assert run.folder == out / "runs" / "res20_res8" / run.method / f"seed{run.seed}-{run.hash[:8]}"
        assert run.config == shipped("configs") / "glyphs100" / "res20_res8" / f"{run.method}.yaml"
        assert run.name == f"res20_res8 {run.method} seed {run.seed}"
    assert len({run.hash for run in made.runs}) == 4
    assert not out.exists()


def test_the_hash_is_of_what_is_computed_alone(out):
    first = [run.hash for run in make(out).runs]
    assert [run.hash for run in make(out, options=["DATASET.ROOT", "x", "LOG.WANDB", "False"]).runs] == first
    assert not set(first) & {run.hash for run in make(out, options=["SOLVER.LR", "0.3"]).runs}
    relative = make(Path(os.path.relpath(out))).runs
    assert [run.hash for run in relative] == first
    assert all(run.folder.is_absolute() for run in relative)


def test_table_json_is_what_the_report_reads(out):
    made = make(out, ("vanilla", "kd", "deepkd"), options=["DATASET.ROOT", "x"])
    made.document.write()
    table = Table.read(out)
    assert (table.name, table.dataset, table.metric) == ("glyphs100", "glyphs100", "top-1 (%)")
    assert (table.seeds, table.options) == ((0, 1), {"DATASET.ROOT": "x"})
    assert [(p.name, p.teacher, p.student) for p in table.pairs] == [("res20_res8", "resnet20", "resnet8")]
    rows = [(m.name, m.label, m.base) for m in table.methods]
    assert rows[0] == ("vanilla", "student alone", None)
    assert rows[1:] == [("kd", "KD", None), ("deepkd", "KD + DeepKD + DTM", "kd")]
    assert [(r.method, r.seed, r.hash, r.epochs, r.folder) for r in table.runs] == [
        (r.method, r.seed, r.hash, r.epochs, r.folder) for r in made.runs
    ]
    entry = json.loads((out / "table.json").read_text())["runs"][0]
    assert entry["config"] == "configs/glyphs100/res20_res8/vanilla.yaml"
    assert entry["options"] == ["DATASET.ROOT", "x", "DISTILLER.FOLD_TEACHER", "False"]
    assert entry["folder"] == f"runs/res20_res8/vanilla/seed0-{entry['hash'][:8]}"
    assert [path.name for path in out.iterdir()] == ["table.json"]


def test_another_call_extends_the_table_and_runs_only_its_own(out):
    make(out, ("deepkd",), seeds=1).document.write()
    made = make(out, ("kd",), seeds=3)
    assert keys(made.runs) == [("kd", 0), ("kd", 1), ("kd", 2)]
    assert made.replaced == 0
    made.document.write()
    assert list(planned(out)) == [("kd", 0), ("kd", 1), ("kd", 2), ("deepkd", 0)]
    assert Table.read(out).seeds == (0, 1, 2)
    make(out, ("kd",), seeds=1).document.write()
    assert len(planned(out)) == 4


def test_runs_whose_config_changed_are_replaced_for_as_long_as_it_is_another(out):
    make(out).document.write()
    before = planned(out)
    made = make(out, ("kd",), seeds=1, options=["SOLVER.EPOCHS", "2"])
    assert keys(made.runs) == [("kd", 0)]
    assert made.replaced == 4  # one protocol for the whole table
    made.document.write()
    now = planned(out)
    assert now.keys() == before.keys()
    assert not set(now.values()) & set(before.values())
    assert {run.epochs for run in Table.read(out).runs} == {2}
    assert make(out, ("kd",), seeds=1, options=["SOLVER.EPOCHS", "2"]).replaced == 0
    make(out, ("kd",), seeds=1).document.write()
    assert planned(out) == before


def test_a_pair_that_is_no_longer_shipped_leaves_the_table(out):
    make(out).document.write()
    held = json.loads((out / "table.json").read_text())
    held["runs"].append(held["runs"][0] | {"pair": "gone"})
    held["pairs"].append(held["pairs"][0] | {"name": "gone"})
    (out / "table.json").write_text(json.dumps(held))
    made = make(out)
    assert made.replaced == 1
    made.document.write()
    assert {run.pair for run in Table.read(out).runs} == {"res20_res8"}


def test_another_table_s_folder_is_refused(out):
    make(out).document.write()
    cpu = tables.find("cifar100_cpu")
    line = complaint(make, out, table=cpu, pairs=cpu.pairs)
    assert line == f"{out}: --out holds the table glyphs100; give another for cifar100_cpu"
    over_kd, over_dkd = (tables.find("ablation-delta", base) for base in ("kd", "dkd"))
    there = out.with_name("delta")
    make(there, ["delta0"], table=over_kd).document.write()
    line = complaint(make, there, ["delta0"], table=over_dkd)
    assert line == (
        f"{there}: --out holds the table ablation-delta over kd on glyphs100; give another for ablation-delta over "
        f"dkd on glyphs100"
    )


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"table": "x", "dataset": "x", "runs": [{}]}'])
def test_a_damaged_plan_is_told(out, content):
    out.mkdir()
    (out / "table.json").write_text(content)
    line = complaint(make, out)
    path = out / "table.json"
    assert line.startswith(f"{path}: must be the plan of a table (")
    assert line.endswith("); give another --out, or delete it: the runs beside it are found again")


def test_a_folder_that_cannot_be_is_told(out, monkeypatch):
    out.write_text("a file")
    assert complaint(make, out) == f"{out}: --out must be a folder"
    out.unlink()
    made = make(out)
    out.write_text("a file")
    assert complaint(made.document.write) == f"{out}: --out must be a folder that can be written (File exists)"


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("SOLVER.SEED 3", "SOLVER.SEED is set for each run by the plan; use --seeds N instead"),
        ("LOG.PREFIX x", "LOG.PREFIX is set for each run by the plan; use --out DIR instead"),
        ("EXPERIMENT.NAME x", "EXPERIMENT.NAME is set for each run by the plan; use --out DIR instead"),
        ("EXPERIMENT.PROJECT x", "EXPERIMENT.PROJECT is set for each run by the plan; use --out DIR instead"),
        ("SOLVER.EPOCHS", "options come in pairs KEY VALUE, 'SOLVER.EPOCHS' has no value"),
        ("SOLVER.EPOCS 2", "unknown config key SOLVER.EPOCS; did you mean SOLVER.EPOCHS?"),
        ("SOLVER.LR -1", "SOLVER.LR is -1.0; it must be a number above 0"),
    ],
)
def test_options_that_cannot_be_are_told(out, options, line):
    assert complaint(make, out, options=options.split()) == f"command line: {line}"


def test_what_an_ablation_varies_is_not_an_option(out):
    mask = tables.find("ablation-mask")
    options = ["DeepKD.MASK.K", "0.3"]
    line = "command line: DeepKD.MASK.K is what ablation-mask varies; leave it out"
    assert complaint(make, out, ["none"], options=options, table=mask) == line
    assert make(out, ["none"], options=["DeepKD.MASK.INITIAL", "0.1"], table=mask).runs


def test_a_row_that_the_config_check_refuses_is_named(out):
    line = complaint(
        make, out, ["delta0.099"], options=["SOLVER.MOMENTUM", "0.92"], table=tables.find("ablation-delta")
    )
    start = "ablation-delta, res20_res8 delta0.099: command line: SOLVER.DECOUPLED.DELTA.TOG is 0.099; it must be in"
    assert line.startswith(start)


def test_methods_that_the_chosen_pairs_do_not_have(out, monkeypatch):
    monkeypatch.setattr(tables.Outline, "file", lambda table, pair, method: None)
    line = complaint(make, out)
    assert line == ("command line: --methods is kd deepkd; configs/glyphs100 has none of them for res20_res8")


def cifar(out, root, *pairs, methods=("kd", "deepkd"), options=()):
    return make(out, methods, 1, ["DATASET.ROOT", str(root), *options], tables.find("cifar100"), pairs)


def test_missing_teachers_are_one_line_and_so_is_missing_data(out, tmp_path, monkeypatch, cifar_root):
    monkeypatch.chdir(tmp_path)
    made = cifar(out, tmp_path, "res110_res20", "res110_res32", "vgg13_vgg8")
    data, teachers = problems(made, made.runs, prepare=False)
    assert data.startswith(f"{tmp_path}: DATASET.ROOT holds no CIFAR-100; ")
    folder = "download_ckpts/cifar_teachers"
    assert teachers.startswith("DISTILLER.TEACHER_WEIGHTS: files of teachers are missing: ")
    first, second = teachers.split(": ", 2)[2].split("; ")[:2]
    assert first.endswith(f"{folder}/resnet110_vanilla/ckpt_epoch_240.pth (res110_res20, res110_res32)")
    assert second.endswith(f"{folder}/vgg13_vanilla/ckpt_epoch_240.pth (vgg13_vgg8)")
    assert "\n" not in teachers

    for name in ("resnet110", "vgg13"):
        file = Path(registry.BUILTIN.cifar_models[name][1])
        file.parent.mkdir(parents=True)
        file.touch()
    made = cifar(out, cifar_root, "res110_res20", "res110_res32", "vgg13_vgg8")
    assert problems(made, made.runs, prepare=True) == []
    named = cifar(out, cifar_root, "res56_res20", options=["DISTILLER.TEACHER_WEIGHTS", "none.pt"])
    (line,) = problems(named, named.runs, prepare=False)
    assert ": none.pt (res56_res20); " in line


def test_only_runs_that_are_left_need_anything(out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = cifar(out, tmp_path, "res56_res20")
    assert problems(made, made.runs[:0], prepare=True) == []
    assert len(problems(made, made.runs[:1], prepare=True)) == 2


def test_a_student_alone_needs_no_teacher(out, tmp_path, monkeypatch, cifar_root):
    monkeypatch.chdir(tmp_path)
    table = tables.find("cifar100_cpu")
    made = make(out, ("vanilla", "kd"), 1, ["DATASET.ROOT", str(cifar_root)], table, table.pairs)
    vanilla, kd = made.runs
    assert problems(made, [vanilla], prepare=False) == []
    (line,) = problems(made, [vanilla, kd], prepare=False)
    assert ": output/cifar100_cpu/teacher,res20/student_latest (res20_res8); " in line


def test_a_teacher_that_the_zoo_has_no_file_of(out, tmp_path, monkeypatch):
    monkeypatch.setitem(registry.BUILTIN.tiny_imagenet_models, "ResNet18", (None, None))
    table = tables.find("tiny_imagenet")
    made = make(out, ("kd",), 1, ["DATASET.ROOT", str(tmp_path)], table, table.pairs)
    _, line = problems(made, made.runs, prepare=False)
    assert ": none in the zoo for ResNet18 (r18_mv2, r18_shuv2); " in line


def test_a_look_neither_draws_nor_fetches(out, tmp_path, monkeypatch):
    asked = []

    def read(root, split):
        asked.append(split)
        return np.zeros((1, 32, 32, 3), np.uint8), [0]

    glyphs, cifar100 = data.DATASETS["glyphs100"], data.DATASETS["cifar100"]
    monkeypatch.setitem(data.DATASETS, "glyphs100", replace(glyphs, read=read))
    fetching = replace(cifar100, fetch=lambda root: asked.append("fetched"))
    monkeypatch.setitem(data.DATASETS, "cifar100", fetching)
    made = make(out, options=["DATASET.ROOT", str(tmp_path)])
    assert problems(made, made.runs, prepare=False) == []
    assert asked == []
    assert problems(made, made.runs, prepare=True) == []
    assert asked == ["train", "test"]  # once, before several processes would
    made = cifar(out, tmp_path, "res56_res20", options=["DATASET.DOWNLOAD", "True"])
    assert len(problems(made, made.runs, prepare=False)) == 1
    assert asked == ["train", "test"]
    problems(made, made.runs, prepare=True)
    assert asked == ["train", "test", "fetched"]


def test_the_other_keys_of_a_run_are_the_users(out):
    """Nothing is set behind the user's back but what is in OURS, and what the config leaves to a measurement."""
    for run in make(out).runs:
        assert set(run.options[::2]) == {*GLYPHS.kind.ours, "DISTILLER.FOLD_TEACHER"}
    assert not [key for key in GLYPHS.kind.ours if config.computes(key) and key != "SOLVER.SEED"]


OPEN = ("SOLVER.CHANNELS_LAST", "auto")


def given(run):
    """The values of the keys that a plan settles, of a run's options; the last one counts."""
    options = dict(zip(run.options[::2], run.options[1::2]))
    return {key: options.get(key) for key in config.CHOICES}


def test_all_runs_of_a_pair_get_what_was_measured_once(out, monkeypatch):
    measured = []

    def medians(passes, images):
        measured.append((len(images), torch.get_num_threads()))
        return {False: 1.0, True: 0.5}

    monkeypatch.setattr(choice, "medians", medians)
    options = ("SOLVER.BATCH_SIZE", "16", *OPEN)
    made = make_plan(GLYPHS, PAIR, ("vanilla", "kd", "deepkd"), 2, options, out, threads=2)
    assert measured == [(16, 2), (16, 2)]  # the format, then the teacher in that format
    for run in made.runs:
        folds = str(run.method != "vanilla")
        assert given(run) == {"SOLVER.CHANNELS_LAST": "True", "DISTILLER.FOLD_TEACHER": folds}
        cfg, _ = read_config(registry.BUILTIN, str(run.config), run.options)
        assert record.config_hash(cfg) == run.hash
    assert made.settled[PAIR[0], "kd"] == {"SOLVER.CHANNELS_LAST": True, "DISTILLER.FOLD_TEACHER": True}
    # another call measures nothing, though it would now choose otherwise, and gives the same to runs that are new
    made.document.write()
    monkeypatch.setattr(choice, "medians", lambda passes, images: {False: 1.0, True: 2.0})
    again = make_plan(GLYPHS, PAIR, ("kd", "deepkd", "dkd"), 3, options, out, threads=2)
    assert again.replaced == 0
    assert {tuple(given(run).values()) for run in again.runs} == {("True", "True")}
    assert {run.hash for run in made.runs if run.method != "vanilla"} < {run.hash for run in again.runs}


def test_what_the_config_says_or_nobody_can_measure_is_not_measured(out, monkeypatch):
    monkeypatch.setattr(choice, "medians", lambda passes, images: {False: 1.0, True: 0.5})
    (run,) = make(out, ["kd"], 1, ["SOLVER.CHANNELS_LAST", "True", "DISTILLER.FOLD_TEACHER", "False"]).runs
    assert given(run) == {"SOLVER.CHANNELS_LAST": "True", "DISTILLER.FOLD_TEACHER": "False"}
    (elsewhere,) = make_plan(GLYPHS, PAIR, ["kd"], 1, OPEN, out).runs  # on a cluster
    assert given(elsewhere) == {"SOLVER.CHANNELS_LAST": "False", "DISTILLER.FOLD_TEACHER": "False"}
    table = ["DISTILLER.TEACHER_LOGITS", "table"]
    (looks_up,) = make_plan(GLYPHS, PAIR, ["kd"], 1, [*OPEN, *table], out, threads=1).runs
    assert given(looks_up) == {"SOLVER.CHANNELS_LAST": "True", "DISTILLER.FOLD_TEACHER": "False"}
