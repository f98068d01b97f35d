from pathlib import Path

import pytest
import yaml
from yacs.config import CfgNode

from deepkd_plugin import config
from deepkd_plugin.config.keys import PATHS
from deepkd_plugin.config.tree import nest
from deepkd_plugin.detection.keys import DETECTION_KEYS
from deepkd_plugin.distillers.variants import variant
from deepkd_plugin.errors import UserError
from deepkd_plugin.hosts import builtin
from deepkd_plugin.hosts import mdistiller as mdistiller_host
from deepkd_plugin.run.record import config_hash
from deepkd_plugin.run.schedule import lr_factor
from deepkd_plugin.terminal import warn
from deepkd_plugin.trainer import Trainer

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture
def cfg():
    tree = builtin.CFG.clone()
    config.add_deepkd_config(tree)
    return tree


def checked(cfg, tmp_path, text, *options):
    file = tmp_path / "some.yaml"
    file.write_text(text)
    origin = config.load(cfg, file, options)
    config.check(cfg, origin)
    return cfg


def message(cfg, tmp_path, text, *options):
    with pytest.raises(UserError) as caught:
        checked(cfg, tmp_path, text, *options)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(tmp_path / "some.yaml"), "some.yaml")


def test_every_key_has_its_default_and_is_valid(cfg):
    config.check(cfg, {})
    for key in config.all_keys():
        assert config.get(cfg, key.path) == (None if key.path in config.CHOICES else key.default)
        assert key.valid(key.default), key.path
        assert key.meaning


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("SOLVER: {WARMUP_EPOCHS: 1}", ["SOLVER.WARMUP_EPOCHS"]),
        ("DISTILLER: {TYPE: DKD}\nDKD: {WARMUP: 1}", ["DKD.WARMUP"]),
        ("DISTILLER: {TYPE: DeepKD}\nDeepKD: {WARMUP: 1}\nSOLVER: {WARMUP_EPOCHS: 1}", ["SOLVER.WARMUP_EPOCHS",
         "DeepKD.WARMUP"]),
        ("DISTILLER: {TYPE: KD}\nDKD: {WARMUP: 1}", []),  # not this method's
        ("SOLVER: {WARMUP_EPOCHS: 2}", []),
        ("SOLVER: {WARMUP_EPOCHS: 0}", []),
        ("SOLVER: {WARMUP_EPOCHS: 1, LR_SCHEDULE: cosine}", []),  # the cosine begins an epoch later
        ("SOLVER: {WARMUP_EPOCHS: 1, WARMUP_UNIT: iteration}", []),
    ],
)  # fmt: skip
def test_a_warm_up_without_effect_is_told_once(cfg, tmp_path, capsys, text, keys):
    for _ in range(2):
        checked(cfg.clone(), tmp_path, text)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.replace(str(tmp_path / "some.yaml"), "some.yaml").splitlines()
    assert [line.split(" is ")[0] for line in lines] == [f"deepkd: warning: some.yaml: {key}" for key in keys]
    assert all("which changes nothing" in line for line in lines)


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "configs/glyphs100").rglob("*.yaml")))
def test_no_config_of_ours_warms_up_in_vain(cfg, path, capsys):
    config.check(cfg, config.load(cfg, path, []))
    assert capsys.readouterr().err == ""


def test_the_unit_of_warm_up_is_one_of_two(cfg, tmp_path):
    line = "some.yaml: SOLVER.WARMUP_UNIT is 'step'; it must be one of epoch, iteration"
    assert message(cfg, tmp_path, "SOLVER: {WARMUP_UNIT: step}") == line


