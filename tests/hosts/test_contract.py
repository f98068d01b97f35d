"""What a host and the plugin promise each other, on the built-in host always and on mdistiller where it is."""

import copy
import importlib.util
import sys
import types
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from torch import nn

from deepkd_plugin import config, data, device, launch
from deepkd_plugin.device import seed_everything
from deepkd_plugin.errors import UserError, shown
from deepkd_plugin.hosts import mdistiller as mdistiller_host
from deepkd_plugin.hosts import registry
from deepkd_plugin.hosts.networks import trained_network
from deepkd_plugin.run import checkpoint
from deepkd_plugin.trainer import DecoupledMomentumTrainer

THEIRS = ["AT", "OFD", "RKD", "FITNET", "KDSVD", "CRD", "NST", "PKT", "SP", "VID", "REVIEWKD"]
METHODS = ["NONE", "KD", "DKD", "MLKD", "CRLD", "DeepKD", *THEIRS]
FEATURES = [16, 32, 64, 64]


@pytest.fixture(params=["builtin", "mdistiller"])
def host(request):
    if request.param == "builtin":
        registry.register(registry.BUILTIN)
        return registry.BUILTIN
    return request.getfixturevalue("mdistiller")


def fit_features(tree):
    """Sizes of resnet20's and resnet8's features, for the methods that ask for them."""
    tree.REVIEWKD.update({"SHAPES": [1, 8, 16, 32], "OUT_SHAPES": [1, 8, 16, 32]})
    tree.REVIEWKD.update({"IN_CHANNELS": FEATURES, "OUT_CHANNELS": FEATURES})
    tree.CRD.FEAT.update({"STUDENT_DIM": 64, "TEACHER_DIM": 64})
    tree.CRD.NCE.K = 16


@pytest.fixture
def cfg(host, tmp_path):
    tree = host.cfg.clone()
    tree.DISTILLER.update({"TEACHER": "resnet20", "STUDENT": "resnet8"})
    tree.SOLVER.update({"BATCH_SIZE": 20, "EPOCHS": 1, "TRAINER": "DecoupledMomentumSGD"})
    tree.SOLVER.WEIGHT_DECAY = 5e-4
    tree.DATASET.NUM_WORKERS = 0
    tree.LOG.PREFIX = str(tmp_path)
    fit_features(tree)
    return tree


class Batches(list):
    """A loader of batches that are there already."""

    @property
    def dataset(self):
        first = [[view[0] for view in part] if isinstance(part, list) else part[0] for part in self[0]]
        return [tuple(first)] * 2


def batches(method, count=3):
    generator = torch.Generator().manual_seed(0)
    made = Batches()
    for number in range(count):
        views = [torch.randn(8, 3, 32, 32, generator=generator) for _ in range(2)]
        target = torch.randint(100, (8,), generator=generator)
        index = torch.arange(8 * number, 8 * number + 8)
        image = views if method in ("MLKD", "CRLD") else views[0]
        rest = (torch.randint(300, (8, 17), generator=generator),) if method == "CRD" else ()
        made.append((image, target, index, *rest))
    return made


def distiller_of(host, cfg, method):
    cfg.DISTILLER.TYPE = method
    cfg.freeze()
    seed_everything(0)
    student = host.models("cifar100")["resnet8"][0](num_classes=100)
    if method == "NONE":
        return host.distillers[method](student)
    teacher = trained_network(host, "cifar100", "resnet20", 100, "builtin:glyphs100_resnet20", "test")
    return host.distillers[method](student, teacher, cfg, *((300,) if method == "CRD" else ()))


def learned(distiller):
    return [p.detach().clone() for p in distiller.get_learnable_parameters()]


