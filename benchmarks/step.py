"""Training steps against a plain KD step of the same pair, in one process and in turn.

    python benchmarks/step.py [--quick] [--execution compile] [--channels-last [ours]] [--amp] [--write PATH.md]
    python benchmarks/step.py --pairs all --rounds 15

A step is what changes the weights once: the teacher's and the student's forward pass, losses, backward passes,
optimizer. Images are noise, on the device already. The rows of a pair:

- KD: its loss, one backward pass and torch.optim.SGD(foreach);
- two streams (DOT's: task and distillation) and DeepKD with two and with three distinct coefficients, by our
  DecoupledMomentumSGD: one backward pass for each distinct coefficient;
- with --execution the same, and KD as one stream, in the other ways of SOLVER.EXECUTION: networks compiled, steps
  replayed as CUDA graphs. The column names the way that was taken, eager if another could not be;
- KD and DeepKD with a table of the teacher's logits (DISTILLER.TEACHER_LOGITS table, float16) that is full, reading
  included, for CIFAR pairs; and the same with 60 of the 100 classes' logits, as `stored` may have them;
- KD and DeepKD with a teacher whose BatchNorms are folded (DISTILLER.FOLD_TEACHER), in float32;
- if MDISTILLER_ROOT names a checkout of mdistiller, its KD and its DOT; if DEEPKD_RELEASE_ROOT names one of
  the authors' release, its DeepKD with its three backward passes. Distiller, trainer and optimizer are theirs, the
  networks ours, so that only the step differs. Their trainers' own `train_iter` runs up to its clock behind the
  optimizer; the accuracies and meters that follow it are left out, as ours are. --amp and --channels-last, which
  they do not have, are put around them too. With --channels-last ours they keep their own memory format, as their
  users have it, and only our rows have ours.

Columns: "floor ratio" is what the arithmetic of a method's n distinct coefficients costs beside KD's,
(F_t + F_s + n·B) / (F_t + F_s + B), of the teacher's forward, the student's forward and backward times, which the
second table has; "ratio to floor" is the step's time over F_t + F_s + n·B, of parts in the row's memory format. With a
table there is no F_t above, and with a folded teacher it is the folded one's. For KD the latter is what the losses and
the optimizer cost. "ratio to mdistiller's KD" and "ratio to the release's" are the step's time over that of theirs, in
the same run and turn. The release's DeepKD has two distinct coefficients, so n = 2
there, as in ours.
Peak memory is what a few steps hold beyond what stood before them.

The defaults, two pairs on a CPU and all four on a GPU, take less than 3 minutes on 2 cores, --quick less than one.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import others
import torch
from common import Rows, conditions, medians_in_turn, memory_format, peak_mebibytes, report
from torch import Tensor, nn

from deepkd_plugin import DecoupledMomentumSGD, device
from deepkd_plugin.config.tree import add_deepkd_config
from deepkd_plugin.distillers import KD, DeepKD
from deepkd_plugin.fold import fold
from deepkd_plugin.hosts import builtin
from deepkd_plugin.speed import STEPS, make_step
from deepkd_plugin.step import Step
from deepkd_plugin.streams import assign_losses
from deepkd_plugin.teacher_logits.lookup import TeacherLogits
from deepkd_plugin.teacher_logits.table import Key
from deepkd_plugin.terminal import Parser, guarded

PAIRS = ("resnet56:resnet20", "resnet32x4:resnet8x4", "wrn_40_2:wrn_16_2", "ResNet34:ResNet18")
LR, WEIGHT_DECAY = 1e-3, 5e-4
MDISTILLERS, RELEASES = "mdistiller's KD", "the release's DeepKD"

STORED = 60
"""Classes of 100 that a stored teacher has here: enough for DeepKD's mask of 50 beside the target."""

