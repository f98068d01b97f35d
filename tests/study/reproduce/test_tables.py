"""The tables and ablations: which pairs and rows they have, and what each row computes."""

import shutil
from pathlib import Path

import pytest
import torch

from deepkd_plugin import config
from deepkd_plugin.config.shipped import shipped
from deepkd_plugin.data import source
from deepkd_plugin.distillers import DISTILLERS, KD
from deepkd_plugin.errors import UserError
from deepkd_plugin.optim import DecoupledMomentumSGD
from deepkd_plugin.study.calibration import measure
from deepkd_plugin.study.reproduce import tables
from deepkd_plugin.study.reproduce.plan import make_plan
from deepkd_plugin.topk import TopP, mask_size

EIGHT = ["kd", "dkd", "mlkd", "crld", "deepkd", "deepkd_dkd", "deepkd_mlkd", "deepkd_crld"]
TWELVE = [*EIGHT, "deepkd_nomask", "deepkd_dkd_nomask", "deepkd_mlkd_nomask", "deepkd_crld_nomask"]
READINGS = [f"deepkd_{name}" for name in ("article", "matched", "matched_nomask", "multiply", "release")]
VARIANTS = ["vanilla", *EIGHT, *TWELVE[8:], *READINGS]
LATER = {
    "cifar100": {"rld", "deepkd_rld", "wttm", "deepkd_wttm", "dist", "kd_ea", "dkd_ea", "mlkd_ea"},
    "imagenet": {"nkd", "deepkd_nkd", "rld", "deepkd_rld", "wttm", "deepkd_wttm", "dist", "kd_ea", "dkd_ea"},
}
RES8 = ["vanilla", "kd", "dkd", "deepkd", "deepkd_nomask", "deepkd_dkd_nomask", "deepkd_matched_nomask"]
RES8 += ["deepkd_multiply"]
DATASETS = [
    "cifar100",
    "cifar100_cpu",
    "cifar100_res8",
    "glyphs100",
    "glyphs100_feature",
    "glyphs100_variants",
    "imagenet",
    "tiny_imagenet",
]
DETECTION = ["coco_torchvision", "glyph_canvas"]


def names(table):
    return [method.name for method in table.methods]


def configs(table, options=(), pairs=None):
    """Row -> its resolved config, of the table's first pair or of those given."""
    plan = make_plan(table, pairs or table.pairs[:1], names(table), 1, options, Path("nowhere"))
    assert len({run.hash for run in plan.runs}) == len(plan.runs)  # no row is another's
    return {method: cfg for (_, method), cfg in plan.cfgs.items()}


def complaint(call, *arguments):
    with pytest.raises(UserError) as error:
        call(*arguments)
    return str(error.value)


CONFIGS = shipped("configs") / "glyphs100" / "res20_res8"


@pytest.fixture
def folder(tmp_path):
    """A user's folder of two pairs, of which the second has fewer methods."""
    ours = tmp_path / "ours"
    for pair, methods in {"a_b": "kd deepkd vanilla teacher mine", "c_d": "kd vanilla"}.items():
        (ours / pair).mkdir(parents=True)
        for method in methods.split():
            shutil.copy(CONFIGS / f"{'kd' if method == 'mine' else method}.yaml", ours / pair / f"{method}.yaml")
    (ours / "notes").mkdir()
    return ours


def bases(folder, *methods):
    """The planned rows' bases."""
    table = tables.find(str(folder))
    plan = make_plan(table, table.pairs, methods or names(table), 1, [], Path("nowhere"))
    return {method.name: method.base for method in plan.document.methods}


def test_the_tables_are_the_folders_of_configs_and_the_ablations():
    ablations = ["ablation-momentum", "ablation-steps", "ablation-mask", "ablation-calibration"]
    ablations += ["ablation-delta", "ablation-phases"]
    assert tables.names() == [*DATASETS, *DETECTION, "coco", *ablations]


