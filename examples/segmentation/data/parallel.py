"""Reading many files at once."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")

THREADS = 8


def in_parallel(read: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
    """`read(item)` for all items, in their order; the first error in this order is raised.

    By threads, which wait side by side for a slow file system, and decode photographs side by side. h5py decodes one
    file at a time; processes would not, but take longer to start than ACDC takes to read. Only a few results are held
    at a time.
    """
    remaining = iter(items)
    waiting: deque[Future[T]] = deque()
    pool = ThreadPoolExecutor(THREADS)
    try:
        waiting.extend(pool.submit(read, item) for item in islice(remaining, 2 * THREADS))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(read, item) for item in islice(remaining, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)
