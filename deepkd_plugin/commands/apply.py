"""`deepkd apply`: the plugin in a checkout of mdistiller, and out of it again.

mdistiller's tools/train.py and tools/eval.py import all they use at the top, so one import above that is
enough. Its detection/train_net.py hands over to our launcher before it imports anything. What goes in is read from
patches/, which `git apply --unidiff-zero` takes too.
"""

import contextlib
import hashlib
import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ..config.shipped import shipped
from ..errors import UserError
from ..run import checkpoint
from ..terminal import Parser, spoken

# sha256 of mdistiller's own files, with \n line endings, and the commit that each came with
KNOWN = {
    "tools/train.py": {
        "ade0506fd51f61154d0c7418ddf7c113415ffcbe95c0036c028d1fe88658fdf3": "a08d46f",  # November 2023, the last
        "f4768095e958d1508d7da586df5685cce779a79abc3c7b26423b065418740212": "e8c5bb3",  # March 2022, the first
    },
    "tools/eval.py": {
        "f2b2ba458793cfc433f30e0c64771e453f6d6323a84a95fbe97ec3126a4978ce": "a08d46f",
        "9c1d8f40c49fbe0371e14a2a29c59cfccd3a24e83e2f8a30da532d1465d1ec27": "e8c5bb3",
    },
    "detection/train_net.py": {
        "7b0912ac813277530f88af38e1764d1141cd49dc5487af80e412a74f17c53762": "a08d46f"  # and e8c5bb3
    },
}
DETECTION = "detection/train_net.py"
"""The one script that a checkout may lack."""

DETECTORS = "detection/configs/DeepKD"
"""Where the folder detectron2/ of our configs goes; detection/ is for our own host, and the others go to configs/."""

UNKNOWN = "not a version that this command knows"
"""The state of a script that is neither mdistiller's nor has our lines."""

IMPORT = re.compile(rb"^\s*(?:import|from)\s+deepkd_plugin\b", re.MULTILINE)
FIRST_RUN = "configs/glyphs100/res20_res8/deepkd.yaml"
"""A config that trains as it stands: its images are drawn, and its teacher ships."""
FIRST_DETECTOR = "DeepKD-R18-R101.yaml"


@dataclass(frozen=True)
class File:
    """A script of KNOWN in a checkout, or the place of one of our configs there. A content of None is no file."""

    name: str
    path: Path
    state: str
    now: bytes | None
    put_in: bytes
    """The content that `apply` leaves."""
    taken_out: bytes | None
    """The content that `revert` leaves."""


