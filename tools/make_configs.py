"""Write configs/{cifar100,imagenet,tiny_imagenet} and the tables of docs/configs.md and docs/release.md.

python tools/make_configs.py           writes what differs
python tools/make_configs.py --check   writes nothing, names what differs and exits 1 if anything does

recipes.csv holds the numbers of the authors' release (commit afb5964), one row for each of its files, its own
defaults filled in. The tables below hold the rest: which pairs there are, what is wrong in the release's files,
whose recipe a pair takes that has none, and how the baselines were published. later_methods.py has the methods that
the article does not have.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from later_methods import LATER, Later

ROOT = Path(__file__).parents[1]
BASES = ("KD", "DKD", "MLKD", "CRLD")
METHODS = ("kd", "dkd", "mlkd", "crld", "deepkd", "deepkd_dkd", "deepkd_mlkd", "deepkd_crld")
PAGES = {"configs.md": ("baselines",), "release.md": ("faults", "siblings")}
"""Pages of docs/ with the tables that are written into them."""
NOMASK = "_nomask"
METHODS += tuple(f"{method}{NOMASK}" for method in METHODS if method.startswith("deepkd"))


class Pair(NamedTuple):
    """A teacher and a student: mdistiller's short names, which name the folder, and those of its zoo."""

    dataset: str
    short_teacher: str
    short_student: str
    teacher: str
    student: str

    @property
    def folder(self) -> str:
        return f"{self.short_teacher}_{self.short_student}"


PAIRS = tuple(
    Pair(*fields)
    for fields in (
        ("cifar100", "res110", "res20", "resnet110", "resnet20"),
        ("cifar100", "res110", "res32", "resnet110", "resnet32"),
        ("cifar100", "res32x4", "res8x4", "resnet32x4", "resnet8x4"),
        ("cifar100", "res32x4", "shuv1", "resnet32x4", "ShuffleV1"),
        ("cifar100", "res32x4", "shuv2", "resnet32x4", "ShuffleV2"),
        ("cifar100", "res32x4", "vgg8", "resnet32x4", "vgg8"),
        ("cifar100", "res32x4", "wrn_16_2", "resnet32x4", "wrn_16_2"),
        ("cifar100", "res32x4", "wrn_40_2", "resnet32x4", "wrn_40_2"),
        ("cifar100", "res50", "mv2", "ResNet50", "MobileNetV2"),
        ("cifar100", "res56", "res20", "resnet56", "resnet20"),
        ("cifar100", "vgg13", "mv2", "vgg13", "MobileNetV2"),
        ("cifar100", "vgg13", "vgg8", "vgg13", "vgg8"),
        ("cifar100", "wrn40_2", "mv2", "wrn_40_2", "MobileNetV2"),
        ("cifar100", "wrn40_2", "res8x4", "wrn_40_2", "resnet8x4"),
        ("cifar100", "wrn40_2", "shuv1", "wrn_40_2", "ShuffleV1"),
        ("cifar100", "wrn40_2", "wrn_16_2", "wrn_40_2", "wrn_16_2"),
        ("cifar100", "wrn40_2", "wrn_40_1", "wrn_40_2", "wrn_40_1"),
        ("imagenet", "r34", "r18", "ResNet34", "ResNet18"),
        ("imagenet", "r50", "mv1", "ResNet50", "MobileNetV1"),
        ("imagenet", "r50", "mv2", "ResNet50", "MobileNetV2"),
        ("imagenet", "regnety160", "deit_tiny", "timm:regnety_160.deit_in1k", "timm:deit_tiny_patch16_224"),
        ("tiny_imagenet", "r18", "mv2", "ResNet18", "MobileNetV2"),
        ("tiny_imagenet", "r18", "shuv2", "ResNet18", "ShuffleV2"),
    )
)


@dataclass(frozen=True)
class Recipe:
    """Protocol, momenta and loss weights of a pair under a base method and its DeepKD."""

    batch: int
    epochs: int
    lr: float
    steps: tuple[int, ...]
    """Epochs after which the learning rate falls to a tenth; none: cosine."""
    weight_decay: float
    momentum: float
    deltas: tuple[float, float, float]
    """Of TOG, TCG and NCG."""
    ce: float
    kd: float
    """Weight of the distillation loss; read over MLKD only."""
    temperature: float
    tckd: float
    nckd: float
    warmup: int
    """Epochs of linear warm-up of TCKD and NCKD."""
    wv: float
    cv: float