@pytest.mark.parametrize(
    ("name", "pairs", "methods"),
    [
        ("cifar100", 17, TWELVE),
        ("imagenet", 4, TWELVE),
        ("tiny_imagenet", 2, TWELVE),
        ("glyphs100", 1, ["vanilla", *EIGHT]),
        ("glyphs100_feature", 1, ["kd", "deepkd", "deepkd_at", "deepkd_fitnet"]),
        ("glyphs100_variants", 1, VARIANTS),
        ("cifar100_cpu", 1, ["vanilla", "kd", "dkd", "deepkd", "deepkd_dkd", "deepkd_release"]),
        ("cifar100_res8", 1, RES8),
    ],
)
def test_a_table_has_every_pair_and_method_of_its_folder(name, pairs, methods):
    table = tables.find(name)
    assert (table.dataset, len(table.pairs), list(table.by_default)) == (name, pairs, methods)
    usual = [row for row in table.methods if row.name in methods]
    assert all(table.file(pair, method) for pair in table.pairs for method in usual)
    assert set(names(table)) - set(methods) == LATER.get(name, set())
    assert table.title == name


def test_later_methods_are_rows_on_request():
    """Those of tables that ship; in a folder of one's own every config is trained."""
    table = tables.find("imagenet")
    assert names(table)[:8] == ["kd", "dkd", "mlkd", "crld", "nkd", "rld", "wttm", "deepkd"]
    plan = make_plan(table, ["r50_mv1"], ["nkd", "deepkd_nkd", "rld", "deepkd_rld"], 1, [], Path("nowhere"))
    over = {method.name: (method.label, method.base) for method in plan.document.methods}
    assert over == {
        "nkd": ("NKD", None),
        "rld": ("RLD", None),
        "deepkd_nkd": ("NKD + DeepKD + DTM", "nkd"),
        "deepkd_rld": ("RLD + DeepKD + DTM", "rld"),
    }
    ours = tables.find(str(shipped("configs") / "imagenet"))
    assert list(ours.by_default) == names(ours) == names(table)


def test_a_row_of_weighted_samples_says_so():
    table = tables.find("cifar100")
    weighted = ["kd_ea", "dkd_ea", "mlkd_ea"]
    plan = make_plan(table, ["res32x4_res8x4"], ["kd", *weighted], 1, [], Path("nowhere"))
    labels = {method.name: method.label for method in plan.document.methods}
    said = {name: f"{name.removesuffix('_ea').upper()}, samples weighted by entropy" for name in weighted}
    assert labels == {"kd": "KD"} | said


def test_a_folder_of_configs_is_a_table(folder, tmp_path, monkeypatch):
    table = tables.find(str(folder))
    assert (table.name, table.dataset, table.title, table.place) == ("ours", "ours", "ours", str(folder))
    assert table.pairs == ("a_b", "c_d")
    # ours in order, then others; teachers are no row
    assert names(table) == ["vanilla", "kd", "deepkd", "mine"]
    there = {pair: [m.name for m in table.methods if table.file(pair, m)] for pair in table.pairs}
    assert there == {"a_b": names(table), "c_d": ["vanilla", "kd"]}
    monkeypatch.chdir(tmp_path)
    for word in ("ours", "./ours", "ours/"):  # a plain word is a folder if no table is called so
        assert tables.find(word) == table
    (tmp_path / "glyphs100").mkdir()
    assert tables.find("glyphs100").pairs == ("res20_res8",)
    plan = make_plan(table, ("a_b",), ("kd",), 1, [], tmp_path / "out")
    assert plan.runs[0].config == folder / "a_b" / "kd.yaml"
    assert plan.document.runs[0].config == folder / "a_b" / "kd.yaml"
    ablation = tables.find("ablation-delta", dataset="ours")
    assert (ablation.title, ablation.pairs) == ("ablation-delta over kd on ours", ("a_b",))


def test_rows_and_bases_of_a_method_of_one_s_own(folder, monkeypatch):
    class NKD(KD):
        pass

    monkeypatch.setitem(DISTILLERS, "NKD", NKD)
    for name in ("nkd", "deepkd_nkd", "deepkd_dkd", "about"):
        shutil.copy(CONFIGS / "kd.yaml", folder / "a_b" / f"{name}.yaml")
    assert names(tables.find(str(folder))) == [
        *("vanilla", "kd", "nkd", "deepkd", "deepkd_dkd", "deepkd_nkd"),
        *("about", "mine"),
    ]
    assert tables.find("ablation-mask", "nkd", str(folder)).over == "nkd"
    assert complaint(tables.find, "ablation-mask", "nkd").startswith(
        "command line: --base is 'nkd'; configs/glyphs100 must have a deepkd_nkd.yaml for it, "
    )


