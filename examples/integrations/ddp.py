"""GapMatch under DistributedDataParallel.

    torchrun --nproc-per-node 2 examples/integrations/ddp.py

DDP averages the gradients of every backward over the ranks. So g1 is that of the joint batch, every rank moves to the
same theta*, and there is nothing to do beyond what DDP asks for anyway.
"""

import torch
import torch.distributed as dist
from tiny import BATCH, CLIP, EPOCHS, EPS, LR, Discs, method, network, score, supervised
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from gap_torch import GAPWrapper
from gap_torch.consistency import Batch


def train(network: nn.Module) -> None:
    """Train `network` in place, each rank on its share of every batch."""
    model = DistributedDataParallel(network)  # on GPUs after SyncBatchNorm.convert_sync_batchnorm(network)
    # GAP 1: the parameters are the same objects in `model` and in `network`.
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
            method.loss(model, views).backward()  # not under model.no_sync(): g1 must be averaged
            with optimizer.perturbed(model):  # GAP 2: every rank enters, also one without a confident pixel
                method.loss(model, views).backward()  # GAP 3: through `model`, not `network`, as all passes
            supervised(model(batch["image"]), batch["label"]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()


def ranks_agree(network: nn.Module) -> bool:
    """Whether every rank has the same parameters, bit for bit."""
    mine = nn.utils.parameters_to_vector(network.parameters()).detach()
    all_ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(all_ranks, mine)
    return all(torch.equal(mine, theirs) for theirs in all_ranks)


def main() -> None:
    dist.init_process_group("gloo")  # GPUs: "nccl", set_device, model and batches to the GPU, device_ids
    model = network()
    before = score(model)
    train(model)
    agree = "agree" if ranks_agree(model) else "DIFFER"
    if dist.get_rank() == 0:
        print(f"DDP: {before} -> {score(model)}; {dist.get_world_size()} ranks {agree}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