CORRECTIONS: dict[tuple[str, ...], tuple[str, dict[str, float]]] = {
    ("cifar100", "KD", "resnet32x4", "wrn_16_2", "0.05"): ("DKD", {"ce": 1.0, "nckd": 8.0, "warmup": 20}),
    ("imagenet", "KD_ours", "ResNet50", "MobileNetV2", "0.05"): (
        "MLKD",
        {"kd": 0.5, "nckd": 0.5, "warmup": 20},
    ),
}
"""(data set, base, teacher, student, delta_ncg) of the rows that are not what their file is for -> the base that
the file is for, and what the row does not hold of it; see FAULTS."""

SIBLINGS: dict[tuple[str, str, str], str] = {
    ("cifar100", "DKD", "res32x4_vgg8"): "vgg13_vgg8",
    ("cifar100", "CRLD", "res32x4_vgg8"): "vgg13_vgg8",
    ("cifar100", "CRLD", "res32x4_shuv1"): "res32x4_shuv2",
    ("cifar100", "CRLD", "wrn40_2_shuv1"): "res32x4_shuv2",
}
"""(data set, base, folder) of the pairs that the release has no file for -> the pair whose recipe they take, which
has the same or the nearest student."""

TINY_SIBLINGS = {"r18_mv2": "res50_mv2", "r18_shuv2": "res32x4_shuv2"}
"""CIFAR-100's pairs whose loss weights the pairs of Tiny ImageNet take."""

TINY_PROTOCOL = {
    "batch": 256,
    "epochs": 200,
    "lr": 0.2,
    "steps": (60, 120, 160),
    "weight_decay": 5e-4,
    "deltas": (0.075, -0.075, 0.05),
}
"""mdistiller's configs/tiny_imagenet/dot/*.yaml; the deltas are the most frequent ones of the release."""

DEIT = ("imagenet", "regnety160_deit_tiny")
"""The pair whose student is trained as DeiT's own code trains it."""

PAPERS_NAME = {"timm:regnety_160.deit_in1k": "RegNetY-16GF", "timm:deit_tiny_patch16_224": "DeiT-Tiny"}
"""Networks by timm's names."""

DEIT_SIBLING = "r50_mv1"
"""The pair of ImageNet whose loss weights and deltas it takes: the one that has another kind of student, too."""

DEIT_PROTOCOL = {"batch": 1024, "epochs": 300, "lr": 1e-3, "steps": (), "weight_decay": 0.05}
DEIT_SOLVER = {"WARMUP_EPOCHS": 5, "WARMUP_START": 0.001, "MIN_LR": 1e-5, "LABEL_SMOOTHING": 0.1}
DEIT_MIXING = {"MIXUP": 0.8, "CUTMIX": 1.0}
DEIT_IMAGES = {"RANDAUGMENT": "rand-m9-mstd0.5-inc1", "ERASING": 0.25}
DEIT_DROP_PATH = 0.1
"""Of facebookresearch/deit, commit 7e160fe: main.py's defaults, with the batch of README_deit.md's command for
DeiT-Tiny, and the learning rate 0.0005 x batch / 512 that main.py makes of it."""

ALIAS = {"MobileNetV1": "MobileNetV2"}
"""ImageNet students under the name that the release has for them."""


class Fault(NamedTuple):
    """What is wrong or odd in the release's files for a method, and what ours have instead."""

    dataset: str
    method: str
    folders: tuple[str, ...]
    release: str
    ours: str


