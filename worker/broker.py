"""kafka-python behind a small interface: consume, publish, commit, transactions.

Owns every setting of the Kafka clients and the surprises they hold (each is commented where it
is met). Knows records and bytes; not images, not Redis.
"""

import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from threading import Thread
from time import monotonic
from typing import Any, Protocol, TypeVar

from kafka import KafkaConsumer, KafkaProducer
from kafka.consumer.subscription_state import AsyncConsumerRebalanceListener
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.errors import KafkaError
from kafka.structs import ConsumerGroupMetadata, MemberState, OffsetAndMetadata, TopicPartition

from worker.config import Settings
from worker.errors import ConfigError, InfrastructureError
from worker.messages import Record
from worker.offsets import Partition

log = logging.getLogger(__name__)

Result = TypeVar("Result")
Offsets = dict[Partition, int]
IDLE_MS = 20  # kafka-python sleeps this long where nothing is fetchable: the latency of a resume


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One message to publish."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...] = ()


class Owner(Protocol):
    """Who works on the partitions; called on kafka-python's IO thread, so nothing may block."""

    def assigned(self, partitions: set[Partition]) -> None: ...
    def revoking(self, partitions: set[Partition]) -> None: ...
    def unfinished(self, partitions: set[Partition]) -> int: ...
    def committable(self) -> Offsets: ...
    def released(self, partitions: set[Partition]) -> None: ...


