"""What the examples have in common: made data, two networks, DeepKD's losses by stream, and its optimizer."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from deepkd_plugin import DecoupledMomentumSGD, TopKSchedule, decoupled_kd

CLASSES, EPOCHS, BATCH = 20, 10, 32
MOMENTA = {"tog": 0.975, "tcg": 0.825, "ncg": 0.975}  # 0.9 ± 0.075, as in the paper
ALPHA, BETA, GAMMA = 0.5, 1.0, 1.0  # weights of cross-entropy, target class and non-target classes
SCHEDULE = TopKSchedule(CLASSES)  # how many non-target classes count, over the share of training that is done


def networks(dtype=torch.float32):
    """Make a student and a larger teacher that is never trained."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, CLASSES))
    student = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, CLASSES))
    return student.to(dtype), teacher.to(dtype).eval().requires_grad_(False)


def data(dtype=torch.float32):
    """Make 256 samples of 8 numbers; the labels are what the teacher says."""
    inputs = torch.randn(256, 8, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return TensorDataset(inputs, networks(dtype)[1](inputs).argmax(1))


def batches(dataset, size=BATCH, sampler=None):
    """Return a loader whose order is the same in every example."""
    return DataLoader(dataset, size, sampler=sampler)


def optimizer(student):
    """Make SGD with a momentum for each stream. Weight decay belongs to one stream."""
    return DecoupledMomentumSGD(student.parameters(), 0.05, MOMENTA, weight_decay=5e-4, weight_decay_stream="tcg")


def losses(logits, teacher_logits, labels, epoch):
    """DeepKD over KD: stream -> loss."""
    top_k = SCHEDULE(epoch / (EPOCHS - 1))
    tckd, nckd, p = decoupled_kd(logits, teacher_logits, labels, temperature=4.0, top_k=top_k)
    return {
        "tog": ALPHA * F.cross_entropy(logits, labels),
        "tcg": BETA * tckd.mean(),
        "ncg": GAMMA * ((1 - p) * nckd).mean(),  # p: the teacher's probability of the label
    }


@torch.no_grad()
def report(student, teacher, dataset):
    """Say how often the student says what its teacher says."""
    inputs = dataset.tensors[0]
    alike = (student(inputs).argmax(1) == teacher(inputs).argmax(1)).double().mean()
    return f"student and teacher agree on {100 * alike:.0f} % of the samples"
