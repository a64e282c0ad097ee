"""What is a sample, and what are features of one."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gap_torch.checking.fingerprints import from_network, samples

NETWORK = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
LEAF = torch.ones(2, 3, requires_grad=True)
OTHERS = {
    "network": NETWORK(torch.ones(2, 3)),
    "features, normalised": nn.functional.normalize(NETWORK(LEAF)),
    # the graph of reentrant checkpointing leads to its inputs alone
    "checkpointed": 2 * checkpoint(NETWORK, LEAF, use_reentrant=True),
    "parameter": nn.Parameter(torch.ones(2, 3)),
    "of a parameter": 2 * nn.Parameter(torch.ones(2, 3)),
}
DATA = {"plain": torch.ones(2, 3), "leaf": LEAF, "VAT's": torch.ones(2, 3) + 0.1 * LEAF, "flipped": LEAF.flip(-1)}


@pytest.mark.parametrize(("tensors", "expected"), [(OTHERS, True), (DATA, False)], ids=["others", "data"])
def test_what_has_come_out_of_a_network(tensors: dict[str, Tensor], expected: bool) -> None:
    assert {name: from_network(tensor) for name, tensor in tensors.items()} == dict.fromkeys(tensors, expected)


def test_a_sample_is_known_again_in_another_batch() -> None:
    a, b, c = torch.randn(3, 2, 4)
    first, second = samples(torch.stack([a, b]), lambda _: True), samples(torch.stack([c, b, a]), lambda _: True)
    assert first == [second[2], second[1]]
    assert second[0] not in first


def test_without_data_there_are_no_samples() -> None:
    assert samples(torch.ones(2, 3), lambda _: False) == []
    assert samples("text", lambda _: True) == []
    assert samples(torch.ones(2, 3, device="meta"), lambda _: True) == []
