"""What a kind of table must say of its runs, so that planning and starting them is the same for all kinds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ...config.tree import set_default
from ...run import record

if TYPE_CHECKING:
    from ..table import Cell, Run


class Kind(ABC):
    """A kind of table. Configs are whatever `read` returns; only the kind looks into them.

    name: in table.json, and a key of MEASURES. tool: the script that a user would start for one run. checkpoint: the
    file of a run's folder that says that it can be gone on with. ours: config keys that the plan sets itself, and what
    to use instead; the seed's is the first. timed: whether `seconds` can tell how long a run takes. several:
    whether several processes can train a run together.
    """

    name: ClassVar[str]
    tool: ClassVar[str]
    checkpoint: ClassVar[str]
    ours: ClassVar[Mapping[str, str]]
    timed: ClassVar[bool] = True
    several: ClassVar[bool] = True

    def require(self) -> None:  # noqa: B027 (most kinds need nothing)
        """Raise UserError if something is not installed without which no run can be planned."""

    @abstractmethod
    def tables(self) -> list[str]:
        """List the names of the tables that come with the package."""

    @abstractmethod
    def place(self, table: str) -> str:
        """Say where a table's configs are."""

    @abstractmethod
    def pairs(self, table: str) -> list[str]:
        """List the pairs that may have configs for a table."""

    def configs(self, table: str) -> set[str]:
        """Return the names of a table's config files, whatever their pair; none if they do not name its rows."""
        return set()

    @abstractmethod
    def file(self, table: str, pair: str, config: str) -> Path | None:
        """Find the config file `config` (a Method's) of a pair; None if the pair has none."""

    @abstractmethod
    def shown(self, file: Path) -> str:
        """Return a config file's name in table.json."""

    @abstractmethod
    def read(self, file: Path, options: Sequence[str]) -> Any:
        """Read and check the config of a file and KEY, VALUE, …; UserError for a wrong one."""

    def hash(self, cfg: Any, seed: int | None = None) -> str:
        """Return the config_hash that a run of it will have; seed: instead of the config's own."""
        if seed is not None:
            cfg = cfg.clone()
            set_default(cfg, next(iter(self.ours)), seed)
        return record.config_hash(self.computed(cfg))

    def computed(self, cfg: Any) -> Any:
        """Return a config as record.config_hash takes it."""
        return cfg

    @abstractmethod
    def own_options(self, seed: int, above: Path, method: str, name: str) -> tuple[str, ...]:
        """Return KEY, VALUE, … for the keys `ours`, such that the run's folder is above/method/name."""

    @abstractmethod
    def lines(self, cfg: Any) -> int:
        """Count the lines that metrics.jsonl has when a run is finished."""

    @abstractmethod
    def networks(self, pair: str, cfgs: Sequence[Any]) -> tuple[str, str]:
        """Return the names of a pair's teacher ("" without one) and student, for the report."""

    @abstractmethod
    def protocol(self, cfg: Any) -> str:
        """Say how long a run trains."""

    @abstractmethod
    def problems(self, runs: Sequence[tuple[Run, Any]], prepare: bool) -> list[str]:
        """Say what would stop these runs, with their configs: a line each.

        prepare: also draw or fetch a data set, once, before several processes would.
        """

    def settle(
        self, cfgs: Mapping[Cell, Any], before: Mapping[Cell, Mapping[str, str]], threads: int | None
    ) -> dict[Cell, dict[str, bool]]:
        """Give the keys that one pair's configs leave to a measurement the same value in all its runs, by cell.

        before: the options that earlier calls gave to the pair's runs; what they had settled on stays. threads: what a
        run will have here; None if runs are made elsewhere, where nothing can be measured: what is open is False.
        """
        return {}

    def seconds(self, cfgs: Sequence[Any], threads: int, runs: Sequence[int]) -> list[float]:
        """Time how long a run of each of these configs of one pair takes, before any is finished.

        threads: what a run will have. runs: how many of each there will be. Raises whatever a trainer that cannot be
        timed does.
        """
        raise NotImplementedError

    @abstractmethod
    def words(self, file: str, resume: bool, options: Sequence[str]) -> list[str]:
        """Return the command line that trains a run, without the tool: anew, over what is there, or going on."""

    @abstractmethod
    def train(self, file: str, resume: bool, options: Sequence[str]) -> int:
        """Train a run in this process; returns the exit code."""

    def check(self, cfg: Any) -> None:  # noqa: B027 (most kinds know nothing)
        """Raise UserError for what would stop a run of a config only once it has begun."""

    def teachers(self, cfgs: Mapping[Cell, Any]) -> dict[Cell, str | None]:
        """Return the fingerprints of these configs' teachers; None without one, and if it is not known before a run."""
        return dict.fromkeys(cfgs)
