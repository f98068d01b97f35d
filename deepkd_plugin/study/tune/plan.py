"""A search as it was asked for: its configs, what is searched of them, and the runs of a trial."""

from __future__ import annotations

import contextlib
import io
import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf
from pathlib import Path
from typing import Any

from ... import data, device, extensions
from ...errors import UserError, shown
from ...run import record
from ...run.checkpoint import write_text
from ..kinds import KINDS
from ..measures import CLASSIFICATION
from ..reproduce.estimate import total_seconds
from ..reproduce.tables import TEACHER, choose
from ..shared import cores, count, duration, threads
from ..table import Run
from .search import Search
from .space import Space, spaces

FILE = "search.json"
"""What is searched, in the search's folder."""

HOLDOUT, SHARE = "DATASET.HOLDOUT", 0.2
"""The key that keeps test images out, and its value if neither the config nor the command line has one."""

KIND = KINDS[CLASSIFICATION]


@dataclass(frozen=True)
class Request:
    """What was asked for; `command` is the line that asked. files: configs, or one folder of them."""

    files: Sequence[Path]
    command: str
    budget: int = 20
    methods: Sequence[str] | None = None
    seeds: int = 1
    jobs: int | None = None
    rates: Sequence[float] | None = None
    out: Path | None = None
    options: Sequence[str] = ()
    dry_run: bool = False


