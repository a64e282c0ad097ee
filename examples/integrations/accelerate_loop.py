"""GapMatch in a loop with Hugging Face Accelerate: `prepare`, gradient accumulation and clipping.

    python examples/integrations/accelerate_loop.py            or, on more processes: accelerate launch, torchrun

One optimizer step takes ACCUMULATE micro-batches, and each of GAP's three passes goes over all of them: first g1 is
complete, then the parameters move.
"""

from collections.abc import Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from tiny import BATCH, CLIP, EPOCHS, EPS, LR, Discs, method, network, score, supervised
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gap_torch import GAPWrapper
from gap_torch.consistency import Batch

ACCUMULATE = 2


def train(model: nn.Module) -> None:
    """Train `model` in place."""
    accelerator = Accelerator(
        cpu=True,  # yours: leave it out
        gradient_accumulation_steps=ACCUMULATE,
        dataloader_config=DataLoaderConfiguration(split_batches=True),
    )
    optimizer = GAPWrapper(torch.optim.AdamW(model.parameters(), lr=LR), eps=EPS)  # GAP 1: before prepare
    loader = DataLoader(Discs(), BATCH // ACCUMULATE)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    gap = optimizer.optimizer  # the GAPWrapper inside Accelerate's optimizer

    def backward(losses: Iterator[Tensor]) -> None:
        """Backward of the mean of ACCUMULATE losses, each computed only when it is its turn."""
        for _ in range(ACCUMULATE):
            with accelerator.accumulate(model):  # counts each pass anew; the last synchronises
                accelerator.backward(next(losses))  # divides by ACCUMULATE

    for _ in range(EPOCHS):
        for micro_batches in grouped(loader):
            # all views at theta, before the first pass
            views = [method.prepare(model, Batch(batch["unlabelled"])) for batch in micro_batches]
            backward(method.loss(model, v) for v in views)
            with gap.perturbed(model):  # GAP 2: once for all micro-batches, after the last of g1
                backward(method.loss(model, v) for v in views)  # GAP 3: the same views
            backward(supervised(model(batch["image"]), batch["label"]) for batch in micro_batches)
            accelerator.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()  # Accelerate's own: it knows of the scaler
            optimizer.zero_grad()


def grouped(loader: DataLoader) -> Iterator[tuple[dict[str, Tensor], ...]]:
    """ACCUMULATE batches at a time."""
    batches = iter(loader)
    return zip(*[batches] * ACCUMULATE, strict=False)


def main() -> None:
    model = network()
    before = score(model)
    train(model)
    if Accelerator().is_main_process:
        print(f"Accelerate: {before} -> {score(model)}")


if __name__ == "__main__":
    main()
