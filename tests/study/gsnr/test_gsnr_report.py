"""deepkd_plugin/study/gsnr/report.py on made-up runs: tables, the figure's artists, the summary, every mistake."""

import csv
import json
import math

import matplotlib
import matplotlib.colors
import numpy as np
import pytest
import yaml

from deepkd_plugin.errors import UserError
from deepkd_plugin.study.gsnr import figure as gsnr_figure
from deepkd_plugin.study.gsnr.report import draw, report, summarise, write_tables
from deepkd_plugin.study.gsnr.windows import read_runs

PAIRS = {"tog-tcg": 85.0, "tog-ncg": 60.0, "tcg-ncg": 95.0}
MOMENTUM = {"tog": 0.975, "tcg": 0.825, "ncg": 0.975}


GSNR = {"DECOUPLED": {"ALLOCATION": "gsnr"}}


def window(k, tog=0.2, tcg=0.15, ncg=0.3, **changes):
    """The k-th window's record: `ratio` of each stream as given, `mean` twice that."""
    gsnr = {
        stream: {"mean": ratio and 2 * ratio, "ratio": ratio, "norm": 1.5, "zero_variance": 12, "missing": 3}
        for stream, ratio in (("tog", tog), ("tcg", tcg), ("ncg", ncg))
    }
    record = {"iteration": 2000 * k, "epoch": 3 * k, "samples": 10, "coordinates": 500, "parameters": 800}
    return record | {"gsnr": gsnr, "angle": dict(PAIRS), "momentum": dict(MOMENTUM)} | changes


@pytest.fixture
def make(tmp_path):
    """A made-up run's folder: make("a", [window(1), …], seed=1, node={"KEY": value}, …)."""

    def make(name, windows, seed=0, **nodes):
        folder = tmp_path / name
        folder.mkdir()
        tree = {
            "DATASET": {"TYPE": "glyphs100"},
            "DISTILLER": {"TYPE": "DeepKD", "TEACHER": "resnet20", "STUDENT": "resnet8"},
            "SOLVER": {"SEED": seed},
            "GSNR": {"MEASURE": True, "EVERY": 200, "WINDOW": 10},
            "LOG": {"PREFIX": name},
        }
        for node, keys in nodes.items():
            tree.setdefault(node, {}).update(keys)
        (folder / "config.yaml").write_text(yaml.safe_dump(tree))
        (folder / "gsnr.jsonl").write_text("".join(json.dumps(line) + "\n" for line in windows))
        return folder

    return make


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def line(panel, label):
    """A panel's one line of that name."""
    (drawn,) = [artist for artist in panel.get_lines() if artist.get_label() == label]
    return drawn


def values(panel, label):
    return np.ma.filled(np.ma.asarray(line(panel, label).get_ydata(), dtype=float), np.nan).tolist()


def band(panel, label):
    """The lowest and the highest of a band at each iteration."""
    (band,) = [artist for artist in panel.collections if artist.get_label() == f"_{label}"]
    corners = band.get_paths()[0].vertices
    at = sorted(set(corners[:, 0]))
    return [(corners[corners[:, 0] == x, 1].min(), corners[corners[:, 0] == x, 1].max()) for x in at]


def test_the_table_of_streams(make, tmp_path):
    runs = read_runs([make("a", [window(1), window(2, tcg=0.05)]), make("b", [window(1, ncg=0.4)], seed=7)])
    runs[0].windows[1]["gsnr"]["tcg"]["not_finite"] = 4
    write_tables(runs, tmp_path)
    table = rows(tmp_path / "gsnr.csv")
    assert len(table) == 9
    assert table[4] == {
        "run": str(tmp_path / "a"),
        "seed": "0",
        "epoch": "6",
        "iteration": "4000",
        "samples": "10",
        "stream": "tcg",
        "mean": "0.1",
        "ratio": "0.05",
        "noise_mean": str(9 / 70),
        "noise_ratio": "0.1",
        "norm": "1.5",
        "zero_variance": "12",
        "missing": "3",
        "not_finite": "4",
        "momentum": "0.825",
    }
    assert table[0]["not_finite"] == ""  # a window of 0.1.0 did not count it
    assert [row["seed"] for row in table] == ["0"] * 6 + ["7"] * 3
    assert (table[8]["stream"], table[8]["ratio"]) == ("ncg", "0.4")
    assert b"\r" not in (tmp_path / "gsnr.csv").read_bytes()


