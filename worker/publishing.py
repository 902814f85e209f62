"""kafka-python's producer behind a small interface: publish a batch, or publish and commit as one.

Owns the producers' settings and the surprises they hold. Knows messages as bytes; not images, not
Redis.
"""

from collections.abc import Callable
from dataclasses import dataclass
from threading import Thread
from typing import Any, TypeVar

from kafka import KafkaProducer
from kafka.errors import KafkaError, KafkaTimeoutError
from kafka.structs import ConsumerGroupMetadata

from worker.broker import Consumer, Offsets, structs
from worker.config import Settings
from worker.connecting import BOOTSTRAP_MS, reconnect
from worker.connections import KafkaSettings
from worker.errors import InfrastructureError

HEADERS_BYTES = 65_536  # those added to a dead letter, at most
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One message to publish."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...] = ()


class Publisher:
    """Publishes batches and waits for every acknowledgement (acks=all, idempotent)."""

    def __init__(self, settings: Settings) -> None:
        """Connect lazily, at the first batch."""
        self._settings = settings
        self._timeout = settings.publish_timeout_seconds
        self._producer: KafkaProducer | None = None

    def _connect(self) -> KafkaProducer:
        timeout_ms = int(self._timeout * 1000)
        return reconnect(
            KafkaProducer,
            **producer_options(self._settings),
            delivery_timeout_ms=timeout_ms,
            max_block_ms=timeout_ms,
            request_timeout_ms=min(30_000, timeout_ms),
        )

    def publish(self, messages: list[Outgoing]) -> None:
        """Send and wait until all are acknowledged.

        Raises InfrastructureError; then any part may have arrived, and the whole batch is to be
        published again.
        """
        try:
            if self._producer is None:
                self._producer = self._connect()
            futures = [send(self._producer, message) for message in messages]
            acknowledged(self._producer, futures, self._timeout)
        except KafkaError as error:
            # Whatever is still buffered would be sent late and out of order: start afresh.
            self.close(0)
            raise InfrastructureError(f"publish: {error!r}") from error

    def close(self, timeout_seconds: float) -> None:
        """Drop the connection; unacknowledged messages are not waited for beyond the timeout."""
        producer, self._producer = self._producer, None
        if producer is not None:
            discard(producer, timeout_seconds)


