"""Base methods under the loss weights of DeepKD over them, as rows of a table: `--matched`.

Such a row has its base's config file, so the base's protocol, and the losses of DeepKD over it with one momentum and no
mask. So momenta and mask are all that DeepKD's gain over it is made of, but for what the two files' protocols differ
in. Over KD and DKD it is the base with other weights. MLKD and CRLD have no weights that would make them DeepKD's: they
keep (1 − p) in NCKD.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from ...config.tree import get
from ...distillers import DeepKD, bases
from ...errors import UserError
from ..kinds import KINDS
from ..measures import DETECTRON2
from .tables import Outline, Row, base_rows, find_config, taken_apart


def with_matched(table: Outline) -> Outline:
    """Put NAME_matched behind each row NAME that DeepKD is put over, and let DeepKD's gains be over it.

    The weights are those of the first row that puts DeepKD over it. Raises UserError for a table without such rows, and
    for one that has a config of the new name.
    """
    if table.over is not None or table.kind is KINDS[DETECTRON2]:
        raise UserError(
            f"command line: --matched is of tables of configs with a base and DeepKD over it; {table.name} must go "
            f"without"
        )
    cfgs = {row.name: cfg for row in table.methods if (cfg := find_config(table, row)) is not None}
    over = {
        name: base
        for name, base in base_rows(table, {("", name): cfg for name, cfg in cfgs.items()}).items()
        if base is not None
    }
    rows: list[Row] = []
    for row in table.methods:
        base = over.get(row.name)
        rows.append(replace(row, base=_name(base)) if base else row)
        if twins := [other for other in table.methods if over.get(other.name) == row.name]:
            label = f"{taken_apart(twins[0], cfgs[twins[0].name])} with DeepKD's loss weights"
            rows.append(Row(_name(row.name), label, row.name, config=row.config, twin=twins[0].config))
    there = {row.name for row in table.methods}
    if not over:
        raise UserError(f"command line: --matched needs DeepKD over a method that has a row; {table.place} has none")
    for base in over.values():
        if _name(base) in there:
            raise UserError(
                f"command line: --matched makes a row {_name(base)}, and {table.place} has a config of that name; it "
                f"must be called otherwise"
            )
    return replace(table, methods=tuple(rows))


def with_bases(table: Outline, methods: Iterable[str]) -> tuple[str, ...]:
    """Add the matched bases of chosen rows to them, in the table's order."""
    asked = set(methods)
    needed = {row.base for row in table.methods if row.name in asked}
    return tuple(row.name for row in table.methods if row.name in asked or (row.twin and row.name in needed))


def options(cfg: Any, twin: Any) -> list[str]:
    """Return the KEY VALUE pairs that make the matched base of the base's config. twin: the config of DeepKD over it.

    Raises UserError if that is over another method.
    """
    if twin.DeepKD.BASE != cfg.DISTILLER.TYPE:
        raise UserError(f"DeepKD.BASE is {twin.DeepKD.BASE!r}; it must be {cfg.DISTILLER.TYPE!r}, the base's method")
    keys = (*DeepKD.config_keys(), *bases()[twin.DeepKD.BASE].config_keys())
    paths = [key.path for key in keys if not key.path.startswith("DeepKD.MASK.")]
    wanted = {path: get(twin, path) for path in paths}
    wanted |= {"DISTILLER.TYPE": DeepKD.name, "DeepKD.MASK.TYPE": "none"}
    wanted |= {f"SOLVER.DECOUPLED.DELTA.{stream}": 0.0 for stream in cfg.SOLVER.DECOUPLED.DELTA}
    return [word for path, value in wanted.items() if get(cfg, path) != value for word in (path, str(value))]


def _name(base: str) -> str:
    return f"{base}_matched"
