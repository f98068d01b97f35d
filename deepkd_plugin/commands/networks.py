"""`deepkd networks`: what DISTILLER.STUDENT and DISTILLER.TEACHER may be."""

from collections.abc import Iterator, Sequence

from ..data import ZOOS
from ..hosts.libraries import known_names
from ..hosts.networks import NETWORKS
from ..hosts.registry import find_host
from .listing import show


def main(words: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    return show(
        words,
        "networks",
        "List the networks of the host's zoos, of torchvision, and of timm if it is installed. Yours is "
        "package.module:constructor.",
        "resnet18",
        _lines,
    )


def _lines() -> Iterator[str]:
    host = find_host()
    for name in NETWORKS:
        yield f"{name} (registered)"
    for zoo in ZOOS:
        for name in host.zoo(zoo):
            yield f"{name} ({zoo})"
    yield from known_names()
