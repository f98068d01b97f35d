import json

import pytest
from made_up import CODE, TEACHER, change, make_table, rising

from deepkd_plugin.errors import UserError
from deepkd_plugin.study.report.collect import collect

PAIR = "res32x4_res8x4"


@pytest.fixture
def folder(tmp_path):
    return make_table(tmp_path / "table", {(PAIR, "kd"): [73.1, 73.2, 73.4], (PAIR, "deepkd"): [76.0, None]})


def run_folder(folder, method="kd", seed=0):
    (found,) = (folder / f"runs/{PAIR}/{method}").glob(f"seed{seed}-*")
    return found


def counted(folder):
    return [(one.run.method, one.run.seed) for one in collect(folder).records]


def reasons(folder):
    return {(left.run.method, left.run.seed): (left.kind, left.reason) for left in collect(folder).left_out}


def test_a_finished_run_has_its_whole_record(folder):
    (record,) = (one for one in collect(folder).records if one.run.method == "deepkd")

    assert (record.last, record.best, record.best_epoch, record.epochs) == (76.0, 76.25, 3, 4)
    assert record.curve == dict(enumerate(rising(76.0, 4), 1))
    assert record.lr == {1: 0.05, 2: 0.05, 3: 0.05, 4: 0.0005}
    assert record.momentum[4] == {"tog": 0.9, "tcg": 0.9, "ncg": 0.9}
    assert (record.teacher, record.teacher_acc, record.minutes) == (TEACHER, 79.42, 12.5)
    assert record.execution == ("eager, sequential gradients",)
    assert (record.processor, record.device, record.python) == ("AMD EPYC", "NVIDIA H200", "3.11.7")
    assert (record.commit, record.codes, record.versions["torch"]) == ("ae39fbd", (CODE,), "2.15.0")
    assert record.settings["SOLVER.DECOUPLED.DELTA.TCG"] == -0.075


def test_the_plan_is_read_in_its_order(folder):
    table = collect(folder)

    assert (table.name, table.dataset, table.metric, table.seeds) == (
        "cifar100",
        "cifar100",
        "top-1 (%)",
        (0, 1, 2),
    )
    assert table.pairs[0].label == "resnet32x4 → resnet8x4"
    assert [(method.name, method.base) for method in table.methods] == [("kd", None), ("deepkd", "kd")]
    assert (table.title, table.options) == ("cifar100", {})


def test_an_ablation_says_what_it_is_of(folder):
    change(folder / "table.json", {"table": "ablation-mask", "over": "kd", "options": ["SOLVER.LR", "0.1"]})

    assert collect(folder).title == "ablation-mask over kd on cifar100"
    assert collect(folder).options == {"SOLVER.LR": "0.1"}


def test_a_run_without_a_folder_is_not_started(folder):
    assert reasons(folder) == {("deepkd", 1): ("not started", "not started")}


def test_a_run_that_fell_before_its_record_quotes_its_log(folder):
    at = run_folder(folder)
    (at / "run.json").unlink()
    (at / "log.txt").write_bytes(b"epoch 1\n\x1b[31mdata set is missing\x1b[0m\r\n\n")

    assert reasons(folder)["kd", 0] == (
        "unfinished",
        "ended before its first epoch; its log ends: data set is missing",
    )


def test_an_unfinished_run_tells_how_far_it_came(folder):
    at = run_folder(folder)
    change(at / "run.json", {"finished": False})
    (at / "metrics.jsonl").write_text("{}\n{}\n")

    assert reasons(folder)["kd", 0] == ("unfinished", "unfinished: 2 of 4 epochs; its log ends: epoch 1")


def test_a_run_of_another_config_is_left_out(folder):
    change(run_folder(folder) / "run.json", {"config_hash": "0123456789abcdef"})

    kind, reason = reasons(folder)["kd", 0]
    assert kind == "other config"
    assert "0123456789abcdef" in reason
    assert ("kd", 0) not in counted(folder)


def test_a_run_of_other_code_than_most_of_its_cell_is_left_out(folder):
    change(run_folder(folder, seed=1) / "run.json", {"code": "other"})

    assert reasons(folder)["kd", 1] == (
        "does not fit its cell",
        f"made by code other, the rest of its cell by {CODE}",
    )
    assert ("kd", 2) in counted(folder)


def test_of_equally_many_runs_those_of_the_tables_code_stay_then_the_latest(tmp_path):
    folder = make_table(tmp_path / "table", {(PAIR, "kd"): [73.1, 73.2], (PAIR, "deepkd"): [76.0]})
    change(run_folder(folder, seed=1) / "run.json", {"code": "other"})
    assert counted(folder) == [("kd", 0), ("deepkd", 0)]

    change(run_folder(folder, "deepkd") / "run.json", {"finished": False})
    assert counted(folder) == [("kd", 1)]


