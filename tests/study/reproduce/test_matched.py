"""Bases under the loss weights of DeepKD over them: their rows, what they compute, and what is refused."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from deepkd_plugin import config
from deepkd_plugin.config.shipped import shipped
from deepkd_plugin.errors import UserError
from deepkd_plugin.hosts import registry
from deepkd_plugin.launch import read_config
from deepkd_plugin.study.reproduce import matched, tables
from deepkd_plugin.study.reproduce.plan import make_plan
from deepkd_plugin.study.table import Table

BASES = ["kd", "dkd", "mlkd", "crld"]
CONFIGS = shipped("configs")


def planned(out, table, pair, methods, options=()):
    return make_plan(table, [pair], methods, 1, options, out)


def with_matched(name):
    return matched.with_matched(tables.find(name))


def complaint(call, *arguments):
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 100)

    def forward(self, image):
        return self.layer(image.mean((2, 3))), {}


def loss(cfg):
    """The whole loss of a config on one batch, in its 21st epoch, after every warm-up of the tables' losses."""
    torch.manual_seed(0)
    views = [torch.randn(8, 3, 4, 4) for _ in range(config.views(cfg))]
    distiller = registry.BUILTIN.distillers[cfg.DISTILLER.TYPE](Network(), Network(), cfg).train()
    image = views if len(views) > 1 else views[0]
    _, losses = distiller(image=image, target=torch.arange(8), epoch=21)
    return sum(losses.values())


def test_the_rows_and_their_bases():
    table = with_matched("cifar100")
    bases = {f"{base}_matched": base for base in BASES}
    for base in BASES:
        twin = tables.row_name(base, deepkd=True)
        bases |= {twin: f"{base}_matched", f"{twin}_nomask": f"{base}_matched"}
    for base in ("rld", "wttm"):
        bases |= {f"{base}_matched": base, f"deepkd_{base}": f"{base}_matched"}
        assert not {base, f"{base}_matched", f"deepkd_{base}"} & {*table.by_default}
    assert {row.name: row.base for row in table.methods if row.base} == bases
    names = [row.name for row in table.methods]
    assert names[:8] == [name for base in BASES for name in (base, f"{base}_matched")]
    assert matched.with_bases(table, ["deepkd", "kd"]) == ("kd", "kd_matched", "deepkd")
    assert matched.with_bases(tables.find("cifar100"), ["kd", "deepkd"]) == ("kd", "deepkd")


@pytest.mark.parametrize("base", BASES)
def test_a_matched_base_has_its_base_s_protocol_and_the_losses_of_deepkd_without_momenta_and_mask(base, tmp_path):
    twin = tables.row_name(base, deepkd=True)
    made = planned(tmp_path, with_matched("glyphs100"), "res20_res8", [base, f"{base}_matched", twin])
    plain, ours, deepkd = (made.cfgs["res20_res8", name] for name in (base, f"{base}_matched", twin))
    assert plain.SOLVER == ours.SOLVER != deepkd.SOLVER  # rates of glyphs100 are each method's own
    assert plain.DATASET == ours.DATASET
    assert set(config.momenta(ours)[0].values()) == {0.9}
    deepkd = deepkd.clone()
    deepkd.defrost()
    deepkd.DeepKD.MASK.TYPE = "none"
    assert loss(ours) == loss(deepkd)


@pytest.mark.parametrize(
    ("base", "weights"),
    [("kd", "KD.LOSS.CE_WEIGHT 0.8 KD.LOSS.KD_WEIGHT 1.0"), ("dkd", "DKD.CE_WEIGHT 1.0 DKD.BETA 1.0")],
)
def test_kd_and_dkd_are_themselves_under_other_weights(base, weights, tmp_path):
    """vgg13_mv2: its deepkd.yaml has 0.8, 1 and 1, deepkd_dkd.yaml NCG 1 where dkd.yaml has 6."""
    pair = "vgg13_mv2"
    ours = planned(tmp_path, with_matched("cifar100"), pair, [f"{base}_matched"]).cfgs[pair, f"{base}_matched"]
    as_it_is, rewritten = (
        planned(tmp_path, tables.find("cifar100"), pair, [base], words).cfgs[pair, base]
        for words in ([], weights.split())
    )
    assert loss(ours).item() == pytest.approx(loss(rewritten).item(), rel=1e-6)
    assert loss(ours).item() != pytest.approx(loss(as_it_is).item(), rel=1e-3)


