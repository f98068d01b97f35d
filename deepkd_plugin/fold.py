"""A frozen network with its BatchNorms folded into the layers before them: the same function, fewer passes over memory.

In evaluation mode BatchNorm is one factor and one offset for each channel, which a convolution can take into its own
weights. What follows what is read from torch.export's graph of the network, not guessed by names.
"""

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

TOLERANCE = 1e-5
"""Difference of a logit that rounding explains in float32, as a share of the largest logit."""

TOP = 50
"""With more classes than this, the sets of so many largest logits must be the same too."""

_FUSE: dict[Any, Any] = {
    (nn.Conv2d, nn.BatchNorm2d): fuse_conv_bn_eval,
    (nn.Linear, nn.BatchNorm1d): fuse_linear_bn_eval,
}

_COUNT = "num_batches_tracked"
"""BatchNorm's buffer that evaluation does not read."""


class CannotFoldError(Exception):
    """A network has nothing to fold, or it cannot be known; the message says why, for a line that names the network."""


def fold(network: nn.Module, image: Tensor) -> nn.Module:
    """Return a copy of a network in evaluation mode without the BatchNorms that follow a layer directly.

    image: some images that it takes, (B, 3, H, W). The copy shares all weights with the network but those of the folded
    layers, which are new, and carry no gradient. Raises CannotFoldError if there is no such BatchNorm, and as `pairs`
    does.
    """
    found = pairs(network, image)
    if not found:
        raise CannotFoldError("no BatchNorm in evaluation mode follows a layer directly")
    # what is in the memo is shared, not copied
    memo = {id(t): t for t in (*network.parameters(), *network.buffers())}
    folded: nn.Module = copy.deepcopy(network, memo)
    with torch.no_grad():
        for layer, norm in found:
            modules = network.get_submodule(layer), network.get_submodule(norm)
            fuse = _FUSE[type(modules[0]), type(modules[1])]
            _replace(folded, layer, fuse(*modules).requires_grad_(False))
            _replace(folded, norm, nn.Identity())
    return folded


def pairs(network: nn.Module, image: Tensor) -> list[tuple[str, str]]:
    """Return the names of each layer and of the BatchNorm that alone uses what it returns, in their order.

    image: some images that the network takes, (B, 3, H, W). Both modules compute once in a pass, by their own forward,
    and nothing else of them is used. Raises CannotFoldError if torch.export cannot follow the network.
    """
    try:
        with torch.no_grad():
            program = torch.export.export(network, (image,), strict=False)
    except Exception as error:  # whatever a network does with what stands for its images
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:150]
        raise CannotFoldError(f"torch.export cannot follow it ({reason})") from None
    signature, modules = program.graph_signature, dict(network.named_modules())
    tensors = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}

    def called(node: Any) -> str | None:
        """Return the name of the module whose own forward made a node of all its tensors, which nobody else reads."""
        stack = node.meta.get("nn_module_stack") if isinstance(node, fx.Node) else None
        if not stack:
            return None
        name = str(next(reversed(stack.values()))[0])
        module = modules.get(name)
        if module is None or module._forward_hooks or module._forward_pre_hooks:
            return None
        read = [other for other in node.all_input_nodes if other.name in tensors]
        own = {tensors[other.name] for other in read} == {
            f"{name}.{leaf}" for leaf, _ in (*module.named_parameters(), *module.named_buffers()) if leaf != _COUNT
        }
        return name if own and all(len(other.users) == 1 for other in read) else None

    found = []
    for node in program.graph.nodes:
        if node.target != torch.ops.aten.batch_norm.default or len(node.args[0].users) != 1:
            continue
        layer, norm = called(node.args[0]), called(node)
        if layer is None or norm is None or modules[norm].training:
            continue
        if (type(modules[layer]), type(modules[norm])) in _FUSE and modules[norm].running_mean is not None:
            found.append((layer, norm))
    return found


def differences(plain: Tensor, folded: Tensor) -> str:
    """Say in what two computations of logits (…, C) differ beyond rounding; "" if they do not."""
    scale = float(plain.abs().max())
    off = float((plain - folded).abs().max())
    if not off <= TOLERANCE * scale:
        return f"a logit is off by {off:.2g}, and the largest is {scale:.3g}"
    if plain.shape[-1] > TOP and not torch.equal(_largest(plain), _largest(folded)):
        return f"the {TOP} largest logits of an image are others"
    return ""


def _largest(logits: Tensor) -> Tensor:
    """Return which logits of each row are its TOP largest, in the order of the classes."""
    return logits.topk(TOP, dim=-1).indices.sort(dim=-1).values


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(parent), leaf, module)
