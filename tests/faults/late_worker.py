"""A worker that is late: as on a machine whose other processes all come first.

Its one argument names the late step: of a transaction, once its messages have failed already; or of
a question to Kafka, once the consumer has closed.
"""

import logging
import sys
import time
from threading import Event
from typing import Any

from kafka import KafkaConsumer, KafkaProducer

from worker import broker, publishing
from worker.__main__ import main

LATE_SECONDS = 1.0


class LateSends(KafkaProducer):  # type: ignore[misc]
    """Sends a message once all before it are acknowledged or refused."""

    def send(self, *arguments: Any, **options: Any) -> Any:
        """The same, later."""
        self.flush()
        return super().send(*arguments, **options)


class LateOffsets(KafkaProducer):  # type: ignore[misc]
    """Adds the offsets once all messages are acknowledged or refused."""

    def send_offsets_to_transaction(self, *arguments: Any, **options: Any) -> Any:
        """The same, later."""
        time.sleep(LATE_SECONDS)
        return super().send_offsets_to_transaction(*arguments, **options)


class LateQuestion(KafkaConsumer):  # type: ignore[misc]
    """Asks where partitions begin, but for the first time, when it is closed already."""

    asked = False
    closed = Event()

    def beginning_offsets(self, *arguments: Any, **options: Any) -> Any:
        """The same, later."""
        if self.asked:
            logging.getLogger("worker").info("late")
            self.closed.wait()
        self.asked = True
        return super().beginning_offsets(*arguments, **options)

    def close(self, *arguments: Any, **options: Any) -> None:
        """The same; and time for the question."""
        super().close(*arguments, **options)
        self.closed.set()
        time.sleep(LATE_SECONDS)


if __name__ == "__main__":
    late = sys.argv[1]
    if late == "question":
        vars(broker)["KafkaConsumer"] = LateQuestion
    else:
        vars(publishing)["KafkaProducer"] = {"sends": LateSends, "offsets": LateOffsets}[late]
    sys.exit(main([]))