class Consumer:
    """A member of the consumer group; `poll` and `commit` from one thread."""

    def __init__(self, settings: Settings, owner: Owner) -> None:
        """Connect and subscribe. Raises ConfigError when no broker answers or refuses us."""
        self._topic = settings.topic
        session_ms = int(settings.session_timeout_seconds * 1000)
        self._consumer = connect(
            lambda: KafkaConsumer(
                **settings.client_options(),
                group_id=settings.group_id,
                enable_auto_commit=False,
                auto_offset_reset="earliest",  # a new group must not skip what is waiting
                allow_auto_create_topics=False,
                isolation_level="read_committed",
                partition_assignment_strategy=[CooperativeStickyAssignor],
                session_timeout_ms=session_ms,
                heartbeat_interval_ms=max(100, session_ms // 10),
                max_partition_fetch_bytes=settings.max_message_bytes,
                fetch_max_bytes=max(52_428_800, settings.max_message_bytes),
                fetch_max_wait_ms=100,
                retry_backoff_ms=IDLE_MS,
                reconnect_backoff_max_ms=2_000,
                metrics_enabled=False,
            )
        )
        listener = _Listener(self._consumer, owner, settings.revoke_timeout_seconds)
        self._consumer.subscribe([self._topic], listener=listener)

    def poll(self, timeout_seconds: float, most: int) -> list[Record]:
        """Up to `most` records; also drives joining, rebalances and heartbeats.

        Raises InfrastructureError.
        """
        with _translated("poll"):
            found = self._consumer.poll(timeout_ms=int(timeout_seconds * 1000), max_records=most)
        return [_record(message) for messages in found.values() for message in messages]

    def pause(self) -> None:
        """Fetch nothing until `resume`; polling goes on, for heartbeats and rebalances."""
        self._consumer.pause(*self._consumer.assignment())

    def resume(self) -> None:
        """Fetch again."""
        self._consumer.resume(*self._consumer.paused())

    def commit(self, offsets: Offsets, done: Callable[[Offsets, Exception | None], None]) -> None:
        """Send the offsets; `done(offsets, error)` is called from a later `poll`."""

        def callback(_: object, response: object) -> None:
            done(offsets, response if isinstance(response, Exception) else None)

        self._consumer.commit_async(_structs(offsets), callback=callback)

    def commit_now(self, offsets: Offsets, timeout_seconds: float) -> None:
        """Commit and wait. Raises InfrastructureError."""
        with _translated("commit"):
            self._consumer.commit(_structs(offsets), timeout_ms=int(timeout_seconds * 1000))

    def committed(self, partitions: set[Partition], timeout_seconds: float) -> Offsets:
        """What the group has committed. Raises InfrastructureError."""
        found: Offsets = {}
        with _translated("committed"):
            for topic, number in partitions:
                offset = self._consumer.committed(
                    TopicPartition(topic, number), timeout_ms=int(timeout_seconds * 1000)
                )
                if offset is not None:
                    found[topic, number] = offset
        return found

    def group_metadata(self) -> ConsumerGroupMetadata:
        """The membership a transaction is fenced by (KIP-447)."""
        return self._consumer.group_metadata()

    def joined(self) -> bool:
        """Whether the group is stable with us in it."""
        return bool(self.group_metadata().state == MemberState.STABLE)

    def lag(self, timeout_seconds: float) -> dict[Partition, int]:
        """Messages between the committed offset and the newest, by partition; asks the brokers.

        Raises InfrastructureError.
        """
        assigned = list(self._consumer.assignment())
        if not assigned:
            # With nothing assigned there is no offset to ask for; any answer shows Kafka is there.
            with _translated("metadata"):
                self._consumer.partitions_for_topic(self._topic)
            return {}
        timeout_ms = int(timeout_seconds * 1000)
        with _translated("end_offsets"):
            ends = self._consumer.end_offsets(assigned, timeout_ms=timeout_ms)
            starts = self._consumer.beginning_offsets(assigned, timeout_ms=timeout_ms)
        committed = self.committed(_partitions(assigned), timeout_seconds)
        return {
            (p.topic, p.partition): max(
                0, end - max(starts[p], committed.get((p.topic, p.partition), 0))
            )
            for p, end in ends.items()
        }

    def close(self, timeout_seconds: float) -> None:
        """Leave the group."""
        with suppress(KafkaError):
            self._consumer.close(autocommit=False, timeout_ms=int(timeout_seconds * 1000))


class _Listener(AsyncConsumerRebalanceListener):  # type: ignore[misc]
    """Lets work in flight finish and commits it before partitions go to another worker.

    Asynchronous because a synchronous one would stop heartbeats while it waits, and because a
    blocking commit is refused on the IO thread.
    """

    def __init__(self, consumer: Any, owner: Owner, timeout_seconds: float) -> None:
        self._consumer = consumer
        self._owner = owner
        self._timeout = timeout_seconds

    async def on_partitions_assigned(self, assigned: set[TopicPartition]) -> None:
        self._owner.assigned(_partitions(assigned))

    async def on_partitions_revoked(self, revoked: set[TopicPartition]) -> None:
        partitions = _partitions(revoked)
        self._owner.revoking(partitions)
        deadline = monotonic() + self._timeout
        while self._owner.unfinished(partitions) and monotonic() < deadline:
            await self._consumer._net.sleep(0.01)
        mine = {p: o for p, o in self._owner.committable().items() if p in partitions}
        if mine:
            try:
                await self._consumer.commit_async(_structs(mine))
            except KafkaError as error:
                # The next owner does the work again and, the index being idempotent,
                # comes to the same verdicts.
                log.warning("commit before a rebalance failed", extra={"error": repr(error)})
        self._owner.released(partitions)

    async def on_partitions_lost(self, lost: set[TopicPartition]) -> None:
        self._owner.released(_partitions(lost))


class Publisher:
    """Publishes batches and waits for every acknowledgement (acks=all, idempotent)."""

    def __init__(self, settings: Settings) -> None:
        """Connect. Raises ConfigError when no broker answers or refuses us."""
        self._settings = settings
        self._timeout = settings.publish_timeout_seconds
        self._producer: KafkaProducer | None = self._connect()

    def _connect(self) -> KafkaProducer:
        timeout_ms = int(self._timeout * 1000)
        return connect(
            lambda: KafkaProducer(
                **producer_options(self._settings),
                delivery_timeout_ms=timeout_ms,
                max_block_ms=timeout_ms,
                request_timeout_ms=min(30_000, timeout_ms),
            )
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
            self._producer.flush(self._timeout)
            for future in futures:
                future.get(timeout=self._timeout)
        except (KafkaError, ConfigError) as error:
            # Whatever is still buffered would be sent late and out of order: start afresh.
            self.close(0)
            raise InfrastructureError(f"publish: {error!r}") from error

    def close(self, timeout_seconds: float) -> None:
        """Drop the connection; unacknowledged messages are not waited for beyond the timeout."""
        producer, self._producer = self._producer, None
        if producer is not None:
            with suppress(KafkaError):
                producer.close(timeout=timeout_seconds)


class TransactionalPublisher:
    """Publishes verdicts and commits their offsets in one transaction (KIP-98, KIP-447)."""

    def __init__(self, settings: Settings, consumer: Consumer, transactional_id: str) -> None:
        """Connect lazily: the first batch initialises the transactional id, fencing its past."""
        self._settings = settings
        self._consumer = consumer
        self._id = transactional_id
        self._timeout = settings.publish_timeout_seconds
        self._producer: KafkaProducer | None = None

    def _connect(self) -> KafkaProducer:
        timeout_ms = int(self._timeout * 1000)
        producer = connect(
            lambda: KafkaProducer(
                **producer_options(self._settings),
                transactional_id=self._id,
                transaction_timeout_ms=timeout_ms,
                delivery_timeout_ms=timeout_ms,
                max_block_ms=timeout_ms,
                request_timeout_ms=min(30_000, timeout_ms),
            )
        )
        self._watched(producer.init_transactions)
        return producer

    def publish(self, messages: list[Outgoing], offsets: Offsets) -> None:
        """Send `messages` and commit `offsets`, both or neither.

        Raises InfrastructureError when the transaction did not commit, or when nobody can tell;
        `publish` again finds out first. A fenced membership shows as the same error, and the
        caller's leases are lost soon after.
        """
        try:
            if self._producer is None:
                self._producer = self._connect()
                if self._already_committed(offsets):
                    return
            producer = self._producer
            producer.begin_transaction()
            futures = [send(producer, message) for message in messages]
            self._watched(
                lambda: producer.send_offsets_to_transaction(
                    _structs(offsets), self._consumer.group_metadata()
                )
            )
            self._watched(producer.commit_transaction)
            for future in futures:
                future.get(timeout=self._timeout)
        except (KafkaError, ConfigError, InfrastructureError) as error:
            # An aborted producer keeps stale pending offsets and would send them with its next
            # transaction. A new one with the same id aborts or completes what this one left.
            self.close(0)
            raise InfrastructureError(f"transaction: {error!r}") from error

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
            with suppress(KafkaError):
                producer.close(timeout=timeout_seconds)


def producer_options(settings: Any) -> dict[str, Any]:
    """What every producer of the project sets: acks=all, idempotence, no created topics."""
    return {
        **settings.client_options(),
        "acks": "all",
        "enable_idempotence": True,
        "allow_auto_create_topics": False,
        # Room for the headers a dead letter adds to the largest message consumed.
        "max_request_size": settings.max_message_bytes + 65_536,
        "reconnect_backoff_max_ms": 2_000,
        "metrics_enabled": False,
    }


def send(producer: KafkaProducer, message: Outgoing) -> Any:
    """Hand a message to kafka-python's sender; its future resolves on acknowledgement."""
    # kafka-python refuses a record with neither key nor value; an empty key is the nearest to it.
    key = b"" if message.key is None and message.value is None else message.key
    return producer.send(message.topic, message.value, key=key, headers=list(message.headers))


def connect(make: Callable[[], Result]) -> Result:
    """Build a client. Raises ConfigError with one line where kafka-python raises."""
    try:
        return make()
    except KafkaError as error:
        raise ConfigError(f"Kafka: {error}") from error


class _translated:  # noqa: N801 - reads as a word in a `with` statement
    """Turns KafkaError into InfrastructureError."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, KafkaError):
            raise InfrastructureError(f"{self._what}: {error!r}") from error


def _record(message: Any) -> Record:
    return Record(
        topic=message.topic,
        partition=message.partition,
        offset=message.offset,
        timestamp_ms=message.timestamp,
        key=message.key,
        value=message.value,
        # A header may be null on the wire, but kafka-python cannot send one back.
        headers=tuple((name, value or b"") for name, value in message.headers),
        leader_epoch=message.leader_epoch if message.leader_epoch is not None else -1,
    )


def _structs(offsets: Offsets) -> dict[TopicPartition, OffsetAndMetadata]:
    return {TopicPartition(*p): OffsetAndMetadata(o, "", -1) for p, o in offsets.items()}


def _partitions(partitions: Iterable[TopicPartition]) -> set[Partition]:
    return {(p.topic, p.partition) for p in partitions}
