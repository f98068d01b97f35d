"""Runs with several teachers: equal ones are one, everything names each, and what cannot be mixed is refused."""

import functools
import json

import pytest
import small
import torch
import yaml
from torch import nn

from deepkd_plugin import config, launch
from deepkd_plugin.distillers import DISTILLERS
from deepkd_plugin.divided import DividedStep
from deepkd_plugin.errors import UserError
from deepkd_plugin.fold import differences, fold
from deepkd_plugin.hosts.builtin import cifar_model_dict
from deepkd_plugin.hosts.networks import teacher_network, untrained_teacher
from deepkd_plugin.hosts.registry import find_host
from deepkd_plugin.mixture import Teachers
from deepkd_plugin.run import checkpoint
from deepkd_plugin.step import Step
from deepkd_plugin.streams import assign_losses
from deepkd_plugin.study.kinds.classification import Classification

OURS = "builtin:glyphs100_resnet20"
AGAIN = str([{"TEACHER": "resnet20", "TEACHER_WEIGHTS": OURS}])
KEY = "DISTILLER.MORE_TEACHERS"


@pytest.fixture
def other(tmp_path):
    """The entry of a teacher of another family, whose file has weights that know nothing."""
    torch.manual_seed(0)
    file = tmp_path / "wrn"
    torch.save({"model": cifar_model_dict["wrn_16_1"][0](num_classes=100).state_dict()}, file)
    return {"TEACHER": "wrn_16_1", "TEACHER_WEIGHTS": str(file)}


@pytest.fixture
def learn(train, tmp_path):
    """Train; returns the student's weights and the run's folder."""

    def run(method, *options, flags=("--overwrite",)):
        options = ("SOLVER.EPOCHS", "1", "DISTILLER.LOGITS_DIR", str(tmp_path / "logits"), *options)
        code, out, err = train(method, *options, flags=flags)
        assert code == 0, err
        weights = torch.load(train.folder / "student_latest", weights_only=True)["model"]
        return weights, out

    return run


def alike(ours, theirs):
    return all(torch.allclose(ours[name].float(), theirs[name].float(), rtol=1e-3, atol=1e-4) for name in ours)


def read(method, *options, host=None):
    return launch.read_config(host or find_host(), f"configs/glyphs100/res20_res8/{method}.yaml", options)[0]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("deepkd", ("DISTILLER.TEACHER_MIX", "target")),
        *(
            pytest.param(method, options, marks=pytest.mark.slow)
            for method, options in (
                ("kd", ()),
                ("kd", ("DISTILLER.TEACHER_LOGITS", "table", "DISTILLER.LOGITS_DTYPE", "float32")),
                ("deepkd_dkd", ("DISTILLER.TEACHER_MIX", "entropy", "SOLVER.ACCUMULATE", "2")),
                ("mlkd", ("DISTILLER.TEACHER_POOL", "logits")),
                ("crld", ("DISTILLER.TEACHER_LOGITS", "table", "DISTILLER.TEACHER_POOL", "logits")),
            )
        ),
    ],
)
def test_two_equal_teachers_are_one(learn, method, options):
    of_one = dict(zip(options[::2], options[1::2]))
    rest = [part for pair in of_one.items() if not pair[0].startswith("DISTILLER.TEACHER_") for part in pair]
    rest += ["DISTILLER.TEACHER_LOGITS", of_one.get("DISTILLER.TEACHER_LOGITS", "compute")]
    one, _ = learn(method, *rest)
    two, _ = learn(method, *options, KEY, AGAIN)
    assert alike(one, two)


def test_each_teacher_has_its_table_which_runs_with_it_alone_share(learn, train, tmp_path, other):
    table = ("DISTILLER.TEACHER_LOGITS", "table", "DISTILLER.ANY_TEACHER", "True")
    learn("kd", *table)
    assert len(list((tmp_path / "logits").iterdir())) == 1
    learn("kd", *table, KEY, str([other]))
    line = json.loads((train.folder / "metrics.jsonl").read_text())
    assert line["teacher_computed"] == 0.5  # the first one's were there
    assert len(list((tmp_path / "logits").iterdir())) == 2
    learn("deepkd", *table, KEY, str([other]), "DISTILLER.TEACHER_MIX", "target")
    assert json.loads((train.folder / "metrics.jsonl").read_text())["teacher_computed"] == 0


