"""Draw the pictures of README and docs into docs/figures/, from the package's code and the measurements in results/.

python tools/figures.py           writes all of them, or those that are named (python tools/figures.py cost)
python tools/figures.py --check   writes nothing, names pictures that show other numbers than today's and exits 1

Each picture holds a hash of the numbers it shows, so a check draws nothing and does not depend on matplotlib's version.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from deepkd_plugin import DecoupledMomentumSGD, TopKSchedule, data
from deepkd_plugin.data.glyphs import CHARACTERS, render_glyphs
from deepkd_plugin.hosts.builtin import shipped_weights
from deepkd_plugin.hosts.builtin.models import cifar_model_dict
from deepkd_plugin.run.checkpoint import load_weights
from deepkd_plugin.topk import top_k_index

ROOT = Path(__file__).parents[1]
MOMENTA = {"tog": 0.975, "tcg": 0.825, "ncg": 0.975}
"""The paper's momenta, 0.9 with a delta of 0.075, as most configs have them."""
COLOURS = {"tog": "#0072B2", "tcg": "#D55E00", "ncg": "#009E73"}
"""Okabe and Ito's, which colour-blind readers can tell apart."""
GREY = "#777777"
TEMPERATURE, KEPT, SHOWN, IMAGE = 4.0, 12, 24, 82
"""Of the picture of the idea: temperature, size of the mask, how many classes fit, which test image."""
TABLES = {
    "glyphs100": "glyphs100\n12 epochs",
    "cifar100_cpu": "a fifth of CIFAR-100\n6 epochs",
    "cifar100_cpu_24_epochs": "a fifth of CIFAR-100\n24 epochs",
}
"""Tables of results/ that compare DeepKD with its bases."""
STEPS = {"KD": "KD", "DeepKD, 2 coefficients": "DeepKD", "DeepKD, 3 coefficients": "three momenta"}

Numbers = dict[str, Any]


class Picture(NamedTuple):
    """One picture: what it shows, and how that is drawn."""

    numbers: Callable[[Path], Numbers]
    """The repository's folder -> what is shown; everything that can change without this file."""
    draw: Callable[[Numbers], Figure]


def idea_numbers(root: Path) -> Numbers:
    """Return what is the same on every machine: pixels and a teacher's digits depend on the libraries' versions."""
    return {"momenta": MOMENTA, "temperature": TEMPERATURE, "kept": KEPT, "image": IMAGE}


def taught() -> tuple[np.ndarray, list[str], list[float], list[bool]]:
    """Ask the teacher that ships about a test image: pixels, and names, shares and places in the mask of the classes.

    The label's class is the first; the others come in the order of their share.
    """
    images, labels = render_glyphs("test", per_class=1)
    source = data.source("glyphs100")
    teacher = cifar_model_dict["resnet20"][0](num_classes=100)
    load_weights(teacher, shipped_weights("builtin:glyphs100_resnet20"), "the teacher", "resnet20")
    image, label = images[IMAGE], int(labels[IMAGE])
    batch = torch.tensor((image / 255.0 - source.mean) / source.std).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        logits = teacher.eval()(batch)[0]
    kept = top_k_index(logits, torch.tensor([label]), KEPT)[0].tolist()
    shares = (logits[0] / TEMPERATURE).softmax(0)
    order = [label, *(i for i in shares.argsort(descending=True).tolist() if i != label)]
    return image, [CHARACTERS[i] for i in order], shares[order].tolist(), [i in kept for i in order]


def draw_idea(numbers: Numbers) -> Figure:
    """Draw one image, the three parts of what it teaches, and how long each is remembered."""
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    grid = figure.add_gridspec(3, 3, width_ratios=(1.1, 3.2, 2.2))
    image, names, shares, kept = taught()
    axis = figure.add_subplot(grid[:, 0])
    axis.imshow(image)
    axis.set_title("one image of\nthe batch", fontsize="medium")
    axis.set_xlabel(f"label: {names[0]}\n\nstudent and\nteacher see it once", fontsize="medium")
    axis.set(xticks=[], yticks=[])
    others = np.asarray(shares[1:SHOWN]) / (1 - shares[0])
    titles = {
        "tog": "TOG, task: the label alone",
        "tcg": "TCG, target class: how sure of it is the teacher",
        "ncg": f"NCG, non-target classes: the teacher's best K, here {KEPT}",
    }
    for i, (stream, colour) in enumerate(COLOURS.items()):
        axis = figure.add_subplot(grid[i, 1])
        axis.set_title(titles[stream], fontsize="medium", loc="left", color=colour)
        if stream == "tcg":
            axis.bar([0, 1], [shares[0], 1 - shares[0]], color=[colour, GREY], width=0.5)
            axis.set_xticks([0, 1], [names[0], "any other class"])
            axis.set_xlim(-1.5, 2.5)
        else:
            heights = np.eye(1, SHOWN)[0] if stream == "tog" else np.r_[0.0, others]
            counted = [True] * SHOWN if stream == "tog" else kept[:SHOWN]
            axis.bar(range(SHOWN), heights, color=[colour if of else "#CCCCCC" for of in counted])
            axis.set_xticks(range(SHOWN), names[:SHOWN], fontsize="small")
        axis.set_yticks([])
        axis.spines[["top", "right", "left"]].set_visible(False)
        memory = figure.add_subplot(grid[i, 2])
        momentum = numbers["momenta"][stream]
        past = np.arange(60)
        memory.fill_between(-past, momentum**past, color=colour, alpha=0.35, linewidth=0)
        memory.plot(-past, momentum**past, color=colour)
        memory.set_title(f"its own momentum: {momentum:g}", fontsize="medium", loc="left", color=colour)
        memory.set_yticks([])
        memory.spines[["top", "right", "left"]].set_visible(False)
        if i == 2:
            memory.set_xlabel("steps back that the buffer remembers")
        else:
            memory.set_xticklabels([])
    figure.supxlabel("The three buffers are added up and move the student's weights.", fontsize="medium")
    return figure


