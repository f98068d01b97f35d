"""deepkd apply: the plugin in a checkout of mdistiller, whole or not at all, and out of it without a trace."""

import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path

import pytest
import small

from deepkd_plugin.commands import apply
from deepkd_plugin.commands.cli import main
from deepkd_plugin.config import shipped as shipped_module
from deepkd_plugin.config.shipped import shipped
from deepkd_plugin.errors import UserError
from deepkd_plugin.run import checkpoint

ROOT = Path(__file__).parents[2]
SCRIPTS = {
    "tools/train.py": b"import os\n\nprint(os.name)\n",
    "tools/eval.py": b"import sys\nprint(sys.path)\n",
    "detection/train_net.py": b"#!/usr/bin/env python\nimport torch\n",
}
TWO_LINES = (
    b"# DeepKD: registers its distillers, trainer and config keys (deepkd apply; undo with deepkd apply --revert)\n"
    b"import deepkd_plugin.mdistiller  # noqa: F401\n"
)
LINES = {
    "tools/train.py": TWO_LINES,
    "tools/eval.py": TWO_LINES,
    "detection/train_net.py": (
        b"#!/usr/bin/env python\n"
        b"# DeepKD: its trainer, meta architecture and config keys (deepkd apply; undo with deepkd apply --revert)\n"
        b'if __name__ == "__main__":\n'
        b"    from deepkd_plugin.detection.detectron2.launch import main\n\n"
        b"    raise SystemExit(main())\n"
    ),
}


def placed(file):
    """Where a checkout has one of our configs."""
    top, name = file.parts[0], file.as_posix()
    return f"detection/configs/DeepKD/{name.split('/', 1)[1]}" if top == "detectron2" else f"configs/{name}"


SOURCES = {
    placed(file.relative_to(ROOT / "configs")): file
    for file in sorted((ROOT / "configs").rglob("*.yaml"))
    if file.relative_to(ROOT / "configs").parts[0] != "detection"
}
"""What a checkout gets: path there -> our file."""
DETECTORS = [name for name in SOURCES if name.startswith("detection/")]
CONFIGS = [name for name in SOURCES if name not in DETECTORS]


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A checkout with scripts of our own, which the hash table knows."""
    root = tmp_path / "my mdistiller"
    for name, content in SCRIPTS.items():
        put(root / name, content)
        (root / name).chmod(0o755)
    put(root / "mdistiller/__init__.py", b"")
    put(root / "configs/cifar100/theirs.yaml", b"theirs: 1\n")
    put(root / "detection/configs/theirs.yaml", b"theirs: 1\n")
    known = {name: {hashlib.sha256(content).hexdigest(): "0123abc"} for name, content in SCRIPTS.items()}
    monkeypatch.setattr(apply, "KNOWN", known)
    return root


@pytest.fixture
def deepkd(capsys):
    """deepkd apply in this process: deepkd(root, "--check") -> (exit code, stdout, stderr)."""

    def run(root, *flags):
        code = main(["apply", str(root), *flags])
        captured = capsys.readouterr()
        assert captured.err.count("\n") == (code == 2)
        return code, captured.out, captured.err

    return run


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def tree(root):
    """Everything in a folder: names, contents, modes, links."""
    return {
        str(p.relative_to(root)): (p.is_symlink(), p.stat().st_mode, p.is_file() and p.read_bytes())
        for p in root.rglob("*")
    }


def test_apply_and_revert(fake, deepkd):
    before = tree(fake)
    code, out, err = deepkd(fake)
    assert (code, err) == (0, "")
    after = tree(fake)
    for name, content in SCRIPTS.items():
        assert after[name] == (False, before[name][1], LINES[name] + content)
    theirs = {"configs/cifar100/theirs.yaml", "detection/configs/theirs.yaml"}
    assert {name for name in after if name.endswith(".yaml")} == SOURCES.keys() | theirs
    assert all(after[name][2] == file.read_bytes() for name, file in SOURCES.items())
    assert set(after) - set(before) == {
        part for name in SOURCES for part in (name, *map(str, Path(name).parents[:-2])) if part not in before
    }
    lines = out.splitlines()
    assert lines[0] == "patched   tools/train.py, tools/eval.py, detection/train_net.py"
    assert lines[1] == f"configs   {len(CONFIGS)} files copied to {fake / 'configs'}"
    assert lines[2] == f"configs   {len(DETECTORS)} files copied to {fake / 'detection/configs/DeepKD'}"
    assert lines[-1] == f"undo      deepkd apply {shlex.quote(str(fake))} --revert"
    words = shlex.split(lines[4])
    assert words[:7] == ["detection", "cd", str(fake), "&&", "python", "detection/train_net.py", "--config-file"]
    assert f"detection/{words[7]}" in DETECTORS
    words = shlex.split(lines[3])
    assert words[:2] == ["next", "cd"]
    assert words[3:-1] == ["&&", "python", "tools/train.py", "--cfg"]
    assert (Path(words[2]) / words[-1]).read_bytes() == (ROOT / words[-1]).read_bytes()

    code, out, err = deepkd(fake, "--revert")
    assert (code, err) == (0, "")
    assert tree(fake) == before
    assert out.splitlines() == [
        "reverted  tools/train.py, tools/eval.py, detection/train_net.py",
        f"configs   {len(CONFIGS)} files removed from {fake / 'configs'}",
        f"configs   {len(DETECTORS)} files removed from {fake / 'detection/configs/DeepKD'}",
    ]


def test_twice(fake, deepkd):
    deepkd(fake)
    before = tree(fake)
    code, out, _ = deepkd(fake)
    assert code == 0
    assert out.startswith(f"{fake} has the plugin in place already\n")
    assert tree(fake) == before
    deepkd(fake, "--revert")
    code, out, _ = deepkd(fake, "--revert")
    assert code == 0
    assert out == f"{fake} has nothing of the plugin to take out\n"


def test_a_checkout_without_a_detection_branch(fake, deepkd):
    shutil.rmtree(fake / "detection")
    before = tree(fake)
    code, out, _ = deepkd(fake)
    assert code == 0
    assert "train_net" not in out
    assert {name for name in tree(fake) if name in SOURCES} == set(CONFIGS)
    code, out, _ = deepkd(fake, "--check")
    assert (code, len(out.splitlines())) == (0, 3)
    deepkd(fake, "--revert")
    assert tree(fake) == before


def test_a_checkout_without_configs(fake, deepkd):
    shutil.rmtree(fake / "configs")
    before = tree(fake)
    assert deepkd(fake)[0] == 0
    assert all((fake / name).exists() for name in CONFIGS)
    deepkd(fake, "--revert")
    assert tree(fake) == before


def checked(deepkd, root):
    """--check's exit code and what it says of the scripts and of the configs; it changes nothing."""
    before = tree(root)
    code, out, err = deepkd(root, "--check")
    assert tree(root) == before
    assert [line[:24].strip() for line in out.splitlines()[:4]] == [*SCRIPTS, "configs"]
    return code, [line[24:] for line in out.splitlines()[:4]], err


