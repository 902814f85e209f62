"""kafka-python's consumer behind a small interface: join, poll, commit, rebalance.

Owns the consumer's settings and the surprises it holds (each is commented where it is met).
Knows records and offsets; not images, not Redis.
"""

import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from time import monotonic
from typing import Any, Protocol

from kafka import KafkaConsumer
from kafka.consumer.subscription_state import AsyncConsumerRebalanceListener
from kafka.errors import (
    KafkaError,
    KafkaTimeoutError,
    LogTruncationError,
    NoOffsetForPartitionError,
    OffsetOutOfRangeError,
)
from kafka.structs import ConsumerGroupMetadata, MemberState, OffsetAndMetadata, TopicPartition

from worker.config import Settings
from worker.connecting import BOOTSTRAP_MS, connect
from worker.errors import InfrastructureError
from worker.inflating import Bounds, bound
from worker.membership import Assignor, Membership
from worker.messages import Omitted, Record
from worker.offsets import Partition
from worker.prefetched import Prefetched
from worker.topics import TopicId

log = logging.getLogger(__name__)

Offsets = dict[Partition, int]
BEGIN_MS = 5_000  # for the group's offset of a partition; the next poll asks again
FRAME_BYTES = 2**31 - 1  # of an answer; Kafka's protocol has no longer ones
IDLE_FETCH_MS = 100  # for an answer that there is nothing; Tansu's others, too, wait for part of it
METADATA_MS = 30_000  # until partitions that were added are found; by itself five minutes
IDLE_MS = 20  # kafka-python sleeps this long where nothing is fetchable: the latency of a resume


class Owner(Protocol):
    """Who works on the partitions; called on kafka-python's IO thread, so nothing may block."""

    def assigned(self, partitions: set[Partition]) -> None: ...
    def revoking(self, partitions: set[Partition]) -> None: ...
    def unfinished(self, partitions: set[Partition]) -> int: ...
    def committable(self) -> Offsets: ...
    def committed(self, offsets: Offsets) -> None: ...
    def released(self, partitions: set[Partition]) -> None: ...