_R50 = ("r50_mv1", "r50_mv2")
_TWO_VIEWS = "two views, DecoupledMomentumSGD."
FAULTS = (
    Fault(
        "cifar100",
        "deepkd_mlkd",
        (
            *("res110_res20", "res110_res32", "res32x4_shuv2", "res32x4_wrn_16_2", "res32x4_wrn_40_2"),
            *("res50_mv2", "res56_res20", "vgg13_mv2", "vgg13_vgg8", "wrn40_2_mv2", "wrn40_2_res8x4"),
            *("wrn40_2_shuv1", "wrn40_2_wrn_16_2", "wrn40_2_wrn_40_1"),
        ),
        "trainer deepkd, which passes one view; MLKD takes two.",
        _TWO_VIEWS,
    ),
    Fault(
        "cifar100",
        "deepkd_mlkd",
        ("res32x4_shuv1", "res32x4_vgg8"),
        "trainer ours, which does not exist.",
        _TWO_VIEWS,
    ),
    Fault(
        "cifar100",
        "deepkd_mlkd",
        ("res32x4_shuv1", "res32x4_vgg8"),
        "KD.LOSS has CE_WEIGHT 0.5 alone, so KD_WEIGHT's default 0.9 (elsewhere 0.5 and 0.5).",
        "0.9.",
    ),
    Fault(
        "cifar100",
        "deepkd_crld",
        (
            *("res110_res20", "res110_res32", "vgg13_mv2", "vgg13_vgg8", "wrn40_2_mv2", "wrn40_2_res8x4"),
            *("wrn40_2_wrn_16_2", "wrn40_2_wrn_40_1"),
        ),
        "trainer deepkd, which passes one view; CRLD takes two.",
        _TWO_VIEWS,
    ),
    Fault(
        "cifar100",
        "deepkd_crld",
        ("wrn40_2_wrn_16_2",),
        "SOLVER.LR_POLICY True, an unknown key (perhaps LR_COS, cosine).",
        "the file's steps.",
    ),
    Fault(
        "cifar100",
        "deepkd_dkd",
        ("res32x4_wrn_16_2",),
        "distiller KD in the folder of DKD, so CE 0.1 and NCG 8.0.",
        "DKD's defaults, CE 1.0 and NCG 8.0.",
    ),
    Fault(
        "cifar100",
        "deepkd",
        ("res110_res20",),
        "three sizes of delta, 0.075, -0.1 and -0.05, and the only DELTA_NCG below 0.",
        "as released.",
    ),
    Fault(
        "imagenet",
        "deepkd_mlkd",
        ("r34_r18",),
        "trainer deepkd, which passes one view; MLKD takes two.",
        _TWO_VIEWS,
    ),
    Fault(
        "imagenet",
        "deepkd_mlkd",
        ("r34_r18",),
        "no KD.LOSS, so CIFAR's 0.1 and 0.9 (0.5 and 0.5 in the mlkd.yaml beside it).",
        "0.1 and 0.9.",
    ),
    Fault(
        "imagenet",
        "mlkd",
        ("r34_r18",),
        "SOLVER.DKDOT, an unknown key; the base trainer, which passes one view.",
        _TWO_VIEWS,
    ),
    Fault("imagenet", "deepkd", _R50, "trainer dkdot, which does not exist.", "DecoupledMomentumSGD."),
    Fault(
        "imagenet",
        "deepkd_mlkd",
        _R50,
        "distiller KD_ours (MLKD's first name), which does not exist; one view.",
        "MLKD, the file's weights.",
    ),
    Fault(
        "imagenet",
        "mlkd",
        _R50,
        "distiller KD_ours (MLKD's first name) and trainer ours, which do not exist.",
        "MLKD, two views.",
    ),
)


class Published(NamedTuple):
    """The protocol under which a baseline was published, and by whom."""

    source: str
    batch: int
    epochs: int
    lr: float
    steps: tuple[int, ...]


MDISTILLER_BETA = {
    ("cifar100", "res110_res32"): 2.0,
    ("cifar100", "res32x4_res8x4"): 8.0,
    ("cifar100", "res32x4_shuv1"): 8.0,
    ("cifar100", "res32x4_shuv2"): 8.0,
    ("cifar100", "res50_mv2"): 8.0,
    ("cifar100", "res56_res20"): 2.0,
    ("cifar100", "vgg13_mv2"): 6.0,
    ("cifar100", "vgg13_vgg8"): 6.0,
    ("cifar100", "wrn40_2_shuv1"): 8.0,
    ("cifar100", "wrn40_2_wrn_16_2"): 6.0,
    ("cifar100", "wrn40_2_wrn_40_1"): 6.0,
    ("imagenet", "r34_r18"): 0.5,
    ("imagenet", "r50_mv1"): 2.0,
    ("imagenet", "r50_mv2"): 2.0,
}
"""DKD.BETA of mdistiller's configs/*/dkd; the other pairs take the recipe's NCG weight."""