def test_a_home_is_put_in_the_place_of_its_sign_in_every_path(cfg, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/学 生")
    config.add_keys(cfg, DETECTION_KEYS)
    files = [key.path for key in (*config.all_keys(), *config.HOST_KEYS, *DETECTION_KEYS) if "path of a" in key.allowed]
    assert sorted(files) == sorted(path for path in PATHS if path not in ("MODEL.WEIGHTS", "OUTPUT_DIR"))
    merged = cfg.clone()
    checked(cfg, tmp_path, "LOG: {PREFIX: ~/out}\nDATASET: {ROOT: ./~/x}")
    assert (cfg.LOG.PREFIX, cfg.DATASET.ROOT) == ("/home/学 生/out", "./~/x")
    for path in files:
        config.load(cfg, tmp_path / "some.yaml", [path, "~/a b"])
        assert config.get(cfg, path) == "/home/学 生/a b"
        config.set_default(merged, path, "~/a b")
    config.expand(merged)
    assert {config.get(merged, path) for path in files} == {"/home/学 生/a b"}
    config.load(cfg, tmp_path / "some.yaml", ["EXPERIMENT.TAG", "~/a"])
    assert cfg.EXPERIMENT.TAG == "~/a"


def test_adding_keys_is_idempotent_and_keeps_what_is_there():
    cfg = CfgNode({"SOLVER": {"SEED": 7}})
    added = config.add_deepkd_config(cfg)
    assert cfg.SOLVER.SEED == 7
    assert "SOLVER.SEED" not in added
    assert len(added) == len(config.all_keys()) - 1
    cfg.freeze()
    assert config.add_deepkd_config(cfg) == []
    assert cfg.is_frozen()


def test_values_come_from_the_file_and_then_from_the_options(cfg, tmp_path):
    text = "SOLVER: {LR: 1, LR_DECAY_STAGES: [1, 2]}\nDeepKD: {MASK: {K: 7, PHASES: [0.2, 0.4]}}\n"
    checked(cfg, tmp_path, text, "SOLVER.EPOCHS", "9", "EXPERIMENT.NAME", "17", "SOLVER.WEIGHT_DECAY", "5e-4")
    assert cfg.SOLVER.LR == 1.0
    assert isinstance(cfg.SOLVER.LR, float)
    assert (cfg.SOLVER.EPOCHS, cfg.EXPERIMENT.NAME, cfg.SOLVER.WEIGHT_DECAY) == (9, "17", 5e-4)
    assert cfg.DeepKD.MASK.PHASES == (0.2, 0.4)
    assert cfg.SOLVER.LR_DECAY_STAGES == [1, 2]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "SOLVER: {GRADIENTS: auto}",
            "some.yaml: SOLVER.GRADIENTS is no longer a config key, backward passes are made in turn, which was the "
            "faster way; leave it out",
        ),
        ("SOLVER: {LRR: 1}", "some.yaml: unknown config key SOLVER.LRR; did you mean SOLVER.LR?"),
        ("SOLVER: {lr: 1}", "some.yaml: unknown config key SOLVER.lr; did you mean SOLVER.LR?"),
        ("WARMUP_EPOCHS: 1", "some.yaml: unknown config key WARMUP_EPOCHS; did you mean SOLVER.WARMUP_EPOCHS?"),
        ("KD: {LOSS: {KD_WEIGHT: -1}}", "some.yaml: KD.LOSS.KD_WEIGHT is -1.0; it must be a number from 0 on"),
        ("DKD: {BETA: -1}", "some.yaml: DKD.BETA is -1.0; it must be a number from 0 on"),
        (
            "DeepKD: {MASK: {K: 1.0}}",
            "some.yaml: DeepKD.MASK.K is 1.0; it must be a fraction of the classes in (0, 1), or a whole number of "
            "classes from 2 on; 1 could be either",
        ),
        (
            "DeepKD: {MASK: 3}",
            "some.yaml: DeepKD.MASK is 3; it is a section and must hold keys: TYPE, K, INITIAL, OPTIMAL, PHASES, "
            "UNIT, READING",
        ),
        ("SOLVER.LR: 0.1", "some.yaml: unknown config key SOLVER.LR; did you mean SOLVER.LR?"),
        ("DeepKDD: {}", "some.yaml: unknown config key DeepKDD; did you mean DeepKD.BASE?"),
        ("SOLVER: {LR: .inf}", "some.yaml: SOLVER.LR is inf; it must be a finite number"),
        (
            "LOG: {SAVE_CHECKPOINT_FREQ: 0}",
            "some.yaml: LOG.SAVE_CHECKPOINT_FREQ is 0; it must be a whole number from 1 to 1,000,000,000",
        ),
        (
            "SOLVER: {LR_DECAY_RATE: -1.0}",
            "some.yaml: SOLVER.LR_DECAY_RATE is -1.0; it must be a number in (0, 1]",
        ),
        ("SOLVER: {LR: '{[]: 1}'}", "some.yaml: SOLVER.LR is '{[]: 1}' (str); it must be float, like 0.05"),
        ("SOLVER: {LR: fast}", "some.yaml: SOLVER.LR is 'fast' (str); it must be float, like 0.05"),
        ("SOLVER: {EPOCHS: 2.5}", "some.yaml: SOLVER.EPOCHS is 2.5 (float); it must be int, like 240"),
        ("SOLVER: {AMP: 1}", "some.yaml: SOLVER.AMP is 1; it must be True, False or float16"),
        ("SOLVER: {EPOCHS: true}", "some.yaml: SOLVER.EPOCHS is True (bool); it must be int, like 240"),
        ("SOLVER: {LR: 0}", "some.yaml: SOLVER.LR is 0.0; it must be a number above 0"),
        ("SOLVER: {LR: .nan}", "some.yaml: SOLVER.LR is nan; it must be a number above 0"),
        (
            "SOLVER: {DECOUPLED: {DELTA: {TOG: 0.1}}}",
            "some.yaml: SOLVER.DECOUPLED.DELTA.TOG is 0.1; it must be in [-0.9, 0.1), so that SOLVER.MOMENTUM "
            "0.9 plus it is in [0, 1)",
        ),
        (
            "SOLVER: {MOMENTUM: 0.05, DECOUPLED: {DELTA: {TCG: -0.075}}}",
            "some.yaml: SOLVER.DECOUPLED.DELTA.TCG is -0.075; it must be in [-0.05, 0.95), so that "
            "SOLVER.MOMENTUM 0.05 plus it is in [0, 1)",
        ),
        (
            "SOLVER: {DECOUPLED: {WEIGHT_DECAY_STREAM: kd}}",
            "some.yaml: SOLVER.DECOUPLED.WEIGHT_DECAY_STREAM is 'kd'; it must be one of variant, "
            "matched, tog, tcg, ncg",
        ),
        (
            "SOLVER: {DECOUPLED: {LOSS_STREAMS: ['loss_kd:kd']}}",
            "some.yaml: SOLVER.DECOUPLED.LOSS_STREAMS is ['loss_kd:kd']; it must be a list of 'loss:stream' "
            "with a stream of tog, tcg, ncg, feat",
        ),
        (
            "DeepKD: {MASK: {PHASES: [0.6, 0.4]}}",
            "some.yaml: DeepKD.MASK.PHASES is (0.6, 0.4); it must be two ends in order, 0 <= phi1 < phi2 <= 1",
        ),
        (
            "DeepKD: {BASE: CRDD}",
            "some.yaml: DeepKD.BASE is 'CRDD'; it must be one of KD, DKD, MLKD, CRLD, NKD, RLD, WTTM; "
            "did you mean CRLD?",
        ),
        (
            "DeepKD: {MASK: {K: 0}}",
            "some.yaml: DeepKD.MASK.K is 0.0; it must be a fraction of the classes in (0, 1), or a whole "
            "number of classes from 2 on; 1 could be either",
        ),
        (
            "SOLVER: {LR_DECAY_STAGES: [180, 150]}",
            "some.yaml: SOLVER.LR_DECAY_STAGES is [180, 150]; it must be epochs in ascending order",
        ),
        (
            "SOLVER: {LR_DECAY_STAGES: [-5, 150]}",
            "some.yaml: SOLVER.LR_DECAY_STAGES is [-5, 150]; it must be epochs in ascending order",
        ),
        (
            "SOLVER: {MIN_LR: 1.0}",
            "some.yaml: SOLVER.MIN_LR is 1.0; it must be at most SOLVER.LR, 0.05",
        ),
        (
            "SOLVER: {LR_SCHEDULE: cosine, WARMUP_EPOCHS: 241}",
            "some.yaml: SOLVER.WARMUP_EPOCHS is 241; it must be at most SOLVER.EPOCHS, 240, with the cosine schedule",
        ),
        ("GSNR: {EVERY: 0}", "some.yaml: GSNR.EVERY is 0; it must be a whole number from 1 to 1,000,000"),
        ("GSNR: {WINDOW: 1}", "some.yaml: GSNR.WINDOW is 1; it must be a whole number from 2 to 1,000,000"),
        (
            "GSNR: {COORDINATES: -1}",
            "some.yaml: GSNR.COORDINATES is -1; it must be a whole number from 0 to 1,000,000,000",
        ),
        ("GSNR: {MEASURE: 1}", "some.yaml: GSNR.MEASURE is 1 (int); it must be bool, like False"),
        (
            "SOLVER: {DECOUPLED: {ALLOCATION: measured}}",
            "some.yaml: SOLVER.DECOUPLED.ALLOCATION is 'measured'; it must be one of fixed, gsnr",
        ),
        (
            "SOLVER: {DECOUPLED: {SEPARATION: 1}}",
            "some.yaml: SOLVER.DECOUPLED.SEPARATION is 1.0; it must be a number above 1",
        ),
        (
            "SOLVER: {DECOUPLED: {SMOOTHING: 1}}",
            "some.yaml: SOLVER.DECOUPLED.SMOOTHING is 1.0; it must be a number in [0, 1)",
        ),
        ("- 1", "some.yaml: must hold a YAML mapping of config keys, holds list"),
        ("", "some.yaml: must hold a YAML mapping of config keys, holds NoneType"),
    ],
)
def test_one_line_names_file_key_value_and_what_is_allowed(cfg, tmp_path, text, expected):
    assert message(cfg, tmp_path, text) == expected


