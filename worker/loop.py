"""Poll, pipeline, publish, commit, stop.

The one documented order: index written → verdicts acknowledged → offsets committed. The main
thread polls and commits, the pipeline's threads work, one thread publishes. Rebalances happen
inside `poll`, so nothing here may keep the main thread from polling.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty
from threading import Event, Thread
from time import monotonic, sleep, time
from uuid import uuid4

from worker.assignment import Assignment, replay_by_hand
from worker.broker import Consumer, Offsets
from worker.config import Settings
from worker.errors import EventError, InfrastructureError
from worker.jobs import Job
from worker.lanes import take_all
from worker.messages import Record, Verdict, dead_letter_headers
from worker.metrics import Metrics
from worker.pipeline import Pipeline
from worker.publishing import Outgoing, Publisher, TransactionalPublisher
from worker.retrying import PAUSE_SECONDS
from worker.threads import show_name

log = logging.getLogger(__name__)

POLL_SECONDS = 0.1
POLL_EVENTS = 256  # most events taken from one poll, so that commits keep their pace
BUSY_EVENTS = 4  # in work: the next ones would wait for these anyway
FEW_EVENTS = 8  # fewer from one poll: as many as the embedder takes at once would cost less each
DRAIN_SECONDS = 0.01  # of a poll of who stops, and looks each time whether its work is done
BREATH_SECONDS = 0.03  # between polls that bring few, when busy
STALLED_SECONDS = 60.0  # a loop that has not turned for this long is not live

# Publishes the outcomes of those jobs that are still ours, and answers which they were.
Publish = Callable[[list[Job]], list[Job]]


@dataclass(frozen=True)
class Topics:
    """Where outcomes go."""

    verdicts: str
    dead_letters: str


class Loop:
    """One worker's life between joining the group and leaving it."""

    def __init__(
        self,
        *,
        settings: Settings,
        pipeline: Pipeline,
        metrics: Metrics,
        version: str,
        on_step: Callable[[str], None] = lambda step: None,
    ) -> None:
        """`on_step` is told "transacted", "published" and "committed"; fault tests crash there."""
        self._settings = settings
        self._pipeline = pipeline
        self._metrics = metrics
        self._version = version
        self._on_step = on_step
        self._topics = Topics(settings.verdict_topic, settings.dead_letter_topic)
        self._assignment = Assignment(metrics)
        self.consumer = Consumer(settings, self._assignment)
        self._stop = Event()  # asked to stop: finish what is in flight
        self._closing = Event()  # done, or out of time: publish nothing more
        self._turned = monotonic()
        self._paused = False
        self._commit_due = monotonic()
        self._commit_pending = False
        self._trouble: str | None = None
        self._publisher_failure: BaseException | None = None
        self._foreign_failure: BaseException | None = None
        self._publisher = Thread(target=self._publish_stage, name="publish", daemon=True)

    def stop(self) -> None:
        """Finish what is in flight, commit, leave. Safe in a signal handler."""
        self._stop.set()

    def fail(self, error: BaseException) -> None:
        """End with what a thread beside the loop died of. Safe from any thread."""
        self._foreign_failure = error

    def live(self) -> bool:
        """Whether the loop turns and every stage lives."""
        turning = monotonic() - self._turned < STALLED_SECONDS
        return turning and self._pipeline.alive() and self._publisher.is_alive()

    def ended(self) -> bool:
        """Whether it lets go of Kafka: what others ask its consumer then may fail."""
        return self._closing.is_set()

    def publishing(self) -> bool:
        """Whether Kafka takes what is published."""
        return self._trouble is None

    def run(self) -> int:
        """Work until stopped. Returns 0 when everything in flight was finished, 1 otherwise.

        Raises whatever a stage died of, or a thread that told `fail` so.
        """
        self._pipeline.start()
        self._publisher.start()
        try:
            while not self._stop.is_set():
                self._turn()
            return self._drain()
        finally:
            self._closing.set()
            self._pipeline.close(timeout=1.0)
            self._publisher.join(1.0)
            self.consumer.close(timeout_seconds=2.0)

    def _turn(self) -> None:
        self._turned = monotonic()
        self._raise_failures()
        room = self._make_room()
        records = self._poll(POLL_SECONDS, max(1, min(room, POLL_EVENTS)))
        self._pipeline.admit(self._assignment.admit(records))
        self._commit_if_due()
        busy = self._assignment.unfinished() >= BUSY_EVENTS and not self._paused
        if busy and len(records) < FEW_EVENTS:
            # A poll and each stage after it cost nearly the same, however few events it brings.
            self._stop.wait(BREATH_SECONDS)
        if lost := self._pipeline.lost():
            self._replay(lost)

    def _poll(self, seconds: float, most: int) -> list[Record]:
        try:
            return self.consumer.poll(seconds, most)
        except InfrastructureError as error:
            self._metrics.kafka_errors.labels(type(error.__cause__).__name__).inc()
            log.warning("poll failed, retrying", extra={"error": str(error)})
            sleep(PAUSE_SECONDS[1])
            return []

    def _replay(self, lost: dict[int, int]) -> None:
        """Go back to the first event of each partition whose write Redis has lost.

        What it kept is answered as before. The group goes back, too, so that a worker that dies
        meanwhile leaves the rest of the replay to its successor; with exactly-once it goes back
        with the first that are published again, as a commit beside a transaction that is not over
        would be undone by it, or undo it.
        """
        wanted = {(self._settings.topic, number): offset for number, offset in lost.items()}
        back = self.consumer.go_back(wanted)
        self._assignment.again(back)
        self._metrics.replays.inc(len(back))
        told = {"offsets": {number: offset for (_, number), offset in back.items()}}
        log.warning("reading again what Redis has lost", extra=told)
        if others := {p: o for p, o in wanted.items() if p not in back}:
            replay_by_hand(others, "they are another worker's")
        self._pipeline.replaying(lost)
        if back and self._settings.delivery == "at-least-once":
            self._go_back(self._settings.commit_interval_seconds)

    def _go_back(self, seconds: float) -> None:
        """Set the group's offsets to where events are read again from; else the next commit does.

        With exactly-once for the end only, when nothing of ours is sent any more. Of an offset
        committed by hand and one in a transaction the brokers keep the one they were told last,
        whenever the transaction ends; and one that was not answered before is never committed.
        """
        back = self._assignment.beyond()
        if not back:
            return
        try:
            self.consumer.commit_now(back, seconds)
            self._assignment.committed(back)
        except InfrastructureError as error:
            log.warning("the group did not go back yet", extra={"error": str(error)})

    def _raise_failures(self) -> None:
        failures = (self._pipeline.failure, self._publisher_failure, self._foreign_failure)
        for failure in failures:
            if failure is not None:
                raise failure

    def _make_room(self) -> int:
        """Events that may be admitted; pauses the partitions when there is no room."""
        events, held, age = self._assignment.load()
        self._metrics.inflight_events.set(events)
        self._metrics.oldest_uncommitted_age.set(age)
        room = self._settings.in_flight_events - events
        full = room <= 0 or held >= self._settings.in_flight_bytes
        if full:
            if not self._paused:
                self._metrics.backpressure_pauses.inc()
            # Again at each turn: a rebalance may have brought partitions that are not paused.
            self.consumer.pause()
        elif self._paused:
            self.consumer.resume()
        self._paused = full
        return 0 if full else room

    def _commit_if_due(self) -> None:
        if self._commit_pending or monotonic() < self._commit_due:
            return
        self._commit_due = monotonic() + self._settings.commit_interval_seconds
        if offsets := self._committable():
            self._commit_pending = True
            self.consumer.commit(offsets, self._committed)

    def _committable(self) -> Offsets:
        """What is finished and is not committed; with exactly-once nothing, for both are one."""
        if self._settings.delivery == "exactly-once":
            return {}
        return self._assignment.committable()

    def _to_commit(self) -> Offsets:
        """What only a member of the group can say when it stops."""
        return self._committable() | self._assignment.beyond()

    def _committed(self, offsets: Offsets, error: Exception | None) -> None:
        self._commit_pending = False
        self._metrics.commits.labels("failed" if error else "succeeded").inc()
        if error is not None:
            # During a rebalance this is normal; the next commit carries these offsets, too.
            log.debug("commit failed", extra={"error": repr(error)})
            return
        self._assignment.committed(offsets)
        self._on_step("committed")

    def _drain(self) -> int:
        """Finish and commit what is in flight, within the deadline."""
        deadline = monotonic() + self._settings.shutdown_timeout_seconds
        log.info("stopping", extra={"inflight": self._assignment.unfinished()})
        while (
            self._assignment.unfinished() or (self._to_commit() and not self.consumer.joined())
        ) and monotonic() < deadline:
            self._turned = monotonic()
            self._raise_failures()
            # A member that does not join holds up the others, and without a group nothing is
            # published exactly once. What a partition that comes now brings is a successor's.
            self.consumer.pause()
            self._poll(DRAIN_SECONDS, 1)
        unfinished = self._assignment.unfinished()
        if offsets := self._committable():
            try:
                self.consumer.commit_now(offsets, max(1.0, deadline - monotonic()))
                self._metrics.commits.labels("succeeded").inc()
                self._assignment.committed(offsets)
            except InfrastructureError as error:
                self._metrics.commits.labels("failed").inc()
                log.warning("last commit failed", extra={"error": str(error)})
                unfinished += 1
        if lost := self._pipeline.lost():
            self._replay(lost)  # by whoever comes next: the group goes back
        by_hand = self._leave_the_rest(deadline)
        log.info("stopped", extra={"unfinished": unfinished})
        return 1 if unfinished or by_hand else 0

    def _leave_the_rest(self, deadline: float) -> bool:
        """See to it that the next one reads again what this one has not; whether it will not."""
        if not self._assignment.beyond():
            return False
        self._closing.set()
        self._publisher.join(max(1.0, deadline - monotonic()))
        if not self._publisher.is_alive():
            self._go_back(max(1.0, deadline - monotonic()))
        left = self._assignment.beyond()
        self._assignment.released(set(left))  # and says of which it is beyond
        return bool(left)

    # ── the publishing thread ───────────────────────────────────────────────────────────────

    def _publish_stage(self) -> None:
        show_name()
        try:
            publish, close = self._make_publisher()
            while not self._closing.is_set():
                try:
                    jobs = take_all(self._pipeline.outcomes, POLL_SECONDS)
                except Empty:
                    continue
                self._publish(publish, jobs)
            close(0.0)
        except BaseException as error:
            log.exception("publishing died")
            self._publisher_failure = error

    def _make_publisher(self) -> tuple[Publish, Callable[[float], None]]:
        settings = self._settings
        if settings.delivery == "exactly-once":
            # One id for the life of this process: a successor fences by membership, not by name.
            identity = f"{settings.group_id}-{uuid4().hex}"
            transactional = TransactionalPublisher(settings, self.consumer, identity, self._on_step)

            def publish(jobs: list[Job]) -> list[Job]:
                # First the membership, then the leases: see `Consumer.membership`.
                membership = self.consumer.membership()
                if held := _held(jobs):
                    offsets = self._assignment.offsets_after(held)
                    transactional.publish(self._messages(held), offsets, membership)
                return held

            return publish, transactional.close
        plain = Publisher(settings)

        def publish_only(jobs: list[Job]) -> list[Job]:
            if held := _held(jobs):
                plain.publish(self._messages(held))
            return held

        return publish_only, plain.close

    def _publish(self, publish: Publish, jobs: list[Job]) -> None:
        """Publish until acknowledged; jobs whose partition is lost meanwhile are dropped."""
        pause, longest = PAUSE_SECONDS
        while _held(jobs) and not self._closing.is_set():
            try:
                with self._metrics.stage("publish"):
                    published = publish(jobs)
            except InfrastructureError as error:
                cause = error.__cause__ or error
                self._metrics.kafka_errors.labels(type(cause).__name__).inc()
                if self._trouble is None:
                    log.warning("publishing failed, retrying", extra={"error": str(error)})
                self._trouble = str(error)
                self._closing.wait(pause)
                pause = min(longest, pause * 2)
                continue
            if self._trouble is not None:
                log.info("publishing again")
                self._trouble = None
            self._on_step("published")
            exactly_once = self._settings.delivery == "exactly-once"
            self._assignment.finish(published, committed=exactly_once)
            self._account(published)
            return
        # All lost: whether Kafka takes what is published, the next batch will tell.
        self._trouble = None

    def _messages(self, jobs: list[Job]) -> list[Outgoing]:
        return [message for job in jobs for message in self._outgoing(job)]

    def _outgoing(self, job: Job) -> list[Outgoing]:
        record, outcome = job.record, job.outcome
        if isinstance(outcome, EventError):
            headers = tuple(dead_letter_headers(record, outcome, self._version))
            return [Outgoing(self._topics.dead_letters, record.key, record.value, headers)]
        if isinstance(outcome, Verdict):
            return [Outgoing(self._topics.verdicts, outcome.image_id.encode(), outcome.to_json())]
        return []  # a delete: nothing to tell but the offset

    def _account(self, jobs: list[Job]) -> None:
        now = time()
        for job in jobs:
            where = {"partition": job.record.partition, "offset": job.record.offset}
            if isinstance(job.outcome, EventError):
                self._metrics.dead_letters.labels(str(job.outcome.reason)).inc()
                log.debug("dead letter", extra=where | {"reason": str(job.outcome)})
            elif isinstance(job.outcome, Verdict):
                self._metrics.verdicts.labels(str(job.outcome.verdict)).inc()
                self._metrics.event_to_verdict.observe(
                    max(0.0, now - job.record.timestamp_ms / 1000)
                )
                log.debug("verdict", extra=where | {"verdict": str(job.outcome.verdict)})
            else:
                log.debug("deleted", extra=where)


def _held(jobs: list[Job]) -> list[Job]:
    return [job for job in jobs if not job.lease.lost]
