"""The trainer around detectron2's: its step against plain SGD, scaled, clipped, in two processes; whole small runs."""

import copy
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from processes import in_two_processes
from torch import nn

from deepkd_plugin.errors import UserError
from deepkd_plugin.optim import DecoupledMomentumSGD

MOMENTA = {
    "apart": {"tog": 0.9, "tcg": 0.5, "ncg": 0.7},
    "equal": dict.fromkeys(("tog", "tcg", "ncg"), 0.9),
}


class Toy(nn.Module):
    """Losses by detectron2's names from a batch of numbers (N, 3): means over it, so halves average to the whole."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, generator=generator))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, batch):
        out = (batch * self.weight).sum(1) + self.bias
        return {
            "loss_cls": out.square().mean(),
            "loss_rpn_cls": (self.weight[0] * batch[:, 0]).mean(),
            "loss_tcg": out.mean(),
            "loss_ncg": (2.0 * out.square()).mean(),
        }


def batches(mine=slice(None)):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 3, generator=generator)[mine] for _ in range(5)]


def train_toy(momenta, data, **options):
    """Weights after five steps, and the trainer."""
    from detectron2.utils.events import EventStorage

    from deepkd_plugin.detection.detectron2.trainer import StreamTrainer

    model = Toy()
    optimizer = DecoupledMomentumSGD(model.parameters(), 0.02, MOMENTA[momenta], 0.01, "tcg")
    trainer = StreamTrainer(model, data, optimizer, **options)
    with EventStorage():
        for trainer.iter in range(len(data)):
            trainer.run_step()
    return [p.detach().clone() for p in model.parameters()], trainer


@pytest.mark.parametrize("momenta", MOMENTA)
def test_a_scaler_changes_nothing_but_skips_what_overflows(host, momenta):
    expected, _ = train_toy(momenta, batches())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    weights, _ = train_toy(momenta, batches(), scaler=scaler)
    assert all(torch.equal(a, b) for a, b in zip(weights, expected))
    assert scaler.get_scale() == 2.0**12
    # a batch with an infinite gradient between the others leaves no trace but the scale
    bad = torch.full((8, 3), 1e15)
    data = batches()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, growth_interval=100)
    weights, _ = train_toy(momenta, [*data[:2], bad, *data[2:]], scaler=scaler)
    assert all(torch.equal(a, b) for a, b in zip(weights, expected))
    assert scaler.get_scale() == 2.0**59


@pytest.mark.parametrize("momenta", MOMENTA)
def test_clipping_acts_on_what_the_step_takes(host, momenta):
    plain, _ = train_toy(momenta, batches())
    tight, _ = train_toy(momenta, batches(), clipper=lambda params: nn.utils.clip_grad_norm_(params, 1e-4))
    start = list(Toy().parameters())
    moved = [sum((a - b).norm() for a, b in zip(weights, start)).item() for weights in (plain, tight)]
    assert moved[1] < 0.05 * moved[0]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    clipper = lambda params: nn.utils.clip_grad_value_(params, 0.1)  # noqa: E731
    bare, _ = train_toy(momenta, batches(), clipper=clipper)
    scaled, _ = train_toy(momenta, batches(), clipper=clipper, scaler=scaler)
    assert all(torch.equal(a, b) for a, b in zip(bare, scaled))
    assert not torch.equal(bare[0], plain[0])


def share(rank):
    from detectron2.utils import comm

    comm.create_local_process_group(2)
    trained = {}
    for momenta in MOMENTA:
        weights, trainer = train_toy(momenta, batches(slice(4 * rank, 4 * rank + 4)))
        trained[momenta] = [weights, trainer.means()]
    return trained


def test_two_processes_are_one_with_the_whole_batch(host, tmp_path, mdistiller_root, monkeypatch):
    monkeypatch.setenv("MDISTILLER_ROOT", str(mdistiller_root))  # the processes import it anew
    each = in_two_processes(share, tmp_path)
    for momenta in MOMENTA:
        expected, trainer = train_toy(momenta, batches())
        means = trainer.means()
        for trained in each:
            weights, losses = trained[momenta]
            torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)
            assert losses == pytest.approx(means, rel=1e-5)


def test_losses_go_to_their_streams(host):
    from deepkd_plugin.detection.detectron2.trainer import losses_by_stream

    losses = {name: torch.tensor(float(i)) for i, name in enumerate(("loss_cls", "loss_mask", "loss_tcg", "loss_ncg"))}
    by_stream = losses_by_stream(losses, ("tog", "tcg", "ncg"))
    assert {name: loss.item() for name, loss in by_stream.items()} == {"tog": 1.0, "tcg": 2.0, "ncg": 3.0}
    assert losses_by_stream({"loss_dkd": losses["loss_ncg"]}, ("tog",))["tog"].item() == 3.0


@pytest.mark.parametrize(
    "clip",
    [
        (),
        ("SOLVER.CLIP_GRADIENTS.ENABLED", "True", "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "0.001"),
        (
            *("SOLVER.CLIP_GRADIENTS.ENABLED", "True", "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm"),
            *("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "0.001"),
        ),
    ],
    ids=("not clipped", "value", "norm"),
)
def test_without_deltas_it_is_detectron2_s_own_sgd(make_trainer, clip):
    """Its optimizer with its parameter groups: norms and biases decay on their own."""
    from detectron2.solver import build_optimizer
    from detectron2.utils.events import EventStorage

    from deepkd_plugin import device

    zero = (part for s in ("TOG", "TCG", "NCG") for part in (f"SOLVER.DECOUPLED.DELTA.{s}", "0"))
    own = ("SOLVER.WEIGHT_DECAY_NORM", "0.3", "SOLVER.WEIGHT_DECAY_BIAS", "0.2", "SOLVER.BIAS_LR_FACTOR", "2")
    norms = ("MODEL.FPN.NORM", "GN", "MODEL.FPN.OUT_CHANNELS", "32", "TEACHER.MODEL.FPN.OUT_CHANNELS", "32")
    at_once = ("SOLVER.WARMUP_FACTOR", "1.0")
    trainer = make_trainer("DeepKD-R18-R101-noDTM", *zero, *own, *norms, *at_once, *clip)
    other = copy.deepcopy(trainer.model)
    optimizer = build_optimizer(trainer.cfg, other)
    assert len(optimizer.param_groups) > 1
    groups = [[(g["lr"], g["weight_decay"]) for g in opt.param_groups] for opt in (trainer.optimizer, optimizer)]
    assert groups[0] == groups[1]
    data = iter(trainer.data_loader)
    for iteration in range(2):
        batch = next(data)
        trainer._trainer._data_loader_iter_obj = iter([batch])
        trainer._trainer.iter = iteration
        with EventStorage(iteration):
            trainer._trainer.run_step()
        device.seed_everything(0, iteration)
        with EventStorage(iteration):
            losses = other(batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    for (name, mine), theirs in zip(trainer.model.named_parameters(), other.parameters()):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7, msg=name)


def test_the_whole_gradient_s_norm(small):
    from deepkd_plugin.detection.detectron2.trainer import build_clipper

    pairs = ("SOLVER.CLIP_GRADIENTS.ENABLED", "True", "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "5")
    a, b = (nn.Parameter(torch.zeros(1)) for _ in range(2))

    def clipped(kind):
        a.grad, b.grad = torch.tensor([30.0]), torch.tensor([40.0])
        build_clipper(small("DKD-R18-R101", *pairs, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", kind))([a, b])
        return [a.grad.item(), b.grad.item()]

    assert clipped("full_model") == pytest.approx([3.0, 4.0])
    assert clipped("norm") == pytest.approx([5.0, 5.0])
    assert clipped("value") == pytest.approx([5.0, 5.0])
    assert build_clipper(small("DKD-R18-R101")) is None


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_is_the_uninterrupted_one(make_trainer, tmp_path):
    pairs = (
        *(
            "SOLVER.MAX_ITER",
            "4",
            "SOLVER.STEPS",
            "(3,)",
            "SOLVER.CHECKPOINT_PERIOD",
            "1",
            "TEST.EVAL_PERIOD",
            "2",
        ),
        *("DATALOADER.NUM_WORKERS", "1"),
    )
    whole = tmp_path / "whole"
    make_trainer("DeepKD-R18-R101", *pairs, "OUTPUT_DIR", str(whole)).train()
    # as an interruption leaves it, with an evaluation right after the last checkpoint, and without
    for iteration in (2, 1):
        again = tmp_path / str(iteration)
        shutil.copytree(whole, again)
        (again / "last_checkpoint").write_text(f"model_{iteration - 1:07d}.pth")
        trainer = make_trainer("DeepKD-R18-R101", *pairs, "OUTPUT_DIR", str(again), resume=True)
        assert trainer.start_iter == iteration
        trainer.train()
        one, two = (torch.load(folder / "model_final.pth", weights_only=True) for folder in (whole, again))
        for name, tensor in one["model"].items():
            assert torch.equal(two["model"][name], tensor), name
        buffers = [state["trainer"]["_trainer"]["optimizer"]["state"] for state in (one, two)]
        assert buffers[0].keys() == buffers[1].keys()
        for i in buffers[0]:
            assert len(buffers[0][i]) == 2  # TOG and NCG have one momentum
            assert all(torch.equal(a, b) for a, b in zip(buffers[0][i].values(), buffers[1][i].values()))
        assert lines(whole) == lines(again)
        assert [line["iteration"] for line in lines(again)] == [2, 4]
        run = json.loads((again / "run.json").read_text())
        assert len(run["resumed"]) == 1
        assert run["finished"] is True
    # resumed once more, there is nothing to train, and the records stay
    trainer = make_trainer("DeepKD-R18-R101", *pairs, "OUTPUT_DIR", str(again), resume=True)
    assert trainer.start_iter == 4
    trainer.train()
    assert lines(whole) == lines(again)


def test_what_a_run_leaves(make_trainer, tmp_path):
    trainer = make_trainer("DeepKD-R18-R101", "TEST.EVAL_PERIOD", "1")
    trainer.train()
    folder = tmp_path / "run"
    first, last = lines(folder)
    assert (first["epoch"], first["iteration"], last["epoch"], last["iteration"]) == (1, 1, 2, 2)
    for line in (first, last):
        assert line["loss"].keys() == {"tog", "tcg", "ncg"}
        assert line["momentum"] == pytest.approx({"tog": 0.95, "tcg": 0.85, "ncg": 0.95})
        assert {"lr", "top_k", "test_ap", "test_ap50", "test_ap75"} < line.keys()
    assert (first["top_k"], last["top_k"]) == (1, 3)
    run = json.loads((folder / "run.json").read_text())
    assert run["result"].keys() == {"best", "best_epoch", "last", "epochs", "iterations"}
    assert run["result"]["last"] == last["test_ap"]
    assert (run["seed"], run["finished"], run["command"]) == (0, True, "a test")
    assert run["teacher"]
    cfg = type(trainer.cfg)(type(trainer.cfg).load_yaml_with_base(str(folder / "config.yaml")))
    assert cfg.KD.TYPE == "DeepKD"
    assert {"metrics.json", "model_final.pth", "worklog.txt", "train.events"} <= {p.name for p in folder.iterdir()}


@pytest.mark.parametrize(
    ("name", "pairs"),
    [
        ("KD-R50-R101", ()),
        ("DKD-R50-R101", ("MODEL.META_ARCHITECTURE", "RCNNKD")),
        ("DKD-MV2-R50", ()),
        ("DKD-MV2-R50", ("KD.TYPE", "ReviewKD")),
        (
            "DKD-R18-R101",
            (
                "KD.TYPE",
                "ReviewDKD",
                "MODEL.FPN.OUT_CHANNELS",
                "256",
                "TEACHER.MODEL.FPN.OUT_CHANNELS",
                "256",
            ),
        ),
        ("DeepKD-R50-R101", ()),
        ("DeepKD-MV2-R50-noDTM", ()),
        ("ReviewDeepKD-MV2-R50", ()),
        ("ReviewDeepKD-R18-R101", ()),
    ],
)
def test_every_method_of_every_pair_trains(make_trainer, name, pairs, monkeypatch):
    """The networks of the configs as they are, on small images; random weights, so tiny steps."""
    trainer = make_trainer(name, *pairs, "SOLVER.MAX_ITER", "1", "SOLVER.STEPS", "()", "SOLVER.BASE_LR", "1e-9")
    monkeypatch.setattr(trainer, "test", lambda *args: {})  # evaluation has its own tests
    monkeypatch.setattr(trainer.checkpointer, "save", lambda *args, **kwargs: None)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    (line,) = lines(Path(trainer.cfg.OUTPUT_DIR))
    assert all(abs(loss) < float("inf") for loss in line["loss"].values())
    assert set(line["loss"]) == set(trainer.optimizer.streams)
    moved = {name.split(".")[0] for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    parts = {"backbone", "proposal_generator", "roi_heads"}
    assert moved == parts | ({"kd_trans"} if "Review" in trainer.cfg.KD.TYPE else set())


def test_images_come_as_detectron2_s_loader_would_give_them(host, small, deepkd_tiny):
    from itertools import islice

    from detectron2.data import build_detection_train_loader

    from deepkd_plugin.detection.detectron2.loader import Batches, build_train_loader

    cfg = small("DeepKD-R18-R101")

    def names(loader, count):
        return [[image["file_name"] for image in batch] for batch in islice(loader, count)]

    ours, theirs = build_train_loader(cfg), build_detection_train_loader(cfg)
    assert names(ours, 6) == names(theirs, 6)
    later = build_train_loader(cfg)
    later.batch_sampler.start = 4
    for a, b in zip(islice(build_train_loader(cfg), 4, 6), later):
        assert all(torch.equal(x["image"], y["image"]) for x, y in zip(a, b))
    # wide images are apart from the others, and two processes share the order
    wide = [i % 3 == 0 for i in range(10)]
    first = [list(islice(Batches(wide, 2, 0, rank, 2), 20)) for rank in range(2)]
    assert all(wide[i] == wide[j] for mine in first for (_, i), (_, j) in mine)
    drawn = sorted(number for mine in first for batch in mine for number, _ in batch)
    assert len(set(drawn)) == 80
    assert {number % 2 for batch in first[1] for number, _ in batch} == {1}


def test_a_batch_that_the_processes_cannot_share(small, monkeypatch):
    from detectron2.utils import comm

    from deepkd_plugin.detection.detectron2.loader import build_train_loader

    monkeypatch.setattr(comm, "get_world_size", lambda: 3)
    with pytest.raises(UserError, match="SOLVER.IMS_PER_BATCH is 2; it must be a multiple of 3"):
        build_train_loader(small("DeepKD-R18-R101"))


def test_a_set_of_more_classes(make_trainer):
    pairs = ("MODEL.ROI_HEADS.NUM_CLASSES", "2", "TEACHER.MODEL.ROI_HEADS.NUM_CLASSES", "2")
    with pytest.raises(UserError, match="NUM_CLASSES is 2; it must be 3, the classes of deepkd_tiny"):
        make_trainer("DeepKD-R18-R101", *pairs)


def test_weights_without_the_teacher_are_refused(make_trainer, tmp_path):
    file = tmp_path / "start.pth"
    state = make_trainer("DeepKD-R18-R101").model.state_dict()

    def start(weights):
        torch.save({"model": weights}, file)
        return make_trainer("DeepKD-R18-R101", "MODEL.WEIGHTS", str(file))

    loaded = start({name: tensor + 1 for name, tensor in state.items()}).model.state_dict()
    assert all(torch.equal(loaded[name], tensor + 1) for name, tensor in state.items())
    start({name: tensor for name, tensor in state.items() if not name.startswith("roi_heads.")})
    lost = [name for name in state if name.startswith("teacher.roi_heads.")]
    with pytest.raises(UserError, match=rf"lacks {len(lost)} tensors of the teacher, {lost[0]} for one; .*merge-det"):
        start({name: tensor for name, tensor in state.items() if name not in lost})
    name = "teacher.roi_heads.box_predictor.cls_score.bias"
    with pytest.raises(UserError, match=rf"its {name} has the shape \(9,\); this config's teacher needs \(4,\)"):
        start(state | {name: torch.zeros(9)})
    lost = [name for name in state if name.startswith("backbone.bottom_up.")]
    with pytest.raises(
        UserError,
        match=rf"lacks \d+ tensors of the student's backbone, {lost[0]} for one; .*merge-det",
    ):
        start({name: tensor for name, tensor in state.items() if name not in lost})


class Hostile:
    def __reduce__(self):
        return (Path("hacked").write_text, ("",))


@pytest.mark.parametrize("name", ["start.pth", "start.pkl"])
def test_weights_that_would_run_code_are_refused(make_trainer, tmp_path, monkeypatch, name):
    import pickle

    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(pickle.dumps({"model": Hostile()}))
    with pytest.raises(UserError, match=rf"{name}: MODEL.WEIGHTS must name a"):
        make_trainer("DeepKD-R18-R101", "MODEL.WEIGHTS", str(tmp_path / name))
    assert not (tmp_path / "hacked").exists()


def test_average_precisions_of_any_evaluation(host):
    from deepkd_plugin.detection.detectron2.recorder import average_precisions

    boxes = {"AP": 12.5, "AP50": 30.0, "AP75": float("nan"), "APs": 1.0}
    expected = {"test_ap": 12.5, "test_ap50": 30.0, "test_ap75": 0.0}
    assert average_precisions({"bbox": boxes}) == expected
    assert average_precisions({"first": {"bbox": boxes}, "second": {"bbox": {"AP": 1.0}}}) == expected
    assert average_precisions({"first": {}}) == {}
    assert average_precisions(None) == {}


@pytest.mark.parametrize("name", ["DeepKD-R18-R101", "DeepKD-R50-R101", "DeepKD-MV2-R50"])
@pytest.mark.slow
def test_fifty_iterations_resumed_and_evaluated(make_trainer, tmp_path, monkeypatch, name):
    """Each pair's config at reduced size: thin networks for the first, real depths for the others."""
    from deepkd_plugin.detection.detectron2.trainer import StreamTrainer

    pairs = ("SOLVER.MAX_ITER", "50", "SOLVER.STEPS", "(40,)", "TEST.EVAL_PERIOD", "25")
    # random weights under frozen norms make huge gradients
    pairs += ("SOLVER.CHECKPOINT_PERIOD", "25", "SOLVER.BASE_LR", "0.000001")
    step = StreamTrainer.run_step

    def interrupted(self):
        if self.iter == 30:
            raise KeyboardInterrupt
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(StreamTrainer, "run_step", interrupted)
        trainer = make_trainer(name, *pairs)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    trainer = make_trainer(name, *pairs, resume=True)
    assert trainer.start_iter == 25
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    records = lines(tmp_path / "run")
    assert [line["iteration"] for line in records] == [25, 50]
    for line in records:
        assert all(math.isfinite(loss) for loss in line["loss"].values())
        assert 0 <= line["test_ap"] <= line["test_ap50"] <= 100
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert any(n.startswith("backbone.bottom_up.") for n in moved)
    assert not any(n.startswith("teacher.") for n in moved)
