"""A member of the group stays one, on real brokers: kafka-python alone would lose its place."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from kafka import KafkaAdminClient
from kafka.errors import KafkaTimeoutError
from kafka.structs import MemberState, TopicPartition

from deploy.apache_kafka import KafkaServer
from deploy.local import LocalKafka
from tests.conftest import PARTITIONS, Topics
from tests.stream.harness import until
from tests.stream.member import SECONDS, SHORT_POLL_SECONDS, Member
from worker.offsets import Partition

LONG_SECONDS = 30.0  # a session that does not end while a test looks


@pytest.fixture
def member(kafka_server: LocalKafka, topics: Topics) -> Iterator[Member]:
    with ExitStack() as stack:
        found = Member(kafka_server, topics)
        stack.callback(found.consumer.close, 2.0)
        found.wait()
        yield found


def test_a_join_is_finished_that_outlasts_the_poll_that_began_it(member: Member) -> None:
    generation = member.consumer.membership().generation_id
    # As after partitions were added, or when it led the group before it knew of any.
    member.coordinator._assignment_snapshot = {}

    def joined_anew() -> bool:
        return member.holds_everything() and member.consumer.membership().generation_id > generation

    until(joined_anew, SECONDS, "joined anew")
    assert member.consumer.joined()


def test_who_is_expelled_while_joining_gives_up_what_it_held(member: Member) -> None:
    """Others may have worked on it in between, so it must begin where they left it."""
    everything = set(member.owner.held)
    member.coordinator.rejoining = True
    member.coordinator.reset_generation()
    member.wait()
    assert member.owner.released_ever == everything


def test_what_is_committed_is_not_answered_from_before(member: Member) -> None:
    partition = min(member.owner.held)
    waiting = member.coordinator._offset_fetch_futures
    for offset in (1, 2):
        member.consumer.commit_now({partition: offset}, SECONDS)
        assert member.consumer.committed({partition}, SECONDS) == {partition: offset}
        with pytest.raises(KafkaTimeoutError):  # asks, and does not wait for the answer
            member.consumer._consumer.committed(TopicPartition(*partition), timeout_ms=0)
        until(lambda: all(each.is_done for each in waiting.values()), SECONDS, "answered")


def test_who_closes_waits_for_no_work(member: Member, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody does it any more; in a rebalance it would be asked for again and again."""
    asked: list[set[Partition]] = []

    def never_finished(partitions: set[Partition]) -> int:
        asked.append(partitions)
        return 1

    monkeypatch.setattr(member.owner, "unfinished", never_finished)
    everything = set(member.owner.held)
    member.consumer.close(2.0)
    assert asked == [everything]
    assert not member.owner.held


def polled(*members: Member) -> bool:
    """Poll each briefly; whether all of them have partitions, and none is about to join."""
    for member in members:
        member.consumer.poll(SHORT_POLL_SECONDS, 1)
    return all(member.owner.held and member.consumer.joined() for member in members)


def test_who_polls_briefly_joins_all_the_same(kafka_server: KafkaServer, topics: Topics) -> None:
    """What a group gives is never lost between two polls, or two would send each other joining."""
    with ExitStack() as stack:
        both = [Member(kafka_server, topics) for _ in range(2)]
        for member in both:
            stack.callback(member.consumer.close, 2.0)
        until(lambda: polled(*both), SECONDS, "both have partitions")
        held = [member.owner.held for member in both]
        assert len(held[0] | held[1]) == PARTITIONS and not held[0] & held[1]


@pytest.mark.parametrize(
    "kafka_server", [pytest.param("apache", marks=pytest.mark.apache_kafka)], indirect=True
)
def test_who_leaves_while_joining_is_not_waited_for(
    kafka_server: KafkaServer, topics: Topics
) -> None:
    """Tansu, which holds every join for half a session, is no place to see that."""
    with ExitStack() as stack:
        stays, leaves = (Member(kafka_server, topics, LONG_SECONDS) for _ in range(2))
        stack.callback(stays.consumer.close, 2.0)
        admin = stack.enter_context(KafkaAdminClient(bootstrap_servers=kafka_server.bootstrap))
        until(lambda: polled(stays, leaves), SECONDS, "both have partitions")
        leaves.coordinator.request_rejoin()
        leaves.consumer.poll(SHORT_POLL_SECONDS, 1)  # the other does not poll, nor join
        until(lambda: leaves.coordinator.state == MemberState.REBALANCING, SECONDS, "joining")
        leaves.consumer.close(2.0)
        left = admin.describe_groups([topics.group])[topics.group]["members"]
        assert len(left) == 1
