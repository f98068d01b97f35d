"""deepkd doctor on the built-in host; on mdistiller see test_mdistiller.py."""

import torchvision

from deepkd_plugin.commands import cli
from deepkd_plugin.hosts import mdistiller as mdistiller_host


def test_what_is_here(capsys, monkeypatch, tmp_path, cifar_root):
    def download(*args, **kwargs):
        raise AssertionError("the doctor looks, it does not fetch")

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", download)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for words in (
        "host                   built-in (no mdistiller",
        "+MLKD +CRLD +NKD +RLD +WTTM +DIST +DeepKD",
        "cifar100 teachers      missing: resnet56, resnet110",
        "cifar100 images        missing: data: DATASET.ROOT holds no CIFAR-100",
        "glyphs100 images       built in",
        "deepkd_plugin is registered and ready",
    ):
        assert words in out
    (tmp_path / "data").symlink_to(cifar_root)
    file = tmp_path / "download_ckpts/cifar_teachers/resnet56_vanilla/ckpt_epoch_240.pth"
    file.parent.mkdir(parents=True)
    file.touch()
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "cifar100 images        in place, 100 test images" in out
    assert "cifar100 teachers      in place: resnet56; missing: resnet110" in out


def test_a_checkout_that_is_none(capsys, tmp_path):
    assert cli.main(["doctor", str(tmp_path)]) == 2
    assert f"{tmp_path}: is no checkout of mdistiller" in capsys.readouterr().err


def test_a_checkout_by_path(mdistiller, capsys):
    assert cli.main(["doctor", str(mdistiller.root)]) == 0
    assert f"mdistiller in {mdistiller.root}, commit " in capsys.readouterr().out
    assert mdistiller_host.load(mdistiller.root).distillers is mdistiller.distillers
