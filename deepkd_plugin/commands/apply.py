"""`deepkd apply`: the plugin in a checkout of mdistiller, and out of it again.

mdistiller's tools/train.py and tools/eval.py import all they use at the top, so one import above that is
enough. Its detection/train_net.py hands over to our launcher before it imports anything. What goes in is read from
patches/, which `git apply --unidiff-zero` takes too.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ..config.shipped import shipped
from ..errors import UserError
from ..run import checkpoint
from ..terminal import Parser

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
        "7b0912ac813277530f88af38e1764d1141cd49dc5487af80e412a74f17c53762": "a08d46f",  # and e8c5bb3
    },
}
DETECTION = "detection/train_net.py"
"""The one script that a checkout may lack."""

PLACES = {"detectron2": "detection/configs/DeepKD", "detection": None}
"""Where a folder of our configs/ goes, if not to configs/: None is nowhere, for our own detection host."""
IMPORT = re.compile(rb"^\s*(?:import|from)\s+deepkd_plugin\b", re.MULTILINE)
FIRST_RUN = "configs/imagenet/r34_r18/deepkd.yaml"
FIRST_DETECTOR = "DeepKD-R18-R101.yaml"


@dataclass(frozen=True)
class Script:
    """A script of KNOWN in a checkout."""

    name: str
    path: Path
    content: bytes
    lines: bytes  # what the patch puts on top, with \n line endings

    @property
    def patched(self) -> bool:
        return _plain(self.content).startswith(self.lines)

    @property
    def rest(self) -> bytes:
        """The content without our lines, which git apply puts there as often as it is told to."""
        rest = self.content
        while _plain(rest).startswith(self.lines):
            rest = rest.split(b"\n", self.lines.count(b"\n"))[-1]
        return rest

    @property
    def commit(self) -> str | None:
        """The commit of mdistiller that the rest is a file of; None for any other text."""
        return KNOWN[self.name].get(hashlib.sha256(_plain(self.rest)).hexdigest())

    @property
    def with_lines(self) -> bytes:
        crlf = b"\r\n" in self.rest
        return (self.lines.replace(b"\n", b"\r\n") if crlf else self.lines) + self.rest

    @property
    def state(self) -> str:
        text = f"mdistiller {self.commit}" if self.commit else "otherwise an edited file"
        if self.patched:
            return f"in place ({text})"
        return f"not yet ({text})" if self.commit else "not a version that this command knows"


@dataclass(frozen=True)
class Config:
    """One of our config files, and where a checkout has it."""

    name: str
    path: Path
    ours: bytes
    theirs: bytes | None  # None if there is no such file
    linked: bool  # reached over a symbolic link: what is there may be somebody's only copy

    @property
    def in_place(self) -> bool:
        return self.theirs == self.ours


@dataclass(frozen=True)
class Change:
    """A file's content before and after; None for no file."""

    path: Path
    before: bytes | None
    after: bytes | None


