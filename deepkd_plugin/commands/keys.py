"""`deepkd keys`: every config key, its default, what it means and what it takes."""

from collections.abc import Iterator, Sequence

from .. import config
from ..hosts.registry import find_host
from .listing import show


def main(words: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    return show(words, "keys", "List config keys: default, meaning, and which values they take.", _lines)


def _lines() -> Iterator[str]:
    """Yield a line for each key of the host's tree; of keys that only the host knows, the default."""
    host = find_host()
    tree = host.cfg.clone()
    config.add_deepkd_config(tree)
    known = {key.path: key for key in (*config.HOST_KEYS, *config.all_keys())}
    for path, default in sorted(config.flatten(tree).items()):
        key = known.get(path)
        if key is None:
            yield f"{path} = {default!r} ({host.name}'s)"
        else:
            yield f"{path} = {key.default!r}: {key.meaning}. It must be {key.allowed}."