def result_numbers(root: Path) -> Numbers:
    """Read the gains over the base, with their intervals, and the spread of the seeds."""
    rows = {}
    for table in TABLES:
        with (root / "results" / table / "report.csv").open(newline="", encoding="utf-8") as lines:
            gained = [line for line in csv.DictReader(lines) if line["base"] and line["method"].startswith("deepkd")]
        rows[table] = [
            {"base": line["base"].upper(), "runs": int(line["n"])}
            | {name: float(line[f"last_{name}"]) for name in ("gain", "gain_low", "gain_high")}
            for line in gained
            if line["method"] in ("deepkd", f"deepkd_{line['base']}")
        ]
    return rows


def draw_result(numbers: Numbers) -> Figure:
    """Draw every measured gain of DeepKD over its base as a mark with its interval."""
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axis = figure.subplots()
    axis.axvline(0, color="black", linewidth=1)
    at, ticks = 0.0, {}
    for table, rows in numbers.items():
        first = at
        for row in rows:
            low, high = row["gain_low"], row["gain_high"]
            colour = COLOURS["tcg"] if high < 0 else COLOURS["ncg"] if low > 0 else GREY
            axis.plot([low, high], [at, at], color=colour, linewidth=2.5)
            axis.plot(row["gain"], at, "o", color=colour)
            text = f"{row['gain']:+.1f}".replace("-", "−")
            ground = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
            place = {"textcoords": "offset points", "ha": "center", "bbox": ground}
            axis.annotate(text, (row["gain"], at), (0, 6), color=colour, **place)
            ticks[at] = f"over {row['base']}, {row['runs']} seeds"
            at += 1
        axis.annotate(TABLES[table], (0.01, (first + at - 1) / 2), xycoords=("axes fraction", "data"), va="center")
        at += 0.7
    axis.set_yticks(list(ticks), list(ticks.values()))
    axis.yaxis.tick_right()
    axis.invert_yaxis()
    for text, side in (("below its base  ", "right"), ("  above", "left")):
        axis.annotate(text, (0, 1.01), xycoords=("data", "axes fraction"), ha=side)
    axis.set_xlabel("gain of DeepKD over its base, points of top-1, last epoch, with the 95 % interval")
    low = min(row["gain_low"] for rows in numbers.values() for row in rows)
    high = max(row["gain_high"] for rows in numbers.values() for row in rows)
    axis.set_xlim(low - 0.35 * (high - low), max(high, 0) + 0.12 * (high - low))
    axis.spines[["top", "right", "left"]].set_visible(False)
    return figure


def mask_numbers(root: Path) -> Numbers:
    """Ask TopKSchedule for K over training, of 100 classes."""
    phases = {"default: thirds": (1 / 3, 2 / 3), "no easy phase, as glyphs100": (0.0, 0.5)}
    shares = [i / 100 for i in range(101)]
    return {name: [TopKSchedule(100, phases=ends)(share) for share in shares] for name, ends in phases.items()}


