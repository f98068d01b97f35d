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
        ("deepkd", "KD+DeepKD", 76.69, "hearsay; value and pair inferred"),
        ("deepkd_mlkd", "MLKD+DeepKD+DTM", 79.15, "hearsay (the pair; the value is stated)"),
        ("deepkd_crld", "CRLD+DeepKD", 79.25, "hearsay; pair inferred; implies CRLD 77.60"),
    ],
)
def test_our_methods_have_their_published_number_with_source_and_certainty(method, name, value, certainty):
    held = published.find(*CIFAR, method)

    assert (held.method, held.value, held.text, held.certainty) == (name, value, f"{value:.2f}", certainty)
    assert held.source


@pytest.mark.usefixtures("vouched")
def test_a_row_without_a_mask_is_over_its_base_and_taken_to_be_so():
    held = published.find(*CIFAR, "deepkd_nomask")
    assert (held.method, held.note) == ("KD+DeepKD", "")
    with_mask = published.find("imagenet", TOP1, "ResNet34", "ResNet18", "deepkd_crld_nomask")
    assert with_mask.method == "CRLD+DeepKD+DTM"
    assert with_mask.note.startswith("published with DTM, ours without it")


@pytest.mark.parametrize(
    "method", ["crld", "deepkd_dkd", "vanilla", "dot", "none", "delta0.05", "kd_matched", "kd_nomask"]
)
def test_a_method_without_a_published_number_has_none(method):
    assert published.find(*CIFAR, method) is None


def test_a_pair_a_data_set_or_a_metric_without_one_has_none():
    assert published.find("cifar100", TOP1, "resnet32x4", "vgg8", "kd") is None
    assert published.find("glyphs100", TOP1, "resnet32x4", "resnet8x4", "kd") is None
    assert published.find("cifar100", "top-5 (%)", "resnet32x4", "resnet8x4", "kd") is None


def test_rows_of_no_pair_belong_to_no_cell():
    assert any(row["teacher"] == "" for row in published.rows())
    assert published.find("coco", "AP", "", "", "deepkd") is None


@pytest.mark.usefixtures("vouched")
@pytest.mark.parametrize(
    ("settings", "note"),
    [
        (None, "published without DTM, ours with it"),
        ({"DeepKD.MASK.TYPE": "dynamic"}, "published without DTM, ours with it"),
        ({"DeepKD.MASK.TYPE": "none"}, ""),
        ({"DeepKD.MASK.TYPE": "top_p"}, "ours with DeepKD.MASK.TYPE top_p"),
        ({"DeepKD.MASK.TYPE": "none", "EXPERIMENT.LOGIT_STAND": True}, "ours with standardised logits"),
        ({"DeepKD.MASK.TYPE": "none", "DISTILLER.ENTROPY_WEIGHT": "formula"}, "ours with samples weighted by entropy"),
    ],
)
def test_a_note_says_where_the_published_variant_differs(settings, note):
    assert published.find(*CIFAR, "deepkd", settings).note == note


@pytest.mark.parametrize("method", ["deepkd", "deepkd_mlkd", "deepkd_crld"])
def test_hearsay_is_quoted_and_compared_with_nothing(method):
    held = published.find(*CIFAR, method)

    assert held.value is not None
    assert not held.comparable
    assert held.comparable_value is None
    assert "not comparable: nobody who can be named stands for it" in held.note


def test_what_only_a_lost_note_says_is_hearsay():
    of_a_note = [row for row in published.rows() if "note" in row["source"]]

    assert len(of_a_note) == 9  # a base that follows from a gain among them
    assert all(row["certainty"].startswith("hearsay") for row in of_a_note)


def test_other_people_s_methods_are_context_and_no_cell_s_value():
    there = published.context("imagenet", TOP1, "ResNet34", "ResNet18")

    assert [text.split(":")[0] for text in there] == [
        "AuxKD",
        "WKD-L+F",
        "KD (rerun by torchdistill)",
        "LSKD (rerun by torchdistill)",
    ]
    assert "72.76" in there[1]
    assert published.find("imagenet", TOP1, "ResNet34", "ResNet18", "kd").value == 71.03
    assert any(
        text.startswith("LSKD over MLKD: 78.28 (") and "best epoch" in text for text in published.context(*CIFAR)
    )
    assert published.context("glyphs100", TOP1, "resnet20", "resnet8") == []


def test_the_published_variant_with_the_mask_is_taken_where_there_is_one():
    held = published.find("imagenet", TOP1, "ResNet34", "ResNet18", "deepkd_crld")
    without = published.find("imagenet", TOP1, "ResNet34", "ResNet18", "deepkd_crld", {"DeepKD.MASK.TYPE": "none"})

    how = "published: over CRLD under another schedule than CRLD's own, and another weight of NCG"
    assert (held.method, held.value, held.note) == ("CRLD+DeepKD+DTM", 74.23, how)
    assert without.note == f"published with DTM, ours without it; {how}"


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
    assert published.find(*CIFAR, "mlkd", {"MLKD.VARIANT": "release"}).note.startswith("published: 480 epochs")


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
