"""Infrastructure calls are repeated until they succeed; nothing else is."""

from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest

from worker import retrying
from worker.errors import EventError, InfrastructureError, Reason
from worker.metrics import Metrics
from worker.retrying import Closed, Persistence


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrying, "PAUSE_SECONDS", (0.001, 0.002))


def test_trouble_is_retried_counted_and_over_once_it_is() -> None:
    metrics = Metrics()
    persist = Persistence("index", metrics.redis_errors, metrics.redis_seconds)
    seen: list[str | None] = []

    def flaky(value: int) -> int:
        seen.append(persist.trouble)
        if len(seen) < 4:
            raise InfrastructureError("away") from ConnectionError("refused")
        return value

    assert persist("place", flaky, 7) == 7
    assert seen == [None, "away", "away", "away"]
    assert persist.trouble is None
    errors = metrics.redis_errors.labels("ConnectionError")
    assert next(iter(errors.collect())).samples[0].value == 3


def test_other_errors_pass_at_once() -> None:
    calls = 0

    def fails() -> None:
        nonlocal calls
        calls += 1
        raise EventError(Reason.UNDECODABLE, "x")

    with pytest.raises(EventError):
        Persistence("index", Metrics().redis_errors)("place", fails)
    assert calls == 1


def test_a_read_that_succeeds_ends_no_trouble_of_writes() -> None:
    """As beside a full Redis: readiness must not flap."""
    persist = Persistence("index", Metrics().redis_errors)
    tried, room = Event(), Event()

    def place() -> str:
        if not room.is_set():
            tried.set()
            raise InfrastructureError("full")
        return "placed"

    with ThreadPoolExecutor() as threads:
        placed = threads.submit(persist, "place", place)
        try:
            assert tried.wait(60)
            while persist.trouble is None:
                assert not placed.done()
            for _ in range(100):
                assert persist("recognise", lambda: "known") == "known"
                assert persist.trouble == "full"
        finally:
            room.set()
        assert placed.result(60) == "placed"
    assert persist.trouble is None


def test_trouble_is_over_when_the_event_is_to_blame_after_all() -> None:
    persist = Persistence("fetching", Metrics().fetch_errors)
    errors = [InfrastructureError("no folder"), EventError(Reason.SOURCE_GONE, "x")]

    def fetch() -> None:
        raise errors.pop(0)

    with pytest.raises(EventError):
        persist("fetch", fetch)
    assert persist.trouble is None


def test_closing_ends_the_retries() -> None:
    persist = Persistence("index", Metrics().redis_errors)

    def fails() -> None:
        persist.close()
        raise InfrastructureError("away")

    with pytest.raises(Closed):
        persist("place", fails)
