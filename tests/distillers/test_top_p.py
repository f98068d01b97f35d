"""The top-p mask under DeepKD: over every base, by phases, and in a run's log."""

import pytest
import small
import torch
from tables import Table

from deepkd_plugin.distillers import DeepKD, bases
from deepkd_plugin.run.metrics import read_metrics
from deepkd_plugin.topk import TopP


def terms(cfg, golden, epoch):
    """The three losses of an epoch, and their gradient."""
    student, teacher = Table(golden["student"]), Table(golden["teacher"])
    index = torch.arange(12)
    image = index if bases()[cfg.DeepKD.BASE].views == 1 else [index, index.flip(0)]
    losses = DeepKD(student, teacher, cfg).train()(image=image, target=golden["target"], epoch=epoch)[1]
    return losses, torch.autograd.grad(sum(losses.values()), student.logits)[0]


@pytest.mark.parametrize("reading", ["renormalise", "multiply"])
@pytest.mark.parametrize("base", bases())
def test_it_ends_as_no_mask_bit_by_bit(cfg, golden_losses, base, reading):
    cfg.SOLVER.EPOCHS, cfg.DeepKD.BASE, cfg.DeepKD.MASK.READING = 10, base, reading
    cfg.DeepKD.MASK.TYPE = "none"
    losses, gradient = terms(cfg, golden_losses, 10)
    cfg.DeepKD.MASK.TYPE = "top_p"
    last, last_gradient = terms(cfg, golden_losses, 10)
    assert all(torch.equal(last[name], losses[name]) for name in losses)
    assert torch.equal(last_gradient, gradient)
    first, _ = terms(cfg, golden_losses, 1)
    assert torch.equal(first["tcg"], last["tcg"])
    assert not torch.equal(first["ncg"], last["ncg"])


def test_the_mass_is_that_of_the_loss_temperature(cfg, golden_losses):
    """A hotter teacher spreads its mass, so the same share is held by more classes."""
    cfg.DeepKD.MASK.update({"TYPE": "top_p", "INITIAL": 0.5, "READING": "multiply"})
    table = golden_losses["teacher"]
    counts = []
    for t in (1.0, 4.0, 16.0):
        cfg.DeepKD.TEMPERATURE = t
        student, teacher = Table(golden_losses["student"]), Table(table)
        batch = {"image": torch.arange(12), "target": golden_losses["target"]}
        loss = DeepKD(student, teacher, cfg).train()(**batch, epoch=1)[1]["ncg"]
        assert torch.isfinite(loss)
        others = table.scatter(1, golden_losses["target"][:, None], -torch.inf) / t
        mass = others.softmax(1).sort(1, descending=True).values.cumsum(1)
        counts.append((mass < 0.5).sum().item())
    assert counts == sorted(set(counts))


def test_it_grows_by_epochs_or_iterations(cfg):
    cfg.SOLVER.EPOCHS = 11
    cfg.DeepKD.MASK.update({"TYPE": "top_p", "INITIAL": 0.2, "OPTIMAL": 0.6, "PHASES": (0.4, 0.6)})
    by_epoch = DeepKD(torch.nn.Identity(), torch.nn.Identity(), cfg)
    shares = [by_epoch.top_k(epoch, 100).share for epoch in range(1, 12)]
    assert shares == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6, 0.6, 0.6, 0.7, 0.8, 0.9, 1.0])
    assert not by_epoch.by_iteration
    cfg.DeepKD.MASK.UNIT = "iteration"
    by_iteration = DeepKD(torch.nn.Identity(), torch.nn.Identity(), cfg)
    assert by_iteration.by_iteration
    assert by_iteration.top_k(2.2, 100) == TopP(pytest.approx(0.4))
    assert by_iteration.constants(2.2, 100) != by_iteration.constants(2.3, 100)  # a capture holds the share


def test_a_runs_log_has_the_share(tmp_path):
    cfg = small.config(tmp_path)
    cfg.DeepKD.MASK.update({"TYPE": "top_p", "PHASES": (0.0, 0.5)})
    small.make(cfg).train(command=small.COMMAND)
    (folder,) = tmp_path.glob("**/metrics.jsonl")
    lines = read_metrics(folder.parent)
    assert [line["top_p"] for line in lines] == pytest.approx([0.5, 0.5, 2 / 3, 1.0])
    assert not any("top_k" in line for line in lines)
