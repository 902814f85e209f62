"""How much a poll takes of what was fetched; the rest is on real brokers, in tests/stream."""

from types import SimpleNamespace
from typing import Any

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
