"""Where a partition begins, and who may commit: the consumer's answers to what Kafka tells it."""

import asyncio
from collections.abc import Awaitable
from queue import Queue
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID

import pytest
from kafka.errors import (
    KafkaTimeoutError,
    NoOffsetForPartitionError,
    OffsetMetadataTooLargeError,
    OffsetOutOfRangeError,
)
from kafka.record import memory_records
from kafka.structs import ConsumerGroupMetadata, MemberState, TopicPartition

from worker import broker
from worker.assignment import Assignment
from worker.config import Settings
from worker.errors import InfrastructureError
from worker.inflating import Bounds
from worker.jobs import Job
from worker.loop import Loop
from worker.messages import Record
from worker.metrics import Metrics
from worker.pipeline import Pipeline

P, Q = TopicPartition("images", 0), TopicPartition("images", 1)


class Client:
    """kafka-python's consumer as far as these tests go; failures are controlled."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.fails: Exception | None = None
        self.seeks: dict[TopicPartition, int | str] = {}
        self.offsets = {P: 7}
        self.commits: list[Any] = []
        self.refuses = False
        self.generation = 3
        self.state = MemberState.STABLE
        self._coordinator = SimpleNamespace(
            _join_task=None, _do_join_and_sync_async=None, _offset_fetch_futures={}
        )
        self._fetcher = SimpleNamespace(
            _next_partition_records=None, send_fetches=list, fetched_records=list
        )
        self.records: list[Any] = []
        self.topic_id: UUID | None = None
        self.told: UUID | None = None  # by the next answer of the brokers
        self._cluster = SimpleNamespace(
            topic_id=lambda topic: self.topic_id, request_update=lambda: "asked"
        )
        self.waited: list[int | None] = []
        self._manager = SimpleNamespace(wait_for=self._wait_for)
        self._net = SimpleNamespace(run=self._run)

    async def _wait_for(self, answer: Awaitable[None], timeout_ms: int | None) -> None:
        self.waited.append(timeout_ms)
        await answer

    def _run(self, wait_for: object, asked: str, timeout_ms: int) -> None:
        assert (wait_for, asked) == (self._wait_for, "asked")
        self.topic_id = self.told

    def subscribe(self, topics: list[str], listener: Any) -> None:
        self.listener = listener

    def assignment(self) -> set[TopicPartition]:
        return {P, Q}

    def poll(self, **_: Any) -> dict[TopicPartition, list[Any]]:
        failure, self.fails = self.fails, None
        if failure is not None:
            raise failure
        return {P: self.records}

    def committed(self, partition: TopicPartition, timeout_ms: int) -> int | None:
        return self.offsets.get(partition)

    def end_offsets(
        self, partitions: list[TopicPartition], timeout_ms: int
    ) -> dict[TopicPartition, int]:
        return {each: {P: 10}[each] for each in partitions}  # as kafka-python, if Q has no leader

    def seek(self, partition: TopicPartition, offset: int) -> None:
        self.seeks[partition] = offset

    def seek_to_beginning(self, *partitions: TopicPartition) -> None:
        self.seeks |= dict.fromkeys(partitions, "beginning")

    def group_metadata(self) -> ConsumerGroupMetadata:
        return ConsumerGroupMetadata("group", self.generation, "member", None, self.state)

    def commit_async(self, offsets: Any, callback: Any = None) -> Any:
        """Both an answer to a callback and something to wait for, as kafka-python's is."""
        self.commits.append(offsets)
        if callback is not None:
            callback(offsets, None)
        return asyncio.sleep(0) if callback is None else None

    def commit(self, offsets: Any, timeout_ms: int) -> None:
        if self.refuses:
            raise KafkaTimeoutError("no answer")
        self.commits.append(offsets)

    def pause(self, *_: TopicPartition) -> None:
        """Nothing is fetched here anyway."""

    def close(self, **_: Any) -> None:
        """Asks its listener first, as kafka-python does, and waits for it."""
        asyncio.run(self.listener.on_partitions_revoked({P, Q}))

    def committed_offsets(self) -> list[dict[TopicPartition, int]]:
        """What was committed, in order."""
        return [{p: o.offset for p, o in offsets.items()} for offsets in self.commits]


