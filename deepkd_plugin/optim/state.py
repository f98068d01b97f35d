"""The names of buffers in an optimizer's state, and states that are loaded."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor


def buffer_name(streams: Iterable[str]) -> str:
    """Return what the buffer of a set of streams is called in a parameter's state."""
    return "momentum_buffer_" + "+".join(streams)


def buffer_streams(name: str) -> list[str]:
    """Return the streams of a buffer of that name."""
    return name.removeprefix("momentum_buffer_").split("+")


def name_buffers(state: dict[str, Any], streams: tuple[str, ...], beside: tuple[str, ...]) -> None:
    """Give the buffers of a state that is loaded their names, if it is of 0.1, and check them.

    0.1 had a list "buffers" for each parameter, and in the group the streams of each. beside: what a parameter's state
    has besides. Raises ValueError for a state that has not that, and one buffer of the parameter's shape for every
    stream.
    """
    for group in state["param_groups"]:
        names = [buffer_name(members) for members in group.pop("buffers", ())]
        for p in group["params"]:
            own = state["state"].get(p)
            if not own:
                continue
            if isinstance(own.get("buffers"), list):
                own = state["state"][p] = dict(zip(names, own["buffers"]))
            buffers = {name: buffer for name, buffer in own.items() if name not in beside}
            found = sorted(stream for name in buffers for stream in buffer_streams(name))
            fits = all(isinstance(buffer, Tensor) and buffer.shape == p.shape for buffer in buffers.values())
            if found != sorted(streams) or not fits or not own.keys() >= set(beside):
                also = f", and {' and '.join(beside)}" if beside else ""
                raise ValueError(
                    f"the state of a parameter of shape {tuple(p.shape)} has {list(own)}; it must have a tensor of "
                    f"that shape for each of the streams {streams}{also}"
                )


def plain(value: Any) -> Any:
    """Return a group's value as dictionaries and numbers of Python."""
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    return value.item() if hasattr(value, "item") and not isinstance(value, Tensor) else value