def test_a_gain_is_over_the_method_that_deepkd_takes_apart():
    over = {"deepkd": "kd", "deepkd_dkd": "dkd", "deepkd_mlkd": "mlkd", "deepkd_crld": "crld"}
    assert bases("glyphs100") == dict.fromkeys(["vanilla", "kd", "dkd", "mlkd", "crld"]) | over
    assert bases("cifar100_cpu")["deepkd_release"] == "kd"
    assert bases("glyphs100_feature") == {"kd": None} | dict.fromkeys(("deepkd", "deepkd_at", "deepkd_fitnet"), "kd")


def test_a_base_is_what_the_configs_say_whatever_files_are_called(folder):
    shutil.copy(CONFIGS / "deepkd_dkd.yaml", folder / "a_b" / "deepkd_mine.yaml")
    assert bases(folder, "deepkd", "deepkd_mine") == {"deepkd": "kd", "deepkd_mine": None}
    shutil.copy(CONFIGS / "dkd.yaml", folder / "a_b" / "another.yaml")
    assert bases(folder, "deepkd", "deepkd_mine") == {"deepkd": "kd", "deepkd_mine": "another"}
    # of several rows the one of the method's name counts, else the first
    (folder / "a_b" / "kd.yaml").unlink()
    (folder / "c_d" / "kd.yaml").unlink()
    assert bases(folder, "deepkd") == {"deepkd": "mine"}


def test_a_row_is_over_one_method_for_all_pairs(folder):
    shutil.copy(CONFIGS / "deepkd_dkd.yaml", folder / "c_d" / "deepkd.yaml")
    assert complaint(bases, folder) == (
        f"{folder}: deepkd puts DeepKD over DKD and KD; a row must be over one method for all pairs"
    )


def test_an_ablation_is_of_the_base_that_was_asked_for(folder):
    shutil.copy(CONFIGS / "deepkd.yaml", folder / "a_b" / "deepkd_dkd.yaml")
    table = tables.find("ablation-delta", "dkd", str(folder))
    line = complaint(make_plan, table, table.pairs, names(table), 1, [], Path("nowhere"))
    assert line == (f"{folder / 'a_b' / 'deepkd_dkd.yaml'}: DeepKD.BASE is 'KD'; for --base dkd it must be that")


def test_labels_say_what_the_configs_are():
    def labels(name, *options):
        table = tables.find(name)
        held = configs(table, options)
        return {method.name: tables.label(method, held[method.name]) for method in table.methods}

    plain = {name: name.upper() for name in ("kd", "dkd", "mlkd", "crld")}
    deep = {"deepkd": "KD + DeepKD"} | {f"deepkd_{b}": f"{b.upper()} + DeepKD" for b in ("dkd", "mlkd", "crld")}
    masked = {name: f"{text} + DTM" for name, text in deep.items()}
    assert labels("glyphs100") == {"vanilla": "student alone"} | plain | masked
    assert labels("glyphs100", "DeepKD.MASK.TYPE", "none") == {"vanilla": "student alone"} | plain | deep
    assert labels("glyphs100", "DeepKD.MASK.TYPE", "static")["deepkd"] == "KD + DeepKD + static mask"
    assert labels("glyphs100_feature")["deepkd_at"] == "KD + DeepKD + DTM + AT"
    variants = labels("glyphs100_variants")
    assert len(set(variants.values())) == len(variants)  # each row says what it is
    assert variants["deepkd_multiply"] == "KD + DeepKD + DTM (multiply)"
    assert variants["deepkd_article"] == "KD + DeepKD + DTM, as in the article"
    assert variants["deepkd_matched_nomask"] == "KD + DeepKD, matched steps"
    assert labels("cifar100_cpu")["deepkd_release"] == "KD + DeepKD + DTM, release's momenta"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("cifar10",), "TABLE is 'cifar10'; it must be one of cifar100, cifar100_cpu, cifar100_res8, "),
        (("cifar100", "dkd"), "--base is of the ablations (ablation-momentum, "),
        (("glyphs100", None, "cifar100"), "--dataset is of the ablations (ablation-momentum, "),
        (("ablation-mask", "fitnet"), "--base is 'fitnet'; it must be one of kd, dkd, mlkd, crld"),
        (("ablation-mask", None, "x"), f"--dataset is 'x'; it must be one of {', '.join(DATASETS)}, or a "),
        (("a/b",), "TABLE is 'a/b'; it must be one of cifar100, "),
        (("/",), "TABLE is '/'; it must hold configs PAIR/METHOD.yaml, and has none"),
        (
            ("ablation-mask", "crld", "cifar100_cpu"),
            "--base is 'crld'; configs/cifar100_cpu must have a deepkd_crld.yaml for it, and has none",
        ),
    ],
)
def test_an_unknown_table_is_told_what_there_is(arguments, line):
    assert complaint(tables.find, *arguments).startswith(f"command line: {line}")


