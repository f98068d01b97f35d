"""What `auto` comes to, with clocks that say what the test wants."""

import copy
import json

import pytest
import small
import torch
from torch import nn

from deepkd_plugin import choice, config, launch
from deepkd_plugin.distillers import DISTILLERS, KD
from deepkd_plugin.distillers.base import Distiller
from deepkd_plugin.errors import UserError
from deepkd_plugin.hosts.registry import find_host
from deepkd_plugin.run import record

MEASURED = choice.medians  # conftest.py puts a constant in its place


def clock(monkeypatch, fast):
    """Let passes take the times that fast(network's part, way) says; returns the order in which they were timed."""
    asked = []

    def medians(passes, images):
        what = "fold" if len(asked) % 2 else "format"
        asked.append((what, len(images), images.is_contiguous()))
        return {False: 1.0, True: fast[what]}

    monkeypatch.setattr(choice, "medians", medians)
    return asked


def run_of(trainer):
    return json.loads((trainer.folder / record.FILE).read_text())


@pytest.mark.parametrize(("other", "taken"), [(0.5, True), (0.969, True), (0.971, False), (1.0, False), (2.0, False)])
def test_the_other_way_must_be_three_percent_faster(other, taken):
    value, how = choice._faster({False: 10.0, True: 10 * other}, "folded", "plain")
    assert value is taken
    assert how == f"folded {10 * other:.3g} ms, plain 10 ms a pass"


def test_two_ways_are_timed_in_turn_until_the_budget_is_used_up(monkeypatch):
    order = []

    def seconds(one, count, at):
        one(count)
        return {"plain": 0.2, "other": 0.05}[order[-1]]

    monkeypatch.setattr(choice, "seconds", seconds)
    passes = {way: (lambda count, name=name: order.append(name)) for way, name in ((False, "plain"), (True, "other"))}
    assert MEASURED(passes, torch.zeros(64, 3, 32, 32)) == {False: 200.0, True: 50.0}
    # one that sets things up and one that says how many images there may be; one each before the rounds of 0.25 s
    assert order == ["plain", "plain", *["plain", "other"] * (1 + 6)]


@pytest.mark.parametrize(("each", "expected"), [(1e-6, 64), (0.01, 18), (10.0, 8)])
def test_a_cpu_is_given_as_many_images_as_the_budget_allows(monkeypatch, each, expected):
    counts = []

    def seconds(one, count, at):
        counts.append(count)
        return each * count

    monkeypatch.setattr(choice, "seconds", seconds)
    MEASURED({way: lambda count: None for way in (False, True)}, torch.zeros(64, 3, 32, 32))
    assert counts[0] == 8
    assert set(counts[1:]) == {expected}
    assert len(counts) - 1 == (100 if each < 1e-3 else 10 if each < 1 else 6)


