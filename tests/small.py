"""A run of four epochs that takes a tenth of a second, and processes that train it and are killed."""

import io
import os
import signal
import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from deepkd_plugin import launch
from deepkd_plugin.config.tree import add_deepkd_config
from deepkd_plugin.device import seed_everything
from deepkd_plugin.distillers import DeepKD
from deepkd_plugin.hosts import builtin
from deepkd_plugin.run import checkpoint
from deepkd_plugin.terminal import guarded
from deepkd_plugin.trainer import DecoupledMomentumTrainer

COMMAND = "python tools/train.py --cfg small.yaml"


class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(12, width), nn.BatchNorm1d(width), nn.ReLU())
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        return self.head(self.body(x)), {}


def config(prefix, **keys):
    """The run's config; keys: of SOLVER."""
    cfg = builtin.CFG.clone()
    add_deepkd_config(cfg)
    cfg.LOG.PREFIX = str(prefix)
    cfg.LOG.SAVE_CHECKPOINT_FREQ = 2
    cfg.SOLVER.EPOCHS, cfg.SOLVER.BATCH_SIZE, cfg.SOLVER.LR_DECAY_STAGES = 4, 16, [2]
    cfg.SOLVER.DECOUPLED.DELTA.TOG, cfg.SOLVER.DECOUPLED.DELTA.TCG = 0.05, -0.05
    cfg.DATASET.NUM_WORKERS = 0
    cfg.SOLVER.CHANNELS_LAST = cfg.DISTILLER.FOLD_TEACHER = False
    for key, value in keys.items():
        cfg.SOLVER[key] = value
    return cfg


def make(cfg, width=8):
    seed_everything(cfg.SOLVER.SEED)
    distiller = DeepKD(Net(width), Net(16).requires_grad_(False), cfg)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(50, 3, 2, 2, generator=generator)
    labels = (images.flatten(1) @ torch.randn(12, 5, generator=generator)).argmax(1)
    workers = cfg.DATASET.NUM_WORKERS
    train = DataLoader(TensorDataset(images, labels, torch.arange(50)), 16, shuffle=True, num_workers=workers)
    made = DecoupledMomentumTrainer("run", distiller, train, DataLoader(TensorDataset(images, labels), 16), cfg)
    made.teacher_acc = 50.0  # as if it had been tested: this teacher knows nothing
    return made


def train(cfg, resume=False, overwrite=False, width=8):
    return launch.run(make(cfg, width), resume, overwrite, COMMAND)


def weights(folder, name="student_latest"):
    return checkpoint.load(folder / name, "test")["model"]


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def files(folder):
    """What is in a folder, but for the lock: relative names -> bytes."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if name != "lock"}


def kill_at(number):
    """Let this process be killed in place of its `number`th change of a folder: a rename, a removal, a new folder."""
    left = iter(range(number - 1, -1, -1))

    def killing(change):
        def changed(*arguments, **named):
            if next(left, 1) == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*arguments, **named)

        return changed

    for name in ("replace", "rename", "unlink", "mkdir", "rmdir"):
        setattr(os, name, killing(getattr(os, name)))


def command(work, before=lambda: None, meanwhile=lambda pid: None):
    """Run work() as a command in a process of its own; returns (exit code, stdout, stderr), code < 0 for a signal.

    before: called in that process first. meanwhile: called here with its id.
    """
    ends = [os.pipe(), os.pipe()]
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            for stream, (_, end) in enumerate(ends, 1):
                os.dup2(end, stream)
            sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(n, "w"), write_through=True) for n in (1, 2))
            before()
            code = guarded(lambda: work() and None)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    texts = []
    for _, write_end in ends:
        os.close(write_end)
    meanwhile(pid)
    for read_end, _ in ends:
        with open(read_end, errors="replace") as end:
            texts.append(end.read())
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), *texts