@pytest.mark.parametrize("base", BASES)
def test_the_docs_options_for_a_single_run_make_the_same_of_the_file_without_a_mask(base, tmp_path):
    page = (CONFIGS.parent / "docs" / "configs.md").read_text()
    command = re.search(r"/deepkd_nomask.yaml \\\n(.+)", page).group(1)
    pair, twin = "wrn40_2_mv2", tables.row_name(base, deepkd=True)
    ours = planned(tmp_path, with_matched("cifar100"), pair, [f"{base}_matched"]).cfgs[pair, f"{base}_matched"]
    file = CONFIGS / "cifar100" / pair / f"{twin}_nomask.yaml"
    alone = read_config(registry.BUILTIN, str(file), command.split())[0]
    alone = alone.clone()
    alone.defrost()
    alone.SOLVER.CHANNELS_LAST = ours.SOLVER.CHANNELS_LAST  # a plan settles what a file leaves open
    assert (ours.SOLVER, ours.DATASET, ours.DeepKD) == (alone.SOLVER, alone.DATASET, alone.DeepKD)
    assert loss(ours) == loss(alone)


def test_a_table_holds_both_under_names_of_their_own(tmp_path):
    options = ["DeepKD.NCG_WEIGHT", "4.0", "DeepKD.MASK.TYPE", "static", "SOLVER.EPOCHS", "3"]
    made = planned(tmp_path, with_matched("cifar100"), "res56_res20", ["kd", "kd_matched", "deepkd"], options)
    made.document.write()
    table = Table.read(tmp_path)
    assert [(row.name, row.label, row.base) for row in table.methods] == [
        ("kd", "KD", None),
        ("kd_matched", "KD with DeepKD's loss weights", "kd"),
        ("deepkd", "KD + DeepKD + static mask", "kd_matched"),
    ]
    assert len({run.hash for run in table.runs}) == len({run.folder for run in table.runs}) == 3
    run = next(run for run in table.runs if run.method == "kd_matched")
    assert run.config.as_posix() == "configs/cifar100/res56_res20/kd.yaml"
    cfg = made.cfgs["res56_res20", "kd_matched"]
    assert (cfg.SOLVER.EPOCHS, cfg.DeepKD.NCG_WEIGHT, cfg.DeepKD.MASK.TYPE) == (3, 4.0, "none")
    # without the option the row would leave the table
    assert planned(tmp_path, tables.find("cifar100"), "res56_res20", ["kd"], options).replaced == 1


def test_deltas_that_all_runs_are_given_are_not_the_base_s(tmp_path):
    options = ["SOLVER.DECOUPLED.DELTA.TCG", "-0.05"]
    made = planned(tmp_path, with_matched("cifar100"), "res56_res20", ["kd_matched"], options)
    assert not any(made.cfgs["res56_res20", "kd_matched"].SOLVER.DECOUPLED.DELTA.values())


def test_on_proposals_too(tmp_path):
    made = planned(tmp_path, with_matched("glyph_canvas"), "res20_res8", ["dkd_matched"])
    cfg = made.cfgs["res20_res8", "dkd_matched"]
    assert (cfg.DISTILLER.TYPE, cfg.DeepKD.BASE, cfg.DeepKD.MASK.TYPE) == ("DeepKD", "DKD", "none")


def users(folder, **pairs):
    """A user's table: the files of glyphs100 that each pair names."""
    for pair, files in pairs.items():
        (folder / pair).mkdir(parents=True)
        for name, file in files.items():
            shutil.copy(CONFIGS / "glyphs100" / "res20_res8" / f"{file}.yaml", folder / pair / f"{name}.yaml")
    return str(folder)


def test_rows_follow_the_configs_of_a_user_s_table_and_its_pairs(tmp_path):
    ours = {"mine": "kd", "over": "deepkd", "alone": "vanilla"}
    table = with_matched(users(tmp_path / "t", a_b=ours, c_d={"mine": "kd"}))
    assert {row.name: row.base for row in table.methods if row.base} == {"mine_matched": "mine", "over": "mine_matched"}
    row = next(row for row in table.methods if row.twin)
    assert [table.file(pair, row) is not None for pair in table.pairs] == [True, False]


def test_what_cannot_be_matched_is_one_line(tmp_path):
    line = "command line: --matched is of tables of configs with a base and DeepKD over it; {} must go without"
    assert complaint(with_matched, "ablation-mask") == line.format("ablation-mask")
    lone = users(tmp_path / "lone", a_b={"kd": "kd", "vanilla": "vanilla"})
    assert complaint(with_matched, lone) == (
        f"command line: --matched needs DeepKD over a method that has a row; {lone} has none"
    )
    taken = users(tmp_path / "taken", a_b={"kd": "kd", "kd_matched": "kd", "deepkd": "deepkd"})
    assert complaint(with_matched, taken).startswith("command line: --matched makes a row kd_matched, and ")
    other = users(tmp_path / "other", a_b={"kd": "kd", "deepkd": "deepkd"}, c_d={"kd": "dkd", "deepkd": "deepkd"})
    line = complaint(planned, tmp_path / "out", with_matched(other), "c_d", ["kd_matched"])
    file = Path(other) / "c_d" / "deepkd.yaml"
    assert line == f"{file}: DeepKD.BASE is 'KD'; it must be 'DKD', the base's method"
