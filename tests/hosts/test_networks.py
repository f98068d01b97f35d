"""Networks from outside the zoo, as teachers and students: their protocol, weights, inputs and classes."""

import copy
import importlib.util
import json
import os
import pickle
import sys
import urllib.error

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from torchvision import models

from deepkd_plugin import data, extensions, launch
from deepkd_plugin.commands import eval as evaluate
from deepkd_plugin.data.glyphs import CHARACTERS
from deepkd_plugin.errors import UserError
from deepkd_plugin.hosts import mdistiller as mdistiller_host
from deepkd_plugin.hosts.adapter import Adapter, Input, adapt, choose, feed, offer_maps, try_out
from deepkd_plugin.hosts.classes import choose_classes
from deepkd_plugin.hosts.libraries import find
from deepkd_plugin.hosts.networks import (
    network,
    settle_features,
    student_network,
    teacher_network,
    trained_network,
    untrained_teacher,
)
from deepkd_plugin.hosts.registry import BUILTIN, register
from deepkd_plugin.run import checkpoint
from deepkd_plugin.trainer import DecoupledMomentumTrainer

TIMM = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason='pip install -e ".[networks]" brings timm')
GLYPHS = "builtin:glyphs100_resnet20"

OWN = """
import torch
from torch import nn


class Bare(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU())
        self.pool, self.drop = nn.AdaptiveAvgPool2d(4), nn.Dropout(0.5)
        self.head = nn.Linear(128, num_classes)

    def forward(self, image):
        return self.head(self.drop(self.pool(self.body(image)).flatten(1)))


class Pair(Bare):
    def forward(self, image):
        return super().forward(image), {"feats": [image]}


class Output(Bare):
    def forward(self, image):
        return {"logits": super().forward(image), "attentions": None}


class Tensors(Bare):
    def forward(self, image):
        return super().forward(image), super().forward(image)


class Aux(Bare):
    def forward(self, image):
        logits = super().forward(image)
        return (logits, logits, logits) if self.training else logits


class Maps(Bare):
    def forward(self, image):
        return self.body(image)


class Halved(Bare):
    # has the parts of a network of timm, and other logits than they give

    def forward_features(self, image):
        return self.body(image)

    def forward_head(self, features, pre_logits):
        return self.pool(features).flatten(1)

    def get_classifier(self):
        return self.head

    def forward(self, image):
        return self.head(self.pool(self.body(image)).flatten(1)) / 2


class Text(Bare):
    def forward(self, image):
        return "logits"


class Flat(Bare):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.body, self.pool = nn.Flatten(), nn.Identity()
        self.head = nn.LazyLinear(num_classes)


class Small(Bare):
    def forward(self, image):
        return super().forward(image[:, :, :0])


class Stubborn(Bare):
    def __init__(self, num_classes):
        super().__init__(3)


class Compiled(Bare):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.forward = super().forward


def nothing(num_classes):
    return None


def broken(num_classes):
    raise RuntimeError("no luck\\ntoday")


number = 7
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A user's module `mine` on Python's path; gone when the test is done."""
    (tmp_path / "mine.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(extensions, "_contents", {})
    monkeypatch.setenv(extensions.VARIABLE, "")
    yield tmp_path / "mine.py"
    sys.modules.pop("mine", None)
    find.cache_clear()


@pytest.fixture
def cfg():
    """The built-in host's config on glyphs100, with a teacher and without a file."""
    register(BUILTIN)
    cfg = BUILTIN.cfg.clone()
    cfg.DATASET.TYPE, cfg.DISTILLER.TYPE, cfg.DISTILLER.TEACHER_WEIGHTS = "glyphs100", "KD", ""
    cfg.DISTILLER.TEACHER, cfg.DISTILLER.STUDENT = "resnet20", "resnet8"
    return cfg


def image(side=32, count=4):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def refused(call, *words):
    with pytest.raises(UserError) as caught:
        call()
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


# ---------------------------------------------------------------- the protocol


@pytest.mark.parametrize("name", ["Bare", "Pair", "Output"])
def test_an_own_network_gives_logits_whatever_they_are_in(own, name):
    made = network(BUILTIN, "glyphs100", f"mine:{name}", 7).eval()
    logits, features = made(image())
    plain = sys.modules["mine"].Bare(num_classes=7).eval()
    plain.load_state_dict(made.state_dict())
    assert torch.equal(logits, plain(image()))
    assert set(features) == ({"feats"} if name == "Pair" else set())
    assert type(made).__qualname__ == name
    assert type(made).__module__ == "mine"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Tensors", ["mine:Tensors returns a tuple of Tensor, Tensor; it must return logits"]),
        ("Aux", ["mine:Aux returns a tuple of Tensor, Tensor, Tensor; it must"]),
        ("Maps", ["mine:Maps returns logits of the shape (2, 8, 15, 15) for two images; it must be (2, C)"]),
        ("Text", ["mine:Text returns a str; it must return logits"]),
        ("Small", ["mine:Small cannot take images of 32 x 32 pixels (RuntimeError: "]),
        ("Stubborn", ["mine:Stubborn gives 3 logits for an image; this run has 7 classes"]),
        ("Compiled", ["mine:Compiled is compiled, scripted or wrapped; it must be a plain module"]),
        ("nothing", ["mine:nothing cannot be made (its constructor returns a NoneType, not a module)"]),
        ("broken", ["mine:broken cannot be made (RuntimeError: no luck today)"]),
        ("number", ["is 'mine:number', which cannot be called; it must be a constructor"]),
        ("absent", ["is 'mine:absent'; the module mine has no absent"]),
    ],
)
def test_what_is_no_network_is_refused_in_one_line(own, name, words):
    refused(lambda: network(BUILTIN, "glyphs100", f"mine:{name}", 7), *words)


