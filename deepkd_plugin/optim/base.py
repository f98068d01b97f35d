"""What optimizers of gradients by named stream share: backward passes, what waits for a step, their state."""

import sys
from collections.abc import Callable, Hashable, Iterable, Mapping
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from ..distributed.buckets import Summation
from ..distributed.process_group import ProcessGroup
from ..ledger import Ledger
from ..streams import Sets, backward_by_set, merge_streams
from .state import buffer_name, buffer_streams, name_buffers, plain

Plan = tuple[Callable[..., list[list[Tensor]]], tuple[Any, ...]]
"""The update of a parameter group and its arguments, parameters first; it returns their buffers, [parameter][set]."""


class Momenta(dict[str, float]):
    """Stream → momentum. `torch.tensor` reads it as the largest, for loggers that expect one number."""

    def __dlpack__(self, **options: Any) -> Any:
        return torch.tensor(max(self.values(), default=0.0), dtype=torch.float64).__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return torch.empty(()).__dlpack_device__()


class StreamOptimizer(Optimizer):
    """An optimizer with one momentum buffer for each named stream of the gradient.

    Use::

        opt.zero_grad()
        opt.backward({"tog": loss_a, "tcg": loss_b, "ncg": loss_c})   # instead of loss.backward()
        opt.step()

    `backward` may be called several times before a step; gradients add up. `p.grad` holds the sum of the
    streams. With a single stream (or all coefficients equal) p.grad is what `step` reads, so gradient
    clipping, a GradScaler and plain `loss.backward()` work as with any optimizer. With several, `step` reads
    and uses up the streams' own gradients. If somebody else multiplied p.grad meanwhile by one common factor
    (clip_grad_norm_, a GradScaler), the streams follow; p.grad = None drops that parameter's gradients. Any
    other change is refused by the next call here: it goes through `clip`, `scale_gradients`,
    `average_gradients` or `collect`. A change of p.grad.data, which PyTorch does not count, may go unnoticed.
    A GradScaler steps this optimizer by its own protocol: one scale, one decision to skip, and a step that is
    skipped leaves every buffer alone.

    Several processes: `backward` uses torch.autograd.grad, so it runs neither DistributedDataParallel's hooks
    nor those of register_post_accumulate_grad_hook, which would see the sum of the streams only. Call
    `average_gradients` between backward and step. For FSDP2, whose weights only a real backward reaches, call
    `loss.backward()` and `collect(stream)` for one stream after the other.

    Options that every such optimizer has, in its groups too:

    merge: let streams with equal coefficients, in every parameter group, share a buffer and a backward pass (the same
    result up to rounding). Coefficients may be changed between steps through `param_groups[i]["momentum"]`. A number
    there, which OneCycleLR and CyclicLR write, becomes the largest momentum, and the other streams' keep their ratio
    to it. Streams that become equal have their buffers added, exactly. Streams that stop being equal take equal shares
    of the buffer that they had in common: the sum, and so the update, is continuous, but which of them
    the past belonged to is no longer known, and that difference fades with their momenta. If a
    schedule will separate them and the history must be exact from the first step, pass merge=False.

    foreach: use the multi-tensor update (default) or the single-tensor one that reads like the formula. maximize: go
    uphill. capturable: move all state in place and on the device, so that a step captured as a CUDA graph after the
    first can be replayed. It may be changed between steps through `param_groups[i]["capturable"]`, and loading a state
    leaves it as it is.

    A parameter's state has a tensor for each buffer: "momentum_buffer_" and its streams, joined by "+".

    Raises ValueError for a coefficient outside its range, group streams that differ from the first group's, or an
    unknown stream; TypeError for losses that are no tensors by stream; RuntimeError for a step without gradients by
    stream or with sparse gradients.

    A subclass gives `_coefficients`, `_check_options` and `_plan_group`.
    """

    _step_supports_amp_scaling = True  # torch.amp.GradScaler's name for: step reads grad_scale and found_inf
    _beside: ClassVar[tuple[str, ...]] = ()
    """What a parameter's state has beside its buffers."""
    _foreign = ""
    """How the refusal of a state without streams ends."""

    def __init__(self, params: Iterable[Any], momentum: Mapping[str, float] | float, options: dict[str, Any]) -> None:
        named = {"task": float(momentum)} if isinstance(momentum, (float, Real)) else momentum
        _check_names(named)
        self._pending = Ledger()
        super().__init__(params, {"lr": options.pop("lr"), "momentum": dict(named), **options})

    def _coefficients(self, group: Mapping[str, Any]) -> Mapping[str, Hashable]:
        """Return stream → what a set of streams must have in common; of `_check_options` they are checked."""
        raise NotImplementedError

    def _check_options(self, group: Mapping[str, Any]) -> None:
        """Raise ValueError for the first of a subclass's own options in a parameter group that is out of range."""
        raise NotImplementedError

    def _plan_group(
        self, group: dict[str, Any], sets: Sets, gradients: list[dict[Tensor, Tensor]], compiling: bool
    ) -> Plan:
        """Return the update of a parameter group, of gradients [set][parameter]."""
        raise NotImplementedError

    def _complete(self, group: dict[str, Any]) -> None:
        """Fill in what a new parameter group leaves to the others of its options; by default nothing."""

    def _fresh(self, p: Tensor) -> dict[str, Tensor]:
        """Return what a parameter's state has beside its buffers, before its first step."""
        return {}

    @property
    def streams(self) -> tuple[str, ...]:
        """The streams' names, in order."""
        return tuple(self.defaults["momentum"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            if isinstance(group["momentum"], Mapping):
                group["momentum"] = Momenta(group["momentum"])  # groups must not share one mapping
            self._complete(group)
            self._check_group(group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def backward(
        self, losses: Mapping[str, Tensor], retain_graph: bool = False, sum_over: ProcessGroup | None = None
    ) -> None:
        """Add the gradients of `losses` (stream → scalar) to the streams' gradients and their sum to p.grad.

        One backward pass is made for each set of streams with equal coefficients. A stream may be left
        out; its gradient then counts as zero. A call that is refused leaves all gradients as they were.

        sum_over: the processes of a group of torch.distributed's, over which the streams' gradients are summed, those
        of earlier calls too, while the passes go on; all of them must call it, once before a step. Their losses are
        then to be parts of one sum; for a mean see `average_gradients`. No other use of the group may come between.
        """
        for group in self.param_groups:
            self._check_group(group)
        params, sets = self._trained(), self._sets()
        self._pending.begin(sets, params)
        if sum_over is None:
            self._pending.add(sets, params, backward_by_set(losses, sets, params, retain_graph))
            return
        earlier = self._pending.take(params) or [{} for _ in sets]
        sums = [Summation(params, mine, sum_over) for mine in earlier]
        backward_by_set(losses, sets, params, retain_graph, [one.following for one in sums])
        for one in sums:
            one.flush()
        self._pending.add(sets, params, [one.finish() for one in sums])
        self._pending.reduced = True

    @torch.no_grad()
    def collect(self, stream: str) -> None:
        """Take what a `backward()` of your own added to p.grad into a stream::

            opt.zero_grad()
            loss_a.backward(retain_graph=True); opt.collect("tog")
            loss_b.backward(); opt.collect("ncg")
            opt.step()

        For wrappers that reduce gradients in their hooks, such as FSDP2. p.grad must not be changed by anything else
        between two calls: what is not to be stepped on is given up by this object's zero_grad, not by the network's.
        Of the second stream on, what p.grad gained is taken, so a gradient is exact to the rounding of the sum.
        Raises ValueError for an unknown stream, RuntimeError if there is no gradient.
        """
        if stream not in self.streams:
            raise ValueError(f"unknown stream {stream!r}; the streams are {list(self.streams)}")
        for group in self.param_groups:
            self._check_group(group)
        self._pending.collect(stream, self._sets(), self._params())

    @torch.no_grad()
    def clip(self, clipper: Callable[[list[Tensor]], Any]) -> Any:
        """Let `clipper` clip p.grad of the parameters that it is given, in place; the streams follow it.

        Returns what `clipper` returns. Each coordinate of each stream is scaled as that of their sum was, so a clipped
        sum stays the streams' sum. If streams cancel exactly there is nothing to follow, and they stay as they are::

            norm = opt.clip(lambda params: torch.nn.utils.clip_grad_norm_(params, 10.0))
        """
        return self._pending.clip(self._params(), clipper)

    @torch.no_grad()
    def scale_gradients(self, factor: float | Tensor) -> None:
        """Multiply p.grad and every stream's gradient, say by the inverse of a GradScaler's scale."""
        self._pending.scale(self._params(), factor)

    @torch.no_grad()
    def average_gradients(self, group: Any = None) -> None:
        """Average every stream's gradient, and p.grad with them, over the processes of torch.distributed.

        All processes of `group` (default: all) must call it between backward and step. A parameter without a
        gradient here, but with one elsewhere, counts as 0; one without any stays without.
        """
        self._pending.average(self._trained(), group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters. `closure`, if given, must call `backward` and return the loss.

        A parameter without p.grad is left out. One that some streams do not reach has gradient 0 in them.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        plans = self._plan(compiling=torch.compiler.is_compiling())
        buffers = [update(*arguments) for update, arguments in plans]
        self._keep([arguments[0] for _, arguments in plans], buffers)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self._pending.zeroed(self._params())

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        for group in state["param_groups"]:  # of plain classes, for safe loaders: numpy's numbers are none
            group.update({key: plain(value) for key, value in group.items()})
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what state_dict gave; buffers take the device and dtype of the parameters here.

        Pending gradients are no part of a state. A pre-hook runs before the check of streams, so one such as from_sgd
        may make a state of another optimizer's.
        """
        capturable = [group["capturable"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, value in zip(self.param_groups, capturable):
            group["capturable"] = value

    def __setstate__(self, state: dict[str, Any]) -> None:
        if hasattr(self, "defaults"):  # a state is loaded, after its pre-hooks; otherwise this is a copy or unpickled
            for group in state["param_groups"]:
                momentum = group.get("momentum")
                names = tuple(momentum) if isinstance(momentum, Mapping) else None
                cycles = isinstance(momentum, Real) and "momentum_shares" in group
                if names != self.streams and not cycles:
                    hint = self._foreign if names is None else ""
                    raise ValueError(f"the state has the streams {names}, this optimizer {self.streams}{hint}")
            name_buffers(state, self.streams, self._beside)
        else:
            self._pending = Ledger()
        super().__setstate__(state)
        for group in self.param_groups:
            if isinstance(group["momentum"], Mapping):
                group["momentum"] = Momenta(group["momentum"])

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _trained(self) -> list[Tensor]:
        return [p for p in self._params() if p.requires_grad]

    def _sets(self) -> Sets:
        """Partition the streams, for all parameter groups alike."""
        if not all(group["merge"] for group in self.param_groups):
            return tuple((name,) for name in self.streams)
        return merge_streams([self._coefficients(group) for group in self.param_groups])

    def _check_group(self, group: dict[str, Any]) -> None:
        """Spread a number in group["momentum"] over the streams; raise ValueError for the first bad value."""
        momentum = group["momentum"]
        if isinstance(momentum, Real) and not isinstance(momentum, bool):
            shares = group.get("momentum_shares") or _shares(self.defaults["momentum"])
            group["momentum"] = momentum = Momenta({name: float(momentum) * share for name, share in shares.items()})
        if not isinstance(momentum, Mapping):
            raise ValueError(f"momentum must map stream names to numbers, or be a number, got {momentum!r}")
        if tuple(momentum) != self.streams:
            raise ValueError(
                f"every parameter group needs the streams {self.streams} in this order, got {tuple(momentum)}"
            )
        _check_common(group)
        self._check_options(group)
        if any(momentum.values()):  # at 0 the ratios cannot be read off
            group["momentum_shares"] = _shares(momentum)

    @_disable_dynamo  # only the updates are worth compiling
    def _plan(self, compiling: bool) -> list[Plan]:
        """Return the updates of a step with their arguments; what can be refused is refused before a weight moves."""
        for group in self.param_groups:
            self._check_group(group)
        sets, params = self._sets(), self._params()
        scale, overflow = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if overflow is not None and overflow.item():
            return []
        self._pending.settle(params, unscaled=overflow is not None and scale is None)
        if scale is not None:
            self._pending.scale(params, 1.0 / scale)
        self._pending.warn_if_alone(type(self).__name__)
        gradients = self._pending.merged(sets, params)
        if any(g.is_sparse for by_parameter in gradients for g in by_parameter.values()):
            raise RuntimeError(f"{type(self).__name__} does not take sparse gradients")
        self._pending.clear()
        if not self.state and self._is_rehearsal():
            for p in params:
                if p.grad is not None:
                    self.state[p].update(self._fresh(p))
                    self.state[p].update((buffer_name(names), torch.zeros_like(p)) for names in sets)
            return []
        return [self._plan_group(group, sets, gradients, compiling) for group in self.param_groups]

    @_disable_dynamo
    def _keep(self, params: list[list[Tensor]], buffers: list[list[list[Tensor]]]) -> None:
        """Put the buffers, [group][parameter][set], into the state."""
        names = [buffer_name(streams) for streams in self._sets()]
        for of_group in zip(params, buffers):
            for p, new in zip(*of_group):
                self.state[p].update(zip(names, new))

    def _buffers(self, p: Tensor, sets: Sets) -> list[Tensor]:
        """Return a parameter's buffers in the partition `sets`; what they add up to stays the same.

        Buffers of another partition are taken out of its state. Before the first step there are none.
        """
        state = self.state[p]
        old = {key: buffer for key, buffer in state.items() if key not in self._beside}
        names = [buffer_name(members) for members in sets]
        if not old or list(old) == names:
            return list(old.values())
        shares = {
            stream: buffer / len(streams)
            for key, buffer in old.items()
            for streams in [buffer_streams(key)]
            for stream in streams
        }
        for key in old:
            del state[key]
        # in the old buffers' order, which is the order that they are added up in
        parts = [[share for stream, share in shares.items() if stream in members] for members in sets]
        return [sum(rest, first) for first, *rest in parts]

    def _is_rehearsal(self) -> bool:
        """Tell whether a step only asks for buffers: torch.distributed.checkpoint takes one with all zeros."""
        if any(float(group["lr"]) for group in self.param_groups):
            return False
        return not any(bool(p.grad.any()) for p in self._params() if p.grad is not None)


def backward(optimizer: Any, losses: Mapping[str, Tensor], retain_graph: bool = False) -> None:
    """Call the `backward` of the optimizer of streams inside a wrapper, such as Accelerate's.

    losses: stream → scalar. As Accelerate's own backward does, the losses are divided by its gradient accumulation
    steps and multiplied by its GradScaler's scale. Raises TypeError if no such optimizer is inside.
    """
    inner, scaled = optimizer, losses
    while not isinstance(inner, StreamOptimizer):
        steps = getattr(getattr(inner, "gradient_state", None), "num_steps", 1)
        scaler = getattr(inner, "scaler", None)
        if isinstance(losses, Mapping) and all(isinstance(loss, Tensor) for loss in losses.values()):
            scaled = {name: loss / steps for name, loss in scaled.items()}
            scaled = {name: scaler.scale(loss) for name, loss in scaled.items()} if scaler is not None else scaled
        inner = getattr(inner, "optimizer", None)
        if inner is None:
            raise TypeError(
                f"backward takes a DecoupledMomentumSGD, a DecoupledAdamW or a wrapper of one, got "
                f"{type(optimizer).__name__}"
            )
    inner.backward(scaled, retain_graph)


def _shares(momentum: Mapping[str, float]) -> dict[str, float]:
    """Return each stream's momentum as a share of the largest; all 1 if that is 0."""
    largest = max(momentum.values())
    return {name: m / largest if largest else 1.0 for name, m in momentum.items()}


def _check_names(momentum: Mapping[str, float]) -> None:
    if not momentum or not isinstance(momentum, Mapping):
        raise ValueError(f"momentum must map stream names to numbers, or be a number, got {momentum!r}")
    for name in momentum:
        if not isinstance(name, str) or not name or "+" in name:
            raise ValueError(f"a stream's name must be a word without '+', got {name!r}")


def in_range(value: Any, low: float, high: float = sys.float_info.max) -> bool:
    """Tell whether a value is a number from `low` to `high`."""
    return isinstance(value, Real) and low <= float(value) <= high


def _check_common(group: Mapping[str, Any]) -> None:
    """Raise ValueError for the first value that every parameter group has and that is out of range."""
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.ndim:
            raise ValueError(f"lr must be a number or a tensor of shape (), got a tensor of shape {tuple(lr.shape)}")
        if lr.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere it would wait for the device
            lr = lr.item()
    if not isinstance(lr, Tensor) and not in_range(lr, 0.0):
        raise ValueError(f"lr must be at least 0 and finite, got {lr!r}")
    if not in_range(group["weight_decay"], 0.0):
        raise ValueError(f"weight_decay must be at least 0 and finite, got {group['weight_decay']!r}")
    for name, m in group["momentum"].items():
        if not in_range(m, 0.0) or not m < 1.0:
            raise ValueError(f"momentum of stream {name!r} must be in [0, 1), got {m!r}")
