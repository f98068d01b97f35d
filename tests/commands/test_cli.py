"""deepkd COMMAND: the exit codes that its commands and its mistakes get."""

import contextlib
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import types
from importlib import import_module
from pathlib import Path

import pytest

import deepkd_plugin
from deepkd_plugin import config, launch
from deepkd_plugin.commands import cli
from deepkd_plugin.commands.completion import module_of
from deepkd_plugin.config.shipped import find_config
from deepkd_plugin.detection.keys import DETECTION_KEYS
from deepkd_plugin.errors import UserError
from deepkd_plugin.terminal import Parser, built

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["upload"], "there is no command 'upload'; did you mean push?; see deepkd --help"),
        (["test"], "there is no command 'test'; did you mean eval or detect-eval?; see deepkd --help"),
        (["help", "trian"], "there is no command 'trian'; did you mean train?"),
        (["--versoin"], "unrecognized arguments: --versoin; did you mean --version?"),
        (["train", "--config", "a"], "unrecognized arguments: --config; did you mean --cfg?; see deepkd train --help"),
        (
            ["train", "--cfg", "a", "--batch-size", "8"],
            "arguments: --batch-size; a config key goes without --, as SOLVER.SEED 1, and `deepkd keys batch_size` ",
        ),
        (["export", "a"], "--to is missing; it must be one of safetensors, onnx, torch; see deepkd export --help"),
        (["keys", "--hlep"], "unrecognized arguments: --hlep; did you mean --help?"),
        (["cache", "lst"], "'delete'); did you mean list?; see deepkd cache --help"),
        (["networks", "resnt8"], "without a word it lists all; did you mean resnet8?"),
        (["keys", "epochz"], "without a word it lists all; did you mean epoch"),
        (["aply"], "there is no command 'aply'; did you mean apply?; see deepkd --help"),
        (["keys", "nothing of that name"], "no line of `deepkd keys` has 'nothing of that name'"),
        (["train", "--cfg", "glyphs100/res20_res8/deepk"], "no such file; did you mean glyphs100/res20_res8/deepkd"),
        (["apply"], "the following arguments are required: PATH; see deepkd apply --help"),
        (["apply", ".", "--check", "--revert"], "not allowed with argument --check"),
        (["apply", ".", "--force"], "unrecognized arguments: --force"),
        (["gsnr"], "one of the arguments --cfg --runs is required; see deepkd gsnr --help"),
        (["gsnr", "--cfg", "a.yaml", "--runs", "a", "--out", "b"], "not allowed with argument --cfg"),
        (["gsnr", "--cfg", "a.yaml", "--resume", "--overwrite"], "not allowed with argument --resume"),
        (
            ["gsnr", "--cfg", "a.yaml", "--out", "b"],
            "--out goes with --runs; with --cfg everything goes into",
        ),
        (["gsnr", "--runs", "a"], "--runs needs --out DIR; see deepkd gsnr --help"),
        (["gsnr", "--runs", "a", "--out", "b", "--resume"], "KEY VALUE go with --cfg, not with --runs"),
        (["gsnr", "--runs", "a", "--overwrite", "--out", "b"], "KEY VALUE go with --cfg, not with --runs"),
        (["gsnr", "--runs=a", "SOLVER.SEED", "1", "--out", "b"], "KEY VALUE go with --cfg, not with --runs"),
        (["gsnr", "--run", "a", "--out", "b"], "unrecognized arguments: --run; did you mean --runs?; see"),
        (["gsnr", "--cfg", "a.yaml", "--fast"], "unrecognized arguments: --fast"),
        (["reproduce"], "the following arguments are required: TABLE; see deepkd reproduce --help"),
        (["reproduce", "glyphs"], "TABLE is 'glyphs'; it must be one of cifar100, cifar100_cpu, cifar100_res8, "),
        (["reproduce", "glyph100"], "configs PAIR/METHOD.yaml; did you mean glyphs100?"),
        (["reproduce", "glyphs100", "--methods", "kd", "depkd"], "; did you mean deepkd?"),
        (["reproduce", "glyphs100", "--pairs"], "argument --pairs: expected at least one argument"),
        (["reproduce", "glyphs100", "--pairs", "SOLVER.LR", "1"], "--pairs: expected at least one argument"),
        (["reproduce", "glyphs100", "--out"], "--out: expected one argument; see deepkd reproduce --help"),
        (
            ["reproduce", "glyphs100", "--seeds", "10001"],
            "--seeds: is '10001'; it must be a whole number from 1 to 10,000",
        ),
        (["reproduce", "glyphs100", "--seeds", "0"], "--seeds: is '0'; it must be a whole number from 1 to 10,000"),
        (["reproduce", "glyphs100", "--seeds=-1"], "--seeds: is '-1'; it must be a whole number from 1 to 10,000"),
        (["reproduce", "glyphs100", "--jobs", "2x"], "--jobs: is '2x'; it must be a whole number from 1 to 10,000"),
        (["reproduce", "glyphs100", "--launcher", "k8s"], "invalid choice: 'k8s' (choose from "),
        (["reproduce", "glyphs100", "--seed", "1"], "arguments: --seed; did you mean --seeds?"),
        (["reproduce", "glyphs100", "cifar100"], "options come in pairs KEY VALUE, 'cifar100' has no value"),
        (["report"], "the following arguments are required: DIR; see deepkd report --help"),
        (
            ["merge-detector-weights", "a.pkl", "b.pth"],
            "the following arguments are required: OUT; see deepkd",
        ),
        (
            ["merge-detector-weights", "a.pkl", "b.pth", "c.pth", "--classes", "0"],
            "--classes: is '0'; it must be a whole number from 1 to 10,000",
        ),
        (["merge-detector-weights", "a.pkl", "b.pth", "c.pkl"], "OUT is c.pkl; it must end in .pth"),
    ],
)
def test_a_mistake_in_the_command_line_is_one_line(capsys, words, complaint):
    assert cli.main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("deepkd: error: command line: ")
    assert complaint in captured.err
    assert captured.err.count("\n") == 1


