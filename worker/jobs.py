"""A job: one event on its way through the stages, with the partition and offset it came from.

Knows no stage and no service; only what travels.
"""

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from time import monotonic

import numpy as np
from numpy.typing import NDArray

from worker.errors import EventError
from worker.index import Answer, Arrival
from worker.messages import ImageEvent, Op, Record, Verdict
from worker.offsets import Partition

Pixels = NDArray[np.uint8]


@dataclass
class Lease:
    """The right to work on a partition: lost once the group gives it to another worker."""

    partition: Partition
    lost: bool = False
    back: int | None = None  # events are read again from here, and the group's offset is beyond


@dataclass(eq=False)
class Job:
    """One event. `outcome` is set once: a verdict or a dead letter; a delete ends with neither."""

    record: Record
    lease: Lease
    event: ImageEvent | None = None  # None while unparsed, and for good when it cannot be
    source: "Future[bytes] | None" = None  # the fetch under way
    data: bytes = field(default=b"", repr=False)
    fetched: int = 0  # bytes that a fetch holds of its budget
    sha256: bytes = b""
    pixels: "Future[Pixels] | None" = None  # the decode under way
    vector: NDArray[np.int8] | None = None
    answer: Answer | None = None
    outcome: Verdict | EventError | None = None
    admitted: float = field(default_factory=monotonic)

    @property
    def partition(self) -> Partition:
        """Topic and partition it came from."""
        return self.lease.partition

    @property
    def live(self) -> bool:
        """Whether there is still something to find out: not failed, partition still ours."""
        return self.outcome is None and not self.lease.lost

    @property
    def is_delete(self) -> bool:
        """Whether the event asks to forget an image."""
        return self.event is not None and self.event.op is Op.DELETE

    def source_ready(self) -> bool:
        """Whether its bytes are here, or will never be needed."""
        return self.source is None or self.source.done() or not self.live

    def pixels_ready(self) -> bool:
        """Whether its pixels are here, or will never be needed."""
        return self.pixels is None or self.pixels.done() or not self.live

    def arrival(self) -> Arrival:
        """What the index is asked."""
        assert self.event is not None
        return Arrival(
            namespace=self.event.namespace,
            image_id=self.event.image_id,
            sha256=self.sha256,
            store=self.event.op is Op.ADD,
            position=(self.record.partition, self.record.offset),
            vector=self.vector,
            topic=self.record.topic_id,
        )


def segments(jobs: list[Job]) -> Iterator[list[Job]]:
    """Cut jobs where order matters: around deletes, and before an id already in the segment.

    Jobs without an event (unparsable) need no index and are left out.
    """
    segment: list[Job] = []
    ids: set[tuple[str, str]] = set()
    for job in jobs:
        if job.event is None:
            continue
        identity = (job.event.namespace, job.event.image_id)
        if segment and (job.is_delete or identity in ids):
            yield segment
            segment, ids = [], set()
        segment.append(job)
        ids.add(identity)
        if job.is_delete:
            yield segment
            segment, ids = [], set()
    if segment:
        yield segment
