"""The methods that the article does not have, for the pairs that each one's authors report: make_configs.py's data.

The numbers are those of the authors' files, at the commits that `source` names, and WTTM's those of its article's
tables; they were read in November 2026.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Later:
    """One method on one data set, under the protocol that it was published with.

    method: the files' name. base: its DISTILLER.TYPE. folders: its pairs. nodes: the config nodes that it reads;
    distiller: what stands in DISTILLER beside type and networks. source, notes: for the head of the file. twin: the
    node DeepKD of the file of DeepKD over it, but for base and mask, if there is one; keeps: what that file has of the
    method's own node.
    """

    method: str
    base: str
    title: str
    dataset: str
    folders: tuple[str, ...]
    source: str
    nodes: dict[str, Any]
    distiller: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    twin: dict[str, Any] | None = None
    keeps: dict[str, Any] = field(default_factory=dict)
    batch: int = 64
    epochs: int = 240
    lr: float = 0.05
    slow_lr: float = 0.01
    """Of SLOW_STUDENTS on CIFAR-100."""
    steps: tuple[int, ...] = (150, 180, 210)
    weight_decay: float = 5e-4


_MDISTILLERS_IMAGENET: dict[str, Any] = {
    "batch": 512,
    "epochs": 100,
    "lr": 0.2,
    "steps": (30, 60, 90),
    "weight_decay": 1e-4,
}
_OTHERS_IMAGENET = _MDISTILLERS_IMAGENET | {"batch": 256, "lr": 0.1}

_RLD = "zju-SWJ/RLD, commit d54578f"
_NKD = "yzd-v/cls_KD, commit 1e5d48f"
_DIST = "hunto/image_classification_sota, commit 6f7a70a"
_EA = "cpsu00/EA-KD, commit 6fb4c06"

_RLD_TITLE = "Refined logit distillation"
_DIST_TITLE = "Distillation from a stronger teacher"


def _rld(alpha: float, beta: float, t: float, warmup: int) -> dict[str, Any]:
    """Make what RLD and DeepKD over it say, which weigh the same parts alike."""
    weights = {"CE_WEIGHT": 1.0, "ALPHA": alpha, "BETA": beta}
    twin = {"CE_WEIGHT": 1.0, "TCG_WEIGHT": alpha, "NCG_WEIGHT": beta, "TEMPERATURE": t, "WARMUP": warmup}
    return {
        "nodes": {"RLD": weights | {"ALPHA_T": 1.0, "T": t, "WARMUP": warmup}},
        "twin": twin,
        "keeps": {"RLD": {"ALPHA_T": 1.0}},
    }


_WTTM = {
    "res110_res20": (0.2, 2.0),
    "res110_res32": (0.1, 1.5),
    "res32x4_res8x4": (0.1, 3.0),
    "res32x4_shuv1": (0.2, 1.4),
    "res32x4_shuv2": (0.4, 16.0),
    "res50_mv2": (0.2, 5.0),
    "res56_res20": (0.3, 1.5),
    "vgg13_mv2": (0.2, 3.0),
    "vgg13_vgg8": (0.1, 2.25),
    "wrn40_2_shuv1": (0.3, 3.0),
    "wrn40_2_wrn_16_2": (0.1, 4.0),
    "wrn40_2_wrn_40_1": (0.1, 3.0),
}
"""γ and β of WTTM's tables 8 and 9 by pair of CIFAR-100. ResNet50 to vgg8 (0.1, 2) is no pair of ours."""

_WTTM_IMAGENET = {"r34_r18": (0.8, 1.6), "r50_mv1": (0.7, 3.5)}
"""Those of table 10."""


def _wttm(dataset: str, folder: str, gamma: float, beta: float, tables: str, taken_from: str, **protocol: Any) -> Later:
    """Make what WTTM and DeepKD over it say of a pair; its student has no temperature, which is 1."""
    return Later(
        "wttm",
        "WTTM",
        "Weighted transformed teacher matching",
        dataset,
        (folder,),
        f"Zheng and Yang, ICLR 2024 (arXiv 2402.11148), appendix A.4, {tables}",
        {"WTTM": {"CE_WEIGHT": 1.0, "KD_WEIGHT": beta, "GAMMA": gamma}},
        notes=(f"Protocol: {taken_from}.",),
        twin={"CE_WEIGHT": 1.0, "TCG_WEIGHT": beta, "NCG_WEIGHT": beta, "TEMPERATURE": 1.0},
        keeps={"WTTM": {"GAMMA": gamma}},
        **protocol,
    )


def _entropy(weight: str, temperature: float) -> dict[str, Any]:
    return {"ENTROPY_WEIGHT": weight, "ENTROPY_TEMPERATURE": temperature}


