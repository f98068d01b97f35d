"""The gradient signal-to-noise ratio: the estimator, its sampling in a loop, and the momenta set by it."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deepkd_plugin.gsnr import GradientMoments, GradientMonitor, GSNRAllocation, noise_floor, without_noise
from deepkd_plugin.optim import DecoupledMomentumSGD
from deepkd_plugin.run import checkpoint

STREAMS = ("tog", "tcg", "ncg")


def parameters():
    """In channels-last order, a vector, bfloat16, a matrix, a scalar: 162, 6, 5, 28 and 1 coordinates."""
    return {
        "conv.weight": torch.zeros(6, 3, 3, 3).to(memory_format=torch.channels_last),
        "conv.bias": torch.zeros(6),
        "norm.scale": torch.zeros(5, dtype=torch.bfloat16),
        "block.head.weight": torch.zeros(4, 7),
        "temperature": torch.zeros(()),
    }


def drawn(params, samples, seed=0):
    """Random gradients: a list of {stream: [gradient]}, each in its parameter's dtype and in either order."""
    generator = torch.Generator().manual_seed(seed)

    def gradient(p, sample):
        g = (0.3 + torch.randn(p.shape, generator=generator)).to(p.dtype)
        return g.to(memory_format=torch.channels_last) if g.ndim == 4 and sample % 2 else g

    return [{s: [gradient(p, n) for p in params.values()] for s in STREAMS} for n in range(samples)]


def measured(params, samples, **options):
    moments = GradientMoments(params, STREAMS, **options)
    for sample in samples:
        moments.add(sample)
    return moments


def by_numpy(params, samples, only=None, streams=STREAMS):
    """What `summary` must hold, from stored gradients in float64; `only`: the coordinates that are followed."""
    sizes = [p.numel() for p in params.values()]
    chosen = np.arange(sum(sizes)) if only is None else np.asarray(only)

    def flat(row, gap):
        row = [None] * len(sizes) if row is None else row
        parts = [np.full(n, gap) if g is None else g.double().numpy().ravel() for n, g in zip(sizes, row)]
        return np.concatenate(parts)[chosen]

    raw = {s: np.array([flat(sample.get(s), 0.0) for sample in samples]) for s in streams}
    stored = {s: np.array([flat(sample.get(s), np.nan) for sample in samples]) for s in streams}
    found, angle = {}, {}
    for stream, x in stored.items():
        odd = ~np.isfinite(raw[stream]).all(0)
        whole = np.isfinite(raw[stream]).all(1)
        seen = ((~np.isnan(x)).sum(0) >= 2) & ~odd
        varied = np.zeros(len(chosen), bool)
        varied[seen] = np.nanmax(x[:, seen], 0) != np.nanmin(x[:, seen], 0)
        signal, noise = np.nanmean(x[:, varied], 0) ** 2, np.nanvar(x[:, varied], 0, ddof=1)
        lengths = np.sqrt((raw[stream][whole] ** 2).sum(1))
        found[stream] = {
            "mean": np.mean(signal / noise) if varied.any() else None,
            "ratio": signal.sum() / noise.sum() if varied.any() else None,
            "norm": lengths.mean() * math.sqrt(sum(sizes) / len(chosen)) if whole.any() else None,
            "zero_variance": int((seen & ~varied).sum()),
            "missing": int((~seen & ~odd).sum()),
            "not_finite": int(odd.sum()),
        }
    for one, other in itertools.combinations(streams, 2):
        degrees = []
        for a, b in zip(raw[one], raw[other]):
            if a.any() and b.any() and np.isfinite(a + b).all():
                degrees.append(np.degrees(np.arccos(a @ b / np.linalg.norm(a) / np.linalg.norm(b))))
        angle[f"{one}-{other}"] = np.mean(degrees) if degrees else None
    held = {"samples": len(samples), "coordinates": len(chosen), "parameters": sum(sizes)}
    return held | {"gsnr": found, "angle": angle}


def leaves(tree, prefix=""):
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for name, part in tree.items() for k, v in leaves(part, f"{prefix}/{name}").items()}


def assert_tree(got, expected, rel=1e-9):
    got, expected = leaves(got), leaves(expected)
    assert list(got) == list(expected)
    for name, value in expected.items():
        assert got[name] == (None if value is None else pytest.approx(value, rel=rel)), name


# The estimator against numpy


@pytest.mark.parametrize("samples", [2, 7])
@pytest.mark.parametrize("coordinates", [0, 60])
def test_every_number_is_numpys_of_the_stored_gradients(samples, coordinates):
    params = parameters()
    stored = drawn(params, samples)
    moments = measured(params, stored, coordinates=coordinates)
    assert_tree(moments.summary(), by_numpy(params, stored, moments.chosen))


