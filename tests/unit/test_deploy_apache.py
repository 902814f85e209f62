"""Apache Kafka on loopback keeps what it acknowledged, and three brokers outlive one."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from kafka import KafkaConsumer, KafkaProducer

from deploy.apache_kafka import LocalApacheKafka
from deploy.kafka_archives import KafkaUnavailableError, fetch_archives
from tests.conftest import require_apache_kafka

WAIT_SECONDS = 120.0


@pytest.fixture(params=[1, 3])
def cluster(request: pytest.FixtureRequest) -> Iterator[LocalApacheKafka]:
    require_apache_kafka()
    with LocalApacheKafka(request.param) as cluster:
        yield cluster


def send(cluster: LocalApacheKafka, value: bytes) -> None:
    with KafkaProducer(bootstrap_servers=cluster.bootstrap, acks="all") as producer:
        producer.send("events", value).get(WAIT_SECONDS)


def received(cluster: LocalApacheKafka, count: int) -> set[bytes]:
    consumer = KafkaConsumer(
        "events",
        bootstrap_servers=cluster.bootstrap,
        auto_offset_reset="earliest",
        consumer_timeout_ms=int(WAIT_SECONDS * 1000),
    )
    with consumer:
        return {next(consumer).value for _ in range(count)}


@pytest.mark.apache_kafka
def test_what_was_acknowledged_survives_a_crash(cluster: LocalApacheKafka) -> None:
    cluster.create_topics({"events": 2})
    send(cluster, b"before")
    if len(cluster.nodes) == 1:
        cluster.kill()
        cluster.start()
    else:
        cluster.nodes[0].kill()  # two brokers go on without it
    send(cluster, b"after")
    assert received(cluster, 2) == {b"before", b"after"}


def test_a_machine_without_java_or_mvn_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(KafkaUnavailableError, match="java is not installed"):
        fetch_archives(tmp_path)