LATER = (
    Later(
        "nkd",
        "NKD",
        "Normalised knowledge distillation",
        "imagenet",
        ("r34_r18", "r50_mv1"),
        f"{_NKD}: configs/distillers/imagenet, schedule imagenet_bs256",
        {"NKD": {"CE_WEIGHT": 1.0, "GAMMA": 1.5, "TEMPERATURE": 1.0}},
        notes=("Its teachers are OpenMMLab's.",),
        twin={"CE_WEIGHT": 1.0, "TCG_WEIGHT": 1.0, "NCG_WEIGHT": 1.5, "TEMPERATURE": 1.0},
        **_OTHERS_IMAGENET,
    ),
    Later(
        "rld",
        "RLD",
        _RLD_TITLE,
        "cifar100",
        (
            *("res110_res20", "res110_res32", "res32x4_res8x4", "res32x4_shuv2", "res32x4_wrn_16_2"),
            *("res32x4_wrn_40_2", "res50_mv2", "res56_res20", "vgg13_mv2", "vgg13_vgg8", "wrn40_2_mv2"),
            *("wrn40_2_res8x4", "wrn40_2_wrn_16_2", "wrn40_2_wrn_40_1"),
        ),
        f"{_RLD}: configs/cifar100/rld, weights of mdistiller/engine/cfg.py",
        notes=("Its README's example for vgg13 to vgg8 adds --same-t, which makes ALPHA_T the T of 4.",),
        **_rld(1.0, 8.0, 4.0, 20),
    ),
    *(
        Later(
            "rld",
            "RLD",
            _RLD_TITLE,
            "imagenet",
            (folder,),
            f"{_RLD}: configs/imagenet/{folder}/rld.yaml",
            **_rld(1.0, beta, 1.0, 1),
            **_MDISTILLERS_IMAGENET,
        )
        for folder, beta in (("r34_r18", 0.5), ("r50_mv1", 2.0))
    ),
    Later(
        "dist",
        "DIST",
        _DIST_TITLE,
        "cifar100",
        ("res32x4_res8x4", "res32x4_shuv1", "res32x4_shuv2", "res50_mv2", "res56_res20", "wrn40_2_wrn_40_1"),
        f"{_DIST}: configs/strategies/distill/dist_cifar.yaml",
        {"DIST": {"CE_WEIGHT": 1.0, "BETA": 2.0, "GAMMA": 2.0, "TEMPERATURE": 4.0}},
    ),
    Later(
        "dist",
        "DIST",
        _DIST_TITLE,
        "imagenet",
        ("r34_r18", "r50_mv1"),
        f"{_DIST}: configs/strategies/distill/resnet_dist.yaml",
        {"DIST": {"CE_WEIGHT": 1.0, "BETA": 2.0, "GAMMA": 2.0, "TEMPERATURE": 1.0}},
        notes=("It has Nesterov's momentum and decays neither biases nor norms; here both are as in the other files.",),
        **_OTHERS_IMAGENET,
    ),
    Later(
        "kd_ea",
        "KD",
        "KD, samples weighted by entropy (EA-KD)",
        "cifar100",
        ("res32x4_res8x4",),
        f"{_EA}: configs/cifar100/EA/kd.yaml",
        {"KD": {"TEMPERATURE": 4, "LOSS": {"CE_WEIGHT": 0.1, "KD_WEIGHT": 0.9}}},
        _entropy("release", 3.0),
    ),
    Later(
        "dkd_ea",
        "DKD",
        "DKD, samples weighted by entropy (EA-KD)",
        "cifar100",
        ("res32x4_res8x4",),
        f"{_EA}: configs/cifar100/EA/dkd.yaml",
        {"DKD": {"CE_WEIGHT": 1.0, "ALPHA": 1.0, "BETA": 8.0, "T": 4.0, "WARMUP": 20}},
        _entropy("release", 3.0),
    ),
    Later(
        "mlkd_ea",
        "MLKD",
        "MLKD, samples weighted by entropy (EA-KD)",
        "cifar100",
        ("res32x4_res8x4",),
        f"{_EA}: configs/cifar100/EA/mld.yaml",
        {
            "MLKD": {
                "CE_WEIGHT": 0.1,
                "KD_WEIGHT": 0.9,
                "TEMPERATURES": [2.0, 3.0, 4.0, 5.0, 6.0],
                "VARIANT": "formula",
            }
        },
        _entropy("formula", 3.0),
        notes=("Its code divides by log 100 over MLKD, as the formula does.",),
        epochs=480,
        lr=0.025,
    ),
    Later(
        "kd_ea",
        "KD",
        "KD, samples weighted by entropy (EA-KD)",
        "imagenet",
        ("r34_r18",),
        f"{_EA}: configs/imagenet/r34_r18/EA/kd.yaml",
        {"KD": {"TEMPERATURE": 1, "LOSS": {"CE_WEIGHT": 1.0, "KD_WEIGHT": 0.5}}},
        _entropy("formula", 2.0),
        **_MDISTILLERS_IMAGENET,
    ),
    Later(
        "dkd_ea",
        "DKD",
        "DKD, samples weighted by entropy (EA-KD)",
        "imagenet",
        ("r34_r18",),
        f"{_EA}: configs/imagenet/r34_r18/EA/dkd.yaml",
        {"DKD": {"CE_WEIGHT": 1.0, "ALPHA": 1.0, "BETA": 0.5, "T": 1.0, "WARMUP": 1}},
        _entropy("formula", 2.0),
        notes=("That file's temperature of the weight is 2; its code reads it over KD alone, and takes 3 here.",),
        **_MDISTILLERS_IMAGENET,
    ),
    *(
        _wttm("cifar100", folder, gamma, beta, "tables 8 and 9", "zkxufo/TTM, train_student.py")
        for folder, (gamma, beta) in _WTTM.items()
    ),
    *(
        _wttm("imagenet", folder, gamma, beta, "table 10", "torchdistill's for KD", **_OTHERS_IMAGENET)
        for folder, (gamma, beta) in _WTTM_IMAGENET.items()
    ),
)