def test_a_choice_keeps_the_table_s_order_and_names_what_there_is():
    there = ("a", "b", "c")
    assert tables.choose(None, there, "--pairs") == there
    assert tables.choose(["c", "a", "c"], there, "--pairs") == ("a", "c")
    line = "command line: --pairs is 'd'; it must be one of a, b, c"
    assert complaint(tables.choose, ["a", "d"], there, "--pairs") == line


@pytest.mark.parametrize("base", ["kd", "dkd", "mlkd", "crld"])
@pytest.mark.parametrize("name", [name for name in tables.ABLATIONS if name != "ablation-calibration"])
def test_every_row_of_an_ablation_passes_the_config_check(name, base):
    for dataset in ("glyphs100", "cifar100"):
        table = tables.find(name, base, dataset)
        held = configs(table, pairs=["res110_res20"] if dataset == "cifar100" else None)
        assert {cfg.DeepKD.BASE for cfg in held.values()} == {base.upper()}
        assert table.methods[0].base is None
        assert {method.base for method in table.methods[1:]} == {table.methods[0].name}
        assert table.title == f"{name} over {base} on {dataset}"


def test_momentum_none_fixed_and_measured():
    held = configs(tables.find("ablation-momentum"))
    momenta = {row: config.momenta(cfg) for row, cfg in held.items()}
    high, low = pytest.approx(0.975), pytest.approx(0.825)
    assert momenta["none"] == ({"tog": 0.9, "tcg": 0.9, "ncg": 0.9}, "tcg")
    assert momenta["paper"] == ({"tog": high, "tcg": low, "ncg": high}, "tcg")
    assert momenta["release"] == ({"tog": low, "tcg": low, "ncg": high}, "tcg")
    assert momenta["gsnr"] == momenta["none"]  # until the first window
    allocation = {row: cfg.SOLVER.DECOUPLED.ALLOCATION for row, cfg in held.items()}
    assert allocation == {"none": "fixed", "paper": "fixed", "release": "fixed", "gsnr": "gsnr"}
    assert {(cfg.DeepKD.MASK.TYPE, cfg.SOLVER.LR) for cfg in held.values()} == {("dynamic", 0.1)}


def test_steps_decay_and_smoothing_one_after_another():
    """What a constant gradient, and the weight decay, come to in the long run beside plain SGD's: 1 is as long."""
    held = configs(tables.find("ablation-steps"))
    momenta = {row: config.momenta(cfg)[0] for row, cfg in held.items()}
    assert set(momenta.pop("none").values()) == {0.9}
    assert all(of == pytest.approx({"tog": 0.975, "tcg": 0.825, "ncg": 0.975}) for of in momenta.values())
    came = {}
    for row, cfg in held.items():
        of, decays = config.momenta(cfg)
        weight = torch.nn.Parameter(torch.zeros(1))
        optimizer = DecoupledMomentumSGD(
            [weight], 1.0, momentum=of, weight_decay=cfg.SOLVER.WEIGHT_DECAY, weight_decay_stream=decays,
            **config.dampening(cfg),
        )  # fmt: skip
        group = optimizer.param_groups[0]
        reach = {name: c.gain / (1 - c.momentum) * 0.1 for name, c in optimizer._coefficients(group).items()}
        decay = optimizer._decay(group) / cfg.SOLVER.WEIGHT_DECAY * reach[decays]
        came[row] = [round(number, 3) for number in (reach["tog"], reach["tcg"], decay)]
    assert came == {
        "none": [1, 1, 1],
        "plain": [4, 0.571, 0.571],
        "decay": [4, 0.571, 1],
        "matched": [1, 1, 1],
        "ema": [0.1, 0.1, 0.1],
    }


def test_a_measured_allocation_takes_bounds_that_are_momenta_both_ways():
    table = tables.find("ablation-momentum", "kd", "cifar100")
    held = configs(table, pairs=["res110_res20"])
    assert held["paper"].SOLVER.DECOUPLED.DELTA.TCG == -0.1
    delta = held["gsnr"].SOLVER.DECOUPLED.DELTA
    assert (delta.TOG, delta.TCG) == (held["paper"].SOLVER.DECOUPLED.DELTA.TOG, -0.099)


