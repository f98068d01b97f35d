"""How a step moves buffers and parameters: by the formula, and the same in multi-tensor operations."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Coefficients(NamedTuple):
    """How one stream's buffer moves: v ← momentum · v + gain · g."""

    momentum: float
    gain: float
    from_zero: bool
    """Whether v is 0 before the first step; if not, the first step sets v = g, as torch.optim.SGD does."""


class Options(NamedTuple):
    """What else a step of one parameter group needs."""

    lr: float | Tensor
    nesterov: bool = False
    """Whether θ moves by g + momentum · v instead of v."""
    maximize: bool = False
    in_place: bool = True
    """Whether buffers stay where they are; if not, gradients of memory of their own become the buffers."""


Gradients = Sequence[Sequence["Tensor | None"]]

Buffers = Sequence[list[Tensor]]

Update = Callable[
    [Sequence[Tensor], Gradients, Buffers, Sequence[Coefficients], Sequence[float], Options], list[list[Tensor]]
]
"""(parameters, gradients [set][parameter], buffers [parameter][set], empty before the first step, coefficients [set],
weight decay [set], options) -> buffers. Moves the parameters in place."""


def update_single(
    params: Sequence[Tensor],
    gradients: Gradients,
    buffers: Buffers,
    coefficients: Sequence[Coefficients],
    weight_decay: Sequence[float],
    options: Options,
) -> list[list[Tensor]]:
    """Update one parameter after the other: the specification that the multi-tensor version is tested against.

    A missing gradient is 0. With one set these are torch.optim.SGD's operations, bit for bit.
    """
    updated = []
    for i, p in enumerate(params):
        old, new, moves = buffers[i], [], []
        for s, (m, gain, from_zero) in enumerate(coefficients):
            g = _or_zeros(gradients[s][i], p)
            if options.maximize:
                g = -g
            if weight_decay[s]:
                g = g.add(p, alpha=weight_decay[s])
            if old:
                v = old[s].mul_(m).add_(g, alpha=gain)
            elif from_zero:
                v = g * gain
            else:
                v = g.clone()
            new.append(v)
            moves.append(g.add(v, alpha=m) if options.nesterov else v)
        for move in moves:
            if isinstance(options.lr, Tensor):
                p.sub_(move * options.lr)
            else:
                p.add_(move, alpha=-options.lr)
        updated.append(new)
    return updated


def update_foreach(
    params: Sequence[Tensor],
    gradients: Gradients,
    buffers: Buffers,
    coefficients: Sequence[Coefficients],
    weight_decay: Sequence[float],
    options: Options,
) -> list[list[Tensor]]:
    """Do the same update in multi-tensor operations, for the parameters of each kind, device and dtype at once.

    Gradients that become the new buffers save a pass over the memory of each. A lone p.grad belongs to the caller and
    is left as it is, in torch.optim.SGD's order of operations.
    """
    updated: list[list[Tensor]] = [[] for _ in params]
    alike: dict[tuple[type, torch.device, torch.dtype, bool, tuple[bool, ...]], list[int]] = {}
    for i, p in enumerate(params):
        present = tuple(g[i] is not None for g in gradients)
        alike.setdefault((type(p), p.device, p.dtype, not buffers[i], present), []).append(i)
    for (_, _, _, first, present), members in alike.items():
        ps = [params[i] for i in members]
        moves = []
        for s, (m, gain, from_zero) in enumerate(coefficients):
            old = [] if first else [buffers[i][s] for i in members]
            gs = [_or_zeros(gradients[s][i], params[i]) for i in members]
            owned = not options.in_place or not present[s]  # may be written to
            if options.maximize:
                gs, owned = list(torch._foreach_neg(gs)), True
            if weight_decay[s] and owned:
                torch._foreach_add_(gs, ps, alpha=weight_decay[s])
            elif weight_decay[s]:
                gs, owned = list(torch._foreach_add(gs, ps, alpha=weight_decay[s])), True
            if first and from_zero:
                vs = list(torch._foreach_mul(gs, gain))
            elif first:
                vs = gs if owned and not options.nesterov else [g.clone() for g in gs]
            elif options.in_place or options.nesterov:
                vs = old
                torch._foreach_mul_(vs, m)
                torch._foreach_add_(vs, gs, alpha=gain)
            else:
                vs = gs
                if gain != 1:
                    torch._foreach_mul_(vs, gain)
                torch._foreach_add_(vs, old, alpha=m)
            for i, v in zip(members, vs):
                updated[i].append(v)
            moves.append(torch._foreach_add(gs, vs, alpha=m) if options.nesterov else vs)
        for move in moves:
            if isinstance(options.lr, Tensor):
                # as a number it would be read from the device, and be a constant of a compiled or captured step
                torch._foreach_sub_(ps, torch._foreach_mul(move, options.lr))
            else:
                torch._foreach_add_(ps, move, alpha=-options.lr)
    return updated


