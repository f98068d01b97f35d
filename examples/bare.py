"""DeepKD in a loop of your own."""

import torch
from shared import EPOCHS, batches, data, losses, networks, optimizer, report


def train(student, teacher, loader, max_norm=None):
    """Train the student in place. max_norm: the gradient's norm is clipped to it."""
    opt = optimizer(student)
    for epoch in range(EPOCHS):
        for inputs, labels in loader:
            opt.zero_grad()
            with torch.no_grad():
                teacher_logits = teacher(inputs)
            opt.backward(losses(student(inputs), teacher_logits, labels, epoch))  # instead of loss.backward()
            if max_norm:
                opt.clip(lambda params: torch.nn.utils.clip_grad_norm_(params, max_norm))
            opt.step()


if __name__ == "__main__":
    student, teacher = networks()
    train(student, teacher, batches(data()))
    print(report(student, teacher, data()))