NAMES = ["EXPERIMENT.PROJECT", "EXPERIMENT.NAME", "EXPERIMENT.TAG"]
FOLDERS = ["LOG.PREFIX", "DATASET.ROOT"]


@pytest.mark.parametrize("key", NAMES)
def test_names_that_would_leave_their_folder(cfg, tmp_path, key):
    for name in (".", "..", "../x", "/etc", "a/../../b", "a//b", "a/", "/", "x" * 256, "é" * 128):
        line = message(cfg.clone(), tmp_path, "{}", key, name)
        assert line.startswith(f"command line: {key} is '")
        assert "; it must be a name for a folder below LOG.PREFIX: parts of at most 255 bytes" in line
    for name in ("a", "a/b", "..a", "a,b:c", "é" * 127, "~", "a b"):
        checked(cfg.clone(), tmp_path, "{}", key, name)


def test_which_path_keys_may_be_empty(cfg, tmp_path):
    for key in (*NAMES, *FOLDERS, "DISTILLER.TEACHER_WEIGHTS"):
        if key in ("EXPERIMENT.NAME", "DISTILLER.TEACHER_WEIGHTS"):
            checked(cfg.clone(), tmp_path, "{}", key, "")
        else:
            assert f"command line: {key} is ''; it must be " in message(cfg.clone(), tmp_path, "{}", key, "")