def test_the_tables_of_angles_and_layers(make, tmp_path):
    layers = {"conv1": {"tog": {"mean": 0.5, "ratio": None}, "ncg": {"mean": 0.25, "ratio": 0.125}}}
    folder = make("a", [window(1, layers=layers), window(2, angle={**PAIRS, "tog-tcg": None})])
    names = [path.name for path in write_tables(read_runs([folder]), tmp_path)]
    assert names == ["gsnr.csv", "gsnr_angles.csv", "gsnr_layers.csv"]
    angles = rows(tmp_path / "gsnr_angles.csv")
    at = {"run": str(folder), "seed": "0", "epoch": "3", "iteration": "2000"}
    assert angles[1] == at | {"pair": "tog-ncg", "degrees": "60.0"}
    assert angles[3]["degrees"] == ""
    assert rows(tmp_path / "gsnr_layers.csv") == [
        at | {"layer": "conv1", "stream": "tog", "mean": "0.5", "ratio": ""},
        at | {"layer": "conv1", "stream": "ncg", "mean": "0.25", "ratio": "0.125"},
    ]


def test_a_table_of_layers_drawn_before_does_not_stay(make, tmp_path):
    (tmp_path / "gsnr_layers.csv").write_text("of another run\n")
    names = [path.name for path in write_tables(read_runs([make("a", [window(1)])]), tmp_path)]
    assert names == ["gsnr.csv", "gsnr_angles.csv"]
    assert not (tmp_path / "gsnr_layers.csv").exists()


def test_the_figure_of_one_run(make):
    momenta = [MOMENTUM, {"tog": 0.9, "tcg": 0.85, "ncg": 0.95}]
    figure = draw(read_runs([make("a", [window(1, momentum=momenta[0]), window(2, 0.4, momentum=momenta[1])])]))
    ratio, mean, angle, momentum = figure.axes
    assert figure.get_suptitle() == (
        "glyphs100, resnet20 → resnet8, DeepKD over KD\nseed 0; gradients every 200 iterations, windows of 10 samples"
    )
    assert "ratio of sums" in ratio.get_ylabel()
    assert "mean over coordinates" in mean.get_ylabel()
    assert "°" in angle.get_ylabel()
    assert (momentum.get_ylabel(), momentum.get_xlabel()) == ("momentum", "iteration")
    assert (ratio.get_yscale(), mean.get_yscale(), angle.get_yscale()) == ("log", "log", "linear")
    assert all(panel.get_shared_x_axes().joined(panel, ratio) for panel in figure.axes)
    assert line(ratio, "TOG").get_xdata().tolist() == [2000, 4000]
    assert values(ratio, "TOG") == [0.2, 0.4]
    assert values(mean, "NCG") == [0.6, 0.6]
    assert values(angle, "TOG-NCG") == [60, 60]
    assert values(angle, "_90 degrees") == [90, 90]
    assert values(momentum, "TCG") == [0.825, 0.85]
    # in force from an iteration on, so a step after it
    assert line(momentum, "TCG").get_drawstyle() == "steps-post"
    assert not any(panel.collections for panel in figure.axes)


def test_the_figure_says_where_momenta_were_set_by_the_gsnr(make):
    *_, momentum = draw(read_runs([make("a", [window(1)], SOLVER={"DECOUPLED": {"ALLOCATION": "gsnr"}})])).axes
    assert momentum.get_ylabel() == "momentum\n(set by GSNR)"


