"""A worker that comes to the next step of a transaction once its messages have failed already.

As on a machine whose other processes all come first. Its one argument names the late step.
"""

import sys
import time
from typing import Any

from kafka import KafkaProducer

from worker import publishing
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


if __name__ == "__main__":
    late = {"sends": LateSends, "offsets": LateOffsets}
    vars(publishing)["KafkaProducer"] = late[sys.argv[1]]
    sys.exit(main([]))