def test_check_in_every_state(fake, deepkd):
    n = len(SOURCES)
    pristine, patched = "not yet (mdistiller 0123abc)", "in place (mdistiller 0123abc)"
    unknown = "not a version that this command knows"

    def states(*scripts, there, missing):
        return [*scripts, f"{there} in place, {missing} not yet"]

    assert checked(deepkd, fake) == (1, states(*[pristine] * 3, there=0, missing=n), "")
    deepkd(fake)
    assert checked(deepkd, fake) == (0, states(*[patched] * 3, there=n, missing=0), "")
    (fake / CONFIGS[0]).unlink()
    assert checked(deepkd, fake) == (1, states(*[patched] * 3, there=n - 1, missing=1), "")
    put(fake / CONFIGS[0], b"mine: 1\n")
    assert checked(deepkd, fake) == (0, states(*[patched] * 3, there=n - 1, missing=0), "")
    (fake / DETECTORS[0]).unlink()
    assert checked(deepkd, fake) == (1, states(*[patched] * 3, there=n - 2, missing=1), "")
    deepkd(fake)
    put(fake / "detection/train_net.py", SCRIPTS["detection/train_net.py"])
    assert checked(deepkd, fake) == (1, states(patched, patched, pristine, there=n - 1, missing=0), "")
    put(fake / "tools/train.py", b"import os\n")
    code, found, err = checked(deepkd, fake)
    assert (code, found[:3]) == (2, [unknown, patched, pristine])
    assert f"{fake / 'tools/train.py'}: not a version of mdistiller" in err