def _or_zeros(gradient: Tensor | None, p: Tensor) -> Tensor:
    return torch.zeros_like(p) if gradient is None else gradient


class AdamOptions(NamedTuple):
    """What a step of AdamW needs of one parameter group beside the momenta."""

    lr: float | Tensor
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool = False
    captured: bool = False
    """Whether the number of steps is read on the device alone, so that it is no constant of a captured step."""


class AdamState(NamedTuple):
    """What AdamW remembers of the parameters of one group, each list in their order. Changed in place."""

    steps: Sequence[Tensor]
    """Steps that a parameter has taken, of shape (), float32."""
    squares: Sequence[Tensor]
    """Running means of the squared sum of the streams' gradients."""
    means: Sequence[list[Tensor]]
    """Running means of the gradients, [parameter][set]."""


AdamUpdate = Callable[
    [Sequence[Tensor], Sequence[Tensor], Gradients, AdamState, Sequence[float], AdamOptions], list[list[Tensor]]
]
"""(parameters, sums of the gradients, gradients [set][parameter], state, momenta [set], options) -> means. Moves the
parameters in place."""


def adam_single(
    params: Sequence[Tensor],
    sums: Sequence[Tensor],
    gradients: Gradients,
    state: AdamState,
    momenta: Sequence[float],
    options: AdamOptions,
) -> list[list[Tensor]]:
    """Update one parameter after the other: the specification that the multi-tensor version is tested against.

    A missing gradient is 0. With one set these are torch.optim.AdamW's operations, bit for bit unless `captured`.
    """
    lr, beta2, eps, weight_decay, maximize, captured = options
    for i, p in enumerate(params):
        total = -sums[i] if maximize else sums[i]
        state.steps[i].add_(1)
        steps = state.steps[i] if captured else state.steps[i].item()
        p.mul_(1 - lr * weight_decay)
        square = state.squares[i].mul_(beta2).addcmul_(total, total, value=1 - beta2)
        root = (square.sqrt() / _moved_on(beta2, steps) ** 0.5).add_(eps)
        for s, m in enumerate(momenta):
            g = _or_zeros(gradients[s][i], p)
            mean = state.means[i][s].lerp_(-g if maximize else g, 1 - m)
            rate = lr / _moved_on(m, steps)
            if isinstance(rate, Tensor):
                p.sub_(mean / root * rate)
            else:
                p.addcdiv_(mean, root, value=-rate)
    return list(state.means)


def adam_foreach(
    params: Sequence[Tensor],
    sums: Sequence[Tensor],
    gradients: Gradients,
    state: AdamState,
    momenta: Sequence[float],
    options: AdamOptions,
) -> list[list[Tensor]]:
    """Do the same update in multi-tensor operations, for the parameters of each kind, device and dtype at once."""
    lr, beta2, eps, weight_decay, maximize, captured = options
    alike: dict[tuple[type, torch.device, torch.dtype], list[int]] = {}
    for i, p in enumerate(params):
        alike.setdefault((type(p), p.device, p.dtype), []).append(i)
    for members in alike.values():
        ps, totals, counts, squares = (
            [tensors[i] for i in members] for tensors in (params, sums, state.steps, state.squares)
        )
        if maximize:
            totals = list(torch._foreach_neg(totals))
        torch._foreach_add_(counts, 1)
        steps = counts if captured else [count.item() for count in counts]
        torch._foreach_mul_(ps, 1 - lr * weight_decay)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, totals, totals, 1 - beta2)
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, [_moved_on(beta2, count) ** 0.5 for count in steps])
        torch._foreach_add_(roots, eps)
        for s, m in enumerate(momenta):
            means = [state.means[i][s] for i in members]
            gs = [_or_zeros(gradients[s][i], params[i]) for i in members]
            torch._foreach_lerp_(means, list(torch._foreach_neg(gs)) if maximize else gs, 1 - m)
            rates = [lr / _moved_on(m, count) for count in steps]
            if isinstance(rates[0], Tensor):
                moves = torch._foreach_div(means, roots)
                torch._foreach_mul_(moves, rates)
                torch._foreach_sub_(ps, moves)
            else:
                torch._foreach_addcdiv_(ps, means, roots, [-rate for rate in rates])
    return list(state.means)


def _moved_on(beta: float, steps: float | Tensor) -> Any:
    """Return 1 − βⁿ, how much of a running mean that began at 0 is the numbers' own after n steps."""
    if isinstance(steps, Tensor):  # float32, where the difference would lose all digits of a β next to 1
        return -torch.expm1(steps * (math.log(beta) if beta else -math.inf))
    return 1 - beta**steps
