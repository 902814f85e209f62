"""A Redis Cluster whose node with the images fails over: when told to, and when it is killed."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from deploy.apache_kafka import KafkaServer
from deploy.local import HOST, LocalRedis
from tests.conftest import Topics
from tests.faults.conftest import APACHE, deliveries
from tests.faults.oracle import NAMESPACE, Oracle
from tests.faults.workload import SETTINGS, families
from tests.stream.conftest import StartWorker
from tests.stream.harness import PATIENT, until
from worker.index.keys import Keys

PRIMARIES = 3
FAMILIES = 8
SECONDS = 600
# The others take a node for dead after this long, in ms.
CONFIG = {
    "cluster-enabled": "yes",
    "cluster-node-timeout": "3000",
    "repl-diskless-sync-delay": "0",
}


class Cluster(NamedTuple):
    """Three primaries, and a replica of the one that has the images."""

    primaries: LocalRedis
    home: LocalRedis
    replica: LocalRedis


def promoted(node: LocalRedis) -> bool:
    """Whether it is a primary, and its cluster whole."""
    client = node.client()
    return client.info("replication")["role"] == "master" and whole(node)


def whole(node: LocalRedis) -> bool:
    return bool(node.client().cluster("INFO")["cluster_state"] == "ok")


def following(node: LocalRedis) -> bool:
    """Whether it is a replica that has everything."""
    info = node.client().info("replication")
    return bool(info["role"] == "slave" and info["master_link_status"] == "up")


def home_of(cluster: LocalRedis) -> LocalRedis:
    """The node that has the images: a namespace is one slot."""
    client: Any = cluster.cluster_client()
    port = client.get_node_from_key(Keys(NAMESPACE, "").root).port
    return next(node for node in cluster.nodes if node.port == port)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with (
        LocalRedis(cluster=PRIMARIES, config=CONFIG) as primaries,
        LocalRedis(config=CONFIG) as other,
    ):
        home = home_of(primaries)
        name = home.client().cluster("MYID").decode()
        client = other.client()
        client.cluster("MEET", HOST, home.port, home._config["cluster-port"])
        until(lambda: name in str(client.cluster("NODES")) and whole(other), SECONDS, "met")
        client.cluster("REPLICATE", name)
        until(lambda: following(other), SECONDS, "a replica that has everything")
        yield Cluster(primaries, home, other)


@deliveries(APACHE)  # on Tansu with the others, as in test_clocks
def test_the_node_with_the_images_fails_over(
    kafka_server: KafkaServer,
    cluster: Cluster,
    topics: Topics,
    start_worker: StartWorker,
    delivery: str,
) -> None:
    # Patient: a partition that moved to another worker takes its recent writes to nobody.
    wanted = {
        "redis_url": cluster.primaries.url,
        "redis_cluster": True,
        "delivery": delivery,
        **SETTINGS,
        **PATIENT,
    }
    for _ in range(2):
        start_worker(**wanted).wait_ready()
    with Oracle(
        kafka_server.bootstrap, topics, cluster.primaries, delivery=delivery, losing=True
    ) as oracle:
        oracle.publish(families(FAMILIES))
        oracle.wait_for(5, SECONDS)
        cluster.replica.client().cluster("FAILOVER")
        until(lambda: promoted(cluster.replica), SECONDS, "the replica in its place")
        oracle.wait_until_finished(SECONDS)
        oracle.judge()
        until(lambda: following(cluster.home), SECONDS, "the old primary a replica")
        oracle.publish(families(FAMILIES, first=FAMILIES))
        oracle.wait_for(oracle.outcomes + 5, SECONDS)
        cluster.replica.kill()
        until(lambda: promoted(cluster.home), SECONDS, "the old primary back in its place")
        oracle.publish(families(FAMILIES, first=2 * FAMILIES))
        sent = {event.key for event in oracle.sent.values()}
        until(lambda: oracle.stored_ids() == sent, SECONDS, "everything stored")
        oracle.wait_until_finished(SECONDS)
        assert len(oracle.judge()) == 3 * 3 * FAMILIES
