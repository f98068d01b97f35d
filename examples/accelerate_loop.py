"""DeepKD in Accelerate: its optimizer has no `backward`, so `deepkd_plugin.backward` finds ours inside."""

import torch
from accelerate import Accelerator
from shared import EPOCHS, batches, data, losses, networks, optimizer, report

import deepkd_plugin


def train(student, teacher, loader, max_norm=None, **options):
    """Train the student in place. options: more of Accelerator's."""
    accelerator = Accelerator(cpu=True, **options)
    model, opt, loader = accelerator.prepare(student, optimizer(student), loader)
    teacher = teacher.to(accelerator.device)
    for epoch in range(EPOCHS):
        for inputs, labels in loader:
            with accelerator.accumulate(model):
                with torch.no_grad():
                    teacher_logits = teacher(inputs)
                by_stream = losses(model(inputs), teacher_logits, labels, epoch)
                deepkd_plugin.backward(opt, by_stream)  # instead of accelerator.backward(loss)
                # several processes: if accelerator.sync_gradients: opt.optimizer.average_gradients()
                if max_norm and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), max_norm)
                opt.step()
                opt.zero_grad()


if __name__ == "__main__":
    student, teacher = networks()
    train(student, teacher, batches(data()))
    print(report(student, teacher, data()))
