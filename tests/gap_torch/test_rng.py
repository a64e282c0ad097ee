# ruff: noqa: PT012 (blocks of several statements are what is tested)
"""RNGState: the perturbed pass can see the dropout masks of the first one."""

import pytest
import torch
from torch import nn

from gap_torch import GAPWrapper, RNGState


@pytest.fixture
def setup(device):
    model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5)).to(device)
    return model, GAPWrapper(torch.optim.SGD(model.parameters(), 0.1)), torch.ones(2, 4, device=device)


def mask(output):
    return output == 0


def two_passes(model, optimizer, x, replay):
    rng = RNGState.now()
    first = model(x)
    first.sum().backward()
    with optimizer.perturbed(model, rng=rng if replay else None):
        second = model(x)
        second.sum().backward()
    return mask(first), mask(second)


@pytest.mark.parametrize("replay", [True, False])
def test_masks_repeat_only_on_request(setup, replay):
    first, second = two_passes(*setup, replay)
    assert torch.equal(first, second) == replay


def test_generators_go_on_as_if_the_block_had_drawn_nothing(setup, device):
    model, optimizer, x = setup
    rng = RNGState.now()
    model(x).sum().backward()
    expected = RNGState.now()
    with optimizer.perturbed(rng=rng):
        model(x).sum().backward()
        torch.rand(100, device=device)
    now = RNGState.now()
    assert torch.equal(now.cpu, expected.cpu)
    assert all(torch.equal(now.accelerators[i], expected.accelerators[i]) for i in expected.accelerators)


def test_generators_go_on_after_an_exception_too(setup):
    model, optimizer, x = setup
    rng = RNGState.now()
    model(x).sum().backward()
    before = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt), optimizer.perturbed(rng=rng):
        model(x)
        raise KeyboardInterrupt
    assert torch.equal(torch.get_rng_state(), before)


def test_one_state_replays_any_number_of_times(setup):
    model, optimizer, x = setup
    rng = RNGState.now()
    masks = []
    for _ in range(3):
        optimizer.zero_grad()
        model(x).sum().backward()
        with optimizer.perturbed(rng=rng):
            output = model(x)
            output.sum().backward()
        masks.append(mask(output))
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])
