"""A consumer of the worker's own kind, without a worker around it."""

from typing import Any

from deploy.apache_kafka import KafkaServer
from tests.conftest import PARTITIONS, Topics
from tests.stream.harness import SESSION_SECONDS, until
from worker.broker import Consumer, Offsets
from worker.config import Settings
from worker.offsets import Partition

SECONDS = 300.0
SHORT_POLL_SECONDS = 0.005  # mostly over before a broker has answered
POLLS = 40  # without a pause: kafka-python joins once more when it has joined between two polls


class Owner:
    """Notes what it is given and what is taken."""

    def __init__(self) -> None:
        self.held: set[Partition] = set()
        self.released_ever: set[Partition] = set()

    def assigned(self, partitions: set[Partition]) -> None:
        self.held |= partitions

    def revoking(self, partitions: set[Partition]) -> None:
        """Nothing is in work."""

    def unfinished(self, partitions: set[Partition]) -> int:
        return 0

    def committable(self) -> Offsets:
        return {}

    def committed(self, offsets: Offsets) -> None:
        """Nothing is."""

    def released(self, partitions: set[Partition]) -> None:
        self.held -= partitions
        self.released_ever |= partitions


class Member:
    """A consumer that polls often, but each time for less than joining takes."""

    def __init__(
        self,
        kafka: KafkaServer,
        topics: Topics,
        session_seconds: float = SESSION_SECONDS,
        **settings: Any,
    ) -> None:
        self.owner = Owner()
        self.settings = Settings(
            bootstrap_servers=kafka.bootstrap,
            topic=topics.images,
            group_id=topics.group,
            session_timeout_seconds=session_seconds,
            **settings,
        )
        self.consumer = Consumer(self.settings, self.owner)
        self.coordinator = self.consumer._consumer._coordinator

    def holds_everything(self) -> bool:
        """Poll for a while; whether it is a member with all partitions then."""
        for _ in range(POLLS):
            self.consumer.poll(SHORT_POLL_SECONDS, 1)
        return len(self.owner.held) == PARTITIONS and self.consumer.joined()

    def wait(self) -> None:
        """Poll until it holds everything."""
        until(self.holds_everything, SECONDS, "a member that holds everything")
