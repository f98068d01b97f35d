"""`deepkd calibrate`: K* against sums over samples one by one, the config that it writes, and what it refuses."""

import math

import pytest
import torch
from scipy.stats import spearmanr

from deepkd_plugin import launch
from deepkd_plugin.commands import cli
from deepkd_plugin.hosts.registry import find_host
from deepkd_plugin.study.calibration import calibrate
from deepkd_plugin.topk import TopP, top_p

CONFIG = "glyphs100/res20_res8/deepkd"


def shares(row, label, temperature):
    """A sample's non-target probabilities, largest first."""
    parts = [math.exp(float(z) / temperature) for c, z in enumerate(row) if c != label]
    return sorted((part / sum(parts) for part in parts), reverse=True)


@pytest.mark.parametrize("mass", [0.3, 0.9, 0.99])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_k_is_the_least_that_holds_the_mass_on_average(mass, temperature):
    torch.manual_seed(0)
    logits, target = 5 * torch.randn(30, 12), torch.randint(0, 12, (30,))
    batches = [(logits[:16], target[:16]), (logits[16:], target[16:])]  # the last one is smaller
    found = calibrate(batches, temperature, mass)
    rows = [shares(*pair, temperature) for pair in zip(logits, target.tolist())]
    held = [sum(sum(row[:k]) for row in rows) / 30 for k in range(1, 12)]
    assert found.held == pytest.approx(held, rel=1e-9)
    assert found.optimal == next(k for k in range(1, 12) if held[k - 1] >= mass)
    assert (found.images, len(found.each)) == (30, 30)
    assert found.right == sum(int(row.argmax()) == label for row, label in zip(logits, target.tolist())) / 30
    log_shares = torch.tensor(rows, dtype=torch.float64).log()
    assert found.each.tolist() == top_p(log_shares, TopP(mass).share).sum(1).tolist()


def test_a_teacher_that_is_equally_unsure_of_all_needs_nearly_all():
    found = calibrate([(torch.zeros(4, 11), torch.arange(4))], 4.0, 0.899)
    assert (found.optimal, set(found.each)) == (9, {9})


@pytest.fixture
def command(data_root, capsys):
    def run(*words):
        of = ["DATASET.ROOT", str(data_root), "DATASET.TRAIN_PER_CLASS", "2"]
        return cli.main(["calibrate", *words, *of]), capsys.readouterr()

    return run


def test_it_writes_the_config_of_a_run_and_replaces_no_file(command, tmp_path):
    file = tmp_path / "calibrated.yaml"
    code, printed = command("--cfg", CONFIG, "--mass", "0.2", "--write", str(file))
    assert code == 0, printed.err
    optimal = int(printed.out.split("K*")[1].split()[0])
    cfg, _ = launch.read_config(find_host(), str(file), [])
    mask = cfg.DeepKD.MASK
    assert ("dynamic", optimal) == (mask.TYPE, mask.OPTIMAL)
    assert mask.INITIAL == optimal < 5  # 5 % of 100 classes would be more, and a mask does not shrink
    assert cfg.DATASET.TRAIN_PER_CLASS == 2
    assert f"next      deepkd train --cfg {file}" in printed.out
    before = file.read_bytes()
    code, printed = command("--cfg", CONFIG, "--write", str(file))
    assert (code, file.read_bytes()) == (2, before)
    assert f"--write: {file} is there, and stays; name another" in printed.err


def test_without_write_it_says_the_command(command):
    code, printed = command("--cfg", CONFIG)
    assert code == 0, printed.err
    optimal = printed.out.split("K*")[1].split()[0]
    assert f"DeepKD.MASK.TYPE dynamic DeepKD.MASK.OPTIMAL {optimal}\n" in printed.out


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--cfg", "glyphs100/res20_res8/kd"], "DISTILLER.TYPE is 'KD'; it must be 'DeepKD', which has a mask"),
        (["--cfg", CONFIG, "--mass", "1"], "--mass is 1; it must be above 0 and below 1"),
        (["--cfg", CONFIG, "DeepKD.BASE", "RLD"], "with DeepKD.BASE RLD the mask does not weigh the softmax"),
        (["--cfg", "glyphs100/res20_res8/deepkd_mlkd"], "with DeepKD.BASE MLKD the mask does not weigh the softmax"),
        (["--cfg", CONFIG, "EXPERIMENT.LOGIT_STAND", "True"], "with EXPERIMENT.LOGIT_STAND the mask does not weigh"),
        (["--cfg", CONFIG, "--mass", "0.01"], "a mask of 1 class leaves NCKD nothing to compare"),
    ],
)
def test_what_is_refused(command, words, complaint):
    code, printed = command(*words)
    assert code == 2
    assert complaint in printed.err
    assert printed.err.count("\n") == 1


def test_it_is_compared_with_what_tune_chose(command, tmp_path):
    """Spearman's correlation against scipy's. Trials of other methods, and those that ended early, do not count."""
    file = tmp_path / "trials.csv"
    rows = [
        ("deepkd", 70.0, "DeepKD.MASK.TYPE dynamic DeepKD.MASK.OPTIMAL 0.3 DeepKD.MASK.PHASES [0.1, 0.5]"),
        ("deepkd", 60.0, "DeepKD.MASK.TYPE static DeepKD.MASK.K 0.6"),
        ("deepkd", 65.0, "DeepKD.MASK.TYPE none"),
        ("deepkd", "", "DeepKD.MASK.TYPE none"),
        ("kd", 90.0, "SOLVER.LR 0.1"),
    ]
    text = "".join(f'{method},{value},"{options}"\n' for method, value, options in rows)
    file.write_text("method,held_out,options\n" + text)
    code, printed = command("--cfg", CONFIG, "--trials", str(file))
    assert code == 0, printed.err
    optimal = int(printed.out.split("K*")[1].split()[0])
    assert "tuned     the best of 3 trials keeps 30 of 99 (mask dynamic, 70.00 % held out)" in printed.out
    wanted = spearmanr([abs(k - optimal) for k in (30, 60, 99)], [70, 60, 65]).statistic
    assert float(printed.out.split("with its top-1: ")[1].split()[0]) == pytest.approx(wanted, abs=0.005)
    for content, complaint in (("method\n", "has no complete trial of deepkd"), ("a,b\n1,2\n", "must be a trials.csv")):
        file.write_text(content)
        code, printed = command("--cfg", CONFIG, "--trials", str(file))
        assert (code, printed.err.count("\n")) == (2, 1)
        assert complaint in printed.err