SIZES = {
    "quick": {"batch": 16, "imagenet_batch": 2, "imagenet_size": 64, "rounds": 3, "repeat": 1},
    "cpu": {"batch": 64, "imagenet_batch": 8, "imagenet_size": 224, "rounds": 5, "repeat": 1},
    "cuda": {"batch": 64, "imagenet_batch": 256, "imagenet_size": 224, "rounds": 20, "repeat": 10},
}
"""Defaults of the options of these names."""


@dataclass(frozen=True)
class Setting:
    """What all steps of a pair have in common."""

    pair: str
    """"teacher:student"; on ImageNet if both are among the host's ImageNet networks."""
    batch: int
    size: int
    """Height and width of an image."""
    channels_last: bool = False
    amp: bool = False
    ours_alone: bool = False
    """Whether other people's steps have contiguous networks and images all the same."""

    @property
    def imagenet(self) -> bool:
        return on_imagenet(self.pair)


class Method(NamedTuple):
    """A distiller under our optimizer."""

    distiller: type[nn.Module]
    momentum: dict[str, float]
    decay_stream: str
    assignment: dict[str, str]
    """Loss -> stream, if the names differ."""

    @property
    def sets(self) -> int:
        return len(set(self.momentum.values()))


METHODS = {
    "KD, one stream": Method(KD, {"task": 0.9}, "task", {}),
    "two streams": Method(KD, {"task": 0.825, "kd": 0.975}, "task", {"loss_ce": "task", "loss_kd": "kd"}),
    "DeepKD, 2 coefficients": Method(DeepKD, {"tog": 0.975, "tcg": 0.825, "ncg": 0.975}, "tcg", {}),
    "DeepKD, 3 coefficients": Method(DeepKD, {"tog": 0.975, "tcg": 0.825, "ncg": 0.95}, "tcg", {}),
}


class Row(NamedTuple):
    """A step to be timed."""

    name: str
    gradients: str
    """How it makes its backward passes."""
    sets: int
    """Distinct coefficients: the backward passes that its arithmetic needs."""
    make: Callable[[], Callable[[], None]]
    of: Setting
    teacher: str | None = "F_t"
    """The part that its teacher's pass is; None if it does not compute."""


def on_imagenet(pair: str) -> bool:
    return all(name in builtin.imagenet_model_dict for name in pair.split(":"))


def networks(of: Setting) -> list[nn.Module]:
    """Make teacher and student, untrained, on the device."""
    torch.manual_seed(0)
    names = of.pair.split(":")
    if of.imagenet:
        made = [builtin.imagenet_model_dict[name]() for name in names]
    else:
        made = [builtin.cifar_model_dict[name][0](num_classes=100) for name in names]
    made[0].requires_grad_(False)
    return [device.place(network, device.pick(), of.channels_last) for network in made]


def noise(of: Setting) -> dict[str, Tensor]:
    """Make a batch: image (B, 3, H, W), target (B,)."""
    torch.manual_seed(1)
    image = torch.randn(of.batch, 3, of.size, of.size)
    target = torch.randint(0, 1000 if of.imagenet else 100, (of.batch,))
    return dict(zip(("image", "target"), device.place_batch([image, target], device.pick(), of.channels_last)))


def forward_pass(of: Setting, method: type[nn.Module]) -> tuple[nn.Module, Callable[[], dict[str, Tensor]]]:
    """Make a distiller, and what gives its losses on the batch."""
    cfg = builtin.CFG.clone()
    add_deepkd_config(cfg)
    teacher, student = networks(of)
    distiller = method(student, teacher, cfg).train()
    batch = noise(of)

    def losses() -> dict[str, Tensor]:
        with device.autocast(batch["image"].device, of.amp):
            return distiller(**batch, epoch=1)[1]

    return distiller, losses


def kd_step(of: Setting) -> Callable[[], None]:
    distiller, losses = forward_pass(of, KD)
    params = distiller.get_learnable_parameters()
    optimizer = torch.optim.SGD(params, LR, 0.9, weight_decay=WEIGHT_DECAY, foreach=True)

    def step() -> None:
        optimizer.zero_grad()
        sum(losses().values()).backward()
        optimizer.step()

    return step


