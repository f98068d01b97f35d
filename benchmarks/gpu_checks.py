"""Every claim about GPUs that no test on a CPU can settle, checked on one card in less than 8 minutes.

    python benchmarks/gpu_checks.py [--write gpu_checks.json] [--rows graphs_equal_eager …]

A row is a claim, what was measured and whether they agree. A row that fails does not stop the others. The file holds
the machine, the versions and the rows; it is written after each row, so what was measured is kept whatever happens.
No network is needed, and no data but glyphs100, which is drawn on this machine, with its teacher.

Exit code: 0 if every row that ran is as claimed, 1 if one is not, 2 without CUDA. With --device cpu the rows that need
no CUDA run on the CPU; the others are written down as skipped, which is neither right nor wrong.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gpu_divided  # noqa: F401 (it adds its rows)
import torch
from common import machine
from gpu_case import (
    LARGE,
    MOMENTUM,
    ROWS,
    Case,
    Finding,
    batches_of,
    buffers_of,
    config_of,
    distance,
    exact,
    images_of,
    row,
    step_of,
    take,
    teacher_of,
)
from torch import Tensor, nn

from deepkd_plugin import DecoupledMomentumSGD, data, device
from deepkd_plugin.accuracy import Alone, evaluate
from deepkd_plugin.data import draws, resident
from deepkd_plugin.data.normalise import Normalise
from deepkd_plugin.distillers import KD, DeepKD
from deepkd_plugin.errors import UserError
from deepkd_plugin.launch import main as train
from deepkd_plugin.run.metrics import read_metrics
from deepkd_plugin.speed import STEPS, GraphedStep
from deepkd_plugin.terminal import Parser, guarded

ROUNDS, REPEAT = 15, 10
"""Readings of the clock, and steps between two of them, of which step_times takes the median."""

BUDGET = 440.0
"""Seconds after which no further row begins."""

SKIPPED = "skipped: needs CUDA"

ROOT = Path(__file__).parents[1]
# The rows, what takes long last


@row("foreach, single-tensor and capturable updates move the weights alike, to 1e-6", needs_cuda=False)
def optimizer_ways(case: Case) -> Finding:
    def run(**options: bool) -> list[Tensor]:
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(64, 33, device=case.device)) for _ in range(5)]
        optimizer = DecoupledMomentumSGD(params, 0.1, MOMENTUM, 5e-4, "tcg", **options)
        for _ in range(10):
            optimizer.zero_grad()
            losses = {s: sum((p * torch.randn_like(p)).sum() for p in params) for s in MOMENTUM}
            optimizer.backward(losses)
            optimizer.step()
        return [p.detach() for p in params]

    reference = run(foreach=False)
    found = {"foreach": distance(reference, run()), "capturable": distance(reference, run(capturable=True))}
    return found, max(found.values()) <= 1e-6


@row("PyTorch's GradScaler recipe: the steps of no scaler to 1e-5, and an overflow moves nothing", needs_cuda=False)
def grad_scaler(case: Case) -> Finding:
    def run(scaled: bool) -> tuple[list[Tensor], bool]:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10)).to(case.device)
        optimizer = DecoupledMomentumSGD(network.parameters(), 0.1, MOMENTUM, 5e-4, "tcg")
        scaler = torch.amp.GradScaler(case.device.type, init_scale=2.0**10, enabled=scaled)
        still = True
        for i in range(8):
            image = torch.randn(16, 20, device=case.device)
            target = torch.randint(10, (16,), device=case.device)
            overflow = scaled and i == 4
            before = [t.clone() for t in (*network.parameters(), *_state(optimizer))] if overflow else []
            out = network(image) * (math.inf if overflow else 1.0)
            ce = nn.functional.cross_entropy(out, target)
            losses = {"tog": ce, "tcg": out.square().mean(), "ncg": out.abs().mean()}
            optimizer.zero_grad()
            optimizer.backward({s: scaler.scale(loss) for s, loss in losses.items()})
            if i == 4 and not scaled:
                continue  # the step that the other run skips
            scaler.step(optimizer)
            scaler.update()
            now = (*network.parameters(), *_state(optimizer)) if overflow else ()
            still &= all(torch.equal(a, b) for a, b in zip(before, now))
        return [p.detach() for p in network.parameters()], still

    (plain, _), (scaled, still) = run(scaled=False), run(scaled=True)
    found = {"difference": distance(plain, scaled), "overflow moves nothing": still}
    return found, found["difference"] <= 1e-5 and still


def _state(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [t for state in optimizer.state.values() for t in state.values()]


@row("bfloat16 reaches the forward pass in DataParallel's threads and on one card", needs_cuda=False)
def amp_in_threads(case: Case) -> Finding:
    step, (batch,) = step_of(case, amp=True), batches_of(case, 1)
    seen: list[torch.dtype] = []
    step.module.student.register_forward_hook(lambda module, inputs, output: seen.append(output[0].dtype))
    whole = {**batch, "epoch": 1}
    if case.cuda:
        nn.DataParallel(step.module, device_ids=[0])(**whole)
        nn.parallel.parallel_apply([step.module] * 2, [()] * 2, [whole] * 2, [0, 0])
    else:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(step.module, **whole).result()
    names = [str(dtype) for dtype in seen]
    return names, names == ["torch.bfloat16"] * len(seen) and len(seen) == (3 if case.cuda else 1)


@row("a bfloat16 teacher's last layer in float32: no logits are tied, and the error of a logit falls", needs_cuda=False)
def teacher_top_50(case: Case) -> Finding:
    count = 2000 if case.cuda else 200
    image, _ = images_of(case, count)
    plain, wide = teacher_of(case), teacher_of(case)
    device.classify_in_float32(wide)
    with torch.no_grad():
        reference = plain(image)[0]
        with device.autocast(case.device, True):
            low, high = plain(image)[0], wide(image)[0]
    top = [out.float().topk(50).indices.sort().values for out in (reference, low, high)]
    found: dict[str, Any] = {
        name: {
            "top 50 changed": float((top[0] != mine).any(1).float().mean()),
            "images with tied logits": sum(len(line.unique()) < 100 for line in out) / count,
            "mean error of a logit": float((out.float() - reference).abs().mean()),
        }
        for name, out, mine in (("all in bfloat16", low, top[1]), ("last layer in float32", high, top[2]))
    }
    before, after = found.values()
    untied = after["images with tied logits"] <= 0.01 < before["images with tied logits"]
    return found, untied and after["mean error of a logit"] < before["mean error of a logit"]


@row("SOLVER.DETERMINISTIC: two runs of DeepKD are equal bit for bit", needs_cuda=False)
def deterministic_twice(case: Case) -> Finding:
    benchmark = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    try:
        device.tune(deterministic=True)
        with device.refusals():
            one, other = (take(step_of(case), batches_of(case, 4)) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = benchmark
    unequal = sum(not torch.equal(a, b) for a, b in zip(one, other))
    return f"{unequal} of {len(one)} tensors differ", unequal == 0


@row("DATASET.PIPELINE device: images for equal draws and for tests are the CPU's bit for bit", needs_cuda=False)
def pipeline_device(case: Case) -> Finding:
    cfg = config_of(case)
    cfg.DATASET.PIPELINE = "device"
    loader, test, *_ = data.get_dataset(cfg)
    index = torch.arange(0, len(loader.targets), 7, device=loader.targets.device)
    numbers = draws.uniforms(0, 1, index, draws.WEAK, resident.count_numbers(loader.distortions))
    drawn = resident.draw(loader.distortions, numbers)
    made = loader.make(index, drawn).cpu()
    here = copy.copy(loader)
    here.images, here.targets = loader.images.cpu(), loader.targets.cpu()
    source = data.source(cfg.DATASET.TYPE)
    here.normalise = Normalise(source.mean, source.std, "cpu")
    training = torch.equal(made, here.make(index.cpu(), [draw.cpu() for draw in drawn]))
    cfg.DATASET.PIPELINE = "workers"
    ours = next(iter(test))[0].cpu()
    theirs = torch.stack([test.dataset[i][0] for i in range(len(ours))])
    found = {"training": training, "tests": torch.equal(ours, theirs), "device": str(loader.images.device)}
    return found, training and found["tests"]


@row("the teacher's accuracy in test batches of 1,000 is that in batches of 64, to 0.1 %", needs_cuda=False)
def large_test_batches(case: Case) -> Finding:
    image, label = images_of(case, 2000 if case.cuda else 200)
    samples, solver = list(zip(image.cpu(), label.cpu())), config_of(case).SOLVER
    alone = Alone(teacher_of(case))
    found = {}
    for size in (64, 1000):
        loader = torch.utils.data.DataLoader(samples, size)
        start = time.perf_counter()
        found[size] = evaluate(alone, loader, case.device, solver)["test_acc"]
        found[f"seconds of {size}"] = time.perf_counter() - start
    return found, abs(found[64] - found[1000]) <= 0.1


@row("graphs: replayed steps are the eager ones to 1e-4, in one capture for each change of the constants")
def graphs_equal_eager(case: Case) -> Finding:
    batches = batches_of(case, 8)
    with exact():
        expected = take(step_of(case, capturable=True), batches)
        graphed = step_of(case, "graphs")
        count = _count_captures(graphed)
        taken = take(graphed, batches)
    changes = len({repr(graphed.module.constants(epoch, 100)) for epoch in (1, 2, 3)})
    found = {"difference": distance(expected, taken), "captures": count[0], "changes": changes, "way": graphed.name}
    return found, found["difference"] <= 1e-4 and count[0] == changes and graphed.name == "graphs"


def _count_captures(step: GraphedStep) -> list[int]:
    count, capture = [0], step.captures.capture

    def counted(function: Callable[[], Any]) -> Any:
        count[0] += 1
        return capture(function)

    step.captures.capture = counted
    return count


@row("graphs: a capture beside a thread that pins memory, as a loader's does, succeeds")
def graphs_beside_a_loader(case: Case) -> Finding:
    graphed, batches, done = step_of(case, "graphs"), batches_of(case, 8), []

    def pin() -> int:
        pinned = 0
        while not done:
            torch.empty(2**20 + 4096 * pinned, dtype=torch.uint8).pin_memory()
            pinned += 1
        return pinned

    with ThreadPoolExecutor(1) as pool:
        pinning = pool.submit(pin)
        try:
            take(graphed, batches)
        finally:
            done.append(True)
        pinned = pinning.result()
    return {"way": graphed.name, "buffers pinned": pinned}, graphed.name == "graphs" and pinned > 0


@row("graphs: a step that cannot be captured goes on eagerly, as the eager one to 1e-4")
def graphs_fall_back(case: Case) -> Finding:
    batches = batches_of(case, 6)
    with exact():
        expected = take(step_of(case, capturable=True), batches)
        graphed = step_of(case, "graphs")
        # the host reads a number, which no capture allows
        graphed.module.student.register_forward_hook(lambda module, inputs, output: output[0].sum().item() and None)
        taken = take(graphed, batches)
    found = {"difference": distance(expected, taken), "way": graphed.name}
    return found, found["difference"] <= 1e-4 and graphed.name == "eager"


@row("graphs: captures share their memory: two more need less than a tenth more than the first")
def one_pool(case: Case) -> Finding:
    graphed, batches = step_of(case, "graphs", pair=LARGE), batches_of(case, 6)
    reserved = []
    for epoch in range(1, 4):
        graphed.optimizer.param_groups[0]["lr"] = 0.01 / epoch
        for batch in batches:
            graphed(batch, epoch)
        torch.cuda.synchronize()
        reserved.append(torch.cuda.memory_reserved() / 2**20)
    return {"MiB reserved after 1, 2, 3 captures": reserved}, reserved[2] <= 1.1 * reserved[0]


@row("compile: steps are the eager ones to 1e-3, and do not fall back")
def compile_equals_eager(case: Case) -> Finding:
    batches = batches_of(case, 8)
    with exact():
        expected = take(step_of(case, capturable=True), batches)
        compiled = step_of(case, "compile")
        taken = take(compiled, batches)
    found = {"difference": distance(expected, taken), "way": compiled.name}
    return found, found["difference"] <= 1e-3 and compiled.name == "compile"


@row("compile: the passes of the next step and of a test leave momentum buffers and weights as they are")
def buffers_not_overwritten(case: Case) -> Finding:
    compiled, batches = step_of(case, "compile"), batches_of(case, 6)
    take(compiled, batches, 1)
    kept = [*buffers_of(compiled), *compiled.module.get_learnable_parameters()]
    before = [t.detach().clone() for t in kept]
    for batch in batches:
        compiled.gradients(batch, 1)
    with torch.no_grad():
        for batch in batches:
            compiled.module.eval()(image=batch["image"])
    changed = sum(not torch.equal(a, b) for a, b in zip(before, kept))
    return f"{changed} of {len(kept)} tensors changed ({compiled.name})", changed == 0 and compiled.name == "compile"


@row("a whole run with graphs, its images and meters in the capture, loses what the eager one does, to 5 %")
def whole_runs(case: Case) -> Finding:
    losses, ways = {}, {}
    for way in ("eager", "graphs"):
        with tempfile.TemporaryDirectory() as folder:
            pairs = {"EPOCHS": 2, "EXECUTION": way, "LR_SCHEDULE": "step", "WARMUP_EPOCHS": 0}
            options = {f"SOLVER.{name}": value for name, value in pairs.items()}
            options |= {"DATASET.ROOT": case.root, "DATASET.PIPELINE": "device", "DATASET.TRAIN_PER_CLASS": 20}
            options |= {"LOG.PREFIX": folder, "EXPERIMENT.NAME": "run"}
            words = [str(word) for pair in options.items() for word in pair]
            config = ROOT / "configs" / "glyphs100" / "res20_res8" / "deepkd.yaml"
            if code := train(["--cfg", str(config), *words]):
                return f"the run with {way} ends with {code}", False
            lines = read_metrics(Path(folder) / "glyphs100" / "run")
        losses[way] = [line["train_loss"] for line in lines]
        ways[way] = lines[-1]["execution"]
    apart = max(abs(a / b - 1) for a, b in zip(losses["eager"], losses["graphs"]))
    return {"losses": losses, "ways": ways}, apart <= 0.05 and ways["graphs"] == "graphs"


@row("three buffers and gradients by stream cost at most 6 times the student's weights, and 5 %, beside KD's memory")
def peak_memory(case: Case) -> Finding:
    found, (batch,) = {}, batches_of(case, 1)
    for name, method, momentum in (("KD", KD, {"task": 0.9}), ("DeepKD", DeepKD, MOMENTUM)):
        step = step_of(case, pair=LARGE, method=method, momentum=momentum)
        for _ in range(2):
            step(batch, 1)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step(batch, 1)
        torch.cuda.synchronize()
        found[f"{name} MiB"] = torch.cuda.max_memory_allocated() / 2**20
    weights = sum(p.numel() * p.element_size() for p in step.module.get_learnable_parameters()) / 2**20
    found["weights MiB"] = weights
    return found, found["DeepKD MiB"] <= 1.05 * found["KD MiB"] + 6 * weights


@row("graphs and compile take no longer for a step than eager")
def step_times(case: Case) -> Finding:
    (batch,) = batches_of(case, 1)
    methods = {"KD": (KD, {"task": 0.9}), "DeepKD": (DeepKD, {"tog": 0.975, "tcg": 0.825, "ncg": 0.975})}
    found: dict[str, dict[str, Any]] = {}
    for way in STEPS:
        for name, (method, momentum) in methods.items():
            step = step_of(case, way, LARGE, method, momentum)
            for _ in range(8):
                step(batch, 1)
            times = []
            for _ in range(ROUNDS):
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(REPEAT):
                    step(batch, 1)
                torch.cuda.synchronize()
                times.append(1e3 * (time.perf_counter() - start) / REPEAT)
            found[f"{name}, {way}"] = {"ms": statistics.median(times), "way": step.name}
            del step
    for name in methods:
        for way in STEPS:
            found[f"{name}, {way}"]["to eager"] = found[f"{name}, {way}"]["ms"] / found[f"{name}, eager"]["ms"]
    for way in STEPS:
        found[f"DeepKD, {way}"]["to KD"] = found[f"DeepKD, {way}"]["ms"] / found[f"KD, {way}"]["ms"]
    taken = all(of["way"] == key.split(", ")[1] for key, of in found.items())
    return found, taken and all(of["to eager"] <= 1.0 for key, of in found.items() if "eager" not in key)


def check(name: str, case: Case, left: float) -> dict[str, Any]:
    """Return one line of the file. left: seconds in which a row may still begin."""
    line: dict[str, Any] = {"name": name, "claimed": ROWS[name].claim, "measured": SKIPPED, "ok": None, "seconds": 0.0}
    if ROWS[name].needs_cuda and not case.cuda:
        return line
    if left <= 0:
        return line | {"measured": f"not begun in {BUDGET:.0f} seconds", "ok": False}
    start = time.perf_counter()
    try:
        measured, ok = ROWS[name].check(case)
    except Exception as error:  # the other rows go on
        measured, ok = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}", False
    torch._dynamo.reset()
    device.release()
    return line | {"measured": measured, "ok": bool(ok), "seconds": round(time.perf_counter() - start, 2)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the rows. Returns the exit code."""
    return guarded(lambda: _main(list(sys.argv[1:] if argv is None else argv)))


