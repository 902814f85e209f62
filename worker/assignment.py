"""The partitions a worker holds, what of them is in work, and how far each is finished.

Three threads meet here: the main one admits and commits, the publisher finishes, and
kafka-python's IO thread takes and gives partitions. Knows nothing of Kafka clients.
"""

import logging
from threading import Condition, Lock
from time import monotonic

from worker.jobs import Job, Lease
from worker.messages import Record
from worker.metrics import Metrics
from worker.offsets import OffsetTracker, Partition

log = logging.getLogger(__name__)

Offsets = dict[Partition, int]


class Assignment:
    """The partitions held, what of them is in work, and how far each is finished. Thread-safe."""

    def __init__(self, metrics: Metrics) -> None:
        self._lock = Lock()
        self._fewer = Condition(self._lock)  # are in work
        self._metrics = metrics
        self._leases: dict[Partition, Lease] = {}
        self._tracker = OffsetTracker()
        self._open: dict[int, Job] = {}
        self._bytes = 0

    def assigned(self, partitions: set[Partition]) -> None:
        """New partitions are ours."""
        with self._lock:
            for partition in partitions:
                self._leases[partition] = Lease(partition)
            self._moved("assigned", partitions)

    def revoking(self, partitions: set[Partition]) -> None:
        """They will be another's; work in flight may still finish."""
        log.info("giving up partitions", extra={"partitions": sorted(partitions)})

    def released(self, partitions: set[Partition]) -> None:
        """They are another's now: what is unfinished is dropped, and redelivered there."""
        with self._lock:
            beyond = {}
            for partition in partitions:
                if lease := self._leases.pop(partition, None):
                    lease.lost = True
                    if lease.back is not None:
                        beyond[partition] = lease.back
            self._drop(partitions)
            if beyond:
                replay_by_hand(beyond, "the group has not gone back")
            self._moved("released", partitions)

    def again(self, offsets: Offsets) -> None:
        """Ours, and to be read once more from there: what is unfinished is dropped."""
        with self._lock:
            mine = offsets.keys() & self._leases.keys()
            for partition in mine:
                self._leases[partition].lost = True
                self._leases[partition] = Lease(partition, back=offsets[partition])
            self._drop(mine)

    def beyond(self) -> Offsets:
        """Where partitions are read again from of which the group's offset lies beyond that."""
        with self._lock:
            return self._beyond()

    def _beyond(self) -> Offsets:
        leases = self._leases.items()
        return {each: lease.back for each, lease in leases if lease.back is not None}

    def _drop(self, partitions: set[Partition]) -> None:
        self._tracker.forget(partitions)
        for job in [job for job in self._open.values() if job.partition in partitions]:
            self._close(job)

    def _moved(self, what: str, partitions: set[Partition]) -> None:
        self._metrics.rebalances.inc()
        self._metrics.assigned_partitions.set(len(self._leases))
        held = sorted(self._leases)
        log.info("partitions %s", what, extra={"partitions": sorted(partitions), "held": held})

    def admit(self, records: list[Record]) -> list[Job]:
        """Jobs for records of partitions that are ours."""
        with self._lock:
            jobs = []
            for record in records:
                lease = self._leases.get((record.topic, record.partition))
                if lease is None:
                    continue
                job = Job(record, lease)
                self._tracker.consumed(lease.partition, record.offset)
                self._open[id(job)] = job
                self._bytes += record.size
                jobs.append(job)
            return jobs

    def finish(self, jobs: list[Job], *, committed: bool = False) -> None:
        """The outcomes of `jobs` are acknowledged, maybe with their offsets."""
        with self._lock:
            for job in jobs:
                if not job.lease.lost:
                    if committed:
                        job.lease.back = None
                    self._tracker.finish(job.partition, job.record.offset)
                    self._close(job)

    def _close(self, job: Job) -> None:
        if self._open.pop(id(job), None) is not None:
            self._bytes -= job.record.size
            self._fewer.notify_all()

    def offsets_after(self, jobs: list[Job]) -> Offsets:
        """Where each partition stands once `jobs`, in order, are finished.

        Lost ones, too: their verdicts must not go out without the offsets that get them fenced.
        """
        return {job.partition: job.record.offset + 1 for job in jobs}

    def committable(self) -> Offsets:
        """Offsets finished and not yet committed, and those the group has to go back to."""
        with self._lock:
            return self._beyond() | self._tracker.committable()

    def committed(self, offsets: Offsets) -> None:
        """Kafka has stored `offsets`."""
        with self._lock:
            # A commit sent before a partition went back may be answered after it: it led beyond.
            news = {p: o for p, o in offsets.items() if not self._is_beyond(p, o)}
            self._tracker.committed(news)
            for partition in news.keys() & self._leases.keys():
                self._leases[partition].back = None

    def _is_beyond(self, partition: Partition, offset: int) -> bool:
        back = self._beyond().get(partition)
        return back is not None and offset > max(back, self._tracker.finished(partition))

    def unfinished(self, partitions: set[Partition] | None = None) -> int:
        """Events in work."""
        with self._lock:
            return self._tracker.unfinished(partitions)

    def wait_for_fewer(self, than: int, seconds: float) -> bool:
        """Wait at most so long until fewer events are in work; whether they are."""
        with self._fewer:
            return self._fewer.wait_for(lambda: self._tracker.unfinished() < than, seconds)

    def load(self) -> tuple[int, int, float]:
        """Events in work, their bytes, and the age of the oldest in seconds."""
        with self._lock:
            oldest = next(iter(self._open.values()), None)
            age = monotonic() - oldest.admitted if oldest is not None else 0.0
            return len(self._open), self._bytes, age


def replay_by_hand(offsets: Offsets, why: str) -> None:
    """Say what nobody will read again unless somebody sets the group's offsets back."""
    told = {number: offset for (_, number), offset in offsets.items()}
    log.error(f"replay these by hand: {why}", extra={"offsets": told})