def main(words: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    parser = Parser(
        "deepkd apply",
        description="Put the plugin into a checkout of mdistiller: two lines on top of tools/train.py and of "
        "tools/eval.py, and the plugin's configs beside mdistiller's own. All or nothing.",
        examples=("../mdistiller", "../mdistiller --check", "../mdistiller --revert"),
    )
    parser.add_argument("path", metavar="PATH", type=Path, help="the checkout's root folder")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--check", action="store_true", help="change nothing; exit 0: in place, 1: not yet, 2: cannot be")
    how.add_argument("--revert", action="store_true", help="take out what apply put in")
    args = parser.parse(words)
    if args.check:
        return check(args.path)
    if args.revert:
        revert(args.path)
    else:
        apply(args.path)
    return 0


def apply(root: Path) -> None:
    """Put the plugin in, all scripts and all configs or nothing, and print what was done.

    Raises UserError, with the checkout unchanged, if `root` is no checkout, a script is not a
    version of mdistiller, or a file cannot be written.
    """
    scripts, configs = _survey(root)
    _refuse_unknown(scripts)
    _refuse_links(root, configs)
    changed = _change(root, [*configs, *scripts], lambda file: file.put_in)
    _print_changed(root, changed, "patched", "copied to")
    if not changed:
        print(f"{root} has the plugin in place already")
    _print_kept(configs)
    runs = sorted(config.name for config in configs if config.path.name == "deepkd.yaml")
    if runs:
        run = FIRST_RUN if FIRST_RUN in runs else runs[0]
        print(f"next      cd {shlex.quote(str(root))} && python tools/train.py --cfg {run}")
    if any(config.path.name == FIRST_DETECTOR for config in configs):
        command = f"python {DETECTION} --config-file configs/DeepKD/{FIRST_DETECTOR} --num-gpus 4"
        print(f"detection cd {shlex.quote(str(root))} && {command} (needs detectron2 and COCO)")
    print(f"undo      {shlex.join([*spoken('deepkd apply'), str(root), '--revert'])}")


def check(root: Path) -> int:
    """Print what is in place and change nothing. Returns 0 if all is, 1 if `apply` would put it there.

    Raises UserError, after printing, if `apply` would.
    """
    scripts, configs = _survey(root)
    for script in scripts:
        print(f"{script.name:<24}{script.state}")
    counts = Counter(config.state for config in configs)
    print(f"{'configs':<24}{counts['in place']} in place, {counts['not yet']} not yet")
    _print_kept(configs)
    _refuse_unknown(scripts)
    _refuse_links(root, configs)
    return int(any(file.now != file.put_in for file in (*scripts, *configs)))


def revert(root: Path) -> None:
    """Take out our lines and those configs that are as we ship them, and print what was done.

    What else was edited in the scripts stays. Raises UserError, with the checkout unchanged, if `root` is
    no checkout, a script imports the plugin elsewhere than on top, or a file cannot be written.
    """
    scripts, configs = _survey(root)
    for script in scripts:
        if IMPORT.search(script.taken_out):
            raise UserError(
                f"{script.path}: imports the plugin elsewhere than on top; that line must be taken out by hand, "
                f"and nothing was changed"
            )
    changed = _change(root, [*scripts, *configs], lambda file: file.taken_out)
    for config in configs:  # an `apply` that was killed may have made folders and put nothing in them
        _remove_empty(root, config.path)
    _print_changed(root, changed, "reverted", "removed from")
    if not changed:
        print(f"{root} has nothing of the plugin to take out")
    left = [config for config in configs if config.taken_out is not None]
    if left:
        print(f"left {_count(left)} not as the plugin ships them, or behind a link: {_names(left)}")


def _survey(root: Path) -> tuple[list[File], list[File]]:
    """Read the scripts and the configs that the commands look at or change. UserError if `root` is no checkout."""
    try:
        detection = (root / DETECTION).is_file()
        names = [name for name in KNOWN if detection or name != DETECTION]
        for name in (*names, "mdistiller/__init__.py"):
            if not (root / name).is_file():
                raise UserError(f"{root}: has no {name}; PATH must be the root folder of a checkout of mdistiller")
        folder = shipped("configs")
        if (root / "configs").resolve() == folder.resolve():
            raise UserError(f"{root}: its configs/ are the plugin's own; PATH must be a checkout of mdistiller")
        scripts = [_script(root, name) for name in names]
        places = [(file, _place(file.relative_to(folder), detection)) for file in sorted(folder.rglob("*.yaml"))]
        configs = [_config(root, name, file.read_bytes()) for file, name in places if name is not None]
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); nothing was changed") from None
    except RuntimeError as error:  # pathlib's for links that go in a circle
        raise UserError(f"{root}: cannot be read ({error}); nothing was changed") from None
    return scripts, configs


def _script(root: Path, name: str) -> File:
    """Read a script. Its rest is what is below our lines, which git apply puts there as often as it is told to."""
    now, lines = (root / name).read_bytes(), _lines_of_patch(name)
    rest = now
    while _plain(rest).startswith(lines):
        rest = rest.split(b"\n", lines.count(b"\n"))[-1]
    commit = KNOWN[name].get(hashlib.sha256(_plain(rest)).hexdigest())
    if rest != now:
        text = f"mdistiller {commit}" if commit else "otherwise an edited file"
        return File(name, root / name, f"in place ({text})", now, now, rest)
    state = f"not yet (mdistiller {commit})" if commit else UNKNOWN
    put_in = (lines.replace(b"\n", b"\r\n") if b"\r\n" in rest else lines) + rest
    return File(name, root / name, state, now, put_in, rest)


def _config(root: Path, name: str, ours: bytes) -> File:
    """Read what is in the place of one of our configs. A file that is there stays, unless it is ours."""
    path = root / name
    if not os.path.lexists(path):
        return File(name, path, "not yet", None, ours, None)
    now = path.read_bytes()
    # what is reached over a symbolic link may be somebody's only copy
    linked = path.is_symlink() or _link_above(root, name) is not None
    in_place = now == ours
    return File(name, path, "in place" if in_place else "kept", now, now, None if in_place and not linked else now)


def _link_above(root: Path, name: str) -> Path | None:
    """Find the first symbolic link among the folders of a checkout that a file of it would be in; None without one."""
    above = [root / parent for parent in reversed(Path(name).parents[:-1])]
    return next((folder for folder in above if folder.is_symlink()), None)


