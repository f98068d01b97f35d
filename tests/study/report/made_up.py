"""Made-up tables: folders like those of `deepkd reproduce`, with runs of chosen accuracies."""

import copy
import json
import math
from pathlib import Path

import yaml

VERSIONS = {"torch": "2.15.0", "torchvision": "0.29.2", "numpy": "2.4.6", "deepkd_plugin": "0.1.0"}
CODE, TEACHER = "c0de00000000c0de", "feed00000000feed"
PAIRS = ({"name": "res32x4_res8x4", "teacher": "resnet32x4", "student": "resnet8x4"},)
KD = {"name": "kd", "label": "KD", "base": None}
DEEPKD = {"name": "deepkd", "label": "KD + DeepKD + DTM", "base": "kd"}
MASK = {
    "TYPE": "dynamic",
    "K": 0.5,
    "INITIAL": 0.05,
    "OPTIMAL": 0.5,
    "PHASES": [1 / 3, 2 / 3],
    "READING": "renormalise",
}
CONFIG = {
    "DATASET": {"TYPE": "cifar100", "TRAIN_PER_CLASS": 0, "HOLDOUT": 0.0, "ROOT": "./data"},
    "DISTILLER": {"TYPE": "KD", "TEACHER": "resnet32x4", "STUDENT": "resnet8x4"},
    "SOLVER": {
        "TRAINER": "DecoupledMomentumSGD",
        "BATCH_SIZE": 64,
        "EPOCHS": 240,
        "LR": 0.05,
        "LR_SCHEDULE": "step",
        "AMP": False,
        "SEED": 0,
        "DECOUPLED": {"VARIANT": "paper", "DELTA": {"TOG": 0.0, "TCG": 0.0, "NCG": 0.0, "FEAT": 0.0}},
    },
    "DeepKD": {"BASE": "KD", "MASK": MASK},
    "EXPERIMENT": {"NAME": "", "LOGIT_STAND": False},
    "LOG": {"PREFIX": "out"},
}
DECOUPLED = {"DISTILLER.TYPE": "DeepKD"} | {
    f"SOLVER.DECOUPLED.DELTA.{name}": value for name, value in (("TOG", 0.075), ("TCG", -0.075), ("NCG", 0.075))
}
"""Settings of a run of DeepKD."""


def make_table(folder, accuracies, methods=(KD, DEEPKD), pairs=PAIRS, epochs=4, runs=None, **plan):
    """A table's folder. accuracies: {(pair, method): [last accuracy by seed, None for a run not started]}.

    runs: {(pair, method): keywords of make_run}; plan: other entries of table.json.
    """
    planned = []
    for (pair, method), values in accuracies.items():
        keywords = {"settings": DECOUPLED if method.startswith("deepkd") else {}} | (runs or {}).get((pair, method), {})
        length = keywords.pop("epochs", epochs)
        for seed, last in enumerate(values):
            hash_ = f"{pair}{method}{seed}".encode().hex()[-16:]
            run = {
                "pair": pair,
                "method": method,
                "seed": seed,
                "config": f"configs/{method}.yaml",
                "options": [],
            }
            run |= {"hash": hash_, "epochs": length, "folder": f"runs/{pair}/{method}/seed{seed}-{hash_[:8]}"}
            planned.append(run)
            if last is not None:
                make_run(folder / run["folder"], last, seed, hash_, length, **keywords)
    seeds = max((len(values) for values in accuracies.values()), default=0)
    table = {"table": "cifar100", "dataset": "cifar100", "metric": "top-1 (%)", "seeds": list(range(seeds))}
    table |= {"pairs": list(pairs), "methods": list(methods), "runs": planned}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.json").write_text(json.dumps(table | plan))
    return folder


