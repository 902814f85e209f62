"""Records that were fetched are handed out, on real brokers: kafka-python alone would keep some."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, NoReturn

import pytest
from kafka.errors import SaslAuthenticationFailedError
from kafka.structs import TopicPartition

from deploy.apache_kafka import KafkaServer
from tests.conftest import Topics
from tests.stream.harness import inline, publish, until
from tests.stream.member import SECONDS, Member
from worker.errors import InfrastructureError
from worker.messages import Record

POLL_SECONDS = 0.1
EACH = 3  # events of a partition


@pytest.fixture
def member(kafka_server: KafkaServer, topics: Topics) -> Iterator[Member]:
    """Two partitions have events; it has all of them, and read none."""
    events = [
        inline(f"image-{partition}-{number}", b"x", partition=partition)
        for partition in (0, 1)
        for number in range(EACH)
    ]
    publish(kafka_server.bootstrap, topics.images, events)
    with ExitStack() as stack:
        found = Member(kafka_server, topics)
        stack.callback(found.consumer.close, 2.0)
        yield found


def read(member: Member, most: int, count: int) -> list[Record]:
    """So many records, `most` at each poll."""
    found: list[Record] = []

    def enough() -> bool:
        found.extend(member.consumer.poll(POLL_SECONDS, most))
        return len(found) >= count

    until(enough, SECONDS, f"{count} records")
    return found


def test_a_partition_that_is_resumed_goes_on(member: Member) -> None:
    """Though another, which was not paused, was read in between."""
    client: Any = member.consumer._consumer
    (first,) = read(member, 1, 1)
    paused = TopicPartition(first.topic, first.partition)
    client.pause(paused)
    others = read(member, 1, EACH)
    assert {each.partition for each in others} == {1 - first.partition}
    assert paused in client._fetcher._paused_partition_records, "nothing was parked"
    client.resume(paused)
    rest = read(member, 1, EACH - 1)
    assert [(each.partition, each.offset) for each in rest] == [
        (first.partition, first.offset + number) for number in range(1, EACH)
    ]


def test_what_was_read_is_not_lost_where_no_more_can_be_asked_for(
    member: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetcher = member.consumer._consumer._fetcher
    first = read(member, 1, 1)

    async def refuse() -> NoReturn:
        raise SaslAuthenticationFailedError("expired")

    monkeypatch.setattr(fetcher, "_send_fetches_async", refuse)
    found: list[Record] = []
    with pytest.raises(InfrastructureError, match="expired"):
        while True:
            found += member.consumer.poll(POLL_SECONDS, 2 * EACH)
    assert found, "nothing had been fetched ahead"
    monkeypatch.undo()
    found += read(member, 2 * EACH, 2 * EACH - len(first) - len(found))
    everything = sorted((each.partition, each.offset) for each in first + found)
    begin = {each.partition: each.offset for each in reversed(first + found)}
    assert everything == [(p, begin[p] + number) for p in (0, 1) for number in range(EACH)]
