"""The config of mdistiller's detection branch with our keys: what it holds, what it refuses."""

import pytest

from deepkd_plugin.config.tree import flatten
from deepkd_plugin.errors import UserError

PAIRS = ("R18-R101", "R50-R101", "MV2-R50")
METHODS = ("KD-{}", "DKD-{}", "DeepKD-{}", "DeepKD-{}-noDTM", "ReviewDeepKD-{}")


@pytest.fixture
def d2(host):
    from deepkd_plugin.detection.detectron2 import config

    return config


def read(d2, file, *options):
    cfg, origin = d2.load(file, options)
    d2.check(cfg, origin)
    return cfg


@pytest.mark.parametrize("pair", PAIRS)
def test_ours_are_mdistiller_s_with_the_keys_that_differ(d2, configs, pair):
    theirs = flatten(read(d2, configs.parent / f"DKD/DKD-{pair}.yaml"))
    ours = {method: flatten(read(d2, configs / f"{method.format(pair)}.yaml")) for method in METHODS}
    assert {file.stem for file in configs.glob(f"*{pair}*")} == {method.format(pair) for method in METHODS}

    def differing(method):
        keys = {key for key, value in ours[method].items() if theirs[key] != value}
        return keys - {"OUTPUT_DIR", "SEED", "MODEL.META_ARCHITECTURE", "TEST.EVAL_PERIOD"}

    deltas = {f"SOLVER.DECOUPLED.DELTA.{stream}" for stream in ("TOG", "TCG", "NCG")}
    assert differing("DKD-{}") == set()
    assert differing("KD-{}") == {"KD.TYPE"}
    assert differing("DeepKD-{}") == deltas | {"KD.TYPE"}
    assert differing("DeepKD-{}-noDTM") == deltas | {"KD.TYPE", "KD.DEEPKD.MASK.TYPE"}
    review = differing("ReviewDeepKD-{}") - {"KD.REVIEWKD.LOSS_WEIGHT"}
    assert review == deltas | {"KD.TYPE", "SOLVER.DECOUPLED.DELTA.FEAT"}
    of_review = flatten(read(d2, configs.parent / f"DKD/ReviewDKD-{pair}.yaml"))
    assert ours["ReviewDeepKD-{}"]["KD.REVIEWKD.LOSS_WEIGHT"] == of_review["KD.REVIEWKD.LOSS_WEIGHT"]
    assert len({values["OUTPUT_DIR"] for values in ours.values()}) == len(METHODS)


def test_the_teacher_has_today_s_keys_and_theirs(d2):
    from detectron2.config import get_cfg

    cfg = get_cfg()
    d2.add_deepkd_config(cfg)
    today = flatten(get_cfg())
    teacher = flatten(cfg.TEACHER)
    assert {key: teacher[key] for key in today} == today
    assert teacher.keys() - today.keys() == {
        "KD.FEATURE_KD_MASK",
        *(f"MODEL.MOBILENETV2.{key}" for key in ("DEBUG", "OUT_FEATURES", "NORM")),
    }
    cfg.MODEL.MOBILENETV2.NORM = "BN"
    assert cfg.TEACHER.MODEL.MOBILENETV2.NORM == "FrozenBN"


def test_defaults_are_plain_momentum_and_mdistiller_s_weights(d2, configs):
    cfg = read(d2, configs / "DKD-R18-R101.yaml")
    assert d2.momenta(cfg) == ({"tog": 0.9}, "tog")
    node = cfg.KD.DEEPKD
    assert (node.TCG_WEIGHT, node.NCG_WEIGHT, node.T) == (cfg.KD.DKD.ALPHA, cfg.KD.DKD.BETA, cfg.KD.DKD.T)
    cfg = read(d2, configs / "DKD-R18-R101.yaml", "KD.TYPE", "ReviewDeepKD")
    assert d2.momenta(cfg) == (dict.fromkeys(("tog", "tcg", "ncg", "feat"), 0.9), "tcg")


def test_momenta_mean_what_they_mean_in_classification(d2, configs):
    file = configs / "ReviewDeepKD-R18-R101.yaml"
    momentum, decay = d2.momenta(read(d2, file, "SOLVER.DECOUPLED.WEIGHT_DECAY_STREAM", "ncg"))
    assert momentum == pytest.approx({"tog": 0.95, "tcg": 0.85, "ncg": 0.95, "feat": 0.95})
    assert decay == "ncg"
    momentum, decay = d2.momenta(read(d2, file, "SOLVER.DECOUPLED.VARIANT", "release"))
    assert momentum == pytest.approx({"tog": 0.85, "tcg": 0.85, "ncg": 0.95, "feat": 0.95})
    assert decay == "tcg"
    # the architecture of mdistiller's own has one stream
    own = ("MODEL.META_ARCHITECTURE", "RCNNKD", "KD.TYPE", "ReviewDKD")
    assert d2.streams(read(d2, configs / "DKD-R18-R101.yaml", *own)) == ("tog",)


