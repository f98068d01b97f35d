"""DeepKD in Lightning Fabric, whose optimizer has the same `backward`."""

import torch
from lightning.fabric import Fabric
from shared import EPOCHS, batches, data, losses, networks, optimizer, report


def train(student, teacher, loader):
    """Train the student in place."""
    fabric = Fabric(accelerator="cpu", devices=1)
    model, opt = fabric.setup(student, optimizer(student))
    teacher, loader = fabric.to_device(teacher), fabric.setup_dataloaders(loader)
    for epoch in range(EPOCHS):
        for inputs, labels in loader:
            opt.zero_grad()
            with torch.no_grad():
                teacher_logits = teacher(inputs)
            opt.backward(losses(model(inputs), teacher_logits, labels, epoch))  # instead of fabric.backward(loss)
            # several processes: opt.average_gradients()
            opt.step()


if __name__ == "__main__":
    student, teacher = networks()
    train(student, teacher, batches(data()))
    print(report(student, teacher, data()))