@pytest.fixture
def doctor(monkeypatch):
    """A module in doctor.py's place, its main() to be set."""
    module = types.ModuleType("deepkd_plugin.commands.doctor")
    monkeypatch.setitem(sys.modules, "deepkd_plugin.commands.doctor", module)
    return module


@pytest.mark.parametrize("code", [0, 1])
def test_a_command_s_exit_code_is_deepkd_s(doctor, monkeypatch, code):
    doctor.main = lambda words: code
    assert cli.main(["doctor"]) == code
    monkeypatch.setattr(sys, "argv", ["deepkd", "doctor"])
    with pytest.raises(SystemExit) as ended:
        cli.entry()
    assert ended.value.code == code


def test_mistakes_and_interruptions_have_codes_of_their_own(doctor, capsys):
    def mistaken(words):
        raise UserError("run.yaml: KEY is 3; it must be 4")

    def interrupted(words):
        raise KeyboardInterrupt

    doctor.main = mistaken
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err == "deepkd: error: run.yaml: KEY is 3; it must be 4\n"
    doctor.main = interrupted
    assert cli.main(["doctor"]) == 130


def test_python_m_is_the_same_command(tmp_path):
    command = [sys.executable, "-m", "deepkd_plugin", "apply", str(tmp_path), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"deepkd: error: {tmp_path}: has no tools/train.py; ")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_s_help_has_examples_that_it_takes(capsys, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["/usr/bin/deepkd", name, "--help"])
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: deepkd {name} ")
    assert max(map(len, shown.splitlines())) <= 80
    examples = shown.partition("\nexamples:\n")[2].replace("\\\n", "").splitlines()
    assert examples
    module = import_module(f"deepkd_plugin.commands.{module_of(name)}")
    for example in examples:
        program, command, *words = shlex.split(example)
        assert (program, command) == ("deepkd", name)
        args = vars(built(lambda: module.main([])).parse(words))
        if file := args.get("file") or args.get("cfg"):
            for config in [file] if isinstance(file, str) else file:
                assert Path(find_config(str(config))).is_file()


@pytest.mark.parametrize("words", [[], ["--help"], ["help"]])
def test_help_is_a_line_for_each_command_and_fits_a_screen(capsys, words):
    with contextlib.suppress(SystemExit):
        assert cli.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 24  # a terminal's, with the prompt below
    assert max(map(len, lines)) <= 80
    first = {line.split()[0] for line in lines if not line.startswith((" ", "usage:", "deepkd"))}
    assert first == {"train", "compare", "inspect", "ship", "host"}
    for name, what in cli.COMMANDS.items():
        assert any(line[9:] == f"{name:11} {what}" for line in lines)
    for flag in ("--help", "--version", "--print-completion"):
        assert flag in lines[0]