def _main(words: list[str]) -> int:
    parser = Parser("gpu_checks.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: rows that need no CUDA")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="NAME", help="only these")
    parser.add_argument("--root", type=Path, help="folder of glyphs100, drawn if it is not there (a temporary one)")
    parser.add_argument("--write", type=Path, default=Path("gpu_checks.json"), help="the file (./gpu_checks.json)")
    args = parser.parse(words)
    os.environ.setdefault(device.WORKSPACE, device.REPEATABLE[0])  # before CUDA starts
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("gpu_checks.py needs CUDA, and PyTorch finds none here; --device cpu runs the rows without it")
    with tempfile.TemporaryDirectory() as temporary:
        case = Case(torch.device(args.device), args.root or Path(temporary))
        record: dict[str, Any] = {"machine": machine() | {"checked on": args.device}, "rows": []}
        started = time.perf_counter()
        for name in args.rows:
            line = check(name, case, BUDGET - (time.perf_counter() - started))
            record["rows"].append(line)
            args.write.write_text(json.dumps(record, indent=1) + "\n")
            state = {True: "ok", False: "NOT OK", None: "skipped"}[line["ok"]]
            print(f"{state:8} {name} ({line['seconds']:.1f} s): {line['measured']}", flush=True)
    wrong = [line["name"] for line in record["rows"] if line["ok"] is False]
    ran = sum(line["ok"] is not None for line in record["rows"])
    print(f"{ran - len(wrong)} of {ran} rows as claimed, {len(args.rows) - ran} skipped; {args.write}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
