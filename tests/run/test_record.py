"""What run.json says about the code."""

import hashlib
from pathlib import Path

import pytest
import torch

import deepkd_plugin
from deepkd_plugin import config, device, extensions
from deepkd_plugin.errors import UserError
from deepkd_plugin.hosts import builtin
from deepkd_plugin.run import record

PACKAGE = Path(deepkd_plugin.__file__).parent


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch):
    """What other tests of this process registered is in no hash here."""
    monkeypatch.setattr(extensions, "contents", dict)


@pytest.fixture
def package(tmp_path):
    for name in ("losses.py", "distillers/kd.py", "study/reproduce/plan.py", "hosts/builtin/defaults.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"content of {name}\n")
    return tmp_path


def test_the_code_s_hash_is_of_names_and_contents(package):
    first = record.code_hash(package)
    assert len(first) == 16
    assert int(first, 16) >= 0
    (package / "distillers" / "kd.py").write_text("content of distillers/kd.py \n")
    changed = record.code_hash(package)
    (package / "distillers" / "kd.py").rename(package / "distillers" / "k.py")
    renamed = record.code_hash(package)
    (package / "empty.py").touch()
    assert len({first, changed, renamed, record.code_hash(package)}) == 4


def test_what_computes_nothing_is_not_part_of_it(package):
    first = record.code_hash(package)
    (package / "study" / "reproduce" / "plan.py").write_text("")
    (package / "study" / "page.py").write_text("")
    (package / "hosts" / "builtin" / "defaults.yaml").write_text("")  # it is in the hash of the config
    (package / "notes.txt").write_text("")
    assert record.code_hash(package) == first


def test_the_package_s_own_hash_is_that_of_what_was_loaded(monkeypatch):
    """Files that are edited while a run loads its data are not what it computes with."""
    assert record.code_hash() == record.code_hash(PACKAGE)
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"edited")
    assert record.code_hash() != record.code_hash(PACKAGE)


def test_a_run_and_each_of_its_sessions_name_their_code(tmp_path, monkeypatch):
    def prepare(resume):
        record.prepare_folder(tmp_path, builtin.CFG, torch.device("cpu"), "command", resume, None, None, {})

    config.add_deepkd_config(builtin.CFG)
    prepare(resume=False)
    first = record.code_hash()
    monkeypatch.setattr(record, "code_hash", lambda: "of later")
    prepare(resume=True)
    held = record.read_run(tmp_path)
    assert [held["code"], held["resumed"][0]["code"]] == [first, "of later"]


def test_a_run_on_a_gpu_names_cuda_and_its_precisions(tmp_path, monkeypatch):
    settings = {"cuda": "13.0", "cudnn": "91301", "matmul precision": "none", "convolution precision": "tf32"}
    monkeypatch.setattr(device, "settings", lambda of: settings if of.type == "cuda" else {})
    monkeypatch.setattr(device, "describe", lambda of: "a card")
    config.add_deepkd_config(builtin.CFG)
    record.prepare_folder(tmp_path, builtin.CFG, torch.device("cuda"), "command", False, None, None, {})
    versions = record.read_run(tmp_path)["versions"]
    assert settings.items() <= versions.items()
    assert versions["torch"]


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({}, False),
        ({"DISTILLER.STUDENT": "timm:resnet10t"}, True),
        ({"DISTILLER.TEACHER": "timm:resnet10t"}, True),
        ({"DISTILLER.STUDENT": "torchvision:resnet18"}, False),
        ({"AUGMENT.RANDAUGMENT": "rand-m9-mstd0.5-inc1"}, True),
    ],
)
def test_timm_has_its_version_in_a_run_that_computes_with_it(tmp_path, keys, named):
    cfg = builtin.CFG.clone()
    config.add_deepkd_config(cfg)
    for path, value in keys.items():
        node, key = path.split(".")
        cfg[node][key] = value
    record.prepare_folder(tmp_path, cfg, torch.device("cpu"), "command", False, None, None, {})
    versions = record.read_run(tmp_path)["versions"]
    assert ("timm" in versions) == named
    assert versions.get("timm") == (record.version_of("timm") if named else None)


def test_the_hash_covers_the_whole_package_but_what_computes_nothing():
    """Counted here by the package's own folder, so that a moved record.py cannot hash less without a word."""
    apart = [PACKAGE / name for name in record.APART]
    assert all(path.exists() for path in apart)
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py"), key=lambda path: path.relative_to(PACKAGE).as_posix()):
        if not any(path == other or other in path.parents for other in apart):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(PACKAGE).as_posix()} {len(content)}\n".encode() + content)
    assert record.code_hash() == digest.hexdigest()[:16]
    # what else is left out would change what a run computes without a word
    assert record.APART == ("study/", "students/", "commands/", "card.py", "detection/detectron2/merge.py")


@pytest.mark.parametrize("content", [None, "", "{", "[]", "3", b"\xff\xfe"])
def test_what_is_no_record_is_refused_in_one_line_or_not_found(tmp_path, content):
    if content is not None:
        (tmp_path / "run.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        record.read_run(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'run.json'}: must be the record of a run (")
    assert "\n" not in str(error.value)
    assert record.find_run(tmp_path) == {}


def test_a_record_is_found_and_noted_in(tmp_path):
    record.write_run(tmp_path, {"minutes": 1.5})
    assert record.add_minutes(tmp_path, 2.25) == 3.75
    record.note(tmp_path, {"finished": True})
    assert record.find_run(tmp_path) == record.read_run(tmp_path) == {"minutes": 3.75, "finished": True}