WINDOW = {
    **{"iteration": 2000, "epoch": 3, "samples": 10, "coordinates": 5, "parameters": 8},
    "gsnr": {"task": {"mean": 0.3, "ratio": 0.2, "norm": 1.0, "zero_variance": 0, "missing": 0}},
    **{"angle": {}, "momentum": {"task": 0.9}},
}


def measured(folder, seed=0):
    """Make a folder as a measured run leaves it."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        "{DATASET: {TYPE: glyphs100}, DISTILLER: {TYPE: KD, TEACHER: resnet20, STUDENT: resnet8}, "
        f"SOLVER: {{SEED: {seed}}}}}"
    )
    (folder / "gsnr.jsonl").write_text(json.dumps(WINDOW) + "\n")
    return folder


def test_gsnr_draws_runs_together(tmp_path, capsys):
    folders = [str(measured(tmp_path / name, seed)) for seed, name in enumerate("ab")]
    out = tmp_path / "out"
    assert cli.main(["gsnr", "--runs", *folders, "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("measured  resnet8, 2 windows of 10 samples, ")
    assert captured.out.endswith(f"files     {out}/ (gsnr.csv, gsnr.png, gsnr.svg)\n")
    assert captured.err == ""
    assert {path.name for path in out.iterdir()} == {"gsnr.csv", "gsnr.png", "gsnr.svg"}
    assert cli.main(["gsnr", "--out", str(out), "--runs", *folders, str(tmp_path / "none")]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert captured.err.startswith(f"deepkd: error: {tmp_path / 'none' / 'config.yaml'}: must be the config of")


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """launch.train replaced: it takes down what it is given and leaves a measured run."""
    calls = []

    def train(*arguments):
        calls.append(arguments)
        print("trained")
        return measured(tmp_path / "run")

    monkeypatch.setattr(launch, "train", train)
    return calls


def test_gsnr_trains_and_draws_into_the_run_s_folder(trained, tmp_path, capsys):
    words = ["SOLVER.LR", "0.1", "--cfg", "a b.yaml", "--resume", "SOLVER.DECOUPLED.DELTA.TCG", "-7.5e-2"]
    assert cli.main(["gsnr", *words]) == 0
    options = ["SOLVER.LR", "0.1", "SOLVER.DECOUPLED.DELTA.TCG", "-7.5e-2"]
    # what resumes it is this command
    command = "deepkd gsnr --cfg 'a b.yaml' SOLVER.LR 0.1 SOLVER.DECOUPLED.DELTA.TCG -7.5e-2"
    assert trained == [("a b.yaml", [*options, "GSNR.MEASURE", "True"], True, False, command)]
    out = capsys.readouterr().out
    assert out.startswith("trained\n\nmeasured  resnet8, 1 window of 10 samples, ")
    assert f"\nfiles     {tmp_path / 'run'}/ (" in out
    assert (tmp_path / "run" / "gsnr.svg").exists()


def test_a_folder_of_runs_may_be_called_like_a_key(tmp_path, capsys):
    assert cli.main(["gsnr", "--runs", "my.runs", "--out", str(tmp_path / "out")]) == 2
    assert "error: my.runs/config.yaml: must be the config of a run" in capsys.readouterr().err


def test_gsnr_starts_again_where_it_is_told_to(trained):
    assert cli.main(["gsnr", "--cfg", "a.yaml", "--overwrite", "GSNR.MEASURE", "False"]) == 0
    (arguments,) = trained
    assert arguments[1:4] == (["GSNR.MEASURE", "False", "GSNR.MEASURE", "True"], False, True)


def test_gsnr_s_mistakes_in_training_are_those_of_the_launcher(tmp_path, capsys):
    config = tmp_path / "a.yaml"
    config.write_text("{SOLVER: {EPOCHS: 2}}")
    for words, complaint in (
        (["SOLVER.LR"], "command line: options come in pairs KEY VALUE, 'SOLVER.LR' has no value"),
        (["SOLVER.LERNING", "1"], "command line: unknown config key SOLVER.LERNING"),
        (["SOLVER.LR", "fast"], "command line: SOLVER.LR is 'fast' (str); it must be float"),
    ):
        assert cli.main(["gsnr", "--cfg", str(config), *words]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"deepkd: error: {complaint}")
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("cifar100", {"table": "cifar100", "seeds": 5, "jobs": None, "out": None, "launcher": "local"}),
        (
            "glyphs100 --pairs a b --methods kd SOLVER.LR -0.1",
            {"pairs": ["a", "b"], "methods": ["kd"], "options": ["SOLVER.LR", "-0.1"]},
        ),
        # a flag behind the pairs, and a value that is like a key
        ("glyphs100 DATASET.ROOT my.data --seeds 3", {"options": ["DATASET.ROOT", "my.data"], "seeds": 3}),
        (
            "--out a.b ablation-delta --methods delta0 delta0.05",
            {"table": "ablation-delta", "out": Path("a.b"), "methods": ["delta0", "delta0.05"]},
        ),
        ("--methods delta0.05 --jobs 2 ablation-delta", {"table": "ablation-delta", "jobs": 2}),
        ("glyphs100 SOLVER.LR", {"options": ["SOLVER.LR"]}),
        (
            "cifar100 --launcher slurm --slurm timeout_min=60 a=b.c --dry-run --overwrite DATASET.ROOT x",
            {
                **{"launcher": "slurm", "slurm": ["timeout_min=60", "a=b.c"], "dry_run": True},
                **{"overwrite": True, "options": ["DATASET.ROOT", "x"]},
            },
        ),
        # in the order they were given, wherever the flags stand
        (
            "--jobs 2 glyphs100 SOLVER.LR 0.1 --pairs a SOLVER.LR 0.2 --methods kd SOLVER.LR 0.3 --dry-run",
            {
                **{"pairs": ["a"], "methods": ["kd"], "jobs": 2, "dry_run": True},
                **{"options": ["SOLVER.LR", "0.1", "SOLVER.LR", "0.2", "SOLVER.LR", "0.3"]},
            },
        ),
        # a value that is like a flag, and TABLE behind the pairs
        (
            "--pairs a DKD.ALPHA -inf EXPERIMENT.TAG --seeds glyphs100",
            {"table": "glyphs100", "pairs": ["a"], "options": ["DKD.ALPHA", "-inf", "EXPERIMENT.TAG", "--seeds"]},
        ),
        ("ablation-mask --base dkd --dataset cifar100", {"base": "dkd", "dataset": "cifar100", "slurm": ()}),
    ],
)
def test_the_words_of_a_table_go_where_they_belong(monkeypatch, words, expected):
    from deepkd_plugin.study.reproduce import command

    asked = []
    monkeypatch.setattr(command, "reproduce", lambda request: asked.append(request) or 1)
    assert cli.main(["reproduce", *words.split()]) == 1
    assert vars(asked[0]).items() >= expected.items()
    assert asked[0].command == f"deepkd reproduce {words}"


def test_a_table_is_made_by_one_process(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["reproduce", "glyphs100", "--dry-run"]) == 2
    assert "WORLD_SIZE is 2" in capsys.readouterr().err


def test_a_bare_command_shows_the_help(capsys):
    assert cli.main([]) == 0
    assert "\ncompare " in capsys.readouterr().out


def test_the_version(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"deepkd_plugin {deepkd_plugin.__version__}\n"


@pytest.fixture(scope="module")
def completion(tmp_path_factory):
    """The file of bash's completion script, made by the command."""
    pytest.importorskip("shtab")
    out = io.StringIO()
    with pytest.raises(SystemExit) as ended, contextlib.redirect_stdout(out):
        cli.main(["--print-completion", "bash"])
    assert ended.value.code == 0
    file = tmp_path_factory.mktemp("completion") / "deepkd.bash"
    file.write_text(out.getvalue())
    return file


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("re", {"reproduce", "report"}),
        ("--v", {"--version"}),
        ("train --r", {"--resume"}),
        ("eval --da", {"--dataset"}),
        ("detect-eval --", {"--help", "--cfg", "--ckpt", "--model"}),
        ("export --to ", {"safetensors", "onnx", "torch"}),
        ("distill --method deepkd", {"deepkd", "deepkd_dkd"}),
        ("predict stu", {"student_best"}),
        ("train --cfg stu", {"student_best"}),
    ],
)
def test_a_shell_completes_commands_flags_their_values_and_files(completion, tmp_path, words, offered):
    (tmp_path / "student_best").touch()
    line = ["deepkd", *words.split(" ")]
    code = (
        f"source {completion}; COMP_WORDS=({' '.join(word or chr(39) * 2 for word in line)}); "
        f"COMP_CWORD={len(line) - 1}; _shtab_deepkd; printf '%s\\n' ${{COMPREPLY[@]}}"
    )
    done = subprocess.run(["bash", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == offered


def test_zsh_s_script_and_completion_without_shtab(capsys, monkeypatch):
    with pytest.raises(SystemExit):
        cli.main(["--print-completion=zsh"])
    assert capsys.readouterr().out.startswith("#compdef deepkd\n")
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["--print-completion", "bash"]) == 2
    assert 'shtab, which is not installed: pip install "deepkd_plugin[completion]"' in capsys.readouterr().err
    assert cli.main(["--print-completion", "csh"]) == 2


def test_configs_lists_what_ships_and_each_is_found_from_anywhere(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["configs", "R34"]) == 0
    names = capsys.readouterr().out.split()
    assert len(names) == 21
    for name in names:
        assert Path(find_config(name)) == ROOT / "configs" / f"{name}.yaml"
    Path("mine.yaml").touch()
    assert find_config("mine.yaml") == "mine.yaml"
    assert find_config("nothing like it") == "nothing like it"


def test_keys_says_default_meaning_and_values_of_every_key(capsys):
    assert cli.main(["keys"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for key in (*config.all_keys(), *config.HOST_KEYS, *DETECTION_KEYS):
        assert key.meaning
        assert f"{key.path} = {key.default!r}: {key.meaning}. It must be {key.allowed}." in lines
    assert [line for line in lines if not re.fullmatch(r"[\w.]+ = .+: .+\. It must be .+\.", line)] == []
    assert cli.main(["keys", "REVIEWKD_WEIGHT"]) == 0
    assert capsys.readouterr().out == (
        "REVIEWKD.REVIEWKD_WEIGHT = 1.0: weight of the loss on features. It must be a number from 0 on.\n"
    )
    assert cli.main(["keys", "DISTILLER.TYPE"]) == 0
    assert ": the method; NONE trains the student alone. It must be one of NONE, KD, DKD" in capsys.readouterr().out
    assert cli.main(["keys", "mask.k"]) == 0
    assert capsys.readouterr().out.startswith("DeepKD.MASK.K = 0.5: ")


def test_networks_lists_zoos_and_libraries(capsys):
    assert cli.main(["networks", "resnet18"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "ResNet18 (imagenet)" in lines
    assert "torchvision:resnet18" in lines


def test_a_key_and_its_value_may_be_one_word():
    parser = Parser("tool")
    parser.add_pairs()
    args = parser.parse(["SOLVER.LR=0.1", "SOLVER.SEED", "3", "EXPERIMENT.TAG=a=b"])
    assert args.options == ["SOLVER.LR", "0.1", "SOLVER.SEED", "3", "EXPERIMENT.TAG", "a=b"]


SMALL = {
    "SOLVER": {"EPOCHS": 2, "LR": 0.01, "WARMUP_EPOCHS": 0},
    "DATASET": {"TRAIN_PER_CLASS": 2, "HOLDOUT": 0.02},
    "EXPERIMENT": {"NAME": "run"},
}


def test_train_from_python_and_from_the_command_are_one(tmp_path, data_root, capsys):
    small = SMALL | {"LOG": {"PREFIX": str(tmp_path)}}
    small["DATASET"] = small["DATASET"] | {"ROOT": str(data_root)}
    best, last, folder = deepkd_plugin.train("glyphs100/res20_res8/vanilla", **small)
    run = json.loads((folder / "run.json").read_text())
    assert (best, last) == (run["result"]["best"], run["result"]["last"])
    assert folder == tmp_path / "glyphs100/run"
    words = [f"{path}={value}" for path, value in config.flatten(small).items()]
    assert cli.main(["train", "--cfg", "glyphs100/res20_res8/vanilla", *words, "--overwrite"]) == 0
    again = json.loads((folder / "run.json").read_text())
    assert again["result"] == run["result"]
    assert again["command"].startswith("deepkd train --cfg ")
    with pytest.raises(UserError, match=r"SOLVER\.EPOCHS is 0"):
        deepkd_plugin.train("glyphs100/res20_res8/vanilla", SOLVER={"EPOCHS": 0})
