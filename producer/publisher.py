"""Publishes records to one topic, acknowledged by every in-sync replica, each written once.

Owns the Kafka producer, the bound on what waits for acknowledgement, and the count of what came
of it. It must not know what the records mean.
"""

import contextlib
import threading
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from kafka import KafkaProducer
from kafka.errors import KafkaError, KafkaTimeoutError

from producer.events import Outgoing
from worker.connecting import connect
from worker.connections import KafkaSettings
from worker.errors import InfrastructureError

# kafka-python 3 has no bound of its own on unsent records.
MAX_WAITING_BYTES = 64 * 1024 * 1024
MAX_WAITING_RECORDS = 4_096
CONNECT_SECONDS = 10.0
DELIVERY_SECONDS = 60.0
MAX_FAILURES_KEPT = 20
# The producer compares estimates that include its own framing.
FRAMING_BYTES = 1_024


@dataclass(slots=True)
class Tally:
    """What became of the records handed to `Publisher.send`."""

    sent: int = 0
    acknowledged: int = 0
    failed: int = 0
    bytes: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def waiting(self) -> int:
        """Records neither acknowledged nor failed yet."""
        return self.sent - self.acknowledged - self.failed


class Publisher:
    """A context manager; leaving it waits for what is still unacknowledged.

    Raises InfrastructureError when no broker answers or the topic is not there, and ConfigError
    when Kafka refuses us.
    """

    def __init__(
        self,
        settings: KafkaSettings,
        *,
        connect_seconds: float = CONNECT_SECONDS,
        delivery_seconds: float = DELIVERY_SECONDS,
        max_waiting_bytes: int = MAX_WAITING_BYTES,
    ) -> None:
        self.tally = Tally()
        self.unreachable = False
        self._topic = settings.topic
        # A batch is given up when due, but found to be only once the connection is.
        self._longest_wait = connect_seconds + delivery_seconds
        self._max_waiting_bytes = max_waiting_bytes
        self._waiting_bytes = 0
        self._settled = threading.Condition()
        self._producer = _connect(settings, connect_seconds, delivery_seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def send(self, outgoing: Outgoing) -> None:
        """Hand a record to Kafka; waits while too much is unacknowledged."""
        self._reserve(outgoing.size)
        try:
            future = self._producer.send(
                self._topic, outgoing.value, outgoing.key, list(outgoing.headers)
            )
        except KafkaError as error:
            self._finish(outgoing, error)
            return
        future.add_callback(lambda _metadata: self._finish(outgoing, None))
        future.add_errback(lambda error: self._finish(outgoing, error))

    def close(self) -> None:
        """Wait until every record is acknowledged or given up, then disconnect."""
        with self._settled:
            self._settled.wait_for(lambda: self.tally.waiting == 0, self._longest_wait)
            # Nothing is left unless the client broke its own delivery deadline.
            self.tally.failed += self.tally.waiting
        # A batch the broker never took was counted as failed above; closing complains of it again.
        with contextlib.suppress(KafkaTimeoutError):
            self._producer.close(timeout=CONNECT_SECONDS)

    def _reserve(self, size: int) -> None:
        def room() -> bool:
            fits = self._waiting_bytes + size <= self._max_waiting_bytes
            return self.tally.waiting == 0 or (fits and self.tally.waiting < MAX_WAITING_RECORDS)

        with self._settled:
            if not self._settled.wait_for(room, self._longest_wait):
                raise InfrastructureError("Kafka acknowledges nothing any more")
            self._waiting_bytes += size
            self.tally.sent += 1
            self.tally.bytes += size

    def _finish(self, outgoing: Outgoing, error: BaseException | None) -> None:
        with self._settled:
            self._waiting_bytes -= outgoing.size
            if error is None:
                self.tally.acknowledged += 1
            else:
                self.tally.failed += 1
                if len(self.tally.failures) < MAX_FAILURES_KEPT:
                    self.tally.failures.append(f"{outgoing.place}: {error}")
                # The delivery deadline passed in spite of retries: so it will for the next.
                self.unreachable |= isinstance(error, KafkaTimeoutError)
            self._settled.notify_all()


def _connect(settings: KafkaSettings, connect_seconds: float, delivery_seconds: float) -> Any:
    options = settings.client_options()
    where = ",".join(options["bootstrap_servers"])
    try:
        producer = connect(
            KafkaProducer,
            **options,
            acks="all",
            enable_idempotence=True,
            allow_auto_create_topics=False,
            linger_ms=5,
            max_request_size=settings.max_message_bytes + FRAMING_BYTES,
            max_block_ms=int(connect_seconds * 1000),
            bootstrap_timeout_ms=int(connect_seconds * 1000),
            request_timeout_ms=int(delivery_seconds * 1000) // 2,
            delivery_timeout_ms=int(delivery_seconds * 1000),
        )
    except InfrastructureError as error:
        raise InfrastructureError(f"no Kafka at {where}: {error}") from None
    try:
        if not producer.partitions_for(settings.topic):
            raise InfrastructureError(f"no topic {settings.topic!r} at {where}")
    except BaseException as error:
        producer.close(timeout=0)
        if isinstance(error, KafkaError):
            raise InfrastructureError(f"no topic {settings.topic!r} at {where}: {error}") from None
        raise
    return producer
