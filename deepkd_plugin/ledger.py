"""The gradients by stream that wait for an optimizer's step, beside p.grad, which anyone may change meanwhile."""

import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .distributed import buckets
from .streams import Sets

Gradients = dict[Tensor, Tensor]
"""Parameter -> its gradient."""

Key = TypeVar("Key", bound=Hashable)


class Ledger:
    """The gradients that wait for an optimizer's step: p.grad and, of several sets of streams, each set's own.

    With one set p.grad is all there is. With several p.grad is their sum, in memory of its own, and a set without an
    entry for a parameter has gradient 0 there. Whoever changes p.grad is found out by `settle`: a common factor is
    carried over to the sets, anything else is refused. The object is changed in place and never replaced, so whoever
    holds it sees what waits.
    """

    def __init__(self) -> None:
        self.sets: Sets = ()
        """The partition that the gradients were made under; () if none wait."""
        self.by_set: list[Gradients] = []
        """Each set's gradients by parameter; empty dictionaries if there is one set."""
        self.reduced = False
        """Whether the gradients are those of all processes, as far as this object can know."""
        self.warned = False
        self._known: dict[Tensor, tuple[Tensor, int]] = {}
        """Parameter -> its p.grad and that tensor's version, as they were left here."""
        self._probe: tuple[Tensor, Tensor] | None = None
        """A parameter of `_known` on the CPU, and a copy of its p.grad."""

    @property
    def apart(self) -> bool:
        """Whether sets have gradients of their own beside p.grad."""
        return len(self.sets) > 1

    def clear(self) -> None:
        """Forget the sets' gradients; p.grad is the parameters' own."""
        self.sets = ()
        self.by_set.clear()
        self.reduced = False
        self._known.clear()
        self._probe = None

    def zeroed(self, params: Sequence[Tensor]) -> None:
        """Forget the sets' gradients; p.grad, if it is there, is known to be 0."""
        self.clear()
        self._know(params)

    def begin(self, sets: Sets, params: Sequence[Tensor]) -> None:
        """Prepare for gradients of the partition `sets`.

        Raises RuntimeError if gradients of another partition wait, or if p.grad holds what no set has.
        """
        self.settle(params)
        if self.sets and self.sets != sets:
            if _any_nonzero(params):
                raise RuntimeError("coefficients changed between two backward calls of one step")
            self.clear()
        if not self.sets and len(sets) > 1 and _any_nonzero(self._unknown(params)):
            raise RuntimeError(
                "p.grad holds a gradient that is in no stream: call zero_grad() after step(), and collect(stream) "
                "after a backward of your own"
            )

    def add(self, sets: Sets, params: Sequence[Tensor], columns: Sequence[Sequence[Tensor | None]]) -> None:
        """Add the gradients of one backward call, [set][parameter], and bring p.grad to their sum."""
        self._open(sets)
        self.reduced = False
        new = [{p: g for p, g in zip(params, column) if g is not None} for column in columns]
        if not self.apart:
            grads = {p: p.grad for p in new[0] if p.grad is not None}
            _add(grads, new[0])
            for p in new[0]:
                p.grad = grads[p]
            return
        for mine, gradients in zip(self.by_set, new):
            _add(mine, gradients)
        self._write(dict.fromkeys(p for gradients in new for p in gradients))

    def collect(self, stream: str, sets: Sets, params: Sequence[Tensor]) -> None:
        """Take what was added to p.grad since the last call of this object into a stream's set."""
        present = [p for p in params if p.grad is not None]
        changed = self._unknown(present)
        if not (changed if self.apart else present):
            raise RuntimeError(f"collect({stream!r}) finds no gradient: call loss.backward() before it")
        if self.sets and self.sets != sets:
            raise RuntimeError("coefficients changed between two backward calls of one step")
        self._open(sets)
        self.reduced = True  # whoever called backward has hooks that do so, or one process
        if not self.apart:
            return
        home = self.by_set[next(s for s, names in enumerate(sets) if stream in names)]
        before = _total([{p: g[p] for p in changed if p in g} for g in self.by_set])
        for p in changed:
            assert p.grad is not None
            _add(home, {p: p.grad - before[p] if p in before else p.grad.clone()})
        self._know(changed)

    def take(self, params: Sequence[Tensor]) -> list[Gradients]:
        """Hand over what waits, by set, and forget it; [] if nothing does."""
        waiting = list(self.by_set) if self.apart else [{p: p.grad for p in params if p.grad is not None}]
        if not self.sets and not waiting[0]:
            return []
        for p in params:
            p.grad = None
        self.clear()
        return waiting

    def settle(self, params: Sequence[Tensor], unscaled: bool = False) -> None:
        """Bring the sets into line with p.grad, which others may have changed.

        A parameter without p.grad loses its gradients. A factor that is common to all that changed is carried over;
        one of 1 is none. Raises RuntimeError for any other change. unscaled: look at every value, because a
        GradScaler's unscale_ leaves no trace in a tensor's version.
        """
        present = [p for p in params if p.grad is not None]
        if not present:
            self.clear()
        if not self.apart:
            return
        for gradients in self.by_set:
            for p in [p for p in gradients if p.grad is None]:
                del gradients[p]
        changed = present if unscaled or self._changed_unseen() else self._unknown(present)
        if not changed:
            return
        factor = _common_factor([(p, [g[p] for g in self.by_set if p in g]) for p in changed])
        if factor is None:
            raise RuntimeError(
                "p.grad was changed after backward() by more than one common factor, which the gradients by stream "
                "cannot follow: clip by clip(), scale by scale_gradients(), average processes by average_gradients(), "
                "and take a gradient of your own into a stream by collect()"
            )
        scaled = [gradients[p] for gradients in self.by_set for p in changed if p in gradients]
        if factor == 0 and not _any_nonzero(changed):
            for g in scaled:
                g.zero_()  # also what was not finite
        elif factor != 1:
            _multiply(scaled, factor)
        self._know(changed)

    def merged(self, sets: Sets, params: Sequence[Tensor]) -> list[Gradients]:
        """Return the gradients of a step's sets by parameter, added up from the finer sets of `add`.

        Raises RuntimeError if p.grad is set without gradients by stream, or if a set has come apart since.
        """
        if not self.sets and len(sets) > 1 and _any_nonzero(self._unknown(params)):
            streams = tuple(name for names in sets for name in names)
            raise RuntimeError(
                f"p.grad is set but the gradients by stream are not: call the optimizer's backward() with "
                f"one loss for each of {streams}"
            )
        for names in self.sets:
            if not any(set(names) <= set(members) for members in sets):
                raise RuntimeError(
                    f"the coefficients of {names} came to differ after backward had merged their gradients: "
                    f"change them after step() and before backward()"
                )
        if len(sets) == 1:
            return [{p: p.grad for p in params if p.grad is not None}]
        merged: list[Gradients] = [{} for _ in sets]
        for names, gradients in zip(self.sets, self.by_set):
            home = merged[next(s for s, members in enumerate(sets) if set(names) <= set(members))]
            for p, g in gradients.items():
                # a sum of several sets must leave each of them as it is
                home[p] = home[p] + g if p in home else g
        return merged

    def clip(self, params: Sequence[Tensor], clipper: Callable[[list[Tensor]], Any]) -> Any:
        """Let `clipper` clip p.grad in place, and scale each coordinate of each set as that of p.grad was."""
        self.settle(params)
        present = [p for p in params if p.grad is not None]
        before = [p.grad.clone() if p.grad is not None else None for p in present] if self.apart else []
        result = clipper(present)
        for p, was in zip(present, before):
            if p.grad is None or was is None:
                continue
            factor = torch.where(was != 0, p.grad / was, 1.0)
            for gradients in self.by_set:
                if p in gradients:
                    gradients[p].mul_(factor)
        if self.apart:
            self._know(present)
        return result

    def scale(self, params: Sequence[Tensor], factor: float | Tensor) -> None:
        """Multiply p.grad and every set's gradients."""
        self.settle(params)
        present = [p for p in params if p.grad is not None]
        scaled = [p.grad for p in present if p.grad is not None]
        scaled += [g for gradients in self.by_set for g in gradients.values()]
        _multiply(scaled, factor)
        if self.apart:
            self._know(present)

    def average(self, params: Sequence[Tensor], group: Any = None) -> None:
        """Average p.grad and every set's gradients over the processes of torch.distributed's `group`."""
        # reducing waits for the device anyway, and then the sets are written over p.grad
        self.settle(params, unscaled=self._disagrees(params))
        sums = {p: p.grad for p in params if p.grad is not None}
        averaged = average(self.by_set if self.apart else [sums], params, group)
        self.reduced = True
        if self.apart:
            self.by_set[:] = averaged
            self._write(dict.fromkeys(p for gradients in averaged for p in gradients))
            return
        for p, gradient in averaged[0].items():
            p.grad = gradient

    def warn_if_alone(self, owner: str) -> None:
        """Warn once if several processes are about to take steps from gradients that each has for itself."""
        if self.warned or self.reduced or not self.sets or not (dist.is_available() and dist.is_initialized()):
            return
        if dist.get_world_size() > 1:
            self.warned = True
            warnings.warn(
                f"{owner}.step() in {dist.get_world_size()} processes without average_gradients(): each trains on its "
                f"own gradients, because backward() does not run DistributedDataParallel's hooks. Call "
                f"average_gradients() between backward() and step()",
                stacklevel=3,
            )

    def _open(self, sets: Sets) -> None:
        if not self.sets:
            self.sets = sets
            self.by_set[:] = [{} for _ in sets]

    def _write(self, params: Sequence[Tensor] | Mapping[Tensor, Any]) -> None:
        """Write the sets' sum to p.grad of some parameters."""
        for p, total in _total([{p: g[p] for p in params if p in g} for g in self.by_set]).items():
            if p.grad is None:
                p.grad = total
            else:
                p.grad.copy_(total)
        self._know(list(params))

    def _know(self, params: Sequence[Tensor]) -> None:
        """Note what p.grad is now."""
        for p in params:
            if p.grad is not None:
                self._known[p] = (p.grad, p.grad._version)
        # of the smallest that a factor would change, and only if that waits for no device
        here = [p for p, (grad, _) in self._known.items() if _is_plain(grad)]
        smallest = next((p for p in sorted(here, key=Tensor.numel) if bool(self._known[p][0].any())), None)
        self._probe = None if smallest is None else (smallest, self._known[smallest][0].clone())

    def _changed_unseen(self) -> bool:
        """Tell whether a p.grad has other values than its version says: unscale_ outside GradScaler.step."""
        if self._probe is None:
            return False
        p, held = self._probe
        return p.grad is not None and not self._unknown([p]) and not torch.equal(p.grad, held)

    def _disagrees(self, params: Sequence[Tensor]) -> bool:
        """Tell whether the smallest p.grad that is not 0 is another than the sets' sum; waits for the device."""
        present = sorted((p for p in params if p.grad is not None), key=Tensor.numel)
        for p in present if self.apart else []:
            if p.grad is not None and _any_nonzero([p]):
                return not _agree(_local(p.grad), [_local(g[p]) for g in self.by_set if p in g], 1.0)
        return False

    def _unknown(self, params: Sequence[Tensor]) -> list[Tensor]:
        """Return the parameters whose p.grad is not, or may not be, what it was left as.

        A DTensor may always have changed: FSDP2 and multi-tensor operations write to its shard and leave its version.
        """
        unknown = []
        for p in params:
            grad, version = self._known.get(p, (None, 0))
            if p.grad is not None and (grad is not p.grad or grad._version != version or type(grad) is not Tensor):
                unknown.append(p)
        return unknown