def consumer(
    monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> tuple[broker.Consumer, Client, Assignment]:
    made: list[Client] = []

    def make(**options: Any) -> Client:
        made.append(Client(**options))
        return made[-1]

    monkeypatch.setattr(broker, "KafkaConsumer", make)
    assignment = Assignment(Metrics())
    return broker.Consumer(Settings(**settings), assignment), made[0], assignment


def test_a_partition_begins_where_the_group_left_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when kafka-python would have it start over, because it came while others were asked."""
    member, client, _ = consumer(monkeypatch)
    assert client.options["auto_offset_reset"] == "none"
    client.fails = NoOffsetForPartitionError({P, Q})
    assert member.poll(0.1, 10) == []
    assert client.seeks == {P: 7, Q: "beginning"}


def test_a_position_that_is_gone_is_said_and_read_from_what_is_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    member, client, _ = consumer(monkeypatch)
    client.fails = OffsetOutOfRangeError({P: 7})
    assert member.poll(0.1, 10) == []
    assert client.seeks == {P: "beginning"}
    assert [record.levelname for record in caplog.records] == ["ERROR"]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (KafkaTimeoutError(), "poll: no answer in time"),
        (KafkaTimeoutError(None), "poll: no answer in time"),
        (KafkaTimeoutError("6 s"), "poll: KafkaTimeoutError('6 s')"),
        (OffsetMetadataTooLargeError(), "poll: OffsetMetadataTooLargeError()"),
    ],
)
def test_what_kafka_did_not_do_is_said(
    monkeypatch: pytest.MonkeyPatch, error: Exception, told: str
) -> None:
    """Also where kafka-python has no word for it."""
    member, client, _ = consumer(monkeypatch)
    client.fails = error
    with pytest.raises(InfrastructureError) as raised:
        member.poll(0.1, 10)
    assert str(raised.value) == told


def test_a_partition_without_a_leader_is_trouble_with_kafka(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    member, _, _ = consumer(monkeypatch)
    with pytest.raises(InfrastructureError, match="no leader for partition 1 of 'images'"):
        member.lag(0.1)


def message(offset: int) -> SimpleNamespace:
    told = {"topic": "images", "partition": 0, "offset": offset, "timestamp": 0, "key": b"k"}
    return SimpleNamespace(**told, value=b"v", headers=[], leader_epoch=None)


def test_a_topic_made_anew_is_read_from_its_beginning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    member, client, _ = consumer(monkeypatch)
    client.records = [message(5)]
    assert [record.topic_id for record in member.poll(0.1, 10)] == [""], "none is told"
    for client.topic_id in (UUID(int=7), None, UUID(int=0), UUID(int=7)):
        assert [record.topic_id for record in member.poll(0.1, 10)] == [UUID(int=7).hex]
    assert client.seeks == {}
    client.topic_id = UUID(int=8)
    assert member.poll(0.1, 10) == [], "whose they are is not known"
    assert client.seeks == {P: "beginning", Q: "beginning"}
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert [record.topic_id for record in member.poll(0.1, 10)] == [UUID(int=8).hex]


def test_where_a_log_lacks_an_offset_the_brokers_are_asked_whose_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    member, client, _ = consumer(monkeypatch)
    client.topic_id = UUID(int=7)
    assert member.poll(0.1, 10) == []
    client.fails, client.told = OffsetOutOfRangeError({P: 7}), UUID(int=8)
    assert member.poll(0.1, 10) == []
    assert client.seeks == {P: "beginning"}
    client.records = [message(0)]
    assert [record.topic_id for record in member.poll(0.1, 10)] == [UUID(int=8).hex]


def test_what_is_read_is_bounded_as_the_settings_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_records, "DefaultRecordBatch", None)
    consumer(monkeypatch, max_message_bytes=2_000, in_flight_bytes=3 << 20, max_headers=7)
    assert cast(Any, memory_records.DefaultRecordBatch).bounds == Bounds(2_000, 3 << 20, 7)


def test_no_membership_is_no_fence(monkeypatch: pytest.MonkeyPatch) -> None:
    member, client, _ = consumer(monkeypatch)
    assert member.membership().generation_id == 3
    client.state = MemberState.REBALANCING
    with pytest.raises(InfrastructureError, match="not a member"):
        member.membership()
    client.state, client.generation = MemberState.STABLE, -1
    with pytest.raises(InfrastructureError, match="not a member"):
        member.membership()


@pytest.mark.parametrize(("delivery", "commits"), [("at-least-once", 1), ("exactly-once", 0)])
def test_a_rebalance_commits_beside_no_transaction(
    monkeypatch: pytest.MonkeyPatch, delivery: str, commits: int
) -> None:
    _, client, assignment = consumer(monkeypatch, delivery=delivery)
    assignment.assigned({tuple(P)})
    assignment.finish(assignment.admit([Record("images", 0, 1, 0, b"k", b"v")]))
    asyncio.run(client.listener.on_partitions_revoked({P}))
    assert len(client.commits) == commits
    assert assignment.committable() == {}


def test_who_closes_waits_for_no_work_and_commits_what_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A rebalance would wait for five minutes, and for a commit as long as that takes."""
    member, client, assignment = consumer(monkeypatch, revoke_timeout_seconds=300)
    assignment.assigned({tuple(P)})
    done, _ = assignment.admit([Record("images", 0, n, 0, b"k", b"v") for n in (1, 2)])
    assignment.finish([done])
    member.close(2.0)
    assert client.committed_offsets() == [{P: 2}]
    assert client.waited == [2_000]


def test_who_dies_while_joining_holds_the_group_up_for_no_five_minutes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, client, _ = consumer(monkeypatch, session_timeout_seconds=6, revoke_timeout_seconds=2)
    assert client.options["session_timeout_ms"] == 6_000
    assert client.options["max_poll_interval_ms"] == 6_000 + 2_000 + broker.BEGIN_MS


def test_where_a_new_partition_begins_is_asked_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was asked when it was ours before, and never read, would be answered from then."""
    _, client, assignment = consumer(monkeypatch)
    client._coordinator._offset_fetch_futures[frozenset({P})] = "an old answer"
    asyncio.run(client.listener.on_partitions_assigned({P}))
    assert client._coordinator._offset_fetch_futures == {}
    assert assignment.admit([Record("images", 0, 1, 0, b"k", b"v")])


class Losing:
    """A pipeline as far as these tests go, whose index has lost what `losing` says."""

    def __init__(self) -> None:
        self.losing: dict[int, int] = {}
        self.told: list[dict[int, int]] = []
        self.outcomes: Queue[list[Job]] = Queue()
        self.failure = None

    def lost(self) -> dict[int, int]:
        return self.losing

    def replaying(self, first: dict[int, int]) -> None:
        self.told.append(first)
        self.losing = {}

    def start(self) -> None:
        """Nothing runs."""

    def alive(self) -> bool:
        return True

    def close(self, timeout: float) -> None:
        """Nothing runs."""


class Losses:
    """A loop that holds partition 0, whose pipeline may lose and whose client may refuse."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, delivery: str, **settings: Any) -> None:
        made: list[Client] = []

        def make(**options: Any) -> Client:
            made.append(Client(**options))
            return made[-1]

        monkeypatch.setattr(broker, "KafkaConsumer", make)
        self.pipeline = Losing()
        self.loop = Loop(
            settings=Settings.model_validate({"delivery": delivery, **settings}),
            pipeline=cast("Pipeline", self.pipeline),
            metrics=Metrics(),
            version="0",
        )
        (self.client,) = made
        self.assignment = self.loop._assignment
        self.assignment.assigned({tuple(P)})

    def admit(self, offset: int) -> list[Job]:
        return self.assignment.admit([Record("images", 0, offset, 0, b"k", b"v")])

    def stop(self) -> int:
        """Its exit status."""
        self.loop.stop()
        return self.loop.run()


DELIVERIES = pytest.mark.parametrize("delivery", ["at-least-once", "exactly-once"])
BY_HAND = "replay these by hand"


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch, delivery: str) -> Losses:
    return Losses(monkeypatch, delivery)


