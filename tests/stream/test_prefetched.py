"""Records that were fetched are handed out, on real brokers: kafka-python alone would keep some."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, NoReturn

import pytest
from confluent_kafka import Producer
from kafka import codec
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
MOST = 1_000_000_000  # that librdkafka takes


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


def send(kafka: KafkaServer, topic: str, values: list[bytes], compression: str) -> None:
    """To partition 0, in one batch."""
    options: dict[str, str | int] = {"linger.ms": 1_000}
    options |= {"message.max.bytes": MOST, "batch.size": MOST}
    options |= {"bootstrap.servers": kafka.bootstrap, "compression.type": compression}
    producer = Producer(options)
    for value in values:
        producer.produce(topic, value, b"k", partition=0)
    assert producer.flush(SECONDS) == 0


def test_a_poll_takes_few_where_they_are_large(kafka_server: KafkaServer, topics: Topics) -> None:
    """However small they were when they were fetched."""
    size, count = 1_000_000, 12
    member = Member(kafka_server, topics, poll_bytes=3 * size, max_message_bytes=2 * size)
    with ExitStack() as stack:
        stack.callback(member.consumer.close, 2.0)
        sent = [bytes([n]) * size for n in range(count)]
        send(kafka_server, topics.images, [*sent, bytes(5 * size)], "gzip")
        polls = []

        def all_came() -> bool:
            polls.append(member.consumer.poll(POLL_SECONDS, 1_000))
            return sum(map(len, polls)) > count

        until(all_came, SECONDS, "every record")
    found = [record for poll in polls for record in poll]
    assert [record.value for record in found] == [*sent, b""]
    assert max(map(len, polls)) == 3
    assert found[-1].omitted is not None


def test_a_codec_that_is_not_there_holds_up_its_own_partition_alone(
    kafka_server: KafkaServer, topics: Topics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its poll ends: kafka-python alone would ask for the rest for ever, in one call."""
    for package in ("lz4", "lz4f", "lz4framed"):
        monkeypatch.setattr(codec, package, None)
    with ExitStack() as stack:
        member = Member(kafka_server, topics)
        stack.callback(member.consumer.close, 2.0)
        send(kafka_server, topics.images, [b"x" * 1_000], "lz4")
        with pytest.raises(InfrastructureError, match="lz4"):
            read(member, 1, 1)
        publish(kafka_server.bootstrap, topics.images, [inline("good", b"x", partition=1)])
        found: list[Record] = []
        failures = 0
        while not found or failures < 3:
            try:
                found += member.consumer.poll(POLL_SECONDS, 10)
            except InfrastructureError:
                failures += 1
        assert [(record.partition, record.value) for record in found] == [(1, b"x")]