def test_an_edited_file_is_refused_and_the_lines_by_hand_are_enough(fake, deepkd):
    put(fake / "tools/eval.py", SCRIPTS["tools/eval.py"] + b"# mine\n")
    before = tree(fake)
    code, out, err = deepkd(fake)
    assert (code, out) == (2, "")
    assert tree(fake) == before
    assert err.startswith(f"deepkd: error: {fake / 'tools/eval.py'}: not a version of mdistiller that this")
    assert "train.py" not in err
    for line in TWO_LINES.decode().splitlines():
        assert f"`{line}`" in err
    # what the message asks for
    put(fake / "tools/eval.py", TWO_LINES + before["tools/eval.py"][2])
    assert deepkd(fake)[0] == 0
    code, states, _ = checked(deepkd, fake)
    assert (code, states[1]) == (0, "in place (otherwise an edited file)")
    assert deepkd(fake, "--revert")[0] == 0
    assert tree(fake) == before
    put(fake / "tools/train.py", b"")
    assert f"{fake / 'tools/train.py'} and {fake / 'tools/eval.py'}: not a version" in deepkd(fake)[2]


def test_an_edited_detection_script_is_refused_and_the_lines_by_hand_are_enough(fake, deepkd):
    put(fake / "detection/train_net.py", b"# mine\n")
    before = tree(fake)
    code, _, err = deepkd(fake)
    assert code == 2
    assert tree(fake) == before
    assert f"put the lines of {shipped('patches') / 'train_net.patch'} on top by hand" in err
    put(fake / "detection/train_net.py", LINES["detection/train_net.py"] + b"# mine\n")
    assert deepkd(fake)[0] == 0
    assert deepkd(fake, "--revert")[0] == 0
    assert tree(fake) == before


def test_edits_after_apply_survive_revert(fake, deepkd):
    deepkd(fake)
    with open(fake / "tools/train.py", "ab") as file:
        file.write(b"# mine\n")
    put(fake / CONFIGS[0], b"mine: 1\n")
    code, out, _ = deepkd(fake, "--revert")
    assert code == 0
    assert (fake / "tools/train.py").read_bytes() == SCRIPTS["tools/train.py"] + b"# mine\n"
    assert (fake / CONFIGS[0]).read_bytes() == b"mine: 1\n"
    assert not any((fake / name).exists() for name in SOURCES if name != CONFIGS[0])
    assert out.splitlines()[-1] == (f"left 1 file not as the plugin ships them, or behind a link: {CONFIGS[0]}")


def test_crlf_stays_crlf(fake, deepkd):
    for name, content in SCRIPTS.items():
        put(fake / name, content.replace(b"\n", b"\r\n"))
    before = tree(fake)
    assert deepkd(fake)[0] == 0
    for name, content in SCRIPTS.items():
        assert (fake / name).read_bytes() == (LINES[name] + content).replace(b"\n", b"\r\n")
    assert checked(deepkd, fake)[0] == 0
    deepkd(fake, "--revert")
    assert tree(fake) == before
    # git apply puts \n lines on top of \r\n ones
    put(fake / "tools/train.py", TWO_LINES + before["tools/train.py"][2])
    assert checked(deepkd, fake)[1][0] == "in place (mdistiller 0123abc)"
    deepkd(fake, "--revert")
    assert tree(fake) == before


def test_a_checkout_with_one_file_patched_by_hand(fake, deepkd):
    before = tree(fake)
    put(fake / "tools/eval.py", TWO_LINES + TWO_LINES + SCRIPTS["tools/eval.py"])  # git apply does not mind twice
    code, out, _ = deepkd(fake)
    assert code == 0
    assert out.splitlines()[0] == "patched   tools/train.py, detection/train_net.py"
    assert (fake / "tools/train.py").read_bytes() == TWO_LINES + SCRIPTS["tools/train.py"]
    deepkd(fake, "--revert")
    assert tree(fake) == before


@pytest.mark.parametrize("missing", ["tools/train.py", "tools/eval.py", "mdistiller/__init__.py"])
@pytest.mark.parametrize("flags", [[], ["--check"], ["--revert"]])
def test_a_folder_that_is_no_checkout(fake, deepkd, missing, flags):
    (fake / missing).unlink()
    before = tree(fake)
    code, out, err = deepkd(fake, *flags)
    assert (code, out) == (2, "")
    expected = f"has no {missing}; PATH must be the root folder of a checkout of mdistiller"
    assert err == f"deepkd: error: {fake}: {expected}\n"
    assert tree(fake) == before


