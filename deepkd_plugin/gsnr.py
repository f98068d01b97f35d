"""Gradient signal-to-noise ratio (GSNR) of each stream, measured while training, and momenta set by it.

A stream's gradient is sampled every so many iterations. Over a window of n samples every coordinate has a mean
and an unbiased variance; its GSNR is mean² / variance (DeepKD, section 3.1). Two summaries are reported:

    mean   the mean of mean² / variance over the coordinates
    ratio  the sum of mean² over the sum of variance

Neither is free of the noise in the mean itself: gradients without any signal give, for normal noise,
`noise_floor(n)`. The weights move within a window, and what they do to the gradient counts as noise.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .distributed.buckets import summed
from .distributed.process_group import ProcessGroup
from .streams import backward_by_set

SUMMARIES = ("mean", "ratio")


def noise_floor(samples: int) -> dict[str, float]:
    """Return the summaries' averages for independent normal noise without signal, over `samples` ≥ 2.

    n · mean² / variance then follows F(1, n − 1), whose mean is (n − 1) / (n − 3) for n > 3, else infinite.
    """
    n = samples
    return {"mean": (n - 1) / (n * (n - 3)) if n > 3 else math.inf, "ratio": 1 / n}


def without_noise(values: Mapping[str, float], samples: int) -> dict[str, float]:
    """Return the summaries as they would be if the mean were known: unbiased for normal noise, so below 0 at times.

    mean: r · (n − 3)/(n − 1) − 1/n, NaN for n ≤ 3; ratio: r − 1/n.
    """
    n = samples
    mean = values["mean"] * (n - 3) / (n - 1) - 1 / n if n > 3 else math.nan
    return {"mean": mean, "ratio": values["ratio"] - 1 / n}


class GradientMoments:
    """Mean and variance of every coordinate of several streams' gradients, by Welford's update in float64.

    params: name → parameter. coordinates: follow a fixed random subset of so many (drawn by a generator of its
    own from `seed`), 0 for all. The memory is `nbytes`: 16 bytes for each coordinate and stream, 8 more for each
    coordinate of a subset.

    A coordinate whose parameter a stream gives no gradient to in a sample has one sample less; with fewer than two
    it is "missing". One whose variance is 0, such as behind a dead ReLU, has no ratio. One that was inf or NaN in a
    sample is "not_finite", and the window knows neither its mean nor its variance. All three are counted and left out
    of the summaries. A stream's norm and angles leave out the samples in which its gradient is not finite.
    """

    def __init__(
        self, params: Mapping[str, Tensor], streams: Sequence[str], coordinates: int = 0, seed: int = 0
    ) -> None:
        if not params or not streams:
            raise ValueError("GradientMoments needs at least one parameter and one stream")
        if coordinates < 0:
            raise ValueError(f"coordinates must be at least 0 (all), got {coordinates}")
        self.names = list(params)
        self.params = list(params.values())
        self.streams = tuple(streams)
        device = self.params[0].device
        sizes = [p.numel() for p in self.params]
        self.parameters = sum(sizes)
        self.chosen: Tensor | None = None
        if 0 < coordinates < self.parameters:
            draw = torch.randperm(self.parameters, generator=torch.Generator().manual_seed(seed))
            chosen = draw[:coordinates].sort().values
            ends = torch.tensor(list(itertools.accumulate(sizes)))
            owner = torch.searchsorted(ends, chosen, right=True)
            sizes = torch.bincount(owner, minlength=len(sizes)).tolist()
            self.chosen = chosen.to(device)
        self.sizes = sizes
        self.coordinates = sum(sizes)
        shape = (len(self.streams), self.coordinates)
        self.mean = torch.zeros(shape, dtype=torch.float64, device=device)
        self.squares = torch.zeros(shape, dtype=torch.float64, device=device)
        pairs = list(itertools.combinations(range(len(self.streams)), 2))
        self.pairs = {f"{self.streams[i]}-{self.streams[j]}": (i, j) for i, j in pairs}
        self.reset()

    def reset(self) -> None:
        """Forget every sample."""
        self.samples = 0
        self.mean.zero_()
        self.squares.zero_()
        # samples in which a stream reached a parameter
        self.counts = [[0] * len(self.params) for _ in self.streams]
        device = self.mean.device
        self.norms = torch.zeros(len(self.streams), dtype=torch.float64, device=device)
        # samples in which a stream's gradient was finite
        self.normed = torch.zeros(len(self.streams), dtype=torch.float64, device=device)
        self.degrees = torch.zeros(len(self.pairs), dtype=torch.float64, device=device)
        self.angles = torch.zeros(len(self.pairs), dtype=torch.float64, device=device)

    @property
    def nbytes(self) -> int:
        """The bytes of the moments and of the choice of coordinates."""
        index = 0 if self.chosen is None else self.chosen.nbytes
        return self.mean.nbytes + self.squares.nbytes + index

    @torch.no_grad()
    def add(self, gradients: Mapping[str, Sequence[Tensor | None]]) -> None:
        """Take one sample: stream → its gradients in the parameters' order, None for those that it does not reach.

        A stream that is left out has none at all. Never waits for the device.
        """
        unknown = set(gradients) - set(self.streams)
        if unknown:
            raise ValueError(f"unknown streams {sorted(unknown)}; the streams are {self.streams}")
        absent: list[Tensor | None] = [None] * len(self.params)
        rows = [gradients.get(stream, absent) for stream in self.streams]
        sample = torch.stack([self._flat(row) for row in rows])
        self.samples += 1
        self._add_directions(sample)
        for s, row in enumerate(rows):
            present = [g is not None for g in row]
            self.counts[s] = [n + here for n, here in zip(self.counts[s], present)]
            count: float | Tensor = float(self.samples)
            if self.counts[s] != [self.samples] * len(self.params):
                count = self._spread(self.counts[s]).clamp(min=1)
                # a sample equal to the mean so far leaves both moments as they are
                sample[s] = torch.where(self._spread(present).bool(), sample[s], self.mean[s])
            deviation = sample[s] - self.mean[s]
            self.mean[s] += deviation / count
            self.squares[s] += deviation * (sample[s] - self.mean[s])

    def summary(self) -> dict[str, Any]:
        """Return the window so far as plain numbers; this waits for the device.

        {"samples", "coordinates", "parameters", "gsnr": {stream: {"mean", "ratio" (None without a coordinate that
        has one), "norm" (mean L2 norm of the whole gradient, from the subset's share, over the samples in which it was
        finite; None without one), "zero_variance", "missing", "not_finite" (numbers of coordinates)}}, "angle": {"a-b":
        degrees between two streams' gradients, mean over the samples in which neither was 0 and both finite, None
        without one}}
        """
        table = torch.stack([torch.stack(self._sums(s)) for s in range(len(self.streams))]).tolist()
        summaries = {}
        for stream, (ratios, signal, noise, used, flat, odd), norm, n in zip(
            self.streams, table, self.norms.tolist(), self.normed.tolist()
        ):
            summaries[stream] = _summaries(ratios, signal, noise, used) | {
                "norm": norm / n if n else None,
                "zero_variance": int(flat),
                "missing": self.coordinates - int(used) - int(flat) - int(odd),
                "not_finite": int(odd),
            }
        degrees, counted = self.degrees.tolist(), self.angles.tolist()
        angle = {pair: d / n if n else None for pair, d, n in zip(self.pairs, degrees, counted)}
        counts = {"samples": self.samples, "coordinates": self.coordinates, "parameters": self.parameters}
        return counts | {"gsnr": summaries, "angle": angle}

    def by_layer(self) -> dict[str, dict[str, dict[str, float | None]]]:
        """Return layer → stream → both summaries. A layer is a parameter's name without its last part."""
        of_parameter = [name.rpartition(".")[0] or name for name in self.names]
        layers = list(dict.fromkeys(of_parameter))
        index = self._spread([layers.index(layer) for layer in of_parameter]).long()
        result: dict[str, dict[str, dict[str, float | None]]] = {layer: {} for layer in layers}
        for s, stream in enumerate(self.streams):
            valid, squared, variance, ratio = self._coordinates(s)
            columns = (ratio, squared.where(valid, 0), variance.where(valid, 0), valid.double())
            zeros = torch.zeros(len(layers), dtype=torch.float64, device=index.device)
            sums = torch.stack([zeros.index_add(0, index, column) for column in columns], 1).tolist()
            for layer, row in zip(layers, sums):
                result[layer][stream] = _summaries(*row)
        return result

    def state_dict(self) -> dict[str, Any]:
        """Return the window so far. Which coordinates it is of follows from the constructor's arguments."""
        return {
            "streams": list(self.streams),
            "coordinates": self.coordinates,
            "samples": self.samples,
            "counts": [list(row) for row in self.counts],
        } | {name: getattr(self, name).clone() for name in self._TENSORS}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a window; ValueError if it is of other streams or another number of coordinates."""
        ours = (list(self.streams), self.coordinates)
        theirs = (state["streams"], state["coordinates"])
        if theirs != ours:
            raise ValueError(f"the window is of streams and coordinates {theirs}, this one has {ours}")
        self.samples = state["samples"]
        self.counts = [list(row) for row in state["counts"]]
        # before 0.2.0 every sample had a norm
        state = {"normed": torch.full_like(self.normed, self.samples)} | dict(state)
        for name in self._TENSORS:
            getattr(self, name).copy_(state[name])

    _TENSORS = ("mean", "squares", "norms", "normed", "degrees", "angles")

    def _flat(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """Return a stream's gradients as one float64 vector of the coordinates that are followed."""
        if len(gradients) != len(self.params):
            raise ValueError(f"got {len(gradients)} gradients for {len(self.params)} parameters")
        parts = [torch.zeros_like(p) if g is None else g for p, g in zip(self.params, gradients)]
        flat = torch.cat([part.detach().reshape(-1) for part in parts])
        return (flat if self.chosen is None else flat[self.chosen]).double()

    def _spread(self, values: Sequence[float]) -> Tensor:
        """Turn one value for each parameter into one for each coordinate, float64."""
        device = self.mean.device
        sizes = torch.tensor(self.sizes, device=device)
        each = torch.tensor(values, dtype=torch.float64, device=device)
        return each.repeat_interleave(sizes, output_size=self.coordinates)

    def _add_directions(self, sample: Tensor) -> None:
        """Add the streams' norms and the angles between them, from all dot products at once."""
        products = sample @ sample.T
        lengths = products.diagonal().sqrt()
        finite = lengths.isfinite()
        # a random subset's dot products are those of all coordinates, on average, times its share
        self.norms += torch.where(finite, lengths, 0.0) * math.sqrt(self.parameters / self.coordinates)
        self.normed += finite
        for k, (i, j) in enumerate(self.pairs.values()):
            length = lengths[i] * lengths[j]
            cosine = (products[i, j] / length).clamp(-1, 1)
            there = (length > 0) & length.isfinite()
            self.degrees[k] += torch.where(there, torch.rad2deg(torch.arccos(cosine)), 0.0)
            self.angles[k] += there

    def _coordinates(self, s: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return of each coordinate of a stream: whether it has a GSNR, mean², variance, and the GSNR or 0."""
        count = self._spread(self.counts[s])
        variance = self.squares[s] / (count - 1).clamp(min=1)
        # a sample that was inf or NaN has made both moments so
        valid = (count >= 2) & (variance > 0) & variance.isfinite()
        squared = self.mean[s].square()
        return valid, squared, variance, torch.where(valid, squared / variance, 0.0)

    def _sums(self, s: int) -> list[Tensor]:
        """Sum over a stream's coordinates: GSNR, mean², variance; how many have it, are flat, are not finite."""
        valid, squared, variance, ratio = self._coordinates(s)
        odd = ~variance.isfinite()
        flat = (self._spread(self.counts[s]) >= 2) & ~valid & ~odd
        sums = [ratio.sum(), squared.where(valid, 0).sum(), variance.where(valid, 0).sum()]
        return [*sums, *(which.sum().double() for which in (valid, flat, odd))]


def _summaries(ratios: float, signal: float, noise: float, used: float) -> dict[str, float | None]:
    if not used:
        return dict.fromkeys(SUMMARIES)
    return {"mean": ratios / used, "ratio": signal / noise}


class GSNRAllocation:
    """Each stream's momentum offset from its GSNR: the larger the GSNR, the larger the momentum.

    With x_i the logarithm of stream i's GSNR (ratio of sums), smoothed over windows, and c the middle between the
    largest and the smallest x::

        x_i ← smoothing · x_i + (1 − smoothing) · log GSNR_i           (the first window as it is)
        Δ_i = |bound_i| · clip((x_i − c) / (½ · log separation), −1, 1)

    So Δ_i depends on the order and the distance of the streams, not on the unit of the GSNR, and not on the weights
    of the losses. A highest GSNR `separation` times the lowest gives the outermost streams ±bound; a stream in the
    middle gets 0. With the target stream lowest and task and non-target stream both half of log separation above the
    middle, this is the paper's fixed assignment (+Δ, −Δ, +Δ). Noise alone pulls all streams to the same GSNR
    and so Δ to 0. A window in which a stream has no GSNR leaves that stream's x as it is; before its first its Δ is 0.
    """

    def __init__(self, bounds: Mapping[str, float], separation: float = 2.0, smoothing: float = 0.5) -> None:
        if not separation > 1:
            raise ValueError(f"separation must be above 1, got {separation}")
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing must be in [0, 1), got {smoothing}")
        self.bounds = {stream: abs(bound) for stream, bound in bounds.items()}
        self.separation = separation
        self.smoothing = smoothing
        self.logs: dict[str, float] = {}

    def update(self, gsnr: Mapping[str, float | None]) -> dict[str, float]:
        """Take a window's GSNR by stream; returns each stream's Δ."""
        for stream in self.bounds:
            value = gsnr.get(stream)
            if value is None or not 0 < value < math.inf:
                continue
            new = math.log(value)
            old = self.logs.get(stream, new)
            self.logs[stream] = self.smoothing * old + (1 - self.smoothing) * new
        return self.offsets()

    def offsets(self) -> dict[str, float]:
        """Return each stream's Δ as it stands."""
        if not self.logs:
            return dict.fromkeys(self.bounds, 0.0)
        centre = (max(self.logs.values()) + min(self.logs.values())) / 2
        scale = math.log(self.separation) / 2
        shares = {stream: min(1.0, max(-1.0, (log - centre) / scale)) for stream, log in self.logs.items()}
        return {stream: bound * shares.get(stream, 0.0) for stream, bound in self.bounds.items()}

    def state_dict(self) -> dict[str, float]:
        return dict(self.logs)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.logs = dict(state)


class GradientMonitor:
    """Samples the streams' gradients in a training loop, in windows.

    params: (name, parameter) pairs, of which those that need a gradient are followed; one that is frozen later has no
    gradient from then on. every: iterations between two samples. window: samples until `full`. The rest is
    GradientMoments'. In a loop of your own::

        monitor.tick()                                  # once an iteration
        if monitor.due:
            monitor.sample(losses)                      # before the optimizer's backward
        opt.backward(losses); opt.step()
        if monitor.full:
            print(monitor.finish())                     # the window's numbers; the next one begins

    A sample makes one backward pass for each stream and keeps the graph, so that what the optimizer then computes is
    the same, bit for bit, as without it.
    """

    def __init__(
        self,
        params: Iterable[tuple[str, Tensor]],
        streams: Sequence[str],
        every: int = 200,
        window: int = 10,
        coordinates: int = 0,
        layers: bool = False,
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1 iteration, got {every}")
        if window < 2:
            raise ValueError(f"window must be at least 2 samples, for a variance, got {window}")
        self.moments = GradientMoments({n: p for n, p in params if p.requires_grad}, streams, coordinates)
        self.every, self.window, self.layers = every, window, layers
        self.iteration = 0
        self._parts: list[dict[Tensor, Tensor]] = []
        """By stream, the gradients of the parts so far of a sample that comes in several."""

    def tick(self) -> None:
        """Count an iteration."""
        self.iteration += 1

    @property
    def due(self) -> bool:
        """Whether this iteration is one to sample."""
        return self.iteration > 0 and self.iteration % self.every == 0

    @property
    def full(self) -> bool:
        """Whether the window is at its end."""
        return self.moments.samples == self.window

    def sample(
        self,
        losses: Mapping[str, Tensor],
        last: bool = True,
        sum_over: ProcessGroup | None = None,
        scale: float = 1.0,
    ) -> None:
        """Add the gradients of `losses` (stream → scalar) to the window; their graph is kept.

        last: False for a part of a sample, which another call completes. sum_over: the processes of a group, over which
        a sample is summed; all of them must call it. scale: a GradScaler's, which the losses were multiplied by; a
        sample that is not finite under another scale than 1 is none.
        """
        moments = self.moments
        sets = tuple((stream,) for stream in moments.streams)
        live = [p for p in moments.params if p.requires_grad]
        columns = backward_by_set(losses, sets, live, retain_graph=True) if live else [[] for _ in sets]
        self._parts = self._parts or [{} for _ in sets]
        for part, column in zip(self._parts, columns):
            for p, g in zip(live, column):
                if g is not None:
                    part[p] = part[p] + g if p in part else g
        if not last:
            return
        by_param, self._parts = self._parts, []
        if sum_over is not None and live:
            totals = summed(by_param, live, sum_over)
            by_param = [{p: g for p, g in zip(live, total) if g is not None} for total in totals]
        if scale != 1:
            every = [g for part in by_param for g in part.values()]
            if not all(bool(g.isfinite().all()) for g in every):
                return
            by_param = [{p: g / scale for p, g in part.items()} for part in by_param]
        moments.add({s: [g.get(p) for p in moments.params] for s, g in zip(moments.streams, by_param)})

    def finish(self) -> dict[str, Any]:
        """Return the window's numbers (GradientMoments.summary, "layers" if asked for); a new window begins."""
        record = {"iteration": self.iteration} | self.moments.summary()
        if self.layers:
            record["layers"] = self.moments.by_layer()
        self.moments.reset()
        return record

    def state_dict(self) -> dict[str, Any]:
        return {"iteration": self.iteration, "moments": self.moments.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.moments.load_state_dict(state["moments"])
        self.iteration = state["iteration"]