def test_what_noise_alone_gives_is_a_dashed_grey_line(make):
    ratio, mean, *_ = draw(read_runs([make("a", [window(1)])])).axes
    assert values(ratio, "noise alone") == [0.1, 0.1]
    assert values(mean, "noise alone") == [9 / 70, 9 / 70]
    noise = line(ratio, "noise alone")
    red, green, blue = matplotlib.colors.to_rgb(noise.get_color())
    assert noise.get_linestyle() == "--"
    assert red == green == blue


def test_no_noise_line_where_it_is_infinite(make):
    three = make("a", [window(1, samples=3)], GSNR={"WINDOW": 3})
    ratio, mean, *_ = draw(read_runs([three])).axes
    assert values(ratio, "noise alone") == [1 / 3, 1 / 3]
    assert "noise alone" not in [artist.get_label() for artist in mean.get_lines()]


def test_streams_and_pairs_are_told_apart_without_colour(make):
    ratio, _, angle, momentum = draw(read_runs([make("a", [window(1)])])).axes
    for panel, count in ((ratio, 3), (angle, 3), (momentum, 3)):
        lines = [artist for artist in panel.get_lines() if artist.get_marker() != "None"]
        for style in ("get_color", "get_linestyle", "get_marker"):
            assert len({getattr(artist, style)() for artist in lines}) == count
    for stream in ("TOG", "TCG", "NCG"):
        ours, theirs = line(ratio, stream), line(momentum, stream)
        assert (ours.get_color(), ours.get_marker()) == (theirs.get_color(), theirs.get_marker())


def test_momenta_that_coincide_show_each_other_s_markers(make):
    *_, momentum = draw(read_runs([make("a", [window(k) for k in range(1, 5)])])).axes
    assert [line(momentum, name).get_markevery() for name in ("TOG", "TCG", "NCG")] == [
        (0, 3),
        (1, 3),
        (2, 3),
    ]


@pytest.mark.parametrize("lowest", [20.0, 60.0, 84.0, 89.0])
def test_a_right_angle_is_a_tick(make, lowest):
    _, _, angle, _ = draw(read_runs([make("a", [window(1, angle={**PAIRS, "tog-ncg": lowest})])])).axes
    assert 90 in angle.get_yticks()


def test_several_runs_are_a_mean_and_a_band(make):
    runs = [
        make("a", [window(1, 0.2), window(2, 0.3)], seed=0),
        make("b", [window(1, 0.4), window(2, 0.3)], seed=1),
        make("c", [window(1, 0.9), window(2, 0.6, angle={**PAIRS, "tog-tcg": 82.0})], seed=2),
    ]
    figure = draw(read_runs(runs))
    ratio, mean, angle, momentum = figure.axes
    assert values(ratio, "TOG") == pytest.approx([0.5, 0.4])
    assert np.ravel(band(ratio, "TOG")) == pytest.approx([0.2, 0.9, 0.3, 0.6])
    assert np.ravel(band(mean, "TOG")) == pytest.approx([0.4, 1.8, 0.6, 1.2])
    assert values(angle, "TOG-TCG") == pytest.approx([85, 84])
    assert np.ravel(band(angle, "TOG-TCG")) == pytest.approx([85, 85, 82, 85])
    assert np.ravel(band(momentum, "TCG")) == pytest.approx([0.825] * 4)
    assert "\nmean of 3 seeds; " in figure.get_suptitle()
    assert [text.get_text() for text in ratio.get_legend().get_texts()] == [
        *("TOG", "TCG", "NCG", "noise alone", "range of 3 seeds")
    ]


def test_a_run_that_ended_earlier_leaves_the_others_mean(make):
    runs = [make("a", [window(1, 0.2), window(2, 0.3)]), make("b", [window(1, 0.4)], seed=1)]
    ratio, *_ = draw(read_runs(runs)).axes
    assert values(ratio, "TOG") == pytest.approx([0.3, 0.3])
    assert np.ravel(band(ratio, "TOG"))[-2:] == pytest.approx([0.3, 0.3])