CIFAR_STEPS = (150, 180, 210)
SLOW_STUDENTS = ("MobileNetV2", "ShuffleV1", "ShuffleV2")
"""CIFAR-100's students that mdistiller trains at a fifth of the others' learning rate."""

MLKD_EPOCHS = {
    "res110_res32": 240,
    "res32x4_res8x4": 240,
    "res32x4_shuv1": 960,
    "res32x4_shuv2": 960,
    "res50_mv2": 480,
    "res56_res20": 240,
    "vgg13_mv2": 480,
    "vgg13_vgg8": 240,
    "wrn40_2_shuv1": 480,
    "wrn40_2_wrn_16_2": 240,
    "wrn40_2_wrn_40_1": 240,
}
"""Of MLKD's own release (Jin-Ying/Multi-Level-Logit-Distillation, commit 5ee473f)."""


def published(pair: Pair, base: str) -> Published | None:
    """Return the protocol that a baseline was published with for this pair; None if we know of none."""
    slow = pair.student in SLOW_STUDENTS
    if (pair.dataset, pair.folder) == DEIT:
        return None
    if pair.dataset == "imagenet" and base != "CRLD":
        lr = 0.1 if (base, pair.folder) == ("MLKD", "r34_r18") else 0.2
        return Published("MLKD's release" if base == "MLKD" else "mdistiller", 512, 100, lr, (30, 60, 90))
    if pair.dataset != "cifar100" or base == "CRLD":
        return None
    if base in ("KD", "DKD"):
        return Published("mdistiller", 64, 240, 0.01 if slow else 0.05, CIFAR_STEPS)
    if pair.folder in MLKD_EPOCHS:
        lr, epochs = 0.01 if slow else 0.025, MLKD_EPOCHS[pair.folder]
        return Published("MLKD's release", 64, epochs, lr, CIFAR_STEPS)
    lr = 0.005 if slow else 0.025
    return Published("logit-standardization-KD", 64, 480, lr, CIFAR_STEPS)


def read_recipes(file: Path) -> dict[tuple[str, str, str, str], Recipe]:
    """Read (data set, base, teacher, student) -> recipe from recipes.csv, with CORRECTIONS."""
    recipes: dict[tuple[str, str, str, str], Recipe] = {}
    with file.open(encoding="utf-8", newline="") as rows:
        for row in csv.DictReader(rows):
            dataset, base, teacher, student = (row[name] for name in ("dataset", "base", "teacher", "student"))
            given = dataset, base, teacher, student, row["delta_ncg"]
            base, changes = CORRECTIONS.get(given, (base, {}))
            key = dataset, base, teacher, student
            if key in recipes:
                raise ValueError(f"{file}: has two rows for {', '.join(key)}")
            recipes[key] = replace(_recipe(row), **changes)
    return recipes


def _recipe(row: dict[str, str]) -> Recipe:
    def number(name: str) -> float:
        return float(row[name] or 0)

    schedule = row["schedule"].split()
    if schedule[0] == "step" and schedule[2] != "x0.1":
        raise ValueError(f"recipes.csv: schedule is {row['schedule']!r}; it must be cosine or step … x0.1")
    return Recipe(
        batch=int(row["batch"]),
        epochs=int(row["epochs"]),
        lr=number("lr"),
        steps=tuple(map(int, schedule[1].split("/"))) if schedule[0] == "step" else (),
        weight_decay=number("weight_decay"),
        momentum=number("momentum"),
        deltas=(number("delta_tog"), number("delta_tcg"), number("delta_ncg")),
        ce=number("ce_weight"),
        kd=number("kd_weight"),
        temperature=number("temperature"),
        tckd=number("tckd_weight"),
        nckd=number("nckd_weight"),
        warmup=int(row["kd_warmup_epochs"] or 0),
        wv=number("wv_weight"),
        cv=number("cv_weight"),
    )


