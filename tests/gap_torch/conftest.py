"""Fixtures of the library's tests: devices and seeds."""

import pytest
import torch

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=CUDA)])
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
