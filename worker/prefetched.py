"""What kafka-python 3.0 gets wrong about records it holds and has not handed out, put right.

Owns everything that reaches into its fetcher. Knows nothing of what records say.
"""

from typing import Any

from kafka.errors import KafkaError


class Prefetched:
    """The records one KafkaConsumer has fetched ahead."""

    def __init__(self, consumer: Any) -> None:
        """Takes the place of the fetcher's own `send_fetches`."""
        self._fetcher = consumer._fetcher
        self._send = self._fetcher.send_fetches
        self._fetcher.send_fetches = self._send_later
        self._failure: KafkaError | None = None

    def before_poll(self) -> None:
        """To be called before each poll. Raises KafkaError where the last one could not fetch on.

        Records of a paused partition are parked (kafka-python #2981, after KAFKA-7548), and it is
        not fetched meanwhile. They are taken up again only where no other's stand in line, and
        those that were read to their end go on standing there: a partition that is resumed after
        another came, as in a rebalance under load, would be silent for good.
        """
        if not self._fetcher._next_partition_records:
            self._fetcher._next_partition_records = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _send_later(self) -> list[Any]:
        """Fetch on, but let nothing that goes wrong take the records that were read before it.

        A poll reads what is there and then asks for more; if that failed, as it does without
        credentials, what was read would be gone, and passed over by the next commit.
        """
        try:
            return list(self._send())
        except KafkaError as error:
            self._failure = error
            return []