class Configs:
    """All files, from the recipes."""

    def __init__(self, recipes: dict[tuple[str, str, str, str], Recipe]) -> None:
        self.recipes = recipes

    def recipe(self, pair: Pair, base: str) -> Recipe:
        """Return the pair's own recipe, or its sibling's."""
        if pair.dataset == "tiny_imagenet":
            sibling = find_pair("cifar100", TINY_SIBLINGS[pair.folder])
            return replace(self.recipe(sibling, base), **TINY_PROTOCOL)
        if (pair.dataset, pair.folder) == DEIT:
            return replace(self.recipe(find_pair("imagenet", DEIT_SIBLING), base), **DEIT_PROTOCOL)
        folder = SIBLINGS.get((pair.dataset, base, pair.folder), pair.folder)
        _, _, _, teacher, student = find_pair(pair.dataset, folder)
        return self.recipes[pair.dataset, base, teacher, ALIAS.get(student, student)]

    def files(self) -> dict[str, str]:
        """Return path below configs/ -> content."""
        files = {f"{p.dataset}/{p.folder}/{m}.yaml": self.file(p, m) for p in PAIRS for m in METHODS}
        for later in LATER:
            for folder in later.folders:
                for deepkd in (False, True)[: 1 + (later.twin is not None)]:
                    name = f"deepkd_{later.method}" if deepkd else later.method
                    pair = find_pair(later.dataset, folder)
                    files[f"{later.dataset}/{folder}/{name}.yaml"] = self.later(later, pair, name, deepkd)
        return files

    def later(self, method: Later, pair: Pair, name: str, deepkd: bool) -> str:
        """Write the file of a method that the article does not have, or of DeepKD over it."""
        slow = pair.dataset == "cifar100" and pair.student in SLOW_STUDENTS
        recipe = replace(
            self.recipe(pair, "DKD"),
            batch=method.batch,
            epochs=method.epochs,
            lr=method.slow_lr if slow else method.lr,
            steps=method.steps,
            weight_decay=method.weight_decay,
        )
        what = f"{method.base} + DeepKD with the dynamic top-K mask" if deepkd else method.title
        lines = [f"{what}, {pair.teacher} to {pair.student}. Made by tools/make_configs.py."]
        if deepkd:
            lines.append(f"No recipe for it is published. Protocol, temperature, loss weights: {method.method}.yaml.")
            lines.append("Ours: the deltas, those of deepkd_dkd.yaml.")
        else:
            lines += [f"Source: {method.source}.", *method.notes]
        tree = experiment(pair, name, "DeepKD" if deepkd else method.base)
        tree["DISTILLER"] |= method.distiller
        tree["SOLVER"] = solver(recipe, deepkd, False)
        if pair.dataset == "imagenet":
            tree["LOG"] = LOG
        if deepkd:
            tree["DeepKD"] = {"BASE": method.base} | (method.twin or {}) | {"MASK": {"TYPE": "dynamic"}}
        tree |= method.keeps if deepkd else method.nodes
        return "\n".join([*(f"# {line}" for line in lines), *render(tree), ""])

    def file(self, pair: Pair, method: str) -> str:
        base = base_of(method)
        recipe = self.recipe(pair, base)
        deit = (pair.dataset, pair.folder) == DEIT
        tree = experiment(pair, method, "DeepKD" if is_deepkd(method) else base)
        tree["SOLVER"] = solver(recipe, is_deepkd(method), deit)
        if deit:
            tree["DISTILLER"]["STUDENT_DROP_PATH"] = DEIT_DROP_PATH
            tree["AUGMENT"] = DEIT_MIXING | ({} if base in TWO_VIEWS else DEIT_IMAGES)
        if pair.dataset == "imagenet":
            tree["LOG"] = LOG
        tree |= deepkd_nodes(recipe, base, masked(method)) if is_deepkd(method) else baseline_nodes(recipe, pair, base)
        return "\n".join([*self.header(pair, method), *render(tree), ""])

    def header(self, pair: Pair, method: str) -> list[str]:
        """Write the comment lines at the top of a file."""
        base, ours = base_of(method), is_deepkd(method)
        mask = "with the dynamic top-K mask" if masked(method) else "without a mask"
        what = f"{base} + DeepKD {mask}" if ours else TITLES[base]
        teacher, student = (PAPERS_NAME.get(name, name) for name in (pair.teacher, pair.student))
        lines = [f"{what}, {teacher} to {student}. Made by tools/make_configs.py."]
        if (pair.dataset, pair.folder) == ("imagenet", "r50_mv2"):
            lines.append(
                "Papers on mdistiller call its MobileNetV1 MobileNetV2 on ImageNet: an alias, equal to r50_mv1."
            )
        if pair.dataset == "tiny_imagenet":
            lines.append(
                f"No recipe is published. Protocol: mdistiller's configs/tiny_imagenet/dot/{pair.folder}.yaml."
            )
            weights = f"loss weights, those of CIFAR-100's {TINY_SIBLINGS[pair.folder]}"
            if ours:
                lines.append(f"Ours: the deltas, the release's most frequent ones, and the {weights}.")
            elif base != "KD":
                lines.append(f"Ours: the {weights}.")
        if (pair.dataset, pair.folder) == DEIT:
            lines.append("No recipe is published. Protocol and augmentation: DeiT's own (docs/configs.md).")
            if base in TWO_VIEWS:
                lines.append("The strong view stands for DeiT's RandAugment and erasing.")
            deltas = "deltas and " if ours else ""
            lines.append(f"Ours: AdamW by stream, and the {deltas}loss weights, those of {DEIT_SIBLING}.")
        sibling = SIBLINGS.get((pair.dataset, base, pair.folder))
        if sibling:
            lines.append(f"The release has no recipe for {base} on this pair; these are the numbers of {sibling}.")
        own = not sibling and pair.dataset != "tiny_imagenet" and (pair.dataset, pair.folder) != DEIT
        if ours and own and not masked(method):
            lines.append("As the release's recipe, which has no mask; its momenta: SOLVER.DECOUPLED.VARIANT release.")
        otherwise = None if ours else self.otherwise(pair, base)
        if otherwise:
            lines.append(f"Published with {otherwise}; here as {twin_of(base)}.yaml.")
        lines += [
            f"Release: {fault.release} Here: {fault.ours}"
            for fault in FAULTS
            if pair.folder in fault.folders
            and (fault.dataset, fault.method) == (pair.dataset, method.removesuffix(NOMASK))
        ]
        return [f"# {line}" for line in lines]

    def otherwise(self, pair: Pair, base: str) -> str | None:
        """Say what the protocol of a published baseline had otherwise, and whose that is."""
        theirs = published(pair, base)
        if theirs is None:
            return None
        recipe = self.recipe(pair, base)
        compared = (
            (f"batch {theirs.batch}", theirs.batch == recipe.batch),
            (f"{theirs.epochs} epochs", theirs.epochs == recipe.epochs),
            (f"learning rate {theirs.lr}", theirs.lr == recipe.lr),
            (f"steps {'/'.join(map(str, theirs.steps))}", theirs.steps == recipe.steps),
        )
        had = [name for name, equal in compared if not equal]
        return f"{', '.join(had)} ({theirs.source})" if had else None

    def tables(self) -> dict[str, str]:
        """Write the generated tables of PAGES, by name."""
        return {
            "faults": table(
                ("Ours", "The release's file", "Here"),
                [(_cell(f.dataset, f.folders, [f.method]), f.release, f.ours) for f in FAULTS],
            ),
            "siblings": table(
                ("Ours", "Takes the recipe of"),
                [
                    (_cell(dataset, [folder], [base.lower(), twin_of(base)]), f"`{sibling}`")
                    for (dataset, base, folder), sibling in SIBLINGS.items()
                ],
            ),
            "baselines": table(
                ("Ours", "Published with"),
                [
                    (_cell(pair.dataset, [pair.folder], [base.lower()]), otherwise)
                    for base in BASES
                    for pair in PAIRS
                    if (otherwise := self.otherwise(pair, base))
                ],
            ),
        }