@pytest.mark.parametrize(("epochs", "per_class"), [(12, 0), (2, 0), (2, 2), (10, 2), (3, 10)])
def test_a_run_has_ten_windows_where_it_has_the_steps(epochs, per_class):
    options = ["SOLVER.EPOCHS", str(epochs), "DATASET.TRAIN_PER_CLASS", str(per_class)]
    cfg = configs(tables.find("ablation-momentum"), options)["gsnr"]
    iterations = source(cfg.DATASET.TYPE).steps(cfg) * epochs
    windows = iterations // (cfg.GSNR.EVERY * cfg.GSNR.WINDOW)
    assert windows >= min(10, iterations // 2)
    assert cfg.GSNR.WINDOW == 10 or iterations < 100


def test_windows_are_the_usual_ones_in_a_long_run_and_the_user_s_where_given():
    table = tables.find("ablation-momentum", "kd", "cifar100")
    cfg = configs(table)["gsnr"]
    assert (cfg.GSNR.EVERY, cfg.GSNR.WINDOW) == (200, 10)
    cfg = configs(tables.find("ablation-momentum"), ["GSNR.EVERY", "50"])["gsnr"]
    assert cfg.GSNR.EVERY == 50


def test_mask_none_a_sweep_and_dynamic_in_both_readings():
    held = configs(tables.find("ablation-mask"))
    none = held.pop("none")
    assert none.DeepKD.MASK.TYPE == "none"
    found = {}
    for row, cfg in held.items():
        name, _, reading = row.partition("-")
        assert reading == cfg.DeepKD.MASK.READING
        sizes = [mask_size(cfg.DeepKD.MASK, 100, progress) for progress in (0.0, 0.25, 1.0)]
        found.setdefault(name, []).append(sizes)
    static = {f"static{k}": [[k] * 3] * 2 for k in (5, 10, 25, 50, 75)}
    assert found == static | {"dynamic": [[50, 50, 99]] * 2}


def test_fixed_calibrated_and_per_sample(data_root):
    """Planned with the K* that `deepkd calibrate` finds for the very config of the row."""
    given = ["DATASET.ROOT", str(data_root), "DATASET.TRAIN_PER_CLASS", "2", "DeepKD.MASK.PHASES", "[0.25, 0.5]"]
    held = {row: cfg.DeepKD.MASK for row, cfg in configs(tables.find("ablation-calibration"), given).items()}
    assert {row: mask.TYPE for row, mask in held.items()} == {
        "none": "none",
        "fixed": "dynamic",
        "calibrated": "dynamic",
        "sample": "top_p",
    }
    cfg = tables.KINDS["classification"].read(CONFIGS / "deepkd.yaml", given)
    found, _ = measure(cfg, 0.9)
    sizes = {row: [mask_size(mask, 100, at) for at in (0.0, 0.3, 1.0)] for row, mask in held.items()}
    assert sizes["fixed"] == [5, 50, 99]
    assert sizes["calibrated"] == [5, found.optimal, 99]
    assert sizes["sample"] == [TopP(0.5), TopP(0.9), TopP(1.0)]
    complained = complaint(configs, tables.find("ablation-calibration", "mlkd"), given)
    assert complained.startswith("ablation-calibration, res20_res8 calibrated: with DeepKD.BASE MLKD the mask does not")


def test_delta_keeps_the_signs():
    held = configs(tables.find("ablation-delta"))
    sizes = [float(row.removeprefix("delta")) for row in held]
    assert sizes == list(tables.SWEEP)
    assert sizes[0] == 0
    for size, cfg in zip(sizes, held.values()):
        assert dict(cfg.SOLVER.DECOUPLED.DELTA) == {"TOG": size, "TCG": -size, "NCG": size, "FEAT": 0.0}


def test_phases_are_of_the_dynamic_mask():
    held = configs(tables.find("ablation-phases"), ["DeepKD.MASK.OPTIMAL", "0.25"])
    assert {cfg.DeepKD.MASK.TYPE for cfg in held.values()} == {"dynamic"}
    assert {cfg.DeepKD.MASK.OPTIMAL for cfg in held.values()} == {0.25}
    ends = {row: cfg.DeepKD.MASK.PHASES for row, cfg in held.items()}
    assert ends == {row: phases for row, (_, phases) in tables.PHASES.items()}
    assert next(iter(ends.items())) == ("thirds", (1 / 3, 2 / 3))
    assert ends["no-easy"] == (0.0, 0.5)