class Consumer:
    """A member of the consumer group; `poll` and `commit` from one thread."""

    def __init__(self, settings: Settings, owner: Owner) -> None:
        """Connect and subscribe. Raises as `connect` does."""
        self._topic = settings.topic
        assignor = Assignor()
        session_ms = int(settings.session_timeout_seconds * 1000)
        revoke_ms = int(settings.revoke_timeout_seconds * 1000)
        bound(Bounds(settings.max_message_bytes, settings.batch_bytes, settings.max_headers))
        self._consumer = connect(
            KafkaConsumer,
            **consumer_options(settings),
            group_id=settings.group_id,
            auto_offset_reset="none",  # see `_begin`
            partition_assignment_strategy=[assignor],
            session_timeout_ms=session_ms,
            heartbeat_interval_ms=max(100, session_ms // 10),
            # How long the group waits for a member that died while joining. Ours poll many
            # times a second, but for the longest of what `poll` itself does.
            max_poll_interval_ms=session_ms + revoke_ms + BEGIN_MS,
            fetch_max_wait_ms=IDLE_FETCH_MS,
            metadata_max_age_ms=METADATA_MS,
            retry_backoff_ms=IDLE_MS,
            reconnect_backoff_max_ms=2_000,
            metrics_enabled=False,
        )
        self._membership = Membership(
            self._consumer, assignor, lambda lost: owner.released(_partitions(lost))
        )
        self._prefetched = Prefetched(self._consumer, settings.poll_bytes)
        self._topic_id = TopicId(self._consumer, settings.topic)
        self._listener = _Listener(
            self._consumer,
            self._membership,
            owner,
            settings.revoke_timeout_seconds,
            commits=settings.delivery == "at-least-once",
        )
        self._consumer.subscribe([self._topic], listener=self._listener)

    def poll(self, timeout_seconds: float, most: int) -> list[Record]:
        """Up to `most` records; also drives joining, rebalances and heartbeats.

        Raises InfrastructureError.
        """
        with _translated("poll"):
            self._membership.go_on_joining()
            self._prefetched.before_poll()
            try:
                found = self._consumer.poll(
                    timeout_ms=int(timeout_seconds * 1000), max_records=most
                )
            except NoOffsetForPartitionError as error:
                self._begin(error.args[0])
                return []
            except OffsetOutOfRangeError as error:
                self._begin_again(error.args[0])
                return []
            except LogTruncationError as error:
                self._begin_again(error.divergent_offsets)
                return []
            if self._topic_id.look() and (assigned := self._consumer.assignment()):
                self._consumer.seek_to_beginning(*assigned)
                return []
        return [
            record_of(message, self._topic_id.now)
            for messages in found.values()
            for message in messages
        ]

    def _begin(self, partitions: set[TopicPartition]) -> None:
        """Give partitions without a position the group's, or where it has none, the beginning.

        kafka-python's own reset cannot be had: it also takes a partition that was assigned while
        the offsets of others were asked for, and reads it from the beginning once more.
        """
        for partition in partitions & self._consumer.assignment():
            committed = self._consumer.committed(partition, timeout_ms=BEGIN_MS)
            log.info("partition begins", extra={"partition": partition, "committed": committed})
            if committed is None:
                self._consumer.seek_to_beginning(partition)
            else:
                self._consumer.seek(partition, committed)

    def _begin_again(self, partitions: Iterable[TopicPartition]) -> None:
        """Read what there still is of partitions whose log no longer has our position."""
        self._topic_id.ask(BEGIN_MS)  # before anything is read that another topic may hold
        for partition in set(partitions) & self._consumer.assignment():
            log.error(
                "messages are gone unread, or were read and are gone: reading what there is",
                extra={"partition": partition},
            )
            self._consumer.seek_to_beginning(partition)

    def go_back(self, offsets: Offsets) -> Offsets:
        """Read partitions once more from there; those that are another's are left out."""
        assigned = _partitions(self._consumer.assignment())
        back = {partition: offset for partition, offset in offsets.items() if partition in assigned}
        for (topic, number), offset in back.items():
            self._consumer.seek(TopicPartition(topic, number), offset)
        return back

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

        self._consumer.commit_async(structs(offsets), callback=callback)

    def commit_now(self, offsets: Offsets, timeout_seconds: float) -> None:
        """Commit and wait. Raises InfrastructureError."""
        with _translated("commit"):
            self._consumer.commit(structs(offsets), timeout_ms=int(timeout_seconds * 1000))

    def committed(self, partitions: set[Partition], timeout_seconds: float) -> Offsets:
        """What the group has committed. Raises InfrastructureError."""
        found: Offsets = {}
        with _translated("committed"):
            self._membership.forget_answers_soon()
            for topic, number in partitions:
                offset = self._consumer.committed(
                    TopicPartition(topic, number), timeout_ms=int(timeout_seconds * 1000)
                )
                if offset is not None:
                    found[topic, number] = offset
        return found

    def membership(self) -> ConsumerGroupMetadata:
        """What a transaction is fenced by (KIP-447).

        Ask before looking at the leases: whoever lost one after that is fenced, because its
        partition can only be another's in a later generation. Raises InfrastructureError while
        we are no member: the brokers would take that as a commit that wants no fence.
        """
        found = self._consumer.group_metadata()
        # In a rebalance the generation is new already, and the leases are still the old ones.
        if found.generation_id < 0 or found.state != MemberState.STABLE:
            raise InfrastructureError("not a member of the group just now")
        return found

    def joined(self) -> bool:
        """Whether the group is stable with us in it."""
        return bool(self._consumer.group_metadata().state == MemberState.STABLE)

    def topic_exists(self) -> bool:
        """Whether the brokers know the topic. Raises InfrastructureError."""
        with _translated("metadata"):
            return bool(self._consumer.partitions_for_topic(self._topic))

    def lag(self, timeout_seconds: float) -> dict[Partition, int]:
        """Messages between the committed offset and the newest, by partition; asks the brokers.

        Raises InfrastructureError.
        """
        assigned = list(self._consumer.assignment())
        if not assigned:
            return {}
        timeout_ms = int(timeout_seconds * 1000)
        with _translated("end_offsets"):
            ends = of_all(self._consumer.end_offsets, assigned, timeout_ms)
            starts = of_all(self._consumer.beginning_offsets, assigned, timeout_ms)
        committed = self.committed(_partitions(assigned), timeout_seconds)
        return {
            (p.topic, p.partition): max(
                0, end - max(starts[p], committed.get((p.topic, p.partition), 0))
            )
            for p, end in ends.items()
        }

    def close(self, timeout_seconds: float) -> None:
        """Leave the group, and commit what is finished; work that is not is left to others."""
        self._membership.be_heard_leaving()
        self._listener.hurry(timeout_seconds)
        with suppress(KafkaError):
            self._consumer.close(autocommit=False, timeout_ms=int(timeout_seconds * 1000))


class _Listener(AsyncConsumerRebalanceListener):  # type: ignore[misc]
    """Lets work in flight finish and commits it before partitions go to another worker.

    Asynchronous because a synchronous one would stop heartbeats while it waits, and because a
    blocking commit is refused on the IO thread.
    """

    def __init__(
        self,
        consumer: Any,
        membership: Membership,
        owner: Owner,
        timeout_seconds: float,
        *,
        commits: bool,
    ) -> None:
        """`commits` is for at-least-once only: a commit beside a transaction that is not over yet
        would be the later one of the two, and undo it.
        """
        self._consumer = consumer
        self._membership = membership
        self._owner = owner
        self._timeout = timeout_seconds
        self._commits = commits
        self._commit_ms: int | None = None

    def hurry(self, commit_seconds: float) -> None:
        """Wait for no work any more, for nobody does it, and for a commit only so long.

        kafka-python waits for us before it leaves the group, whatever time it has.
        """
        self._timeout = 0.0
        self._commit_ms = int(commit_seconds * 1000)

    async def on_partitions_assigned(self, assigned: set[TopicPartition]) -> None:
        self._membership.forget_answers()
        self._owner.assigned(_partitions(assigned))

    async def on_partitions_revoked(self, revoked: set[TopicPartition]) -> None:
        partitions = _partitions(revoked)
        # With exactly-once nothing is waited for: kafka-python's own assignor, which older workers
        # of the group may use, can give a partition of ours to another in the very generation
        # that takes it from us (see `Assignor`), and then both of us could commit. What is in work
        # is dropped, and done again by its new owner.
        if self._commits:
            self._owner.revoking(partitions)
            deadline = monotonic() + self._timeout
            while self._owner.unfinished(partitions) and monotonic() < deadline:
                await self._consumer._net.sleep(0.01)
            await self._commit(partitions)
        self._owner.released(partitions)

    async def _commit(self, partitions: set[Partition]) -> None:
        mine = {p: o for p, o in self._owner.committable().items() if p in partitions}
        if not mine:
            return
        try:
            answer = self._consumer.commit_async(structs(mine))
            await self._consumer._manager.wait_for(answer, self._commit_ms)
            self._owner.committed(mine)
        except KafkaError as error:
            # The next owner does the work again and, the index being idempotent,
            # comes to the same verdicts.
            log.warning("commit before a rebalance failed", extra={"error": repr(error)})

    async def on_partitions_lost(self, lost: set[TopicPartition]) -> None:
        self._owner.released(_partitions(lost))


def consumer_options(settings: Settings) -> dict[str, Any]:
    """What every consumer of the project sets: by hand, what was committed, in small answers."""
    return {
        **settings.client_options(),
        "enable_auto_commit": False,
        "allow_auto_create_topics": False,
        "isolation_level": "read_committed",
        # 50 MB at once would be mapped, faulted in and unmapped for each copy made, which doubles
        # the cost; small answers cost a trip through four threads each.
        "max_partition_fetch_bytes": settings.poll_bytes,
        "fetch_max_bytes": settings.poll_bytes,
        # But a batch comes whole, and how large it may be only its topic knows. By itself
        # kafka-python drops the connection at more than 100 MB, and then asks for the same again.
        "receive_message_max_bytes": FRAME_BYTES,
        "bootstrap_timeout_ms": BOOTSTRAP_MS,
    }


def of_all(
    ask: Callable[..., dict[TopicPartition, int]],
    partitions: list[TopicPartition],
    timeout_ms: int | None = None,
) -> dict[TopicPartition, int]:
    """What a consumer's `end_offsets` or `beginning_offsets` answers for the partitions.

    Raises KafkaError, and InfrastructureError where one has no leader.
    """
    try:
        return ask(partitions, timeout_ms=timeout_ms)
    except KeyError as error:
        # kafka-python asks only the leaders it knows, and looks for all partitions in the answer.
        topic, number = error.args[0]
        raise InfrastructureError(f"no leader for partition {number} of {topic!r}") from error


class _translated:  # noqa: N801 - reads as a word in a `with` statement
    """Turns KafkaError into InfrastructureError."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, KafkaError):
            # kafka-python's own timeouts say nothing, or None.
            silent = isinstance(error, KafkaTimeoutError) and not any(error.args)
            told = "no answer in time" if silent else repr(error)
            raise InfrastructureError(f"{self._what}: {told}") from error


def record_of(message: Any, topic_id: str) -> Record:
    """A record of a topic as kafka-python consumed it, as the project carries it."""
    omitted = message.value if isinstance(message.value, Omitted) else None
    return Record(
        topic=message.topic,
        partition=message.partition,
        offset=message.offset,
        timestamp_ms=message.timestamp,
        key=message.key,
        value=message.value if omitted is None else b"",
        # A header may be null on the wire, but kafka-python cannot send one back.
        headers=tuple((name, value or b"") for name, value in message.headers),
        leader_epoch=message.leader_epoch if message.leader_epoch is not None else -1,
        omitted=omitted,
        topic_id=topic_id,
    )


def structs(offsets: Offsets) -> dict[TopicPartition, OffsetAndMetadata]:
    return {TopicPartition(*p): OffsetAndMetadata(o, "", -1) for p, o in offsets.items()}


def _partitions(partitions: Iterable[TopicPartition]) -> set[Partition]:
    return {(p.topic, p.partition) for p in partitions}
