"""What kafka-python 3.0 gets wrong about records it holds and has not handed out, put right.

Owns everything that reaches into its fetcher. Knows nothing of what records say.
"""

from typing import Any

from kafka.consumer.fetcher import Fetcher
from kafka.errors import KafkaError

from worker.messages import HEADER_BYTES, Omitted


class _Enough(Exception):
    """A poll has taken as many bytes as it may."""


class Prefetched:
    """The records one KafkaConsumer has fetched ahead."""

    def __init__(self, consumer: Any, poll_bytes: int) -> None:
        """Takes the place of some of the fetcher's own methods.

        A poll takes no further record once it has `poll_bytes`.
        """
        self._fetcher = consumer._fetcher
        self._poll_bytes = poll_bytes
        self._taken = 0
        self._send = self._fetcher.send_fetches
        self._fetcher.send_fetches = self._send_later
        self._hand_out = self._fetcher.fetched_records
        self._fetcher.fetched_records = self._hand_out_some
        self._fetcher.PartitionRecords = self._records_of_partition
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

    def _hand_out_some(self, *arguments: Any, **options: Any) -> Any:
        """Count by bytes, too: compressed records may be a thousand times what was fetched."""
        self._taken = 0
        try:
            return self._hand_out(*arguments, **options)
        except _Enough:  # the last call's, kept for this one as an error would be
            return self._hand_out(*arguments, **options)

    def _records_of_partition(self, *arguments: Any, **options: Any) -> "_Records":
        return _Records(self, *arguments, **options)

    def took(self, record: Any) -> None:
        """A record is handed out."""
        value = record.value
        self._taken += value.size if isinstance(value, Omitted) else record.serialized_value_size
        self._taken += record.serialized_key_size + record.serialized_header_size
        self._taken += HEADER_BYTES * len(record.headers)

    def full(self) -> bool:
        """Whether a poll has taken as many bytes as it may."""
        return self._taken >= self._poll_bytes

    def _send_later(self) -> list[Any]:
        """Fetch on, but let nothing that goes wrong take the records that were read before it.

        A poll reads what is there and then asks for more; if that failed, as it does without
        credentials, what was read would be gone, and passed over by the next commit.

        And where that was all there is, ask when it is wanted: what comes until then is in the
        answer, too, and need not wait for the poll after next.
        """
        if self._taken and self._read_to_the_end():
            return []
        try:
            return list(self._send())
        except KafkaError as error:
            self._failure = error
            return []

    def _read_to_the_end(self) -> bool:
        """Whether no partition had more when it was last asked."""
        states = tuple(self._fetcher._subscriptions.assignment.values())
        known = all(state.position and state.highwater is not None for state in states)
        return known and all(state.position.offset >= state.highwater for state in states)


class _Records(Fetcher.PartitionRecords):  # type: ignore[misc]
    """The records of one partition in one answer, taken one by one."""

    _next_inline_exception: Exception | None

    def __init__(self, owner: Prefetched, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._owner = owner

    def take(self, n: int | None = None) -> list[Any]:
        """Up to `n` records; raises _Enough instead of the first one that would be too much.

        And where one cannot be read, as without its codec: gives up all that come after it, to be
        fetched again. kafka-python would ask the generator that has failed for more, for ever.
        """
        found: list[Any] = []
        while n is None or len(found) < n:
            if self._owner.full():
                if not found:
                    raise _Enough
                break
            try:
                taken = super().take(1)
            except Exception as error:
                if found:
                    self._next_inline_exception = error
                    break
                self.drain()
                raise
            if not taken:
                break
            self._owner.took(taken[0])
            found += taken
        return found
