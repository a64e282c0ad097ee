"""GapMatch with the parameters sharded by FSDP2 (`fully_shard`).

    torchrun --nproc-per-node 2 examples/integrations/fsdp2.py

Each rank perturbs and restores its own shards; ||g1|| is the norm over all of them.
"""

import torch
import torch.distributed as dist
from tiny import BATCH, CLIP, EPOCHS, EPS, LR, Discs, method, network, score, supervised
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler

from gap_torch import GAPWrapper
from gap_torch.consistency import Batch


def shard(model: nn.Module) -> None:
    """Shard `model` in place: its layers first, then the root, which takes what is left."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))  # "cuda" on GPUs
    for layer in model.children():
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def train(model: nn.Module) -> None:
    """Shard `model` and train it in place, each rank on its share of every batch."""
    shard(model)
    # GAP 1: after fully_shard, which puts new parameters (DTensors) into the model.
    # With a process group the ranks compare notes: a slip on one is an error on all, not a hang.
    base = torch.optim.AdamW(model.parameters(), lr=LR)
    optimizer = GAPWrapper(base, eps=EPS, process_group=dist.group.WORLD)
    data = Discs()
    sampler: DistributedSampler = DistributedSampler(data, shuffle=False)  # True for yours
    loader = DataLoader(data, BATCH // dist.get_world_size(), sampler=sampler)
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for batch in loader:
            views = method.prepare(model, Batch(batch["unlabelled"]))
            method.loss(model, views).backward()
            with optimizer.perturbed(model):  # GAP 2: every rank enters; its forward gathers the shards of theta*
                method.loss(model, views).backward()  # GAP 3: backward directly after its forward
            supervised(model(batch["image"]), batch["label"]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()


def main() -> None:
    dist.init_process_group("gloo")  # GPUs: "nccl", set_device, mesh, batches to the GPU
    model = network()
    before = score(model)
    train(model)
    after = score(model)  # on every rank: a forward pass gathers the shards
    if dist.get_rank() == 0:
        print(f"FSDP2: {before} -> {after}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