@DELIVERIES
def test_what_redis_lost_is_read_again_from_its_first_event(losses: Losses, delivery: str) -> None:
    held = losses.admit(41)
    losses.loop._replay({0: 40, 7: 3})  # partition 7 is another worker's by now
    assert losses.client.seeks == {P: 40}
    assert [job.lease.lost for job in held] == [True]
    assert losses.pipeline.told == [{0: 40, 7: 3}]
    assert losses.client.committed_offsets() == ([{P: 40}] if delivery == "at-least-once" else [])


@DELIVERIES
def test_what_is_noticed_while_stopping_is_left_to_the_next_one(
    losses: Losses, caplog: pytest.LogCaptureFixture
) -> None:
    losses.pipeline.losing = {0: 40}
    assert losses.stop() == 0
    assert losses.client.committed_offsets() == [{P: 40}]
    assert BY_HAND not in caplog.text


@DELIVERIES
def test_what_cannot_be_left_to_the_next_one_is_said(
    losses: Losses, caplog: pytest.LogCaptureFixture
) -> None:
    losses.pipeline.losing = {0: 40}
    losses.client.refuses = True
    assert losses.stop() == 1
    (said,) = [record for record in caplog.records if BY_HAND in record.message]
    assert (said.levelname, vars(said)["offsets"]) == ("ERROR", {0: 40})