def test_whole_numbers_stand_for_floats(d2, configs, tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(f"_BASE_: {configs / 'DeepKD-R18-R101.yaml'}\nKD:\n  DEEPKD:\n    MASK: {{OPTIMAL: 40}}\n")
    cfg = read(d2, file, "SOLVER.BASE_LR", "1", "KD.DEEPKD.T", "4", "SOLVER.WEIGHT_DECAY_BIAS", "0.0")
    assert (cfg.KD.DEEPKD.MASK.OPTIMAL, cfg.SOLVER.BASE_LR, cfg.KD.DEEPKD.T) == (40.0, 1.0, 4.0)
    assert cfg.SOLVER.WEIGHT_DECAY_BIAS == 0.0


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        (
            "KD.TYPE DeepKd",
            "command line: KD.TYPE is 'DeepKd'; it must be one of DKD, ReviewKD, ReviewDKD, KD",
        ),
        ("KD.DEEPKD.T 0", "KD.DEEPKD.T is 0.0; it must be a number from 0.01 to 100,000"),
        ("KD.DEEPKD.BASE MLKD", "KD.DEEPKD.BASE is 'MLKD'; it must be one of KD, DKD"),
        ("KD.DEEPKD.NCG_WEIGHT -1.0", "KD.DEEPKD.NCG_WEIGHT is -1.0; it must be a number from 0 on"),
        (
            "KD.DEEPKD.MASK.PHASES (0.5,0.4)",
            "KD.DEEPKD.MASK.PHASES is (0.5, 0.4); it must be two ends in order",
        ),
        (
            "KD.DEEPKD.MASK.OPTIMAL 200",
            "command line: KD.DEEPKD.MASK.OPTIMAL: K must be an integer from 1 to 80",
        ),
        ("KD.DEEPKD.MASK.INITIAL 0.9", "command line: KD.DEEPKD.MASK.INITIAL is 0.9 (73 classes)"),
        ("SOLVER.DECOUPLED.DELTA.TOG 0.1", "SOLVER.DECOUPLED.DELTA.TOG is 0.1; it must be in [-0.9, 0.1)"),
        (
            "SOLVER.DECOUPLED.DELTA.FEAT 0.05",
            "DELTA.FEAT is 0.05; it must be 0.0 with KD.TYPE DeepKD on RCNNDeepKD",
        ),
        ("KD.TYPE DKD", "SOLVER.DECOUPLED.DELTA.TOG is 0.05; it must be 0.0 with KD.TYPE DKD"),
        (
            "MODEL.META_ARCHITECTURE RCNNKD",
            "MODEL.META_ARCHITECTURE is 'RCNNKD'; it must be RCNNDeepKD with KD.TYPE DeepKD",
        ),
        (
            "TEACHER.MODEL.ROI_HEADS.NUM_CLASSES 20",
            "command line: TEACHER.MODEL.ROI_HEADS.NUM_CLASSES is 20; it must be 80, the student's",
        ),
        ("SOLVER.NESTEROV True", "SOLVER.NESTEROV is True; it must be False"),
        ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE all", "it must be one of value, norm, full_model"),
        ("SOLVER.BASE_LR nan", "SOLVER.BASE_LR"),
        ("SOLVER.MAX_ITER 0", "SOLVER.MAX_ITER is 0; it must be a whole number from 1 to 1,000,000"),
        (
            "SOLVER.AMP.ENABLED True MODEL.DEVICE cpu",
            "SOLVER.AMP.ENABLED is True; it must be False with MODEL.DEVICE",
        ),
        (
            "KD.DEEPKD.NOPE 1",
            "command line: unknown config key KD.DEEPKD.NOPE; did you mean ",
        ),
        (
            "SOLVER.MAX_ITER many",
            "command line: SOLVER.MAX_ITER is 'many' (str); it must be int, like 180000",
        ),
        ("SOLVER.MAX_ITER", "command line: options come in pairs KEY VALUE, 'SOLVER.MAX_ITER' has no value"),
    ],
)
def test_bad_values(d2, configs, pairs, expected):
    with pytest.raises(UserError) as caught:
        read(d2, configs / "DeepKD-R18-R101.yaml", *pairs.split())
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("_BASE_: gone.yaml\n", "_BASE_ is 'gone.yaml'; it must name a config file"),
        ("_BASE_: a.yaml\n", "_BASE_ is 'a.yaml'; it must name a config file, with 10 above it at most"),
        ("_BASE_: 3\n", "_BASE_ is 3; it must name a config file"),
        ("- 1\n", "must hold a YAML mapping of config keys, holds list"),
        ("", "must hold a YAML mapping of config keys, holds NoneType"),
        ("KD: [\n", "line 2: is not valid YAML"),
        ("KD: {}\nKD: {}\n", "line 2: is not valid YAML ('KD' stands in line 1 already)"),
        ("KD: !!python/object/apply:os.getcwd []\n", "line 1: is not valid YAML (could not determine a constructor"),
        ("KD:\n  NOPE: 1\n", "unknown config key KD.NOPE"),
        ("KD: 1\n", "KD is 1; it is a section and must hold keys: "),
        ("VERSION: 1\n", "VERSION is 1; it must be 2"),
        ("KD:\n  TYPE: nope\n", "KD.TYPE is 'nope'; it must be one of"),
    ],
)
def test_bad_files(d2, tmp_path, text, expected):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        read(d2, file)
    assert str(caught.value).startswith(f"{file}: ")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_missing(d2, tmp_path):
    with pytest.raises(UserError, match=r"gone.yaml: cannot be read as a config file"):
        d2.load(tmp_path / "gone.yaml")