def our_step(of: Setting, method: str, execution: str = "eager") -> Callable[[], None]:
    """Make a step of ours; execution: as SOLVER.EXECUTION has it."""
    distiller_type, momentum, decay_stream, assignment = METHODS[method]
    distiller, _ = forward_pass(of, distiller_type)
    params = distiller.get_learnable_parameters()
    optimizer = DecoupledMomentumSGD(params, LR, momentum, WEIGHT_DECAY, decay_stream)
    step = make_step(
        execution,
        distiller,
        optimizer,
        lambda losses: assign_losses(losses, optimizer.streams, assignment),
        of.amp,
    )
    return functools.partial(step, noise(of), 1)


def folded_step(of: Setting, method: str) -> Callable[[], None]:
    """Make a step of ours with a folded teacher."""
    step = our_step(of, method)
    distiller = step.func.module
    distiller.fold(fold(distiller.teacher, step.args[0]["image"][:2]))
    return step


def table_step(of: Setting, method: str, folder: Path, kept: int | None = None) -> Callable[[], None]:
    """Make a step of ours that reads the teacher's logits from a full table of 50 batches, in all their views.

    kept: how many classes' logits it has of each view, as DISTILLER.TEACHER_LOGITS stored may; None: all.
    """
    batches, views = 50, 162
    step = our_step(of, method)
    batch, epoch = step.args
    teacher = step.func.module.teacher
    key = Key(
        network=of.pair.split(":")[0],
        teacher="",
        dataset="noise",
        images="",
        count=batches * of.batch,
        views=views,
        view="",
        classes=teacher(batch["image"][:1])[0].shape[1],
        precision="bfloat16" if of.amp else "float32",
        dtype="float16",
        seed=None if kept is None else 0,
        kept=kept,
        temperature=None if kept is None else 4.0,
    )
    drawn = torch.Generator().manual_seed(0)

    def find(epoch: int, index: Tensor) -> tuple[Tensor, Tensor]:
        return index, torch.randint(views, (len(index),), generator=drawn)

    with contextlib.redirect_stdout(io.StringIO()):  # the table's place is nobody's concern
        logits = TeacherLogits(key, folder, teacher, find, of.amp, np.tile(batch["target"].cpu().numpy(), batches))
    assert logits.table is not None
    full = logits.table.share() == 1  # by another step of the pair
    of_batch = logits.compute(batch["image"], np.arange(of.batch))
    content, _ = key.form.pack(of_batch, batch["target"].cpu().numpy())
    known, places = np.concatenate([content] * batches), np.arange(key.count)
    for view in range(0 if full else views):
        logits.table.write(places, np.full(key.count, view), known)
    index = torch.arange(of.batch)

    def table_step() -> None:
        places = of.batch * torch.randint(batches, (), generator=drawn) + index
        step.func(batch | {"teacher_logits": logits(batch["image"], places, epoch)}, epoch)

    return table_step


def their_step(of: Setting, root: Path, trainer: str) -> Callable[[], None]:
    teacher, student = networks(of)
    solver = {"LR": LR, "WEIGHT_DECAY": WEIGHT_DECAY}
    return others.training_step(root, trainer, student, teacher, noise(of), solver, of.amp)


def parts(of: Setting) -> dict[str, Callable[[], Any]]:
    """Make the pieces of the floor: both forward passes, and the student's forward with its backward."""
    teacher, student = networks(of)
    teacher.eval(), student.train()
    image = noise(of)["image"]

    def forward(network: nn.Module) -> Tensor:
        with device.autocast(image.device, of.amp):
            return network(image)[0]

    def forward_backward() -> None:
        student.zero_grad()
        forward(student).sum().backward()

    teachers = {"F_t": teacher} | ({} if of.amp else {"F_t folded": fold(teacher, image[:2])})
    return {
        **{name: torch.no_grad()(functools.partial(forward, network)) for name, network in teachers.items()},
        "F_s": functools.partial(forward, student),
        "F_s + B": forward_backward,
    }