def average(
    gradients: Sequence[Mapping[Tensor, Tensor]], params: Sequence[Tensor], group: Any = None
) -> list[Gradients]:
    """Average each set's gradients by parameter over the processes of torch.distributed's `group`.

    params: all that may have a gradient, in one order on all processes. If only some processes have a gradient, the
    others count as 0; if none has, there is none. The given gradients are overwritten.
    """
    averaged: list[Gradients] = [dict(mine) for mine in gradients]
    for mine, total in zip(averaged, buckets.summed(gradients, params, group)):
        for p, gradient in zip(params, total):
            if gradient is not None:
                gradient /= dist.get_world_size(group)
                mine[p] = mine[p].copy_(gradient) if p in mine else gradient
    return averaged


def _local(tensor: Tensor) -> Tensor:
    """Return a tensor's values on this process: a DTensor's own shard."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _is_plain(grad: Tensor) -> bool:
    """Tell whether a gradient's values can be compared without waiting: a dense tensor on the CPU."""
    return type(grad) is Tensor and grad.device.type == "cpu" and grad.layout == torch.strided


def _any_nonzero(params: Sequence[Tensor]) -> bool:
    """Tell whether any p.grad is not 0 everywhere; waits for the device."""
    grads = [_local(p.grad) for p in params if p.grad is not None]
    return any(bool((g.values() if g.is_sparse else g).any()) for g in grads if g.numel())