def test_real_passes_are_timed_and_leave_the_networks_alone():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
            self.seen = []

        def forward(self, x):
            form = x.is_contiguous(memory_format=torch.channels_last), self.training, torch.is_grad_enabled()
            Net.forms.add(form)
            return self.body(x).mean((2, 3)), {}

    Net.forms = set()
    student, teacher = Net(), Net().eval().requires_grad_(False)
    before = copy.deepcopy((student.state_dict(), teacher.state_dict()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "medians", MEASURED)
        patch.setattr(choice, "BUDGET", 0.02)
        state = torch.get_rng_state()
        made = choice.channels_last(student, teacher, choice.noise(torch.zeros(1, 3, 8, 8), 16), False)
        assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(made.value, bool)
    # both formats, the student in training with gradients, the teacher in evaluation without
    assert Net.forms == {(last, train, train) for last in (False, True) for train in (False, True)}
    for was, network in zip(before, (student, teacher)):
        assert small.same(was, network.state_dict())
    assert student.body[0].weight.grad is None


OPEN = ("SOLVER.CHANNELS_LAST", "auto", "DISTILLER.FOLD_TEACHER", "auto", "SOLVER.EPOCHS", "2")


@pytest.mark.parametrize("faster", [0.5, 1.0])
def test_a_run_takes_what_is_faster_and_records_it(train, monkeypatch, faster):
    asked = clock(monkeypatch, {"format": faster, "fold": faster})
    code, out, _ = train("deepkd", *OPEN)
    assert code == 0
    taken = faster < 1
    said = f"SOLVER.CHANNELS_LAST {taken} (channels last {faster:g} ms, contiguous 1 ms a pass)"
    said += f", DISTILLER.FOLD_TEACHER {taken} (folded {faster:g} ms, plain 1 ms a pass)"
    assert f"chosen    {said}\n" in out
    # the batch of the run, in the format that was chosen by then
    assert asked == [("format", 64, True), ("fold", 64, not taken)]
    run = json.loads((train.folder / record.FILE).read_text())
    assert run["chosen"] == {
        "SOLVER.CHANNELS_LAST": f"channels last {faster:g} ms, contiguous 1 ms a pass",
        "DISTILLER.FOLD_TEACHER": f"folded {faster:g} ms, plain 1 ms a pass",
    }
    text = (train.folder / "config.yaml").read_text()
    assert f"CHANNELS_LAST: {str(taken).lower()}\n" in text
    assert f"FOLD_TEACHER: {str(taken).lower()}\n" in text
    # what was chosen is a run like one that was told so
    before = small.weights(train.folder)
    told = ("SOLVER.CHANNELS_LAST", str(taken), "DISTILLER.FOLD_TEACHER", str(taken), "SOLVER.EPOCHS", "2")
    assert train("deepkd", *told, flags=["--overwrite"])[0] == 0
    assert small.same(small.weights(train.folder), before)
    assert json.loads((train.folder / record.FILE).read_text())["config_hash"] == run["config_hash"]


def test_a_folded_teacher_teaches_the_same_to_rounding(train):
    made = {}
    for folds in ("False", "True"):
        options = ("DISTILLER.FOLD_TEACHER", folds, "SOLVER.EPOCHS", "1", "SOLVER.WARMUP_EPOCHS", "0")
        assert train("deepkd", *options, flags=["--overwrite"] * (folds == "True"))[0] == 0
        made[folds] = small.weights(train.folder)
    assert not small.same(made["False"], made["True"])  # or nothing was folded
    for name, value in made["False"].items():
        torch.testing.assert_close(made["True"][name], value, rtol=1e-3, atol=1e-4)


def test_a_resumed_run_takes_what_it_had_chosen_and_is_bitwise_the_whole_one(train, monkeypatch):
    clock(monkeypatch, {"format": 0.5, "fold": 0.5})
    assert train("deepkd", *OPEN)[0] == 0
    whole = small.weights(train.folder)

    def stop(self, epoch, step):
        if epoch == 2:
            raise KeyboardInterrupt
        return advance(self, epoch, step)

    advance = launch.Trainer.advance_warmup
    with monkeypatch.context() as patch:
        patch.setattr(launch.Trainer, "advance_warmup", stop)
        assert train("deepkd", *OPEN, flags=["--overwrite"])[0] == 130
    asked = clock(monkeypatch, {"format": 2.0, "fold": 2.0})
    chosen = json.loads((train.folder / record.FILE).read_text())["chosen"]
    assert train("deepkd", *OPEN, flags=["--resume"])[0] == 0
    assert asked == []
    assert small.same(small.weights(train.folder), whole)
    assert json.loads((train.folder / record.FILE).read_text())["chosen"] == chosen


def test_a_run_from_before_the_keys_goes_on_as_it_was(tmp_path):
    cfg = small.config(tmp_path)
    now, before = small.config(tmp_path), config.flatten(cfg)
    now.SOLVER.CHANNELS_LAST = now.DISTILLER.FOLD_TEACHER = None
    del before["DISTILLER.FOLD_TEACHER"]
    from deepkd_plugin.run.resume import settled

    assert settled(tmp_path, now, before) == dict.fromkeys(config.CHOICES, False)
    with pytest.raises(UserError, match=r"its config has SOLVER\.CHANNELS_LAST 'odd'"):
        settled(tmp_path, now, before | {"SOLVER.CHANNELS_LAST": "odd"})


def test_teacher_state_and_checkpoint_stay_as_they_were(tmp_path):
    states, files = [], []
    for folds in (False, True):
        cfg = small.config(tmp_path / str(folds))
        cfg.DISTILLER.TYPE, cfg.DISTILLER.FOLD_TEACHER = "DeepKD", folds
        trainer = small.make(cfg)
        launch.run(trainer, False, False, small.COMMAND)
        assert (trainer.module.folded is not None) is folds
        states.append(trainer.module.state_dict())
        files.append(torch.load(trainer.folder / "latest", weights_only=True))
        assert run_of(trainer)["teacher"] == trainer.teacher
    plain, folded = states
    assert plain.keys() == folded.keys()
    own = [name for name in plain if name.startswith("teacher.")]
    assert own
    assert all(torch.equal(plain[name], folded[name]) for name in own)
    assert files[0]["model"].keys() == files[1]["model"].keys()
    assert files[0]["teacher"] == files[1]["teacher"]


def test_a_teacher_that_would_say_something_else_stays_plain(train, monkeypatch):
    monkeypatch.setattr(choice, "differences", lambda plain, folded: "a logit is off by 1, and the largest is 2")
    code, out, _ = train("kd", "DISTILLER.FOLD_TEACHER", "True")
    reason = "its logits would be others: a logit is off by 1, and the largest is 2"
    assert code == 0
    assert f"chosen    DISTILLER.FOLD_TEACHER False ({reason})\n" in out
    assert json.loads((train.folder / record.FILE).read_text())["chosen"] == {"DISTILLER.FOLD_TEACHER": reason}
    plain = small.weights(train.folder)
    assert train("kd", flags=["--overwrite"])[0] == 0
    assert small.same(small.weights(train.folder), plain)


class Looking(small.Net):
    """A network of which torch.export cannot know what it does with other images."""

    def forward(self, x):
        return super().forward(x if x.sum() > 0 else x + 0)


def with_teacher(tmp_path, folds, teacher, **solver):
    cfg = small.config(tmp_path, **solver)
    cfg.DISTILLER.TYPE, cfg.DISTILLER.FOLD_TEACHER = "DeepKD", folds
    trainer = small.make(cfg)
    trainer.module.teacher = teacher.requires_grad_(False)
    return trainer


def test_a_network_that_cannot_be_followed_stays_plain_or_is_refused(tmp_path, capsys):
    trainer = with_teacher(tmp_path / "auto", None, Looking(16))
    trainer.settle()
    assert trainer.module.folded is None
    assert "chosen    DISTILLER.FOLD_TEACHER False (torch.export cannot follow it (" in capsys.readouterr().out
    assert trainer.cfg.DISTILLER.FOLD_TEACHER is False
    with pytest.raises(UserError, match=r"^config: DISTILLER\.FOLD_TEACHER is True; .*torch\.export cannot") as caught:
        with_teacher(tmp_path / "told", True, Looking(16)).train()
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "told" / "run" / record.FILE).exists()


