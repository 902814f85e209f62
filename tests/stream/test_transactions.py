"""A publisher finds out whether a transaction committed that nobody answered; of no other."""

from collections.abc import Iterator
from contextlib import ExitStack
from threading import Event
from typing import Any

import pytest
from kafka import KafkaProducer
from kafka.errors import KafkaTimeoutError

from deploy.apache_kafka import KafkaServer
from tests.conftest import Topics
from tests.stream.harness import Reader
from tests.stream.member import SECONDS, Member
from worker import publishing
from worker.broker import Offsets
from worker.errors import InfrastructureError
from worker.publishing import Outgoing, TransactionalPublisher


class Unanswered(KafkaProducer):  # type: ignore[misc]
    """Commits, and does not hear of it."""

    def commit_transaction(self) -> Any:
        """Raises KafkaTimeoutError."""
        super().commit_transaction()
        raise KafkaTimeoutError("no answer")


class Hanging(KafkaProducer):  # type: ignore[misc]
    """Never comes back from a commit, nor begins one."""

    def commit_transaction(self) -> Any:
        """Wait."""
        Event().wait()


class Joining(KafkaProducer):  # type: ignore[misc]
    """Never comes back from being told who it is."""

    def init_transactions(self) -> Any:
        """Wait."""
        Event().wait()


class Adding(KafkaProducer):  # type: ignore[misc]
    """Never comes back from adding offsets to a transaction."""

    def send_offsets_to_transaction(self, *_: object) -> Any:
        """Wait."""
        Event().wait()


class Stream:
    """One partition, its group's only member and what that publishes."""

    def __init__(self, kafka: KafkaServer, topics: Topics, stack: ExitStack) -> None:
        self.topics = topics
        self.member = Member(kafka, topics)
        stack.callback(self.member.consumer.close, 2.0)
        self.member.wait()
        self.publisher = TransactionalPublisher(
            self.member.settings, self.member.consumer, f"{topics.group}-0"
        )
        stack.callback(self.publisher.close, 2.0)
        self.reader = stack.enter_context(
            Reader(kafka.bootstrap, topics.verdicts, isolation="read_committed")
        )

    def publish(self, text: str, end: int) -> None:
        """Publish one message and commit that partition 0 is done up to `end`."""
        offsets: Offsets = {(self.topics.images, 0): end}
        message = Outgoing(self.topics.verdicts, b"same", text.encode())
        self.publisher.publish([message], offsets, self.member.consumer.membership())

    def committed_texts(self, count: int) -> list[str]:
        """All that can be read, once there are so many."""
        messages = self.reader.messages[self.topics.verdicts]
        self.reader.wait(lambda: len(messages) >= count, SECONDS, "committed messages")
        return [message.value.decode() for message in messages]


@pytest.fixture
def stream(kafka_server: KafkaServer, topics: Topics) -> Iterator[Stream]:
    with ExitStack() as stack:
        yield Stream(kafka_server, topics, stack)


def test_a_commit_nobody_answered_is_not_repeated(
    stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(publishing, "KafkaProducer", Unanswered)
        with pytest.raises(InfrastructureError, match="no answer"):
            stream.publish("once", 5)
    stream.publish("once", 5)
    stream.publish("another", 6)
    assert stream.committed_texts(2) == ["once", "another"]


@pytest.mark.parametrize(  # Tansu shows what was never committed
    "kafka_server", [pytest.param("apache", marks=pytest.mark.apache_kafka)], indirect=True
)
def test_a_call_that_hangs_is_given_up(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    stream.publisher = TransactionalPublisher(
        stream.member.settings.model_copy(update={"publish_timeout_seconds": 2.0}),
        stream.member.consumer,
        f"{stream.topics.group}-1",
    )
    with monkeypatch.context() as patch:
        patch.setattr(publishing, "KafkaProducer", Hanging)
        with pytest.raises(InfrastructureError, match="no answer within 2 s"):
            stream.publish("once", 5)
    stream.publish("once", 5)
    stream.publisher.close(2.0)
    assert stream.committed_texts(1) == ["once"]


@pytest.mark.parametrize("producer", [Joining, Adding])
def test_a_transaction_that_hangs_before_its_commit_is_given_up(
    stream: Stream, monkeypatch: pytest.MonkeyPatch, producer: type[KafkaProducer]
) -> None:
    stream.publisher = TransactionalPublisher(
        stream.member.settings.model_copy(update={"publish_timeout_seconds": 2.0}),
        stream.member.consumer,
        f"{stream.topics.group}-1",
    )
    partition = {(stream.topics.images, 0)}
    with monkeypatch.context() as patch:
        patch.setattr(publishing, "KafkaProducer", producer)
        for _ in range(2):
            with pytest.raises(InfrastructureError, match="no answer within 2 s"):
                stream.publish("once", 5)
    assert stream.member.consumer.committed(partition, SECONDS) == {}
    stream.publish("once", 5)
    stream.publisher.close(2.0)
    assert stream.member.consumer.committed(partition, SECONDS) == {(stream.topics.images, 0): 5}


def test_what_is_replayed_is_published_again(stream: Stream) -> None:
    """It lies behind the group's offsets, which exactly-once does not set back."""
    stream.publish("first", 5)
    stream.publisher.close(0)  # as after any transaction that failed
    stream.publish("replayed", 3)
    assert stream.committed_texts(2) == ["first", "replayed"]


def test_the_group_goes_back_behind_a_transaction_that_is_over(stream: Stream) -> None:
    """As a worker that ends takes it, where it would have read events again."""
    partition = (stream.topics.images, 0)
    stream.publish("first", 5)
    stream.publisher.close(0)
    stream.member.consumer.commit_now({partition: 3}, SECONDS)
    assert stream.committed_texts(1) == ["first"]
    assert stream.member.consumer.committed({partition}, SECONDS) == {partition: 3}
