"""Stochastic gradient descent with one momentum buffer for each gradient stream (DeepKD, section 3)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from .streams import Ledger, Sets, backward_by_set, merge_streams


class Coefficients(NamedTuple):
    """How one stream's buffer moves: v ← momentum · v + (1 − dampening) · g."""

    momentum: float
    dampening: float


class DecoupledMomentumSGD(Optimizer):
    """SGD in which every named stream of the gradient has a momentum of its own.

    For stream i with gradient g_i, momentum m_i and dampening d_i (the paper's update is d_i = 0)::

        v_i ← m_i · v_i + (1 − d_i) · g_i          then  θ ← θ − lr · Σ_i v_i

    with v_i = g_i in a parameter's first step, as in torch.optim.SGD. With one stream it is that
    optimizer; with two it is DOT (Zhao et al., 2023); with `tog`, `tcg` and `ncg` it is DeepKD's.

    momentum: stream name → m_i in [0, 1). dampening: a number in [0, 1], or "ema" for d_i = m_i; without
    momentum (m_i = 0) it is ignored, as in torch.optim.SGD. weight_decay: λ · θ is added to the gradient
    of the one stream `weight_decay_stream`, which may be left out if there is only one. foreach: use
    the multi-tensor update (default) or the single-tensor one that reads like the formula.

    Use::

        opt.zero_grad()
        opt.backward({"tog": loss_a, "tcg": loss_b, "ncg": loss_c})   # instead of loss.backward()
        opt.step()

    `backward` may be called several times before a step; gradients add up. `p.grad` holds the sum of the
    streams. With a single stream (or all coefficients equal) p.grad is what `step` reads, so gradient
    clipping, a GradScaler and plain `loss.backward()` work as with any optimizer. With several, `step` reads
    and uses up the streams' own gradients: whatever changes p.grad between the two goes through `clip`,
    `scale_gradients` and `average_gradients`, which bring the streams along.

    merge: let streams with equal coefficients, in every parameter group, share a buffer and a backward pass (the same
    result up to rounding). Coefficients may be changed between steps through `param_groups[i]["momentum"]`. Streams
    that become equal have their buffers added, exactly. Streams that stop being equal take equal shares
    of the buffer that they had in common: the sum, and so the update, is continuous, but which of them
    the past belonged to is no longer known, and that difference fades with their momenta. If a
    schedule will separate them and the history must be exact from the first step, pass merge=False.

    batched: make the backward passes as one with stacked gradients (see streams.backward_by_set).
    capturable: move the buffers in place, so that a step captured as a CUDA graph after the first can be
    replayed; otherwise gradients become the buffers, which is faster. Both are attributes that may be changed
    between steps, and no part of the state.

    Raises ValueError for a learning rate or decay below 0, a coefficient outside its range, group streams
    that differ from the first group's, or an unknown stream; RuntimeError for a step without gradients by
    stream or with sparse gradients.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: Mapping[str, float],
        weight_decay: float = 0.0,
        weight_decay_stream: str | None = None,
        dampening: float | str = 0.0,
        *,
        merge: bool = True,
        foreach: bool = True,
        batched: bool = False,
        capturable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "weight_decay_stream": weight_decay_stream,
            "dampening": dampening,
            "merge": merge,
            "foreach": foreach,
        }
        self.batched = batched
        self.capturable = capturable
        self._pending = Ledger()
        super().__init__(params, defaults)

    @property
    def streams(self) -> tuple[str, ...]:
        """The streams' names, in order."""
        return tuple(self.param_groups[0]["momentum"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_momentum(group)
            group["momentum"] = dict(group["momentum"])  # groups must not share one mapping
            if tuple(group["momentum"]) != self.streams:
                raise ValueError(
                    f"every parameter group needs the streams {self.streams}, got {tuple(group['momentum'])}"
                )
            if group["weight_decay_stream"] is None and len(self.streams) == 1:
                group["weight_decay_stream"] = self.streams[0]
            _check_group(group)
        except ValueError:
            self.param_groups.pop()
            raise

    def backward(self, losses: Mapping[str, Tensor], retain_graph: bool = False) -> None:
        """Add the gradients of `losses` (stream → scalar) to the streams' gradients and their sum to p.grad.

        One backward pass is made for each set of streams with equal coefficients. A stream may be left
        out; its gradient then counts as zero.
        """
        params, sets = self._trained(), self._sets()
        self._pending.forget_stale()
        self._pending.expect(sets)  # before the work of a pass
        gradients = backward_by_set(losses, sets, params, retain_graph, self.batched)
        self._pending.add(sets, params, gradients)

    @torch.no_grad()
    def clip(self, clipper: Callable[[list[Tensor]], Any]) -> None:
        """Let `clipper` clip p.grad of the parameters that it is given, in place; the streams follow it.

        Each coordinate of each stream is scaled as that of their sum was, so a clipped sum stays the streams'
        sum. If streams cancel exactly there is nothing to follow, and they stay as they are::

            opt.clip(lambda params: torch.nn.utils.clip_grad_norm_(params, 10.0))
        """
        self._pending.clip(self._params(), clipper)

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
        """Update the parameters. `closure`, if given, must call `backward` and return the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._pending.forget_stale()
        # everything that can be refused is refused before the first weight moves
        for group in self.param_groups:
            _check_group(group)
        sets = self._sets()
        gradients = self._pending.merged(sets, self._params())
        if any(g.is_sparse for by_parameter in gradients for g in by_parameter.values()):
            raise RuntimeError("DecoupledMomentumSGD does not take sparse gradients")
        for group in self.param_groups:
            self._step_group(group, sets, gradients)
        self._pending.clear()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self._pending.clear()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what state_dict gave; buffers take the device and dtype of the parameters here.

        A state holds, for each parameter, one buffer for each entry of its group's "buffers", which names the
        streams that the buffer belongs to. Pending gradients are no part of it.
        """
        for group in state_dict["param_groups"]:
            momentum = group.get("momentum")
            if not isinstance(momentum, Mapping) or tuple(momentum) != self.streams:
                names = tuple(momentum) if isinstance(momentum, Mapping) else None
                raise ValueError(f"the state has the streams {names}, this optimizer {self.streams}")
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"batched": self.batched, "capturable": self.capturable}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._pending = Ledger()

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _trained(self) -> list[Tensor]:
        return [p for p in self._params() if p.requires_grad]

    def _sets(self) -> Sets:
        """Partition the streams, for all parameter groups alike."""
        if not all(group["merge"] for group in self.param_groups):
            return tuple((name,) for name in self.streams)
        return merge_streams([_coefficients(group) for group in self.param_groups])

    def _step_group(self, group: dict[str, Any], sets: Sets, gradients: list[dict[Tensor, Tensor]]) -> None:
        self._regroup(group, sets)
        params = [p for p in group["params"] if any(p in by_parameter for by_parameter in gradients)]
        coefficients = _coefficients(group)
        update = _update_foreach if group["foreach"] else _update_single
        new = update(
            params,
            [[by_parameter.get(p) for p in params] for by_parameter in gradients],
            [self.state[p].get("buffers") for p in params],
            [coefficients[names[0]] for names in sets],
            group["lr"],
            [group["weight_decay"] if group["weight_decay_stream"] in names else 0.0 for names in sets],
            consume=len(sets) > 1 and not self.capturable,
        )
        for p, buffers in zip(params, new):
            self.state[p]["buffers"] = buffers

    def _regroup(self, group: dict[str, Any], sets: Sets) -> None:
        """Bring the buffers of a group into the partition `sets`; what they add up to stays the same."""
        before = tuple(tuple(names) for names in group.get("buffers", ()))
        group["buffers"] = [list(names) for names in sets]
        if not before or before == sets:
            return
        for p in group["params"]:
            old = self.state[p].get("buffers") if p in self.state else None
            if old is None:
                continue
            shares = {name: buffer / len(names) for names, buffer in zip(before, old) for name in names}
            # in the old sets' order, which is the order that their buffers are added up in
            new = [[share for name, share in shares.items() if name in names] for names in sets]
            self.state[p]["buffers"] = [sum(rest, first) for first, *rest in new]


def _coefficients(group: Mapping[str, Any]) -> dict[str, Coefficients]:
    """Return stream → (m_i, d_i). Without momentum dampening has nothing to damp, as in torch.optim.SGD."""
    dampening = group["dampening"]
    return {
        name: Coefficients(m, m if dampening == "ema" else float(dampening) if m else 0.0)
        for name, m in group["momentum"].items()
    }


def _check_momentum(group: Mapping[str, Any]) -> None:
    # a scheduler that cycles momentum would put a number here
    if not isinstance(group["momentum"], Mapping) or not group["momentum"]:
        raise ValueError(f"momentum must map stream names to numbers, got {group['momentum']!r}")


def _check_group(group: Mapping[str, Any]) -> None:
    """Raise ValueError for the first value of a parameter group that is out of range."""
    if not group["lr"] >= 0.0:
        raise ValueError(f"lr must be at least 0, got {group['lr']!r}")
    if not group["weight_decay"] >= 0.0:
        raise ValueError(f"weight_decay must be at least 0, got {group['weight_decay']!r}")
    _check_momentum(group)
    for name, m in group["momentum"].items():
        if not 0.0 <= m < 1.0:
            raise ValueError(f"momentum of stream {name!r} must be in [0, 1), got {m!r}")
    dampening = group["dampening"]
    if dampening != "ema" and (isinstance(dampening, str) or not 0.0 <= dampening <= 1.0):
        raise ValueError(f'dampening must be a number in [0, 1] or "ema", got {dampening!r}')
    if group["weight_decay"] and group["weight_decay_stream"] not in group["momentum"]:
        raise ValueError(
            f"weight_decay_stream must name one of {tuple(group['momentum'])}, got {group['weight_decay_stream']!r}"
        )


Gradients = Sequence[Sequence["Tensor | None"]]

Buffers = Sequence["list[Tensor] | None"]


def _update_single(
    params: Sequence[Tensor],
    gradients: Gradients,
    buffers: Buffers,
    coefficients: Sequence[Coefficients],
    lr: float,
    weight_decay: Sequence[float],
    consume: bool,
) -> list[list[Tensor]]:
    """Update one parameter after the other: the specification that the foreach version is tested against.

    gradients: [set][parameter]; buffers: [parameter][set], None before the first step; coefficients and
    weight_decay: [set]. consume: whether the gradients' memory may be used up (nothing here does).
    Updates params in place and returns the buffers.
    """
    updated = []
    for i, p in enumerate(params):
        old, new = buffers[i], []
        for s, (m, d) in enumerate(coefficients):
            g = _or_zeros(gradients[s][i], p)
            g = g + weight_decay[s] * p if weight_decay[s] else g
            new.append(g.clone() if old is None else m * old[s] + (1 - d) * g)
        for v in new:
            p.sub_(lr * v)
        updated.append(new)
    return updated


def _or_zeros(gradient: Tensor | None, p: Tensor) -> Tensor:
    return torch.zeros_like(p) if gradient is None else gradient


def _update_foreach(
    params: Sequence[Tensor],
    gradients: Gradients,
    buffers: Buffers,
    coefficients: Sequence[Coefficients],
    lr: float,
    weight_decay: Sequence[float],
    consume: bool,
) -> list[list[Tensor]]:
    """Do the same update in multi-tensor operations, for the parameters of each device and dtype at once.

    Gradients that may be consumed become the new buffers, which saves a pass over the memory of each;
    a lone p.grad belongs to the caller and is left as it is, in torch.optim.SGD's order of operations.
    """
    updated: list[list[Tensor]] = [[] for _ in params]
    alike: dict[tuple[Any, ...], list[int]] = {}
    for i, p in enumerate(params):
        present = tuple(g[i] is not None for g in gradients)
        alike.setdefault((p.device, p.dtype, buffers[i] is None, present), []).append(i)
    for (_, _, first, present), members in alike.items():
        ps = [params[i] for i in members]
        for s, (m, d) in enumerate(coefficients):
            gs = [_or_zeros(gradients[s][i], params[i]) for i in members]
            old = [of_parameter[s] for i in members if (of_parameter := buffers[i]) is not None]
            owned = consume or not present[s]
            if weight_decay[s] and owned:
                torch._foreach_add_(gs, ps, alpha=weight_decay[s])
            elif weight_decay[s]:
                gs = list(torch._foreach_add(gs, ps, alpha=weight_decay[s]))
            if first:
                vs = gs if owned else [g.clone() for g in gs]
            elif owned:
                vs = gs
                if d:
                    torch._foreach_mul_(vs, 1 - d)
                torch._foreach_add_(vs, old, alpha=m)
            else:
                vs = old
                torch._foreach_mul_(vs, m)
                torch._foreach_add_(vs, gs, alpha=1 - d)
            for i, v in zip(members, vs):
                updated[i].append(v)
        for s in range(len(coefficients)):
            torch._foreach_add_(ps, [updated[i][s] for i in members], alpha=-lr)
    return updated