@DELIVERIES
def test_a_replay_that_has_not_begun_is_left_to_the_next_one(losses: Losses, delivery: str) -> None:
    losses.loop._replay({0: 40})
    assert losses.stop() == 0
    assert losses.client.committed_offsets() == [{P: 40}]


@pytest.mark.parametrize("delivery", ["exactly-once"])
def test_a_replay_that_has_begun_has_taken_the_group_with_it(losses: Losses) -> None:
    losses.loop._replay({0: 40})
    losses.assignment.finish(losses.admit(40), committed=True)
    assert losses.stop() == 0
    assert losses.client.commits == []


@DELIVERIES
def test_a_replay_whose_partition_moves_before_it_begins_is_said(
    losses: Losses, caplog: pytest.LogCaptureFixture
) -> None:
    losses.client.refuses = True
    losses.loop._replay({0: 40})
    losses.assignment.released({tuple(P)})
    (said,) = [record for record in caplog.records if BY_HAND in record.message]
    assert (said.levelname, vars(said)["offsets"]) == ("ERROR", {0: 40})


@pytest.mark.parametrize("delivery", ["at-least-once"])
def test_the_group_goes_back_with_the_next_commit_where_it_did_not_at_once(
    losses: Losses, caplog: pytest.LogCaptureFixture
) -> None:
    losses.client.refuses = True
    losses.loop._replay({0: 40})
    assert losses.client.commits == []
    losses.loop._commit_due = 0.0
    losses.loop._commit_if_due()
    assert losses.client.committed_offsets() == [{P: 40}]
    losses.assignment.released({tuple(P)})
    assert BY_HAND not in caplog.text


@pytest.mark.parametrize("delivery", ["at-least-once"])
def test_a_rebalance_takes_the_group_back(losses: Losses, caplog: pytest.LogCaptureFixture) -> None:
    losses.client.refuses = True
    losses.loop._replay({0: 40})
    asyncio.run(losses.client.listener.on_partitions_revoked({P}))
    assert losses.client.committed_offsets() == [{P: 40}]
    assert BY_HAND not in caplog.text


@pytest.mark.parametrize("delivery", ["at-least-once"])
def test_an_answer_to_an_older_commit_takes_nobody_back(losses: Losses) -> None:
    losses.client.refuses = True
    losses.loop._replay({0: 40})
    losses.loop._committed({tuple(P): 50}, None)
    assert losses.assignment.beyond() == {tuple(P): 40}
    losses.assignment.finish(losses.admit(40))
    losses.loop._committed({tuple(P): 41}, None)
    assert losses.assignment.beyond() == {}


@pytest.mark.parametrize(("seconds", "live"), [(350, True), (370, False)])
def test_a_loop_that_waits_for_a_rebalance_is_live(
    monkeypatch: pytest.MonkeyPatch, seconds: float, live: bool
) -> None:
    """For as long as the setting lets it wait, inside one poll, and a minute more."""
    loop = Losses(monkeypatch, "at-least-once", revoke_timeout_seconds=300).loop
    loop._outbox.start()
    loop._turned -= seconds
    assert loop.live() == live
    loop._outbox.close()