def test_a_run_names_each_of_its_teachers(learn, train, other):
    shares = ("DISTILLER.TEACHER_SHARE", "3", "DISTILLER.ANY_TEACHER", "True", "LOG.SAVE_CHECKPOINT_FREQ", "1")
    _, out = learn("kd", KEY, str([other]), *shares)
    run = json.loads((train.folder / "run.json").read_text())
    first, second = run["teachers"]
    assert (first["name"], second["name"]) == ("resnet20", "wrn_16_1")
    assert run["teacher"] == f"{first['weights']}+{second['weights']}"
    assert first["accuracy"] > 90 > second["accuracy"]
    assert "teacher   resnet20 + wrn_16_1" in out
    assert "teacher   wrn_16_1" in out
    card = (train.folder / "README.md").read_text()
    assert "distilled from resnet20 + wrn_16_1" in card
    assert "| teacher | mixture of `resnet20` (" in card
    assert yaml.safe_load((train.folder / "config.yaml").read_text())["DISTILLER"]["MORE_TEACHERS"] == [other]


@pytest.mark.slow
def test_a_run_goes_on_with_its_own_teachers_alone(learn, train, tmp_path, other):
    more = ("DISTILLER.ANY_TEACHER", "True", KEY)
    learn("kd", *more, str([other]))
    moved = tmp_path / "moved"
    (tmp_path / "wrn").rename(moved)
    learn("kd", *more, str([other | {"TEACHER_WEIGHTS": str(moved)}]), "SOLVER.EPOCHS", "2", flags=("--resume",))
    weights = torch.load(moved, weights_only=True)["model"]
    torch.save(
        {"model": {name: 2 * part if "fc" in name else part for name, part in weights.items()}}, tmp_path / "wrn"
    )
    for entries, line in (
        ([other], "--resume needs the run's own teachers: wrn_16_1's weights had the fingerprint "),
        ([other, other], "--resume needs the run's own config: DISTILLER.MORE_TEACHERS was "),
    ):
        code, _, err = train("kd", *more, str(entries), "SOLVER.EPOCHS", "3", flags=("--resume",))
        assert code == 2
        assert line in err
        assert err.count("\n") == 1


def test_a_teacher_that_knows_nothing_is_refused_by_name(train, other):
    code, _, err = train("kd", KEY, str([other]), "DATASET.HOLDOUT", "0.1")
    assert code == 2
    assert "DISTILLER.MORE_TEACHERS, entry 1: " in err
    assert "the teacher wrn_16_1 from DISTILLER.TEACHER_WEIGHTS is at chance" in err
    assert not train.folder.exists()


@pytest.mark.parametrize(
    ("method", "options", "line"),
    [
        ("mlkd", (KEY, AGAIN), "TEACHER_POOL is 'probabilities'; it must be 'logits' with several teachers and "
         "DISTILLER.TYPE MLKD, which reads logits at several temperatures"),
        ("kd", (KEY, AGAIN, "EXPERIMENT.LOGIT_STAND", "True"), "'logits' with several teachers and EXPERIMENT.LOGIT_"),
        ("kd", (KEY, AGAIN, "DISTILLER.TEACHER_LOGITS", "stored", "DISTILLER.LOGITS_K", "9"), "LOGITS_K is 9; it must "
         "be 0 with several teachers"),
        ("kd", ("DISTILLER.TEACHER_MIX", "target"), "TEACHER_MIX is 'target'; it must be 'fixed' with one teacher"),
        ("kd", ("DISTILLER.TEACHER_SHARE", "2"), "TEACHER_SHARE is 2.0; it must be 1.0 with one teacher"),
        ("kd", (KEY, "[{'TEACHER': 'resnet21'}]"), "MORE_TEACHERS, entry 1: command line: DISTILLER.TEACHER is 're"),
        ("kd", (KEY, "[{'TEACHER': 'resnet8', 'WEIGHT': 2}]"), "MORE_TEACHERS is [{'TEACHER': 'resnet8', 'WEIGHT': 2}]"),  # noqa: E501
        ("kd", (KEY, "['resnet8']"), "MORE_TEACHERS is ['resnet8']; it must be a list of at most 7 sections"),
        ("kd", (KEY, "[{'TEACHER': 'resnet8', 'TEACHER_SHARE': -1}]"), "entry 1: command line: DISTILLER.TEACHER_SHARE "
         "is -1; it must be a number above 0"),
        ("kd", (KEY, "[{'TEACHER': 'resnet8', 'TEACHER_INPUT': {'SIZE': 'x'}}]"), "TEACHER_INPUT.SIZE is 'x'"),
    ],
)  # fmt: skip
def test_what_cannot_be_mixed_is_refused_in_a_line(method, options, line):
    with pytest.raises(UserError) as caught:
        read(method, *options)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_told_before_images_are_read(train):
    entry = [{"TEACHER": "resnet8", "TEACHER_WEIGHTS": "nothing"}]
    code, _, err = train("kd", KEY, str(entry))
    assert code == 2
    assert err.endswith(
        "MORE_TEACHERS, entry 1: nothing: no such file; DISTILLER.TEACHER_WEIGHTS must name a checkpoint\n"
    )


