"""Three brokers, every message on all of them: each of them is killed, and nothing stops for long.

Between them they lead every partition, and coordinate the group and its transactions.
"""

from collections.abc import Iterator

import pytest

from deploy.apache_kafka import LocalApacheKafka
from deploy.local import LocalRedis, kafka_admin
from tests.conftest import require_apache_kafka
from tests.faults.conftest import WorkerOf, fresh
from tests.faults.oracle import Oracle
from tests.faults.workload import families
from tests.stream.harness import until

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
    return all(len(each["isr_nodes"]) == BROKERS for each in partitions)


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
