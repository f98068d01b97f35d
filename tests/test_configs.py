"""The config files of the tables: each is read and trains a step, and their numbers are the recipes'."""

import csv
import importlib
import math
import os
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from deepkd_plugin import config, data
from deepkd_plugin.data.draws import Draw
from deepkd_plugin.distillers import DISTILLERS
from deepkd_plugin.hosts import builtin, registry
from deepkd_plugin.hosts.networks import network, student_network
from deepkd_plugin.launch import read_config, trainers

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
DATASETS = {"cifar100": (17, 32, 100), "imagenet": (4, 64, 1000), "tiny_imagenet": (2, 64, 200)}
"""Data set -> pairs, side of the images here, classes."""

DEIT = CONFIGS / "imagenet" / "regnety160_deit_tiny"
"""The pair whose student is a transformer, which takes images of 224 x 224 alone."""

TWINS = {"kd": "deepkd", "dkd": "deepkd_dkd", "mlkd": "deepkd_mlkd", "crld": "deepkd_crld"}
NOMASK = {f"{twin}_nomask": twin for twin in TWINS.values()}
"""DeepKD without its mask -> with it."""

DEEPKD = [*TWINS.values(), *NOMASK]
METHODS = sorted([*TWINS, *DEEPKD])
PAIRS = sorted(folder for dataset in DATASETS for folder in (CONFIGS / dataset).iterdir())
LATER = {"nkd", "deepkd_nkd", "rld", "deepkd_rld", "wttm", "deepkd_wttm", "dist", "kd_ea", "dkd_ea", "mlkd_ea"}
"""Methods that the article does not have: test_later_configs.py."""


def files(folder):
    """A pair's files but for later methods'."""
    return [file for file in sorted(folder.iterdir()) if file.stem not in LATER]


FILES = [file for folder in PAIRS for file in files(folder)]

LOSSES = {"kd": ["loss_ce", "loss_kd"], "mlkd": ["loss_ce", "loss_kd", "loss_cc", "loss_bc"]}
LOSSES |= {"dkd": LOSSES["kd"], "crld": LOSSES["kd"]} | {name: ["tog", "tcg", "ncg"] for name in DEEPKD}

TEACHERS = {"resnet110": "res110", "resnet32x4": "res32x4", "resnet56": "res56", "wrn_40_2": "wrn40_2"}
TEACHERS |= {"vgg13": "vgg13", "ResNet50": "res50", "ResNet34": "r34"}
STUDENTS = {"resnet20": "res20", "resnet32": "res32", "resnet8x4": "res8x4", "ShuffleV1": "shuv1"}
STUDENTS |= {"ShuffleV2": "shuv2", "MobileNetV2": "mv2", "ResNet18": "r18"}

with (ROOT / "tools" / "recipes.csv").open(newline="") as rows:
    ROWS = list(csv.DictReader(rows))


def label(path):
    return "/".join(path.relative_to(CONFIGS).with_suffix("").parts)


def read(file):
    return read_config(registry.BUILTIN, file, [])[0]


def base_of(method):
    """The base that a method is, or that it is DeepKD over: kd, dkd, mlkd or crld."""
    twin = NOMASK.get(method, method)
    return next((base for base, over in TWINS.items() if over == twin), method)