def test_files_that_were_there_are_kept(fake, deepkd):
    for name in CONFIGS[:4]:
        put(fake / name, b"mine: 1\n")
    put(fake / CONFIGS[4], (ROOT / CONFIGS[4]).read_bytes())
    code, out, _ = deepkd(fake)
    assert code == 0
    assert f"configs   {len(CONFIGS) - 5} files copied to " in out
    assert f"\nkept 4 files that were there: {', '.join(CONFIGS[:3])} and 1 more\n" in out
    assert all((fake / name).read_bytes() == b"mine: 1\n" for name in CONFIGS[:4])
    deepkd(fake, "--revert")
    assert [name for name in CONFIGS if (fake / name).exists()] == CONFIGS[:4]


def test_what_lies_behind_a_link_is_not_removed(fake, deepkd, tmp_path):
    """A developer's checkout may link to our configs; a linked script stays a link."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    top = "glyphs100"
    (fake / "configs" / top).symlink_to(tmp_path / "configs" / top)
    (fake / "tools/train.py").rename(tmp_path / "train.py")
    (fake / "tools/train.py").symlink_to(tmp_path / "train.py")
    assert deepkd(fake)[0] == 0
    assert (tmp_path / "train.py").read_bytes() == TWO_LINES + SCRIPTS["tools/train.py"]
    code, out, _ = deepkd(fake, "--revert")
    assert code == 0
    assert "or behind a link: " in out
    assert (fake / "tools/train.py").is_symlink()
    assert (tmp_path / "train.py").read_bytes() == SCRIPTS["tools/train.py"]
    assert all((tmp_path / name).exists() for name in CONFIGS)
    linked = [name for name in CONFIGS if Path(name).parts[1] == top]
    assert [name for name in CONFIGS if (fake / name).exists()] == linked


@pytest.mark.parametrize("name", ["configs", "configs/glyphs100", "detection/configs"])
def test_nothing_is_written_through_a_link(fake, deepkd, tmp_path, name):
    (tmp_path / "elsewhere").mkdir()
    if (fake / name).exists():
        shutil.rmtree(fake / name)
    (fake / name).symlink_to(tmp_path / "elsewhere")
    before = tree(fake)
    for flags in ([], ["--check"]):
        code, _, err = deepkd(fake, *flags)
        assert code == 2
        assert f"{fake / name}: is a link, and nothing was changed; the configs go into the checkout alone" in err
    assert deepkd(fake, "--revert")[0] == 0
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert tree(fake) == before


@pytest.mark.parametrize("flags", [[], ["--check"], ["--revert"]])
def test_links_in_a_circle_and_names_that_are_too_long(fake, deepkd, tmp_path, flags):
    shutil.rmtree(fake / "configs")
    (fake / "configs").symlink_to(fake / "other")
    (fake / "other").symlink_to(fake / "configs")
    before = sorted(os.listdir(fake))
    code, _, err = deepkd(fake, *flags)
    assert code in (0, 2)
    assert "Traceback" not in err
    assert sorted(os.listdir(fake)) == before
    (tmp_path / "round").symlink_to(tmp_path / "round")
    assert deepkd(tmp_path / "round", *flags)[0] == 2
    assert deepkd(tmp_path / ("x" * 300), *flags)[0] == 2
    assert deepkd(tmp_path / "/".join(["x" * 200] * 30), *flags)[0] == 2


@pytest.mark.parametrize("flags", [[], ["--revert"]])
def test_what_a_killed_call_left_is_removed(fake, deepkd, flags):
    """Its temporary files and empty folders; those of a call at work and of others stay."""
    before = tree(fake)
    folder = (fake / CONFIGS[0]).parent
    for path in (fake / "tools/.train.py.999999999.tmp", folder / f".{Path(CONFIGS[0]).name}.999999999.tmp"):
        put(path, b"half")
    kept = [fake / f"tools/.train.py.{os.getppid()}.tmp", fake / "tools/.theirs.py.999999999.tmp"]
    for path in kept:
        put(path, b"")
    assert deepkd(fake, *flags)[0] == 0
    assert {path for path in fake.rglob(".*.tmp")} == set(kept)
    for path in kept:
        path.unlink()
    deepkd(fake, "--revert")
    assert tree(fake) == before


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_call_that_is_killed_anywhere_is_undone(fake, deepkd):
    """Each write and each new folder is such a place; --revert then leaves nothing."""
    before = tree(fake)
    for number in range(1, 400, 11):
        code, *_ = small.command(lambda: apply.apply(fake), partial(small.kill_at, number))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        assert deepkd(fake, "--revert")[0] == 0
        assert tree(fake) == before
    assert number > 100


def test_the_plugin_s_own_configs_are_never_removed(fake, deepkd, monkeypatch):
    """Our repository, with mdistiller/ linked into it, looks like a checkout."""
    monkeypatch.setattr(apply, "shipped", lambda name: fake / name if name == "configs" else shipped(name))
    before = tree(fake)
    code, _, err = deepkd(fake, "--revert")
    assert code == 2
    assert "its configs/ are the plugin's own" in err
    assert tree(fake) == before


def test_revert_tells_of_an_import_elsewhere(fake, deepkd):
    deepkd(fake)
    put(fake / "tools/eval.py", b"#!/usr/bin/env python\n" + TWO_LINES + SCRIPTS["tools/eval.py"])
    before = tree(fake)
    code, _, err = deepkd(fake, "--revert")
    assert code == 2
    assert f"{fake / 'tools/eval.py'}: imports the plugin elsewhere than on top" in err
    assert tree(fake) == before


def failing_writes(monkeypatch, name, error):
    """Make the write of the file `name` fail after half of it."""
    whole = checkpoint.write_whole

    def write_whole(path, write):
        def half(file):
            write(file)
            if path.name == name:
                file.truncate(10)
                raise error

        whole(path, half)

    monkeypatch.setattr(checkpoint, "write_whole", write_whole)


@pytest.mark.parametrize("flags", [[], ["--revert"]])
@pytest.mark.parametrize(
    "name", ["train.py", "eval.py", "train_net.py", Path(CONFIGS[-1]).name, Path(DETECTORS[-1]).name]
)
def test_a_full_disk_leaves_everything_as_it_was(fake, deepkd, monkeypatch, flags, name):
    if flags:
        deepkd(fake)
    before = tree(fake)
    if flags and name.endswith(".yaml"):
        monkeypatch.setattr(Path, "unlink", failing_unlink(name))
    else:
        failing_writes(monkeypatch, name, OSError(28, "No space left on device"))
    code, out, err = deepkd(fake, *flags)
    assert (code, out) == (2, "")
    assert f"{name}: cannot be changed (No space left on device); nothing was changed" in err
    assert tree(fake) == before


def failing_unlink(name):
    unlink = Path.unlink

    def fail(path, missing_ok=False):
        if path.name == name:
            raise OSError(28, "No space left on device")
        unlink(path, missing_ok)

    return fail


def test_an_interruption_leaves_everything_as_it_was(fake, monkeypatch, capsys):
    before = tree(fake)
    failing_writes(monkeypatch, "eval.py", KeyboardInterrupt())
    assert main(["apply", str(fake)]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert tree(fake) == before


def test_a_signal_waits_until_all_is_written(fake, monkeypatch, capsys):
    whole = checkpoint.write_whole

    def write_whole(path, write):
        os.kill(os.getpid(), signal.SIGINT)
        whole(path, write)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "write_whole", write_whole)
        assert main(["apply", str(fake)]) == 130
    assert main(["apply", str(fake), "--check"]) == 0


@pytest.mark.parametrize("flags", [[], ["--check"], ["--revert"]])
def test_a_file_where_a_folder_must_be(fake, deepkd, flags):
    put(fake / "configs" / "glyphs100", b"")
    before = tree(fake)
    code, _, err = deepkd(fake, *flags)
    if flags:
        assert code == {"--check": 1, "--revert": 0}[flags[0]]
    else:
        assert code == 2
        assert "nothing was changed" in err
    assert tree(fake) == before


def test_a_folder_where_a_file_must_be(fake, deepkd):
    (fake / CONFIGS[0]).mkdir(parents=True)
    before = tree(fake)
    code, _, err = deepkd(fake)
    assert code == 2
    assert f"{fake / CONFIGS[0]}: cannot be read (Is a directory); nothing was changed" in err
    assert tree(fake) == before


@pytest.fixture(params=["as it stands", *apply.KNOWN["tools/train.py"].values()])
def real(request, tmp_path, mdistiller_root):
    """A copy of mdistiller's own scripts and configs, as they stand in the checkout or as of a commit."""
    root = mdistiller_root
    if not (root / "tools/train.py").is_file():
        pytest.skip(f"{root} has no tools/: an installed package, not a checkout")
    copy = tmp_path / "mdistiller"
    shutil.copytree(root / "configs", copy / "configs")
    shutil.copytree(root / "tools", copy / "tools", ignore=shutil.ignore_patterns("*.ipynb"))
    shutil.copytree(root / "detection", copy / "detection", ignore=shutil.ignore_patterns("__pycache__"))
    put(copy / "mdistiller/__init__.py", b"")
    if request.param != "as it stands":
        for name in SCRIPTS:
            show = ["git", "-C", str(root), "show", f"{request.param}:{name}"]
            try:
                put(copy / name, subprocess.run(show, check=True, capture_output=True).stdout)
            except (OSError, subprocess.CalledProcessError):
                pytest.skip(f"{root} has no git history with {request.param}")
    return copy


