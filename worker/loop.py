"""Poll, pipeline, publish, commit, stop.

The one documented order: index written → verdicts acknowledged → offsets committed. The main
thread polls and commits, the pipeline's threads work, one thread publishes. Rebalances happen
inside `poll`, so nothing here may keep the main thread from polling.
"""

import logging
from collections.abc import Callable
from threading import Event
from time import monotonic, sleep

from worker.assignment import Assignment, replay_by_hand
from worker.broker import Consumer, Offsets
from worker.config import Settings
from worker.errors import InfrastructureError
from worker.messages import Record
from worker.metrics import Metrics
from worker.outbox import Outbox
from worker.pipeline import Pipeline
from worker.retrying import PAUSE_SECONDS

log = logging.getLogger(__name__)

POLL_SECONDS = 0.25  # where there is room for what comes
PAUSED_SECONDS = 0.1  # where there is none, between two looks whether there is now
POLL_EVENTS = 256  # most events taken from one poll, so that commits keep their pace
BUSY_EVENTS = 4  # in work: the next ones would wait for these anyway
FEW_EVENTS = 32  # fewer from one poll: more would cost less each
STOCKED_EVENTS = 64  # in work, and half of what may be: the next ones would wait for long
DRAIN_SECONDS = 0.01  # of a poll of who stops, and looks each time whether its work is done
BREATH_SECONDS = 0.02  # between polls that bring few, when busy
SOME_EVENTS = 12  # in work: nobody is idle before they are half as many
HALVED_SECONDS = 0.1  # more to wait for that: what comes meanwhile shares the trips
# Where so many are in work: until they are half as many, or for so many looks whether to stop.
STOCKED_SECONDS, STOCKED_LOOKS = 0.1, 5
STALLED_SECONDS = 60.0  # a loop that has not turned for longer than a rebalance may wait, and this


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
        self._on_step = on_step
        self._assignment = Assignment(metrics)
        self.consumer = Consumer(settings, self._assignment)
        self._outbox = Outbox(
            settings=settings,
            outcomes=pipeline.outcomes,
            consumer=self.consumer,
            assignment=self._assignment,
            metrics=metrics,
            version=version,
            on_step=on_step,
        )
        self._stop = Event()  # asked to stop: finish what is in flight
        self._turned = monotonic()
        self._paused = False
        self._commit_due = monotonic()
        self._commit_pending = False
        self._foreign_failure: BaseException | None = None

    def stop(self) -> None:
        """Finish what is in flight, commit, leave. Safe from any thread."""
        self._stop.set()

    def fail(self, error: BaseException) -> None:
        """End with what a thread beside the loop died of. Safe from any thread."""
        self._foreign_failure = error

    def live(self) -> bool:
        """Whether the loop turns and every stage lives."""
        most = STALLED_SECONDS + self._settings.revoke_timeout_seconds
        turning = monotonic() - self._turned < most
        return turning and self._pipeline.alive() and self._outbox.alive()

    def ended(self) -> bool:
        """Whether it lets go of Kafka: what others ask its consumer then may fail."""
        return self._outbox.closing

    def publishing(self) -> bool:
        """Whether Kafka takes what is published."""
        return self._outbox.trouble is None

    def run(self) -> int:
        """Work until stopped. Returns 0 when everything in flight was finished, 1 otherwise.

        Raises whatever a stage died of, or a thread that told `fail` so.
        """
        self._pipeline.start()
        self._outbox.start()
        try:
            while not self._stop.is_set():
                self._turn()
            return self._drain()
        finally:
            self._outbox.close()
            self._pipeline.close(timeout=1.0)
            self._outbox.join(1.0)
            self.consumer.close(timeout_seconds=2.0)

    def _turn(self) -> None:
        self._turned = monotonic()
        self._raise_failures()
        room = self._make_room()
        seconds = PAUSED_SECONDS if self._paused else POLL_SECONDS
        records = self._poll(seconds, max(1, min(room, POLL_EVENTS)))
        self._pipeline.admit(self._assignment.admit(records))
        self._commit_if_due()
        self._breathe(len(records))
        if lost := self._pipeline.lost():
            self._replay(lost)

    def _breathe(self, polled: int) -> None:
        """Wait before the next poll, if the last brought few and what is in work lasts so long.

        A poll and each stage after it cost nearly the same, however few events it brings.
        """
        unfinished = self._assignment.unfinished()
        if unfinished < BUSY_EVENTS or polled >= FEW_EVENTS or self._paused:
            return
        stock = max(STOCKED_EVENTS, self._settings.in_flight_events // 2)
        if unfinished < stock:
            self._stop.wait(BREATH_SECONDS)
            if unfinished >= SOME_EVENTS:
                self._assignment.wait_for_fewer(unfinished // 2, HALVED_SECONDS)
            return
        for _ in range(STOCKED_LOOKS):
            if self._assignment.wait_for_fewer(stock // 2, STOCKED_SECONDS) or self._stop.is_set():
                return

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
        failures = (self._pipeline.failure, self._outbox.failure, self._foreign_failure)
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
        self._outbox.close()
        self._outbox.join(max(1.0, deadline - monotonic()))
        if not self._outbox.alive():
            self._go_back(max(1.0, deadline - monotonic()))
        left = self._assignment.beyond()
        self._assignment.released(set(left))  # and says of which it is beyond
        return bool(left)