@pytest.mark.filterwarnings("error")
def test_values_that_do_not_exist_leave_gaps(make, tmp_path):
    empty = window(2, tog=None, tcg=None, ncg=None, angle=dict.fromkeys(PAIRS))
    one = make("a", [window(1), empty, window(3, tcg=0.25)])
    runs = read_runs([one])
    ratio, mean, angle, _ = draw(runs).axes
    assert values(ratio, "TOG") == pytest.approx([0.2, math.nan, 0.2], nan_ok=True)
    assert values(mean, "NCG") == pytest.approx([0.6, math.nan, 0.6], nan_ok=True)
    assert values(angle, "TOG-TCG") == pytest.approx([85, math.nan, 85], nan_ok=True)
    report([one], tmp_path / "out")
    assert [row["ratio"] for row in rows(tmp_path / "out" / "gsnr.csv")[3:6]] == ["", "", ""]
    text = summarise(runs)
    assert "TOG > TCG           in 1 of 2 windows       in 1 of 2 windows" in text
    none = make("b", [empty | {"samples": 3}], seed=1)
    text = report([none], tmp_path / "none")
    assert "TOG                 none                    none" in text
    assert "noise alone         0.3333                  inf" in text
    assert "angles    TOG-TCG none, " in text


def test_the_summary(make, tmp_path):
    runs = [
        make("a", [window(1), window(2, tog=0.1, tcg=0.12), window(3, tog=0.6, tcg=0.4)]),
        make("b", [window(1, tcg=0.35, angle={**PAIRS, "tog-tcg": 75.0})], seed=4),
    ]
    out = tmp_path / "out"
    assert report(runs, out).splitlines() == [
        "measured  resnet8, 4 windows of 10 samples, 500 of 800 coordinates, seeds 0, 4",
        "GSNR      median of windows   ratio of sums           mean over coordinates",
        "          TOG                 0.2                     0.4",
        "          TCG                 0.25                    0.5",
        "          NCG                 0.3                     0.6",
        "          noise alone         0.1                     0.1286",
        "ordering  TOG > TCG           in 2 of 4 windows       in 2 of 4 windows",
        "ordering  NCG > TCG           in 2 of 4 windows       in 2 of 4 windows",
        "angles    TOG-TCG 85.0°, TOG-NCG 60.0°, TCG-NCG 95.0° (medians)",
        f"files     {out}/ (gsnr.csv, gsnr_angles.csv, gsnr.png, gsnr.svg)",
    ]


def test_momenta_that_follow_the_gsnr_are_said_to_move_and_to_change_places(make):
    """Means over both runs' steps; the late ones are those of the second half of each."""
    first = [{"tog": 0.9, "tcg": tcg, "ncg": ncg} for tcg, ncg in ((0.8, 0.9), (0.9, 0.8), (0.8, 0.9))]
    second = [{"tog": 0.9, "tcg": 0.8, "ncg": ncg} for ncg in (0.9, 0.94, 0.94)]
    runs = [
        make(str(seed), [window(k, momentum=held) for k, held in enumerate(momenta, 1)], seed, SOLVER=GSNR)
        for seed, momenta in enumerate((first, second))
    ]
    said = summarise(read_runs(runs)).splitlines()
    assert "momenta   move by TOG 0.000 (late 0.000), TCG 0.050 (late 0.050), NCG 0.060 (late 0.050) a window" in said
    assert "          TCG and NCG change places in 2 of 4 windows, late 1 of 2" in said
    fixed = summarise(read_runs([make("fixed", [window(1), window(2)])]))
    assert "change places" not in fixed
    alone = summarise(read_runs([make("one", [window(1)], SOLVER=GSNR)]))
    assert "change places" not in alone


def test_the_two_summaries_are_counted_apart(make):
    record = window(1, tog=0.2, tcg=0.15)
    record["gsnr"]["tog"]["mean"] = 0.3  # as the target stream's: not above it
    assert "TOG > TCG           in 1 of 1 windows       in 0 of 1 windows" in summarise(
        read_runs([make("a", [record])])
    )