TWO_VIEWS = ("MLKD", "CRLD")

TITLES = {
    "KD": "Knowledge distillation",
    "DKD": "Decoupled knowledge distillation",
    "MLKD": "Multi-level logit distillation",
    "CRLD": "Cross-view consistency (CRLD)",
}

DATASETS: dict[str, dict[str, Any]] = {
    "cifar100": {"TYPE": "cifar100", "NUM_WORKERS": 2},
    "imagenet": {"TYPE": "imagenet", "NUM_WORKERS": 16, "TEST": {"BATCH_SIZE": 128}},
    "tiny_imagenet": {"TYPE": "tiny_imagenet", "NUM_WORKERS": 16},
}


LOG = {"SAVE_CHECKPOINT_FREQ": 10}
"""Of ImageNet."""


class Commented(NamedTuple):
    """A value with a comment behind it."""

    value: Any
    comment: str


def experiment(pair: Pair, name: str, distiller: str) -> dict[str, Any]:
    """Make the nodes that say what is trained: names, images, networks and the DISTILLER.TYPE."""
    return {
        "EXPERIMENT": {"PROJECT": pair.dataset, "TAG": f"{name},{pair.short_teacher},{pair.short_student}"},
        "DATASET": DATASETS[pair.dataset],
        "DISTILLER": {"TYPE": distiller, "TEACHER": pair.teacher, "STUDENT": pair.student},
    }


