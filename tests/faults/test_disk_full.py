"""The disk is full when a dead letter has to be written: nothing is passed over, nothing is lost.

Apache Kafka on a file system of a few megabytes, which is mounted for it; where this machine lets
nobody mount, the tests are skipped and say why (see `missing`). On its one disk the broker ends
itself; with two disks it goes on without the dead letters.
"""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from kafka import TopicPartitionReplica

from deploy.apache_kafka import KafkaNode, LocalApacheKafka
from deploy.local import LocalRedis, kafka_admin
from tests.conftest import PARTITIONS, Topics, missing, require_apache_kafka
from tests.faults.conftest import WorkerOf, create, named
from tests.faults.oracle import Oracle
from tests.faults.workload import families
from tests.stream.harness import Event, Worker, inline, until

pytestmark = pytest.mark.apache_kafka

FAMILIES = 10
SECONDS = 600
MIB = 1 << 20
DISK = 64 * MIB
LETTER = 4 * MIB
PARTITION = 0  # of the event that cannot be decided


class Disk:
    """A small file system at `folder`, which is made for it. Skips the test where it cannot be."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self._rest = folder / "full"
        command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "dedup-test", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            why = getattr(error, "stderr", None) or error
            missing("mount", f"no disk can be filled, as nothing can be mounted here: {why}")

    def fill(self, left: int) -> None:
        """Leave room for `left` bytes."""
        command = ["df", "--block-size=1", "--output=avail", str(self._folder)]
        free = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        self._rest.write_bytes(bytes(int(free.split()[-1]) - left))

    def free(self) -> None:
        """Give the room back."""
        self._rest.unlink()

    def close(self) -> None:
        """Gone with everything on it, whoever has files open there."""
        subprocess.run(["umount", "--lazy", str(self._folder)], check=False, capture_output=True)


class OneDisk(KafkaNode):
    """Everything is on the small disk."""

    folder = "data"  # as in the settings
    left = (
        7 * MIB
    )  # for the event that cannot be decided, which is as large, and for all the others
    disk: Disk

    @property
    def running(self) -> bool:
        """Whether its process is alive."""
        return self._running().running

    def launch(self) -> None:
        if not hasattr(self, "disk"):
            self.disk = Disk(self.directory / self.folder)
        super().launch()

    def close(self) -> None:
        if hasattr(self, "disk"):
            self.disk.close()
        super().close()

    def place(self, topics: Topics) -> None:
        """There is but one place for everything."""


class TwoDisks(OneDisk):
    """The dead letters are on the small disk, and nothing else is."""

    folder = "letters"
    left = 2 * MIB

    def _settings(self) -> dict[str, object]:
        settings = super()._settings()
        return settings | {"log.dirs": f"{settings['log.dirs']},{self.directory / self.folder}"}

    def place(self, topics: Topics) -> None:
        """Tell Kafka where partitions are to be before there are any."""
        small, large = str(self.directory / self.folder), str(self.directory / "data")
        others = (topics.images, topics.verdicts, "__consumer_offsets", "__transaction_state")
        where = dict.fromkeys(others, large) | {topics.dead_letters: small}
        with kafka_admin(self.address) as admin:
            admin.alter_replica_log_dirs(
                {
                    TopicPartitionReplica(topic, number, 1): folder
                    for topic, folder in where.items()
                    for number in range(PARTITIONS)
                }
            )


class SmallKafka(LocalApacheKafka):
    """One broker with a small disk."""

    @property
    def broker(self) -> OneDisk:
        """The one."""
        (node,) = self.nodes
        assert isinstance(node, OneDisk)
        return node


@pytest.fixture(params=[OneDisk, TwoDisks])
def kafka(request: pytest.FixtureRequest) -> Iterator[SmallKafka]:
    require_apache_kafka()
    kafka = SmallKafka()
    kafka.node = request.param
    with kafka:
        yield kafka


def errors(worker: Worker) -> float:
    """What Kafka refused so far, of whatever kind."""
    lines = worker.get("/metrics").text.splitlines()
    counted = [line for line in lines if line.startswith("dedup_kafka_errors_total{")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in counted)


@pytest.mark.parametrize("delivery", ["at-least-once", "exactly-once"])
def test_no_room_for_a_dead_letter(
    kafka: SmallKafka, redis_server: LocalRedis, worker_of: WorkerOf, delivery: str
) -> None:
    topics, broker = named(), kafka.broker
    broker.place(topics)
    create(kafka, topics)
    worker = worker_of(kafka, topics, delivery=delivery, publish_timeout_seconds=10)
    with Oracle(kafka.bootstrap, topics, redis_server, delivery=delivery) as oracle:
        oracle.publish(families(FAMILIES))
        oracle.wait_until_finished(SECONDS)
        broker.disk.fill(broker.left)
        refused = errors(worker)
        bad: list[Event] = [inline("no-image", b"x" * LETTER, partition=PARTITION)]
        ((_, offset),) = oracle.publish(bad)
        until(lambda: not worker.get("/readyz").json()["kafka"], SECONDS, "not ready")
        until(lambda: errors(worker) > refused, SECONDS, "counted")
        until(lambda: "publishing failed, retrying" in messages(worker), SECONDS, "logged")
        assert worker.get("/livez").status_code == 200
        if isinstance(broker, TwoDisks):
            oracle.publish(families(FAMILIES, first=FAMILIES))
            until(lambda: errors(worker) > refused + 2, SECONDS, "still trying")
            assert oracle.committed().get(PARTITION, 0) <= offset, "the dead letter is given up"
        else:
            until(lambda: not broker.running, SECONDS, "the broker has ended itself")
        broker.disk.free()
        kafka.restart()
        oracle.publish(families(FAMILIES, first=2 * FAMILIES))
        oracle.wait_until_finished(SECONDS)
        oracle.judge()
    until(worker.ready, SECONDS, "ready again")


def messages(worker: Worker) -> set[str]:
    """What its log says."""
    return {line["message"] for line in worker.lines()}
