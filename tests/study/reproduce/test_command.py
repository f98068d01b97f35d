"""`deepkd reproduce`: what it shows, what it starts, how it ends. Nothing is trained here."""

import importlib.util
import json
import shutil
import signal
import sys
import types

import pytest

from deepkd_plugin import device
from deepkd_plugin.commands import cli
from deepkd_plugin.config.shipped import shipped
from deepkd_plugin.errors import UserError
from deepkd_plugin.run import lock, record
from deepkd_plugin.study.kinds.classification import Classification
from deepkd_plugin.study.reproduce import command, display, runs, slurm
from deepkd_plugin.study.reproduce.runs import Failure

GLYPHS = ["reproduce", "glyphs100", "--methods", "kd", "deepkd", "--seeds", "2"]


class Calls:
    """What was executed, submitted and reported, and what that is to answer."""

    def __init__(self):
        self.executed, self.submitted, self.reported = [], [], []
        self.fail = ()
        self.interruption = None

    def execute(self, planned, jobs, *, overwrite, display, together):
        self.executed.append((tuple(planned), jobs, overwrite))
        self.together = together
        if self.interruption:
            raise self.interruption
        return [Failure(run, 1, 3, ("first line", "last line")) for run in planned if run.name in self.fail]

    def submit(self, planned, folder, parameters, *, overwrite):
        self.submitted.append((tuple(planned), folder, dict(parameters), overwrite))
        return [f"7_{number}" for number, _ in enumerate(planned)]

    def report(self, folder):
        self.reported.append(folder)
        return [folder / "report.md", folder / "report.html"]


@pytest.fixture
def calls(monkeypatch, tmp_path, data_root):
    made = Calls()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "execute", made.execute)
    monkeypatch.setattr(slurm, "submit", made.submit)
    # the real one needs scipy
    module = types.ModuleType("deepkd_plugin.study.report")
    module.report = made.report
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(Classification, "seconds", lambda kind, cfgs, threads, runs: [100.0 for _ in cfgs])
    monkeypatch.setattr(device, "count", lambda: 0)
    return made