def test_means_and_variances_are_numpys():
    params = parameters()
    stored = drawn(params, 7)
    moments = measured(params, stored)
    for s, stream in enumerate(STREAMS):
        x = np.array([np.concatenate([g.double().numpy().ravel() for g in part[stream]]) for part in stored])
        np.testing.assert_allclose(moments.mean[s], x.mean(0), rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(moments.squares[s] / 6, x.var(0, ddof=1), rtol=1e-12)


def test_a_large_mean_does_not_drown_the_variance():
    """A mean of 1e6 and a variance of 1 over many samples: sums of squares would lose it in rounding."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2000, 50, generator=generator, dtype=torch.float64)
    gradients = 1e6 + noise
    moments = GradientMoments({"w": torch.zeros(50, dtype=torch.float64)}, ("task",))
    for gradient in gradients:
        moments.add({"task": [gradient]})
    exact = (gradients - 1e6).numpy()  # this difference is exact
    variance = exact.var(0, ddof=1)
    np.testing.assert_allclose(moments.squares[0] / 1999, variance, rtol=1e-8)
    expected = np.mean((1e6 + exact.mean(0)) ** 2 / variance)
    assert moments.summary()["gsnr"]["task"]["mean"] == pytest.approx(expected, rel=1e-8)


def test_half_precision_gradients_are_summed_in_float64():
    """bfloat16 keeps 8 bits: a running mean in it would stop moving after a few samples."""
    params = {"w": torch.zeros(100, dtype=torch.bfloat16)}
    generator = torch.Generator().manual_seed(0)
    stored = [{"task": [(1 + 0.1 * torch.randn(100, generator=generator)).bfloat16()]} for _ in range(300)]
    moments = GradientMoments(params, ("task",))
    for sample in stored:
        moments.add(sample)
    assert_tree(moments.summary(), by_numpy(params, stored, streams=("task",)))


def test_norms_and_angles_by_hand():
    moments = GradientMoments({"w": torch.zeros(2)}, ("a", "b", "c"))
    vectors = {"a": (3.0, 4.0), "b": (4.0, -3.0), "c": (-6.0, -8.0)}
    moments.add({stream: [torch.tensor(v)] for stream, v in vectors.items()})
    moments.add({"a": [torch.tensor((1.0, 0.0))], "b": [torch.tensor((1.0, 1.0))], "c": [torch.zeros(2)]})
    summary = moments.summary()
    norms = {stream: found["norm"] for stream, found in summary["gsnr"].items()}
    assert norms == pytest.approx({"a": 3.0, "b": (5 + math.sqrt(2)) / 2, "c": 5.0})
    # the second sample has no angle to c, whose gradient is 0
    assert summary["angle"] == pytest.approx({"a-b": (90 + 45) / 2, "a-c": 180.0, "b-c": 90.0}, abs=1e-5)


def test_equal_gradients_enclose_no_angle():
    """The cosine may come out above 1 by rounding."""
    generator = torch.Generator().manual_seed(0)
    moments = GradientMoments({"w": torch.zeros(1001)}, ("a", "b"))
    for _ in range(20):
        gradient = torch.randn(1001, generator=generator)
        moments.add({"a": [gradient], "b": [3 * gradient]})
    assert moments.summary()["angle"]["a-b"] == pytest.approx(0.0, abs=1e-3)


def test_one_stream_has_no_angle():
    moments = GradientMoments({"w": torch.zeros(2)}, ("task",))
    moments.add({"task": [torch.ones(2)]})
    assert moments.summary()["angle"] == {}


def test_adding_leaves_the_gradients_as_they_are():
    params = parameters()
    (sample,) = drawn(params, 1)
    before = {stream: [g.clone() for g in row] for stream, row in sample.items()}
    moments = measured(params, [sample])
    moments.add(sample)
    for stream, row in sample.items():
        assert all(torch.equal(a, b) for a, b in zip(row, before[stream]))


def test_no_number_before_the_second_sample():
    params = parameters()
    moments = measured(params, drawn(params, 1))
    summary = moments.summary()
    assert {found["missing"] for found in summary["gsnr"].values()} == {202}
    assert {found["ratio"] for found in summary["gsnr"].values()} == {None}
    moments.reset()
    assert moments.summary()["samples"] == 0
    assert set(moments.summary()["angle"].values()) == {None}


def test_a_reset_forgets_everything():
    params = parameters()
    moments = measured(params, [{"tog": sample["tog"]} for sample in drawn(params, 4, seed=1)])
    moments.reset()
    stored = drawn(params, 5)
    for sample in stored:
        moments.add(sample)
    assert moments.summary() == measured(params, stored).summary()


# Coordinates without a ratio


def gaps(params):
    """Seven samples with every kind of gap."""
    stored = drawn(params, 7)
    for n in (0, 4):
        stored[n]["tog"][0] = None
    constant = stored[0]["tog"][2].clone()
    for n, sample in enumerate(stored):
        sample["tog"][2] = None if n == 5 else constant.clone()
        sample["tcg"][3] = None
        if n != 2:
            sample["ncg"][1] = None
    del stored[3]["ncg"]
    return stored


@pytest.mark.parametrize("coordinates", [0, 100])
def test_what_has_no_ratio_is_counted_and_left_out(coordinates):
    params = parameters()
    stored = gaps(params)
    moments = measured(params, stored, coordinates=coordinates)
    summary = moments.summary()
    assert_tree(summary, by_numpy(params, stored, moments.chosen))
    if not coordinates:
        counts = {s: (found["zero_variance"], found["missing"]) for s, found in summary["gsnr"].items()}
        assert counts == {"tog": (5, 0), "tcg": (0, 28), "ncg": (0, 6)}
    for s, stream in enumerate(STREAMS):
        used = int(moments._coordinates(s)[0].sum())
        found = summary["gsnr"][stream]
        assert used + found["zero_variance"] + found["missing"] == moments.coordinates


def test_a_stream_without_any_gradient():
    params = parameters()
    stored = [{"tog": sample["tog"], "tcg": sample["tcg"]} for sample in drawn(params, 4)]
    summary = measured(params, stored).summary()
    assert summary["gsnr"]["ncg"] == {
        "mean": None, "ratio": None, "norm": 0.0, "zero_variance": 0, "missing": 202, "not_finite": 0,
    }  # fmt: skip
    assert (summary["angle"]["tog-ncg"], summary["angle"]["tcg-ncg"]) == (None, None)
    assert_tree(summary, by_numpy(params, stored))


def test_a_dead_unit_has_no_variance():
    moments = GradientMoments({"w": torch.zeros(3)}, ("task",))
    for value in (1.0, 2.0, 3.0):
        moments.add({"task": [torch.tensor([0.0, 0.1, value])]})
    assert moments.summary()["gsnr"]["task"] == pytest.approx(
        {"mean": 4.0, "ratio": 4.0, "norm": np.sqrt(0.01 + np.array([1, 4, 9])).mean(),
         "zero_variance": 2, "missing": 0, "not_finite": 0}
    )  # fmt: skip


def broken(params):
    """Seven samples; some coordinates are inf or NaN in one of them, and a whole sample of one stream is."""
    stored = drawn(params, 7)
    stored[0]["tog"][0][0, 0, 0, 0] = math.nan  # in the first sample, before there is a mean
    stored[3]["tog"][3][1, :2] = torch.tensor([math.inf, -math.inf])
    stored[3]["tog"][2] = None
    stored[6]["tcg"][1][4] = -math.inf
    stored[2]["ncg"][3:] = [torch.full_like(g, math.nan) for g in stored[2]["ncg"][3:]]
    return stored


@pytest.mark.parametrize("coordinates", [0, 100])
def test_what_is_not_finite_is_counted_and_left_out(coordinates):
    params = parameters()
    stored = broken(params)
    moments = measured(params, stored, coordinates=coordinates)
    summary = moments.summary()
    assert_tree(summary, by_numpy(params, stored, moments.chosen))
    if not coordinates:
        counts = {s: (found["not_finite"], found["missing"]) for s, found in summary["gsnr"].items()}
        assert counts == {"tog": (3, 0), "tcg": (1, 0), "ncg": (29, 0)}
        layers = moments.by_layer()
        assert layers["block.head"]["ncg"] == {"mean": None, "ratio": None}
        assert all(math.isfinite(v) for values in layers["conv"].values() for v in values.values())
    moments.reset()
    for sample in drawn(params, 3):
        moments.add(sample)
    assert {found["not_finite"] for found in moments.summary()["gsnr"].values()} == {0}


def test_a_variance_that_overflows_is_not_finite():
    moments = GradientMoments({"w": torch.zeros(2, dtype=torch.float64)}, ("task",))
    for value in (1e200, -1e200, 1e200):
        moments.add({"task": [torch.tensor([value, value > 0], dtype=torch.float64)]})
    found = moments.summary()["gsnr"]["task"]
    assert (found["not_finite"], found["zero_variance"], found["missing"]) == (1, 0, 0)
    assert found["mean"] == found["ratio"] == pytest.approx((2 / 3) ** 2 / (1 / 3))


def test_a_stream_that_is_never_finite_has_no_number():
    moments = GradientMoments({"w": torch.zeros(2)}, ("a", "b"))
    for value in (1.0, 2.0):
        moments.add({"a": [torch.tensor([math.nan, math.nan])], "b": [torch.tensor([value, value])]})
    summary = moments.summary()
    assert summary["gsnr"]["a"] == {
        "mean": None, "ratio": None, "norm": None, "zero_variance": 0, "missing": 0, "not_finite": 2,
    }  # fmt: skip
    assert summary["gsnr"]["b"]["norm"] == pytest.approx(1.5 * math.sqrt(2))
    assert summary["angle"] == {"a-b": None}
    assert GSNRAllocation({"a": 0.1, "b": 0.1}).update({s: v["ratio"] for s, v in summary["gsnr"].items()})["a"] == 0.0


def test_a_window_of_0_1_0_goes_on():
    """Its state has no count of samples with a norm: each had one."""
    params = parameters()
    stored = drawn(params, 5)
    old = measured(params, stored[:3]).state_dict()
    del old["normed"]
    moments = GradientMoments(params, STREAMS)
    moments.load_state_dict(old)
    for sample in stored[3:]:
        moments.add(sample)
    assert moments.summary() == measured(params, stored).summary()


# Known signal and noise


def simulated(samples, signal, spread, seed):
    """Normal gradients of known mean and standard deviation (N,): the moments, and each coordinate's numbers."""
    generator = torch.Generator().manual_seed(seed)
    moments = GradientMoments({"w": torch.zeros(len(signal), dtype=torch.float64)}, ("task",))
    stored = []
    for _ in range(samples):
        noise = torch.randn(len(signal), generator=generator, dtype=torch.float64)
        stored.append(signal + spread * noise)
        moments.add({"task": [stored[-1]]})
    x = torch.stack(stored).numpy()
    return moments.summary()["gsnr"]["task"], x.mean(0) ** 2, x.var(0, ddof=1)


def errors(samples, squared, variance, corrected=1.0):
    """Standard errors of both summaries, from the spread of the coordinates; of a ratio, by its linearisation."""
    count = math.sqrt(len(squared))
    residual = squared - squared.sum() / variance.sum() * variance
    ratio = residual.std() / variance.mean() / count
    return {"mean": corrected * (squared / variance).std() / count, "ratio": ratio}


@pytest.mark.parametrize("samples", [8, 12, 30])
def test_the_noise_floor_is_what_noise_gives(samples):
    generator = torch.Generator().manual_seed(1)
    spread = 0.5 + torch.rand(30_000, generator=generator, dtype=torch.float64)
    got, squared, variance = simulated(samples, torch.zeros_like(spread), spread, seed=samples)
    error, floor = errors(samples, squared, variance), noise_floor(samples)
    for name, value in floor.items():
        assert abs(got[name] - value) < 3 * error[name], name
        assert error[name] < 0.04 * value, name  # so the line above says something
    zero = without_noise(got, samples)
    assert all(abs(zero[name]) < 3 * error[name] for name in floor)


@pytest.mark.parametrize(("samples", "strength"), [(10, 0.1), (10, 1.0), (10, 5.0), (30, 0.1)])
def test_known_signal_and_noise_are_recovered(samples, strength):
    generator = torch.Generator().manual_seed(2)
    spread = 0.5 + torch.rand(30_000, generator=generator, dtype=torch.float64)
    signal = strength * torch.randn(30_000, generator=generator, dtype=torch.float64)
    got, squared, variance = simulated(samples, signal, spread, seed=3)
    truth = {
        "mean": (signal**2 / spread**2).mean().item(),
        "ratio": (signal.square().sum() / spread.square().sum()).item(),
    }
    # the signal is known, so what is left of a coordinate is its error
    each = squared / variance * (samples - 3) / (samples - 1) - 1 / samples
    residual = squared - spread.numpy() ** 2 / samples - signal.numpy() ** 2
    residual -= truth["ratio"] * (variance - spread.numpy() ** 2)
    count = math.sqrt(len(squared))
    error = {
        "mean": (each - (signal / spread).numpy() ** 2).std() / count,
        "ratio": residual.std() / (spread**2).mean().item() / count,
    }
    recovered = without_noise(got, samples)
    for name, value in truth.items():
        assert abs(recovered[name] - value) < 3 * error[name], name
        # as they are, both summaries have the noise's share in them
        assert got[name] - value > 3 * error[name], name


def test_the_formulas_of_the_noise():
    assert noise_floor(10) == pytest.approx({"mean": 9 / 70, "ratio": 0.1})
    assert noise_floor(4) == pytest.approx({"mean": 3 / 4, "ratio": 0.25})
    for samples in (2, 3):
        assert noise_floor(samples) == {"mean": math.inf, "ratio": 1 / samples}
        corrected = without_noise({"mean": 5.0, "ratio": 1.0}, samples)
        assert math.isnan(corrected["mean"])
        assert corrected["ratio"] == pytest.approx(1 - 1 / samples)
    assert without_noise({"mean": 9.0, "ratio": 2.0}, 10) == pytest.approx({"mean": 6.9, "ratio": 1.9})
    for samples in (5, 100):
        assert without_noise(noise_floor(samples), samples) == pytest.approx({"mean": 0.0, "ratio": 0.0})


# A subset of the coordinates


def test_a_subset_is_fixed_and_its_own():
    params = parameters()
    state = torch.get_rng_state()
    one, same, other = (GradientMoments(params, STREAMS, 50, seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.chosen, same.chosen)
    assert not torch.equal(one.chosen, other.chosen)
    assert len(one.chosen.unique()) == one.coordinates == sum(one.sizes) == 50
    assert one.chosen.min() >= 0
    assert one.chosen.max() < 202
    before = one.chosen.clone()
    for sample in drawn(params, 3):
        one.add(sample)
    one.reset()
    assert torch.equal(one.chosen, before)


def test_every_coordinate_of_a_subset_is_its_parameters():
    """First and last coordinates of a parameter too, which some of these seeds draw."""
    params = parameters()
    ends = np.cumsum([0] + [p.numel() for p in params.values()])
    drawn_at = set()
    for seed in range(10):
        moments = GradientMoments(params, STREAMS, 100, seed)
        assert moments.sizes == np.histogram(moments.chosen.numpy() + 0.5, ends)[0].tolist()
        drawn_at |= set(moments.chosen.tolist())
    assert set(ends[:-1]) | set(ends[1:] - 1) <= drawn_at


def test_a_subset_holds_what_all_coordinates_hold_there():
    params = parameters()
    stored = gaps(params)
    whole, part = measured(params, stored), measured(params, stored, coordinates=70)
    assert torch.equal(part.mean, whole.mean[:, part.chosen])
    assert torch.equal(part.squares, whole.squares[:, part.chosen])


@pytest.mark.parametrize("coordinates", [0, 202, 1000])
def test_no_subset_is_drawn_where_all_are_followed(coordinates):
    moments = GradientMoments(parameters(), STREAMS, coordinates)
    assert moments.chosen is None
    assert (moments.coordinates, moments.parameters) == (202, 202)


def test_the_norm_of_a_subset_is_right_on_average():
    """The squared norm has no bias; most of this gradient lies in one parameter."""
    params = {"a": torch.zeros(20), "b": torch.zeros(80)}
    gradient = [torch.linspace(5, 6, 20), torch.linspace(0, 1, 80)]
    whole = sum(g.double().square().sum().item() for g in gradient)
    squares = []
    for seed in range(300):
        moments = GradientMoments(params, ("task",), 25, seed)
        moments.add({"task": gradient})
        squares.append(moments.norms.item() ** 2)
    error = np.std(squares) / math.sqrt(len(squares))
    assert abs(np.mean(squares) - whole) < 3 * error
    assert error < 0.02 * whole


def test_the_memory_is_as_documented():
    params = parameters()
    assert GradientMoments(params, STREAMS).nbytes == 16 * 3 * 202
    assert GradientMoments(params, STREAMS, 50).nbytes == 16 * 3 * 50 + 8 * 50


# By layer


@pytest.mark.parametrize("coordinates", [0, 90])
def test_layers_add_up_to_the_whole(coordinates):
    params = parameters()
    stored = gaps(params)
    moments = measured(params, stored, coordinates=coordinates)
    layers = moments.by_layer()
    assert list(layers) == ["conv", "norm", "block.head", "temperature"]
    chosen = np.arange(202) if moments.chosen is None else moments.chosen.numpy()
    ends = {"conv": (0, 168), "norm": (168, 173), "block.head": (173, 201), "temperature": (201, 202)}
    for layer, (start, end) in ends.items():
        only = chosen[(start <= chosen) & (chosen < end)]
        if not len(only):
            assert layers[layer] == {s: {"mean": None, "ratio": None} for s in STREAMS}
            continue
        expected = by_numpy(params, stored, only)["gsnr"]
        assert_tree(layers[layer], {s: {n: expected[s][n] for n in ("mean", "ratio")} for s in STREAMS}, rel=1e-9)


def test_a_layer_without_a_followed_coordinate_has_no_number():
    params = {"first.weight": torch.zeros(1), "second.weight": torch.zeros(10_000)}
    moments = GradientMoments(params, ("task",), 5)
    for value in (1.0, 3.0):
        moments.add({"task": [torch.full((1,), value), torch.full((10_000,), value)]})
    assert moments.by_layer() == {
        "first": {"task": {"mean": None, "ratio": None}},
        "second": {"task": {"mean": 2.0, "ratio": 2.0}},
    }


# The state


@pytest.mark.parametrize("coordinates", [0, 90])
def test_a_window_goes_on_from_a_checkpoint_bit_for_bit(tmp_path, coordinates):
    params = parameters()
    stored = gaps(params)
    whole = measured(params, stored, coordinates=coordinates)
    first = measured(params, stored[:3], coordinates=coordinates)
    state = first.state_dict()
    first.add(stored[6])  # the state is a copy
    checkpoint.save(state, tmp_path / "state")
    second = GradientMoments(params, STREAMS, coordinates)
    second.load_state_dict(checkpoint.load(tmp_path / "state", "test"))
    for sample in stored[3:]:
        second.add(sample)
    for name in ("mean", "squares", "norms", "degrees", "angles"):
        assert torch.equal(getattr(whole, name), getattr(second, name)), name
    assert whole.counts == second.counts
    assert (whole.summary(), whole.by_layer()) == (second.summary(), second.by_layer())


def test_a_loaded_state_is_not_shared():
    params = parameters()
    state = measured(params, drawn(params, 2)).state_dict()
    mean, counts = state["mean"].clone(), [list(row) for row in state["counts"]]
    moments = GradientMoments(params, STREAMS)
    moments.load_state_dict(state)
    moments.add(drawn(params, 1, seed=5)[0])
    assert torch.equal(state["mean"], mean)
    assert state["counts"] == counts


@pytest.mark.parametrize(("streams", "coordinates"), [(("tog", "tcg"), 0), (STREAMS, 50)])
def test_a_state_of_another_window_is_refused(streams, coordinates):
    params = parameters()
    moments = GradientMoments(params, STREAMS)
    other = GradientMoments(params, streams, coordinates).state_dict()
    with pytest.raises(ValueError, match=r"the window is of streams and .*, this one has .*202\)"):
        moments.load_state_dict(other)
    assert moments.samples == 0


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({}, STREAMS), "GradientMoments needs at least one parameter and one stream"),
        (({"w": torch.zeros(2)}, ()), "GradientMoments needs at least one parameter and one stream"),
        (({"w": torch.zeros(2)}, STREAMS, -1), "coordinates must be at least 0 (all), got -1"),
    ],
)
def test_moments_of_nothing(arguments, message):
    with pytest.raises(ValueError) as caught:
        GradientMoments(*arguments)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("gradients", "message"),
    [
        (
            {"tog": [torch.zeros(2)], "kd": [torch.zeros(2)]},
            "unknown streams ['kd']; the streams are ('tog', 'tcg', 'ncg')",
        ),
        pytest.param(
            {"tog": [torch.zeros(2), torch.zeros(2)]},
            "got 2 gradients for 1 parameters",
        ),
    ],
)
def test_gradients_that_do_not_fit(gradients, message):
    moments = GradientMoments({"w": torch.zeros(2)}, STREAMS)
    with pytest.raises(ValueError) as caught:
        moments.add(gradients)
    assert str(caught.value) == message
    assert moments.samples == 0  # a sample that is refused is none


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be at least 1 iteration, got 0"),
        ({"window": 1}, "window must be at least 2 samples, for a variance, got 1"),
        ({"coordinates": -5}, "coordinates must be at least 0 (all), got -5"),
    ],
)
def test_a_monitor_with_a_wrong_option(options, message):
    with pytest.raises(ValueError) as caught:
        GradientMonitor([("w", nn.Parameter(torch.zeros(2)))], STREAMS, **options)
    assert str(caught.value) == message


