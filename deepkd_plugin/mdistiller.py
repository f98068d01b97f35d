"""Registers the plugin when mdistiller's own scripts import it; see patches/ and `deepkd apply`.

mdistiller's tools/eval.py refuses every data set but its three, so of the plugin's others ours takes its place: it has
the same flags.
"""

import sys
import traceback
from types import TracebackType

from .errors import UserError
from .hosts.mdistiller import EVALUATION, tests_for_us
from .hosts.registry import find_host, register
from .terminal import open_streams

_show = sys.excepthook


def _one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """End a script of mdistiller on a user's mistake as ours end: with one line and exit code 2."""
    merging = [frame.name for frame in traceback.extract_tb(trace) if frame.name.startswith("merge_from_")]
    if issubclass(kind, UserError):
        message = str(error)
    elif merging:  # yacs refused a config file or KEY VALUE pairs
        source = "--cfg" if merging[0] == "merge_from_file" else "command line"
        message = f"{source}: {' '.join(str(part) for part in error.args)}"
    elif kind is AttributeError and "set WANDB" in str(error):  # mdistiller writes to its frozen config
        message = "config: LOG.WANDB is True and wandb cannot be used; pip install wandb, or set it to False"
    else:
        _show(kind, error, trace)
        return
    print(f"deepkd: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


sys.excepthook = _one_line
open_streams()
host = find_host()
if host.root is None:
    raise UserError("deepkd_plugin.mdistiller: mdistiller is not here; MDISTILLER_ROOT must name its checkout")
register(host)
if tests_for_us(host.root):
    from .commands.eval import main

    raise SystemExit(main(["--root", str(host.root / "data"), *sys.argv[1:]], EVALUATION))
