"""GapMatch in a plain PyTorch loop.

    python examples/integrations/plain_pytorch.py

Without the lines marked GAP it is FixMatch.
"""

import torch
from tiny import BATCH, CLIP, EPOCHS, EPS, LR, Discs, method, network, score, supervised
from torch import nn
from torch.utils.data import DataLoader

from gap_torch import GAPWrapper
from gap_torch.consistency import Batch


def train(model: nn.Module) -> None:
    """Train `model` in place."""
    # GAP 1: wrap the optimizer. Schedulers, a GradScaler and checkpoints are given the wrapper.
    optimizer = GAPWrapper(torch.optim.AdamW(model.parameters(), lr=LR), eps=EPS)
    for _ in range(EPOCHS):
        for batch in DataLoader(Discs(), BATCH):
            views = method.prepare(model, Batch(batch["unlabelled"]))
            method.loss(model, views).backward()
            with optimizer.perturbed(model):  # GAP 2: inside, the model is at theta*
                method.loss(model, views).backward()  # GAP 3: the same views once more
            supervised(model(batch["image"]), batch["label"]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()


def main() -> None:
    model = network()
    before = score(model)
    train(model)
    print(f"plain PyTorch: {before} -> {score(model)}")


if __name__ == "__main__":
    main()