TABLE = ("DISTILLER.TEACHER_LOGITS", "table")


@pytest.mark.parametrize(
    ("method", "options", "reason"),
    [
        ("kd", ("SOLVER.AMP", "True"), "SOLVER.AMP rounds to fewer bits, folded weights too"),
        (
            "kd",
            ("DISTILLER.TEACHER_LOGITS", "table"),
            "DISTILLER.TEACHER_LOGITS table keeps the plain teacher's logits",
        ),
        ("kd", ("DISTILLER.FOLD_TEACHER", "yes"), None),
        ("kd", ("SOLVER.CHANNELS_LAST", "1"), None),
    ],
)
def test_refusals_in_one_line(train, method, options, reason):
    code, _, err = train(method, "DISTILLER.FOLD_TEACHER", "True", *options)
    key, value = options if reason is None else ("DISTILLER.FOLD_TEACHER", "True")
    shown = value if value != "yes" else "'yes'"
    expected = "auto, True or False" if reason is None else f"auto or False: {reason}"
    assert (code, err) == (2, f"deepkd: error: command line: {key} is {shown}; it must be {expected}\n")


def test_without_a_teacher_there_is_nothing_to_fold(train):
    assert train("vanilla", "DISTILLER.FOLD_TEACHER", "True")[0] == 0


def test_a_distiller_of_others_keeps_its_teacher(tmp_path):
    class Theirs(nn.Module):
        def __init__(self):
            super().__init__()
            self.student, self.teacher = small.Net(), small.Net().eval()

    cfg = small.config(tmp_path)
    cfg.DISTILLER.TYPE, cfg.DISTILLER.FOLD_TEACHER = "KD", None
    made, how = choice.settle(cfg, Theirs(), lambda count: torch.zeros(count, 3, 2, 2))
    assert made.DISTILLER.FOLD_TEACHER is False
    assert how["DISTILLER.FOLD_TEACHER"].endswith("Theirs is no distiller of this package")
    cfg.DISTILLER.FOLD_TEACHER = True
    with pytest.raises(UserError, match="is no distiller of this package"):
        choice.settle(cfg, Theirs(), lambda count: torch.zeros(count, 3, 2, 2))