def solver(recipe: Recipe, deepkd: bool, deit: bool) -> dict[str, Any]:
    """Make the node SOLVER: the same for a baseline and its DeepKD but for DECOUPLED.

    deit: whether it is DeiT's, with AdamW.
    """
    schedule: dict[str, Any] = {"LR_SCHEDULE": "step", "LR_DECAY_STAGES": list(recipe.steps)}
    if not recipe.steps:
        schedule = {"LR_SCHEDULE": "cosine"} | (DEIT_SOLVER if deit else {"WARMUP_EPOCHS": 20, "MIN_LR": 5e-5})
    node: dict[str, Any] = {
        "TRAINER": "DecoupledAdamW" if deit else "DecoupledMomentumSGD",
        "BATCH_SIZE": recipe.batch,
        "EPOCHS": recipe.epochs,
        "LR": recipe.lr,
        **schedule,
        "WEIGHT_DECAY": recipe.weight_decay,
        "MOMENTUM": recipe.momentum,
    }
    if deepkd:
        deltas = dict(zip(("TOG", "TCG", "NCG"), recipe.deltas))
        node["DECOUPLED"] = {"VARIANT": "paper", "DELTA": deltas}
    return node


def baseline_nodes(recipe: Recipe, pair: Pair, base: str) -> dict[str, Any]:
    """Make the node of a baseline's losses."""
    if base == "KD":
        weights = (0.5, 0.5) if pair.dataset == "imagenet" else (0.1, 0.9)
        loss = dict(zip(("CE_WEIGHT", "KD_WEIGHT"), weights))
        return {"KD": {"TEMPERATURE": int(recipe.temperature), "LOSS": loss}}
    if base == "DKD":
        beta = MDISTILLER_BETA.get((pair.dataset, pair.folder), recipe.nckd)
        weights = {"CE_WEIGHT": 1.0, "ALPHA": 1.0, "BETA": beta}
        return {"DKD": weights | {"T": recipe.temperature, "WARMUP": recipe.warmup}}
    if base == "MLKD":
        return {"MLKD": {"CE_WEIGHT": recipe.ce} | mlkd_node(recipe)}
    views = {"WV_WEIGHT": recipe.wv, "CV_WEIGHT": recipe.cv}
    return {"CRLD": {"CE_WEIGHT": recipe.ce} | views | {"TEMPERATURE": recipe.temperature}}


def deepkd_nodes(recipe: Recipe, base: str, mask: bool) -> dict[str, Any]:
    """Make the node DeepKD, and what it reads of its base's node."""
    node = {
        "BASE": base,
        "CE_WEIGHT": recipe.ce,
        "TCG_WEIGHT": recipe.tckd,
        "NCG_WEIGHT": recipe.nckd,
    }
    if base != "MLKD":  # it has a list of its own
        node["TEMPERATURE"] = recipe.temperature
    if recipe.warmup:
        node["WARMUP"] = recipe.warmup
    nodes: dict[str, Any] = {"DeepKD": node | {"MASK": {"TYPE": "dynamic" if mask else "none"}}}
    if base == "MLKD":
        nodes["MLKD"] = mlkd_node(recipe)
    if base == "CRLD":
        nodes["CRLD"] = {"WV_WEIGHT": recipe.wv, "CV_WEIGHT": recipe.cv}
    return nodes


