"""The checkpoint that a run goes on from: read, and refused if it is another run's."""

from pathlib import Path
from typing import Any

from .. import config
from ..errors import UserError
from . import checkpoint


def read_state(path: Path, cfg: Any, teacher: str | None) -> dict[str, Any]:
    """Read a trainer's checkpoint; UserError if it was written under another config or with another teacher.

    teacher: the fingerprint of the teacher's weights, None without one.
    """
    state = checkpoint.load(path, "--resume")
    if not isinstance(state, dict) or "config" not in state:
        raise UserError(f"{path}: --resume needs a checkpoint that this trainer wrote")
    now, before = config.flatten(cfg), state["config"]
    # of keys that are newer than the checkpoint
    defaults = {key.path: key.default for key in config.all_keys()}
    sections = {key.split(".")[0] for key in now}
    for key in sorted(now.keys() | before.keys()):
        if key not in now and (key.split(".")[0] not in sections or key.startswith("SOLVER.DECOUPLED.DELTA.")):
            continue  # an extension's that this method has no use of, or it would be there
        if key in config.REMOVED:
            continue
        was, value = before.get(key, defaults.get(key)), now.get(key)
        if config.computes(key) and was != value:
            raise UserError(f"{path}: --resume needs the run's own config: {key} was {was!r}, is {value!r}")
    if state["teacher"] != teacher:
        raise UserError(
            f"{path}: --resume needs the run's own teacher: its weights had the fingerprint {state['teacher']}, "
            f"those of DISTILLER.TEACHER_WEIGHTS have {teacher}"
        )
    return state