def load(file):
    """A file's own keys, nested."""
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def keys(tree, prefix=""):
    """Dotted path -> value of nested mappings."""
    flat = {}
    for name, value in tree.items():
        flat |= keys(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


class Sure(nn.Module):
    """A teacher of random weights that is confident, so that CRLD's thresholds let its samples through."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, image):
        logits, features = self.network(image)
        return 100 * (logits - logits.mean(1, keepdim=True)) / logits.std(1, keepdim=True), features


class Small(nn.Module):
    """A network of one layer in the place of a config's."""

    def __init__(self, classes):
        super().__init__()
        self.layer = nn.Linear(3, classes)

    def forward(self, image):
        return self.layer(image.mean((2, 3))), {}


def batches(cfg):
    """Loaders of one batch of two images each, as get_dataset gives them."""
    _, side, classes = DATASETS[cfg.DATASET.TYPE]
    side = 224 if cfg.DISTILLER.STUDENT.startswith("timm:deit") else side

    def view():
        return torch.randn(3, side, side)

    labels = torch.randint(classes, (2,)).tolist()
    images = [view() if config.views(cfg) == 1 else [view(), view()] for _ in labels]
    train = [(image, target, index) for index, (image, target) in enumerate(zip(images, labels))]
    return DataLoader(train, 2), DataLoader([(view(), target) for target in labels], 2)


@pytest.fixture(autouse=True, scope="module")
def registered():
    """The plugin is in the built-in host, whichever test is the first."""
    registry.register(registry.BUILTIN)


def test_the_files_that_there_are():
    for dataset, (pairs, _, _) in DATASETS.items():
        folders = [folder for folder in PAIRS if folder.parent.name == dataset]
        assert len(folders) == pairs, dataset
        for folder in folders:
            assert [file.stem for file in files(folder)] == METHODS, folder
    assert len(FILES) == 12 * (17 + 4 + 2)


def trains_a_step(file, student, teacher):
    """Train one step by a file's trainer and look at what it says of it."""
    cfg = read(file)
    config.check_mask(cfg, {}, DATASETS[cfg.DATASET.TYPE][2])
    distiller = registry.BUILTIN.distillers[cfg.DISTILLER.TYPE](student, Sure(teacher).requires_grad_(False), cfg)
    before = [p.detach().clone() for p in student.parameters()]
    trainer = trainers(registry.BUILTIN)[cfg.SOLVER.TRAINER]("run", distiller, *batches(cfg), cfg)
    trainer.teacher_acc = 50.0
    named = {}
    by_stream = trainer.losses_by_stream
    trainer.losses_by_stream = lambda losses: named.update(losses) or by_stream(losses)
    entry = trainer.train_epoch(1)

    method = file.stem
    assert list(named) == LOSSES[method]
    assert all(0 < loss.item() < math.inf for loss in named.values()), named
    momentum, _ = config.momenta(cfg)
    assert entry["momentum"] == momentum
    assert set(entry["loss"]) == ({"tog", "tcg", "ncg"} if method in DEEPKD else {"tog"})
    assert math.isfinite(entry["train_loss"])
    assert ("top_k" in entry) == (method in TWINS.values())
    assert not any(torch.equal(p, old) for p, old in zip(student.parameters(), before))


@pytest.mark.parametrize("file", FILES, ids=label)
def test_a_file_is_read_and_trains_a_step(file):
    torch.manual_seed(0)
    classes = DATASETS[file.parts[-3]][2]
    trains_a_step(file, Small(classes), Small(classes))


def networks(cfg):
    """The student and the teacher that a config names."""
    dataset, classes = cfg.DATASET.TYPE, DATASETS[cfg.DATASET.TYPE][2]
    names = (cfg.DISTILLER.STUDENT, cfg.DISTILLER.TEACHER)
    return [network(registry.BUILTIN, dataset, name, classes) for name in names]


@pytest.mark.filterwarnings("ignore:MobileNetV2 on ImageNet:UserWarning")
@pytest.mark.parametrize("folder", PAIRS, ids=label)
def test_the_networks_of_a_pair_are_there(folder):
    """All of its files name the same two; see test_what_every_file_of_a_pair_says."""
    cfg = read(folder / "kd.yaml")
    with torch.device("meta"):
        for made in networks(cfg):
            *_, bias = made.parameters()
            assert bias.shape == (DATASETS[cfg.DATASET.TYPE][2],)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:MobileNetV2 on ImageNet:UserWarning")
@pytest.mark.parametrize("folder", [folder for folder in PAIRS if folder != DEIT], ids=label)
def test_a_pair_trains_a_step(folder):
    torch.manual_seed(0)
    trains_a_step(folder / "deepkd.yaml", *networks(read(folder / "deepkd.yaml")))


@pytest.mark.parametrize("folder", PAIRS, ids=label)
def test_what_every_file_of_a_pair_says(folder):
    """Plain yacs reads what we read, no key is unknown, and names are those of the folder."""
    shorts = set()
    for file in files(folder):
        cfg, method = read(file), file.stem
        plain = builtin.CFG.clone()
        config.add_deepkd_config(plain)
        assert keys(load(file)).keys() <= config.flatten(plain).keys()
        plain.merge_from_file(str(file))
        assert config.flatten(plain) == config.flatten(cfg)
        assert cfg.DATASET.TYPE == cfg.EXPERIMENT.PROJECT == folder.parent.name
        assert ("DecoupledAdamW" if folder == DEIT else "DecoupledMomentumSGD") == cfg.SOLVER.TRAINER
        tag, teacher, student = cfg.EXPERIMENT.TAG.split(",")
        assert (tag, f"{teacher}_{student}") == (method, folder.name)
        assert config.views(cfg) == (2 if base_of(method) in ("mlkd", "crld") else 1)
        shorts.add((cfg.DISTILLER.TEACHER, teacher, cfg.DISTILLER.STUDENT, student))
        base = base_of(method).upper()
        if method in DEEPKD:
            assert cfg.DISTILLER.TYPE == "DeepKD"
            assert base == cfg.DeepKD.BASE
            assert load(file)["DeepKD"]["MASK"]["TYPE"] == ("none" if method in NOMASK else "dynamic")
            assert load(file)["SOLVER"]["DECOUPLED"]["VARIANT"] == "paper"
        else:
            assert base == cfg.DISTILLER.TYPE
            assert not any(cfg.SOLVER.DECOUPLED.DELTA.values())
    assert len(shorts) == 1


@pytest.mark.parametrize("folder", PAIRS, ids=label)
@pytest.mark.parametrize("method", TWINS)
def test_a_baseline_has_the_protocol_of_its_twin(folder, method):
    ours, theirs = (read(folder / f"{name}.yaml") for name in (method, TWINS[method]))
    for cfg in (ours, theirs):
        cfg.defrost()
        del cfg.SOLVER["DECOUPLED"]
    assert config.flatten(ours.SOLVER) == config.flatten(theirs.SOLVER)
    assert config.flatten(ours.DATASET) == config.flatten(theirs.DATASET)
    assert config.flatten(ours.AUGMENT) == config.flatten(theirs.AUGMENT)


EQUAL = {
    "kd": {f"{data}/res20_res8" for data in ("glyphs100", "cifar100_cpu", "cifar100_res8")},
    "dkd": {
        "glyphs100/res20_res8",
        *(f"cifar100/{pair}" for pair in ("res110_res20", "res32x4_res8x4", "res32x4_shuv1", "res32x4_shuv2")),
        *(f"cifar100/{pair}" for pair in ("res32x4_vgg8", "res32x4_wrn_16_2", "res32x4_wrn_40_2", "vgg13_vgg8")),
        *(f"cifar100/{pair}" for pair in ("wrn40_2_res8x4", "wrn40_2_shuv1")),
        *(f"imagenet/{pair}" for pair in ("r50_mv1", "r50_mv2", "regnety160_deit_tiny")),
        *(f"tiny_imagenet/{pair}" for pair in ("r18_mv2", "r18_shuv2")),
    },
    "mlkd": set(),  # both keep (1 - p) in NCKD, which DeepKD over them does not
    "crld": set(),
}
"""The pairs of classification whose twins have equal loss weights; docs/configs.md counts them."""


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("method", TWINS)
def test_which_twins_have_equal_loss_weights(method):
    def weights(file):
        cfg = read(file)
        stated = DISTILLERS[cfg.DISTILLER.TYPE].loss_weights(cfg)
        assert stated["CE"] > 0
        return stated

    small = [CONFIGS / data / "res20_res8" for data in ("glyphs100", "cifar100_cpu", "cifar100_res8")]
    names = (f"{method}.yaml", f"{TWINS[method]}.yaml")
    there = [folder for folder in (*PAIRS, *small) if all((folder / name).is_file() for name in names)]
    equal = {
        label(folder)
        for folder in there
        if weights(folder / f"{method}.yaml") == weights(folder / f"{TWINS[method]}.yaml")
    }
    assert equal == EQUAL[method]


def test_the_docs_count_the_twins_of_equal_loss_weights():
    page = " ".join((ROOT / "docs" / "configs.md").read_text().split())
    equal = sum(name.split("/")[0] in DATASETS for name in EQUAL["dkd"])
    assert f"KD's differ in {len(PAIRS)} of {len(PAIRS)} pairs" in page
    assert f"DKD's in {len(PAIRS) - equal} of {len(PAIRS)}" in page


@pytest.mark.parametrize("folder", PAIRS, ids=label)
@pytest.mark.parametrize("method", NOMASK)
def test_without_a_mask_a_file_is_its_twin_but_for_the_mask(folder, method):
    ours, twin = (load(folder / f"{name}.yaml") for name in (method, NOMASK[method]))
    assert twin["DeepKD"].pop("MASK") == {"TYPE": "dynamic"}
    assert ours["DeepKD"].pop("MASK") == {"TYPE": "none"}
    assert ours["EXPERIMENT"].pop("TAG").replace("_nomask", "") == twin["EXPERIMENT"].pop("TAG")
    assert ours == twin


@pytest.mark.parametrize("folder", PAIRS, ids=label)
def test_twins_have_one_temperature(folder):
    for base, key in (("kd", "KD.TEMPERATURE"), ("dkd", "DKD.T"), ("crld", "CRLD.TEMPERATURE")):
        ours, twin = (read(folder / f"{name}.yaml") for name in (base, TWINS[base]))
        assert config.get(ours, key) == twin.DeepKD.TEMPERATURE
    assert len({str(read(folder / f"{name}.yaml").MLKD.TEMPERATURES) for name in ("mlkd", TWINS["mlkd"])}) == 1


def test_the_pair_of_deit_has_deits_recipe():
    """facebookresearch/deit, commit 7e160fe: the defaults of main.py, and README_deit.md's 4 x 256 images."""
    for file in DEIT.iterdir():
        cfg = read(file)
        assert (
            *("timm:regnety_160.deit_in1k", "timm:deit_tiny_patch16_224"),
            0.1,
        ) == (cfg.DISTILLER.TEACHER, cfg.DISTILLER.STUDENT, cfg.DISTILLER.STUDENT_DROP_PATH)
        wanted = {"BATCH_SIZE": 1024, "EPOCHS": 300, "LR": 5e-4 * 1024 / 512, "WEIGHT_DECAY": 0.05, "MOMENTUM": 0.9}
        wanted |= {"LR_SCHEDULE": "cosine", "WARMUP_EPOCHS": 5, "WARMUP_START": 1e-6 / 1e-3, "MIN_LR": 1e-5}
        wanted |= {"LABEL_SMOOTHING": 0.1, "ADAMW": {"BETA2": 0.999, "EPS": 1e-8, "DECAY": "weights"}}
        assert {key: cfg.SOLVER[key] for key in wanted} == wanted
        two = config.views(cfg) == 2
        assert {
            **{"MIXUP": 0.8, "CUTMIX": 1.0, "MIX_PROBABILITY": 1.0, "CUTMIX_SHARE": 0.5},
            **{"RANDAUGMENT": "" if two else "rand-m9-mstd0.5-inc1", "ERASING": 0.0 if two else 0.25},
        } == cfg.AUGMENT
        method = load(file).keys() & {"KD", "DKD", "MLKD", "CRLD", "DeepKD"}
        sibling = load(DEIT.with_name("r50_mv1") / file.name)
        assert {node: load(file)[node] for node in method} == {node: sibling[node] for node in method}
        assert cfg.SOLVER.DECOUPLED.DELTA == read(DEIT.with_name("r50_mv1") / file.name).SOLVER.DECOUPLED.DELTA


@pytest.mark.slow
def test_the_pair_of_deit_takes_a_step_at_full_size():
    """With the loader's own augmentation, all of its networks' weights, and AdamW's state of three streams."""
    torch.manual_seed(0)
    file = DEIT / "deepkd.yaml"
    cfg = read(file)
    student = student_network(registry.BUILTIN, cfg, 1000)
    teacher = network(registry.BUILTIN, "imagenet", cfg.DISTILLER.TEACHER, 1000)
    counted = [sum(p.numel() for p in made.parameters()) for made in (student, teacher)]
    assert counted == [5_717_416, 83_590_140]
    drops = [module.drop_prob for module in student.modules() if type(module).__name__ == "DropPath"]
    assert max(drops) == pytest.approx(0.1)
    make = data.training_source(cfg).training_views(1)
    photo = Image.fromarray(torch.randint(256, (375, 500, 3), dtype=torch.uint8).numpy())
    images = [(make(photo, Draw(0, 1, i)), int(torch.randint(1000, ())), i) for i in range(4)]
    distiller = registry.BUILTIN.distillers["DeepKD"](student, teacher.requires_grad_(False), cfg)
    before = [p.detach().clone() for p in student.parameters()]
    trainer = trainers(registry.BUILTIN)[cfg.SOLVER.TRAINER]("run", distiller, DataLoader(images, 4), [], cfg)
    entry = trainer.train_epoch(1)
    assert entry["momentum"] == pytest.approx({"tog": 0.975, "tcg": 0.825, "ncg": 0.975})
    assert all(math.isfinite(loss) for loss in entry["loss"].values())
    assert not any(torch.equal(p, old) for p, old in zip(student.parameters(), before))
    decayed, spared = trainer.optimizer.param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    names = {p: name for name, p in student.named_parameters()}
    assert {names[p] for p in spared["params"] if p.ndim > 1} == {"pos_embed", "cls_token"}
    state = trainer.optimizer.state[student.head.weight]
    assert set(state) == {"step", "exp_avg_sq", "momentum_buffer_tog+ncg", "momentum_buffer_tcg"}


@pytest.mark.parametrize("method", METHODS)
def test_mobilenet_v2_on_imagenet_is_mobilenet_v1(method):
    files = [CONFIGS / "imagenet" / folder / f"{method}.yaml" for folder in ("r50_mv1", "r50_mv2")]
    ours, alias = map(load, files)
    assert (alias["DISTILLER"]["STUDENT"], alias["EXPERIMENT"]["TAG"]) == ("MobileNetV2", f"{method},r50,mv2")
    ours["DISTILLER"]["STUDENT"], ours["EXPERIMENT"]["TAG"] = "MobileNetV2", f"{method},r50,mv2"
    assert alias == ours
    assert "\n# Papers on mdistiller call its MobileNetV1 MobileNetV2" in files[1].read_text()


def test_the_alias_warns():
    with pytest.warns(UserWarning, match="MobileNetV2 on ImageNet is mdistiller's MobileNetV1"):
        network(registry.BUILTIN, "imagenet", "MobileNetV2", 1000)


def destination(row):
    """(folders, base) of the files that a recipe's row belongs to, and the row as its file means it."""
    dataset, base = row["dataset"], row["base"]
    pair = f"{TEACHERS[row['teacher']]}_{STUDENTS.get(row['student'], row['student'])}"
    names = ["r50_mv1", "r50_mv2"] if (dataset, pair) == ("imagenet", "res50_mv2") else [pair]
    if (base, pair, row["delta_ncg"]) == ("KD", "res32x4_wrn_16_2", "0.05"):  # names KD in the folder of DKD
        base, row = "DKD", row | {"ce_weight": "1.0", "nckd_weight": "8.0", "kd_warmup_epochs": "20"}
    if base == "KD_ours":  # MLKD's first name; the row lacks what the file has for MLKD
        base, row = "MLKD", row | {"kd_weight": "0.5", "nckd_weight": "0.5", "kd_warmup_epochs": "20"}
    return [CONFIGS / dataset / name for name in names], base, row


COMMON = {
    "SOLVER.BATCH_SIZE": "batch",
    "SOLVER.EPOCHS": "epochs",
    "SOLVER.LR": "lr",
    "SOLVER.WEIGHT_DECAY": "weight_decay",
    "SOLVER.MOMENTUM": "momentum",
}
TWIN = {
    "SOLVER.DECOUPLED.DELTA.TOG": "delta_tog",
    "SOLVER.DECOUPLED.DELTA.TCG": "delta_tcg",
    "SOLVER.DECOUPLED.DELTA.NCG": "delta_ncg",
    "DeepKD.CE_WEIGHT": "ce_weight",
    "DeepKD.TCG_WEIGHT": "tckd_weight",
    "DeepKD.NCG_WEIGHT": "nckd_weight",
    "DeepKD.WARMUP": "kd_warmup_epochs",
}
BOTH = {
    "MLKD": {"MLKD.KD_WEIGHT": "kd_weight"},
    "CRLD": {"CRLD.WV_WEIGHT": "wv_weight", "CRLD.CV_WEIGHT": "cv_weight"},
}
ALONE = {
    "KD": {"KD.TEMPERATURE": "temperature"},
    "DKD": {"DKD.T": "temperature", "DKD.WARMUP": "kd_warmup_epochs"},
    "MLKD": {"MLKD.CE_WEIGHT": "ce_weight"},
    "CRLD": {"CRLD.CE_WEIGHT": "ce_weight", "CRLD.TEMPERATURE": "temperature"},
}
"""Config key -> column of the recipes, in both files of a base, in DeepKD's, in the baseline's."""


@pytest.mark.parametrize("row", ROWS, ids=lambda r: f"{r['base']},{r['teacher']},{r['student']}")
def test_the_numbers_of_a_recipe(row):
    folders, base, row = destination(row)
    twin = TWIN | ({} if base == "MLKD" else {"DeepKD.TEMPERATURE": "temperature"})
    cosine = {"LR_SCHEDULE": "cosine", "WARMUP_EPOCHS": 20, "MIN_LR": 5e-5}
    for folder in folders:
        for method, columns in ((TWINS[base.lower()], twin), (base.lower(), ALONE[base])):
            cfg = read(folder / f"{method}.yaml")
            wanted = {key: float(row[name] or 0) for key, name in (COMMON | BOTH.get(base, {}) | columns).items()}
            assert {key: config.get(cfg, key) for key in wanted} == wanted, method
            if base == "MLKD":
                temperatures = cfg.MLKD.TEMPERATURES
                assert temperatures == sorted({float(row["temperature"]), 2.0, 3.0, 5.0, 6.0})
            if row["schedule"] == "cosine":
                assert {key: cfg.SOLVER[key] for key in cosine} == cosine
            else:
                steps = "/".join(map(str, cfg.SOLVER.LR_DECAY_STAGES))
                assert f"{cfg.SOLVER.LR_SCHEDULE} {steps} x{cfg.SOLVER.LR_DECAY_RATE}" == row["schedule"]
                assert cfg.SOLVER.WARMUP_EPOCHS == 0


def test_the_recipes_reach_every_file_that_does_not_say_where_its_numbers_are_from():
    reached = {(folder, base.lower()) for folders, base, _ in map(destination, ROWS) for folder in folders}
    for file in FILES:
        base = base_of(file.stem)
        borrowed = re.search("The release has no recipe|No recipe is published", file.read_text())
        assert ((file.parent, base) in reached) != bool(borrowed), file


def test_the_deltas_of_tiny_imagenet_are_the_most_frequent_ones():
    counted = Counter((r["delta_tog"], r["delta_tcg"], r["delta_ncg"]) for r in ROWS)
    ((most, _),) = counted.most_common(1)
    for file in CONFIGS.glob("tiny_imagenet/*/deepkd*.yaml"):
        assert tuple(load(file)["SOLVER"]["DECOUPLED"]["DELTA"].values()) == tuple(map(float, most))


@pytest.mark.parametrize("folder", PAIRS, ids=label)
def test_weights_of_kd_and_dkd(folder):
    kd, dkd = (load(folder / f"{name}.yaml") for name in ("kd", "dkd"))
    imagenet = folder.parent.name == "imagenet"
    (ce, distillation), temperature = ((0.5, 0.5), 1) if imagenet else ((0.1, 0.9), 4)
    assert kd["KD"] == {"TEMPERATURE": temperature, "LOSS": {"CE_WEIGHT": ce, "KD_WEIGHT": distillation}}
    assert (dkd["DKD"]["CE_WEIGHT"], dkd["DKD"]["ALPHA"]) == (1.0, 1.0)
    assert (dkd["DKD"]["T"], dkd["DKD"]["WARMUP"]) == (temperature, 1 if imagenet else 20)


@pytest.fixture
def maker(monkeypatch):
    """tools/make_configs.py as a module."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module("make_configs")


def test_files_and_tables_are_what_the_tool_makes(maker, capsys):
    assert maker.main(["--check"]) == 0, capsys.readouterr().out


def test_the_check_names_what_differs(maker, tmp_path, capsys):
    (tmp_path / "docs").mkdir()
    for name, marks in maker.PAGES.items():
        text = "".join(f"<!-- table: {mark} -->\n<!-- end -->\n" for mark in marks)
        (tmp_path / "docs" / name).write_text(text)
    page = tmp_path / "docs" / "configs.md"
    assert maker.main([], tmp_path) == 0
    assert maker.main(["--check"], tmp_path) == 0
    pair = tmp_path / "configs" / "imagenet" / "r34_r18"
    (pair / "kd.yaml").write_text((pair / "kd.yaml").read_text().replace("0.2", "0.3"))
    (pair / "dkd.yaml").unlink()
    (pair / "mine.yaml").write_text("SOLVER: {}\n")
    page.write_text(page.read_text().replace("steps 30/60/90", "cosine"))
    capsys.readouterr()
    assert maker.main(["--check"], tmp_path) == 1
    named = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    expected = [f"configs/imagenet/r34_r18/{name}.yaml" for name in ("mine", "kd", "dkd")]
    assert named == [*expected, "docs/configs.md"]
    assert maker.main([], tmp_path) == 1  # it does not delete what it did not make
    (pair / "mine.yaml").unlink()
    assert maker.main(["--check"], tmp_path) == 0
    assert maker.main(["--chekc"], tmp_path) == 2


def checkout(variable, name):
    root = os.environ.get(variable)
    if not root:
        pytest.skip(f"no checkout of {name}: {variable} names none")
    return Path(root)


@pytest.fixture(scope="module")
def release():
    """(root of the authors' release, {our file: content of the release's file for the same pair and method})."""
    root = checkout("DEEPKD_RELEASE_ROOT", "the authors' release")
    files = {}
    for file in [*root.glob("configs/cifar100/ours/*/*.yaml"), *root.glob("configs/imagenet/*/*.yaml")]:
        tree = load(file)
        teacher, student = tree["DISTILLER"]["TEACHER"], tree["DISTILLER"]["STUDENT"]
        if "imagenet" in file.parts:
            method, pair = file.stem, f"{TEACHERS[teacher].replace('res', 'r')}_{STUDENTS[student]}"
            method = "deepkd" if method == "deepkd_kd" else method
        else:
            method, pair = TWINS[file.parent.name], f"{TEACHERS[teacher]}_{STUDENTS.get(student, student)}"
        ours = CONFIGS / tree.get("DATASET", {}).get("TYPE", "cifar100") / pair / f"{method}.yaml"
        if method in METHODS:
            assert ours not in files
            files[ours] = tree
    assert len(files) == 17 + 16 + 17 + 14 + 2 * 7  # the release has no crld.yaml for ImageNet
    return root, files


def test_a_file_says_where_the_release_is_wrong(release):
    """Each of the release's files against the registries and config keys that would read it."""
    root, files = release
    package = root / "mdistiller"
    trainers, distillers = (
        set(re.findall(r'^\s+"(\w+)":', (package / part / "__init__.py").read_text(), re.M))
        for part in ("engine", "distillers")
    )
    known = {"", *re.findall(r"^CFG\.([\w.]+) *=", (package / "engine/cfg.py").read_text(), re.M)}
    numbers_alone = {"cifar100/res110_res20/deepkd", "cifar100/res32x4_wrn_16_2/deepkd_dkd"}
    for ours, theirs in files.items():
        flat = keys(theirs)
        trainer, kind = flat.get("SOLVER.TRAINER", "base"), flat["DISTILLER.TYPE"]
        prefixes = (".".join(path.split(".")[: n + 1]) for path in flat for n in range(path.count(".") + 1))
        wrong = {prefix for prefix in prefixes if prefix not in known and prefix.rpartition(".")[0] in known}
        wrong |= {trainer} - trainers | {kind} - distillers
        if trainer in trainers and kind in ("MLKD", "CRLD", "KD_ours") and not trainer.endswith("_aug"):
            wrong.add("one view")
        said = "\n".join(line for line in ours.read_text().splitlines() if line.startswith("# Release: "))
        assert all(name in said for name in wrong), (ours, wrong)
        assert bool(said) == bool(wrong) or label(ours) in numbers_alone, ours