@pytest.mark.parametrize("key", [*NAMES, *FOLDERS, "DISTILLER.TEACHER_WEIGHTS", "DISTILLER.STUDENT"])
def test_text_that_no_file_s_name_can_be(cfg, tmp_path, key):
    section, leaf = key.split(".")
    for text, seen in (("a\\0b", r"a\x00b"), ("a\\ud800", r"a\ud800"), ("a\\nb", r"a\nb"), ("x" * 5000, "xxx")):
        line = message(cfg.clone(), tmp_path, f'{section}: {{{leaf}: "{text}"}}')
        assert line.startswith(f"some.yaml: {key} is '")
        assert seen in line
        assert len(line) < 500
    assert "EXPERIMENT.NAME is 'a\\x00'; it must be text that can be printed" in message(
        cfg, tmp_path, "{}", "EXPERIMENT.NAME", "a\0"
    )


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("SOLVER.BATCH_SIZE", 10**12, "a whole number from 1 to 65,536"),
        ("DATASET.TEST.BATCH_SIZE", 65_537, "a whole number from 1 to 65,536"),
        ("DATASET.NUM_WORKERS", 10**6, "a whole number from 0 to 256"),
        ("SOLVER.EPOCHS", 10**30, "a whole number from 1 to 1,000,000"),
        ("SOLVER.WARMUP_EPOCHS", 10**7, "a whole number from 0 to 1,000,000"),
        ("SOLVER.SEED", 2**63, "a number of 64 bits"),
        ("DATASET.TRAIN_PER_CLASS", 10**19, "a number of 64 bits"),
        ("DeepKD.MASK.K", 10**400, "float, like 0.5"),
        ("CRD.NCE.K", 10**12, "a whole number from 1 to 1,000,000"),
        ("CRD.FEAT.DIM", 10**30, "a number of 64 bits"),
        ("KD.TEMPERATURE", 10**400, "a number from 0.01 to 100,000"),
        ("DKD.T", "1e400", "a number from 0.01 to 100,000"),
        ("CRLD.TEMPERATURE", 1e-9, "a number from 0.01 to 100,000"),
        ("DeepKD.TEMPERATURE", "1e6", "a number from 0.01 to 100,000"),
        ("MLKD.TEMPERATURES", "[2.0, 1e400]", "a list of 1 to 20 numbers from 0.01 to 100,000"),
        ("MLKD.TEMPERATURES", str([2.0] * 21), "a list of 1 to 20 numbers from 0.01 to 100,000"),
        ("SOLVER.LR", "1e400", "a finite number"),
        ("KD.LOSS.KD_WEIGHT", "1e400", "a finite number"),
        ("FITNET.INPUT_SIZE", "[1e400]", "text that can be printed, a finite number of 64 bits"),
        ("REVIEWKD.SHAPES", str([1] * 1001), "text that can be printed, a finite number of 64 bits"),
        ("REVIEWKD.SHAPES", "[[[[1]]]]", "text that can be printed, a finite number of 64 bits"),
    ],
)
def test_numbers_that_nothing_can_have(cfg, tmp_path, key, value, allowed):
    line = message(cfg, tmp_path, "{}", key, str(value))
    assert line.startswith(f"command line: {key} is ")
    assert f"; it must be {allowed}" in line or f"); it must be {allowed}" in line
    assert len(line) < 500