def test_mdistiller_s_own_files(real, deepkd):
    before = tree(real)
    code, states, _ = checked(deepkd, real)
    assert code == 1
    assert all(state.startswith("not yet (mdistiller ") for state in states[:3])
    assert deepkd(real)[0] == 0
    for name in SCRIPTS:
        assert (real / name).read_bytes() == LINES[name] + before[name][2]
    assert checked(deepkd, real)[0] == 0
    assert deepkd(real, "--revert")[0] == 0
    assert tree(real) == before


@pytest.mark.parametrize("name", SCRIPTS)
def test_git_applies_the_patches(fake, deepkd, name):
    if shutil.which("git") is None:
        pytest.skip("no git")
    patch = shipped("patches") / f"{Path(name).stem}.patch"
    before = tree(fake)
    alone = os.environ | {"GIT_CEILING_DIRECTORIES": str(fake.parent)}
    for flags in ([], ["-R"]):
        command = ["git", "apply", "--unidiff-zero", *flags, str(patch)]
        subprocess.run(command, cwd=fake, env=alone, check=True)
        put_in = b"" if flags else LINES[name]
        assert (fake / name).read_bytes() == put_in + SCRIPTS[name]
    assert tree(fake) == before


def test_shipped(tmp_path, monkeypatch):
    assert shipped("configs") == ROOT / "configs"
    assert shipped("patches") == ROOT / "patches"
    package = tmp_path / "site-packages/deepkd_plugin"
    (tmp_path / "site-packages/configs").mkdir(parents=True)  # of some other package
    (package / "_shipped/configs").mkdir(parents=True)
    monkeypatch.setattr(shipped_module, "PACKAGE", package)
    assert shipped("configs") == package / "_shipped/configs"
    with pytest.raises(UserError, match="its patches/ are missing; the package must be installed with pip"):
        shipped("patches")


