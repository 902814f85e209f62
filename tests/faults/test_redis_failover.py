"""Redis fails over to a replica that lacks the last writes: detected, counted, read again."""

from collections.abc import Iterator
from typing import NamedTuple

import pytest

from deploy.apache_kafka import KafkaServer
from deploy.local import LocalRedis
from tests.conftest import Topics
from tests.faults.oracle import Oracle
from tests.faults.proxy import Proxy
from tests.faults.workload import SETTINGS, families
from tests.stream.conftest import StartWorker
from tests.stream.harness import PATIENT, Worker, until

FAMILIES = 8
SECONDS = 600
WAIT_MS = 1_000


class Standby(NamedTuple):
    """A primary, its replica, and where the workers believe Redis to be."""

    primary: LocalRedis
    replica: LocalRedis
    proxy: Proxy

    @property
    def address(self) -> str:
        return f"redis://127.0.0.1:{self.proxy.port}/0"

    def cut_off(self) -> None:
        """Let the replica have everything, and nothing from here on."""
        client = self.primary.client()
        until(lambda: client.wait(1, WAIT_MS) == 1, SECONDS, "a replica that has everything")
        self.replica.client().replicaof("NO", "ONE")

    def fail_over(self) -> None:
        """The primary is gone; the replica is in its place."""
        self.primary.kill()
        self.proxy.redirect(self.replica.port)


@pytest.fixture
def standby(redis_server: LocalRedis) -> Iterator[Standby]:
    redis_server.client().config_set("repl-diskless-sync-delay", 0)
    with LocalRedis() as replica, Proxy(redis_server.port) as proxy:
        replica.client().replicaof("127.0.0.1", redis_server.port)
        yield Standby(redis_server, replica, proxy)


def total(workers: list[Worker], name: str, **labels: str) -> float:
    return sum(worker.metric(name, **labels) for worker in workers)


def published(workers: list[Worker]) -> float:
    """Verdicts that the workers have published, repeated ones too."""
    kinds = ("unique", "duplicate", "exact")
    return sum(total(workers, "dedup_verdicts_total", verdict=kind) for kind in kinds)


def case(broker: str, delivery: str, at_work: bool, *marks: pytest.MarkDecorator) -> object:
    """What a run of the test below is told, and under which name."""
    name = f"{broker}-{delivery}-{'at work' if at_work else 'idle'}"
    return pytest.param(broker, delivery, at_work, marks=marks, id=name)


@pytest.mark.parametrize(
    ("kafka_server", "delivery", "at_work"),
    [
        case("tansu", "at-least-once", True),
        # Not for Apache Kafka's sake, but `make test` has to end in ten minutes.
        case("tansu", "at-least-once", False, pytest.mark.apache_kafka),
        case("apache", "at-least-once", True, pytest.mark.apache_kafka),
        case("apache", "at-least-once", False, pytest.mark.apache_kafka),
        # The verdicts said anew are transactions of their own, behind those of the first time.
        case("apache", "exactly-once", True, pytest.mark.apache_kafka),
        case("apache", "exactly-once", False, pytest.mark.apache_kafka),
    ],
    indirect=["kafka_server"],
)
def test_lost_writes_are_read_again(
    kafka_server: KafkaServer,
    standby: Standby,
    topics: Topics,
    start_worker: StartWorker,
    delivery: str,
    *,
    at_work: bool,
) -> None:
    # Patient: a partition that moved to another worker takes its recent writes to nobody.
    wanted = {"redis_url": standby.address, "delivery": delivery, **SETTINGS, **PATIENT}
    workers = [start_worker(**wanted).wait_ready() for _ in range(2)]
    with Oracle(
        kafka_server.bootstrap, topics, standby.replica, delivery=delivery, losing=True
    ) as oracle:
        oracle.publish(families(FAMILIES))
        oracle.wait_until_finished(SECONDS)
        standby.cut_off()
        late = oracle.publish(families(FAMILIES, first=FAMILIES))
        if at_work:  # of the late ones: a verdict said twice proves no write that is lost
            oracle.wait_for_answers(late, 5, SECONDS)
        else:
            oracle.wait_until_finished(SECONDS)
        assert len(oracle.stored_ids()) == 3 * FAMILIES
        standby.fail_over()
        until(lambda: total(workers, "dedup_lost_images_total") > 0, SECONDS, "loss noticed")
        sent = {event.key for event in oracle.sent.values()}
        until(lambda: oracle.stored_ids() == sent, SECONDS, "everything stored again")
        until(lambda: total(workers, "dedup_inflight_events") == 0, SECONDS, "nothing in work")
        # With exactly-once the group's offset stays where it was, so it does not tell the end.
        until(
            lambda: oracle.look() and oracle.outcomes >= published(workers),
            SECONDS,
            "everything published is read",
        )
        assert len(oracle.judge()) == 2 * 3 * FAMILIES
        assert total(workers, "dedup_replays_total") > 0
