"""table.json: what is written is read back, and what is damaged is refused in one line."""

import json
import shutil
from pathlib import Path

import pytest

from deepkd_plugin.errors import UserError
from deepkd_plugin.study.table import FILE, Table, row_name

COMMITTED = sorted((Path(__file__).parents[2] / "results").glob(f"*/{FILE}"))
ABLATION = next(path for path in COMMITTED if path.parent.name == "ablation-delta")


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.parent.name)
def test_a_committed_table_is_read_and_written_as_it_is(tmp_path, path):
    shutil.copy(path, tmp_path)
    table = Table.read(tmp_path)
    assert table.runs
    table.write()
    assert (tmp_path / FILE).read_bytes() == path.read_bytes()


def test_what_is_read(tmp_path):
    shutil.copy(ABLATION, tmp_path)
    table = Table.read(tmp_path)
    assert table.title == "ablation-delta over kd on glyphs100"
    assert (table.kind, table.metric, table.measures.key) == ("classification", "top-1 (%)", "test_acc")
    assert (table.options, table.seeds) == ({"SOLVER.AMP": "True"}, (0, 1, 2, 3, 4))
    assert [pair.label for pair in table.pairs] == ["resnet20 → resnet8"]
    assert (table.methods[1].name, table.methods[1].base) == ("delta0.025", "delta0")
    run = table.runs[0]
    assert (run.name, run.epochs, run.hash) == ("res20_res8 delta0 seed 0", 12, "f7e99082e8ac693f")
    assert run.folder == tmp_path / "runs/res20_res8/delta0/seed0-f7e99082"
    assert (run.config.name, run.options[:2]) == ("deepkd.yaml", ("SOLVER.AMP", "True"))


def damaged(**entries):
    return json.loads(ABLATION.read_text()) | entries


RUN = json.loads(ABLATION.read_text())["runs"][0]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("[" * 100_000, "must be the plan of a table (RecursionError: "),
        ("{", "must be the plan of a table (JSONDecodeError: "),
        ("[]", "must be the plan of a table (AttributeError: "),
        ("{}", "must be the plan of a table (KeyError: 'table')"),
        (damaged(runs=[{}]), "must be the plan of a table (KeyError: 'pair')"),
        (damaged(runs=[RUN | {"seed": "x"}]), "must be the plan of a table (ValueError: "),
        (damaged(kind="video"), "kind is 'video'; it must be one of classification, "),
        (damaged(runs=[RUN, RUN]), "res20_res8 delta0 seed 0 is planned twice; "),
        (damaged(runs=[RUN | {"pair": "a_b"}]), "a run's pair is 'a_b'; it must be one of res20_res8"),
        (damaged(methods=[]), "a run's method is 'delta0'; it must be one of"),
    ],
)
def test_a_damaged_table_is_one_line(tmp_path, content, line):
    (tmp_path / FILE).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError) as error:
        Table.read(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / FILE}: {line}")
    assert "\n" not in str(error.value)


def test_a_folder_without_a_table_is_one_line(tmp_path):
    with pytest.raises(UserError, match="holds no table.json; it must be a folder that 'deepkd reproduce'"):
        Table.read(tmp_path)


def test_rows_are_called_as_their_config_files():
    assert [row_name(base) for base in ("KD", "DKD")] == ["kd", "dkd"]
    assert [row_name(base, deepkd=True) for base in ("KD", "DKD")] == ["deepkd", "deepkd_dkd"]