def test_everything_is_registered(host):
    assert {"DeepKD", "CRLD", "MLKD", "KD", "DKD", "NONE"} <= set(host.distillers)
    assert {"base", "DecoupledMomentumSGD"} <= set(host.trainers)
    assert {"DeepKD", "CRLD", "MLKD"} <= set(host.cfg)
    assert host.cfg.SOLVER.DECOUPLED.DELTA.TOG == 0.0
    assert host.cfg.LOG.WANDB is False
    assert registry.register(host) == []
    assert "MobileNetV2" in host.imagenet_models


def test_the_imagenet_alias_says_what_it_is(host):
    with pytest.warns(UserWarning, match="mdistiller's MobileNetV1: papers .* compare with r50_mv1"):
        network = host.imagenet_models["MobileNetV2"](pretrained=False)
    assert type(network) is type(host.imagenet_models["MobileNetV1"](pretrained=False))


@pytest.mark.parametrize("method", ["KD", "CRLD", "MLKD"])
def test_get_dataset_gives_the_views_that_a_method_needs(host, cfg, cifar_root, method):
    cfg.DATASET.ROOT = str(cifar_root)
    cfg.DISTILLER.TYPE = method
    # in mdistiller the function that its launcher calls, after register() has put ours in its place
    module = data if host.root is None else sys.modules["mdistiller.dataset"]
    train, val, num_data, num_classes = module.get_dataset(cfg)
    assert (num_data, num_classes) == (300, 100)
    image, target, index = next(iter(train))
    views = [image] if method == "KD" else image
    assert [tuple(view.shape) for view in views] == [(20, 3, 32, 32)] * (1 if method == "KD" else 2)
    assert (target.shape, index.shape) == ((20,), (20,))
    image, target = next(iter(val))
    assert image.shape[1:] == (3, 32, 32)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_as_one_stream_is_sgd(host, cfg, method):
    """Three steps under the decoupled trainer without deltas and under torch's SGD on the summed losses."""
    if method not in host.distillers:
        pytest.skip(f"{method} is mdistiller's own")
    ours = distiller_of(host, cfg, method)
    theirs = copy.deepcopy(ours)
    loader = batches(method)
    trainer = DecoupledMomentumTrainer("run", ours, loader, loader, cfg)
    trainer.rehearse()
    before = learned(ours)
    seed_everything(1)
    entry = trainer.train_epoch(1)
    assert entry["train_loss"] > 0
    theirs.train()
    sgd = torch.optim.SGD(theirs.get_learnable_parameters(), 0.05, 0.9, weight_decay=5e-4)
    seed_everything(1)
    for batch in loader:
        parts = dict(zip(("image", "target", "index", "contrastive_index"), batch))
        sgd.zero_grad()
        sum(loss.mean() for loss in theirs(**parts, epoch=1)[1].values()).backward()
        sgd.step()
    after = learned(ours)
    assert any(not torch.equal(a, b) for a, b in zip(before, after))
    for a, b in zip(after, learned(theirs)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("MLKD", "CRLD", "DeepKD")])
