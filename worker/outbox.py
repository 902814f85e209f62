"""The publishing thread: outcomes to messages, published until Kafka has acknowledged them.

Owns which topic an outcome goes to, and that nothing is finished before it is acknowledged. It must
not know where outcomes come from, nor poll or commit what is not published with them.
"""

import logging
from collections.abc import Callable
from queue import Empty, Queue
from threading import Event, Thread
from time import time
from uuid import uuid4

from worker.assignment import Assignment
from worker.broker import Consumer
from worker.config import Settings
from worker.errors import EventError, InfrastructureError
from worker.jobs import Job
from worker.lanes import take_all
from worker.messages import Verdict, dead_letter_headers
from worker.metrics import Metrics
from worker.publishing import Outgoing, Publisher, TransactionalPublisher
from worker.retrying import PAUSE_SECONDS
from worker.threads import show_name

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.1  # between looks whether it is to end, when nothing comes

# Publishes the outcomes of those jobs that are still ours, and answers which they were.
Publish = Callable[[list[Job]], list[Job]]


class Outbox:
    """Publishes what a pipeline has finished, in a thread of its own."""

    def __init__(
        self,
        *,
        settings: Settings,
        outcomes: "Queue[list[Job]]",
        consumer: Consumer,
        assignment: Assignment,
        metrics: Metrics,
        version: str,
        on_step: Callable[[str], None],
    ) -> None:
        """`on_step` is told "transacted" and "published"."""
        self.failure: BaseException | None = None  # what the thread died of
        self.trouble: str | None = None  # why Kafka does not take what is published
        self._settings = settings
        self._outcomes = outcomes
        self._consumer = consumer
        self._assignment = assignment
        self._metrics = metrics
        self._version = version
        self._on_step = on_step
        self._closing = Event()
        self._thread = Thread(target=self._run, name="publish", daemon=True)

    def start(self) -> None:
        """Publish from now on."""
        self._thread.start()

    def close(self) -> None:
        """Done, or out of time: publish nothing more."""
        self._closing.set()

    @property
    def closing(self) -> bool:
        """Whether it was told so."""
        return self._closing.is_set()

    def join(self, timeout_seconds: float) -> None:
        """Wait for the thread to end."""
        self._thread.join(timeout_seconds)

    def alive(self) -> bool:
        """Whether the thread lives."""
        return self._thread.is_alive()

    def _run(self) -> None:
        show_name()
        try:
            publish, close = self._make_publisher()
            while not self._closing.is_set():
                try:
                    jobs = take_all(self._outcomes, LOOK_SECONDS)
                except Empty:
                    continue
                self._publish(publish, jobs)
            close(0.0)
        except BaseException as error:
            log.exception("publishing died")
            self.failure = error

    def _make_publisher(self) -> tuple[Publish, Callable[[float], None]]:
        settings = self._settings
        if settings.delivery == "exactly-once":
            # One id for the life of this process: a successor fences by membership, not by name.
            identity = f"{settings.group_id}-{uuid4().hex}"
            transactional = TransactionalPublisher(
                settings, self._consumer, identity, self._on_step
            )

            def publish(jobs: list[Job]) -> list[Job]:
                # First the membership, then the leases: see `Consumer.membership`.
                membership = self._consumer.membership()
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
                if self.trouble is None:
                    log.warning("publishing failed, retrying", extra={"error": str(error)})
                self.trouble = str(error)
                self._closing.wait(pause)
                pause = min(longest, pause * 2)
                continue
            if self.trouble is not None:
                log.info("publishing again")
                self.trouble = None
            self._on_step("published")
            exactly_once = self._settings.delivery == "exactly-once"
            self._assignment.finish(published, committed=exactly_once)
            self._account(published)
            return
        # All lost: whether Kafka takes what is published, the next batch will tell.
        self.trouble = None

    def _messages(self, jobs: list[Job]) -> list[Outgoing]:
        return [message for job in jobs for message in self._outgoing(job)]

    def _outgoing(self, job: Job) -> list[Outgoing]:
        record, outcome = job.record, job.outcome
        if isinstance(outcome, EventError):
            headers = tuple(dead_letter_headers(record, outcome, self._version))
            return [Outgoing(self._settings.dead_letter_topic, record.key, record.value, headers)]
        if isinstance(outcome, Verdict):
            return [
                Outgoing(self._settings.verdict_topic, outcome.image_id.encode(), outcome.to_json())
            ]
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
                if job.record.timestamp_ms > 0:  # else it has none: one may be left out
                    waited = now - job.record.timestamp_ms / 1000
                    self._metrics.event_to_verdict.observe(max(0.0, waited))
                log.debug("verdict", extra=where | {"verdict": str(job.outcome.verdict)})
            else:
                log.debug("deleted", extra=where)


def _held(jobs: list[Job]) -> list[Job]:
    return [job for job in jobs if not job.lease.lost]
