"""Fixtures every test may use: real servers on loopback, and topics of a test's own."""

import os
import signal
import uuid
from collections.abc import Iterator
from typing import NamedTuple, NoReturn

import pytest

from deploy.apache_kafka import KafkaServer, LocalApacheKafka
from deploy.kafka_archives import KafkaUnavailableError, fetch_archives
from deploy.local import LocalKafka, LocalRedis

PARTITIONS = 4


def pytest_configure() -> None:
    """Hear SIGINT even when started in the background, where shells have it ignored.

    Children inherit "ignored", but not a handler; the tests of Ctrl-C need children that hear it.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Topics(NamedTuple):
    """Names nobody else uses: three topics that exist, and a consumer group."""

    images: str
    verdicts: str
    dead_letters: str
    group: str


NOBODY = Topics("images", "verdicts", "dead-letters", "group")  # where none is reached


@pytest.fixture
def redis_server() -> Iterator[LocalRedis]:
    """An empty Valkey that keeps its data over `kill` and `restart`."""
    with LocalRedis(aof=True) as server:
        yield server


@pytest.fixture(
    scope="session", params=["tansu", pytest.param("apache", marks=pytest.mark.apache_kafka)]
)
def kafka_server(request: pytest.FixtureRequest) -> Iterator[KafkaServer]:
    """A broker shared by all tests; one that stops or kills a broker starts its own.

    Every test that takes it runs on Tansu (`make test`) and on Apache Kafka (`make test-kafka`).
    """
    if request.param == "apache":
        require_apache_kafka()
    with LocalKafka() if request.param == "tansu" else LocalApacheKafka() as server:
        yield server


def missing(what: str, why: str) -> NoReturn:
    """Something a test needs is not here: on a laptop it is skipped, in CI it fails.

    But for what `.ci/run` has found cannot be had on its machine, and has said so.
    """
    if os.environ.get("CI") and what not in os.environ.get("CI_WITHOUT", "").split():
        pytest.fail(f"CI must have what it tests with: {why}")
    pytest.skip(why)


def require_apache_kafka() -> None:
    """Skip the test where Apache Kafka cannot be had; CI looks for it before it starts tests."""
    try:
        fetch_archives()
    except KafkaUnavailableError as error:
        pytest.skip(f"no Apache Kafka: {error}")


@pytest.fixture
def topics(kafka_server: KafkaServer) -> Topics:
    """Fresh topics on `kafka_server`, each with four partitions."""
    own = uuid.uuid4().hex[:8]
    names = Topics(f"images-{own}", f"verdicts-{own}", f"dead-letter-{own}", f"group-{own}")
    kafka_server.create_topics(
        dict.fromkeys((names.images, names.verdicts, names.dead_letters), PARTITIONS)
    )
    return names
