"""What is searched of a method, and the options of a point."""

import random
from pathlib import Path

import pytest

from deepkd_plugin import config
from deepkd_plugin.config.tree import get
from deepkd_plugin.errors import UserError
from deepkd_plugin.study.kinds import KINDS
from deepkd_plugin.study.tune.space import Range, spaces

CONFIGS = Path(__file__).parents[3] / "configs" / "glyphs100" / "res20_res8"
KIND = KINDS["classification"]


class Chance:
    """Suggests values at random, or the ends of ranges."""

    def __init__(self, seed, ends=False):
        self.random, self.ends = random.Random(seed), ends

    def suggest_float(self, name, low, high, log=False):
        return self.random.choice([low, high]) if self.ends else self.random.uniform(low, high)

    def suggest_int(self, name, low, high):
        return self.random.randint(low, high)

    def suggest_categorical(self, name, choices):
        return self.random.choice(choices)


def read(name, *options):
    return KIND.read(CONFIGS / f"{name}.yaml", options)


def of(*names, given=(), rates=None, options=()):
    return spaces({name: read(name, *options) for name in names}, given, rates)


def test_what_methods_have_in_common_is_searched_in_the_same_ranges():
    made = of("vanilla", "kd", "dkd", "deepkd", "deepkd_dkd")
    for name in ("rate", "warmup"):
        assert len({space.ranges[name] for space in made.values()}) == 1
    # the configs' lowest rate is 0.02, the highest 0.2
    assert made["kd"].ranges["rate"].low == pytest.approx(0.02 / 4)
    assert made["kd"].ranges["rate"].high == pytest.approx(0.2 * 4)
    assert {*made["vanilla"].ranges} == {*made["kd"].ranges} == {"rate", "warmup"}
    assert {*made["deepkd"].ranges} == {"rate", "warmup", "delta", "k", "optimal", "easy", "middle"}
    assert made["deepkd"].masks == ("none", "static", "dynamic")
    assert of("kd", rates=(0.01, 3.0))["kd"].ranges["rate"].high == 3.0


def test_a_config_as_it_stands_is_a_point_without_options():
    for name, space in of("kd", "deepkd", "deepkd_mlkd").items():
        point = {key: space.own[key] for key in space.own if key != "k"}
        assert space.options(point) == [], name


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("name", ["deepkd", "deepkd_crld"])
def test_every_point_is_a_config(name, ends):
    space = of(name)[name]
    for seed in range(12):
        point = space.ask(Chance(seed, ends))
        cfg = read(name, *space.options(point))
        assert pytest.approx(point["rate"], rel=6e-3) == cfg.SOLVER.LR
        assert point["warmup"] == cfg.SOLVER.WARMUP_EPOCHS
        deltas = [get(cfg, f"SOLVER.DECOUPLED.DELTA.{stream}") for stream in ("TOG", "TCG", "NCG")]
        assert deltas == pytest.approx([point["delta"], -point["delta"], point["delta"]], abs=1e-5)
        assert point["mask"] == cfg.DeepKD.MASK.TYPE
        assert {"k", "optimal", "easy", "middle"} & point.keys() == {
            "none": set(),
            "static": {"k"},
            "dynamic": {"optimal", "easy", "middle"},
        }[point["mask"]]
        if point["mask"] == "dynamic":
            first, second = cfg.DeepKD.MASK.PHASES
            assert (first, (second - first) / (1 - first)) == pytest.approx((point["easy"], point["middle"]), abs=5e-3)


def test_deltas_are_searched_under_every_trainer_of_momenta_by_stream():
    trainers = {name: of("deepkd", options=("SOLVER.TRAINER", name))["deepkd"].ranges for name in config.TRAINERS}
    assert all("delta" in ranges for ranges in trainers.values())
    assert "delta" not in of("kd")["kd"].ranges


def test_deltas_keep_their_proportions():
    options = ("SOLVER.DECOUPLED.DELTA.TOG", "0.025", "SOLVER.DECOUPLED.DELTA.TCG", "-0.05")
    space = of("deepkd", options=options)["deepkd"]
    assert space.own["delta"] == 0.075
    words = space.options({"delta": 0.03})
    assert dict(zip(words[::2], map(float, words[1::2]))) == {
        "SOLVER.DECOUPLED.DELTA.TOG": 0.01,
        "SOLVER.DECOUPLED.DELTA.TCG": -0.02,
        "SOLVER.DECOUPLED.DELTA.NCG": 0.03,
    }


@pytest.mark.parametrize(
    ("given", "gone"),
    [
        ("SOLVER.LR", {"rate"}),
        ("SOLVER.WARMUP_EPOCHS", {"warmup"}),
        ("SOLVER.DECOUPLED.DELTA.NCG", {"delta"}),
        ("DeepKD.MASK.PHASES", {"easy", "middle"}),
        ("DeepKD.MASK.OPTIMAL", {"optimal"}),
    ],
)
def test_what_the_command_line_sets_is_not_searched(given, gone):
    everything = of("deepkd")["deepkd"].ranges.keys()
    assert everything - of("deepkd", given={given})["deepkd"].ranges.keys() == gone


def test_a_mask_that_is_set_keeps_its_own_ranges_alone():
    options = ("DeepKD.MASK.TYPE", "static")
    space = of("deepkd", given={"DeepKD.MASK.TYPE"}, options=options)["deepkd"]
    assert space.masks == ()
    assert {"k"} == space.ranges.keys() - {"rate", "warmup", "delta"}
    assert "k" in space.ask(Chance(0))


@pytest.mark.parametrize("mask", ["none", "top_p"])
def test_a_method_without_a_mask_of_k_classes_on_purpose_stays_without(mask):
    space = of("deepkd", options=("DeepKD.MASK.TYPE", mask))["deepkd"]
    assert space.masks == ()
    assert {*space.ranges} == {"rate", "warmup", "delta"}


def test_nothing_left_to_search_is_one_line():
    with pytest.raises(UserError, match="set all that kd has to search"):
        of("kd", given={"SOLVER.LR", "SOLVER.WARMUP_EPOCHS"})


def test_an_edge_is_widened_by_half_as_far_as_it_may_go():
    rate = Range("rate", "", "", 0.01, 1.0, 1e-6, 100.0, log=True)
    assert [rate.edge(value) for value in (0.011, 0.1, 0.9)] == ["lower", "", "upper"]
    assert (rate.widened("upper").low, rate.widened("upper").high) == pytest.approx((0.01, 10.0))
    assert (rate.widened("lower").low, rate.widened("lower").high) == pytest.approx((0.001, 1.0))
    delta = Range("delta", "", "", 0.0, 0.075, 0.0, 0.099)
    assert delta.widened("upper").high == 0.099
    assert delta.widened("lower") == delta
    warmup = Range("warmup", "", "", 0, 3, 0, 6, whole=True)
    assert [warmup.edge(value) for value in (0, 1, 2, 3)] == ["lower", "", "", "upper"]
    assert warmup.widened("upper").high == 4