def test_a_run_of_one_stream_has_neither_angles_nor_orderings(make, tmp_path):
    record = window(1, angle={}, momentum={"task": 0.9})
    record["gsnr"] = {"task": record["gsnr"]["tog"]}
    folder = make("a", [record], DISTILLER={"TYPE": "NONE"})
    figure = draw(read_runs([folder]))
    assert len(figure.axes) == 3
    assert values(figure.axes[0], "TASK") == [0.2]
    assert figure.get_suptitle().startswith("glyphs100, resnet8, no distillation\n")
    text = report([folder], tmp_path / "out")
    assert ">" not in text
    assert "angles" not in text
    assert not (tmp_path / "out" / "gsnr_angles.csv").exists()


def test_more_streams_than_styles_have_room(make):
    names = ["tog", "tcg", "ncg", "feat", "more", "most"]
    record = window(
        1, momentum=dict.fromkeys(names, 0.9), angle=dict.fromkeys(["tog-feat", *PAIRS, "d-e", "e-f"], 80.0)
    )
    record["gsnr"] = dict.fromkeys(names, record["gsnr"]["tog"])
    figure = draw(read_runs([make("a", [record]), make("b", [record], seed=1)]))
    ratio, *_ = figure.axes
    assert [artist.get_label() for artist in ratio.get_lines()] == [*map(str.upper, names), "noise alone"]
    figure.draw_without_rendering()
    assert ratio.get_position().width > 0.8  # the names above do not take the width


def test_the_files_are_whole_and_the_state_of_matplotlib_is_as_it_was(make, tmp_path):
    before = dict.copy(matplotlib.rcParams)  # as it is, without choosing a backend
    out = tmp_path / "deep" / "out"
    report([make("a", [window(1), window(2)])], out)
    assert {path.name for path in out.iterdir()} == {"gsnr.csv", "gsnr_angles.csv", "gsnr.png", "gsnr.svg"}
    assert (out / "gsnr.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "gsnr.svg").read_text().rstrip().endswith("</svg>")
    assert dict.copy(matplotlib.rcParams) == before


def test_a_figure_that_cannot_be_drawn_leaves_the_one_before(make, tmp_path, monkeypatch):
    (tmp_path / "gsnr.png").write_bytes(b"before")

    def fail(self, file, **options):
        file.write(b"half")
        raise MemoryError

    monkeypatch.setattr(gsnr_figure.Figure, "savefig", fail)
    with pytest.raises(MemoryError):
        report([make("a", [window(1)])], tmp_path)
    assert (tmp_path / "gsnr.png").read_bytes() == b"before"
    assert not list(tmp_path.glob(".*tmp"))


def refusal(*folders):
    with pytest.raises(UserError) as error:
        read_runs(folders)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_run_that_was_not_measured(make, tmp_path):
    folder = make("a", [window(1)])
    (folder / "gsnr.jsonl").unlink()
    rest = "GSNR.MEASURE must be True in the run, and GSNR.EVERY x GSNR.WINDOW of its iterations must be over"
    assert refusal(folder) == f"{folder / 'gsnr.jsonl'}: no such file; {rest}"
    (folder / "gsnr.jsonl").write_text("")
    assert refusal(folder) == f"{folder / 'gsnr.jsonl'}: holds no window; {rest}"


def test_a_folder_without_a_run(make, tmp_path):
    assert refusal(tmp_path / "none").startswith(f"{tmp_path / 'none' / 'config.yaml'}: must be the config of a run (")
    folder = make("a", [window(1)])
    for text in ("- a list\n", "{DATASET: {TYPE: cifar100}}\n", "a: [1\n", "text"):
        (folder / "config.yaml").write_text(text)
        assert f"{folder / 'config.yaml'}: must be the config of a run (" in refusal(folder)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"iteration": 20', "JSONDecodeError: "),
        ("[1, 2]", "TypeError: "),
        (json.dumps({k: v for k, v in window(1).items() if k != "epoch"}), "KeyError: 'epoch'"),
        (json.dumps(window(1, momentum={"tog": 0.9, "ncg": 0.9})), "KeyError: 'tcg'"),
        (json.dumps(window(1, gsnr={"tog": {"mean": 0.1}})), "KeyError: 'ratio'"),
        (json.dumps(window(1, gsnr=3)), "AttributeError: "),
        (json.dumps(window(1, angle=3)), "TypeError: "),
        (json.dumps(window(1, layers={"conv1": {"tog": {"mean": 0.1}}})), "KeyError: 'ratio'"),
    ],
)
def test_a_line_that_is_no_window(make, text, reason):
    folder = make("a", [window(1)])
    with open(folder / "gsnr.jsonl", "a") as file:
        file.write(text + "\n")
    expected = f"{folder / 'gsnr.jsonl'}: line 2 must be the record of a window ({reason}"
    assert refusal(folder).startswith(expected)


