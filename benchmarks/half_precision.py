"""How much of a perturbation is left after rounding to half-precision parameters?

    python benchmarks/half_precision.py --device cpu

A freshly made UNet, and the gradient of cross-entropy + Dice on noise.
"""

import argparse
import warnings
from typing import Any

import torch

from benchmarks.common import RESULTS, print_table, write_results
from gap_torch import GAPWrapper
from gap_torch.losses import ce_dice_loss

DTYPES = (torch.bfloat16, torch.float16)
RADII = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args().device
    rows = [left_of(eps, dtype, device) for dtype in DTYPES for eps in RADII]
    print_table("What is left of a perturbation", rows)
    path = RESULTS / f"half_precision_{device.partition(':')[0]}.json"
    write_results(path, "How much of a perturbation is left after rounding?", device, rows)


@torch.no_grad()
def left_of(eps: float, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Length of theta* - theta over eps, and the share of the parameters that moved at all."""
    from segmentation.networks.unet import UNet

    torch.manual_seed(0)
    model = UNet().to(device, dtype)
    images, labels = torch.randn(2, 1, 64, 64).to(device, dtype), torch.randint(0, 4, (2, 64, 64)).to(device)
    with torch.enable_grad():
        ce_dice_loss(model(images).float(), labels).backward()
    before = [p.clone() for p in model.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that much is lost is what we are here for
        GAPWrapper(torch.optim.SGD(model.parameters(), 0.1), eps=eps).first_step()
    moves = torch.cat([(p.float() - q.float()).flatten() for p, q in zip(model.parameters(), before, strict=True)])
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "eps": eps,
        "length left": moves.norm().item() / eps,
        "parameters moved": (moves != 0).float().mean().item(),
    }


if __name__ == "__main__":
    main()
