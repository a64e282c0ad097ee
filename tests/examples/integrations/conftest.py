"""What the tests of the integrations share: the scripts' folder as an import path, and the plain loop's weights."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

SCRIPTS = Path(__file__).parents[3] / "examples" / "integrations"
sys.path.insert(0, str(SCRIPTS))  # where a script finds tiny.py


@pytest.fixture
def float64() -> Iterator[None]:
    """In double precision every order of summation gives the same weights, to many digits."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def trained(float64: None) -> Callable[..., dict[str, Tensor]]:
    """`trained(train, batch_norm=...)`: the weights and buffers of the tiny network after `train(network)`."""
    from tiny import network

    def run(train: Callable[[nn.Module], None], batch_norm: bool = True) -> dict[str, Tensor]:
        model = network(batch_norm)
        train(model)
        return {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}

    return run
