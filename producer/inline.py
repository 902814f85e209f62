"""Fetches the images behind links, a few at once, so that they can be sent inline.

Owns what the producer's machine may be made to fetch by a list of links: https and http from
public addresses. Links to files are refused, or a list from elsewhere could publish them. Must not
know Kafka.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from producer.events import Fetch
from producer.sources import Item
from worker.sources import Fetcher, SourcePolicy

FETCHES_AT_ONCE = 8

T = TypeVar("T")


@contextmanager
def link_fetcher(max_bytes: int, networks: tuple[str, ...] = ()) -> Iterator[Fetch]:
    """A function from link to bytes; fetches under way are given up when the block ends.

    `networks` are non-public networks, in CIDR, that may be fetched from all the same.
    """
    fetcher = Fetcher(
        SourcePolicy(
            schemes=("https", "http"), hosts=("*:*",), networks=networks, max_bytes=max_bytes
        )
    )
    try:
        yield fetcher.fetch
    finally:
        fetcher.close()


def make_ahead(make: Callable[[Item], T], items: Iterator[Item]) -> Iterator[T]:
    """Like `map`, in the same order, but a few items ahead of the one that is taken."""
    waiting: deque[Future[T]] = deque()
    pool = ThreadPoolExecutor(FETCHES_AT_ONCE)
    try:
        for item in items:
            waiting.append(pool.submit(make, item))
            if len(waiting) >= 2 * FETCHES_AT_ONCE:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
