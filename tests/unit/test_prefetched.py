"""How much a poll takes of what was fetched; the rest is on real brokers, in tests/stream."""

from types import SimpleNamespace
from typing import Any

import pytest

from worker.errors import Reason
from worker.messages import Omitted
from worker.prefetched import Prefetched

POLL_BYTES = 10_000


def prefetched() -> Prefetched:
    fetcher = SimpleNamespace(send_fetches=list, fetched_records=list)
    return Prefetched(SimpleNamespace(_fetcher=fetcher), POLL_BYTES)


def record(value: Any = b"", size: int = 0, headers: int = 0) -> Any:
    return SimpleNamespace(
        value=value,
        headers=[("ab", b"")] * headers,
        serialized_key_size=-1,
        serialized_value_size=size,
        serialized_header_size=2 * headers,
    )


def test_a_poll_is_full_of_bytes_or_of_headers() -> None:
    omitted = Omitted("value", Reason.TOO_LARGE, "", POLL_BYTES)
    for much in (record(size=POLL_BYTES + 1), record(headers=100), record(omitted, size=0)):
        poll = prefetched()
        poll.took(record(size=10, headers=1))
        assert not poll.full()
        poll.took(much)
        assert poll.full()


def partition(offset: int | None, highwater: int | None) -> Any:
    position = None if offset is None else SimpleNamespace(offset=offset)
    return SimpleNamespace(position=position, highwater=highwater)


@pytest.mark.parametrize(
    ("partitions", "taken", "fetches"),
    [
        ([partition(7, 7), partition(3, 3)], True, False),
        ([partition(7, 7), partition(3, 4)], True, True),
        ([partition(7, 7), partition(None, None)], True, True),
        ([partition(7, 7), partition(0, None)], True, True),
        ([partition(7, 7), partition(3, 3)], False, True),
    ],
    ids=["read to the end", "more there", "not read yet", "never fetched", "nothing was read"],
)
def test_a_poll_that_read_all_there_is_leaves_the_next_fetch_to_the_next_poll(
    partitions: list[Any], taken: bool, fetches: bool
) -> None:
    fetcher = SimpleNamespace(
        send_fetches=lambda: ["fetch"],
        fetched_records=list,
        _subscriptions=SimpleNamespace(assignment=dict(enumerate(partitions))),
    )
    poll = Prefetched(SimpleNamespace(_fetcher=fetcher), POLL_BYTES)
    if taken:
        poll.took(record(size=5))
    assert fetcher.send_fetches() == (["fetch"] if fetches else [])
    fetcher.fetched_records()
    assert fetcher.send_fetches() == ["fetch"]
