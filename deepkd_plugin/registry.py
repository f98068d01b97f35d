"""The public door to the registries: `register` puts the plugin into a host's, in place.

`python -m deepkd_plugin.registry` says what it finds, as `deepkd doctor` does.
"""

from .hosts.registry import find_host, register

__all__ = ["find_host", "register"]

if __name__ == "__main__":
    from .commands.doctor import doctor
    from .terminal import guarded

    raise SystemExit(guarded(doctor))