def test_a_monitor_of_frozen_parameters():
    with pytest.raises(ValueError, match="needs at least one parameter"):
        GradientMonitor([("w", torch.zeros(2))], STREAMS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"separation": 1.0}, "separation must be above 1, got 1.0"),
        ({"separation": math.nan}, "separation must be above 1, got nan"),
        ({"smoothing": 1.0}, "smoothing must be in [0, 1), got 1.0"),
        ({"smoothing": -0.1}, "smoothing must be in [0, 1), got -0.1"),
        ({"smoothing": math.nan}, "smoothing must be in [0, 1), got nan"),
    ],
)
def test_an_allocation_with_a_wrong_option(options, message):
    with pytest.raises(ValueError) as caught:
        GSNRAllocation({"tog": 0.075}, **options)
    assert str(caught.value) == message


# Sampling in a loop


def toy():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5), nn.Linear(5, 5)
    )
    net[4].bias.requires_grad_(False)
    return net.to(memory_format=torch.channels_last)


def losses_of(net, step):
    """The losses of one batch; the last layer takes part in the task's alone."""
    generator = torch.Generator().manual_seed(step)
    hidden = net[:5](torch.randn(6, 3, 8, 8, generator=generator))
    task = F.cross_entropy(net[5](hidden), torch.arange(6) % 5)
    return {"tog": task, "tcg": hidden.square().mean(), "ncg": hidden[:, 1:].sin().mean()}


