"""On every rank: run the scripts on the tiny problem in float64 without batch norm, and save the weights of each.

    torchrun --nproc-per-node 2 on_ranks.py OUT SCRIPT...

One start of the processes serves many scripts, since it is what takes the time.
"""

import importlib
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler

OPTIONS: dict[str, dict[str, Any]] = {"lightning_module": {"devices": 2, "strategy": "ddp"}}


def unshuffled(data: Any, batch: int) -> DataLoader:
    """Lightning's own sampler would shuffle, also where the data loader does not; it leaves this one alone."""
    return DataLoader(data, batch, sampler=DistributedSampler(data, 2, int(os.environ["RANK"]), shuffle=False))


def run(name: str, out: Path) -> None:
    """The script's own `main`, whose `train` saves what it has trained before the process group is gone."""
    script: Any = importlib.import_module(name)
    train, network = script.train, script.network
    if name == "lightning_module":
        script.DataLoader = unshuffled

    def train_and_save(model: torch.nn.Module) -> None:
        train(model, **OPTIONS.get(name, {}))
        weights = {key: _whole(tensor) for key, tensor in model.state_dict().items()}
        torch.save(weights, out / f"{name}_{dist.get_rank()}.pt")

    script.train, script.network = train_and_save, partial(network, batch_norm=False)
    script.main()


def _whole(tensor: Any) -> torch.Tensor:
    """All shards of an FSDP2 parameter together; other tensors as they are."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


if __name__ == "__main__":
    out, *scripts = map(Path, sys.argv[1:])
    sys.path.insert(0, str(scripts[0].parent))  # where a script finds tiny.py
    torch.set_default_dtype(torch.float64)
    # One group for all: a second one on the same store may hang.
    begin, dist.destroy_process_group = dist.init_process_group, lambda: None
    dist.init_process_group = lambda *arguments: None if dist.is_initialized() else begin(*arguments)
    for script in scripts:
        run(script.stem, out)
    dist.barrier()  # neither goes while the other still talks to it
    sys.stdout.flush()
    # At the interpreter's own end gloo's threads may abort a process ("terminate called without an active exception").
    os._exit(0)
