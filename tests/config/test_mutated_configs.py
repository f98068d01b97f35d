"""Mutated configs: each is taken or is one line, in a short time, and writes nothing beside its run's folder."""

import contextlib
import copy
import json
import signal
from pathlib import Path

import pytest
import torch
import torchvision
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepkd_plugin import config, launch
from deepkd_plugin.commands import cli
from deepkd_plugin.detection import launch as detection_launch
from deepkd_plugin.errors import UserError
from deepkd_plugin.hosts import builtin
from deepkd_plugin.study.kinds import timing

CONFIGS = Path(__file__).parents[2] / "configs"
KD, DEEPKD = (CONFIGS / "glyphs100" / "res20_res8" / f"{name}.yaml" for name in ("kd", "deepkd"))
DETECTION = CONFIGS / "detection" / "glyph_canvas" / "res20_res8" / "deepkd.yaml"
SECONDS = 10


def all_paths():
    tree = builtin.CFG.clone()
    config.add_deepkd_config(tree)
    return config.flatten(tree)


DEFAULTS = all_paths()
PATH_KEYS = ["EXPERIMENT.PROJECT", "EXPERIMENT.NAME", "EXPERIMENT.TAG", "LOG.PREFIX", "DATASET.ROOT"]
PATHS = [
    "",
    ".",
    "..",
    "../up",
    "a/../../b",
    "/absolute",
    "a//b",
    "x" * 300,
    "y/" * 3000,
    "a\0b",
    "a\nb",
    "~",
    "\ud800",
]
SIZES = ["SOLVER.BATCH_SIZE", "SOLVER.EPOCHS", "SOLVER.SEED", "DATASET.NUM_WORKERS", "DATASET.TRAIN_PER_CLASS"]
SIZES += ["CRD.NCE.K", "GSNR.COORDINATES", "GSNR.WINDOW", "GSNR.EVERY", "DeepKD.MASK.K", "DATASET.TEST.BATCH_SIZE"]
RATES = ["KD.TEMPERATURE", "DeepKD.TEMPERATURE", "MLKD.TEMPERATURES", "SOLVER.LR", "SOLVER.LR_DECAY_RATE", "DKD.T"]
TOKENS = [
    *(
        ".inf",
        "-.inf",
        ".nan",
        "1e400",
        "1.0e+400",
        "9" * 5000,
        "-" + "9" * 400,
        "0x" + "f" * 6000,
        "1:59:59",
        "~",
        "=",
        "<<",
    ),
    *(
        "2020-99-99",
        "2020-01-01",
        "!!int x",
        "!!float x",
        "!!binary '*'",
        "!!timestamp x",
        "!!set {a, b}",
        "!!omap [a]",
    ),
    *("!!python/object/apply:os.system [echo]", "!!python/name:os.system", "!unknown x", "&a [*a]", "*nobody", "&b 1"),
    *(
        "[" * 1500 + "]" * 1500,
        "{a: " * 1500 + "}" * 1500,
        "[1, 2",
        "{",
        "'",
        '"',
        "|",
        ">",
        "? a",
        "- 1",
        "\t1",
        "@",
        "`",
        "%",
    ),
    *(
        "'{[]: 1}'",
        "'[1, 2'",
        "'(1,)'",
        "'None'",
        "'1 if 1 else 2'",
        "'__import__(1)'",
        "'" + "(" * 5000 + "'",
        "'1is 2'",
    ),
]


def token(value):
    """Write a value as YAML does, on one line."""
    # an escape is how a lone surrogate comes into a file of UTF-8
    return json.dumps(value, ensure_ascii="ud800" in ascii(value), default=str)