def test_a_run_whose_sessions_ran_different_code_is_left_out(folder):
    change(run_folder(folder) / "run.json", {"resumed": [{"code": CODE}, {"code": "other"}]})

    assert reasons(folder)["kd", 0] == (
        "does not fit its cell",
        f"its sessions ran different code: {CODE}, other",
    )


def test_a_run_resumed_by_the_same_code_counts(folder):
    change(run_folder(folder) / "run.json", {"resumed": [{"code": CODE}]})

    assert ("kd", 0) in counted(folder)


def test_a_run_that_went_on_under_another_config_is_left_out(folder):
    session = {"code": CODE, "changed": {"SOLVER.LR": [0.2, 0.1]}, "after": 2}
    change(run_folder(folder) / "run.json", {"resumed": [session]})

    assert reasons(folder)["kd", 0] == (
        "other config",
        "went on after epoch 2 under another config: SOLVER.LR 0.2, then 0.1",
    )


def test_a_run_that_does_not_name_its_code_is_left_out(folder):
    change(run_folder(folder) / "run.json", {"code": None})

    assert reasons(folder)["kd", 0][1] == "run.json does not name the code that made it"


def test_another_teacher_or_setting_does_not_fit_a_cell(folder):
    change(run_folder(folder, seed=0) / "run.json", {"teacher": "another"})
    config = run_folder(folder, seed=1) / "config.yaml"
    config.write_text(config.read_text().replace("LR: 0.05", "LR: 0.1"))
    # by started, the third of three groups of one stays
    assert reasons(folder)["kd", 0][1].startswith("its teacher's weights are another, those of the rest")
    assert reasons(folder)["kd", 1][1] == "SOLVER.LR is 0.1, in the rest of its cell 0.05"


def test_where_runs_find_things_may_differ(folder):
    config = run_folder(folder) / "config.yaml"
    config.write_text(config.read_text().replace("./data", "/elsewhere"))

    assert ("kd", 0) in counted(folder)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("run.json", b"{broken"),
        ("run.json", b"[]"),
        ("run.json", b"{}"),
        ("run.json", b"\xff\xfe"),
        ("metrics.jsonl", b"{broken\n"),
        ("metrics.jsonl", b"[1]\n"),
        ("metrics.jsonl", b""),
        ("config.yaml", b"a: [\n"),
        ("config.yaml", b"- 1\n"),
        ("config.yaml", None),
        ("metrics.jsonl", None),
    ],
)
def test_a_broken_file_leaves_its_run_out_and_no_other(folder, file, content):
    path = run_folder(folder) / file
    path.unlink()
    if content is not None:
        path.write_bytes(content)

    kind, reason = reasons(folder)["kd", 0]
    assert (kind, "\n" in reason, str(folder) in reason) == ("unreadable", False, False)
    assert {("kd", 1), ("kd", 2)} <= set(counted(folder))


@pytest.mark.parametrize(
    "entries",
    [
        {"result": None},
        {"result": {"best": "high"}},
        {"minutes": float("nan")},
        {"teacher_acc": "good"},
        {"versions": 1},
        {"resumed": 3},
    ],
)
def test_a_broken_entry_leaves_its_run_out(folder, entries):
    change(run_folder(folder) / "run.json", entries)

    assert reasons(folder)["kd", 0][0] == "unreadable"


def test_a_result_that_is_not_what_the_metrics_say_is_left_out(folder):
    at = run_folder(folder) / "run.json"
    change(at, {"result": json.loads(at.read_text())["result"] | {"last": 99.0}})

    assert "the last epoch has 73.1 in metrics.jsonl, 99.0 in run.json" in reasons(folder)["kd", 0][1]


def test_a_folder_without_a_plan_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no table.json; it must be a folder that 'deepkd reproduce' made"):
        collect(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"table": "a"}', "\xff"])
def test_a_broken_plan_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "table.json").write_bytes(text.encode("latin1"))

    with pytest.raises(UserError, match=r"table\.json: must be the plan of a table") as error:
        collect(tmp_path)
    assert "\n" not in str(error.value)


def test_a_run_that_is_planned_twice_is_refused(folder):
    runs = json.loads((folder / "table.json").read_text())["runs"]
    change(folder / "table.json", {"runs": [*runs, runs[0]]})

    with pytest.raises(UserError, match=f"{PAIR} kd seed 0 is planned twice"):
        collect(folder)


def test_a_run_of_no_method_of_the_plan_is_refused(folder):
    change(folder / "table.json", {"methods": []})

    with pytest.raises(UserError, match="a run's method is 'kd'; it must be one of"):
        collect(folder)