def test_teachers_take_images_of_their_own_size_and_kind(other):
    entry = other | {
        "TEACHER_INPUT": {"SIZE": 64, "MEAN": [0.5] * 3, "STD": [0.25] * 3},
        "TEACHER_CLASSES": [*range(9, 109)],
    }
    state = cifar_model_dict["wrn_16_1"][0](num_classes=120).state_dict()
    torch.save({"model": state}, other["TEACHER_WEIGHTS"])
    cfg = read("kd", KEY, str([entry]), "DISTILLER.TEACHER_SHARE", "3")
    teacher = teacher_network(find_host(), cfg, 100).eval()
    image = torch.randn(4, 3, 32, 32)
    each, _ = teacher(image)
    assert each.shape == (4, 2, 100)
    first, second = config.by_teacher(cfg)
    for number, one in enumerate((first, second)):
        alone = teacher_network(find_host(), one, 100).eval()
        assert torch.equal(alone(image)[0], each[:, number])
        assert checkpoint.fingerprint(alone) == checkpoint.fingerprint(teacher).split("+")[number]
    p = torch.softmax(each / 4, dim=2)
    mixture = torch.softmax(teacher.mix_unlabelled(each) / 4, dim=1)
    assert torch.allclose(mixture, 0.75 * p[:, 0] + 0.25 * p[:, 1], atol=1e-6)
    assert untrained_teacher(find_host(), read("kd", KEY, AGAIN), 100).eval()(image)[0].shape == (4, 2, 100)


def test_their_mixture_is_folded_as_one(other):
    teacher = teacher_network(find_host(), read("kd", KEY, str([other])), 100).eval()
    image = torch.randn(4, 3, 32, 32)
    folded = fold(teacher, image)
    assert sum(isinstance(part, nn.BatchNorm2d) for part in folded.modules()) < sum(
        isinstance(part, nn.BatchNorm2d) for part in teacher.modules()
    )
    ours, theirs = folded(image)[0], teacher(image)[0]
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
    assert not differences(theirs, ours)
    assert differences(theirs, theirs.flip(1))


@pytest.mark.parametrize("base", ["KD", "CRLD"])
def test_a_divided_batch_is_mixed_by_the_labels_of_all(base):
    gradients = []
    for chunk in (None, 4):
        cfg = small.config("", BATCH_SIZE=10)
        cfg.DeepKD.BASE = base
        torch.manual_seed(0)
        nets = [small.Net(8).eval(), *(small.Net(16).requires_grad_(False) for _ in range(2))]
        nets[0].body[2] = nn.Identity()  # BatchNorm sees a micro-batch
        teacher = Teachers(nets[1:], [1.0, 2.0], "target", 4.0)
        distiller = DISTILLERS["DeepKD"](nets[0], teacher, cfg).train()
        optimizer = small.DecoupledMomentumTrainer.make_optimizer(nets[0].parameters(), cfg)
        by_stream = functools.partial(assign_losses, streams=optimizer.streams, assignment={})
        arguments = (distiller, optimizer, by_stream, False)
        step = Step(*arguments, torch.device("cpu")) if chunk is None else DividedStep(*arguments, torch.device("cpu"))
        step.chunk = chunk
        views = [torch.randn(10, 3, 2, 2, generator=torch.Generator().manual_seed(n)) for n in range(2)]
        image = views if base == "CRLD" else views[0]
        step({"image": image, "target": torch.arange(10) % 5}, 1.0)
        gradients.append([part.clone() for part in nets[0].parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients))


def test_a_plan_knows_all_teachers(other):
    cfg = read("kd", KEY, str([other, {"TEACHER": "resnet8"}]))
    kind = Classification()
    assert kind.networks("", [cfg]) == ("resnet20 + wrn_16_1 + resnet8", "resnet8")
    cells = {("pair", "kd"): cfg}
    assert kind.teachers(cells) == dict.fromkeys(cells)  # of the last one there is no file
    cfg = read("kd", KEY, str([other]))
    teacher = teacher_network(find_host(), cfg, 100)
    assert list(kind.teachers({("pair", "kd"): cfg}).values()) == [checkpoint.fingerprint(teacher)]
    moved = [other | {"TEACHER_WEIGHTS": "elsewhere"}]
    assert config.comparable(config.flatten(read("kd", KEY, str(moved)))) == config.comparable(config.flatten(cfg))