def test_a_wheel_made_of_the_sdist_has_configs_and_patches(tmp_path):
    """Source tree -> sdist -> wheel, the longest way that an installation can take."""
    needed = "import setuptools.command.bdist_wheel, pip"
    probe = subprocess.run([sys.executable, "-c", needed], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"cannot build a wheel: {probe.stderr.splitlines()[-1]}")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("deepkd_plugin", "configs", "patches"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.npz"))
    put(source / "build/lib/deepkd_plugin/_shipped/configs/gone.yaml", b"")  # of an earlier build
    put(source / "configs/notes.txt", b"")

    def python(*words):
        done = subprocess.run([sys.executable, *words], cwd=source, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    python("-c", "from setuptools import build_meta; build_meta.build_sdist('dist')")
    (sdist,) = (source / "dist").iterdir()
    for built in (sdist, source):
        target = tmp_path / f"from_{built.name}"
        pip = ["-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
        python(*pip, "--disable-pip-version-check", "--wheel-dir", str(target), str(built))
        (wheel,) = target.iterdir()
        with zipfile.ZipFile(wheel) as file:
            held = {name: file.read(name) for name in file.namelist()}
        patches = ["patches/eval.patch", "patches/train.patch", "patches/train_net.patch"]
        configs = [f.relative_to(ROOT).as_posix() for f in (ROOT / "configs").rglob("*.yaml")]
        ours = {name for name in held if "_shipped" in name}
        assert ours == {f"deepkd_plugin/_shipped/{name}" for name in [*configs, *patches]}
        assert all(held[name] == (ROOT / name.split("_shipped/")[1]).read_bytes() for name in ours)
        assert any(name.endswith("weights/glyphs100_resnet20.pt") for name in held)
        assert "deepkd_plugin/py.typed" in held
        (license_file,) = (name for name in held if name.endswith("LICENSE"))
        assert held[license_file] == (ROOT / "LICENSE").read_bytes()
        (points,) = (name for name in held if name.endswith("entry_points.txt"))
        assert b"deepkd = deepkd_plugin.commands.cli:entry" in held[points]
        (metadata,) = (held[name].decode() for name in held if name.endswith("METADATA"))
        for extra, package in (("mdistiller", "scipy"), ("wandb", "wandb")):
            assert f'{package}; extra == "{extra}"' in metadata.replace("'", '"')