def main(words: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    parser = Parser(
        "deepkd apply",
        description="Put the plugin into a checkout of mdistiller: two lines on top of tools/train.py and of "
        "tools/eval.py, and the plugin's configs beside mdistiller's own. All or nothing.",
    )
    parser.add_argument("path", metavar="PATH", type=Path, help="the checkout's root folder")
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--check", action="store_true", help="change nothing; exit 0: in place, 1: not yet, 2: cannot be"
    )
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

    Raises UserError, with the checkout unchanged, if `root` is no checkout, a script is not a version of
    mdistiller, or a file cannot be written.
    """
    scripts, configs = _survey(root)
    _refuse_unknown(scripts)
    new_scripts = [script for script in scripts if not script.patched]
    new_configs = [config for config in configs if config.theirs is None]
    _change(
        root,
        [Change(config.path, None, config.ours) for config in new_configs]
        + [Change(script.path, script.content, script.with_lines) for script in new_scripts],
    )
    if new_scripts:
        print(f"patched   {_names(new_scripts)}")
    for folder, group in _by_place(new_configs):
        print(f"configs   {_count(group)} copied to {root / folder}")
    if not new_scripts and not new_configs:
        print(f"{root} has the plugin in place already")
    _print_kept(configs)
    runs = sorted(config.name for config in configs if config.path.name == "deepkd.yaml")
    if runs:
        run = FIRST_RUN if FIRST_RUN in runs else runs[0]
        print(f"next      cd {shlex.quote(str(root))} && python tools/train.py --cfg {run}")
    if any(config.path.name == FIRST_DETECTOR for config in configs):
        print(f"          python {DETECTION} --config-file configs/DeepKD/{FIRST_DETECTOR} --num-gpus 4")
    print(f"undo      deepkd apply {shlex.quote(str(root))} --revert")


def check(root: Path) -> int:
    """Print what is in place and change nothing. Returns 0 when all is, 1 when `apply` would put it there.

    Raises UserError, after printing, if `apply` would.
    """
    scripts, configs = _survey(root)
    for script in scripts:
        print(f"{script.name:<24}{script.state}")
    missing = sum(config.theirs is None for config in configs)
    print(f"{'configs':<24}{sum(c.in_place for c in configs)} in place, {missing} not yet")
    _print_kept(configs)
    _refuse_unknown(scripts)
    return 0 if missing == 0 and all(script.patched for script in scripts) else 1


def revert(root: Path) -> None:
    """Take out our lines and those configs that are as we ship them, and print what was done.

    What else was edited in the scripts stays. Raises UserError, with the checkout unchanged, if `root`
    is no checkout, a script imports the plugin elsewhere than on top, or a file cannot be written.
    """
    scripts, configs = _survey(root)
    for script in scripts:
        if IMPORT.search(script.rest):
            raise UserError(
                f"{script.path}: imports the plugin elsewhere than on top; that line must be taken out by hand, "
                f"and nothing was changed"
            )
    old_scripts = [script for script in scripts if script.patched]
    old_configs = [config for config in configs if config.in_place and not config.linked]
    _change(
        root,
        [Change(script.path, script.content, script.rest) for script in old_scripts]
        + [Change(config.path, config.theirs, None) for config in old_configs],
    )
    if old_scripts:
        print(f"reverted  {_names(old_scripts)}")
    for folder, group in _by_place(old_configs):
        print(f"configs   {_count(group)} removed from {root / folder}")
    if not old_scripts and not old_configs:
        print(f"{root} has nothing of the plugin to take out")
    left = [config for config in configs if config.theirs is not None and config not in old_configs]
    if left:
        print(f"left {_count(left)} not as the plugin ships them, or behind a link: {_names(left)}")


def _survey(root: Path) -> tuple[list[Script], list[Config]]:
    """Read everything that the commands look at or change. UserError if `root` is no checkout."""
    detection = (root / DETECTION).is_file()
    names = [name for name in KNOWN if detection or name != DETECTION]
    for name in (*names, "mdistiller/__init__.py"):
        if not (root / name).is_file():
            raise UserError(
                f"{root}: has no {name}; PATH must be the root folder of a checkout of mdistiller"
            )
    folder = shipped("configs")
    if (root / "configs").resolve() == folder.resolve():
        raise UserError(f"{root}: its configs/ are the plugin's own; PATH must be a checkout of mdistiller")
    try:
        scripts = [
            Script(name, root / name, (root / name).read_bytes(), _lines_of_patch(Path(name).stem))
            for name in names
        ]
        configs = []
        for file in sorted(folder.rglob("*.yaml")):
            name = _place(file.relative_to(folder), detection)
            if name is None:
                continue
            path = root / name
            theirs = path.read_bytes() if os.path.lexists(path) else None
            linked = path.resolve() != root.resolve() / name
            configs.append(Config(name, path, file.read_bytes(), theirs, linked))
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); nothing was changed") from None
    return scripts, configs


def _place(file: Path, detection: bool) -> str | None:
    """Name the place of one of our configs in a checkout, None if it is not for one. file: relative to configs/."""
    top = file.parts[0]
    if top not in PLACES:
        return f"configs/{file.as_posix()}"
    place = PLACES[top]
    return f"{place}/{file.relative_to(top).as_posix()}" if place and detection else None


def _by_place(configs: Iterable[Config]) -> list[tuple[str, list[Config]]]:
    """Group configs by the folder that they go to."""
    places = ("configs", *(place for place in PLACES.values() if place))
    groups = [(place, [c for c in configs if c.name.startswith(f"{place}/")]) for place in places]
    return [(place, group) for place, group in groups if group]


def _lines_of_patch(tool: str) -> bytes:
    text = (shipped("patches") / f"{tool}.patch").read_text(encoding="utf-8")
    return "".join(
        f"{line[1:]}\n" for line in text.splitlines() if line.startswith("+") and not line.startswith("+++")
    ).encode()


def _refuse_unknown(scripts: Iterable[Script]) -> None:
    unknown = [script for script in scripts if not script.patched and script.commit is None]
    if unknown:
        lines = " and ".join(f"`{line}`" for line in unknown[0].lines.decode().splitlines())
        by_hand = (
            f"these two lines on top by hand: {lines}"
            if unknown[0].name != DETECTION
            else f"the lines of {shipped('patches') / 'train_net.patch'} on top by hand"
        )
        raise UserError(
            f"{' and '.join(str(script.path) for script in unknown)}: not a version of mdistiller that this "
            f"command knows, and nothing was changed; put {by_hand}, then run it again"
        )


def _change(root: Path, changes: Sequence[Change]) -> None:
    """Make all changes or none."""
    begun: list[Change] = []
    with checkpoint.uninterrupted():
        try:
            for change in changes:
                begun.append(change)
                _put(root, change.path, change.after)
        except BaseException as error:
            for change in reversed(begun):
                _put(root, change.path, change.before)
            if not isinstance(error, OSError):
                raise
            raise UserError(
                f"{begun[-1].path}: cannot be changed ({error.strerror}); nothing was changed"
            ) from None


def _put(root: Path, path: Path, content: bytes | None) -> None:
    """Give a file a content, keeping its mode; or remove it, and the folders that are empty then."""
    if content is None:
        if path.exists():
            path.unlink()
        for folder in path.relative_to(root).parents[:-1]:
            with contextlib.suppress(OSError):  # not empty
                (root / folder).rmdir()
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


def _print_kept(configs: Iterable[Config]) -> None:
    kept = [config for config in configs if config.theirs is not None and not config.in_place]
    if kept:
        print(f"kept {_count(kept)} that were there: {_names(kept)}")


def _count(files: Sequence[Config]) -> str:
    return f"{len(files)} file{'' if len(files) == 1 else 's'}"


def _names(files: Sequence[Script] | Sequence[Config]) -> str:
    more = f" and {len(files) - 3} more" if len(files) > 3 else ""
    return ", ".join(file.name for file in files[:3]) + more


def _plain(content: bytes) -> bytes:
    return content.replace(b"\r\n", b"\n")
