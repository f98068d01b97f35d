"""DeepKD across modalities: encoders of images and of texts learn from larger ones, and a batch is the class set.

A contrastive target (CLIP's): of the texts of a batch, which is this image's, and of its images, which is this text's.
So logits are (B, B), pair i is the target of row i, and a mask has B − 1 others to choose from. No text comes twice in
a batch, or one of two right answers would count as wrong.
"""

import torch
import torch.nn.functional as F
from made_pairs import COUNT, Encoders, pairs

from deepkd_plugin import DecoupledAdamW, TopKSchedule, decoupled_kd

BATCH, EPOCHS = 16, 30
MOMENTA = {"tog": 0.95, "tcg": 0.85, "ncg": 0.95}
SCHEDULE = TopKSchedule(BATCH)  # how many of the batch's other pairs count


def task(logits):
    """Return the contrastive loss of logits (B, B), the mean of both directions."""
    target = torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def losses(logits, teacher_logits, top_k):
    """DeepKD over KD of both directions: stream -> loss."""
    tcg, ncg = [], []
    for student, teacher in ((logits, teacher_logits), (logits.T, teacher_logits.T)):
        tckd, nckd, p = decoupled_kd(student, teacher, torch.arange(len(logits)), temperature=2.0, top_k=top_k)
        tcg.append(tckd.mean())
        ncg.append(((1 - p) * nckd).mean())
    return {"tog": 0.5 * task(logits), "tcg": sum(tcg) / 2, "ncg": sum(ncg) / 2}


def train(encoders, losses_of, momentum):
    """Train encoders in place. losses_of(logits, images, texts, progress): stream -> loss."""
    opt = DecoupledAdamW(encoders.parameters(), 1e-2, momentum)
    for epoch in range(EPOCHS):
        for batch in zip(*(part.split(BATCH) for part in pairs(seed=epoch))):
            opt.zero_grad()
            opt.backward(losses_of(encoders(*batch), *batch, epoch / (EPOCHS - 1)))
            opt.step()
    return encoders


@torch.no_grad()
def right(encoders):
    """Return for which share of new images the encoders find their own text among all."""
    return (encoders(*pairs(seed=1000)).argmax(1) == torch.arange(COUNT)).double().mean().item()


def main():
    """Train a teacher on the task alone, then a student by it; return how often each finds an image's text."""
    torch.manual_seed(0)
    teacher = train(Encoders(128), lambda logits, *_: {"task": task(logits)}, 0.9).eval().requires_grad_(False)

    def from_teacher(logits, images, texts, progress):
        return losses(logits, teacher(images, texts), SCHEDULE(progress))

    return right(teacher), right(train(Encoders(12), from_teacher, MOMENTA))


if __name__ == "__main__":
    print("teacher finds {:.0%}, student {:.0%} of the texts of new images".format(*main()))