@pytest.mark.parametrize("phases", ["[a, b]", "[null, 0.2]", "[[0.1], 0.2]", "[false, true]", "[0.1]", "[0.1, .nan]"])
def test_phases_of_other_things_than_numbers(cfg, tmp_path, phases):
    assert "it must be two ends in order" in message(cfg, tmp_path, f"DeepKD: {{MASK: {{PHASES: {phases}}}}}")


def test_the_command_line_is_named_too(cfg, tmp_path):
    assert message(cfg, tmp_path, "SOLVER: {LR: 0.1}", "SOLVER.LR", "-1").startswith("command line: SOLVER.LR is -1")
    assert "come in pairs KEY VALUE, 'SOLVER.LR' has no value" in message(cfg, tmp_path, "{}", "SOLVER.LR")


def test_files_that_cannot_be_read(cfg, tmp_path):
    assert "is not valid YAML" in message(cfg, tmp_path, "a: [")
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(UserError, match="cannot be read as a config file"):
            config.load(cfg, path)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ({"TYPE": "static", "K": 100.0}, "f.yaml: DeepKD.MASK.K: K must be an integer from 1 to 99"),
        (
            {"TYPE": "dynamic", "OPTIMAL": 100.0},
            "f.yaml: DeepKD.MASK.OPTIMAL: K must be an integer from 1 to 99",
        ),
        (
            {"TYPE": "dynamic", "INITIAL": 100.0},
            "f.yaml: DeepKD.MASK.INITIAL: K must be an integer from 1 to 99",
        ),
        (
            {"TYPE": "dynamic", "INITIAL": 60.0},
            r"f.yaml: DeepKD.MASK.INITIAL is 60.0 \(60 classes\) and DeepKD.MASK.OPTIMAL 0.5 \(50\)",
        ),
        (
            {"TYPE": "top_p", "INITIAL": 0.6},
            "f.yaml: DeepKD.MASK.INITIAL is 0.6 and DeepKD.MASK.OPTIMAL 0.5; the mask must not shrink",
        ),
        (
            {"TYPE": "top_p", "OPTIMAL": 50.0},
            r"f.yaml: DeepKD.MASK.OPTIMAL is 50.0; it must be a share of the teacher's non-target mass in \(0, 1\)",
        ),
    ],
)
def test_masks_that_do_not_fit_the_classes(cfg, mask, expected):
    cfg.DeepKD.MASK.update(mask)
    with pytest.raises(UserError, match=expected):
        config.check_mask(cfg, {f"DeepKD.MASK.{key}": "f.yaml" for key in mask}, 100)
    cfg.DeepKD.MASK.TYPE = "none"
    config.check_mask(cfg, {}, 100)


