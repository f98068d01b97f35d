import pytest

from deepkd_plugin.distillers import DISTILLERS, KD
from deepkd_plugin.study.report import published

TOP1 = "top-1 (%)"
CIFAR = ("cifar100", TOP1, "resnet32x4", "resnet8x4")


@pytest.mark.parametrize(
    ("method", "name", "value", "certainty"),
    [
        ("kd", "KD", 73.33, "stated"),
        ("dkd", "DKD", 76.32, "stated"),
        ("mlkd", "MLKD", 77.08, "stated"),
        ("deepkd", "KD+DeepKD", 76.69, "value and pair inferred"),
        ("deepkd_mlkd", "MLKD+DeepKD", 79.15, "pair inferred from the stated gain (+2.07)"),
        ("deepkd_crld", "CRLD+DeepKD", 79.25, "pair inferred; implies CRLD 77.60"),
    ],
)
def test_our_methods_have_their_published_number_with_source_and_certainty(method, name, value, certainty):
    held = published.find(*CIFAR, method)

    assert (held.method, held.value, held.text, held.certainty) == (name, value, f"{value:.2f}", certainty)
    assert held.source


@pytest.mark.parametrize("method", ["crld", "deepkd_dkd", "vanilla", "dot", "none", "delta0.05"])
def test_a_method_without_a_published_number_has_none(method):
    assert published.find(*CIFAR, method) is None


def test_a_pair_a_data_set_or_a_metric_without_one_has_none():
    assert published.find("cifar100", TOP1, "resnet32x4", "vgg8", "kd") is None
    assert published.find("glyphs100", TOP1, "resnet32x4", "resnet8x4", "kd") is None
    assert published.find("cifar100", "top-5 (%)", "resnet32x4", "resnet8x4", "kd") is None


def test_rows_of_no_pair_belong_to_no_cell():
    assert any(row["teacher"] == "" for row in published.rows())
    assert published.find("coco", "AP", "", "", "deepkd") is None


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        (None, "published without DTM, ours with it"),
        ({"DeepKD.MASK.TYPE": "dynamic"}, "published without DTM, ours with it"),
        ({"DeepKD.MASK.TYPE": "none"}, ""),
        ({"DeepKD.MASK.TYPE": "none", "EXPERIMENT.LOGIT_STAND": True}, "ours with standardised logits"),
    ],
)
def test_a_note_says_where_the_published_variant_differs(settings, note):
    assert published.find(*CIFAR, "deepkd", settings).note == note


def test_the_published_variant_with_the_mask_is_taken_where_there_is_one():
    held = published.find("imagenet", TOP1, "ResNet34", "ResNet18", "deepkd_crld")
    without = published.find("imagenet", TOP1, "ResNet34", "ResNet18", "deepkd_crld", {"DeepKD.MASK.TYPE": "none"})

    assert (held.method, held.value, held.note) == ("CRLD+DeepKD+DTM", 74.23, "")
    assert without.note == "published with DTM, ours without it"


@pytest.mark.parametrize(("mask", "name"), [("dynamic", "KD+DeepKD+DTM"), ("none", "KD+DeepKD")])
def test_of_two_published_variants_the_one_like_ours_is_taken(monkeypatch, mask, name):
    row = {"dataset": "cifar100", "metric": "top1", "teacher": "a", "student": "b", "value": "70.00"}
    row |= {"source": "a note", "certainty": "stated"}
    both = tuple(row | {"method": method} for method in ("KD+DeepKD", "KD+DeepKD+DTM"))
    monkeypatch.setattr(published, "rows", lambda: both)

    held = published.find("cifar100", TOP1, "a", "b", "deepkd", {"DeepKD.MASK.TYPE": mask})

    assert (held.method, held.note) == (name, "")


def test_imagenets_mobilenet_goes_by_two_names():
    v1, v2 = (published.find("imagenet", TOP1, "ResNet50", name, "kd") for name in ("MobileNetV1", "MobileNetV2"))

    assert v1.value == v2.value == 70.5
    assert v1.note == ""
    assert "MobileNetV1" in v2.note


def test_mlkd_by_its_formula_is_noted():
    assert "MLKD.VARIANT" in published.find(*CIFAR, "mlkd", {"MLKD.VARIANT": "formula"}).note
    assert published.find(*CIFAR, "mlkd", {"MLKD.VARIANT": "release"}).note == ""


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"DATASET.TRAIN_PER_CLASS": 50}, {}),
        ({"DATASET.HOLDOUT": 0.2}, {}),
        ({}, {"SOLVER.EPOCHS": "2"}),
    ],
)
def test_another_protocol_is_not_comparable(settings, options):
    held = published.find(*CIFAR, "kd", settings, options)

    assert not held.comparable
    assert "not comparable" in held.note
    assert published.find(*CIFAR, "kd", {"DATASET.TRAIN_PER_CLASS": 0, "DATASET.HOLDOUT": 0.0}).comparable


def test_options_that_change_the_recipe_are_noted_and_others_are_not():
    held = published.find(*CIFAR, "kd", {}, {"SOLVER.LR": "0.1", "DATASET.ROOT": "/data"})

    assert (held.note, held.comparable) == ("ours with SOLVER.LR 0.1", True)


def test_a_value_that_is_a_range_is_text(monkeypatch):
    row = {"dataset": "cifar100", "metric": "top1", "teacher": "a", "student": "b", "method": "KD"}
    row |= {"value": "+47% to +59%", "source": "a note", "certainty": "range"}
    monkeypatch.setattr(published, "rows", lambda: (row,))

    held = published.find("cifar100", TOP1, "a", "b", "kd")

    assert (held.text, held.value) == ("+47% to +59%", None)


def test_every_row_has_a_source_and_a_certainty():
    assert len(published.rows()) > 60
    assert all(row["value"] and row["source"] and row["certainty"] for row in published.rows())


def test_a_method_of_one_s_own_is_called_as_it_says(monkeypatch):
    class NKD(KD):
        published = "N"

    class Plain(KD):
        published = ""

    row = {"dataset": "cifar100", "metric": "top1", "teacher": "a", "student": "b", "value": "70.00"}
    row |= {"source": "a note", "certainty": "stated"}
    methods = ("N", "N+DeepKD+DTM", "Plain", "KD")
    monkeypatch.setattr(published, "rows", lambda: tuple(row | {"method": name} for name in methods))
    for cls in (NKD, Plain):
        monkeypatch.setitem(DISTILLERS, cls.__name__, cls)

    of = ("cifar100", TOP1, "a", "b")
    assert published.find(*of, "nkd").method == "N"
    assert published.find(*of, "deepkd_nkd").method == "N+DeepKD+DTM"
    assert published.find(*of, "plain").method == "Plain"
    assert published.find(*of, "kd").method == "KD"