def _common_factor(changed: Sequence[tuple[Tensor, Sequence[Tensor]]]) -> float | None:
    """Return c with p.grad = c · (the sum of the parts) for every parameter, to rounding; None without one.

    changed: parameters, each with the parts of its gradient. Coordinates that were not finite may be anything; if
    every one became NaN, so is c. A lone coordinate fits any change, so it gives no factor but 1.
    """
    pairs = [(_local(p.grad), [_local(part) for part in parts]) for p, parts in changed if p.grad is not None]
    if all(_agree(now, parts, 1.0) for now, parts in pairs):
        return 1.0
    if all(bool(now.isnan().all()) for now, _ in pairs):
        return float("nan")
    products = squares = coordinates = eps = 0.0
    for now, parts in sorted(pairs, key=lambda pair: torch.finfo(pair[0].dtype).eps):
        if coordinates >= 2 and torch.finfo(now.dtype).eps > eps:
            break  # a narrower type's rounding would spoil the factor
        if parts:
            eps = torch.finfo(now.dtype).eps
            was = sum(parts[1:], parts[0]).double()
            was = torch.where(was.isfinite(), was, 0.0)
            products += float((now.double() * was).where(was != 0, 0.0).sum())
            squares += float(was.square().sum())
            coordinates += float((was != 0).sum())
    if coordinates < 2:
        return 0.0 if all(not bool(now.any()) for now, _ in pairs) else None
    factor = products / squares
    return factor if all(_agree(now, parts, factor) for now, parts in pairs) else None