def test_variants_of_the_momenta(cfg):
    cfg.SOLVER.DECOUPLED.DELTA.update({"TOG": 0.075, "TCG": -0.075, "NCG": 0.05})
    momentum, stream = config.momenta(cfg)
    assert momentum == pytest.approx({"tog": 0.975, "tcg": 0.825, "ncg": 0.95})
    assert stream == "tcg"
    cfg.SOLVER.DECOUPLED.WEIGHT_DECAY_STREAM = "tog"
    assert config.momenta(cfg)[1] == "tog"
    cfg.SOLVER.DECOUPLED.VARIANT = "release"
    momentum, stream = config.momenta(cfg)
    assert momentum == pytest.approx({"tog": 0.825, "tcg": 0.825, "ncg": 0.95})
    assert stream == "tog"


ASSIGNED = {"SOLVER.DECOUPLED.DAMPENING": 0, "SOLVER.DECOUPLED.WEIGHT_DECAY_STREAM": 1, "DeepKD.MASK.READING": 2}


@pytest.mark.parametrize(
    ("name", "assigned"),
    [
        ("article", ("ema", "tcg", "multiply")),
        ("paper", ("none", "tcg", "renormalise")),
        ("release", ("none", "tcg", "renormalise")),
    ],
)
def test_a_variant_assigns_what_no_key_says(cfg, name, assigned):
    cfg.SOLVER.DECOUPLED.VARIANT = name
    assert variant(cfg)[:3] == assigned
    written = cfg.clone()
    for key, place in ASSIGNED.items():
        config.tree.set_default(written, key, assigned[place])
    assert config_hash(cfg) == config_hash(written)
    assert config.dampening(cfg) == config.dampening(written)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("SOLVER.DECOUPLED.DAMPENING", "matched"),
        ("SOLVER.DECOUPLED.WEIGHT_DECAY_STREAM", "ncg"),
        ("DeepKD.MASK.READING", "renormalise"),
    ],
)
def test_a_key_overrides_its_variant_and_no_other(cfg, key, value):
    cfg.SOLVER.DECOUPLED.VARIANT = "article"
    before = variant(cfg)[:3]
    unlike = config_hash(cfg)
    config.tree.set_default(cfg, key, value)
    after = variant(cfg)[:3]
    assert [a != b for a, b in zip(before, after)] == [place == ASSIGNED[key] for place in range(3)]
    assert config_hash(cfg) != unlike


def test_any_number_of_workers_gives_the_same_run(cfg):
    """tests/datasets/test_draws.py shows that it does. The hash is that of runs without workers, as it was."""
    hashes = []
    for cfg.DATASET.NUM_WORKERS in (0, 2, 16):
        hashes.append(config_hash(cfg))
    assert len(set(hashes)) == 1
    assert config.comparable(config.flatten(cfg))["DATASET.NUM_WORKERS"] == 0


ALLOCATED = (
    *("SOLVER.TRAINER", "DecoupledMomentumSGD", "SOLVER.DECOUPLED.ALLOCATION", "gsnr"),
    *("SOLVER.DECOUPLED.DELTA.TOG", "0.075", "SOLVER.DECOUPLED.DELTA.TCG", "-0.075"),
)


