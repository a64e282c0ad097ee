"""Many files at once: order, errors, and how much is held."""

import threading
import time

import pytest

from segmentation.data.parallel import THREADS, in_parallel


def test_results_come_in_the_order_of_the_items():
    def read(item: int) -> int:
        time.sleep(0.01 * (item % 3 == 0))
        return 10 * item

    assert list(in_parallel(read, range(50))) == [10 * item for item in range(50)]
    assert list(in_parallel(read, [])) == []


def test_reads_wait_side_by_side():
    together = threading.Barrier(THREADS, timeout=20)
    assert sorted(in_parallel(lambda _: together.wait(), range(THREADS))) == list(range(THREADS))


def test_the_first_error_in_order_is_raised_and_the_rest_is_not_begun():
    begun = []

    def read(item: int) -> int:
        begun.append(item)
        if item in (1, 2):
            time.sleep(0.1 * (item == 1))
            raise ValueError(f"item {item}")
        return item

    with pytest.raises(ValueError, match="item 1"):
        list(in_parallel(read, range(10_000)))
    assert len(begun) < 100


def test_few_results_are_held():
    begun = []
    results = in_parallel(begun.append, range(1_000))
    for taken in range(1, 20):
        next(results)
        assert len(begun) <= taken + 2 * THREADS
    results.close()