def test_only_compare_asks_the_folded_teacher(tmp_path):
    cfg = small.config(tmp_path)
    distiller = KD(small.Net(), small.Net(), cfg).train()
    distiller.fold(asked := small.Net())
    seen = []
    asked.register_forward_hook(lambda *_: seen.append("folded"))
    distiller.teacher.register_forward_hook(lambda *_: seen.append("teacher"))
    image, target = torch.randn(4, 3, 2, 2), torch.zeros(4, dtype=torch.int64)
    distiller(image=image, target=target, epoch=1)
    assert seen == ["folded"]
    assert not any(name.startswith("folded") for name in distiller.state_dict())
    # with known logits neither is asked
    distiller(image=image, target=target, epoch=1, teacher_logits=torch.zeros(4, 5))
    assert seen == ["folded"]
    assert Distiller.folded is None


def test_data_parallel_over_several_devices_keeps_the_plain_teacher(tmp_path):
    trainer = with_teacher(tmp_path, None, small.Net(16))
    trainer.distiller = nn.DataParallel(trainer.module)
    trainer.distiller.device_ids = [0, 1]
    assert trainer.settle()["DISTILLER.FOLD_TEACHER"].startswith("SOLVER.DATA_PARALLEL copies")
    assert trainer.module.folded is None


@pytest.mark.slow
def test_a_folded_teacher_is_compiled_in_place_of_the_plain_one(tmp_path, capsys):
    made = {}
    for folds in (True, False):
        torch.manual_seed(1)
        trainer = with_teacher(tmp_path / str(folds), folds, small.Net(16), EXECUTION="compile")
        launch.run(trainer, False, False, small.COMMAND)
        module = trainer.module
        compiled = {part: getattr(module, part)._compiled_call_impl for part in ("student", "teacher")}
        assert compiled["student"] is not None
        assert (compiled["teacher"] is None) is folds
        assert not folds or module.folded._compiled_call_impl is not None
        made[folds] = small.weights(trainer.folder)
    assert "falls back" not in capsys.readouterr().out
    for name, value in made[False].items():
        torch.testing.assert_close(made[True][name], value, rtol=1e-3, atol=1e-4)


def test_what_a_plan_chooses_is_folded_only_if_its_config_may(tmp_path, monkeypatch):
    cfg, (student, teacher) = small.config(tmp_path), (small.Net(), small.Net().eval())
    images = torch.zeros(16, 3, 2, 2)
    cfg.DISTILLER.TYPE = "DeepKD"
    clock(monkeypatch, {"format": 2.0, "fold": 0.5})
    assert choice.choose(cfg, student, teacher, images) == {config.CHANNELS_LAST: False, config.FOLD_TEACHER: True}
    cfg.SOLVER.AMP = True
    assert choice.choose(cfg, student, teacher, images)[config.FOLD_TEACHER] is False
    assert choice.choose(cfg, student, None, images)[config.FOLD_TEACHER] is False


def test_auto_follows_another_value_and_the_other_way_round(tmp_path):
    file = tmp_path / "some.yaml"
    for written, option, value in (("True", "auto", "auto"), ("auto", "True", True), ("auto", "False", False)):
        file.write_text(f"SOLVER:\n  CHANNELS_LAST: {written}\n")
        cfg = find_host().cfg.clone()
        config.add_deepkd_config(cfg)
        config.load(cfg, file, ("SOLVER.CHANNELS_LAST", option))
        assert value == cfg.SOLVER.CHANNELS_LAST
        assert type(value) is type(cfg.SOLVER.CHANNELS_LAST)


def test_which_teachers_stay_plain(monkeypatch):
    cfg = launch.read_config(find_host(), "configs/glyphs100/res20_res8/deepkd_mlkd.yaml", TABLE)[0].clone()
    assert config.plain_teacher(cfg) == ""  # it computes the strong view
    cfg.defrost()
    cfg.DeepKD.BASE = "KD"
    assert config.plain_teacher(cfg) == "DISTILLER.TEACHER_LOGITS table keeps the plain teacher's logits"
    cfg.DISTILLER.TEACHER_LOGITS = "compute"
    assert config.plain_teacher(cfg) == ""
    cfg.DISTILLER.TYPE, cfg.DISTILLER.FOLD_TEACHER = "FEATURES", True
    monkeypatch.setitem(DISTILLERS, "FEATURES", type("Features", (Distiller,), {}))
    with pytest.raises(UserError, match="auto or False: DISTILLER.TYPE FEATURES needs more of the teacher than its"):
        config.check(cfg, {})