def test_an_allocation_starts_from_equal_momenta(cfg, tmp_path):
    checked(cfg, tmp_path, "{}", *ALLOCATED)
    assert config.momenta(cfg) == ({"tog": 0.9, "tcg": 0.9, "ncg": 0.9}, "tcg")
    cfg.SOLVER.DECOUPLED.update({"WEIGHT_DECAY_STREAM": "ncg", "LOSS_STREAMS": ["loss_feat:feat"]})
    cfg.SOLVER.MOMENTUM = 0.8
    assert config.momenta(cfg) == (dict.fromkeys(("tog", "tcg", "ncg", "feat"), 0.8), "ncg")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ("SOLVER.DECOUPLED.VARIANT", "release"),
            "command line: SOLVER.DECOUPLED.ALLOCATION is 'gsnr'; it must be 'fixed' with "
            "SOLVER.DECOUPLED.VARIANT release, which ties two streams together",
        ),
        (
            ("SOLVER.DECOUPLED.DELTA.TCG", "0"),
            "command line: SOLVER.DECOUPLED.ALLOCATION is 'gsnr'; it must be 'fixed' if fewer than two of "
            "SOLVER.DECOUPLED.DELTA differ from 0: their sizes are its bounds",
        ),
        (  # a stream without a loss is none
            ("SOLVER.DECOUPLED.DELTA.FEAT", "0.05"),
            "command line: SOLVER.DECOUPLED.DELTA.FEAT is 0.05; it must be 0.0: the run's streams are tog, tcg, ncg",
        ),
        (
            ("SOLVER.DECOUPLED.DELTA.NCG", "-0.1"),
            "command line: SOLVER.DECOUPLED.DELTA.NCG is -0.1; it must be in [-0.9, 0.1), so that SOLVER.MOMENTUM "
            "0.9 plus it is in [0, 1), and minus it too with SOLVER.DECOUPLED.ALLOCATION gsnr",
        ),
        (
            ("SOLVER.MOMENTUM", "0.05"),
            "command line: SOLVER.DECOUPLED.DELTA.TOG is 0.075; it must be in [-0.05, 0.95), so that "
            "SOLVER.MOMENTUM 0.05 plus it is in [0, 1), and minus it too with SOLVER.DECOUPLED.ALLOCATION gsnr",
        ),
        (
            ("SOLVER.TRAINER", "base"),
            "command line: SOLVER.DECOUPLED.DELTA.TOG is 0.075; it must be 0.0 with SOLVER.TRAINER base, which "
            "does not read it; DecoupledMomentumSGD does",
        ),
    ],
)
def test_an_allocation_that_cannot_be(cfg, tmp_path, options, expected):
    assert message(cfg, tmp_path, "{}", *ALLOCATED, *options) == expected


def test_a_fixed_delta_needs_one_end_of_its_range_alone(cfg, tmp_path):
    fixed = {"SOLVER.DECOUPLED.ALLOCATION": "fixed", "SOLVER.DECOUPLED.DELTA.NCG": "-0.1"}
    checked(cfg, tmp_path, "{}", *ALLOCATED, *(part for pair in fixed.items() for part in pair))
    assert cfg.SOLVER.DECOUPLED.DELTA.NCG == -0.1


def test_only_our_trainer_reads_the_allocation(cfg, tmp_path):
    for key, value in (("SEPARATION", "3.0"), ("SMOOTHING", "0.1")):
        line = message(cfg.clone(), tmp_path, "{}", f"SOLVER.DECOUPLED.{key}", value)
        assert f"SOLVER.DECOUPLED.{key} is {value}; it must be " in line
        assert "with SOLVER.TRAINER base, which does not read it" in line


def test_measuring_is_no_part_of_what_a_run_computes(cfg):
    assert not config.computes("GSNR.MEASURE")
    assert not config.computes("GSNR.LAYERS")
    for path in ("GSNR.EVERY", "GSNR.WINDOW", "GSNR.COORDINATES", "SOLVER.DECOUPLED.ALLOCATION"):
        assert config.computes(path)


def test_mdistillers_trainers_refuse_to_measure(cfg):
    """A trainer that is not ours, without mdistiller."""
    cfg.DISTILLER.TYPE = "KD"
    mdistiller_host.check_trainer(cfg, {}, object)
    cfg.GSNR.MEASURE = True
    with pytest.raises(UserError) as caught:
        mdistiller_host.check_trainer(cfg, {"GSNR.MEASURE": "some.yaml"}, object)
    assert str(caught.value) == (
        "some.yaml: GSNR.MEASURE is True; it must be False under mdistiller's trainer base, which does not read it"
    )
    mdistiller_host.check_trainer(cfg, {}, Trainer)


