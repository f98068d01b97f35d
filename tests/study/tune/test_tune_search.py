"""One method's search in Optuna's storage. Nothing is trained here."""

import builtins
import math
from pathlib import Path

import pytest

from deepkd_plugin.errors import UserError
from deepkd_plugin.study.kinds import KINDS
from deepkd_plugin.study.tune.search import JOURNAL, Search, open_storage, outcome, require
from deepkd_plugin.study.tune.space import spaces

CONFIG = Path(__file__).parents[3] / "configs" / "glyphs100" / "res20_res8" / "kd.yaml"


@pytest.fixture(scope="module")
def space():
    return spaces({"kd": KINDS["classification"].read(CONFIG, [])}, ())["kd"]


def run(search, best=0.2, stop=math.inf):
    """Make trials whose results fall with the distance from a rate; returns the rates."""
    rates = []
    while len(rates) < stop and (trial := search.ask()) is not None:
        rates.append(search.point(trial)["rate"])
        search.study.tell(trial, 90 - abs(math.log(rates[-1] / best)))
    return rates


def test_the_config_as_it_stands_comes_first_and_the_budget_is_kept(tmp_path, space):
    search = Search(open_storage(tmp_path), "kd", space, 6, 12)
    rates = run(search)
    assert rates[0] == 0.2
    assert len(rates) == 6
    assert all(0.05 <= rate <= 0.8 for rate in rates)
    assert (search.left, search.best.number) == (0, 0)
    assert search.space == space


def test_a_choice_at_the_edge_is_widened_once_within_the_budget(tmp_path, space):
    search = Search(open_storage(tmp_path), "kd", space, 12, 12)
    rates = run(search, best=50.0)
    assert len(rates) == 12
    assert max(rates[:8]) <= 0.8
    assert search.space.ranges["rate"].high == pytest.approx(0.8 * 4)
    assert max(rates[8:]) > 0.8
    assert search.space.ranges["rate"].low == space.ranges["rate"].low


def test_the_last_third_waits_for_the_trials_that_decide(tmp_path, space):
    search = Search(open_storage(tmp_path), "kd", space, 3, 12)
    trials = [search.ask(), search.ask()]
    assert search.ask() is None
    assert search.left == 1
    for trial in trials:
        search.point(trial)
        search.study.tell(trial, 50.0)
    assert search.ask() is not None
    assert search.ask() is None


def test_a_search_goes_on_as_if_it_had_not_been_interrupted(tmp_path, space):
    (tmp_path / "whole").mkdir()
    expected = run(Search(open_storage(tmp_path / "whole"), "kd", space, 6, 12))
    search = Search(open_storage(tmp_path), "kd", space, 6, 12)
    first = run(search, stop=3)
    point = search.point(search.ask())  # and then it is killed
    with open(tmp_path / JOURNAL, "ab") as journal:
        journal.write(b'{"op_code":5,"wor')
    again = Search(open_storage(tmp_path), "kd", space, 6, 12)
    (trial,) = again.interrupted()
    assert trial.number == 3
    assert again.point(trial) == point
    again.study.tell(trial, 90 - abs(math.log(point["rate"] / 0.2)))
    assert [*first, point["rate"], *run(again)] == expected
    assert list(again.interrupted()) == []


def test_a_trial_that_failed_is_begun_anew(tmp_path, space):
    search = Search(open_storage(tmp_path), "kd", space, 2, 12)
    trial = search.ask()
    point = search.point(trial)
    search.study.tell(trial, state=search.optuna.trial.TrialState.FAIL)
    search.repeat(trial)
    assert outcome(search.trials[0]) == "fail"
    assert search.left == 2
    assert search.point(search.ask()) == point


@pytest.mark.parametrize("content", [b"{\n", b"nonsense\n{}\n", b'{"op_code":99}\n', b"[]\n"])
def test_a_damaged_storage_is_one_line(tmp_path, space, content):
    (tmp_path / JOURNAL).write_bytes(content * 2)
    with pytest.raises(UserError) as error:
        Search(open_storage(tmp_path), "kd", space, 2, 12)
    assert str(error.value).startswith(f"{tmp_path / JOURNAL}: must be the storage of this search (")


def test_the_storage_holds_no_pickles(tmp_path):
    from optuna.storages.journal._base import BaseJournalSnapshot

    assert not isinstance(open_storage(tmp_path)._backend, BaseJournalSnapshot)


def test_without_optuna_it_is_one_line(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name == "optuna":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r'needs Optuna, which is not installed: pip install "deepkd_plugin\[tune\]"'):
        require()
