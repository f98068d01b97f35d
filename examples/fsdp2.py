"""DeepKD in two processes that share the weights: FSDP2, a backward pass and `collect` for each stream."""

import tempfile

import torch
import torch.distributed as dist
from shared import BATCH, EPOCHS, batches, data, losses, networks, optimizer, report
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DistributedSampler


def train(student, teacher, dataset):
    """Train the student in place; its weights become DTensors, a part in each process."""
    world = dist.get_world_size()
    loader = batches(dataset, BATCH // world, DistributedSampler(dataset, shuffle=False))
    mesh = init_device_mesh("cpu", (world,))
    for layer in student:
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh)
    fully_shard(student, mesh=mesh)
    opt = optimizer(student)  # after fully_shard
    for epoch in range(EPOCHS):
        for inputs, labels in loader:
            opt.zero_grad()
            with torch.no_grad():
                teacher_logits = teacher(inputs)
            by_stream = losses(student(inputs), teacher_logits, labels, epoch)
            for stream, loss in by_stream.items():
                loss.backward(retain_graph=stream != "ncg")  # FSDP's hooks average over the processes
                opt.collect(stream)
            opt.step()


def main(rank, folder):
    """Be one of two processes."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    student, teacher = networks()
    train(student, teacher, data())
    result = report(student, teacher, data())  # in both processes, because a forward pass collects the weights
    if rank == 0:
        print(result)
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(main, (folder,), nprocs=2)