def draw_mask(numbers: Numbers) -> Figure:
    """Draw how many non-target classes count."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    axis = figure.subplots()
    for (name, sizes), colour, dashes in zip(numbers.items(), (COLOURS["ncg"], GREY), ("-", "--")):
        axis.plot(range(101), sizes, dashes, color=colour, label=name, linewidth=2)
    axis.set(xlabel="training done, percent", ylabel="K, of 99 non-target classes", ylim=(0, 104), xlim=(0, 100))
    axis.legend(frameon=False, title="ends of the phases")
    return _plain(figure)


def momentum_numbers(root: Path) -> Numbers:
    """Push a weight with DecoupledMomentumSGD: by one gradient, and by the same gradient in every step."""
    pushed = {}
    for momentum in (0.825, 0.9, 0.975):
        paths = {}
        for name, push in (("one", lambda step: float(step == 0)), ("steady", lambda step: 1.0)):
            weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
            optimizer = DecoupledMomentumSGD([weight], lr=1.0, momentum={"tog": momentum})
            path = []
            for step in range(120):
                before = weight.item()
                optimizer.zero_grad()
                optimizer.backward({"tog": push(step) * weight.sum()})
                optimizer.step()
                path.append(round(before - weight.item(), 6))
            paths[name] = path
        pushed[f"{momentum}"] = paths
    return pushed


def draw_momentum(numbers: Numbers) -> Figure:
    """Draw what momentum does to one gradient, and to a steady one."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots(1, 2)
    styles = zip(numbers.items(), (COLOURS["tcg"], GREY, COLOURS["tog"]), ("-", ":", "--"))
    for (momentum, paths), colour, dashes in styles:
        axes[0].plot(paths["one"], dashes, color=colour, label=momentum, linewidth=2)
        axes[1].plot(paths["steady"], dashes, color=colour, linewidth=2)
        axes[1].annotate(f"1 / (1 − {momentum}) = {1 / (1 - float(momentum)):.1f}", (119, paths["steady"][-1]),
                         (0, 4), textcoords="offset points", ha="right", color=colour)  # fmt: skip
    axes[0].set(title="one gradient: how long it moves the weight", xlabel="steps", ylabel="length of a step")
    axes[1].set(title="a steady gradient: how long steps become", xlabel="steps", ylim=(0, 46))
    axes[0].legend(frameon=False, title="momentum")
    return _plain(figure)


def cost_numbers(root: Path) -> Numbers:
    """Read the times of a step, over those of KD's."""
    found: Numbers = {}
    for row in json.loads((root / "results" / "step.json").read_text(encoding="utf-8"))["rows"]:
        if row["step"] in STEPS and "batched" not in row["gradients"] and row["execution"] == "eager":
            found.setdefault(row["pair"], {})[STEPS[row["step"]]] = [round(row["ms"], 1), round(row["floor ratio"], 3)]
    return found


def draw_cost(numbers: Numbers) -> Figure:
    """Draw a step's time over KD's, and that of its passes alone."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axis = figure.subplots()
    colours = dict(zip(STEPS.values(), (GREY, COLOURS["tog"], COLOURS["ncg"])))
    for i, steps in enumerate(numbers.values()):
        for j, (name, (ms, floor)) in enumerate(steps.items()):
            at, ratio = i + 0.27 * (j - 1), ms / steps["KD"][0]
            axis.bar(at, ratio, width=0.25, color=colours[name])
            axis.plot([at - 0.125, at + 0.125], [floor, floor], color="black", linewidth=1.5)
            axis.annotate(f"{ratio:.2f}", (at, max(ratio, floor)), (0, 3), textcoords="offset points", ha="center")
    axis.set_xticks(range(len(numbers)), [pair.replace(" → ", " →\n") for pair in numbers])
    axis.set(ylabel="time of a step over KD's", ylim=(0, 2.3))
    handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
    axis.legend(handles=handles, frameon=False, ncols=3, loc="upper left")
    return _plain(figure)


def _plain(figure: Figure) -> Figure:
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set_fontsize("medium")
    return figure


PICTURES = {
    "idea": Picture(idea_numbers, draw_idea),
    "result": Picture(result_numbers, draw_result),
    "mask": Picture(mask_numbers, draw_mask),
    "momentum": Picture(momentum_numbers, draw_momentum),
    "cost": Picture(cost_numbers, draw_cost),
}


def shown(numbers: Numbers) -> str:
    """Return the mark by which a picture says what it shows."""
    return f"shows {hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()[:16]}"


def write(name: str, folder: Path, root: Path) -> None:
    """Draw one picture as SVG, with a white ground, which dark pages need."""
    numbers = PICTURES[name].numbers(root)
    with matplotlib.rc_context({"svg.hashsalt": name, "font.size": 10}):
        figure = PICTURES[name].draw(numbers)
        figure.savefig(folder / f"{name}.svg", metadata={"Description": shown(numbers), "Date": None})


def current(name: str, folder: Path, root: Path) -> bool:
    """Tell whether a picture is there and shows today's numbers."""
    file = folder / f"{name}.svg"
    mark = re.search(r"shows [0-9a-f]{16}", file.read_text(encoding="utf-8")) if file.is_file() else None
    return mark is not None and mark.group() == shown(PICTURES[name].numbers(root))


def main(argv: Sequence[str], root: Path = ROOT) -> int:
    """Write, or with --check compare; returns the exit code."""
    folder = root / "docs" / "figures"
    if list(argv) == ["--check"]:
        stale = [name for name in PICTURES if not current(name, folder, root)]
        print("\n".join(f"{name}.svg shows other numbers; python tools/figures.py {name}" for name in stale))
        return int(bool(stale))
    if not set(argv) <= PICTURES.keys():
        print(__doc__, f"The pictures are {', '.join(PICTURES)}.", sep="\n", file=sys.stderr)
        return 2
    folder.mkdir(parents=True, exist_ok=True)
    for name in argv or PICTURES:
        write(name, folder, root)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
