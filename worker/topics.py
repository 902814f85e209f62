"""Which topic a name means just now: one that was deleted and made anew is another.

Owns reaching into kafka-python's metadata for Kafka's topic id (KIP-516). Knows no records.
"""

import logging
from typing import Any
from uuid import UUID

log = logging.getLogger(__name__)


class TopicId:
    """The id of a consumer's topic."""

    def __init__(self, consumer: Any, topic: str) -> None:
        self._consumer = consumer
        self._topic = topic
        self.now = ""
        """As last seen; empty while brokers tell none."""

    def look(self) -> bool:
        """Take what the last metadata say; whether the topic was made anew since the last look."""
        found: UUID | None = self._consumer._cluster.topic_id(self._topic)
        if not found or not found.int or found.hex == self.now:  # none while it is away
            return False
        before, self.now = self.now, found.hex
        if before:
            log.error(
                "the topic was made anew: reading it from its beginning",
                extra={"topic": self._topic, "was": before, "is": self.now},
            )
        return bool(before)

    def ask(self, timeout_ms: int) -> None:
        """Have the brokers say it again, and look. Raises KafkaError."""
        asked = self._consumer._cluster.request_update()
        self._consumer._net.run(self._consumer._manager.wait_for, asked, timeout_ms)
        self.look()
