"""Infrastructure calls are repeated until they succeed; nothing else is."""

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


def test_closing_ends_the_retries() -> None:
    persist = Persistence("index", Metrics().redis_errors)

    def fails() -> None:
        persist.close()
        raise InfrastructureError("away")

    with pytest.raises(Closed):
        persist("place", fails)