def rows_of(of: Setting, executions: list[str], roots: Mapping[str, Path | None], folder: Path) -> list[Row]:
    """List everything to be timed for a pair, KD first."""
    make, as_theirs = functools.partial, replace(of, channels_last=of.channels_last and not of.ours_alone)
    rows = [Row("KD", _passes(1), 1, make(kd_step, of), of)]
    for execution in executions:
        for name, method in METHODS.items():
            if method.sets > 1 or execution != "eager":  # eager KD is the reference
                rows.append(Row(name, _passes(method.sets), method.sets, make(our_step, of, name, execution), of))
    for name in ("KD, one stream", "DeepKD, 2 coefficients"):
        sets, short = METHODS[name].sets, name.replace(", one stream", "")
        if not of.imagenet:
            for kind, kept in (("table", None), ("stored", STORED)):
                made = make(table_step, of, name, folder, kept)
                rows.append(Row(f"{short}, {kind}", _passes(sets), sets, made, of, None))
        if not of.amp:
            rows.append(Row(f"{short}, folded", _passes(sets), sets, make(folded_step, of, name), of, "F_t folded"))
    if root := roots[others.MDISTILLER]:
        rows.append(Row(MDISTILLERS, _passes(1), 1, make(their_step, as_theirs, root, "base"), as_theirs))
        rows.append(Row("mdistiller's DOT", _passes(2), 2, make(their_step, as_theirs, root, "dot"), as_theirs))
    if root := roots[others.RELEASE]:
        rows.append(Row(RELEASES, _passes(3), 2, make(their_step, as_theirs, root, "deepkd"), as_theirs))
    return rows


def measure(of: Setting, rows: list[Row], rounds: int, repeat: int, memory: bool) -> tuple[Rows, Rows]:
    """Time a pair and make its tables: its steps, and the parts that its floor is made of."""
    peaks = [peak_mebibytes(row.make) if memory else None for row in rows]
    steps: dict[Any, Callable[[], Any]] = {i: row.make() for i, row in enumerate(rows)}
    settings = dict.fromkeys(row.of for row in rows)
    pieces = {(one, name): part for one in settings for name, part in parts(one).items()}
    times = medians_in_turn(steps | pieces, rounds, repeat=repeat)
    taken = [_execution(step) for step in steps.values()]
    others_rows = {"mdistiller's KD": MDISTILLERS, "the release's": RELEASES}
    theirs = {name: [times[i] for i, row in enumerate(rows) if row.name == of] for name, of in others_rows.items()}
    about = {"pair": of.pair.replace(":", " → "), "images": f"{of.batch} of {of.size} × {of.size}"}

    def backward(one: Setting) -> float:
        return times[one, "F_s + B"] - times[one, "F_s"]

    def floor(one: Setting, passes: int, teacher: str | None = "F_t") -> float:
        return (times[one, teacher] if teacher else 0.0) + times[one, "F_s"] + passes * backward(one)

    table = [
        about
        | {"step": row.name, "gradients": row.gradients, "execution": taken[i]}
        | {"memory format": memory_format(row.of.channels_last)}
        | {"ms": times[i], "ratio to KD": times[i] / times[0]}
        | {"floor ratio": floor(row.of, row.sets, row.teacher) / floor(row.of, 1)}
        | {"ratio to floor": times[i] / floor(row.of, row.sets, row.teacher)}
        | {f"ratio to {name}": times[i] / milliseconds for name, found in theirs.items() for milliseconds in found}
        | ({"peak MiB": peak} if memory else {})
        for i, (row, peak) in enumerate(zip(rows, peaks))
    ]
    return table, [
        about
        | {"memory format": memory_format(one.channels_last)}
        | {f"{name} ms": times[one, name] for name in ("F_t", "F_t folded", "F_s") if (one, name) in times}
        | {"B ms": backward(one), "(F_t + F_s + 3B) / (F_t + F_s + 2B)": floor(one, 3) / floor(one, 2)}
        for one in settings
    ]


