"""What a member claims when it joins, and what the leader makes of it."""

from types import SimpleNamespace
from typing import Any

import pytest
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.protocol.consumer.metadata import ConsumerProtocolAssignment
from kafka.structs import TopicPartition

from worker.membership import Assignor, Membership

TOPIC = "images"
ALL = {TopicPartition(TOPIC, number) for number in range(4)}
CLUSTER = SimpleNamespace(
    topics=lambda: {TOPIC}, partitions_for_topic=lambda _: {p.partition for p in ALL}
)


def given(assignor: CooperativeStickyAssignor, partitions: set[TopicPartition]) -> None:
    """Let an assignor hear of an assignment."""
    numbers = sorted(partition.partition for partition in partitions)
    assignor.on_assignment(ConsumerProtocolAssignment(1, [(TOPIC, numbers)], b""), generation=1)


def assigned(**assignors: CooperativeStickyAssignor) -> set[TopicPartition]:
    """Everything that a leader gives to members who join with these."""
    members = [
        SimpleNamespace(member_id=name, metadata=assignor.metadata({TOPIC}))
        for name, assignor in assignors.items()
    ]
    found = CooperativeStickyAssignor().assign(CLUSTER, members)
    return {partition for each in found.values() for partition in each.partitions()}


def test_what_was_lost_in_an_expulsion_is_not_kept_from_the_others() -> None:
    theirs, ours = CooperativeStickyAssignor(), Assignor()
    for assignor in (theirs, ours):
        given(assignor, ALL)
    assert len(assigned(expelled=theirs, fresh=Assignor())) == 2  # and nobody asks for the others
    assert assigned(expelled=ours, fresh=Assignor()) == ALL


class Consumer:
    """A KafkaConsumer that holds everything, and may have been expelled."""

    def __init__(self, *, expelled: bool) -> None:
        generation = SimpleNamespace(is_lost=lambda: expelled)
        self._coordinator = SimpleNamespace(_generation=generation, _do_join_and_sync_async=None)
        self._subscription = self
        self.held = set(ALL)

    def assignment(self) -> set[TopicPartition]:
        return set(self.held)

    def assign_from_subscribed(self, partitions: list[TopicPartition]) -> None:
        self.held = set(partitions)


@pytest.mark.parametrize("expelled", [False, True])
def test_only_who_is_still_a_member_claims_and_keeps_what_it_holds(expelled: bool) -> None:
    """Also when it is expelled while it joins, of which kafka-python tells nobody."""
    consumer, assignor, lost = Consumer(expelled=expelled), Assignor(), list[Any]()
    Membership(consumer, assignor, lost.append)
    claimed = {
        TopicPartition(each.topic, number)
        for each in assignor.metadata({TOPIC}).owned_partitions
        for number in each.partitions
    }
    assert claimed == consumer.held == (set() if expelled else ALL)
    assert lost == ([ALL] if expelled else [])