def test_the_release_s_recipes_have_no_mask(release):
    """Its default is none either; what says so of itself is a file of ours without one."""
    root, files = release
    assert re.search(r"^CFG\.SOLVER\.DEEPKD\.TOPK = 0$", (root / "mdistiller/engine/cfg.py").read_text(), re.M)
    ours = {file.with_name(f"{file.stem}_nomask.yaml"): theirs for file, theirs in files.items()}
    for file in FILES:
        if file.stem in NOMASK and file.parent.name != "r50_mv1":  # which is the release's r50_mv2
            assert ("which has no mask" in file.read_text()) == (file in ours), file
    assert not any("TOPK" in key for theirs in files.values() for key in keys(theirs))


def test_sizes_of_the_release_s_deltas(release):
    """The article has one; docs/release.md counts."""
    sizes = Counter(len({abs(float(row[f"delta_{stream}"])) for stream in ("tog", "tcg", "ncg")}) for row in ROWS)
    assert sizes == {1: 11, 2: 51, 3: 10}
    below = [row for row in ROWS if float(row["delta_ncg"]) < 0]
    assert [(row["base"], row["teacher"], row["student"]) for row in below] == [("KD", "resnet110", "resnet20")]
    page = " ".join((ROOT / "docs" / "release.md").read_text().split())
    assert "Of the release's 72 recipes 11 have one size of Δ, 51 two and 10 three" in page


