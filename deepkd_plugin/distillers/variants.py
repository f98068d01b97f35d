"""What SOLVER.DECOUPLED.VARIANT stands for: the readings of DeepKD by its article, by its paper and by its code."""

from collections.abc import Mapping
from typing import Any, NamedTuple

BY_VARIANT = "variant"
"""The value of a key that takes what VARIANT says; it is these keys' default."""

MATCHED = "matched"
"""The value that keeps plain SGD's step length (DAMPENING) or decay (WEIGHT_DECAY_STREAM: in VARIANT's stream)."""

KEY = "SOLVER.DECOUPLED.VARIANT"


class Variant(NamedTuple):
    """One reading of the method as a whole (docs/method.md has the sources)."""

    dampening: str
    """Of SOLVER.DECOUPLED.DAMPENING."""
    decay_stream: str
    """Of SOLVER.DECOUPLED.WEIGHT_DECAY_STREAM."""
    reading: str
    """Of DeepKD.MASK.READING."""
    momentum_of: Mapping[str, str] = {}
    """Stream → the stream whose momentum it takes instead of its own."""


VARIANTS = {
    "article": Variant("ema", "tcg", "multiply"),
    "paper": Variant("none", "tcg", "renormalise"),
    "release": Variant("none", "tcg", "renormalise", {"tog": "tcg"}),
}

_KEYS = {
    "SOLVER.DECOUPLED.DAMPENING": "dampening",
    "SOLVER.DECOUPLED.WEIGHT_DECAY_STREAM": "decay_stream",
    "DeepKD.MASK.READING": "reading",
}
"""Keys that VARIANT decides unless they say otherwise, and the fields above that do so."""


def variant(cfg: Any) -> Variant:
    """Return what a config's VARIANT stands for, with the keys that say otherwise put in its place.

    cfg: has SOLVER.DECOUPLED, and DeepKD if its mask is to be read.
    """
    node, mask = cfg.SOLVER.DECOUPLED, getattr(cfg, "DeepKD", None)
    asked = {"dampening": node.DAMPENING, "decay_stream": node.WEIGHT_DECAY_STREAM}
    if mask is not None:
        asked["reading"] = mask.MASK.READING
    return VARIANTS[node.VARIANT]._replace(**{field: said for field, said in asked.items() if said != BY_VARIANT})


def resolved(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a flat config with what VARIANT decides written out, so that runs are compared by what they do."""
    name = settings.get(KEY)
    if not isinstance(name, str) or name not in VARIANTS:  # a file's, which may hold anything
        return dict(settings)
    said = {path: getattr(VARIANTS[name], field) for path, field in _KEYS.items()}
    undecided = {path for path in said if isinstance(settings.get(path), str) and settings[path] == BY_VARIANT}
    return {path: said[path] if path in undecided else value for path, value in settings.items()}