numbers = st.one_of(
    st.integers(),
    st.integers(0, 4000).map(lambda digits: 10**digits),
    st.integers(0, 4000).map(lambda digits: -(10**digits)),
    st.floats(),
    st.sampled_from([0, -1, 1e-300, 1e300, 2**31, 2**32, 2**63, 2**64, 10**12, 10**30]),
)
leaves = st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=30), st.sampled_from(PATHS))
values = st.one_of(
    leaves.map(token),
    st.recursive(leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner)).map(
        token
    ),
    st.sampled_from(TOKENS),
    st.sampled_from(
        [*builtin.distiller_dict, *config.known_streams(), "MLKD", "CRLD", "DeepKD", "CRD", "vgg8", "ResNet18"]
    ),
    st.sampled_from(sorted({token(value) for value in DEFAULTS.values()})),
)
changes = st.one_of(
    st.tuples(st.sampled_from(sorted(DEFAULTS)), values),
    st.tuples(st.sampled_from(PATH_KEYS), st.sampled_from(PATHS).map(token)),
    st.tuples(st.sampled_from(SIZES + RATES), numbers.map(token) | st.sampled_from(TOKENS)),
    st.tuples(st.text(max_size=20) | st.sampled_from(["SOLVER", "SOLVER.DECOUPLED", "DeepKD.MASK", "a.b.c"]), values),
)


def explosion(levels=30):
    rows = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels))]
    return ("\n".join(rows) + f"\nSOLVER: {{LR_DECAY_STAGES: *a{levels - 1}}}\n").encode()


WHOLE_FILES = [
    *(
        b"",
        b"\n",
        b"---\n",
        b"- 1\n",
        b"1\n",
        b"\xff\xfe\x00",
        b"\x00" * 100,
        b"a: b: c",
        b"%YAML 9.9\n---\n{}",
        b"--- {}\n--- {}",
    ),
    *(
        explosion(),
        b"a: " * 1500,
        b"x" * 200_000,
        b"[" * 90_000,
        b"? " * 5_000,
        b"- " * 5_000,
        b"&a " * 100,
        b"a:\n\t- 1",
    ),
    "SOLVER: {LR: 0.1}\n".encode("utf-16"),
]