def _execution(step: Any) -> str:
    """Return the way that a step took in the end."""
    taken = getattr(step, "func", None)
    return taken.name if isinstance(taken, Step) else "eager"


def _passes(number: int) -> str:
    return f"{number} pass" + "es" * (number > 1)


def pair_argument(text: str) -> str:
    """Check an argument of --pairs; argparse turns the error into one line."""
    names = text.split(":")
    known = builtin.cifar_model_dict
    if text != "all" and not (len(names) == 2 and (on_imagenet(text) or all(name in known for name in names))):
        raise argparse.ArgumentTypeError(
            f'{text!r}; it must be "all" or TEACHER:STUDENT, two of {", ".join(known)} or two of '
            f"{', '.join(builtin.imagenet_model_dict)}"
        )
    return text


def main() -> None:
    torch_device = device.pick()
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pairs",
        nargs="+",
        type=pair_argument,
        default=["all"] if torch_device.type == "cuda" else PAIRS[:2],
        metavar="TEACHER:STUDENT",
        help=f'networks, or "all" for {" ".join(PAIRS)} (the first two; GPU: all)',
    )
    parser.add_argument("--quick", action="store_true", help="few images and rounds, unless given")
    parser.add_argument("--rounds", type=count_argument, help="default: 5 on a CPU, 20 on a GPU")
    parser.add_argument("--repeat", type=count_argument, help="steps between two readings of the clock (1; GPU: 10)")
    parser.add_argument("--batch", type=count_argument, help="images for the CIFAR pairs (64)")
    parser.add_argument("--imagenet-batch", type=count_argument, help="images for the ImageNet pairs (8; GPU: 256)")
    parser.add_argument("--imagenet-size", type=count_argument, help="their height and width (224)")
    parser.add_argument(
        "--execution",
        nargs="+",
        choices=[name for name in STEPS if name != "eager"],
        default=[],
        help="also these ways of SOLVER.EXECUTION",
    )
    parser.add_argument(
        "--channels-last",
        nargs="?",
        const="all",
        choices=("all", "ours"),
        help="the memory format of all steps, or of ours alone beside others' in their own",
    )
    parser.add_argument("--amp", action="store_true", help="forward passes under bfloat16 autocast")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    parser.add_argument("--write", type=Path, help="Markdown file to write; a .json is written beside it")
    args = parser.parse_args()
    for name, value in SIZES["quick" if args.quick else torch_device.type].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    executions = ["eager", *args.execution]
    roots = {variable: others.find(variable) for variable in (others.MDISTILLER, others.RELEASE)}
    device.tune()
    tables: tuple[Rows, Rows] = ([], [])
    for pair in PAIRS if "all" in args.pairs else args.pairs:
        sizes = (args.imagenet_batch, args.imagenet_size) if on_imagenet(pair) else (args.batch, 32)
        of = Setting(pair, *sizes, bool(args.channels_last), args.amp, args.channels_last == "ours")
        with tempfile.TemporaryDirectory() as folder:
            rows = rows_of(of, executions, roots, Path(folder))
            tables_of_pair = measure(of, rows, args.rounds, args.repeat, not args.no_memory)
        for table, new in zip(tables, tables_of_pair):
            table.extend(new)
    of_steps = f" of {args.repeat} steps" if args.repeat > 1 else ""
    title = f"Training step, medians of {args.rounds} rounds{of_steps} in turn"
    settings = conditions(bool(args.channels_last), args.amp)
    if args.channels_last == "ours":
        settings["memory format"] += " for ours, contiguous for others'"
    report(title, tables[0], args.write, settings, tables[1])


def count_argument(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}; it must be a whole number from 1 on")
    return int(text)


if __name__ == "__main__":
    sys.exit(guarded(main))
