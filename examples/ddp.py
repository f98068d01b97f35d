"""DeepKD in two processes: DistributedDataParallel for the start, `average_gradients` for every step."""

import tempfile

import torch
import torch.distributed as dist
from shared import BATCH, EPOCHS, batches, data, losses, networks, optimizer, report
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler


def train(student, teacher, dataset):
    """Train the student in place; every process takes its part of each batch."""
    world = dist.get_world_size()
    loader = batches(dataset, BATCH // world, DistributedSampler(dataset, shuffle=False))
    model = DistributedDataParallel(student)  # gives all processes the same weights and BatchNorm buffers
    opt = optimizer(student)
    for epoch in range(EPOCHS):
        for inputs, labels in loader:
            opt.zero_grad()
            with torch.no_grad():
                teacher_logits = teacher(inputs)
            opt.backward(losses(model(inputs), teacher_logits, labels, epoch))
            opt.average_gradients()  # the hooks of DistributedDataParallel see no pass of `backward`
            opt.step()


def main(rank, folder):
    """Be one of two processes."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    student, teacher = networks()
    train(student, teacher, data())
    if rank == 0:
        print(report(student, teacher, data()))
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(main, (folder,), nprocs=2)
