"""`deepkd keys`: every config key, its default, what it means and what it takes."""

from collections.abc import Iterator, Sequence
from typing import Any

from .. import config, data
from ..config import theirs
from ..detection.keys import DETECTION_KEYS
from ..hosts.host import Host
from ..hosts.libraries import FORMS
from ..hosts.registry import find_host, register
from .listing import show


def main(words: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    return show(words, "keys", "List config keys: default, meaning, and which values they take.", "mask", _lines)


def _lines() -> Iterator[str]:
    """Yield a line for each key of the host's tree and of detectors; of one that only a fork has, the default."""
    host = find_host()
    for path, default, meaning, allowed in rows(host):
        if meaning:
            yield f"{path} = {default!r}: {meaning}. It must be {allowed}."
        else:
            yield f"{path} = {default!r} ({host.name}'s)"


def rows(host: Host) -> Iterator[tuple[str, Any, str, str]]:
    """Yield path, default, meaning and allowed values of each key; the last two are empty for one that a fork has."""
    register(host)
    tree = host.cfg.clone()
    of_detectors = {key.path: key for key in DETECTION_KEYS}
    known = of_detectors | {key.path: key for key in (*config.HOST_KEYS, *config.all_keys())}
    named = _names(host)
    for path, default in sorted((dict.fromkeys(of_detectors) | config.flatten(tree)).items()):
        if key := known.get(path):
            yield path, key.default, key.meaning, key.allowed
        elif meaning := theirs.MEANINGS.get(path):
            yield path, default, meaning, named.get(path) or theirs.allowed(path, default)
        else:
            yield path, default, "", ""


def _names(host: Host) -> dict[str, str]:
    """Return what the keys take that name something of a host, in words."""
    network = f"a name of `deepkd networks`, or {FORMS}"
    return {
        "DATASET.TYPE": f"one of {', '.join(data.names())}",
        "DISTILLER.TYPE": f"one of {', '.join(host.distillers)}",
        "DISTILLER.TEACHER": network,
        "DISTILLER.STUDENT": network,
        "SOLVER.TRAINER": f"one of {', '.join(host.trainers)}",
        "SOLVER.LR_DECAY_STAGES": "a list of epochs in ascending order",
    }