def test_trying_a_network_leaves_no_trace(own):
    torch.manual_seed(3)
    made = find("mine:Bare").make(7, 32)
    before, state = torch.get_rng_state(), {name: value.clone() for name, value in made.state_dict().items()}
    assert try_out(adapt(made, "mine:Bare"), "mine:Bare", 32, training=True) == 7
    assert torch.equal(before, torch.get_rng_state())
    assert made.training
    assert list(state) == list(made.state_dict())
    for name, value in made.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_an_own_module_is_part_of_the_code_and_of_the_processes_that_follow(own):
    find("mine:Bare")
    first = extensions.contents()
    assert set(first) == {"mine"}
    assert os.environ[extensions.VARIABLE] == "mine"
    own.write_text(OWN + "\nother = 1\n")
    sys.modules.pop("mine")
    find.cache_clear()
    find("mine:Bare")
    assert extensions.contents() != first
    assert os.environ[extensions.VARIABLE] == "mine"


def test_names_that_mean_nothing(own, cfg):
    check = BUILTIN.check_network
    for name, words in {
        "resnet9": "it must be one of resnet",
        "os.path": "or timm:NAME, torchvision:NAME, package.module:constructor",
        "torchvision:resnet19": "torchvision has no network of this name; did you mean torchvision:resnet1",
        "torchvision:fasterrcnn_resnet50_fpn": "torchvision has no network of this name",
        "no_such_module:Net": "cannot be imported (ModuleNotFoundError: No module named 'no_such_module'; is its",
        "mine:Bare()": "it must be one of",
        "": "it must be one of",
    }.items():
        refused(lambda name=name: check("glyphs100", name, "x.yaml: KEY"), f"x.yaml: KEY is {name!r}", words)


def test_a_missing_timm_is_said_with_what_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    find.cache_clear()
    line = "timm cannot be imported"
    refused(lambda: find("timm:resnet18", "x.yaml: KEY"), "x.yaml: KEY is 'timm:resnet18'", line, '".[networks]"')


# ---------------------------------------------------------------- torchvision and timm


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "googlenet"])
def test_a_torchvision_network_keeps_its_names(name):
    """googlenet returns more than logits in training."""
    made = network(BUILTIN, "glyphs100", f"torchvision:{name}", 7)
    plain = models.get_model(name, num_classes=7, **({"init_weights": False} if name == "googlenet" else {}))
    plain.load_state_dict(made.state_dict())
    assert torch.equal(made.eval()(image())[0], plain.eval()(image()))
    logits, features = made.train()(image())
    assert logits.shape == (4, 7)
    assert features == {}


def test_a_vision_transformer_is_made_for_the_images():
    with torch.device("meta"):
        assert find("torchvision:vit_b_32").make(7, 64).image_size == 64


@TIMM
@pytest.mark.parametrize(("name", "pools"), [("resnet10t", True), ("vit_tiny_patch16_224", True), ("dla46x_c", False)])
def test_a_timm_network_gives_its_pooled_features_if_it_can(name, pools):
    import timm

    made = network(BUILTIN, "glyphs100", f"timm:{name}", 7)
    plain = timm.create_model(name, num_classes=7, **({"img_size": 32} if name.startswith("vit") else {}))
    plain.load_state_dict(made.state_dict())
    logits, features = made.eval()(image())
    assert torch.equal(logits, plain.eval()(image()))
    assert set(features) == ({"pooled_feat"} if pools else set())
    if pools:
        assert torch.equal(plain.get_classifier()(features["pooled_feat"]), logits)


