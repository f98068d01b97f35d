"""Imported for its effect by mdistiller's own scripts: see patches/ and `deepkd apply`."""

from __future__ import annotations

import sys
from types import TracebackType

from .errors import UserError
from .registry import find_host, register

_show = sys.excepthook


def _one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A user's mistake ends a script of mdistiller as it ends ours: one line and exit code 2."""
    if not issubclass(kind, UserError):
        _show(kind, error, trace)
        return
    print(f"deepkd: error: {error}", file=sys.stderr)
    raise SystemExit(2)


sys.excepthook = _one_line
host = find_host()
if host.root is None:
    raise UserError(
        "deepkd_plugin.mdistiller: mdistiller is not here; MDISTILLER_ROOT must name its checkout"
    )
register(host)