def optimizer_of(net, momentum, **options):
    return DecoupledMomentumSGD(net.parameters(), 0.1, dict(zip(STREAMS, momentum)), 1e-2, "tcg", **options)


MOMENTA = [(0.9, 0.9, 0.9), (0.975, 0.825, 0.975), (0.975, 0.825, 0.925), (0.0, 0.0, 0.0)]


def test_when_a_sample_is_due_and_a_window_full():
    net = toy()
    monitor = GradientMonitor(net.named_parameters(), STREAMS, every=3, window=2)
    due, full = [], []
    for iteration in range(1, 16):
        monitor.tick()
        if monitor.due:
            due.append(iteration)
            monitor.sample(losses_of(net, iteration))
        if monitor.full:
            full.append(monitor.finish())
    assert due == [3, 6, 9, 12, 15]
    assert [(record["iteration"], record["samples"]) for record in full] == [(6, 2), (12, 2)]
    assert monitor.moments.samples == 1
    assert not monitor.full
    assert all("layers" not in record for record in full)


def test_a_window_keeps_nothing_of_the_one_before():
    net = toy()
    two, fresh = (GradientMonitor(net.named_parameters(), STREAMS, 1, 3, layers=True) for _ in range(2))
    for monitor, iterations in ((two, range(1, 7)), (fresh, range(4, 7))):
        for iteration in iterations:
            monitor.tick()
            monitor.sample(losses_of(net, iteration))
            if iteration == 3:
                first = monitor.finish()
    second, alone = two.finish(), fresh.finish()
    assert second | {"iteration": 3} == alone
    assert first["gsnr"] != second["gsnr"]