def test_pooled_features_are_not_taken_if_they_give_other_logits(own):
    made = network(BUILTIN, "glyphs100", "mine:Halved", 7).eval()
    logits, features = made(image())
    assert features == {}
    assert torch.equal(logits, made.get_classifier()(made.forward_head(made.forward_features(image()), True)) / 2)


@TIMM
def test_names_of_timm_that_mean_nothing():
    for name, words in {"resnet19": "did you mean timm:resnet", "resnet50.nope": "did you mean timm:resnet50"}.items():
        refused(lambda name=name: find(f"timm:{name}", "KEY"), f"KEY is 'timm:{name}'; timm has no network", words)
    refused(lambda: network(BUILTIN, "glyphs100", "timm:inception_v3", 7), "cannot take images of 32 x 32 pixels")


def asking(method, feature="none"):
    register(BUILTIN)
    cfg = BUILTIN.cfg.clone()
    cfg.DATASET.TYPE, cfg.DISTILLER.TYPE, cfg.DeepKD.FEATURE = "glyphs100", method, feature
    return cfg


def test_methods_on_features_are_refused_with_networks_that_give_none(own):
    flat, pair, bare = (network(BUILTIN, "glyphs100", f"mine:{name}", 7) for name in ("Flat", "Pair", "Bare"))
    zoo = network(BUILTIN, "glyphs100", "resnet8", 7)
    settle_features(asking("KD"), [flat, zoo])
    settle_features(asking("FITNET"), [pair, zoo])
    words = ("DISTILLER.TYPE is 'FITNET'", "'feats'", "a Flat does not")
    refused(lambda: settle_features(asking("FITNET"), [zoo, flat]), *words)
    words = ("the features 'pooled_feat', and a Pair does not give them",)
    refused(lambda: settle_features(asking("RKD"), [pair, zoo]), *words)
    words = ("DeepKD.FEATURE is 'AT'", "a Flat does not give them; it must be none, or networks of the zoo")
    refused(lambda: settle_features(asking("DeepKD", "AT"), [flat, zoo]), *words)
    settle_features(asking("DeepKD"), [flat, bare])
    assert bare.deepkd_features == flat.deepkd_features == frozenset()
    settle_features(asking("DeepKD", "AT"), [bare, zoo])
    assert [maps.shape[2] for maps in bare(torch.zeros(2, 3, 32, 32))[1]["feats"]] == [15, 4]
    compiled, fresh = asking("DeepKD", "AT"), network(BUILTIN, "glyphs100", "mine:Bare", 7)
    compiled.SOLVER.EXECUTION = "compile"
    words = ("SOLVER.EXECUTION is 'compile'; it must be 'eager' with features of a Bare",)
    refused(lambda: settle_features(compiled, [fresh, zoo]), *words)


LAYERS = {
    "torchvision:resnet18": [(64, 16), (64, 8), (128, 4), (256, 2)],
    "torchvision:mobilenet_v2": [(16, 16), (24, 8), (32, 4), (96, 2)],
    "torchvision:vgg11_bn": [(64, 32), (128, 16), (256, 8), (512, 4), (512, 2)],
    "timm:resnet18": [(64, 16), (64, 8), (128, 4), (256, 2)],
    "timm:vit_tiny_patch16_224": [(192, 14), (192, 14)],
}
"""Channels and sides of the maps that networks of the libraries give."""


