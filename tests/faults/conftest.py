"""Workers for fault tests, on the shared servers or on ones that are the test's own."""

import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from deploy.apache_kafka import KafkaServer
from deploy.local import LocalRedis
from tests.conftest import PARTITIONS, Topics
from tests.faults.workload import SETTINGS
from tests.stream.conftest import start_worker
from tests.stream.harness import Worker

__all__ = ["start_worker"]

SESSION_SECONDS = 3
APACHE = pytest.mark.apache_kafka


def deliveries(
    *on_tansu: pytest.MarkDecorator, fixture: str = "kafka_server"
) -> pytest.MarkDecorator:
    """Run a test with each delivery: on Tansu, marked so, and on Apache Kafka.

    Exactly-once is on Apache Kafka only: Tansu shows aborted transactions and fences nobody.
    """
    cases = [
        pytest.param("tansu", "at-least-once", marks=on_tansu, id="tansu-at-least-once"),
        pytest.param("apache", "at-least-once", marks=APACHE, id="apache-at-least-once"),
        pytest.param("apache", "exactly-once", marks=APACHE, id="apache-exactly-once"),
    ]
    return pytest.mark.parametrize((fixture, "delivery"), cases, indirect=[fixture])


def named() -> Topics:
    """Names that nobody has used yet."""
    own = uuid.uuid4().hex[:8]
    return Topics(f"images-{own}", f"verdicts-{own}", f"dead-letter-{own}", f"group-{own}")


def fresh(kafka: KafkaServer) -> Topics:
    """Topics of the test's own."""
    return create(kafka, named())


def create(kafka: KafkaServer, topics: Topics) -> Topics:
    """The same, that exist now."""
    kafka.create_topics(dict.fromkeys(topics[:3], PARTITIONS))
    return topics


class WorkerOf:
    """Starts workers on a broker that is the test's own."""

    def __init__(self, redis: LocalRedis, folder: Path, stack: ExitStack) -> None:
        self._redis = redis
        self._folder = folder
        self._stack = stack

    def __call__(
        self,
        kafka: KafkaServer,
        topics: Topics,
        *,
        command: Sequence[str] = ("-m", "worker"),
        **settings: object,
    ) -> Worker:
        log = self._folder / f"worker-{uuid.uuid4().hex[:4]}.log"
        wanted: dict[str, Any] = {
            "session_timeout_seconds": SESSION_SECONDS,
            **SETTINGS,
            **settings,
        }
        worker = Worker(kafka.bootstrap, self._redis.url, topics, log, command=command, **wanted)
        self._stack.callback(worker.print_log)
        return self._stack.enter_context(worker).wait_ready()


@pytest.fixture
def worker_of(redis_server: LocalRedis, tmp_path: Path) -> Iterator[WorkerOf]:
    with ExitStack() as stack:
        yield WorkerOf(redis_server, tmp_path, stack)
