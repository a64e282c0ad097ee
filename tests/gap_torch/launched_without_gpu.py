"""Everything that `fused` does on a GPU up to the launch itself: Triton binds the arguments and compiles for sm_90.

Run by test_fused.py in a process of its own, for it replaces Triton's driver. Neither the interpreter nor compilation
from a given signature shows what goes wrong here: an argument called `params`, for one, is a name of Triton's own.
"""

import warnings
from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from gap_torch import fused, triton_kernels


class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


class Compiled:
    """Stands for a kernel: what would be launched is compiled."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *args, **options: self.kernel.warmup(*args, grid=grid, **options).asm["cubin"]


def main():
    warnings.simplefilter("error")
    driver.set_active(Driver())
    names = {"squares", "root", "backup_and_perturb", "copy"}
    module = {k: Compiled(v) if k in names else v for k, v in vars(triton_kernels).items()}
    fused._kernels = lambda: SimpleNamespace(**module)
    fused.DEVICES = {"cpu"}
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        params = [torch.randn(5000).to(dtype), torch.randn(1).to(dtype)]
        copies = [torch.empty_like(p) for p in params]
        fused.global_norm(params)
        for eps in (0.1, torch.tensor(0.1)):
            fused.backup_and_perturb(params, copies, params, torch.tensor(1.0, dtype=torch.float64), eps, [])
        fused.restore(params, copies)


if __name__ == "__main__":
    main()