def _agree(now: Tensor, parts: Sequence[Tensor], factor: float) -> bool:
    """Tell whether `now` is factor · (the sum of the parts), to the rounding of sum and product."""
    if not parts:
        return not bool(now.any())
    was, size = sum(parts[1:], parts[0]), sum((part.abs() for part in parts[1:]), parts[0].abs())
    limits = torch.finfo(now.dtype)
    # the second part is the distance of numbers next to 0: in float16 whole gradients are smaller than limits.tiny
    near = (now - factor * was).abs() <= 8 * limits.eps * (abs(factor) * size + limits.tiny)
    return bool((near | ~was.isfinite()).all())


def _alike(keys: Iterable[Key], tensors: Mapping[Key, Tensor]) -> Iterator[list[Key]]:
    """Sort keys by the class of their tensors: a multi-tensor operation takes DTensors or plain ones, not both."""
    kinds: dict[type, list[Key]] = {}
    for key in keys:
        kinds.setdefault(type(tensors[key]), []).append(key)
    yield from kinds.values()


def _multiply(tensors: Sequence[Tensor], factor: float | Tensor) -> None:
    for kind in _alike(range(len(tensors)), dict(enumerate(tensors))):
        torch._foreach_mul_([tensors[i] for i in kind], factor)


def _add(total: Gradients, new: Mapping[Tensor, Tensor]) -> None:
    """Add gradients by parameter in place; one that has none yet gets the new one itself."""
    for both in _alike([p for p in new if p in total], new):
        torch._foreach_add_([total[p] for p in both], [new[p] for p in both])
    for p, gradient in new.items():
        total.setdefault(p, gradient)


def _total(parts: Sequence[Mapping[Tensor, Tensor]]) -> Gradients:
    """Sum several sets' gradients by parameter, in memory of their own."""
    total = dict(parts[0])
    own: set[Tensor] = set()
    for part in parts[1:]:
        for again in _alike([p for p in part if p in own], part):
            torch._foreach_add_([total[p] for p in again], [part[p] for p in again])
        for first in _alike([p for p in part if p in total and p not in own], part):
            total.update(zip(first, torch._foreach_add([total[p] for p in first], [part[p] for p in first])))
            own.update(first)
        for p, gradient in part.items():
            total.setdefault(p, gradient)
    return {p: g if p in own else g.clone() for p, g in total.items()}
