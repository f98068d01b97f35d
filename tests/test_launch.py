"""Whole runs through tools/train.py and tools/eval.py: what a user sees, and every mistake in one line."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.data import DataLoader

import deepkd_plugin
from deepkd_plugin import data, device, launch
from deepkd_plugin.commands import cli
from deepkd_plugin.commands import eval as evaluate
from deepkd_plugin.detection import evaluate as detection_evaluate
from deepkd_plugin.detection import launch as detection_launch
from deepkd_plugin.errors import UserError
from deepkd_plugin.hosts import registry
from deepkd_plugin.hosts.builtin.models import cifar_model_dict
from deepkd_plugin.launch import main
from deepkd_plugin.run import checkpoint, record
from deepkd_plugin.run.metrics import read_metrics
from deepkd_plugin.terminal import Stopped
from deepkd_plugin.trainer import DecoupledMomentumTrainer

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(
    p
    for name in ("glyphs100", "glyphs100_feature", "cifar100_cpu", "cifar100_res8")
    for p in (ROOT / "configs" / name).rglob("*.yaml")
)


def test_a_run_from_the_command_line(train, data_root):
    code, out, err = train("deepkd")
    assert code == 0, err
    lines = out.strip().splitlines()
    assert re.fullmatch(r"\S+: DeepKD on glyphs100, \d+ images, 2 epochs", lines[0])
    assert lines[1].startswith(
        f"by        deepkd_plugin {deepkd_plugin.__version__} in {ROOT / 'deepkd_plugin'}; CPU, 1 thread"
    )
    assert sum(bool(re.match(r"time      about \d\d:\d\d left, by the first ", line)) for line in lines) == 1
    epochs = [line for line in lines if line.startswith("epoch ")]
    assert [line.split()[1] for line in epochs] == ["1/2", "2/2"]
    assert max(map(len, epochs)) <= 80
    assert "gain      not known: no run of this student under another config is there yet" in lines
    assert any(line.startswith("teacher   resnet20 ") for line in lines)
    assert any(line.startswith("student   resnet8: best ") and " last " in line for line in lines)
    assert any(line.startswith("files     ") and str(train.folder) in line for line in lines)
    assert any(line.startswith(f"next      deepkd eval {train.folder}") for line in lines)
    run = json.loads((train.folder / "run.json").read_text())
    assert run["finished"]
    assert run["seed"] == 0
    assert run["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert len(run["teacher"]) == 16
    assert run["minutes"] > 0
    assert run["result"]["epochs"] == 2
    assert run["teacher_acc"] > 80
    resolved = yaml.safe_load((train.folder / "config.yaml").read_text())
    assert resolved["SOLVER"]["EPOCHS"] == 2
    assert resolved["DeepKD"]["BASE"] == "KD"
    records = read_metrics(train.folder)
    assert [r["top_k"] for r in records] == [50, 99]


def test_the_gain_over_the_runs_beside_it_that_are_alike(train, tmp_path):
    named = ("EXPERIMENT.NAME", "", "SOLVER.EPOCHS", "1")
    assert train("vanilla", *named)[0] == 0
    (folder,) = (tmp_path / "output" / "glyphs100").iterdir()
    record.note(folder, {"result": {"last": 200.0}})
    _, out, err = train("kd", *named)
    assert out, err
    (gain,) = re.findall(r"^gain      −(\d+\.\d\d) over vanilla \(last epoch, one run each; ", out, re.MULTILINE)
    last = re.search(r", last (\S+) %", out).group(1)
    assert float(gain) == pytest.approx(200 - float(last), abs=0.011), err
    assert "gain      not known" in train("dkd", *named, "SOLVER.SEED", "1")[1]


@pytest.mark.parametrize(("name", "first"), [("deepkd", "kd"), ("deepkd_dkd", "dkd"), ("kd", "dkd"), ("vanilla", "kd")])
def test_the_config_that_is_named_next_is_the_base_of_this_one(name, first):
    beside = launch._beside(str(ROOT / "configs" / "glyphs100" / "res20_res8" / f"{name}.yaml"))
    assert beside[0].stem == first


@pytest.mark.parametrize(
    ("option", "alike"),
    [
        (("DATASET.TRAIN_PER_CLASS", "5"), False),
        (("DATASET.HOLDOUT", "0.1"), False),
        (("DATASET.TEST.BATCH_SIZE", "10"), True),
        (("SOLVER.LR", "0.3"), True),
    ],
)
def test_a_gain_is_of_the_same_images(option, alike):
    file = str(ROOT / "configs" / "glyphs100" / "res20_res8" / "kd.yaml")
    ours, other = (launch.read_config(registry.find_host(), file, list(options))[0] for options in ((), option))
    assert (launch._shared(ours) == launch._shared(other)) == alike


def test_the_student_file_is_read_by_eval(train, data_root, capsys):
    assert train("vanilla")[0] == 0
    arguments = ["-m", "resnet8", "-c", str(train.folder / "student_latest"), "-d", "glyphs100", "--root"]
    assert evaluate.main([*arguments, str(data_root)]) == 0
    told = capsys.readouterr().out
    assert "resnet8 on glyphs100: top-1 " in told
    safe = str(train.folder / "student_latest.safetensors")
    assert evaluate.main([*arguments[:3], safe, *arguments[4:], str(data_root)]) == 0
    assert capsys.readouterr().out == told
    assert evaluate.main(["-m", "resnet9", "-d", "glyphs100", "--root", str(data_root)]) == 2
    assert "command line: -m is 'resnet9'; it must be one of" in capsys.readouterr().err
    assert evaluate.main(["-m", "resnet8", "-d", "glyphs100", "--root", str(data_root)]) == 2
    assert "-c names no file and the zoo has no weights of resnet8" in capsys.readouterr().err
    assert evaluate.main(["-m", "resnet8", "-c", str(train.folder / "best"), *arguments[4:], str(data_root)]) == 2
    assert "best: -c holds a trainer's state; use student_best, which is beside it" in capsys.readouterr().err
    held = checkpoint.load(train.folder / "student_latest", "test")
    for value, line in ((float("nan"), "holds NaN"), (1e38, "its network gives no finite numbers on glyphs100")):
        held["model"]["fc.weight"].fill_(value)
        checkpoint.save(held, train.folder / "student_latest")
        assert evaluate.main([*arguments, str(data_root)]) == 2
        out, err = capsys.readouterr()
        assert line in err
        assert "top-1" not in out


@pytest.mark.parametrize("flags", [[], ["--resume"]])
def test_one_process_of_several_is_refused(train, monkeypatch, flags):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "environment: WORLD_SIZE is 2 and RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is missing" in mistake(
        train, "vanilla", flags=flags
    )


def test_a_run_in_float16_and_micro_batches(train):
    options = ("SOLVER.ACCUMULATE", "4", "SOLVER.AMP", "float16", "SOLVER.CHECKPOINT_MINUTES", "30")
    code, _, err = train("deepkd", *options)
    assert code == 0, err
    assert {"scaler", "optimizer"} <= checkpoint.load(train.folder / "latest", "test").keys()


@pytest.mark.parametrize("asked", [True, False])
def test_all_cards_are_used_only_if_asked_for(train, monkeypatch, asked):
    seen = []
    monkeypatch.setattr(device, "parallel", lambda module, asked: seen.append(asked) or module)
    code, _, err = train("kd", "SOLVER.DATA_PARALLEL", str(asked))
    assert code == 0, err
    assert seen == [asked]


@pytest.mark.parametrize("file", CONFIGS, ids=lambda p: str(p.relative_to(ROOT / "configs")))
def test_every_config_trains_one_step(train, file, tmp_path, monkeypatch, cifar_root):
    monkeypatch.chdir(tmp_path)
    options = ["SOLVER.EPOCHS", "1", "SOLVER.WARMUP_EPOCHS", "0", "DATASET.TRAIN_PER_CLASS", "1"]
    config = yaml.safe_load(file.read_text())
    if config["DATASET"]["TYPE"] == "cifar100":
        options += ["DATASET.ROOT", str(cifar_root), "DATASET.HOLDOUT", "0.0"]
        if config["DISTILLER"]["TYPE"] != "NONE":
            options += ["DISTILLER.TEACHER_WEIGHTS", "builtin:glyphs100_resnet20"]
            options += ["DISTILLER.LOGITS_DIR", str(tmp_path)]
    options += ["EXPERIMENT.PROJECT", "glyphs100", "SOLVER.BATCH_SIZE", "100"]
    code, _, err = train(str(file), *options)
    assert code == 0, err
    (record,) = read_metrics(train.folder)
    assert record["train_loss"] > 0
    assert (train.folder / "student_latest").exists()


def mistake(train, config, *options, flags=()):
    """The one line that a mistake gets, with exit code 2 and nothing written."""
    code, out, err = train(config, *options, flags=flags)
    assert code == 2, err
    (line,) = err.strip().splitlines()
    assert line.startswith("deepkd: error: ")
    assert "Traceback" not in out + err
    assert not train.folder.exists()
    return line.removeprefix("deepkd: error: ")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("SOLVER.LERNING", "1"), "command line: unknown config key SOLVER.LERNING"),
        (("SOLVER.LR", "fast"), "command line: SOLVER.LR is 'fast' (str); it must be float"),
        (
            ("SOLVER.DECOUPLED.DELTA.TOG", "0.2"),
            "command line: SOLVER.DECOUPLED.DELTA.TOG is 0.2; it must be in",
        ),
        (
            ("DeepKD.MASK.TYPE", "static", "DeepKD.MASK.K", "100"),
            "command line: DeepKD.MASK.K: K must be an integer from 1 to 99",
        ),
        (("DeepKD.MASK.PHASES", "(0.6, 0.4)"), "command line: DeepKD.MASK.PHASES is (0.6, 0.4); it must be"),
        (
            ("SOLVER.DECOUPLED.WEIGHT_DECAY_STREAM", "kd"),
            "command line: SOLVER.DECOUPLED.WEIGHT_DECAY_STREAM is 'kd'; it must be one of variant, "
            "matched, tog, tcg, ncg",
        ),
        (
            ("DISTILLER.TYPE", "DeepKDD"),
            "command line: DISTILLER.TYPE is 'DeepKDD'; it must be one of NONE, KD",
        ),
        (("DISTILLER.STUDENT", "resnet9"), "command line: DISTILLER.STUDENT is 'resnet9'; it must be one of"),
        (
            ("SOLVER.TRAINER", "deepkd"),
            "command line: SOLVER.TRAINER is 'deepkd'; it must be one of base, Dec",
        ),
        (("DATASET.TYPE", "cifar1000"), "DATASET.TYPE is 'cifar1000'; it must be one of cifar100, glyphs100"),
        (("DATASET.TYPE", "glyph100"), "package.module:function; did you mean glyphs100?"),
        (("DISTILLER.TYPE", "deepkd"), ", DeepKD; did you mean DeepKD?"),
        (("DISTILLER.STUDENT", "resnt8"), "package.module:constructor; did you mean resnet8?"),
        (("DISTILLER.TEACHER_WEIGHTS", "builtin:glyphs_resnet20"), "; did you mean builtin:glyphs100_resnet20?"),
        (
            ("DISTILLER.TEACHER_WEIGHTS", "none.pt"),
            "none.pt: no such file; DISTILLER.TEACHER_WEIGHTS must name",
        ),
        (
            ("DISTILLER.TEACHER", "resnet14"),
            "DISTILLER.TEACHER_WEIGHTS holds another network than resnet14: 0 of its",
        ),
        (
            ("DISTILLER.TEACHER_WEIGHTS", "", "DISTILLER.TEACHER", "resnet8"),
            "DISTILLER.TEACHER_WEIGHTS names no file and the zoo has no weights of resnet8",
        ),
        (
            ("DISTILLER.TEACHER_WEIGHTS", "", "DISTILLER.TEACHER", "resnet56"),
            "resnet56_vanilla/ckpt_epoch_240.pth: no such file",
        ),
    ],
)
def test_mistakes_in_one_line(train, options, expected):
    assert expected in mistake(train, "deepkd", *options)


@pytest.mark.parametrize("command", ["train", "eval", "detect", "detect-eval"])
@pytest.mark.parametrize("weights", ["builtin:nope", "builtin:none", "nowhere.pt"])
def test_weights_that_are_not_there_are_found_before_images_are_read(command, weights, tmp_path, monkeypatch, capsys):
    """Of classifiers and of detectors; builtin: says what ships."""
    for place in (data, detection_launch, detection_evaluate):
        for reader in ("get_dataset", "get_test_set", "get_detection_sets"):
            monkeypatch.setattr(place, reader, None, raising=False)
    monkeypatch.chdir(tmp_path)
    pair = "detection/glyph_canvas/res20_res8/kd" if "detect" in command else "glyphs100/res20_res8/kd"
    how = {
        "eval": ["-m", "resnet8", "-d", "glyphs100", "-c", weights],
        "detect-eval": ["--cfg", pair, "--ckpt", weights],
    }.get(command, ["--cfg", pair, "DISTILLER.TEACHER_WEIGHTS", weights])
    assert cli.main([command, *how]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    ours = "do not ship with the package; these do: builtin:glyph_canvas_resnet20, builtin:glyphs100_resnet20"
    assert (ours if "builtin" in weights else "nowhere.pt: no such file") in err
    assert list(tmp_path.iterdir()) == []


def test_data_that_is_missing(train, tmp_path):
    for name, expected in (("cifar100", "holds no CIFAR-100"), ("imagenet", "holds no ImageNet")):
        line = mistake(
            train, "vanilla", "DATASET.TYPE", name, "DATASET.ROOT", str(tmp_path / "empty"),
            "DISTILLER.STUDENT", "ResNet18" if name == "imagenet" else "resnet8",
        )  # fmt: skip
        assert str(tmp_path / "empty") in line
        assert expected in line


def test_a_label_outside_the_classes(train, cifar_root, tmp_path):
    folder = tmp_path / "bad" / "cifar-100-python"
    folder.mkdir(parents=True)
    held = pickle.loads((cifar_root / "cifar-100-python" / "train").read_bytes())
    held["fine_labels"][7] = 100
    (folder / "train").write_bytes(pickle.dumps(held))
    line = mistake(train, "vanilla", "DATASET.TYPE", "cifar100", "DATASET.ROOT", str(tmp_path / "bad"))
    assert line == (
        f"DATASET.ROOT {tmp_path / 'bad'}: cifar100, train: label 100 of image 7 is outside the classes; labels must "
        f"be in 0 … 99"
    )


def test_a_teacher_of_other_classes_or_none_at_all(train, tmp_path):
    ten = tmp_path / "ten.pt"
    torch.save({"model": cifar_model_dict["resnet20"][0](num_classes=10).state_dict()}, ten)
    line = mistake(train, "deepkd", "DISTILLER.TEACHER_WEIGHTS", str(ten))
    assert line == f"{ten}: DISTILLER.TEACHER_WEIGHTS holds a resnet20 of 10 classes; this run has 100"
    fresh = tmp_path / "fresh.pt"
    torch.save(cifar_model_dict["resnet20"][0](num_classes=100).state_dict(), fresh)
    line = mistake(train, "deepkd", "DISTILLER.TEACHER_WEIGHTS", str(fresh))
    assert "command line: the teacher resnet20 from DISTILLER.TEACHER_WEIGHTS is at chance on glyphs100" in line


def test_a_diverging_run_stops_in_one_line(train):
    code, _, err = train("vanilla", "SOLVER.LR", "1e30", "SOLVER.EPOCHS", "3", "SOLVER.WARMUP_EPOCHS", "0")
    assert code == 2
    (line,) = err.strip().splitlines()[-1:]
    assert "loss 'task' became" in line
    assert "lower SOLVER.LR" in line
    assert not (train.folder / "latest").exists()
    assert not list(train.folder.glob("*.tmp"))


def test_a_run_is_neither_overwritten_nor_resumed_by_accident(train):
    assert "--resume finds no checkpoint" in mistake(train, "vanilla", flags=["--resume"])
    assert train("vanilla")[0] == 0
    before = (train.folder / "metrics.jsonl").read_text()
    code, _, err = train("vanilla")
    assert code == 2
    assert "holds a run already; go on with --resume, start again with --overwrite (deep" in err
    assert (train.folder / "metrics.jsonl").read_text() == before
    code, _, err = train("vanilla", "SOLVER.MOMENTUM", "0.8", flags=["--resume"])
    assert code == 2
    assert "--resume needs the run's own config: SOLVER.MOMENTUM was 0.9, is 0.8" in err
    assert (train.folder / "metrics.jsonl").read_text() == before
    assert train("vanilla", "SOLVER.LR", "0.01", flags=["--overwrite"])[0] == 0
    assert (train.folder / "metrics.jsonl").read_text() != before


def test_a_finished_run_is_not_resumed(train):
    assert train("vanilla")[0] == 0
    before = (train.folder / "run.json").read_text()
    code, _, err = train("vanilla", flags=["--resume"])
    assert code == 2
    assert "--resume finds all 2 epochs done" in err
    assert (train.folder / "run.json").read_text() == before


def test_starting_again_leaves_nothing_of_the_run_before(train):
    assert train("vanilla", "LOG.SAVE_CHECKPOINT_FREQ", "1")[0] == 0
    (train.folder / ".latest.1.tmp").write_bytes(b"half")
    assert train("vanilla", "SOLVER.EPOCHS", "1", "SOLVER.WARMUP_EPOCHS", "0", flags=["--overwrite"])[0] == 0
    names = {p.name for p in train.folder.iterdir()}
    assert not names & {"epoch_1", "epoch_2", "student_1", "student_2", ".latest.1.tmp"}
    assert len(list((train.folder / "train.events").iterdir())) == 1


def test_the_command_line(train, capsys):
    assert main([]) == 2
    assert capsys.readouterr().err == (
        "deepkd: error: command line: the following arguments are required: --cfg; see tools/train.py --help\n"
    )
    assert main(["--cfg", "x.yaml", "--resume", "--overwrite"]) == 2
    assert "not allowed with argument" in capsys.readouterr().err
    line = mistake(train, "vanilla", "SOLVER.DECOUPLED.DELTA.TCG", "-7.5e-1", "SOLVER.MOMENTUM", "0.5")
    assert "SOLVER.DECOUPLED.DELTA.TCG is -0.75; it must be in [-0.5, 0.5)" in line


def test_a_folder_that_cannot_be_made(train, tmp_path):
    (tmp_path / "file").write_text("")
    line = mistake(train, "vanilla", "LOG.PREFIX", str(tmp_path / "file"))
    assert "must be a folder that can be written; LOG.PREFIX, --out or --to names it" in line


def test_losses_without_a_stream_are_found_before_anything_is_written(train):
    options = ("SOLVER.TRAINER", "DecoupledMomentumSGD", "SOLVER.DECOUPLED.DELTA.TOG", "0.05")
    assert "SOLVER.DECOUPLED.LOSS_STREAMS: loss 'loss_ce' belongs to no stream" in mistake(train, "kd", *options)


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (KeyboardInterrupt(143), 143)])
def test_an_interruption_before_training_is_one_line(train, monkeypatch, error, code):
    def stop(*args):
        raise error

    monkeypatch.setattr(launch, "measure_teacher", stop)
    got, _, err = train("deepkd")
    assert (got, err) == (code, "deepkd: interrupted; the same command starts again\n")
    assert not train.folder.exists()


@pytest.mark.slow
def test_augmented_images_from_workers_resume_bitwise(train, monkeypatch):
    """The real pipeline: drawn in two worker processes, interrupted inside an epoch."""
    options = ("DATASET.NUM_WORKERS", "2", "SOLVER.EPOCHS", "3")
    assert train("deepkd", *options, "EXPERIMENT.NAME", "whole")[0] == 0
    original = DecoupledMomentumTrainer.losses_by_stream
    calls = []

    def stop(self, losses):
        calls.append(1)
        if len(calls) == 8:  # 1 rehearsal and 4 steps an epoch: the third step of epoch 2
            raise KeyboardInterrupt
        return original(self, losses)

    with monkeypatch.context() as patch:
        patch.setattr(DecoupledMomentumTrainer, "losses_by_stream", stop)
        code, _, err = train("deepkd", *options)
        assert (code, "interrupted in epoch 2" in err) == (130, True)
    assert train("deepkd", *options, flags=["--resume"])[0] == 0
    ends = [checkpoint.load(train.folder.parent / n / "student_latest", "test")["model"] for n in ("whole", "run")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_options_are_a_hash_in_the_name_of_the_folder_and_whole_in_config_yaml(train):
    """More of them than a name could hold."""
    given = {"EXPERIMENT.NAME": "", "SOLVER.LR": "0.2", "SOLVER.EPOCHS": "1", "SOLVER.WARMUP_EPOCHS": "0"}
    given |= {"SOLVER.BATCH_SIZE": "20", "SOLVER.MOMENTUM": "0.8", "SOLVER.WEIGHT_DECAY": "1e-3", "SOLVER.SEED": "3"}
    given |= {"SOLVER.LR_SCHEDULE": "step", "SOLVER.LR_DECAY_RATE": "0.2", "SOLVER.LR_DECAY_STAGES": "[1]"}
    given |= {"SOLVER.EXECUTION": "eager", "SOLVER.DATA_PARALLEL": "False", "SOLVER.CHANNELS_LAST": "False"}
    given |= {"DATASET.NUM_WORKERS": "0", "DATASET.PIPELINE": "workers", "DATASET.TEST.BATCH_SIZE": "100"}
    pairs = [word for pair in given.items() for word in pair]
    code, _, err = train("vanilla", *pairs)
    assert code == 0, err
    (folder,) = train.folder.parent.iterdir()
    assert re.fullmatch(r"vanilla_res20_res8-[0-9a-f]{8}", folder.name)
    held = yaml.safe_load((folder / "config.yaml").read_text())["SOLVER"]
    assert (held["LR"], held["WEIGHT_DECAY"], held["SEED"]) == (0.2, 1e-3, 3)
    # in another order, written otherwise, and with a key that does not compute
    words = [word for pair in reversed(given.items()) for word in pair]
    words[words.index("0.2")], words[words.index("workers")] = "2e-1", "auto"
    code, _, err = train("vanilla", *words, "LOG.SAVE_CHECKPOINT_FREQ", "7")
    assert code == 2
    assert f"{folder}: holds a run already" in err


def named(tmp_path, tag, *options, name=""):
    """The folder of a run of a config with this TAG, below LOG.PREFIX."""
    file = tmp_path / "named.yaml"
    file.write_text(yaml.safe_dump({"EXPERIMENT": {"PROJECT": "p", "TAG": tag, "NAME": name}}))
    options = ["DISTILLER.TYPE", "NONE", "DISTILLER.STUDENT", "resnet8", *options]
    return launch.experiment_name(launch.read_config(registry.BUILTIN, str(file), options)[0], options[4:])


def test_names_of_folders(tmp_path):
    assert named(tmp_path, "kd,a,b") == named(tmp_path, "kd,a,b", "EXPERIMENT.PROJECT", "p") == "p/kd,a,b"
    assert named(tmp_path, "kd", "SOLVER.LR", "0.2", name="mine") == "p/mine"
    options = ("SOLVER.SEED", "1", "DISTILLER.STUDENT_WEIGHTS", "/a b/学生:1,2.pt")
    one = named(tmp_path, "学生: a/b,c d", *options)
    assert re.fullmatch(r"p/学生_a/b_c_d-[0-9a-f]{8}", one)
    others = {named(tmp_path, tag, *options) for tag in ("学生: a/b,c_d", "学生: a/b,c,d")}
    others |= {named(tmp_path, "学生: a/b,c d", *options[:2], "DISTILLER.STUDENT_WEIGHTS", "/a b/学生:1,3.pt"), one}
    assert len(others) == 4
    long = named(tmp_path, "生" * 85, *options)
    assert len(long.removeprefix("p/").encode()) == 255
    assert set(long[2:-9]) == {"生"}
    (tmp_path / long).mkdir(parents=True)


def start(data_root, output, *flags):
    command = [
        sys.executable, str(ROOT / "tools/train.py"), "--cfg",
        str(ROOT / "configs/glyphs100/res20_res8/deepkd.yaml"), *flags, "DATASET.ROOT", str(data_root),
        "LOG.PREFIX", str(output), "EXPERIMENT.NAME", "run", "DATASET.TRAIN_PER_CLASS", "2",
        "DATASET.HOLDOUT", "0.02", "SOLVER.EPOCHS", "500",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_an_interrupted_run_keeps_its_last_checkpoint_and_says_how_to_go_on(data_root, tmp_path, number, code):
    folder = tmp_path / "glyphs100" / "run"
    run = start(data_root, tmp_path)
    deadline = time.monotonic() + 300  # a busy machine takes its time
    while len(read_metrics(folder)) < 3 and time.monotonic() < deadline and run.poll() is None:
        time.sleep(0.05)
    run.send_signal(number)
    _, err = run.communicate(timeout=30)
    assert run.returncode == code, err
    line = err.strip().splitlines()[-1]
    assert "interrupted in epoch" in line
    assert f"{folder / 'latest'} (epoch " in line
    assert line.endswith("--resume")
    assert "Traceback" not in err
    state = checkpoint.load(folder / "latest", "test")
    assert f"(epoch {state['epoch']})" in line
    assert not list(folder.glob(".*tmp"))
    done = len(read_metrics(folder))
    assert state["epoch"] == done
    resumed = start(data_root, tmp_path, "--resume")
    deadline = time.monotonic() + 60
    while len(read_metrics(folder)) < done + 2 and time.monotonic() < deadline and resumed.poll() is None:
        time.sleep(0.05)
    resumed.send_signal(signal.SIGTERM)
    resumed.communicate(timeout=30)
    epochs = [record["epoch"] for record in read_metrics(folder)]
    assert epochs == list(range(1, len(epochs) + 1))
    assert len(epochs) > state["epoch"]
    assert len(json.loads((folder / "run.json").read_text())["resumed"]) == 1


class Interrupted:
    """What `launch.run` needs of a trainer, whose loader is at work when its training ends by an error."""

    epoch, has_checkpoint = 0, False

    def __init__(self, error):
        self.error = error

    def train(self, *_):
        self.batches = iter(DataLoader(range(8), num_workers=1))
        next(self.batches)
        raise self.error

    def resume_point(self):
        return "Nothing is left."


@pytest.mark.parametrize("error", [KeyboardInterrupt(), UserError("the images are gone")])
def test_a_loader_s_process_that_ends_after_its_run_raises_nothing(error):
    """torchrun ends all processes of a group at once, and a loader's may be the last to go."""
    before = signal.getsignal(signal.SIGCHLD)
    trainer = Interrupted(error)
    try:
        with pytest.raises((Stopped, UserError)):
            launch.run(trainer, False, False, "train")
        (worker,) = trainer.batches._workers
        os.kill(worker.pid, signal.SIGKILL)
        worker.join(60)
        time.sleep(0.1)  # a signal that is waiting is handled now
        assert worker.exitcode == -signal.SIGKILL
    finally:
        signal.signal(signal.SIGCHLD, before)