def test_how_far_the_recipes_over_crld_are_crld_s_own():
    """docs/published.md counts: CRLD's own has steps, and WV 2 everywhere."""
    own = Counter((row["schedule"].split()[0], row["wv_weight"] == "2.0") for row in ROWS if row["base"] == "CRLD")
    assert own == {("step", True): 4, ("cosine", True): 6, ("cosine", False): 6}
    page = " ".join((ROOT / "docs" / "published.md").read_text().split())
    assert "Of DeepKD's 16 recipes over it 12 are cosine, 6 with another WV too; four on CIFAR-100" in page


def test_protocol_and_deltas_are_those_of_the_release(release):
    _, files = release
    for file, theirs in files.items():
        if file.stem in TWINS:  # the release's baselines have protocols of their own
            continue
        ours, theirs = load(file)["SOLVER"], theirs["SOLVER"]
        for key in ("BATCH_SIZE", "EPOCHS", "LR", "WEIGHT_DECAY", "MOMENTUM"):
            assert ours[key] == theirs[key], (file, key)
        if theirs.get("LR_COS", False):
            assert ours["LR_SCHEDULE"] == "cosine", file
        else:
            assert ours["LR_DECAY_STAGES"] == theirs["LR_DECAY_STAGES"], file
        deltas = {stream: theirs["DEEPKD"][f"DELTA_{stream}"] for stream in ("TOG", "TCG", "NCG")}
        assert ours["DECOUPLED"]["DELTA"] == deltas, file


def test_beta_of_dkd_and_the_protocol_of_tiny_imagenet_are_mdistillers():
    root = checkout("MDISTILLER_ROOT", "mdistiller") / "configs"
    theirs = [*root.glob("cifar100/dkd/*.yaml"), *root.glob("imagenet/*/dkd.yaml")]
    assert len(theirs) == 13
    for file in theirs:
        pair = f"imagenet/{file.parent.name}" if file.stem == "dkd" else f"cifar100/{file.stem}"
        ours = load(CONFIGS / pair / "dkd.yaml")
        assert ours["DKD"]["BETA"] == load(file).get("DKD", {}).get("BETA", 8.0), file
    for file in root.glob("tiny_imagenet/dot/*.yaml"):
        for ours in (CONFIGS / "tiny_imagenet" / file.stem).iterdir():
            for key in ("BATCH_SIZE", "EPOCHS", "LR", "LR_DECAY_STAGES", "WEIGHT_DECAY", "MOMENTUM"):
                assert load(ours)["SOLVER"][key] == load(file)["SOLVER"][key], (ours, key)
            assert load(ours)["DISTILLER"]["STUDENT"] == load(file)["DISTILLER"]["STUDENT"]
