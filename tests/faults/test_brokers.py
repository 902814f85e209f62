"""Three brokers, every message on all of them: each of them is killed, and nothing stops for long.

Between them they lead every partition, and coordinate the group and its transactions.
"""

from collections.abc import Iterator

import pytest

from deploy.apache_kafka import LocalApacheKafka
from deploy.local import LocalRedis, kafka_admin
from tests.conftest import PARTITIONS, require_apache_kafka
from tests.faults.conftest import WorkerOf, fresh, named
from tests.faults.oracle import Oracle
from tests.faults.workload import families
from tests.stream.harness import until
from worker.__main__ import main

pytestmark = pytest.mark.apache_kafka

BROKERS = 3
FAMILIES = 10
SECONDS = 600


@pytest.fixture(scope="module")
def brokers() -> Iterator[LocalApacheKafka]:
    """Three brokers; of three copies of a message two must be written before it counts."""
    require_apache_kafka()
    with LocalApacheKafka(brokers=BROKERS) as kafka:
        yield kafka


def in_sync(kafka: LocalApacheKafka) -> bool:
    """Whether every partition, those of offsets and transactions too, has all of its copies."""
    with kafka_admin(kafka.bootstrap) as admin:
        partitions = [each for topic in admin.describe_topics() for each in topic["partitions"]]
    return all(len(each["isr_nodes"]) == len(each["replica_nodes"]) for each in partitions)


@pytest.mark.parametrize("delivery", ["at-least-once", "exactly-once"])
def test_each_of_three_brokers_is_killed(
    brokers: LocalApacheKafka, redis_server: LocalRedis, worker_of: WorkerOf, delivery: str
) -> None:
    topics = fresh(brokers)
    for _ in range(2):
        worker_of(brokers, topics, delivery=delivery, publish_timeout_seconds=10)
    with Oracle(brokers.bootstrap, topics, redis_server, delivery=delivery) as oracle:
        for number, node in enumerate(brokers.nodes):
            oracle.publish(families(FAMILIES, first=2 * number * FAMILIES))
            oracle.wait_for(oracle.outcomes + 5, SECONDS)
            node.kill()
            late = oracle.publish(families(FAMILIES, first=(2 * number + 1) * FAMILIES))
            oracle.wait_for_answers(late, len(late), SECONDS)  # while it is away
            node.start()
            until(lambda: in_sync(brokers), SECONDS, "all copies in sync")
        oracle.wait_until_finished(SECONDS)
        assert len(oracle.judge()) == len(oracle.sent)


def test_a_partition_that_nobody_leads_is_a_pause(
    brokers: LocalApacheKafka,
    redis_server: LocalRedis,
    worker_of: WorkerOf,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """There is one copy of the events, so some of them are away with their broker."""
    topics = named()
    brokers.create_topics({topics.images: PARTITIONS}, replication=1)
    brokers.create_topics(dict.fromkeys((topics.verdicts, topics.dead_letters), PARTITIONS))
    worker = worker_of(brokers, topics)
    node, said = brokers.nodes[0], "no leader for partition"
    node.kill()
    until(lambda: not worker.ready() and said in worker.log.read_text(), SECONDS, said)
    monkeypatch.setattr("worker.logs.configure", lambda level, shape: None)  # logs are pytest's
    rebuild = ["rebuild", "--redis-url", redis_server.url, "--to-model", "default"]
    rebuild += ["--bootstrap-servers", brokers.bootstrap, "--topic", topics.images]
    assert main([*rebuild, "--embed-mode", "fp32", "--decode-processes", "1"]) == 3
    assert said in capsys.readouterr().err
    node.start()
    worker.wait_ready()