def make_run(
    folder,
    last,
    seed,
    hash_,
    epochs,
    settings=None,
    curve=None,
    momentum=0.9,
    config=CONFIG,
    key="test_acc",
    **entries,
):
    """A finished run whose best epoch is 0.25 above the last one; entries go into its run.json.

    key: what metrics.jsonl calls the curve; of test_ap, AP50 is 20 above it and AP75 5 below.
    """
    folder.mkdir(parents=True)
    curve = curve or rising(last, epochs)
    momenta = momentum if isinstance(momentum, dict) else dict.fromkeys(("tog", "tcg", "ncg"), momentum)
    lines = [
        {"epoch": epoch, "lr": 0.05 if epoch < epochs else 0.0005, "momentum": momenta, key: value}
        | ({"test_ap50": value + 20, "test_ap75": value - 5} if key == "test_ap" else {})
        | {"execution": "eager, sequential gradients"}
        for epoch, value in enumerate(curve, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    best = max(curve)
    run = {
        "command": "tools/train.py",
        "config_hash": hash_,
        "seed": seed,
        "teacher": TEACHER,
        "teacher_acc": 79.42,
    }
    run |= {
        "minutes": 12.5,
        "finished": True,
        "device": "NVIDIA H200",
        "processor": "AMD EPYC",
        "python": "3.11.7",
    }
    run |= {"versions": VERSIONS, "commit": "ae39fbd", "code": CODE, "started": f"2026-11-23 04:00:{seed:02}"}
    run["result"] = {
        "best": best,
        "best_epoch": curve.index(best) + 1,
        "last": curve[-1],
        "epochs": len(curve),
    }
    (folder / "run.json").write_text(json.dumps(run | entries))
    config = copy.deepcopy(config)
    for key, value in {"SOLVER.SEED": seed, "SOLVER.EPOCHS": epochs, **(settings or {})}.items():
        *parents, leaf = key.split(".")
        node = config
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "log.txt").write_text("epoch 1\n")
    return folder


def rising(last, epochs):
    """A curve that ends at `last` and was 0.25 higher one epoch before."""
    if epochs == 1:
        return [last]
    return [last * (1 - math.exp(-5 * epoch / epochs)) for epoch in range(1, epochs - 1)] + [
        last + 0.25,
        last,
    ]


def change(path, entries):
    """Change entries of a JSON file."""
    Path(path).write_text(json.dumps(json.loads(Path(path).read_text()) | entries))


DETECTION = {
    "table": "glyph_canvas",
    "dataset": "glyph_canvas",
    "metric": "AP (%)",
    "kind": "detection",
    "pairs": [{"name": "res20_res8", "teacher": "fasterrcnn_resnet20_fpn", "student": "fasterrcnn_resnet8_fpn"}],
}
"""Entries of table.json of this package's detectors."""

ON_DETECTRON2 = {
    "table": "coco",
    "dataset": "coco",
    "metric": "AP (%)",
    "kind": "detectron2",
    "pairs": [{"name": "r101_r18", "teacher": "ResNet101", "student": "ResNet18"}],
}
"""Of mdistiller's."""

DETECTRON2_CONFIG = {
    "OUTPUT_DIR": "somewhere",
    "SEED": 0,
    "DATASETS": {"TRAIN": ["coco_2017_train"], "TEST": ["coco_2017_val"]},
    "MODEL": {
        "WEIGHTS": "pretrained/r18-r101.pth",
        "ROI_HEADS": {"BATCH_SIZE_PER_IMAGE": 512, "POSITIVE_FRACTION": 0.25},
    },
    "KD": {"TYPE": "DeepKD", "DEEPKD": {"BASE": "DKD", "MASK": MASK}},
    "SOLVER": {
        "IMS_PER_BATCH": 8,
        "BASE_LR": 0.01,
        "GAMMA": 0.1,
        "STEPS": [120000, 160000],
        "MAX_ITER": 180000,
        "AMP": {"ENABLED": False},
        "DECOUPLED": {"VARIANT": "paper", "DELTA": {"TOG": 0.05, "TCG": -0.05, "NCG": 0.05, "FEAT": 0.0}},
    },
}


def make_detection_table(folder, accuracies, plan=DETECTION, **keywords):
    """As make_table, of APs."""
    plan, pairs = dict(plan), plan["pairs"]
    plan.pop("pairs")
    runs = {cell: {"key": "test_ap", **keywords.get("run", {})} for cell in accuracies}
    if plan["kind"] == "detectron2":
        for cell in accuracies:
            runs[cell] |= {"config": DETECTRON2_CONFIG, "settings": {}, "teacher_acc": None}
    methods = keywords.get("methods", (KD, DEEPKD))
    return make_table(folder, accuracies, methods, pairs, keywords.get("epochs", 4), runs, **plan)