@pytest.mark.parametrize("momentum", MOMENTA[:2])
def test_every_stream_is_measured_apart_whatever_the_optimizer_merges(momentum):
    """Against the losses' own gradients, stored and given to numpy, while the weights move."""
    net = toy()
    names = {name: p for name, p in net.named_parameters() if p.requires_grad}
    optimizer = optimizer_of(net, momentum)
    monitor = GradientMonitor(net.named_parameters(), STREAMS, every=2, window=3, layers=True)
    stored = []
    for step in range(1, 7):
        monitor.tick()
        losses = losses_of(net, step)
        if monitor.due:
            stored.append(
                {
                    stream: torch.autograd.grad(loss, list(names.values()), retain_graph=True, allow_unused=True)
                    for stream, loss in losses.items()
                }
            )
            monitor.sample(losses)
        optimizer.zero_grad()
        optimizer.backward(losses)
        optimizer.step()
    assert monitor.full
    record = monitor.finish()
    layers = record.pop("layers")
    assert record.pop("iteration") == 6
    assert_tree(record, by_numpy(names, stored))
    assert record["gsnr"]["tcg"]["missing"] == 30  # the last layer's
    assert list(layers) == ["0", "1", "4", "5"]
    assert layers["5"]["tcg"] == {"mean": None, "ratio": None}
    assert layers["5"]["tog"]["ratio"] > 0


