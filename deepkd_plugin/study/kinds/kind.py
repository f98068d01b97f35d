"""What a kind of table must say of its runs, so that planning and starting them is the same for all kinds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..measures import MEASURES, Measures

if TYPE_CHECKING:
    from ..table import Run
from ..table import Cell

Timer = Callable[[str, Any], float]
"""(pair, config) -> seconds of a run, by timing its networks here. Raises RuntimeError where that fails."""


class Kind(ABC):
    """A kind of table. Configs are whatever `read` returns; only the kind looks into them.

    name: in table.json, and a key of MEASURES. tool: the script that a user would start for one run. checkpoint: the
    file of a run's folder that says that it can be gone on with. ours: config keys that the plan sets itself, and what
    to use instead.
    """

    name: ClassVar[str]
    tool: ClassVar[str]
    checkpoint: ClassVar[str]
    ours: ClassVar[Mapping[str, str]]

    @property
    def measures(self) -> Measures:
        return MEASURES[self.name]

    def require(self) -> None:  # noqa: B027 (most kinds need nothing)
        """Raise UserError where something is not installed without which no run can be planned."""

    @abstractmethod
    def place(self, table: str) -> str:
        """Where a table's configs lie, in words."""

    @abstractmethod
    def pairs(self, table: str) -> list[str]:
        """The pairs that may have configs for a table."""

    @abstractmethod
    def file(self, table: str, pair: str, config: str) -> Path | None:
        """The config file `config` (a Method's) of a pair; None where the pair has none."""

    @abstractmethod
    def shown(self, file: Path) -> str:
        """A config file's name in table.json."""

    @abstractmethod
    def read(self, file: Path, options: Sequence[str]) -> Any:
        """The checked config of a file and KEY, VALUE, …; UserError for a wrong one."""

    @abstractmethod
    def hash(self, cfg: Any, seed: int | None = None) -> str:
        """The config_hash that a run of it will have; seed: instead of the config's own."""

    @abstractmethod
    def own_options(self, seed: int, above: Path, method: str, name: str) -> tuple[str, ...]:
        """KEY, VALUE, … for the keys `ours`, such that the run's folder is above/method/name."""

    @abstractmethod
    def lines(self, cfg: Any) -> int:
        """How many lines metrics.jsonl has when a run is finished."""

    @abstractmethod
    def networks(self, pair: str, cfgs: Sequence[Any]) -> tuple[str, str]:
        """The names of a pair's teacher ("" without one) and student, for the report."""

    @abstractmethod
    def protocol(self, cfg: Any) -> str:
        """How long a run trains, in words."""

    @abstractmethod
    def problems(self, runs: Sequence[tuple[Run, Any]], prepare: bool) -> list[str]:
        """What would stop these runs, with their configs: a line each.

        prepare: also draw or fetch a data set, once, before several processes would.
        """

    @abstractmethod
    def timer(self, cfgs: Mapping[Cell, Any], threads: int) -> Timer | None:
        """How a run's time is found before any is finished; None where it cannot be."""

    @abstractmethod
    def words(self, file: str, resume: bool, options: Sequence[str]) -> list[str]:
        """The command line that trains a run, without the tool: anew, over what is there, or going on."""

    @abstractmethod
    def train(self, file: str, resume: bool, options: Sequence[str]) -> int:
        """Train a run in this process; returns the exit code."""

    def unfit(self, cfg: Any) -> str:
        """What would stop a run of a config only once it has begun; "" where nothing is known to."""
        return ""

    def teachers(self, cfgs: Mapping[Cell, Any]) -> dict[Cell, str | None]:
        """The fingerprints of these configs' teachers; None without one, and where it is not known before a run."""
        return dict.fromkeys(cfgs)