def test_mdistillers_trainers_know_no_unit_of_warm_up(cfg):
    cfg.SOLVER.WARMUP_UNIT = "iteration"
    with pytest.raises(UserError, match="SOLVER.WARMUP_UNIT is 'iteration'; it must be 'epoch' under mdistiller's"):
        mdistiller_host.check_trainer(cfg, {}, object)
    mdistiller_host.check_trainer(cfg, {}, Trainer)


def test_the_builtin_tree_is_mdistillers():
    """Every key and default of mdistiller at a08d46f, and no other."""
    theirs = yaml.safe_load((DATA / "mdistiller-config.yaml").read_text())
    flat = dict(config.flatten(CfgNode(theirs)))
    ours = CfgNode.load_cfg((Path(builtin.__file__).parent / "defaults.yaml").read_text())
    assert config.flatten(ours) == flat


def test_our_config_files_merge_under_plain_yacs(cfg):
    """mdistiller's own launcher merges with yacs, whose types are stricter than ours."""
    files = sorted((Path(__file__).parents[2] / "configs").glob("*/*/*.yaml"))
    assert len(files) >= 10
    for file in files:
        cfg.clone().merge_from_file(str(file))


def test_a_run_s_own_config_is_a_config(cfg, tmp_path):
    """What a run leaves in config.yaml trains again."""
    files = sorted((Path(__file__).parents[2] / "configs").glob("*/*/*.yaml"))
    for file in files[:: len(files) // 12]:
        one, again = cfg.clone(), cfg.clone()
        config.load(one, file)
        (tmp_path / "config.yaml").write_text(one.dump())
        config.load(again, tmp_path / "config.yaml")
        assert again == one


def test_a_temperature_may_have_a_fraction_though_mdistillers_default_has_none(cfg, tmp_path):
    assert checked(cfg, tmp_path, "KD: {TEMPERATURE: 4.5}").KD.TEMPERATURE == 4.5
    assert checked(cfg, tmp_path, "{}", "KD.TEMPERATURE", "2.5").KD.TEMPERATURE == 2.5


def test_one_epoch_may_be_all_warm_up(cfg, tmp_path):
    text = "SOLVER: {EPOCHS: 1, WARMUP_EPOCHS: 1, LR_SCHEDULE: cosine}"
    assert lr_factor(checked(cfg, tmp_path, text).SOLVER, 1) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("SOLVER: {EPOCHS: 180}", "SOLVER.LR_DECAY_STAGES has 180, and the run 180 epochs"),
        ("SOLVER: {EPOCHS: 2, LR_DECAY_STAGES: []}", "leave no epoch of 2 to the phase transition of the mask"),
        ("SOLVER: {EPOCHS: 1, LR_DECAY_STAGES: []}", "leave no epoch of 1 to the phase transition and hard"),
        (
            "SOLVER: {EPOCHS: 2, LR_DECAY_STAGES: []}\nDeepKD: {MASK: {TYPE: top_p}}",
            "leave no epoch of 2 to the phase transition of the mask",
        ),
        ("SOLVER: {EPOCHS: 4, LR_DECAY_STAGES: [3]}", ""),
        ("{SOLVER: {EPOCHS: 2, LR_DECAY_STAGES: []}, DeepKD: {MASK: {PHASES: [0.0, 0.5]}}}", ""),
        ("SOLVER: {EPOCHS: 2, LR_SCHEDULE: cosine, TRAINER: base}\nDeepKD: {MASK: {TYPE: none}}", ""),
    ],
)
def test_a_run_too_short_for_its_schedules_is_warned_of(cfg, tmp_path, capsys, text, said):
    warn.cache_clear()
    cfg.DISTILLER.TYPE = "DeepKD"
    checked(cfg, tmp_path, text)
    err = capsys.readouterr().err
    assert said in err
    assert bool(err) == bool(said)


def test_a_flat_config_is_made_a_tree_again():
    tree = builtin.CFG.clone()
    config.add_deepkd_config(tree)
    assert nest(config.flatten(tree)) == tree
