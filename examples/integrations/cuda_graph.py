"""GapMatch's whole step as a CUDA graph: recorded once, and then launched by the host with one call.

    python examples/integrations/cuda_graph.py

Without a GPU it calls the same step every time.
"""

from collections.abc import Callable

import torch
from tiny import BATCH, CLIP, EPOCHS, EPS, LR, Discs, method, network, score, supervised
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gap_torch import GAPWrapper
from gap_torch.consistency import Batch

Tensors = dict[str, Tensor]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REHEARSALS = 3


class Captured:
    """`step`, called a few times and recorded then; from then on its tensors are filled and the graph replayed."""

    def __init__(self, step: Callable[[Tensors], Tensors]) -> None:
        self.step, self.calls, self.side = step, 0, torch.cuda.Stream()
        self.inputs: Tensors = {}
        self.outputs: Tensors = {}
        self.graph = torch.cuda.CUDAGraph()

    def __call__(self, batch: Tensors) -> Tensors:
        """One step on `batch`. What it returns is overwritten by the next."""
        self.calls += 1
        if self.calls <= REHEARSALS:  # momentum, scales and memory for theta come into being, outside of the graph
            self.side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side):
                outputs = self.step({name: tensor.to(DEVICE) for name, tensor in batch.items()})
            torch.cuda.current_stream().wait_stream(self.side)
            return outputs
        if not self.inputs:  # recording does nothing yet: this step is done by the replay below
            self.inputs = {name: torch.empty_like(tensor, device=DEVICE) for name, tensor in batch.items()}
            with torch.cuda.graph(self.graph, stream=self.side, capture_error_mode="thread_local"):
                self.outputs = self.step(self.inputs)
        for name, tensor in batch.items():
            self.inputs[name].copy_(tensor, non_blocking=True)
        self.graph.replay()
        return self.outputs


def train(model: nn.Module, amp: torch.dtype | None = None, capture: bool = DEVICE.type == "cuda") -> None:
    """Train `model`, on DEVICE, in place."""
    on_cuda = DEVICE.type == "cuda"
    # A learning rate that changes has to be a tensor, and the base optimizer one that never asks the host.
    lr = torch.tensor(LR, dtype=torch.float32, device=DEVICE)
    base = torch.optim.AdamW(model.parameters(), lr=lr, fused=on_cuda, capturable=on_cuda)
    optimizer = GAPWrapper(base, eps=EPS)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=amp == torch.float16)

    def predict(images: Tensor) -> Tensor:
        with torch.autocast(DEVICE.type, dtype=amp, enabled=amp is not None):
            return model(images)

    def step(batch: Tensors) -> Tensors:
        views = method.prepare(model, Batch(batch["unlabelled"]))
        unlabelled = method.compare((predict(views.inputs[0]),), views)
        scaler.scale(unlabelled).backward()
        with optimizer.perturbed(model):
            scaler.scale(method.compare((predict(views.inputs[0]),), views)).backward()
        labelled = supervised(predict(batch["image"]), batch["label"])
        scaler.scale(labelled).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return {"labelled": labelled.detach(), "unlabelled": unlabelled.detach()}

    run = Captured(step) if capture else step
    for _ in range(EPOCHS):
        for batch in DataLoader(Discs(), BATCH, drop_last=True):  # every batch of one shape
            lr.fill_(LR)  # your schedule's
            run(batch if capture else {name: tensor.to(DEVICE) for name, tensor in batch.items()})


def main() -> None:
    model = network().to(DEVICE)
    before = score(model)
    train(model)
    print(f"{'CUDA graph' if DEVICE.type == 'cuda' else 'without a GPU'}: {before} -> {score(model)}")


if __name__ == "__main__":
    main()
