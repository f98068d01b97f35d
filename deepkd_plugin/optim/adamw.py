"""AdamW with one first moment for each gradient stream; ours, not the paper's."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..streams import Sets
from ..updates import AdamOptions, AdamState, adam_foreach, adam_single
from .base import Plan, StreamOptimizer, in_range


class DecoupledAdamW(StreamOptimizer):
    """AdamW (Loshchilov and Hutter, 2019) in which every named stream of the gradient has a β₁ of its own.

    The paper decouples the momentum of SGD; this is our transfer of it to AdamW, for students that are trained with
    that. For stream i with gradient g_i and momentum m_i, in a parameter's n-th step::

        a_i ← m_i · a_i + (1 − m_i) · g_i          v ← β₂ · v + (1 − β₂) · (Σ_i g_i)²
        θ ← θ − lr · λ · θ − lr · Σ_i [a_i / (1 − m_iⁿ)] / [√(v / (1 − β₂ⁿ)) + ε]

    There is one second moment, of the sum, so that all streams are measured by one scale: their shares of a step stay
    those of their gradients. Each first moment has the bias correction of its own momentum. If all momenta are equal it
    is torch.optim.AdamW, bit for bit. How to use it, and with several processes, scalers and schedulers:
    StreamOptimizer; a GSNRAllocation takes it too.

    lr: a number, or a tensor of shape (). momentum: stream name → m_i in [0, 1), AdamW's β₁; one number is one stream,
    "task". beta2: in [0, 1). eps: ε, above or at 0. weight_decay: λ; decoupled, so it belongs to no stream. maximize,
    merge, foreach, capturable: as in StreamOptimizer. The bias correction of a momentum that is changed is that of its
    new value, as in torch.optim.AdamW.

    A parameter's state has "step", a tensor of shape (), "exp_avg_sq", and a buffer for each set of streams.

    Raises as StreamOptimizer does, and ValueError for a learning rate, decay or eps below 0.
    """

    _beside = ("step", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: Mapping[str, float] | float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        merge: bool = True,
        foreach: bool = True,
        capturable: bool = False,
    ) -> None:
        options = {
            "lr": lr,
            "beta2": beta2,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "merge": merge,
            "foreach": foreach,
            "capturable": capturable,
        }
        super().__init__(params, momentum, options)

    def _coefficients(self, group: Mapping[str, Any]) -> dict[str, float]:
        return dict(group["momentum"])

    def _check_options(self, group: Mapping[str, Any]) -> None:
        if not in_range(group["beta2"], 0.0) or not group["beta2"] < 1.0:
            raise ValueError(f"beta2 must be in [0, 1), got {group['beta2']!r}")
        if not in_range(group["eps"], 0.0):
            raise ValueError(f"eps must be at least 0 and finite, got {group['eps']!r}")

    def _fresh(self, p: Tensor) -> dict[str, Tensor]:
        # float32 on the CPU, as torch.optim has it, unless it is read on the device
        return {"step": torch.zeros(()), "exp_avg_sq": torch.zeros_like(p)}

    def _plan_group(
        self, group: dict[str, Any], sets: Sets, gradients: list[dict[Tensor, Tensor]], compiling: bool
    ) -> Plan:
        params = [p for p in group["params"] if p.grad is not None]
        captured = group["capturable"] or compiling
        lr = group["lr"]
        if isinstance(lr, Tensor) and not captured:
            lr = lr.item()
        for p in params:
            state = self.state[p]
            if "step" not in state:
                state.update(self._fresh(p))
            if captured:
                state["step"] = state["step"].to(p.device)
        arguments = (
            params,
            [p.grad for p in params],
            [[by_parameter.get(p) for p in params] for by_parameter in gradients],
            AdamState(
                [self.state[p]["step"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [self._buffers(p, sets) or [torch.zeros_like(p) for _ in sets] for p in params],
            ),
            [group["momentum"][names[0]] for names in sets],
            AdamOptions(lr, group["beta2"], group["eps"], group["weight_decay"], group["maximize"], captured),
        )
        return adam_foreach if group["foreach"] else adam_single, arguments
