"""Stochastic gradient descent with one momentum buffer for each gradient stream (DeepKD, section 3)."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..streams import Sets
from ..updates import Coefficients, Options, update_foreach, update_single
from .base import Plan, StreamOptimizer, in_range
from .state import buffer_name

DAMPENINGS = ("ema", "matched")
"""What dampening may be beside a number."""


class DecoupledMomentumSGD(StreamOptimizer):
    """SGD in which every named stream of the gradient has a momentum of its own.

    For stream i with gradient g_i, momentum m_i and dampening d_i (the paper's update is d_i = 0)::

        v_i ← m_i · v_i + (1 − d_i) · g_i          then  θ ← θ − lr · Σ_i v_i

    with v_i = g_i in a parameter's first step, as in torch.optim.SGD. With one stream it is that
    optimizer; with two it is DOT (Zhao et al., 2023); with `tog`, `tcg` and `ncg` it is DeepKD's. How to use it, and
    with several processes, scalers and schedulers: StreamOptimizer.

    lr: a number, or a tensor of shape (). momentum: stream name → m_i in [0, 1); one number is one stream,
    "task". weight_decay: λ · θ is added to the gradient of the one stream `weight_decay_stream`, which may
    be left out if there is only one. dampening: a number in [0, 1], which without momentum (m_i = 0) is
    ignored, as in torch.optim.SGD; or one of two averages whose buffers start at 0:

    - "ema": d_i = m_i, so v_i is a running mean of g_i;
    - "matched": (1 − d_i) = (1 − m_i) / (1 − μ) with μ = `matched_to`, so every stream's steps are as long
      as those of plain SGD with momentum μ, and only the smoothing differs.

    decay_matched_to: a momentum μ. λ is then multiplied by (1 − m) / ((1 − d)(1 − μ)), with m and d of the stream that
    decays, so that in the long run weights shrink as under plain SGD with momentum μ, whatever m and d are.

    nesterov: θ ← θ − lr · Σ_i (g_i + m_i · v_i); needs dampening 0. maximize, merge, foreach: as in StreamOptimizer.
    capturable: as there; otherwise gradients become the buffers, which is faster.

    Raises ValueError for a learning rate or decay below 0, a coefficient outside its range, group streams
    that differ from the first group's, or an unknown stream; TypeError for losses that are no tensors by stream;
    RuntimeError for a step without gradients by stream or with sparse gradients.
    """

    _foreign = "; from_sgd as a pre-hook takes torch.optim.SGD's"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        momentum: Mapping[str, float] | float,
        weight_decay: float = 0.0,
        weight_decay_stream: str | None = None,
        dampening: float | str = 0.0,
        *,
        matched_to: float | None = None,
        decay_matched_to: float | None = None,
        nesterov: bool = False,
        maximize: bool = False,
        merge: bool = True,
        foreach: bool = True,
        capturable: bool = False,
    ) -> None:
        options = {
            "lr": lr,
            "weight_decay": weight_decay,
            "weight_decay_stream": weight_decay_stream,
            "dampening": dampening,
            "matched_to": matched_to,
            "decay_matched_to": decay_matched_to,
            "nesterov": nesterov,
            "maximize": maximize,
            "merge": merge,
            "foreach": foreach,
            "capturable": capturable,
        }
        super().__init__(params, momentum, options)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            # older groups have none
            for name in ("matched_to", "decay_matched_to", "nesterov", "maximize", "capturable"):
                group.setdefault(name, None if name.endswith("matched_to") else False)

    def _complete(self, group: dict[str, Any]) -> None:
        if group["weight_decay_stream"] is None and len(self.streams) == 1:
            group["weight_decay_stream"] = self.streams[0]

    def _coefficients(self, group: Mapping[str, Any]) -> dict[str, Coefficients]:
        dampening = group["dampening"]
        if dampening == "ema":
            return {name: Coefficients(m, 1 - m, True) for name, m in group["momentum"].items()}
        if dampening == "matched":
            length = 1 - group["matched_to"]
            return {name: Coefficients(m, (1 - m) / length, True) for name, m in group["momentum"].items()}
        gain = 1 - float(dampening)  # without momentum there is nothing to damp, as in torch.optim
        return {name: Coefficients(m, gain if m else 1.0, False) for name, m in group["momentum"].items()}

    def _decay(self, group: Mapping[str, Any]) -> float:
        """Return λ as it enters the gradient of the stream that decays the weights."""
        if group["decay_matched_to"] is None or not group["weight_decay"]:
            return float(group["weight_decay"])
        stream = self._coefficients(group)[group["weight_decay_stream"]]
        reach = stream.gain / (1 - stream.momentum)  # a constant gradient's part in the buffer, in the long run
        return float(group["weight_decay"] / (reach * (1 - group["decay_matched_to"])))

    def _check_options(self, group: Mapping[str, Any]) -> None:
        dampening, matched_to, decay_to = group["dampening"], group["matched_to"], group["decay_matched_to"]
        if dampening not in DAMPENINGS and not in_range(dampening, 0.0, 1.0):
            raise ValueError(f'dampening must be a number in [0, 1], "ema" or "matched", got {dampening!r}')
        if dampening == "matched" and (not in_range(matched_to, 0.0) or not matched_to < 1.0):
            raise ValueError(f'dampening "matched" needs a momentum in [0, 1) as matched_to, got {matched_to!r}')
        if decay_to is not None and (not in_range(decay_to, 0.0) or not decay_to < 1.0 or dampening == 1):
            raise ValueError(f"decay_matched_to must be a momentum in [0, 1), and dampening not 1, got {decay_to!r}")
        if group["nesterov"] and (dampening != 0 or not any(group["momentum"].values())):
            raise ValueError("nesterov needs a momentum and dampening 0")
        if group["weight_decay"] and group["weight_decay_stream"] not in group["momentum"]:
            raise ValueError(
                f"weight_decay_stream must name one of {tuple(group['momentum'])}, got {group['weight_decay_stream']!r}"
            )

    def _plan_group(
        self, group: dict[str, Any], sets: Sets, gradients: list[dict[Tensor, Tensor]], compiling: bool
    ) -> Plan:
        params = [p for p in group["params"] if p.grad is not None]
        coefficients = self._coefficients(group)
        lr, in_place = group["lr"], len(sets) == 1 or group["capturable"]
        if isinstance(lr, Tensor) and not (group["capturable"] or compiling):
            lr = lr.item()
        arguments = (
            params,
            [[by_parameter.get(p) for p in params] for by_parameter in gradients],
            [self._buffers(p, sets) for p in params],
            [coefficients[names[0]] for names in sets],
            [self._decay(group) if group["weight_decay_stream"] in names else 0.0 for names in sets],
            Options(lr, group["nesterov"], group["maximize"], in_place),
        )
        return update_foreach if group["foreach"] else update_single, arguments


def from_sgd(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Convert torch.optim.SGD's state to DecoupledMomentumSGD's; for `register_load_state_dict_pre_hook`.

    Its one buffer becomes all streams', which take equal shares of it if their momenta differ. Momenta and dampening
    are those of `optimizer`; learning rate, decay, nesterov and maximize are the state's. Another state is returned as
    it is.
    """
    if not _is_sgd(state_dict):
        return state_dict
    name = buffer_name(tuple(optimizer.defaults["momentum"]))
    buffers = {i: state.get("momentum_buffer") for i, state in state_dict["state"].items()}
    state = {i: {name: buffer} for i, buffer in buffers.items() if buffer is not None}
    return {"state": state, "param_groups": _groups_for(optimizer, state_dict)}


def to_sgd(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Convert DecoupledMomentumSGD's state to torch.optim.SGD's; for `register_load_state_dict_pre_hook`.

    SGD's buffer is the sum of the streams'. Momentum and dampening are those of `optimizer`, an SGD; learning rate,
    decay, nesterov and maximize are the state's. Another state is returned as it is.
    """
    if not _is_ours(state_dict):
        return state_dict
    state = {}
    for i, buffers in state_dict["state"].items():
        first, *rest = buffers.get("buffers") or buffers.values()  # a list in 0.1
        state[i] = {"momentum_buffer": sum(rest, first)}
    return {"state": state, "param_groups": _groups_for(optimizer, state_dict)}


def _is_sgd(state_dict: Mapping[str, Any]) -> bool:
    """Tell whether a state is torch.optim.SGD's; other optimizers there have a momentum too, such as RMSprop."""
    options = {"momentum", "dampening", "nesterov"}
    return not _is_ours(state_dict) and all(options <= group.keys() for group in state_dict["param_groups"])


def _is_ours(state_dict: Mapping[str, Any]) -> bool:
    return all("weight_decay_stream" in group for group in state_dict["param_groups"])


def _groups_for(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a state's groups as `optimizer` has them, with what both kinds of SGD mean alike taken from the state."""
    shared = ("params", "lr", "initial_lr", "weight_decay", "nesterov", "maximize")
    mine, theirs = optimizer.param_groups, state_dict["param_groups"]
    if len(mine) != len(theirs):
        raise ValueError(f"the state has {len(theirs)} parameter groups, this optimizer {len(mine)}")
    return [own | {k: group[k] for k in shared if k in group} for own, group in zip(mine, theirs)]