@pytest.mark.parametrize(
    ("momentum", "merge"),
    [(m, True) for m in MOMENTA] + [(MOMENTA[0], False)],
)
def test_sampling_changes_no_bit_of_the_training(momentum, merge):
    def run(every):
        net = toy()
        optimizer = optimizer_of(net, momentum, merge=merge)
        monitor = GradientMonitor(net.named_parameters(), STREAMS, every, window=2)
        seen = []
        for step in range(1, 6):
            monitor.tick()
            optimizer.zero_grad()
            losses = losses_of(net, step)
            if monitor.due:
                monitor.sample(losses)
                assert all(p.grad is None for p in net.parameters())
            optimizer.backward(losses)
            seen += [p.grad.clone() for p in net.parameters() if p.requires_grad]
            optimizer.step()
            seen += [value.clone() for value in net.state_dict().values()]
        buffers = [b.clone() for state in optimizer.state.values() for b in state.values()]
        return seen + buffers, monitor.moments.samples

    (plain, none), (sampled, some) = run(every=100), run(every=2)
    assert (none, some) == (0, 2)
    assert len(plain) == len(sampled)
    assert all(torch.equal(a, b) for a, b in zip(plain, sampled))


def test_a_loss_that_is_left_out_or_constant_has_no_gradient():
    net = toy()
    monitor = GradientMonitor(net.named_parameters(), STREAMS, every=1, window=2)
    for step in (1, 2):
        losses = losses_of(net, step)
        monitor.sample({"tog": losses["tog"], "tcg": losses["tcg"].detach()})
    found = monitor.finish()["gsnr"]
    assert found["tog"]["ratio"] > 0
    assert found["tcg"]["missing"] == found["ncg"]["missing"] == monitor.moments.coordinates