def test_every_method_as_one_stream_is_mdistillers_own_trainer(mdistiller, tmp_path, method, request):
    """The same against the trainer that mdistiller itself has for the method."""
    tree = mdistiller.cfg.clone()
    tree.LOG.PREFIX = str(tmp_path)
    tree.DISTILLER.update({"TEACHER": "resnet20", "STUDENT": "resnet8"})
    fit_features(tree)
    ours = distiller_of(mdistiller, tree, method)
    theirs = nn.DataParallel(copy.deepcopy(ours))
    loader = batches(method)
    trainer = DecoupledMomentumTrainer("ours", ours, loader, loader, tree)
    seed_everything(1)
    trainer.train_epoch(1)
    own = mdistiller.trainers["crd" if method == "CRD" else "base"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mdistiller_host, "measure_teacher", lambda *args: None)  # these loaders have no test images
        reference = own("theirs", theirs, loader, loader, tree)
    theirs.train()
    meter = types.SimpleNamespace(update=lambda *args: None, avg=0.0)
    seed_everything(1)
    for batch in loader:
        reference.train_iter(batch, 1, dict.fromkeys(("training_time", "data_time", "losses", "top1", "top5"), meter))
    for a, b in zip(learned(ours), learned(theirs.module)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def dot_settings(cfg):
    """DOT by config: the task with MOMENTUM - DELTA, distillation with MOMENTUM + DELTA, decay in the task."""
    cfg.SOLVER.TRAINER = "DecoupledMomentumSGD"
    cfg.SOLVER.DECOUPLED.LOSS_STREAMS = ["loss_ce:tog", "loss_kd:ncg"]
    cfg.SOLVER.DECOUPLED.DELTA.update({"TOG": -0.075, "NCG": 0.075})
    cfg.SOLVER.DECOUPLED.WEIGHT_DECAY_STREAM = "tog"
    cfg.SOLVER.WEIGHT_DECAY = 5e-4


def test_two_streams_by_config_are_dot(host, cfg, golden_optimizers):
    """The golden trajectory, through the trainer: losses that are linear in the weights give its gradients."""
    dot_settings(cfg)
    shapes = [(2, 3), (4,), (2, 2, 2)]
    sizes = [6, 4, 8]

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.student = nn.ParameterList(
                nn.Parameter(torch.arange(n, dtype=torch.float64).sin().reshape(s)) for n, s in zip(sizes, shapes)
            )

        def get_learnable_parameters(self):
            return list(self.student)

    module = Linear()
    trainer = DecoupledMomentumTrainer("run", module, Batches(), Batches(), cfg)
    for step in range(8):
        losses = {}
        for stream, name in enumerate(("loss_ce", "loss_kd")):
            gradients = [
                torch.cos(0.3 * torch.arange(n, dtype=torch.float64) + step + 2 * stream).reshape(s)
                for n, s in zip(sizes, shapes)
            ]
            losses[name] = sum((p * g).sum() for p, g in zip(module.student, gradients))
        trainer.optimizer.zero_grad()
        trainer.optimizer.backward(trainer.losses_by_stream(losses))
        trainer.optimizer.step()
        flat = torch.cat([p.detach().flatten() for p in module.student])
        golden = torch.cat([golden_optimizers[f"dot_step{step}_p{i}"].flatten() for i in range(3)])
        torch.testing.assert_close(flat, golden, rtol=1e-12, atol=1e-12)


def test_two_streams_are_mdistillers_dot_trainer(mdistiller, tmp_path):
    tree = mdistiller.cfg.clone()
    tree.LOG.PREFIX = str(tmp_path)
    tree.DISTILLER.update({"TEACHER": "resnet20", "STUDENT": "resnet8"})
    dot_settings(tree)
    ours = distiller_of(mdistiller, tree, "DKD")
    theirs = nn.DataParallel(copy.deepcopy(ours))
    loader = batches("DKD", 5)
    start = learned(ours)
    trainer = DecoupledMomentumTrainer("ours", ours, loader, loader, tree)
    trainer.train_epoch(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mdistiller_host, "measure_teacher", lambda *args: None)
        reference = mdistiller.trainers["dot"]("theirs", theirs, loader, loader, tree)
    theirs.train()
    meter = types.SimpleNamespace(update=lambda *args: None, avg=0.0)
    for batch in loader:
        reference.train_iter(batch, 1, dict.fromkeys(("training_time", "data_time", "losses", "top1", "top5"), meter))
    # it moves the weights twice in a step, ours once: the rounding differs
    for a, b, before in zip(learned(ours), learned(theirs.module), start):
        assert (a - b).norm() < 5e-3 * (a - before).norm()


def test_a_fourth_stream_for_features(host, cfg):
    """SOLVER.DECOUPLED.LOSS_STREAMS makes the stream `feat`, with a momentum of its own."""
    cfg.SOLVER.DECOUPLED.LOSS_STREAMS = ["loss_ce:tog", "loss_kd:feat"]
    cfg.SOLVER.DECOUPLED.DELTA.FEAT = -0.05
    distiller = distiller_of(host, cfg, "KD")
    loader = batches("KD")
    trainer = DecoupledMomentumTrainer("run", distiller, loader, loader, cfg)
    assert trainer.optimizer.param_groups[0]["momentum"]["feat"] == pytest.approx(0.85)
    assert set(trainer.train_epoch(1)["loss"]) == {"tog", "feat"}


@pytest.mark.parametrize("config", ["kd", "deepkd"])
def test_our_launcher_gives_one_run_on_either_host(train, mdistiller, monkeypatch, config):
    students = []
    for name, host in (("builtin", registry.BUILTIN), ("mdistiller", mdistiller)):
        monkeypatch.setattr(launch, "find_host", lambda host=host: host)
        code, _, err = train(config, "EXPERIMENT.NAME", name)
        assert code == 0, err
        folder = train.folder.parent / name
        students.append(checkpoint.load(folder / "student_latest", "test")["model"])
        assert {p.name for p in folder.iterdir()} >= {"run.json", "config.yaml", "metrics.jsonl", "latest"}
    # the same start, images and order; float32 rounding is all that the networks' code may add, and 8 steps at the
    # recipe's rate multiply it: to 5 % in some tensors with some seeds
    for key, value in students[0].items():
        difference = (value - students[1][key]).float().norm()
        assert difference < 0.1 * value.float().norm() + 1e-3, key


@pytest.mark.parametrize("trainer", ["dot", "base"])
def test_our_launcher_runs_mdistillers_methods_and_trainers(train, mdistiller, monkeypatch, cfg_options, trainer):
    monkeypatch.setattr(launch, "find_host", lambda: mdistiller)
    method = "KD" if trainer == "dot" else "REVIEWKD"
    code, out, err = train("kd", "DISTILLER.TYPE", method, "SOLVER.TRAINER", trainer, *cfg_options)
    assert code == 0, err
    assert "teacher   resnet20 " in out
    assert (train.folder / "student_latest").is_file()


@pytest.fixture
def cfg_options():
    shapes, channels = "[1, 8, 16, 32]", str(FEATURES)
    return (
        "REVIEWKD.SHAPES", shapes, "REVIEWKD.OUT_SHAPES", shapes, "REVIEWKD.IN_CHANNELS", channels,
        "REVIEWKD.OUT_CHANNELS", channels, "SOLVER.LR_SCHEDULE", "step", "SOLVER.WARMUP_EPOCHS", "0",
        "SOLVER.MIN_LR", "0.0", "SOLVER.CHANNELS_LAST", "False",
    )  # fmt: skip


def test_keys_that_mdistillers_trainers_would_ignore_are_refused(train, mdistiller, monkeypatch):
    monkeypatch.setattr(launch, "find_host", lambda: mdistiller)
    code, _, err = train("kd", "SOLVER.TRAINER", "dot")
    assert code == 2
    assert "SOLVER.LR_SCHEDULE is 'cosine'; it must be 'step' under mdistiller's trainer dot" in err
    code, _, err = train("kd", "DISTILLER.TYPE", "CRLD", "SOLVER.TRAINER", "dot")
    assert code == 2
    assert "SOLVER.TRAINER is 'dot'; it must be DecoupledMomentumSGD: CRLD needs two views" in err
    for method, trainer, expected in [
        ("CRD", "dot", "it must be crd, crd_dot or DecoupledMomentumSGD with DISTILLER.TYPE CRD"),
        ("KD", "crd", "it must be another: it is for CRD alone with DISTILLER.TYPE KD"),
        ("NONE", "dot", "which has no loss_ce and loss_kd"),
        ("DeepKD", "dot", "which has no loss_ce and loss_kd"),
    ]:
        code, _, err = train("kd", "DISTILLER.TYPE", method, "SOLVER.TRAINER", trainer)
        assert (code, expected in err) == (2, True), err
    assert not train.folder.exists()


@pytest.mark.parametrize("trainer", ["base", "crd"])
def test_crd_through_our_launcher(train, mdistiller, monkeypatch, cfg_options, trainer):
    """Its contrast indices come from the plugin's own data sets, whatever the set and wherever it lies."""
    monkeypatch.setattr(launch, "find_host", lambda: mdistiller)
    dims = ("CRD.FEAT.STUDENT_DIM", "64", "CRD.FEAT.TEACHER_DIM", "64", "CRD.NCE.K", "16")
    code, _, err = train("kd", "DISTILLER.TYPE", "CRD", "SOLVER.TRAINER", trainer, *dims, *cfg_options)
    assert code == 0, err
    assert (train.folder / "student_latest").is_file()


def test_a_run_of_mdistillers_trainers_is_not_overwritten(train, mdistiller, monkeypatch, cfg_options):
    monkeypatch.setattr(launch, "find_host", lambda: mdistiller)
    assert train("kd", "SOLVER.TRAINER", "dot", *cfg_options)[0] == 0
    code, _, err = train("kd", "SOLVER.TRAINER", "dot", *cfg_options)
    assert (code, "holds a run already" in err) == (2, True)


@pytest.mark.parametrize("trainer", ["base", "dot"])
def test_wandb_where_a_config_asks_for_it(train, mdistiller, monkeypatch, cfg_options, trainer):
    calls = []
    fake = types.SimpleNamespace(run=None, log=lambda values: calls.append(("log", values)))
    fake.api = types.SimpleNamespace(api_key="key")

    def init(**arguments):
        calls.append(("init", arguments))
        fake.run = types.SimpleNamespace(summary={}, log=fake.log)
        return fake.run

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(launch, "find_host", lambda: mdistiller)
    assert train("kd", "SOLVER.TRAINER", trainer, *cfg_options, "EXPERIMENT.NAME", "off")[0] == 0
    assert calls == []
    code, _, err = train("kd", "SOLVER.TRAINER", trainer, *cfg_options, "LOG.WANDB", "True")
    assert code == 0, err
    assert calls[0] == ("init", {"project": "glyphs100", "name": "run", "tags": ["kd", "res20", "res8"]})
    assert any("test_acc" in values for name, values in calls if name == "log")


def test_wandb_that_is_not_installed(train, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, _, err = train("kd", "LOG.WANDB", "True")
    assert (code, "LOG.WANDB is True; it must be False, for wandb is not installed" in err) == (2, True)


class TestSettle:
    """What get_dataset does for mdistiller's own launcher, where it first sees the config."""

    @pytest.fixture
    def settle(self, mdistiller):
        replaced = []
        zoos = [mdistiller.distillers, *map(mdistiller.models, ("cifar100", "imagenet", "tiny_imagenet"))]
        before = [dict(zoo) for zoo in zoos]

        def run(**options):
            tree = mdistiller.cfg.clone()
            tree.DISTILLER.update({"TYPE": "KD", "TEACHER": "resnet20", "STUDENT": "resnet8"})
            tree.DISTILLER.TEACHER_WEIGHTS = "builtin:glyphs100_resnet20"
            for path, value in options.items():
                *parents, leaf = path.split("__")
                node = tree
                for name in parents:
                    node = node[name]
                node[leaf] = value
            tree.freeze()
            mdistiller_host.settle(mdistiller, tree, replaced)

        yield run
        while replaced:
            registry_, name, value = replaced.pop()
            registry_[name] = value
        assert [dict(zoo) for zoo in zoos] == before

    def test_the_seed_decides_what_is_drawn_next(self, settle):
        drawn = []
        for seed in (3, 3, 4):
            settle(SOLVER__SEED=seed)
            drawn.append(torch.rand(1).item())
        assert drawn[0] == drawn[1] != drawn[2]

    def test_deterministic_algorithms_are_asked_for_before_cuda_starts(self, settle, monkeypatch):
        asked = []
        monkeypatch.setattr(device, "tune", asked.append)
        settle(SOLVER__DETERMINISTIC=True, SOLVER__TRAINER=config.TRAINER)
        settle()
        assert asked == [True, False]

    @pytest.mark.parametrize(
        "modifier",
        [
            {"EXPERIMENT__LOGIT_STAND": True},
            {"DISTILLER__ENTROPY_WEIGHT": "formula"},
            {"SOLVER__ACCUMULATE": 2, "SOLVER__TRAINER": config.TRAINER},
        ],
    )
    def test_modified_terms_take_our_class_for_that_config_alone(self, settle, mdistiller, modifier):
        own = mdistiller.distillers["KD"]
        settle(**modifier)
        assert mdistiller.distillers["KD"].__module__ == "deepkd_plugin.distillers.kd"
        settle()
        assert mdistiller.distillers["KD"] is own

    def test_no_warm_up_takes_our_dkd(self, settle, mdistiller):
        """mdistiller's divides by it."""
        own = mdistiller.distillers["DKD"]
        settle(DISTILLER__TYPE="DKD", DKD__WARMUP=0)
        assert mdistiller.distillers["DKD"].__module__ == "deepkd_plugin.distillers.dkd"
        settle(DISTILLER__TYPE="DKD", DKD__WARMUP=2)
        assert mdistiller.distillers["DKD"] is own

    def test_the_teachers_file_stands_where_the_launcher_looks(self, settle, mdistiller):
        models = mdistiller.models("cifar100")
        own = models["resnet20"]
        settle()
        assert models["resnet20"][0] is own[0]
        assert models["resnet20"][1].endswith("glyphs100_resnet20.pt")
        models["mine"] = own  # somebody's own entry stays
        settle(DISTILLER__TYPE="NONE")
        assert models["resnet20"] is own
        assert models.pop("mine") is own

    def test_an_imagenet_teacher_from_a_file(self, settle, mdistiller, tmp_path):
        models = mdistiller.models("imagenet")
        torch.manual_seed(99)
        network = models["ResNet18"](pretrained=False)
        torch.save({"state_dict": network.state_dict()}, tmp_path / "r18.pth")
        settle(
            DATASET__TYPE="imagenet",
            DISTILLER__TEACHER="ResNet18",
            DISTILLER__STUDENT="ResNet18",
            DISTILLER__TEACHER_WEIGHTS=str(tmp_path / "r18.pth"),
        )
        teacher, student = models["ResNet18"](pretrained=True), models["ResNet18"](pretrained=False)
        assert torch.equal(teacher.fc.weight, network.fc.weight)
        assert not torch.equal(student.fc.weight, network.fc.weight)

    def test_an_imagenet_teacher_without_a_network(self, settle, mdistiller, monkeypatch):
        def offline(pretrained=False):
            raise URLError("no network")

        models = mdistiller.models("imagenet")
        monkeypatch.setitem(models, "ResNet34", offline)
        with pytest.raises(UserError, match="torchvision's weights of ResNet34 cannot be fetched"):
            settle(
                DATASET__TYPE="imagenet",
                DISTILLER__TEACHER="ResNet34",
                DISTILLER__STUDENT="ResNet18",
                DISTILLER__TEACHER_WEIGHTS="",
            )
        monkeypatch.undo()

    def test_a_mask_that_does_not_fit(self, settle):
        with pytest.raises(UserError, match=r"DeepKD.MASK.K: K must be an integer from 1 to 99"):
            settle(
                DISTILLER__TYPE="DeepKD",
                SOLVER__TRAINER="DecoupledMomentumSGD",
                DeepKD__MASK__TYPE="static",
                DeepKD__MASK__K=500.0,
            )


def test_defaults_that_follow_mdistiller(mdistiller):
    assert Path(mdistiller.cfg.DATASET.ROOT) == mdistiller.root / "data"
    assert mdistiller.cfg.DATASET.DOWNLOAD is True
    network = mdistiller.tiny_imagenet_models["ShuffleV2"][0](num_classes=200)
    assert network(torch.randn(2, 3, 64, 64))[0].shape == (2, 200)


def test_our_launcher_keeps_its_own_places_on_either_host(host, tmp_path):
    (tmp_path / "c.yaml").write_text("DISTILLER: {STUDENT: resnet8}\n")
    cfg, _ = launch.read_config(host, str(tmp_path / "c.yaml"), [])
    assert (cfg.DATASET.ROOT, cfg.DATASET.DOWNLOAD) == ("./data", False)


def test_load_checkpoint_refuses_what_it_cannot_give(tmp_path):
    with pytest.raises(UserError, match="mdistiller has no weights of this network"):
        mdistiller_host.load_checkpoint(None)
    for content in ([1], {"epoch": 1}, {"model": {}}):
        torch.save(content, tmp_path / "x")
        with pytest.raises(UserError, match="holds no network's weights"):
            mdistiller_host.load_checkpoint(str(tmp_path / "x"))
    torch.save({"model": {"module.student.w": torch.ones(1)}, "config": {}}, tmp_path / "x")
    with pytest.raises(UserError, match="DecoupledMomentumSGD wrote it"):
        mdistiller_host.load_checkpoint(str(tmp_path / "x"))
    content = {"model": {"module.student.w": torch.ones(1)}, "epoch": 3}
    torch.save(content, tmp_path / "x")
    assert mdistiller_host.load_checkpoint(str(tmp_path / "x")) == content
    for wrapped in (
        {"state_dict": {"w": torch.ones(1)}},
        {"model": {"state_dict": {"module.w": torch.ones(1)}}},
    ):
        torch.save(wrapped, tmp_path / "x")
        assert list(mdistiller_host.load_checkpoint(str(tmp_path / "x"))["model"]) == ["w"]


def test_what_only_mdistiller_has_is_said_so(train):
    code, _, err = train("kd", "DISTILLER.TYPE", "REVIEWKD")
    assert code == 2
    assert "REVIEWKD is mdistiller's, which is not here: install it or set MDISTILLER_ROOT" in err


@pytest.mark.parametrize("method", ["KD", "DKD"])
def test_logit_standardisation_reaches_mdistillers_methods(train, mdistiller, monkeypatch, method):
    """mdistiller's KD and DKD have no such option: the plugin's take their place in that run."""
    own = dict(mdistiller.distillers)
    monkeypatch.setattr(launch, "find_host", lambda: mdistiller)
    ends = []
    for name, flag in (("off", "False"), ("on", "True")):
        code, _, err = train("kd", "DISTILLER.TYPE", method, "EXPERIMENT.NAME", name, "EXPERIMENT.LOGIT_STAND", flag)
        assert code == 0, err
        folder = train.folder.parent / name
        ends.append(checkpoint.load(folder / "student_latest", "test")["model"]["fc.weight"])
        assert mdistiller.distillers == own
    assert not torch.equal(*ends)


@pytest.mark.parametrize(
    ("method", "key", "value", "default"),
    [
        ("NONE", "EXPERIMENT.LOGIT_STAND", "True", "False"),
        ("NONE", "DISTILLER.ENTROPY_WEIGHT", "formula", "none"),
        ("DIST", "EXPERIMENT.LOGIT_STAND", "True", "False"),
        ("DIST", "DISTILLER.ENTROPY_WEIGHT", "release", "none"),
    ],
)
def test_a_method_without_terms_has_none_to_modify(train, method, key, value, default):
    code, _, err = train("kd", "DISTILLER.TYPE", method, key, value)
    assert code == 2
    assert (
        f"{key} is {value if default == 'False' else shown(value)}; it must be {default} with DISTILLER.TYPE {method}"
        in err
    )
