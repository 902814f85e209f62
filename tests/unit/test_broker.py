"""Where a partition begins, and who may commit: the consumer's answers to what Kafka tells it."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest
from kafka.errors import NoOffsetForPartitionError, OffsetOutOfRangeError
from kafka.structs import ConsumerGroupMetadata, MemberState, TopicPartition

from worker import broker
from worker.assignment import Assignment
from worker.config import Settings
from worker.errors import InfrastructureError
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
        self.generation = 3
        self.state = MemberState.STABLE
        self._coordinator = SimpleNamespace(
            _join_task=None, _do_join_and_sync_async=None, _offset_fetch_futures={}
        )
        self._fetcher = SimpleNamespace(
            _next_partition_records=None, send_fetches=list, fetched_records=list
        )

    def subscribe(self, topics: list[str], listener: Any) -> None:
        self.listener = listener

    def assignment(self) -> set[TopicPartition]:
        return {P, Q}

    def poll(self, **_: Any) -> dict[TopicPartition, list[Any]]:
        failure, self.fails = self.fails, None
        if failure is not None:
            raise failure
        return {}

    def committed(self, partition: TopicPartition, timeout_ms: int) -> int | None:
        return self.offsets.get(partition)

    def seek(self, partition: TopicPartition, offset: int) -> None:
        self.seeks[partition] = offset

    def seek_to_beginning(self, *partitions: TopicPartition) -> None:
        self.seeks |= dict.fromkeys(partitions, "beginning")

    def group_metadata(self) -> ConsumerGroupMetadata:
        return ConsumerGroupMetadata("group", self.generation, "member", None, self.state)

    async def commit_async(self, offsets: Any) -> None:
        self.commits.append(offsets)

    def commit(self, offsets: Any, timeout_ms: int) -> None:
        self.commits.append(offsets)


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


@pytest.mark.parametrize("delivery", ["at-least-once", "exactly-once"])
def test_what_redis_lost_is_read_again_from_its_first_event(
    monkeypatch: pytest.MonkeyPatch, delivery: str
) -> None:
    clients: list[Client] = []

    def make(**options: Any) -> Client:
        clients.append(Client(**options))
        return clients[-1]

    monkeypatch.setattr(broker, "KafkaConsumer", make)
    told: list[dict[int, int]] = []
    loop = Loop(
        settings=Settings.model_validate({"delivery": delivery}),
        pipeline=cast("Pipeline", SimpleNamespace(replaying=told.append)),
        metrics=Metrics(),
        version="0",
    )
    loop._assignment.assigned({("images", 0)})
    held = loop._assignment.admit([Record("images", 0, 41, 0, b"k", b"v")])
    loop._replay({0: 40, 7: 3})  # partition 7 is another worker's by now
    assert clients[0].seeks == {P: 40}
    assert [job.lease.lost for job in held] == [True]
    assert told == [{0: 40, 7: 3}]
    committed = [{p: o.offset for p, o in offsets.items()} for offsets in clients[0].commits]
    assert committed == ([{P: 40}] if delivery == "at-least-once" else [])