def test_a_layer_that_is_frozen_within_a_window_has_no_more_gradients():
    net = toy()
    monitor = GradientMonitor(net.named_parameters(), STREAMS, every=1, window=4)
    names = {name: p for name, p in net.named_parameters() if p.requires_grad}
    stored = []
    for step in range(1, 5):
        if step == 3:
            net[0].requires_grad_(False)
        losses = losses_of(net, step)
        live = [p for p in names.values() if p.requires_grad]
        sample = {}
        for stream, loss in losses.items():
            found = dict(zip(live, torch.autograd.grad(loss, live, retain_graph=True, allow_unused=True)))
            sample[stream] = [found.get(p) for p in names.values()]
        stored.append(sample)
        monitor.sample(losses)
    record = monitor.finish()
    assert record.pop("iteration") == 0
    assert_tree(record, by_numpy(names, stored))


def test_a_monitor_of_layers_that_were_all_frozen():
    net = toy()
    monitor = GradientMonitor(net[0].named_parameters(), STREAMS, every=1, window=2)
    net[0].requires_grad_(False)
    for step in (1, 2):
        monitor.sample(losses_of(net, step))
    assert {found["missing"] for found in monitor.finish()["gsnr"].values()} == {monitor.moments.coordinates}


def test_a_monitor_goes_on_from_a_checkpoint(tmp_path):
    def start():
        net = toy()
        return net, GradientMonitor(net.named_parameters(), STREAMS, 2, 3, coordinates=100, layers=True)

    def go(net, monitor, steps):
        records = []
        for step in steps:
            monitor.tick()
            if monitor.due:
                monitor.sample(losses_of(net, step))
            records += [monitor.finish()] if monitor.full else []
        return records

    whole = go(*start(), range(1, 14))
    net, first = start()
    go(net, first, range(1, 9))
    checkpoint.save(first.state_dict(), tmp_path / "state")
    net, second = start()
    second.load_state_dict(checkpoint.load(tmp_path / "state", "test"))
    assert (second.iteration, second.moments.samples) == (8, 1)
    assert go(net, second, range(9, 14)) == whole[1:]
    assert len(whole) == 2


# Momenta from the measurement


EQUAL = dict.fromkeys(STREAMS, 0.075)


def test_offsets_by_hand():
    gsnr = {"tog": 0.08, "tcg": 0.02, "ncg": 0.04}
    # task 4 times the target, the third in the middle of the logarithms
    for separation, share in ((4.0, 1.0), (16.0, 0.5), (256.0, 0.25), (2.0, 1.0)):
        offsets = GSNRAllocation(EQUAL, separation).update(gsnr)
        expected = {"tog": 0.075 * share, "tcg": -0.075 * share, "ncg": 0.0}
        assert offsets == pytest.approx(expected, abs=1e-15)
    offsets = GSNRAllocation(EQUAL, 16.0).update(gsnr | {"ncg": 0.06})
    assert offsets["ncg"] == pytest.approx(0.075 * math.log(1.5) / math.log(4.0))


def test_defaults_are_the_configs():
    allocation = GSNRAllocation({"tog": -0.075})
    assert (allocation.separation, allocation.smoothing, allocation.bounds) == (2.0, 0.5, {"tog": 0.075})


def test_smoothing_by_hand():
    allocation = GSNRAllocation(EQUAL, separation=16.0, smoothing=0.25)
    assert allocation.update(dict.fromkeys(STREAMS, 0.1)) == dict.fromkeys(STREAMS, 0.0)
    # log of the task's: 0.25 log 0.1 + 0.75 log 0.4, 0.75 log 4 above the others
    offsets = allocation.update({"tog": 0.4, "tcg": 0.1, "ncg": 0.1})
    assert offsets == pytest.approx({"tog": 0.075 * 0.375, "tcg": -0.075 * 0.375, "ncg": -0.075 * 0.375})
    assert allocation.offsets() == offsets


