"""How much a rebuild gives to its pipeline at once: nothing here asks Redis or Kafka."""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import pytest

from worker.config import Settings
from worker.errors import InfrastructureError
from worker.index.index import Index
from worker.index.rebuild import IN_FLIGHT, Rebuild
from worker.jobs import Job
from worker.messages import MessageLimits, Record, parse
from worker.pipeline import Pipeline

MIB = 1 << 20


class Slow:
    """A pipeline that finishes the oldest event only when it is waited for."""

    def __init__(self) -> None:
        self.jobs: deque[Job] = deque()
        self.most_events = self.most_bytes = 0
        self.outcomes, self.persist = self, None

    def admit(self, jobs: Sequence[Job]) -> None:
        self.jobs += jobs
        self.most_events = max(self.most_events, len(self.jobs))
        self.most_bytes = max(self.most_bytes, sum(job.record.size for job in self.jobs))

    def get(self, timeout: float) -> list[Job]:
        assert self.jobs, f"nothing is in work that could end within {timeout} s"
        return [self.jobs.popleft()]


class Idle:
    """An index without upkeep."""

    def maintain(self, namespace: str) -> bool:
        return False


def events(count: int, size: int) -> list[Record]:
    """Images of so many bytes."""
    headers = (("content-type", b"image/png"),)
    return [Record("images", 0, at, 0, b"%d" % at, bytes(size), headers) for at in range(count)]


@pytest.mark.parametrize(
    ("size", "count", "most_events"),
    [(10, 300, IN_FLIGHT), (MIB // 2, 40, 8), (3 * MIB, 9, 2), (9 * MIB, 3, 1)],
)
def test_events_in_work_are_bounded_by_number_and_by_bytes(
    size: int, count: int, most_events: int
) -> None:
    pipeline, settings = Slow(), Settings(in_flight_bytes=4 * MIB)
    index = cast(Index, cast(Any, Idle()))
    rebuild = Rebuild(cast(Pipeline, cast(Any, pipeline)), index, ["default"], settings, 0)
    rebuild.feed(events(count, size))
    assert (rebuild.done, len(pipeline.jobs)) == (count, 0)
    assert pipeline.most_events == most_events
    assert pipeline.most_bytes < 4 * MIB + size + 100, "one event may go beyond the limit"


class AtOnce(Slow):
    """One that finishes all together."""

    def admit(self, jobs: Sequence[Job]) -> None:
        super().admit(jobs)
        for job in jobs:
            job.event = parse(job.record, MessageLimits())

    def get(self, timeout: float) -> list[Job]:
        jobs = super().get(timeout) + list(self.jobs)
        self.jobs.clear()
        return jobs


class InTrouble:
    """An index whose namespaces have two pieces of upkeep to do each, but for one that has none."""

    def __init__(self) -> None:
        self.left = {"a": 2, "c": 2}

    def maintain(self, namespace: str) -> bool:
        if namespace not in self.left:
            raise InfrastructureError("its shard is down")
        self.left[namespace] -= 1
        return self.left[namespace] > 0


def test_a_namespace_in_trouble_does_not_keep_others_from_their_upkeep() -> None:
    pipeline, index = AtOnce(), InTrouble()
    named = [
        replace(record, headers=(*record.headers, ("namespace", name)))
        for record, name in zip(events(3, 10), (b"a", b"b", b"c"), strict=True)
    ]
    asked = cast(Index, cast(Any, index))
    rebuild = Rebuild(cast(Pipeline, cast(Any, pipeline)), asked, ["a", "b", "c"], Settings(), 0)
    rebuild.feed(named)
    assert index.left == {"a": 0, "c": 0}
