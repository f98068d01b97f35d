"""`deepkd cache`: the tables of teacher logits that runs with DISTILLER.TEACHER_LOGITS table or stored share."""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..config.shipped import find_config
from ..distributed.environment import process_share
from ..errors import UserError
from ..terminal import Parser

DEFAULT = Path("data/teacher_logits")


def main(words: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    parser = Parser(
        "deepkd cache",
        description="List the tables of teacher logits, fill one with all its views of all images (in several "
        "processes under torchrun), look for damage, or delete them. PATH is a table, or a folder of tables.",
        examples=(
            "list",
            "fill --cfg glyphs100/res20_res8/deepkd",
            "delete data/teacher_logits --yes",
        ),
    )
    parser.add_argument("action", choices=("list", "fill", "check", "delete"))
    parser.add_argument("paths", metavar="PATH", type=Path, nargs="*", help=f"default of list and check: {DEFAULT}")
    parser.add_argument("--cfg", metavar="FILE", help="with fill: the config of a run that will use the table")
    parser.add_argument("--yes", action="store_true", help="with delete: do not ask")
    parser.add_pairs()
    args = parser.parse(words)
    # a free word may be a path or, behind a key, a value; the parser takes all that are no pair as paths
    if (args.action == "fill") != bool(args.cfg):
        parser.error("--cfg FILE goes with fill")
    if (args.options and not args.cfg) or (args.yes and args.action != "delete"):
        parser.error("KEY VALUE goes with fill, --yes with delete")
    if args.action == "fill":
        if args.paths:
            parser.error("fill takes no PATH; DISTILLER.LOGITS_DIR says where its table is")
        return _fill(find_config(args.cfg), args.options)
    if args.action == "delete":
        if not args.paths:
            parser.error("delete needs PATH")
        return _delete(args.paths, args.yes)
    paths = args.paths or [DEFAULT]
    return _list(paths) if args.action == "list" else _check(paths)


def _list(paths: Iterable[Path]) -> int:
    from ..teacher_logits.tables import describe, files

    for path in (file for one in paths for file in files(one)):
        print(describe(path))
    return 0


def _check(paths: Iterable[Path]) -> int:
    from ..run.progress import EpochBar
    from ..teacher_logits.table import Damaged, Table
    from ..teacher_logits.tables import files

    code = 0
    for path in (file for one in paths for file in files(one)):
        try:
            table = Table.open(path)
        except Damaged as error:
            print(error)
            code = 1
            continue
        with EpochBar(path.name, table.key.count) as bar:
            for count in table.counts():
                if count.all % (100 * table.key.views) == 0:
                    bar.update(count.all // table.key.views, "")
        table.close()
        print(f"{path}: {count.there:,} of {count.all:,} views are there, {count.damaged:,} are damaged")
        if count.damaged:
            print(f"{path}: damaged ones are not used; the runs that need them compute them again")
            code = 1
    return code


def _fill(file: str, options: Sequence[str]) -> int:
    from .. import choice, config, data, device, launch
    from ..hosts.networks import teacher_network
    from ..hosts.registry import find_host
    from ..rules import automatic
    from ..run.checkpoint import fingerprint
    from ..teacher_logits.fill import fill
    from ..teacher_logits.tables import describe

    host = find_host()
    cfg, _ = launch.read_config(host, file, options)
    if cfg.DISTILLER.TEACHER_LOGITS == "compute":
        cfg, _ = launch.read_config(host, file, [*options, "DISTILLER.TEACHER_LOGITS", "table"])
    if cfg.DISTILLER.TYPE == "NONE":
        raise UserError(f"{file}: DISTILLER.TYPE is 'NONE'; it must be a method with a teacher")
    number, processes, local = process_share()
    device.take(local)
    device.tune(cfg.SOLVER.DETERMINISTIC)
    at = device.pick()
    samples = data.get_dataset(cfg)[0].dataset
    code = 0
    for turn, one in enumerate(config.by_teacher(cfg)):
        with config.naming(turn):
            teacher = teacher_network(host, one, data.num_classes(one)).eval().to(at)
        if automatic(one.SOLVER.CHANNELS_LAST):
            images = data.source(one).noise(one.SOLVER.BATCH_SIZE)[0].to(at)
            faster = choice.channels_last(None, teacher, images, one.SOLVER.AMP).value
            one = choice.resolved(one, config.CHANNELS_LAST, faster)
        teacher = device.place(teacher, at, one.SOLVER.CHANNELS_LAST)
        logits = fill(one, teacher, fingerprint(teacher), samples, at, (number, processes))
        if logits.table is None or not logits.table.writable:
            code = 1
        else:
            print(describe(logits.table.path))
    return code


def _delete(paths: Iterable[Path], yes: bool) -> int:
    from ..teacher_logits.table import MAGIC
    from ..teacher_logits.tables import describe, files

    found = [file for one in paths for file in files(one)]
    for path in found:
        with open(path, "rb") as file:
            if file.read(len(MAGIC)) not in (MAGIC, b""):
                raise UserError(f"{path}: is no table of teacher logits, and stays; nothing was deleted")
        print(describe(path))
    if found and not yes:
        if not sys.stdin.isatty():
            raise UserError("command line: delete asks before it does; without a terminal it needs --yes")
        if input(f"delete {len(found)} {'table' if len(found) == 1 else 'tables'}? [y/N] ").strip().lower() != "y":
            print("nothing was deleted")
            return 0
    for path in found:
        path.unlink()
        print(f"{path}: deleted")
    return 0