def _place(file: Path, detection: bool) -> str | None:
    """Name the place of one of our configs in a checkout, None if it is not for one. file: relative to configs/."""
    top, _, rest = file.as_posix().partition("/")
    if top == "detectron2":
        return f"{DETECTORS}/{rest}" if detection else None
    return None if top == "detection" else f"configs/{file.as_posix()}"


def _lines_of_patch(script: str) -> bytes:
    """Return what the patch of a script puts on top of it, in lines that end in LF."""
    text = (shipped("patches") / f"{Path(script).stem}.patch").read_text(encoding="utf-8")
    added = [line[1:] for line in text.splitlines() if line.startswith("+") and not line.startswith("+++")]
    return "".join(f"{line}\n" for line in added).encode()


def _refuse_unknown(scripts: Iterable[File]) -> None:
    unknown = [script for script in scripts if script.state == UNKNOWN]
    if not unknown:
        return
    if unknown[0].name == DETECTION:
        by_hand = f"the lines of {shipped('patches') / 'train_net.patch'} on top by hand"
    else:
        lines = _lines_of_patch(unknown[0].name).decode().splitlines()
        by_hand = f"these two lines on top by hand: {' and '.join(f'`{line}`' for line in lines)}"
    raise UserError(
        f"{' and '.join(str(script.path) for script in unknown)}: not a version of mdistiller that this "
        f"command knows, and nothing was changed; put {by_hand}, then run it again"
    )


def _refuse_links(root: Path, configs: Iterable[File]) -> None:
    for config in configs:
        link = _link_above(root, config.name) if config.now is None else None
        if link is not None:
            raise UserError(
                f"{link}: is a link, and nothing was changed; the configs go into the checkout alone, so it must be a "
                f"folder of its own"
            )


def _change(root: Path, files: Sequence[File], after: Callable[[File], bytes | None]) -> list[File]:
    """Give all files the content that `after` says, or none of them; returns those that this changed."""
    changed = [file for file in files if after(file) != file.now]
    begun: list[File] = []
    with checkpoint.uninterrupted():
        try:
            _remove_temporaries(files)
            for file in changed:
                begun.append(file)
                _put(root, file.path, after(file))
        except BaseException as error:
            for file in reversed(begun):
                _put(root, file.path, file.now)
            if not isinstance(error, OSError):
                raise
            where = begun[-1].path if begun else error.filename
            raise UserError(f"{where}: cannot be changed ({error.strerror}); nothing was changed") from None
    return changed


def _put(root: Path, path: Path, content: bytes | None) -> None:
    """Give a file a content, keeping its mode; or remove it, and the folders that are empty then."""
    if content is None:
        if path.exists():
            path.unlink()
        _remove_empty(root, path)
        return
    path = path.resolve()  # a link stays a link
    if path.is_file() and path.read_bytes() == content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    mode = path.stat().st_mode if path.exists() else None

    def write(file: IO[bytes]) -> None:
        file.write(content)
        if mode is not None:
            os.chmod(file.name, mode)

    checkpoint.write_whole(path, write)


def _remove_empty(root: Path, path: Path) -> None:
    """Remove the folders above a file of a checkout that are empty."""
    for folder in path.relative_to(root).parents[:-1]:
        with contextlib.suppress(OSError):  # not empty
            (root / folder).rmdir()


def _remove_temporaries(files: Sequence[File]) -> None:
    """Remove what killed calls of this command left of the files that they were writing."""
    meant = {file.path.resolve() for file in files}
    for folder in {path.parent for path in meant}:
        for path, name, writer in checkpoint.temporaries(folder):
            if folder / name in meant and not checkpoint.is_running(writer):
                path.unlink()


def _print_changed(root: Path, changed: Sequence[File], done: str, moved: str) -> None:
    scripts = [file for file in changed if file.name in KNOWN]
    if scripts:
        print(f"{done:<10}{_names(scripts)}")
    for folder in ("configs", DETECTORS):
        configs = [file for file in changed if file.name.startswith(f"{folder}/")]
        if configs:
            print(f"configs   {_count(configs)} {moved} {root / folder}")


def _print_kept(configs: Iterable[File]) -> None:
    kept = [config for config in configs if config.state == "kept"]
    if kept:
        print(f"kept {_count(kept)} that were there: {_names(kept)}")


def _count(files: Sequence[File]) -> str:
    return f"{len(files)} file{'' if len(files) == 1 else 's'}"


def _names(files: Sequence[File]) -> str:
    more = f" and {len(files) - 3} more" if len(files) > 3 else ""
    return ", ".join(file.name for file in files[:3]) + more


def _plain(content: bytes) -> bytes:
    return content.replace(b"\r\n", b"\n")
