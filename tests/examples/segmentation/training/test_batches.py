"""Shuffled batches as a function of the iteration."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from segmentation.training.batches import ShuffledStream, mix

sizes = st.integers(1, 40)


@given(n=sizes, batch=sizes, seed=st.integers(0, 5))
def test_every_epoch_holds_every_sample_once(n: int, batch: int, seed: int) -> None:
    stream = ShuffledStream(n, batch, seed)
    indices = torch.cat([stream[t] for t in range(2 * n // batch + 2)])
    for epoch in range(2):
        assert sorted(indices[epoch * n : (epoch + 1) * n].tolist()) == list(range(n))


@given(n=sizes, batch=sizes, iteration=st.integers(0, 100))
def test_a_batch_depends_on_its_iteration_alone(n: int, batch: int, iteration: int) -> None:
    stream = ShuffledStream(n, batch, 0)
    stream[iteration + 1]
    assert stream[iteration].shape == (batch,)
    assert torch.equal(stream[iteration], ShuffledStream(n, batch, 0)[iteration])


def test_seeds_and_epochs_differ() -> None:
    first, other = ShuffledStream(50, 50, 0), ShuffledStream(50, 50, 1)
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], first[1])


def test_mixed_seeds_are_distinct() -> None:
    assert len({mix(seed, counter) for seed in range(20) for counter in range(500)}) == 10_000


def test_an_epoch_s_order_is_made_once(monkeypatch) -> None:
    stream, made = ShuffledStream(10, 4, 0), []
    order = stream._order
    monkeypatch.setattr(stream, "_order", lambda epoch: made.append(epoch) or order(epoch))
    for iteration in range(10):
        stream[iteration]
    assert made == [0, 1, 2, 3]
    assert list(stream.orders) == [3]  # and forgotten when it is over
