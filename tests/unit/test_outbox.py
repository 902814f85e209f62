"""What the publishing thread counts; what it publishes is in tests/stream."""

from queue import Queue
from threading import Event
from time import time
from typing import Any, cast

import pytest

from worker import outbox
from worker.assignment import Assignment
from worker.config import Settings
from worker.jobs import Job
from worker.messages import Record, Verdict, VerdictKind
from worker.metrics import Metrics
from worker.publishing import Outgoing

SECONDS = 60


class Publisher:
    """Acknowledges everything at once."""

    def __init__(self, _: Settings) -> None:
        """Connects to nothing."""

    def publish(self, messages: list[Outgoing]) -> None:
        """They are acknowledged."""

    def close(self, timeout_seconds: float) -> None:
        """Nothing is open."""


def publish(jobs: list[Job], metrics: Metrics, assignment: Assignment) -> None:
    """Have an outbox publish the outcomes, and end."""
    outcomes: Queue[list[Job]] = Queue()
    published = Event()
    box = outbox.Outbox(
        settings=Settings(),
        outcomes=outcomes,
        consumer=cast(Any, None),
        assignment=assignment,
        metrics=metrics,
        version="1",
        on_step=lambda _: published.set(),
    )
    box.start()
    outcomes.put(jobs)
    assert published.wait(SECONDS)
    box.close()
    box.join(SECONDS)
    assert not box.alive()


def verdict() -> Verdict:
    return Verdict(
        verdict_id="0",
        image_id="a",
        namespace="default",
        verdict=VerdictKind.UNIQUE,
        duplicate_of=None,
        similarity=None,
        best_match=None,
        matches=[],
        threshold=0.5,
        model_id="m",
        clusters_probed=0,
        vectors_compared=0,
        truncated=False,
        occurred_at=None,
        decided_at="2026-01-01T00:00:00Z",
        attributes=None,
    )


def observed(metrics: Metrics, what: str) -> float:
    value = metrics.registry.get_sample_value(f"dedup_event_to_verdict_seconds_{what}")
    assert value is not None
    return value


@pytest.mark.parametrize(
    ("age_seconds", "seconds"), [(None, None), (1, 1), (-3_600, 0)], ids=["none", "old", "ahead"]
)
def test_a_record_without_a_time_is_not_half_a_century_old(
    age_seconds: int | None, seconds: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "Publisher", Publisher)
    metrics = Metrics()
    assignment = Assignment(metrics)
    assignment.assigned({("images", 0)})
    stamps = [-1, 0, -(10**15)] if age_seconds is None else [int((time() - age_seconds) * 1000)]
    records = [Record("images", 0, n, stamp, b"a", b"") for n, stamp in enumerate(stamps)]
    jobs = assignment.admit(records)
    for job in jobs:
        job.outcome = verdict()
    publish(jobs, metrics, assignment)
    verdicts = metrics.registry.get_sample_value("dedup_verdicts_total", {"verdict": "unique"})
    assert verdicts == len(jobs) == len(stamps)
    assert observed(metrics, "count") == (0 if seconds is None else 1)
    assert (seconds or 0) <= observed(metrics, "sum") < (seconds or 0) + SECONDS