def test_a_record_that_cannot_be_read(make):
    folder = make("a", [window(1)])
    (folder / "gsnr.jsonl").write_bytes(b"\xff\xfe")
    assert refusal(folder).startswith(f"{folder / 'gsnr.jsonl'}: cannot be read (")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"samples": 20}, "samples of iteration 4000 is 20; it must be 10"),
        ({"coordinates": 0}, "coordinates of iteration 4000 is 0; it must be 500"),
        (
            {"gsnr": {"task": window(1)["gsnr"]["tog"]}, "momentum": {"task": 0.9}},
            "streams of iteration 4000 is ['task']; it must be ['tog', 'tcg', 'ncg']",
        ),
        ({"angle": {}}, "pairs of iteration 4000 is []; it must be ['tog-tcg', 'tog-ncg', 'tcg-ncg']"),
    ],
)
def test_windows_of_another_kind(make, changes, complaint):
    first, second = make("a", [window(1)]), make("b", [window(1), window(2, **changes)], seed=1)
    expected = f"{second / 'gsnr.jsonl'}: {complaint}, as in the first window of {first}"
    assert refusal(first, second) == expected


@pytest.mark.parametrize(
    ("nodes", "complaint"),
    [
        ({"GSNR": {"EVERY": 100}}, "GSNR.EVERY is 100; it must be 200"),
        ({"SOLVER": {"LR": 0.1}}, "SOLVER.LR is 0.1; it must be None"),
        ({"DISTILLER": {"STUDENT": "resnet14"}}, "DISTILLER.STUDENT is 'resnet14'; it must be 'resnet8'"),
    ],
)
def test_runs_of_another_experiment(make, nodes, complaint):
    first, second = make("a", [window(1)]), make("b", [window(1)], seed=1, **nodes)
    assert refusal(first, second) == f"{second / 'config.yaml'}: {complaint}, as in {first}"


def test_runs_may_differ_in_how_they_ran_and_in_keys_that_are_newer(make):
    # a key at its default is as good as one that is not there
    ours = {"EXECUTION": "compile", "DECOUPLED": {"VARIANT": "paper"}}
    second = make("b", [window(1)], seed=1, SOLVER=ours, DATASET={"NUM_WORKERS": 0}, LOG={"PREFIX": "else"})
    mask = {"MASK": {"PHASES": [1 / 3, 2 / 3]}}
    third = make("c", [window(1)], seed=2, DeepKD=mask, GSNR={"LAYERS": True})
    assert [run.seed for run in read_runs([make("a", [window(1)]), second, third])] == [0, 1, 2]


def test_one_seed_counts_once(make):
    first, second = make("a", [window(1)]), make("b", [window(1)])
    file = second / "config.yaml"
    assert refusal(first, second) == f"{file}: SOLVER.SEED is 0; it must be another than that of {first}"


def test_a_folder_that_cannot_be_written(make, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: must be a folder that can be written"):
        report([make("a", [window(1)])], tmp_path / "file")