class TransactionalPublisher:
    """Publishes verdicts and commits their offsets in one transaction (KIP-98, KIP-447)."""

    def __init__(
        self,
        settings: Settings,
        consumer: Consumer,
        transactional_id: str,
        on_step: Callable[[str], None] = lambda step: None,
    ) -> None:
        """Connect lazily: the first batch initialises the transactional id, fencing its past.

        `on_step` is told "transacted" once messages and offsets are in the open transaction.
        """
        self._settings = settings
        self._consumer = consumer
        self._id = transactional_id
        self._on_step = on_step
        self._timeout = settings.publish_timeout_seconds
        self._producer: KafkaProducer | None = None
        self._unanswered: Offsets = {}

    def _connect(self) -> KafkaProducer:
        timeout_ms = int(self._timeout * 1000)
        producer = reconnect(
            KafkaProducer,
            **producer_options(self._settings),
            transactional_id=self._id,
            transaction_timeout_ms=int(self._settings.transaction_timeout_seconds * 1000),
            delivery_timeout_ms=timeout_ms,
            max_block_ms=timeout_ms,
            request_timeout_ms=min(30_000, timeout_ms),
        )
        try:
            self._watched(producer.init_transactions)
        except (KafkaError, InfrastructureError):
            discard(producer, 0)
            raise
        return producer

    def publish(
        self, messages: list[Outgoing], offsets: Offsets, membership: ConsumerGroupMetadata
    ) -> None:
        """Send `messages` and commit `offsets` as that member, both or neither.

        Raises InfrastructureError when the transaction did not commit, or when nobody can tell;
        `publish` again finds out first. A fenced membership shows as the same error, and the
        caller's leases are lost soon after.
        """
        try:
            if self._producer is None:
                self._producer = self._connect()
                if self._in_doubt(offsets) and self._already_committed(offsets):
                    return
            producer = self._producer
            producer.begin_transaction()
            futures: list[Any] = []
            try:
                for message in messages:
                    futures.append(send(producer, message))
                self._watched(
                    lambda: producer.send_offsets_to_transaction(structs(offsets), membership)
                )
            except KafkaError:
                # Where a message has failed already, this says no more than that one has.
                acknowledged(producer, futures, self._timeout)
                raise
            # The commit would wait for them, too, but not say what was wrong with one.
            acknowledged(producer, futures, self._timeout)
            self._on_step("transacted")
            self._unanswered = dict(offsets)
            self._watched(producer.commit_transaction)
            self._unanswered = {}
        except (KafkaError, InfrastructureError) as error:
            # An aborted producer keeps stale pending offsets and would send them with its next
            # transaction. A new one with the same id aborts or completes what this one left.
            self.close(0)
            raise InfrastructureError(f"transaction: {error!r}") from error

    def _in_doubt(self, offsets: Offsets) -> bool:
        """Whether they were to be committed and no answer came.

        Others may lie behind the group's for another reason: they are replayed.
        """
        return all(self._unanswered.get(partition) == end for partition, end in offsets.items())

    def _already_committed(self, offsets: Offsets) -> bool:
        """Whether the transaction whose answer was lost did commit: its offsets tell."""
        stored = self._consumer.committed(set(offsets), self._timeout)
        return bool(offsets) and all(
            stored.get(partition, -1) >= offset for partition, offset in offsets.items()
        )

    def _watched(self, call: Callable[[], Result]) -> Result:
        """Run a transaction call with the deadline it does not have itself.

        Raises InfrastructureError when it passes; the thread left waiting dies with its producer.
        """
        outcome: list[Result | BaseException] = []

        def run() -> None:
            try:
                outcome.append(call())
            except BaseException as error:
                outcome.append(error)

        thread = Thread(target=run, name="transaction", daemon=True)
        thread.start()
        thread.join(self._timeout)
        if not outcome:
            raise InfrastructureError(f"no answer within {self._timeout:g} s")
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        return outcome[0]

    def close(self, timeout_seconds: float) -> None:
        """Drop the producer; an open transaction is aborted by its successor or by timeout."""
        producer, self._producer = self._producer, None
        if producer is not None:
            discard(producer, timeout_seconds)


def discard(producer: KafkaProducer, timeout_seconds: float) -> None:
    """Close, waiting for what is unsent for `timeout_seconds` at most, and then for nothing.

    kafka-python's `close` raises when that time is over, before it has told its sending thread,
    which would go on: late, out of order, for ever.
    """
    try:
        producer.close(timeout=timeout_seconds)
    except KafkaError:
        producer._sender.force_close()


def producer_options(settings: KafkaSettings) -> dict[str, Any]:
    """What every producer of the project sets: acks=all, idempotence, no created topics."""
    return {
        **settings.client_options(),
        "acks": "all",
        "enable_idempotence": True,
        "allow_auto_create_topics": False,
        "max_request_size": settings.max_message_bytes + HEADERS_BYTES,
        "reconnect_backoff_max_ms": 2_000,
        "bootstrap_timeout_ms": BOOTSTRAP_MS,
        "metrics_enabled": False,
    }


def send(producer: KafkaProducer, message: Outgoing) -> Any:
    """Hand a message to kafka-python's sender; its future resolves on acknowledgement."""
    # kafka-python refuses a record with neither key nor value; an empty key is the nearest to it.
    key = b"" if message.key is None and message.value is None else message.key
    try:
        return producer.send(message.topic, message.value, key=key, headers=list(message.headers))
    except KafkaTimeoutError as error:  # which does not say what it waited for
        raise KafkaTimeoutError(f"topic {message.topic!r}: {error.args[0]}") from error


def acknowledged(producer: KafkaProducer, futures: list[Any], timeout_seconds: float) -> None:
    """Wait for every acknowledgement; raises KafkaError, the first message's that failed."""
    producer.flush(timeout_seconds)
    for future in futures:
        future.get(timeout=timeout_seconds)
