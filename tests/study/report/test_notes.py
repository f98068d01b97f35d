from made_up import DEEPKD, KD, change, make_table

from deepkd_plugin.study.report.cells import assemble
from deepkd_plugin.study.report.collect import collect
from deepkd_plugin.study.report.notes import left_out, notes, what_was_run

PAIR = "res32x4_res8x4"


def make(folder, **entries):
    accuracies = {(PAIR, "kd"): [73.0, 73.2, 73.4, None], (PAIR, "deepkd"): [76.0, 76.3, None, None]}
    make_table(folder / "table", accuracies, methods=(KD, DEEPKD))
    change(folder / "table/table.json", entries)
    return folder / "table"


def test_what_was_run_counts_runs_by_what_became_of_them(tmp_path):
    folder = make(tmp_path)
    first, second, _ = sorted((folder / f"runs/{PAIR}/kd").iterdir())
    change(first / "run.json", {"finished": False})
    change(second / "run.json", {"config_hash": "other"})

    assert what_was_run(collect(folder)).startswith(
        "2 methods, 1 teacher–student pair and 4 seeds on cifar100, measured as top-1 (%): 8 runs planned, "
        "3 counted, 3 not started, 1 unfinished, 1 left out. "
        "The counted runs trained for 38 minutes in all, the first started 2026-11-23 04:00:00. "
    )


def test_what_was_run_names_options_of_all_runs(tmp_path):
    text = what_was_run(collect(make(tmp_path, options=["SOLVER.EPOCHS", "2"])))

    assert "Every run was given the options SOLVER.EPOCHS 2." in text


def test_what_was_run_counts_the_runs_of_other_tables(tmp_path):
    folder = make(tmp_path)
    assert "another table" not in what_was_run(collect(folder))
    runs = sorted((folder / f"runs/{PAIR}/kd").iterdir())
    change(runs[0] / "run.json", {"taken_from": "other: pair kd seed 0"})
    assert "Of them 1 was trained for another table, under the same config." in what_was_run(collect(folder))
    change(runs[1] / "run.json", {"taken_from": "other: pair kd seed 1"})
    assert "Of them 2 were trained for another table, " in what_was_run(collect(folder))


def test_runs_of_a_cell_that_share_a_reason_stand_together(tmp_path):
    assert left_out(collect(make(tmp_path))) == [
        ("resnet32x4 → resnet8x4", "KD", "3", "not started"),
        ("resnet32x4 → resnet8x4", "KD + DeepKD + DTM", "2–3", "not started"),
    ]


def test_notes_state_the_statistics(tmp_path):
    text = " ".join(notes(assemble(collect(make(tmp_path)))))

    stated = ("Welch", "fewer than 3 runs", "chosen on the test images", "spread", "(n − 1)", "Paired: the 95\u00a0% t")
    for said in stated:
        assert said in text
    assert "Holm" not in text  # no comparison has a p value yet


def test_notes_state_how_many_comparisons_holms_correction_is_over(tmp_path):
    accuracies = {(PAIR, "kd"): [73.0, 73.2, 73.4], (PAIR, "deepkd"): [76.0, 76.3, 76.6]}
    text = " ".join(notes(assemble(collect(make_table(tmp_path / "table", accuracies)))))

    assert "Holm's p is adjusted over the 1 comparison with a base" in text
