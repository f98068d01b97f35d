"""What a config asks of training beside the networks: optimizer, gradient monitor, momenta set by it."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from . import config
from .errors import UserError
from .gsnr import GradientMonitor, GSNRAllocation
from .optim import DecoupledAdamW, DecoupledMomentumSGD, StreamOptimizer


def one_momentum(params: Iterable[nn.Parameter], cfg: Any) -> DecoupledMomentumSGD:
    """Make the optimizer of mdistiller's base trainer: all losses are one stream with SOLVER.MOMENTUM."""
    solver = cfg.SOLVER
    return DecoupledMomentumSGD(params, solver.LR, {"task": solver.MOMENTUM}, solver.WEIGHT_DECAY)


def decoupled_momentum(params: Iterable[nn.Parameter], cfg: Any) -> DecoupledMomentumSGD:
    """Make the optimizer of SOLVER.DECOUPLED: a momentum for each stream (config.momenta)."""
    solver = cfg.SOLVER
    momentum, decay_stream = config.momenta(cfg)
    return DecoupledMomentumSGD(params, solver.LR, momentum, solver.WEIGHT_DECAY, decay_stream, **config.dampening(cfg))


def decoupled_adamw(student: nn.Module, params: Iterable[nn.Parameter], cfg: Any) -> DecoupledAdamW:
    """Make the optimizer of SOLVER.ADAMW: a β₁ for each stream (config.momenta), decay as ADAMW.DECAY says.

    student: the network that says which of `params` are not decayed.
    """
    solver, node = cfg.SOLVER, cfg.SOLVER.ADAMW
    params = list(params)
    spared = {*undecayed(student), *(p for p in params if p.ndim < 2)} if node.DECAY == "weights" else set()
    groups = [
        {"params": [p for p in params if p not in spared], "weight_decay": solver.WEIGHT_DECAY},
        {"params": [p for p in params if p in spared], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return DecoupledAdamW(groups, solver.LR, config.momenta(cfg)[0], node.BETA2, node.EPS)


def undecayed(network: nn.Module) -> set[nn.Parameter]:
    """Return the parameters that timm's rule does not decay: of one dimension, and those the network itself names.

    Names are those of its `no_weight_decay()`, if it has one: positions and class tokens of timm's transformers.
    """
    named = set(network.no_weight_decay()) if hasattr(network, "no_weight_decay") else set()
    return {p for name, p in network.named_parameters() if p.ndim < 2 or name in named}


def samples_gradients(cfg: Any) -> bool:
    """Tell whether a run samples its streams' gradients."""
    return cfg.GSNR.MEASURE or cfg.SOLVER.DECOUPLED.ALLOCATION == "gsnr"


def check_window(cfg: Any, steps: int) -> None:
    """Raise UserError if no window of gradient samples ends within a run of so many steps an epoch."""
    node, available = cfg.GSNR, steps * cfg.SOLVER.EPOCHS
    needed = node.EVERY * node.WINDOW
    if available < needed:
        raise UserError(
            f"GSNR.EVERY x GSNR.WINDOW is {node.EVERY} x {node.WINDOW} = {needed} iterations; it must be at most "
            f"{available}, all that the run has, so that one window ends"
        )


def make_monitor(module: nn.Module, optimizer: StreamOptimizer, cfg: Any, steps: int) -> GradientMonitor | None:
    """Make what samples the streams' gradients, if the config asks for it; steps: in an epoch."""
    if not samples_gradients(cfg):
        return None
    check_window(cfg, steps)
    node = cfg.GSNR
    # of the student alone: a method's connectors are no part of it, and not every stream reaches them
    names = {p: name for name, p in module.student.named_parameters()}
    params = [(names[p], p) for group in optimizer.param_groups for p in group["params"] if p in names]
    return GradientMonitor(params, optimizer.streams, node.EVERY, node.WINDOW, node.COORDINATES, node.LAYERS)


def make_allocation(optimizer: StreamOptimizer, cfg: Any) -> GSNRAllocation | None:
    """Make what sets the momenta by the measured GSNR, if the config asks for it."""
    node = cfg.SOLVER.DECOUPLED
    if node.ALLOCATION != "gsnr":
        return None
    return GSNRAllocation(config.deltas(cfg), node.SEPARATION, node.SMOOTHING)