@st.composite
def files(draw, base):
    """Make the content of a config file."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.sampled_from(WHOLE_FILES) | st.binary(max_size=200))
    tree = copy.deepcopy(base)
    for path, written in draw(st.lists(changes, max_size=3)):
        node = tree
        *parents, leaf = path.split(".")
        for name in parents:
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                break
        else:
            node[leaf] = written
    content = written_out(tree).encode("utf-8", "surrogatepass")
    for _ in range(draw(st.sampled_from([0, 0, 0, 0, 1, 2]))):
        place = draw(st.integers(0, len(content)))
        content = draw(
            st.sampled_from(
                [
                    b"\xef\xbb\xbf" + content,
                    content.replace(b"\n", b"\r\n"),
                    content.replace(b"  ", b"\t"),
                    content + content,
                    content + b"SOLVER:\n  LR: 0.5\n",
                    content[:place],
                    content[:place] + b"\x00" + content[place:],
                    content[:place] + draw(st.binary(max_size=5)) + content[place:],
                ]
            )
        )
    return content


def written_out(tree, indent=""):
    """Write a tree whose leaves are YAML already."""
    lines = ""
    for name, value in tree.items():
        key = name if name.isidentifier() else token(name)
        lines += (
            f"{indent}{key}:\n{written_out(value, indent + '  ')}"
            if isinstance(value, dict)
            else f"{indent}{key}: {value}\n"
        )
    return lines


def leaves_written(tree):
    return {k: leaves_written(v) if isinstance(v, dict) else token(v) for k, v in tree.items()}


BASES = [leaves_written(yaml.safe_load(file.read_text())) for file in (KD, DEEPKD)]
contents = st.sampled_from(BASES).flatmap(files)
options = st.lists(
    st.tuples(
        st.sampled_from(sorted(DEFAULTS)) | st.text(max_size=10),
        values | st.text(max_size=30) | st.sampled_from(PATHS),
    ),
    max_size=2,
).map(lambda pairs: [word for pair in pairs for word in pair])


@contextlib.contextmanager
def in_time():
    """Raise TimeoutError in what takes more than SECONDS."""

    def stop(number, frame):
        raise TimeoutError(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def one_line(text):
    assert text.startswith("deepkd: error: "), text
    assert text.count("\n") == 1, text
    assert text.strip().isprintable(), text
    assert len(text) <= 1000 + len("deepkd: error: \n"), text


def many(examples):
    checks = [
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.filter_too_much,
    ]
    return settings(max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=checks)


@pytest.fixture
def anywhere(monkeypatch, tmp_path, data_root):
    """A working folder to look at, without a network; glyphs are drawn already, whatever DATASET.ROOT is."""

    def unreachable(*arguments, **named):
        raise OSError("no network")

    load = launch.data.get_dataset

    def from_cache(cfg):
        if cfg.DATASET.TYPE == "glyphs100":
            cfg.defrost()
            cfg.DATASET.ROOT = str(data_root)
        return load(cfg)

    class Built(Exception):
        """The trainer is there; the run would begin."""

    def begin(trainer, *arguments):
        raise Built

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", unreachable)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", unreachable)
    monkeypatch.setattr(launch.data, "get_dataset", from_cache)
    monkeypatch.setattr(launch, "measure_teacher", lambda *arguments: 50.0)
    monkeypatch.setattr(launch, "run", begin)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    Built.folder = tmp_path
    return Built


def try_train(built, capfd, content, words):
    """Start tools/train.py on a file with this content; it must end in one line or where training begins."""
    file = built.folder / "some.yaml"
    file.write_bytes(content)
    capfd.readouterr()
    taken = False
    try:
        with in_time():
            assert launch.main(["--cfg", str(file), *words]) == 2
    except built:
        taken = True
    else:
        one_line(capfd.readouterr().err)
    assert sorted(path.name for path in built.folder.iterdir()) == ["some.yaml", "work"]
    assert not list((built.folder / "work").iterdir())
    return taken


@many(30)
@given(contents, options)
def test_a_few(anywhere, capfd, content, words):
    try_train(anywhere, capfd, content, words)


@pytest.mark.slow
def test_a_thousand(anywhere, capfd):
    taken = []

    @many(1000)
    @given(contents, options)
    def check(content, words):
        taken.append(try_train(anywhere, capfd, content, words))

    check()
    assert len(taken) >= 1000
    assert 50 < sum(taken) < len(taken) - 300  # there are sound ones among them


@pytest.mark.parametrize("examples", [10, pytest.param(300, marks=pytest.mark.slow)])
def test_configs_of_detectors(tmp_path, examples):
    base = leaves_written(yaml.safe_load(DETECTION.read_text()))
    outcomes = []

    @many(examples)
    @given(files(base))
    def check(content):
        file = tmp_path / "some.yaml"
        file.write_bytes(content)
        with in_time():
            try:
                detection_launch.read_config(str(file), ())
                outcomes.append("taken")
            except UserError as error:
                outcomes.append("refused")
                one_line(f"deepkd: error: {error}\n")

    check()
    assert outcomes.count("taken") > examples / 20
    assert outcomes.count("refused") > examples / 3


@pytest.mark.parametrize("examples", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_tables_of_mutated_configs(anywhere, capfd, monkeypatch, examples):
    """`deepkd reproduce --dry-run` reads the configs, looks at their data and takes steps to estimate the time."""
    monkeypatch.setattr(timing, "BUDGET", 0.1)
    pair = anywhere.folder / "table" / "pair"
    pair.mkdir(parents=True)
    outcomes = []

    @many(examples)
    @given(contents, options)
    def check(content, words):
        (pair / "kd.yaml").write_bytes(content)
        capfd.readouterr()
        with in_time():
            code = cli.main(["reproduce", str(pair.parent), "--dry-run", "--seeds", "1", *words])
        outcomes.append(code)
        assert code in (0, 2)
        if code:
            one_line(capfd.readouterr().err)
        assert not list((anywhere.folder / "work").iterdir())

    check()
    assert outcomes.count(2) > examples / 3
    assert outcomes.count(0) > examples / 20 or examples < 10