@pytest.fixture
def reproduce(calls, capsys, data_root):
    """reproduce(words…) -> (exit code, stdout, stderr); glyphs100 is drawn already."""

    def run(*words):
        code = cli.main([*words, "DATASET.ROOT", str(data_root)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def finish(run, minutes=1.0, **entries):
    run.folder.mkdir(parents=True)
    held = {"finished": True, "code": record.code_hash(), "config_hash": run.hash, "minutes": minutes}
    (run.folder / "run.json").write_text(json.dumps(held | entries))


def entry(out, name):
    """What the plan says under a name, its lines joined."""
    lines = out.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith(f"{name:<10}"))
    text = [lines[first]]
    for line in lines[first + 1 :]:
        if not line.startswith(" " * 10):
            break
        text.append(line)
    return " ".join(line[10:] for line in text)


def test_the_plan_fits_the_terminal(reproduce, monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    code, out, _ = reproduce("reproduce", "glyphs100", "--dry-run", "--methods", "kd", "deepkd")
    plan = [line for line in out.splitlines() if line.startswith(("time ", " " * 10))]
    assert (code, len(plan) > 1, max(map(len, plan)) <= 70) == (0, True, True)


def test_all_of_it(reproduce, calls, tmp_path):
    code, out, err = reproduce(*GLYPHS, "--jobs", "3", "SOLVER.EPOCHS", "4")
    assert (code, err) == (0, "")
    ((planned, jobs, overwrite),) = calls.executed
    assert ([run.name for run in planned], jobs, overwrite) == (
        [f"res20_res8 {method} seed {seed}" for method in ("kd", "deepkd") for seed in (0, 1)],
        3,
        False,
    )
    assert planned[0].folder.parents[3] == tmp_path / "output" / "glyphs100"
    held = json.loads((tmp_path / "output" / "glyphs100" / "table.json").read_text())
    assert [run["hash"] for run in held["runs"]] == [run.hash for run in planned]
    assert [str(folder) for folder in calls.reported] == ["output/glyphs100"]
    assert entry(out, "table") == "glyphs100, top-1 (%): 1 pair × 2 methods × 2 seeds = 4 runs"
    assert entry(out, "pairs") == "res20_res8"
    assert entry(out, "methods") == "kd deepkd"
    assert entry(out, "runs") == "4 new"
    assert entry(out, "protocol") == "4 epochs in batches of 64 images"
    assert entry(out, "options").startswith("SOLVER.EPOCHS 4 DATASET.ROOT ")
    assert entry(out, "on").endswith(" cores; 3 at a time")
    assert entry(out, "time").startswith("about ")
    assert entry(out, "folder") == "output/glyphs100"
    assert entry(out, "done") == "4 of 4 runs are finished"
    assert entry(out, "report") == "output/glyphs100/report.md, output/glyphs100/report.html"
    assert "earlier" not in out


def test_a_dry_run_starts_and_writes_nothing(reproduce, calls, tmp_path):
    code, out, err = reproduce(*GLYPHS, "--dry-run")
    assert (code, err) == (0, "")
    assert entry(out, "runs") == "4 new"
    assert (calls.executed, calls.reported, list(tmp_path.iterdir())) == ([], [], [])
    code, out, err = reproduce("reproduce", "cifar100", "--pairs", "res56_res20", "--dry-run")
    assert (code, err) == (0, "")  # planned on another machine than the one that has the files
    missing = " ".join(out[out.index("missing ") :].split()).split("missing ")[1:]
    assert len(missing) == 2
    assert "no CIFAR-100" in missing[0]
    assert "TEACHER_WEIGHTS" in missing[1]
    assert entry(out, "protocol") == (
        "240 epochs in batches of 64 images (kd dkd crld deepkd deepkd_dkd deepkd_crld deepkd_nomask "
        "deepkd_dkd_nomask deepkd_crld_nomask); 480 epochs in batches of 64 images (mlkd deepkd_mlkd "
        "deepkd_mlkd_nomask)"
    )
    assert entry(out, "on request") == "rld wttm deepkd_rld deepkd_wttm dist (by --methods)"
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_stops_a_table_before_its_plan(reproduce, calls, tmp_path):
    code, out, err = reproduce("reproduce", "cifar100", "--pairs", "res56_res20")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "DATASET.ROOT holds no CIFAR-100; " in err
    assert "; DISTILLER.TEACHER_WEIGHTS: files of teachers are missing: " in err
    assert (calls.executed, list(tmp_path.iterdir())) == ([], [])


def test_a_login_is_asked_for_before_the_first_run(reproduce, calls, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(run=None, api=types.SimpleNamespace(api_key=None)))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.delenv("WANDB_MODE", raising=False)
    code, _, err = reproduce(*GLYPHS, "LOG.WANDB", "True")
    assert (code, "nobody is logged in" in err, err.count("\n")) == (2, True, 1)
    assert not calls.executed


def test_runs_that_failed_are_told_and_the_report_is_made(reproduce, calls, data_root):
    calls.fail = ("res20_res8 deepkd seed 1",)
    code, out, err = reproduce(*GLYPHS)
    assert code == 1
    assert err.startswith("res20_res8 deepkd seed 1 failed 3 times (exit code 1), log ")
    assert err.endswith("/log.txt:\n    first line\n    last line\n")
    assert entry(out, "done") == "3 of 4 runs are finished"
    again = f"deepkd {' '.join(GLYPHS)} DATASET.ROOT {data_root}"
    assert entry(out, "again") == f"the same command tries the others again: {again}"
    assert entry(out, "report").endswith("report.html")


@pytest.mark.parametrize(("arguments", "code"), [((), 130), ((128 + signal.SIGTERM,), 143)])
def test_an_interruption_says_how_to_go_on(reproduce, calls, data_root, arguments, code):
    calls.interruption = KeyboardInterrupt(*arguments)
    ended, _, err = reproduce(*GLYPHS)
    assert ended == code
    again = f"deepkd {' '.join(GLYPHS)} DATASET.ROOT {data_root}"
    assert err == f"deepkd: interrupted; what is finished stays, and the same command goes on: {again}\n"
    assert calls.reported == []


def test_a_second_call_goes_on(reproduce, calls):
    reproduce(*GLYPHS)
    first, second, third, _ = calls.executed[0][0]
    finish(first, 2.0)
    finish(second, 4.0)
    finish(third, finished=False)
    (third.folder / "latest").touch()
    (third.folder / "metrics.jsonl").write_text('{"epoch": 1}\n' * 6)  # of 12
    code, out, _ = reproduce(*GLYPHS)
    assert code == 0
    assert entry(out, "runs") == "2 finished, 1 to go on with, 1 new"
    assert "2 by their networks' passes over noise, timed here" in entry(out, "time")
    assert calls.executed[1] == calls.executed[0]  # what is finished, execute sees for itself


def test_a_finished_table_needs_neither_data_nor_an_estimate(reproduce, calls, capsys, monkeypatch):
    reproduce(*GLYPHS)
    for run in calls.executed[0][0]:
        finish(run)
    monkeypatch.setattr(Classification, "seconds", None)
    code, out, err = reproduce(*GLYPHS)
    assert (code, err) == (0, "")
    assert entry(out, "runs") == "4 finished"
    assert "\ntime " not in out
    assert entry(out, "done") == "4 of 4 runs are finished"


def test_runs_of_earlier_calls_under_other_options_are_told(reproduce, calls, tmp_path):
    reproduce(*GLYPHS)
    before = (tmp_path / "output" / "glyphs100" / "table.json").read_text()
    code, _, err = reproduce(*GLYPHS, "SOLVER.EPOCHS", "2")
    assert (code, err.count("\n"), len(calls.executed)) == (2, 1, 1)
    assert "4 runs of earlier calls had other options or config files, and would leave the table" in err
    assert (tmp_path / "output" / "glyphs100" / "table.json").read_text() == before
    _, out, _ = reproduce(*GLYPHS, "--overwrite", "SOLVER.EPOCHS", "2")
    assert entry(out, "earlier").startswith("4 runs of earlier calls had other options or config ")
    held = json.loads((tmp_path / "output" / "glyphs100" / "table.json").read_text())
    assert {run["epochs"] for run in held["runs"]} == {2}


def test_runs_of_other_code_are_refused_or_made_anew(reproduce, calls):
    reproduce(*GLYPHS)
    finish(calls.executed[0][0][0], code="0" * 16)
    code, _, err = reproduce(*GLYPHS)
    assert (code, err.count("\n"), len(calls.executed)) == (2, 1, 1)
    assert "was made by other code" in err
    code, out, _ = reproduce(*GLYPHS, "--overwrite")
    assert (code, entry(out, "runs")) == (0, "4 new")
    assert calls.executed[1][2] is True


def test_runs_of_another_teacher_are_refused_before_anything_is_trained_or_made_anew(reproduce, calls, tmp_path):
    from deepkd_plugin.hosts.networks import trained_network
    from deepkd_plugin.hosts.registry import BUILTIN
    from deepkd_plugin.run import checkpoint

    name = "builtin:glyphs100_resnet20"
    network = trained_network(BUILTIN, "glyphs100", "resnet20", 100, name, "a test")
    reproduce(*GLYPHS)
    first = calls.executed[0][0][0]
    finish(first, teacher=checkpoint.fingerprint(network))
    code, out, _ = reproduce(*GLYPHS)
    assert (code, entry(out, "runs")) == (0, "1 finished, 3 new")
    network.fc.bias.data += 1.0
    checkpoint.save({"model": network.state_dict()}, tmp_path / "other.pt")
    words = ("DISTILLER.TEACHER_WEIGHTS", str(tmp_path / "other.pt"))
    code, _, err = reproduce(*GLYPHS, *words)
    assert (code, err.count("\n"), len(calls.executed)) == (2, 1, 2)
    assert f"{first.folder}: the run there was taught by another teacher (its weights were " in err
    assert "--overwrite, which makes such runs anew" in err
    code, out, _ = reproduce(*GLYPHS, "--overwrite", *words)
    assert (code, entry(out, "runs")) == (0, "4 new")
    # the same weights in another file are the same teacher
    network.fc.bias.data -= 1.0
    finish_again = json.loads((first.folder / "run.json").read_text())
    finish_again["teacher"] = checkpoint.fingerprint(network)
    (first.folder / "run.json").write_text(json.dumps(finish_again))
    checkpoint.save({"model": network.state_dict()}, tmp_path / "other.pt")
    assert entry(reproduce(*GLYPHS, *words)[1], "runs") == "1 finished, 3 new"


def test_a_gain_without_its_base_is_warned_of(reproduce, calls):
    words = ["reproduce", "glyphs100", "--seeds", "1", "--methods"]
    _, out, _ = reproduce(*words, "deepkd", "deepkd_dkd", "dkd", "vanilla")
    assert entry(out, "warning") == (
        "kd, the base of deepkd, is not asked for and has no runs in the table: there will be no gain over it"
    )
    _, out, _ = reproduce(*words, "kd")
    assert "warning" not in out
    _, out, _ = reproduce(*words, "deepkd")
    assert "warning" not in out  # the call before has it


def test_matched_bases_come_with_what_is_over_them(reproduce, calls):
    code, out, _ = reproduce("reproduce", "glyphs100", "--methods", "kd", "deepkd", "--seeds", "1", "--matched")
    assert code == 0
    assert entry(out, "methods") == "kd kd_matched deepkd"
    assert "warning" not in out
    ((planned, *_),) = calls.executed
    assert [run.method for run in planned] == ["kd", "kd_matched", "deepkd"]


def test_deepkd_over_a_method_without_a_row_is_warned_of(reproduce, calls, tmp_path):
    """A folder of a user's own, with DeepKD over DKD, which no file of it trains by itself."""
    folder = tmp_path / "mine"
    (folder / "a_b").mkdir(parents=True)
    for name in ("kd", "deepkd_dkd"):
        shutil.copy(shipped("configs") / "glyphs100" / "res20_res8" / f"{name}.yaml", folder / "a_b")
    code, out, err = reproduce("reproduce", str(folder), "--seeds", "1")
    assert (code, err) == (0, "")
    assert entry(out, "table").startswith("mine, top-1 (%): 1 pair × 2 methods × 1 seed = 2 runs")
    assert entry(out, "warning") == (
        "DKD, the base of deepkd_dkd, has no row of its own in the table: there will be no gain over it"
    )
    assert entry(out, "folder") == "output/mine"
    table = json.loads((tmp_path / "output" / "mine" / "table.json").read_text())
    assert {row["name"]: row["base"] for row in table["methods"]} == {"kd": None, "deepkd_dkd": None}
    assert table["runs"][0]["config"] == f"{folder}/a_b/kd.yaml"


def test_a_gsnr_window_that_never_fills_is_refused(reproduce, calls):
    code, _, err = reproduce(*GLYPHS, "SOLVER.EPOCHS", "2", "GSNR.MEASURE", "True")
    assert (code, err.count("\n"), calls.executed) == (2, 1, [])
    assert err.startswith(
        "deepkd: error: glyphs100, res20_res8 kd: GSNR.EVERY x GSNR.WINDOW is 200 x 10 = 2000 iterations; it must be "
        "at most 188, "
    )


def test_two_commands_in_one_folder(reproduce, calls, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "PATIENCE", 0.0)
    with lock.locked(tmp_path / "output" / "glyphs100"):
        code, _, err = reproduce(*GLYPHS)
    assert (code, err.count("\n"), calls.executed) == (2, 1, [])
    assert str(tmp_path / "output" / "glyphs100") in err or "output/glyphs100" in err


def test_jobs_are_the_gpus_unless_given(reproduce, calls, monkeypatch):
    monkeypatch.setattr(device, "count", lambda: 4)
    monkeypatch.setattr(device, "describe", lambda at: "NVIDIA H200")
    _, out, _ = reproduce(*GLYPHS)
    assert entry(out, "on") == "4 x NVIDIA H200; 4 at a time"
    monkeypatch.setattr(device, "count", lambda: 0)
    reproduce(*GLYPHS)
    assert [jobs for _, jobs, _ in calls.executed] == [4, 1]


def test_out_and_the_rows_of_an_ablation(reproduce, calls, tmp_path):
    words = "reproduce ablation-delta --base dkd --methods delta0.05 delta0 --seeds 1 --out there"
    code, out, _ = reproduce(*words.split())
    assert code == 0
    ((planned, _, _),) = calls.executed
    assert [run.name for run in planned] == ["res20_res8 delta0 seed 0", "res20_res8 delta0.05 seed 0"]
    assert {run.config.name for run in planned} == {"deepkd_dkd.yaml"}
    assert entry(out, "table").startswith("ablation-delta over dkd on glyphs100, top-1 (%): 1 pair")
    assert (tmp_path / "there" / "table.json").exists()


def test_an_ablation_of_many_pairs_asks_for_some(reproduce, calls):
    code, _, err = reproduce("reproduce", "ablation-mask", "--dataset", "tiny_imagenet")
    assert code == 2
    assert err == (
        "deepkd: error: command line: --pairs is missing; ablation-mask over kd on tiny_imagenet must name some of "
        "r18_mv2, r18_shuv2\n"
    )


def test_runs_on_several_gpus_each(reproduce, calls, monkeypatch):
    monkeypatch.setattr(device, "count", lambda: 9)
    code, out, err = reproduce(*GLYPHS, "--gpus-per-run", "2")
    assert (code, err) == (0, "")
    ((_, jobs, _),) = calls.executed
    assert (jobs, calls.together) == (4, 2)
    assert entry(out, "on").startswith("9 x ")
    assert entry(out, "on").endswith("; 4 at a time, each on 2 GPUs")
    # 4 runs of 100 s on one GPU, side by side
    assert entry(out, "time").startswith("about 50 seconds; ")
    assert entry(out, "time").endswith(", each on GPUs of its own, as if 2 GPUs were 2 times as fast as one")
    hashes = [run.hash for run in calls.executed[0][0]]
    reproduce(*GLYPHS)
    assert [run.hash for run in calls.executed[1][0]] == hashes
    assert calls.together == 1


@pytest.mark.parametrize(
    ("count", "words", "line"),
    [
        (0, "--gpus-per-run 1", "command line: --gpus-per-run is 1; it must be at most 0, the GPUs here"),
        (2, "--gpus-per-run 4", "command line: --gpus-per-run is 4; it must be at most 2, the GPUs here"),
        (2, "--gpus-per-run 2 SOLVER.BATCH_SIZE 1", "SOLVER.BATCH_SIZE is 1; it must be at least 2, an image for each"),
        (2, "--gpus-per-run 2 SOLVER.DATA_PARALLEL True", "SOLVER.DATA_PARALLEL is True; it must be False with 2 proc"),
    ],
)
def test_runs_that_cannot_have_several_gpus_are_refused(reproduce, calls, monkeypatch, tmp_path, count, words, line):
    monkeypatch.setattr(device, "count", lambda: count)
    code, out, err = reproduce(*GLYPHS, *words.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert line in err
    assert (calls.executed, list(tmp_path.iterdir())) == ([], [])


def test_tables_whose_runs_take_one_gpu_are_refused_several(reproduce, calls, monkeypatch):
    monkeypatch.setattr(Classification, "several", False)
    for words in ("--launcher slurm --slurm tasks_per_node=2", "--launcher slurm --gpus-per-run 2"):
        code, _, err = reproduce(*GLYPHS, *words.split())
        assert (code, err) == (
            2,
            "deepkd: error: command line: glyphs100 trains a run on one GPU, and is asked for 2\n",
        )


def test_slurm_gets_tasks_for_the_gpus_of_a_run(reproduce, calls):
    words = "--launcher slurm --slurm nodes=2 slurm_partition=gpu --gpus-per-run 16"
    code, out, _ = reproduce(*GLYPHS, *words.split())
    assert code == 0
    ((_, _, parameters, _),) = calls.submitted
    assert parameters == {"nodes": 2, "tasks_per_node": 8, "gpus_per_node": 8, "slurm_partition": "gpu"}
    assert "tasks_per_node 8" in entry(out, "on")
    code, _, err = reproduce(*GLYPHS, "--launcher", "slurm", "--slurm", "gpus_per_node=8")
    assert (code, err.count("\n")) == (2, 1)
    assert "--slurm gpus_per_node is 8 and tasks_per_node 1; they must be equal, for each task trains on one GPU" in err


def test_slurm_gets_one_array_job(reproduce, calls):
    words = "--launcher slurm --slurm timeout_min=600 slurm_partition=gpu mem_gb=7.5 --jobs 8"
    code, out, _ = reproduce(*GLYPHS, *words.split())
    assert code == 0
    ((planned, folder, parameters, overwrite),) = calls.submitted
    assert (len(planned), str(folder), overwrite) == (4, "output/glyphs100", False)
    expected = {"timeout_min": 600, "slurm_partition": "gpu", "mem_gb": 7.5, "slurm_array_parallelism": 8}
    assert parameters == expected
    assert (calls.executed, calls.reported) == ([], [])
    assert (folder / "table.json").exists()
    assert entry(out, "on").startswith("Slurm, one array job (slurm_array_parallelism 8, timeout_min 600, ")
    assert entry(out, "time").startswith("not known: ")  # this machine is not the cluster's
    assert entry(out, "jobs") == "4 submitted, 7_0 to 7_3; logs in output/glyphs100/slurm"
    assert entry(out, "then") == "deepkd report output/glyphs100"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--slurm a=1", "--slurm goes with --launcher slurm"),
        ("--launcher slurm --slurm a", "--slurm is 'a'; it must be KEY=VALUE of submitit's, such as timeout"),
        ("--launcher slurm --slurm a-b=1", "--slurm is 'a-b=1'; it must be KEY=VALUE of submitit's, such"),
        ("--pairs res9", "--pairs is 'res9'; it must be one of res20_res8"),
        (
            "--methods fitnet",
            "--methods is 'fitnet'; it must be one of vanilla, kd, dkd, mlkd, crld, deepkd, ",
        ),
    ],
)
def test_mistakes_are_one_line(reproduce, calls, words, line, tmp_path):
    code, out, err = reproduce("reproduce", "glyphs100", *words.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"deepkd: error: command line: {line}")
    assert list(tmp_path.iterdir()) == []


def test_report_writes_from_a_folder(calls, capsys, tmp_path):
    assert cli.main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/report.md\n{tmp_path}/report.html\n"
    assert calls.reported == [tmp_path]


def test_a_display_is_chosen_by_the_terminal(calls, monkeypatch, reproduce):
    shown = []
    monkeypatch.setattr(runs, "execute", lambda *words, display, **named: shown.append(display) or [])
    reproduce(*GLYPHS)
    assert [type(one) for one in shown] == [display.Display]


def test_a_request_s_defaults_are_those_of_the_command_line(monkeypatch):
    asked = []
    monkeypatch.setattr(command, "reproduce", lambda request: asked.append(request) or 0)
    assert cli.main(["reproduce", "cifar100"]) == 0
    (made,) = asked
    plain = command.Request("cifar100", "deepkd reproduce cifar100")
    assert {k: v or None for k, v in vars(made).items()} == {k: v or None for k, v in vars(plain).items()}


def test_a_mistake_in_the_slurm_parameters_comes_before_anything(calls):
    request = command.Request("no table", "", slurm=["a=1"])
    with pytest.raises(UserError, match="--slurm goes with --launcher slurm"):
        command.reproduce(request)


def test_runs_of_another_table_are_taken_over(reproduce, calls, tmp_path):
    reproduce(*GLYPHS, "--out", "first.dir")
    first = calls.executed[0][0]
    finish(first[0], 3.0)
    finish(first[3])
    finish(first[1], code="0" * 16)
    words = (*GLYPHS, "--out", "second", "--reuse", "first.dir")
    code, out, _ = reproduce(*words, "--dry-run")
    assert (code, entry(out, "runs")) == (0, "2 to take over, 2 new")
    assert entry(out, "reuse") == "first.dir: 2 runs to take over"
    assert entry(out, "not taken") == "1 run of --reuse, of other code, or of a teacher that is another or not here"
    # of the cells of both a run is there to tell how long they take
    assert "an estimate: 2 by finished runs of their kind" in entry(out, "time")
    assert not (tmp_path / "second").exists()
    code, out, _ = reproduce(*words)
    assert (code, entry(out, "runs")) == (0, "2 to take over, 2 new")
    held = {run.name: runs.state(run) for run in calls.executed[1][0]}
    assert list(held.values()) == ["finished", "new", "new", "finished"]
    code, out, _ = reproduce(*words)
    assert (entry(out, "runs"), entry(out, "reuse")) == (
        "2 finished, 2 new",
        "first.dir: 0 runs to take over",
    )


def test_runs_of_several_tables_are_taken_over(reproduce, calls):
    for out, number in (("first", 0), ("second", 1)):
        reproduce(*GLYPHS, "--out", out)
        finish(calls.executed[-1][0][number])
    _, out, _ = reproduce(*GLYPHS, "--out", "third", "--reuse", "first", "--reuse", "second")
    assert entry(out, "reuse") == "first, second: 2 runs to take over"


def test_runs_of_another_teacher_are_not_taken_over(reproduce, calls):
    from deepkd_plugin.hosts.networks import trained_network
    from deepkd_plugin.hosts.registry import BUILTIN
    from deepkd_plugin.run import checkpoint

    network = trained_network(BUILTIN, "glyphs100", "resnet20", 100, "builtin:glyphs100_resnet20", "a test")
    reproduce(*GLYPHS, "--out", "first")
    first = calls.executed[0][0]
    finish(first[0], teacher="another")
    finish(first[3], teacher=checkpoint.fingerprint(network))
    code, out, _ = reproduce(*GLYPHS, "--out", "second", "--reuse", "first")
    assert (code, entry(out, "runs")) == (0, "1 to take over, 3 new")
    assert entry(out, "not taken").startswith("1 run of --reuse, ")
    assert [runs.state(run) for run in calls.executed[1][0]] == ["new", "new", "new", "finished"]


def test_runs_are_taken_over_before_a_cluster_is_asked(reproduce, calls):
    reproduce(*GLYPHS, "--out", "first")
    finish(calls.executed[0][0][0])
    reproduce(*GLYPHS, "--out", "second", "--reuse", "first", "--launcher", "slurm")
    ((planned, _, _, _),) = calls.submitted
    assert [runs.state(run) for run in planned] == ["finished", "new", "new", "new"]


def test_a_folder_to_reuse_must_hold_a_table(reproduce, calls, tmp_path):
    code, out, err = reproduce(*GLYPHS, "--reuse", "nowhere")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err == (
        f"deepkd: error: command line: --reuse: {tmp_path / 'nowhere'}: holds no table.json; it must be a folder that "
        f"'deepkd reproduce' made\n"
    )
    assert list(tmp_path.iterdir()) == []
