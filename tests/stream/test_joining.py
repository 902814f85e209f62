"""A member of the group stays one, on real brokers: kafka-python alone would lose its place."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from kafka.errors import KafkaTimeoutError
from kafka.structs import TopicPartition

from deploy.local import LocalKafka
from tests.conftest import Topics
from tests.stream.harness import until
from tests.stream.member import SECONDS, Member


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