@TIMM
@pytest.mark.parametrize("name", LAYERS)
def test_networks_of_the_libraries_give_maps_of_features(name):
    side = 224 if "vit" in name else 32
    made = find(name).make(7, side)
    plain, made = copy.deepcopy(made), adapt(made, name)
    try_out(made, name, side, training=True)
    before = copy.deepcopy(made.state_dict())
    offer_maps(made, side)
    assert made.training
    assert all(torch.equal(before[part], value) for part, value in made.state_dict().items())
    torch.manual_seed(0)
    image = torch.randn(2, 3, side, side)
    plain.eval()
    said = copy.deepcopy(made).eval()(image)  # a copy gives its own
    assert torch.equal(said[0], plain(image))
    assert [(maps.shape[1], maps.shape[2]) for maps in said[1]["feats"]] == LAYERS[name]
    # the pass is one, and the maps have its graph
    features = made(image)[1]
    assert features["feats"][-1].requires_grad
    norms = [module for module in made.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(norm.num_batches_tracked.item() == 1 for norm in norms)
    if name == "torchvision:resnet18":
        # they are the stages' own outputs
        x = plain.maxpool(plain.relu(plain.bn1(plain.conv1(image))))
        assert torch.equal(said[1]["feats"][1], x := plain.layer1(x))
        assert torch.equal(said[1]["feats"][2], plain.layer2(x))


@TIMM
def test_maps_are_of_the_images_that_a_network_is_fed():
    made = adapt(find("timm:vit_tiny_patch16_224").make(7, 224), "vit")
    feed(made, Input(32, (0.5,) * 3, (0.5,) * 3), Input(224, (0.4,) * 3, (0.2,) * 3))
    offer_maps(made, 32)
    assert [maps.shape for maps in made(torch.zeros(2, 3, 32, 32))[1]["feats"]] == [(2, 192, 14, 14)] * 2


@TIMM
def test_networks_of_the_libraries_have_a_fourth_stream(train):
    networks = ("DISTILLER.STUDENT", "torchvision:shufflenet_v2_x0_5", "DeepKD.FEATURE", "AT")
    code, _, err = train("deepkd", *networks, "DATASET.TRAIN_PER_CLASS", "1")
    assert (code, err) == (0, ""), err
    line = json.loads((train.folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["loss"]["feat"] > 0
    assert line["execution"] == "eager"


# ---------------------------------------------------------------- weights


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """torchvision's cache in a folder; what is not there cannot be fetched."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def fail(*words, **options):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    return folder


def test_pretrained_weights_of_torchvision_come_with_their_input_and_classes(hub, cfg):
    weights = models.get_model_weights("shufflenet_v2_x0_5").DEFAULT
    plain = models.shufflenet_v2_x0_5()
    torch.save(plain.state_dict(), hub / weights.url.split("/")[-1])
    cfg.DISTILLER.TEACHER = "torchvision:shufflenet_v2_x0_5"
    refused(
        lambda: teacher_network(BUILTIN, cfg, 100),
        "holds a torchvision:shufflenet_v2_x0_5 of 1000 classes; this run has 100; DISTILLER.TEACHER_CLASSES says",
    )
    cfg.DISTILLER.TEACHER_CLASSES = list(range(999, 899, -1))
    made = teacher_network(BUILTIN, cfg, 100).eval()
    assert not any(p.requires_grad for p in made.parameters())
    pixels = (torch.arange(2 * 3 * 32 * 32).reshape(2, 3, 32, 32) * 7 % 256) / 255
    source, given = data.source("glyphs100"), {"size": (224, 224), "mode": "bilinear", "antialias": True}
    batch = normalise(pixels, source.mean, source.std)
    theirs = normalise(nn.functional.interpolate(pixels, **given), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    torch.testing.assert_close(made(batch)[0], plain.eval()(theirs).flip(1)[:, :100], rtol=1e-4, atol=1e-4)
    # another input than the weights' own, if the config says so
    cfg.DISTILLER.TEACHER_INPUT.SIZE, cfg.DISTILLER.TEACHER_INPUT.MEAN = 32, list(source.mean)
    cfg.DISTILLER.TEACHER_INPUT.STD = list(source.std)
    made = teacher_network(BUILTIN, cfg, 100).eval()
    torch.testing.assert_close(made(batch)[0], plain(batch).flip(1)[:, :100])


def test_weights_that_cannot_be_fetched_say_from_where_and_how_to_do_without(hub, cfg):
    cfg.DISTILLER.TEACHER = "torchvision:resnet18"
    url = models.ResNet18_Weights.DEFAULT.url
    refused(lambda: teacher_network(BUILTIN, cfg, 100), "no network", url, "DISTILLER.TEACHER_WEIGHTS must name their")
    cfg.DISTILLER.STUDENT, cfg.DISTILLER.STUDENT_WEIGHTS = "torchvision:resnet18", "pretrained"
    refused(lambda: student_network(BUILTIN, cfg, 100), url, "without a network DISTILLER.STUDENT_WEIGHTS must name")
    cfg.DISTILLER.STUDENT = "resnet8"
    refused(lambda: student_network(BUILTIN, cfg, 100), "is 'pretrained'; it must be a file with resnet8")


def test_a_cached_file_of_torchvision_runs_no_code(hub, cfg):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(hub / "evil"),)

    (hub / models.ResNet18_Weights.DEFAULT.url.split("/")[-1]).write_bytes(pickle.dumps(Evil()))
    cfg.DISTILLER.TEACHER = "torchvision:resnet18"
    refused(lambda: teacher_network(BUILTIN, cfg, 100), "torchvision's cache of https://")
    assert not (hub / "evil").exists()


@TIMM
def test_pretrained_weights_of_timm_come_from_its_hub(cfg, monkeypatch):
    import timm
    from timm.models import _builder

    plain = timm.create_model("resnet10t")
    monkeypatch.setattr(_builder, "load_state_dict_from_hf", lambda *words, **options: plain.state_dict())
    cfg.DISTILLER.TEACHER, cfg.DISTILLER.TEACHER_CLASSES = "timm:resnet10t", list(range(100))
    made = teacher_network(BUILTIN, cfg, 100).eval()
    native = timm.get_pretrained_cfg("resnet10t").input_size[-1]
    assert made.deepkd_side == native
    source = data.source("glyphs100")
    pixels = torch.rand(2, 3, 32, 32)
    theirs = nn.functional.interpolate(pixels, (native, native), mode="bilinear", antialias=True)
    theirs = normalise(theirs, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    batch = normalise(pixels, source.mean, source.std)
    torch.testing.assert_close(made(batch)[0], plain.eval()(theirs)[:, :100], rtol=1e-4, atol=1e-4)

    def fail(*words, **options):
        raise OSError("cannot reach the hub")

    monkeypatch.setattr(_builder, "load_state_dict_from_hf", fail)
    line = "the Hugging Face hub, timm/resnet10t.c3_in1k; without a network DISTILLER.TEACHER_WEIGHTS must name"
    refused(lambda: teacher_network(BUILTIN, cfg, 100), "cannot reach the hub", line)
    cfg.DISTILLER.TEACHER = "timm:resnet20t"
    refused(lambda: teacher_network(BUILTIN, cfg, 100), "has no network of this name")
    cfg.DISTILLER.TEACHER = "timm:vit_small_patch14_dinov2.lvd142m"
    refused(lambda: teacher_network(BUILTIN, cfg, 100), "are of no classes; DISTILLER.TEACHER_WEIGHTS must name a file")


def test_a_student_starts_from_weights_and_keeps_a_new_head(own, cfg, tmp_path, capsys):
    cfg.DISTILLER.STUDENT, cfg.DISTILLER.STUDENT_WEIGHTS = "mine:Bare", str(tmp_path / "w.pt")
    torch.manual_seed(5)
    fresh = student_network(BUILTIN, _without(cfg), 7)
    source = sys.modules["mine"].Bare(num_classes=9)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "w.pt")
    torch.manual_seed(5)
    made = student_network(BUILTIN, cfg, 7)
    assert (
        "DISTILLER.STUDENT_WEIGHTS has 9 classes, so head.weight, head.bias begin at random" in capsys.readouterr().out
    )
    for name, value in made.state_dict().items():
        expected = fresh if name.startswith("head.") else source
        assert torch.equal(value, expected.state_dict()[name]), name
    torch.save(sys.modules["mine"].Bare(num_classes=7).state_dict(), tmp_path / "w.pt")
    student_network(BUILTIN, cfg, 7)
    assert capsys.readouterr().out == ""
    torch.save(network(BUILTIN, "glyphs100", "resnet8", 7).state_dict(), tmp_path / "w.pt")
    refused(lambda: student_network(BUILTIN, cfg, 7), "STUDENT_WEIGHTS holds another network than mine:Bare")


def _without(cfg):
    cfg = cfg.clone()
    cfg.DISTILLER.STUDENT_WEIGHTS = ""
    return cfg


# ---------------------------------------------------------------- a teacher's own input and classes


def normalise(pixels, mean, std):
    return (pixels - torch.tensor(mean).reshape(3, 1, 1)) / torch.tensor(std).reshape(3, 1, 1)


class Mirror(nn.Module):
    """Keeps what it is given."""

    def forward(self, image):
        self.seen = image
        return image.flatten(1)


def test_an_image_is_converted_as_if_its_pixels_were_normalised_so():
    pixels = torch.arange(256).repeat(3 * 12).reshape(3, 3, 32, 32) / 255
    ours, theirs = (
        Input(32, (0.5, 0.45, 0.4), (0.25, 0.2, 0.3)),
        Input(32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    )
    mirror = adapt(Mirror(), "mirror")
    feed(mirror, ours, theirs)
    mirror(normalise(pixels, *ours[1:]))
    torch.testing.assert_close(mirror.seen, normalise(pixels, *theirs[1:]), rtol=0, atol=2e-6)
    assert mirror.state_dict() == {}
    # the same input changes nothing, not even by rounding
    same = adapt(Mirror(), "mirror")
    feed(same, ours, ours)
    given = normalise(pixels, *ours[1:])
    same(given)
    assert same.seen is given
    # another size: as torchvision resizes a float image
    sized = adapt(Mirror(), "mirror")
    feed(sized, ours, theirs._replace(side=20))
    sized(normalise(pixels, *ours[1:]))
    wanted = nn.functional.interpolate(pixels, (20, 20), mode="bilinear", antialias=True)
    torch.testing.assert_close(sized.seen, normalise(wanted, *theirs[1:]), rtol=0, atol=5e-6)


def test_a_teacher_fed_otherwise_has_another_fingerprint(cfg):
    cfg.DISTILLER.TEACHER_WEIGHTS = GLYPHS
    plain = teacher_network(BUILTIN, cfg, 100)
    assert not isinstance(plain, Adapter)
    prints = [checkpoint.fingerprint(plain)]
    for key, value in {"SIZE": 40, "MEAN": [0.5, 0.5, 0.5], "STD": [0.5, 0.5, 0.5]}.items():
        other = cfg.clone()
        other.DISTILLER.TEACHER_INPUT[key] = value
        made = teacher_network(BUILTIN, other, 100)
        assert made.state_dict().keys() == plain.state_dict().keys()
        prints.append(checkpoint.fingerprint(made))
    cfg.DISTILLER.TEACHER_CLASSES = [*range(99, -1, -1)]
    prints.append(checkpoint.fingerprint(teacher_network(BUILTIN, cfg, 100)))
    assert len(set(prints)) == 5


@pytest.mark.parametrize(
    ("name", "weights", "size", "side"),
    [
        ("torchvision:resnet18", "", 0, 224),  # its library's weights, which are not fetched
        ("torchvision:resnet18", "mine.pt", 0, None),  # taken to be trained on the data set's 32 pixels
        ("torchvision:resnet18", "mine.pt", 48, 48),
        ("resnet20", GLYPHS, 40, 40),
        ("resnet20", GLYPHS, 0, None),
    ],
)
def test_a_teacher_without_its_weights_takes_images_as_it_would_with_them(cfg, name, weights, size, side):
    node = cfg.DISTILLER
    node.TEACHER, node.TEACHER_WEIGHTS, node.TEACHER_INPUT.SIZE = name, weights, size
    made = untrained_teacher(BUILTIN, cfg, 100)
    assert getattr(made, "deepkd_side", None) == side
    assert made.eval()(torch.zeros(1, 3, 32, 32))[0].shape == (1, 100)
    if weights == GLYPHS:
        assert side == getattr(teacher_network(BUILTIN, cfg, 100), "deepkd_side", None)


def test_a_teacher_of_more_classes_in_another_order_gives_the_data_sets(cfg, tmp_path):
    """By number and by name; the oracle is the teacher whose rows were moved."""
    plain = trained_network(BUILTIN, "glyphs100", "resnet20", 100, GLYPHS, "KEY").eval()
    order = np.random.default_rng(0).permutation(103)
    names = np.array([*CHARACTERS, "star", "Mond", "Sonne"])[order]
    places = [int(np.flatnonzero(order == label)[0]) for label in range(100)]
    large = plain.state_dict()
    for name in ("fc.weight", "fc.bias"):
        value = large[name]
        large[name] = torch.cat([value, torch.full_like(value[:3], 9.0)])[torch.from_numpy(order)]
    torch.save(large, tmp_path / "large.pt")
    (tmp_path / "names.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    cfg.DISTILLER.TEACHER_WEIGHTS = str(tmp_path / "large.pt")
    refused(
        lambda: teacher_network(BUILTIN, cfg, 100), "holds a resnet20 of 103 classes; this run has 100; DISTILLER.T"
    )
    for classes in (places, str(tmp_path / "names.txt")):
        cfg.DISTILLER.TEACHER_CLASSES = classes
        made = teacher_network(BUILTIN, cfg, 100).eval()
        torch.testing.assert_close(made(image())[0], plain(image())[0])
    cfg.DISTILLER.TEACHER_CLASSES = places[:-1]
    refused(lambda: teacher_network(BUILTIN, cfg, 100), "has 99 entries; it must have 100")


def test_classes_that_do_not_fit_are_refused(tmp_path):
    source = data.Source(None, num_classes=2, train=2, test=2, side=8, mean=(0,) * 3, std=(1,) * 3)
    named = data.Source(
        *(None,),
        num_classes=2,
        train=2,
        test=2,
        side=8,
        mean=(0,) * 3,
        std=(1,) * 3,
        class_names=lambda root: ["a", "b"],
    )
    file = tmp_path / "names.txt"
    assert choose_classes([4, 0], source, "", 5) == [4, 0]
    refused(lambda: choose_classes([0, 5], source, "", 5), "has the entry 5; the teacher has 5 classes, 0 … 4")
    refused(lambda: choose_classes([1, 1], source, "", 5), "has the entry 1 2 times")
    refused(lambda: choose_classes([1, 2, 3], source, "", 5), "has 3 entries; it must have 2")
    refused(lambda: choose_classes(str(file), named, "", 3), "names.txt: DISTILLER.TEACHER_CLASSES must name a text")
    for text, words in {
        "b\nc\na\n": None,
        "b\n\na": "line 2 is empty",
        "b\na": "names a file of 2 classes; the teacher has 3",
        "b\nc\nd": "does not name 'a', a class of the data set",
        "a\na\nb": "names 2 times 'a', a class of the data set",
    }.items():
        file.write_text(text)
        if words is None:
            assert choose_classes(str(file), named, "", 3) == [2, 0]
        else:
            refused(lambda words=words: choose_classes(str(file), named, "", 3), str(file), words)
    file.write_text("b\nc\na")
    refused(lambda: choose_classes(str(file), source, "", 3), "the data set has no names of classes")


def test_class_names_of_the_data_sets(cifar_root, tmp_path):
    names = data.source("cifar100").class_names
    assert names(str(cifar_root)) is None  # without the file `meta`
    for split in ("train", "test"):
        for name in ("10", "9"):
            (tmp_path / split / name).mkdir(parents=True)
    assert names(str(tmp_path)) == ["9", "10"]
    (tmp_path / "cifar-100-python").mkdir()
    (tmp_path / "cifar-100-python" / "train").write_bytes(b"")
    meta = tmp_path / "cifar-100-python" / "meta"
    meta.write_bytes(pickle.dumps({"fine_label_names": ["apple", "bee"], "coarse_label_names": ["all"]}, 2))
    assert names(str(tmp_path)) == ["apple", "bee"]
    meta.write_bytes(b"nothing")
    refused(lambda: names(str(tmp_path)), str(meta), "must hold the names")
    assert data.source("imagenet").class_names(str(tmp_path)) is None
    (tmp_path / "imagenet" / "train" / "n01").mkdir(parents=True)
    assert data.source("imagenet").class_names(str(tmp_path)) == ["n01"]


# ---------------------------------------------------------------- runs


def test_a_student_of_torchvision_trains_and_its_file_loads_there(train):
    schedule = ("SOLVER.WARMUP_EPOCHS", "0", "SOLVER.LR_SCHEDULE", "step")
    student = ("DISTILLER.STUDENT", "torchvision:shufflenet_v2_x0_5", "SOLVER.EPOCHS", "1")
    code, out, err = train("kd", *student, *schedule)
    assert code == 0, err
    assert f"next      deepkd eval {train.folder}\n" in out
    plain = models.shufflenet_v2_x0_5(num_classes=100)
    plain.load_state_dict(torch.load(train.folder / "student_best", weights_only=True)["model"])


def test_own_networks_train_with_a_table_and_are_tested(own, train, data_root, tmp_path, capsys):
    options = ("DISTILLER.STUDENT", "mine:Bare", "DISTILLER.TEACHER_LOGITS", "table")
    options += ("DISTILLER.LOGITS_DIR", str(tmp_path / "tables"), "SOLVER.AMP", "True")
    code, _, err = train("deepkd", *options, "DISTILLER.TEACHER_INPUT.SIZE", "36")
    assert code == 0, err
    words = ["-c", str(train.folder / "student_best"), "-d", "glyphs100", "--root", str(data_root)]
    assert evaluate.main(["-m", "mine:Bare", *words]) == 0
    assert "mine:Bare on glyphs100: top-1" in capsys.readouterr().out
    assert evaluate.main(["-m", "torchvision:nope", *words]) == 2
    assert "-m is 'torchvision:nope'; torchvision has no" in capsys.readouterr().err


def test_another_file_of_classes_is_another_teacher(train, tmp_path):
    file = tmp_path / "names.txt"
    file.write_text("\n".join(CHARACTERS), encoding="utf-8")
    options = ("DISTILLER.TEACHER_CLASSES", str(file))
    code, _, err = train("kd", *options)
    assert code == 0, err
    config = yaml.safe_load((train.folder / "config.yaml").read_text())
    assert config["DISTILLER"]["TEACHER_CLASSES"] == str(file)
    swapped = [*CHARACTERS]
    swapped[:2] = swapped[1::-1]
    file.write_text("\n".join(swapped), encoding="utf-8")
    code, _, err = train("kd", *options, "SOLVER.EPOCHS", "3", flags=("--resume",))
    assert code == 2
    assert "--resume needs the run's own teacher" in err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("DISTILLER.STUDENT", "torchvision:nope"), "command line: DISTILLER.STUDENT is 'torchvision:nope'"),
        (("DISTILLER.TEACHER_CLASSES", "[0, -1]"), "DISTILLER.TEACHER_CLASSES is [0, -1]; it must be a list of whole"),
        (("DISTILLER.TEACHER_CLASSES", "5"), "DISTILLER.TEACHER_CLASSES is 5; it must be a list of whole"),
        (("DISTILLER.TEACHER_INPUT.STD", "[0, 1, 1]"), "DISTILLER.TEACHER_INPUT.STD is [0, 1, 1]; it must be a list"),
        (
            ("DISTILLER.TEACHER_INPUT.MEAN", "[0.5]"),
            "DISTILLER.TEACHER_INPUT.MEAN is [0.5]; it must be a list of three",
        ),
        (("DISTILLER.TEACHER_INPUT.SIZE", "-1"), "DISTILLER.TEACHER_INPUT.SIZE is -1; it must be a whole number"),
    ],
)
def test_wrong_keys_are_told_before_anything_is_read(train, options, words):
    code, _, err = train("kd", *options)
    assert code == 2
    assert words in err
    assert not train.folder.exists()


def test_mdistillers_own_launcher_says_that_it_cannot(cfg):
    mdistiller_host.check_launcher(BUILTIN, cfg, {})
    for key, value in {
        "STUDENT": "torchvision:resnet18",
        "TEACHER": "mine:Bare",
        "STUDENT_WEIGHTS": "w.pt",
        "TEACHER_CLASSES": [1, 2],
    }.items():
        other = cfg.clone()
        other.DISTILLER[key] = value
        line = f"x.yaml: DISTILLER.{key} is "
        refused(
            lambda other=other, key=key: mdistiller_host.check_launcher(BUILTIN, other, {f"DISTILLER.{key}": "x.yaml"}),
            *(line, "under mdistiller's own launcher"),
        )


def test_choose_keeps_the_order():
    mirror = adapt(nn.Flatten(), "flatten")
    choose(mirror, [5, 0])
    assert mirror(torch.arange(6.0).reshape(1, 6))[0].tolist() == [[5.0, 0.0]]


# ---------------------------------------------------------------- many kinds of networks, in both roles

TORCHVISION = (
    *("resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "regnet_y_400mf", "efficientnet_b0", "convnext_tiny"),
    *("squeezenet1_1", "densenet121", "googlenet", "swin_t", "mnasnet0_5"),
)
OF_TIMM = (
    *("resnet10t", "vit_tiny_patch16_224", "mixer_s32_224", "efficientnet_lite0", "convnext_atto", "regnety_002"),
    *("mobilenetv3_small_050", "levit_128s", "deit_tiny_distilled_patch16_224", "xcit_nano_12_p16_224", "dla46x_c"),
    *("poolformer_s12", "edgenext_xx_small", "ghostnet_050", "swin_tiny_patch4_window7_224"),
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [f"torchvision:{one}" for one in TORCHVISION] + [pytest.param(f"timm:{one}", marks=TIMM) for one in OF_TIMM]
)
@pytest.mark.parametrize("method", ["KD", "DeepKD"])
def test_every_kind_of_network_takes_a_step_in_both_roles(name, method, cfg, tmp_path):
    torch.manual_seed(0)
    cfg.DISTILLER.TYPE, cfg.SOLVER.TRAINER = method, "DecoupledMomentumSGD"
    cfg.SOLVER.WARMUP_EPOCHS = 0
    torch.save(network(BUILTIN, "glyphs100", name, 100).state_dict(), tmp_path / "w.pt")
    file = str(tmp_path / "w.pt")
    for student, teacher, weights in ((name, "resnet20", GLYPHS), ("resnet8", name, file)):
        cfg.DISTILLER.STUDENT, cfg.DISTILLER.TEACHER, cfg.DISTILLER.TEACHER_WEIGHTS = student, teacher, weights
        distiller = launch.make_distiller(BUILTIN, cfg, 4, 100)
        trainer = DecoupledMomentumTrainer("", distiller, range(1), range(1), cfg)
        before = [part.clone() for part in distiller.student.parameters()]
        taught = checkpoint.fingerprint(distiller.teacher)
        batch = data.source("glyphs100").noise(4)
        outcome = trainer.step(trainer.prepare(batch, 1, 1), 1)
        assert all(loss.isfinite() for loss in outcome.losses.values())
        assert outcome.logits.shape == (4, 100)
        moved = [not torch.equal(a, b) for a, b in zip(before, distiller.student.parameters())]
        assert sum(moved) > len(moved) / 2
        assert checkpoint.fingerprint(distiller.teacher) == taught
