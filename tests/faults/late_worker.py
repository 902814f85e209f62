"""A worker that comes to the offsets of a transaction once its messages have failed already."""

import sys
import time
from typing import Any

from kafka import KafkaProducer

from worker import publishing
from worker.__main__ import main

LATE_SECONDS = 1.0


class LateProducer(KafkaProducer):  # type: ignore[misc]
    """As on a machine whose other processes all come first."""

    def send_offsets_to_transaction(self, *arguments: Any, **options: Any) -> Any:
        """The same, later."""
        time.sleep(LATE_SECONDS)
        return super().send_offsets_to_transaction(*arguments, **options)


if __name__ == "__main__":
    vars(publishing)["KafkaProducer"] = LateProducer
    sys.exit(main([]))