def test_a_jump_is_approached_geometrically():
    allocation = GSNRAllocation(EQUAL, separation=100.0, smoothing=0.8)
    allocation.update(dict.fromkeys(STREAMS, 1.0))
    path = [allocation.update({"tog": 4.0, "tcg": 1.0, "ncg": 1.0})["tog"] for _ in range(60)]
    left = 0.075 * math.log(4) / math.log(100) - np.array(path)
    np.testing.assert_allclose(left[1:20] / left[:19], 0.8)
    assert path[-1] == pytest.approx(0.075 * math.log(4) / math.log(100), rel=1e-5)


def test_offsets_are_bounded_and_in_the_order_of_the_gsnr():
    generator = np.random.default_rng(0)
    bounds = {"tog": 0.075, "tcg": -0.05, "ncg": 0.025, "feat": 0.0}
    clipped = 0
    for _ in range(200):
        gsnr = dict(zip(bounds, 10.0 ** generator.uniform(-4, 1, 4)))
        offsets = GSNRAllocation(bounds, separation=100.0).update(gsnr)
        assert all(abs(offsets[s]) <= abs(bounds[s]) for s in bounds)
        clipped += abs(offsets["tog"]) == 0.075
        same = GSNRAllocation(dict.fromkeys(bounds, 0.075), separation=1e6).update(gsnr)
        assert sorted(bounds, key=gsnr.get) == sorted(bounds, key=same.get)
        assert len(set(same.values())) == 4
        signs = {s: math.copysign(1, same[s]) for s in ("tog", "tcg", "ncg")}
        assert all(offsets[s] * signs[s] >= 0 for s in signs)  # unequal bounds keep the sides
    assert 0 < clipped < 200


def test_the_unit_of_the_gsnr_does_not_matter():
    gsnr = {"tog": 0.03, "tcg": 0.02, "ncg": 0.025}
    one = GSNRAllocation(EQUAL)
    other = GSNRAllocation(EQUAL)
    for scale in (1.0, 0.7, 1.3):
        a = one.update({s: scale * value for s, value in gsnr.items()})
        b = other.update({s: 1e-6 * scale * value for s, value in gsnr.items()})
        assert a == pytest.approx(b, abs=1e-12)


def test_equal_gsnr_gives_every_stream_the_same_momentum():
    assert GSNRAllocation(EQUAL).update(dict.fromkeys(STREAMS, 0.1)) == dict.fromkeys(STREAMS, 0.0)


@pytest.mark.parametrize("nothing", [None, 0.0, -1.0, math.nan, math.inf])
def test_a_window_in_which_a_stream_has_no_gsnr(nothing):
    allocation = GSNRAllocation(EQUAL, separation=4.0, smoothing=0.0)
    assert allocation.offsets() == dict.fromkeys(STREAMS, 0.0)
    assert allocation.update({"tog": nothing, "tcg": nothing}) == dict.fromkeys(STREAMS, 0.0)
    # the two that have one are set without the third
    offsets = allocation.update({"tog": 0.2, "tcg": 0.1, "ncg": nothing})
    assert offsets == pytest.approx({"tog": 0.0375, "tcg": -0.0375, "ncg": 0.0})
    offsets = allocation.update({"tog": nothing, "tcg": 0.1, "ncg": 0.2})
    assert offsets == pytest.approx({"tog": 0.0375, "tcg": -0.0375, "ncg": 0.0375})


@pytest.mark.parametrize(
    "deltas", [(0.075, -0.075, 0.075), (0.05, -0.05, 0.05), (0.075, -0.075, 0.025), (0.075, -0.025, 0.05)]
)
def test_the_papers_order_fully_separated_is_the_papers_assignment(deltas):
    fixed = dict(zip(STREAMS, deltas))
    paper = {"tog": 0.9, "tcg": 0.1, "ncg": 0.8}
    assert GSNRAllocation(fixed).update(paper) == fixed
    # at exactly the separation
    edge = GSNRAllocation(fixed, separation=3.0).update({"tog": 0.3, "tcg": 0.1, "ncg": 0.3})
    assert edge == pytest.approx(fixed)
    # and after the opposite order: it must be forgotten first
    allocation = GSNRAllocation(fixed, smoothing=0.7)
    allocation.update({"tog": 0.1, "tcg": 0.9, "ncg": 0.1})
    path = [allocation.update(paper) for _ in range(30)]
    assert path[0] != fixed
    assert path[-1] == fixed


def test_an_allocation_goes_on_from_a_checkpoint(tmp_path):
    windows = [{"tog": 0.1, "tcg": 0.2}, {"tog": 0.3, "tcg": 0.2, "ncg": 0.05}, {"tog": 0.2, "ncg": 0.1}]
    whole = GSNRAllocation(EQUAL, 8.0)
    expected = [whole.update(window) for window in windows]
    first = GSNRAllocation(EQUAL, 8.0)
    first.update(windows[0])
    checkpoint.save(first.state_dict(), tmp_path / "state")
    second = GSNRAllocation(EQUAL, 8.0)
    second.load_state_dict(checkpoint.load(tmp_path / "state", "test"))
    assert second.offsets() == expected[0]
    assert [second.update(window) for window in windows[1:]] == expected[1:]
    assert first.logs != second.logs