class Tuning:
    """A request that holds together, and what follows from it. Nothing is written. Raises UserError."""

    def __init__(self, request: Request) -> None:
        extensions.load()  # users' own methods
        self.request = request
        self.files = _files(request)
        first = next(iter(self.files.values()))
        self.pair = first.absolute().parent.name
        self.out = request.out or Path("output/tune") / self.pair
        self.jobs = request.jobs or device.count() or 1
        self.given = dict(zip(request.options[::2], request.options[1::2]))
        _check_options(request)
        self.options = {name: self._options(file) for name, file in self.files.items()}
        cfgs = {name: KIND.read(file, self.options[name]) for name, file in self.files.items()}
        sets = {cfg.DATASET.TYPE for cfg in cfgs.values()}
        if len(sets) > 1:
            raise UserError(
                f"command line: --cfg names configs of {' and '.join(sorted(sets))}; it must be one data set"
            )
        for cfg in cfgs.values():
            KIND.check(cfg)
        self.before = _read(self.out)
        self.cfgs = self._settled(cfgs)
        self.spaces = spaces(self.cfgs, self.given, request.rates)

    def _options(self, file: Path) -> list[str]:
        """Return the options of every run of a config, with a share that is held out."""
        cfg = KIND.read(file, self.request.options)
        if not cfg.DATASET.HOLDOUT:
            if HOLDOUT in self.given:
                raise UserError(
                    f"command line: {HOLDOUT} is {self.given[HOLDOUT]}; it must be above 0, because no choice is made "
                    f"on test images"
                )
            return [*self.request.options, HOLDOUT, str(SHARE)]
        return list(self.request.options)

    def _settled(self, cfgs: Mapping[str, Any]) -> dict[str, Any]:
        """Settle what configs leave to a measurement, as an earlier call did, and add it to the options."""
        cells = {(self.pair, name): cfg for name, cfg in cfgs.items()}
        earlier = self.before.get("settled") or {}
        before = {(self.pair, name): {k: str(v) for k, v in values.items()} for name, values in earlier.items()}
        self.settled = {
            name: values for (_, name), values in KIND.settle(cells, before, threads(self.jobs, cores())).items()
        }
        for name, values in self.settled.items():
            self.options[name] += [word for key, value in values.items() for word in (key, str(value))]
        return {name: KIND.read(self.files[name], words) for name, words in self.options.items()}

    @cached_property
    def teachers(self) -> dict[str, str | None]:
        """The fingerprint of each method's teacher."""
        found = KIND.teachers({(self.pair, name): cfg for name, cfg in self.cfgs.items()})
        return {name: fingerprint for (_, name), fingerprint in found.items()}

    @cached_property
    def document(self) -> dict[str, Any]:
        """What search.json holds: all that trials of one search have in common."""
        return {
            "configs": {name: file.absolute().as_posix() for name, file in self.files.items()},
            "hashes": {name: KIND.hash(cfg) for name, cfg in self.cfgs.items()},
            "settled": self.settled,
            "seeds": self.request.seeds,
            "spaces": {name: _describe(space) for name, space in self.spaces.items()},
            "teachers": self.teachers,
            "code": record.code_hash(),
        }

    def write(self) -> None:
        """Write search.json; UserError if the folder cannot be written."""
        try:
            write_text(self.out / FILE, json.dumps(self.document, indent=1, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(f"{self.out}: --out must be a folder that can be written ({error.strerror})") from None

    def check_before(self) -> None:
        """Raise UserError if the folder holds another search's trials."""
        for key, now in self.document.items() if self.before else ():
            if key == "configs":  # their hashes say what is in them
                continue
            then = self.before.get(key, now)
            if json.dumps(then) != json.dumps(now):
                raise UserError(
                    f"{self.out}: holds a search with other {key} ({shown(then)}; now {shown(now)}), and trials of two "
                    f"must not be compared; give another --out"
                )

    def runs(self, search: Search, number: int, words: Sequence[str]) -> list[Run]:
        """Make the runs of a trial, one for each seed."""
        name = search.method
        file, options = self.files[name].absolute(), [*self.options[name], *words]
        # nobody wrote a trial's values, and those at a range's end may well deserve a warning; the run's log has it
        with contextlib.redirect_stderr(io.StringIO()):
            cfg, above = KIND.read(file, options), self.out.absolute() / "runs"
        made = []
        for seed in range(self.request.seeds):
            hash_ = KIND.hash(cfg, seed)
            folder = f"trial{number:03d}-seed{seed}-{hash_[:8]}"
            given = (*options, *KIND.own_options(seed, above, name, folder))
            run = Run(f"trial {number}", name, seed, file, given, hash_, KIND.lines(cfg), above / name / folder)
            made.append(Run(**vars(run) | {"teacher": self.teachers[name]}))
        return made

    def problems(self, prepare: bool) -> list[str]:
        """Say what would stop the runs, a line each."""
        runs = [
            (Run(self.pair, name, 0, self.files[name], (), "", 0, self.out), cfg) for name, cfg in self.cfgs.items()
        ]
        return KIND.problems(runs, prepare)

    def describe(self) -> str:
        """Put the plan into words."""
        seeds, methods = self.request.seeds, len(self.files)
        trials = f"{count(methods, 'method')} × {count(self.request.budget, 'trial')} × {count(seeds, 'seed')}"
        cfg = next(iter(self.cfgs.values()))
        train, tested = data.source(cfg).images(cfg)
        lines = {
            "tune": f"{self.pair} on {cfg.DATASET.TYPE}: {trials}, {self.jobs} at a time",
            "images": f"{train} to train on, {tested} held out of the training images; no test image is read",
        }
        lines |= {name: KIND.protocol(cfg) + "; " + _words(self.spaces[name]) for name, cfg in self.cfgs.items()}
        lines |= {"time": self._time(), "folder": str(self.out)}
        width = max(map(len, lines)) + 2
        return "\n".join(
            textwrap.fill(text, 110, initial_indent=f"{name:<{width}}", subsequent_indent=" " * width)
            for name, text in lines.items()
        )

    def _time(self) -> str:
        """Say how long the search takes if nothing is pruned."""
        each, runs = threads(self.jobs, cores()), self.request.budget * self.request.seeds
        turns = self.jobs / device.count() if device.count() else self.jobs * each / cores()
        try:
            seconds = KIND.seconds(list(self.cfgs.values()), each, [runs] * len(self.cfgs))
        except Exception as error:  # as in reproduce/estimate.py: a GPU that others use, a method that takes no noise
            return f"not known: timing failed ({(str(error) or type(error).__name__).splitlines()[0]})"
        finally:
            device.release()
        total = total_seconds([one * max(1.0, turns) for one in seconds for _ in range(runs)], self.jobs)
        return f"at most about {duration(total)}, an estimate; trials that are pruned take less"


def _files(request: Request) -> dict[str, Path]:
    """Find the config of each method, by its name: files, or those in a folder but for its teacher's."""
    files = list(request.files)
    if len(files) == 1 and files[0].is_dir():
        files = sorted(path for path in files[0].glob("*.yaml") if path.stem != TEACHER)
        if not files:
            raise UserError(
                f"command line: --cfg is {request.files[0]}; it must hold configs METHOD.yaml, and has none"
            )
    named: dict[str, Path] = {}
    for file in files:
        if file.stem in named:
            raise UserError(
                f"command line: --cfg names {named[file.stem]} and {file}; each must have a name of its own"
            )
        named[file.stem] = file
    return {name: named[name] for name in choose(request.methods, list(named), "--methods")}


def _check_options(request: Request) -> None:
    instead = {"SOLVER.SEED": "--seeds N"} | dict.fromkeys(list(KIND.ours)[1:], "--out DIR")
    for key in request.options[::2]:
        if key in instead:
            raise UserError(f"command line: {key} is set for each run by the search; use {instead[key]} instead")
    if (rates := request.rates) is not None and not (len(rates) == 2 and 0 < rates[0] < rates[1] < inf):
        words = " ".join(f"{rate:g}" for rate in rates)
        raise UserError(f"command line: --rates is {words}; it must be two numbers above 0, the lower end first")
    if request.rates is not None and "SOLVER.LR" in request.options[::2]:
        raise UserError(
            "command line: --rates is a range to search, and SOLVER.LR a value that stays; give one of them"
        )


def _describe(space: Space) -> dict[str, Any]:
    """Return a space as search.json has it."""
    return {"ranges": {name: vars(range_) for name, range_ in space.ranges.items()}, "masks": space.masks}


def _words(space: Space) -> str:
    """Put a space into words."""
    parts = [f"{r.label} {r.low:.3g} to {r.high:.3g}" for r in space.ranges.values() if not r.mask]
    parts += [f"mask {', '.join(space.masks)}"] if space.masks else []
    parts += [f"{r.label} {r.low:.3g} to {r.high:.3g}" for r in space.ranges.values() if r.mask]
    return "; ".join(parts)


def _read(out: Path) -> dict[str, Any]:
    """Read a folder's search.json; {} without one, UserError for something else."""
    path = out / FILE
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        for values in content["settled"].values():
            for value in values.values():
                if not isinstance(value, bool):
                    raise ValueError(f"settled has {shown(value)}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: must be what a search wrote ({error}); give another --out") from None
    return content