def mlkd_node(recipe: Recipe) -> dict[str, Any]:
    """Make what MLKD and DeepKD over it both read: the base temperature beside the four fixed ones."""
    return {
        "KD_WEIGHT": recipe.kd,
        "TEMPERATURES": sorted([recipe.temperature, 2.0, 3.0, 5.0, 6.0]),
        "VARIANT": Commented("formula", "release: the arithmetic of MLKD's published code"),
    }


def find_pair(dataset: str, folder: str) -> Pair:
    """Return the pair of a folder."""
    return next(pair for pair in PAIRS if (pair.dataset, pair.folder) == (dataset, folder))


def is_deepkd(method: str) -> bool:
    """Say whether a method is DeepKD over a base, and no baseline."""
    return method.startswith("deepkd")


def base_of(method: str) -> str:
    """Return the base that a method is, or that it is DeepKD over."""
    plain = method.removesuffix(NOMASK)
    return "KD" if plain == "deepkd" else plain.removeprefix("deepkd_").upper()


def masked(method: str) -> bool:
    """Say whether DeepKD has its mask."""
    return not method.endswith(NOMASK)


def twin_of(base: str) -> str:
    """Return the DeepKD method over a base."""
    return "deepkd" if base == "KD" else f"deepkd_{base.lower()}"


def render(tree: dict[str, Any], indent: str = "") -> Iterable[str]:
    """Write the YAML lines of nested mappings with plain values."""
    for name, value in tree.items():
        comment = ""
        if isinstance(value, Commented):
            value, comment = value.value, f" # {value.comment}"
        if isinstance(value, dict):
            yield f"{indent}{name}:"
            yield from render(value, indent + "  ")
        else:
            yield f"{indent}{name}: {_scalar(value)}{comment}"


def _scalar(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_scalar, value))}]"
    if isinstance(value, float):  # without an exponent, which YAML reads as text unless it has a dot and a sign
        text = f"{value:.10f}".rstrip("0")
        return text + "0" if text.endswith(".") else text
    return str(value)


def _cell(dataset: str, folders: Sequence[str], methods: Sequence[str]) -> str:
    """Write the files `dataset/{folders}/{methods}.yaml` in a table."""
    braces = ["{" + ", ".join(names) + "}" if len(names) > 1 else names[0] for names in (folders, methods)]
    return f"`{dataset}/{braces[0]}/{braces[1]}`"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def fill(page: str, tables: dict[str, str]) -> str:
    """Put each table of the page between its marks `<!-- table: NAME -->` and `<!-- end -->`."""
    for name, text in tables.items():
        before, mark, rest = page.partition(f"<!-- table: {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        if not mark or not end:
            raise ValueError(f"the page of docs/ has no table marked {name}")
        page = f"{before}{mark}{text}\n{end}{after}"
    return page


def main(argv: Sequence[str], root: Path = ROOT) -> int:
    """Write, or with --check compare; returns the exit code."""
    if list(argv) not in ([], ["--check"]):
        print(__doc__, file=sys.stderr)
        return 2
    configs = Configs(read_recipes(Path(__file__).with_name("recipes.csv")))
    wanted = {root / "configs" / name: text for name, text in configs.files().items()}
    tables = configs.tables()
    for name, marks in PAGES.items():
        page = root / "docs" / name
        wanted[page] = fill(page.read_text(encoding="utf-8"), {mark: tables[mark] for mark in marks})
    there = {f for dataset in DATASETS for f in (root / "configs" / dataset).rglob("*.yaml")}
    strange = sorted(there - wanted.keys())
    differing = [f for f, t in wanted.items() if not f.is_file() or f.read_text(encoding="utf-8") != t]
    for file in strange:
        print(f"{file.relative_to(root)}: is not one of the files that tools/make_configs.py makes")
    for file in differing:
        if argv:
            print(f"{file.relative_to(root)}: differs from what tools/make_configs.py makes")
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(wanted[file], encoding="utf-8")
    if not argv:
        print(f"{len(differing)} of {len(wanted)} files written")
    return int(bool(strange or (argv and differing)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
