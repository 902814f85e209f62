"""Kafka restarted, killed, frozen, cut off or refusing; and workers replaced one by one."""

import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

import pytest
from kafka import KafkaAdminClient
from kafka.admin import ConfigResource, ConfigResourceType

from deploy.apache_kafka import KafkaServer, LocalApacheKafka
from deploy.local import LocalRedis
from tests.conftest import Topics, require_apache_kafka
from tests.faults.conftest import APACHE, WorkerOf, deliveries, fresh
from tests.faults.oracle import Oracle
from tests.faults.proxied import ProxiedApacheKafka, ProxiedTansu
from tests.faults.proxy import HOST
from tests.faults.workload import SETTINGS, families, mixed
from tests.stream.conftest import StartWorker
from tests.stream.harness import PATIENT, Event, inline, until

FAMILIES = 20
WORKERS = 3
SESSION_SECONDS = 30  # how long its partitions would lie idle if one left without a word
SECONDS = 600
SMALL, LARGE = 2_000, 10_000_000
WORKER = ("-m", "worker")
LATE = str(Path(__file__).with_name("late_worker.py"))


@pytest.fixture(params=["tansu", pytest.param("apache", marks=APACHE)])
def proxied_kafka(request: pytest.FixtureRequest) -> Iterator[ProxiedTansu | ProxiedApacheKafka]:
    if request.param == "apache":
        require_apache_kafka()
    with ProxiedTansu() if request.param == "tansu" else ProxiedApacheKafka() as kafka:
        yield kafka
        assert kafka.proxy is not None
        kafka.proxy.__exit__(None, None, None)


@pytest.fixture(scope="module")
def apache_kafka() -> Iterator[LocalApacheKafka]:
    """A broker of these tests' own: they are not kind to it."""
    require_apache_kafka()
    with LocalApacheKafka() as kafka:
        yield kafka


@deliveries(fixture="proxied_kafka")
def test_cut_off_from_kafka(
    proxied_kafka: ProxiedTansu | ProxiedApacheKafka,
    redis_server: LocalRedis,
    worker_of: WorkerOf,
    delivery: str,
) -> None:
    topics, proxy = fresh(proxied_kafka), proxied_kafka.proxy
    assert proxy is not None
    bootstrap = f"{HOST}:{proxy.port}"
    worker = worker_of(proxied_kafka, topics, delivery=delivery, bootstrap_servers=bootstrap)
    with Oracle(bootstrap, topics, redis_server, delivery=delivery) as oracle:
        oracle.publish(families(FAMILIES))
        oracle.wait_for(5, SECONDS)
        proxy.cut()
        until(lambda: not worker.get("/readyz").json()["kafka"], SECONDS, "not ready")
        assert worker.get("/livez").status_code == 200
        proxy.mend()
        oracle.publish(families(FAMILIES, first=FAMILIES))
        oracle.wait_until_finished(SECONDS)
        oracle.judge()
    until(worker.ready, SECONDS, "ready again")


@pytest.mark.apache_kafka
@pytest.mark.parametrize("delivery", ["at-least-once", "exactly-once"])
def test_a_broker_is_restarted_killed_and_frozen(
    apache_kafka: LocalApacheKafka, redis_server: LocalRedis, worker_of: WorkerOf, delivery: str
) -> None:
    kafka, topics = apache_kafka, fresh(apache_kafka)
    worker = worker_of(kafka, topics, delivery=delivery, publish_timeout_seconds=10)
    with Oracle(kafka.bootstrap, topics, redis_server, delivery=delivery) as oracle:
        for round_, fault in enumerate((kafka.restart, kafka.kill, kafka.pause)):
            oracle.publish(mixed(FAMILIES, first=round_ * FAMILIES))
            oracle.wait_for(oracle.outcomes + 5, SECONDS)
            fault()
            if fault != kafka.restart:
                until(lambda: not worker.get("/readyz").json()["kafka"], SECONDS, "not ready")
                assert worker.get("/livez").status_code == 200
                (kafka.start if fault == kafka.kill else kafka.resume)()
        oracle.wait_until_finished(SECONDS)
        oracle.judge()
    until(worker.ready, SECONDS, "ready again")


def test_what_a_thread_asks_of_kafka_after_the_end_is_not_its_death(
    kafka_server: KafkaServer, start_worker: StartWorker
) -> None:
    worker = start_worker(command=(LATE, "question")).wait_ready()
    until(lambda: "late" in {line["message"] for line in worker.lines()}, SECONDS, "late")
    assert worker.terminate() == 0
    assert "background work ended" not in {line["message"] for line in worker.lines()}


@pytest.mark.apache_kafka
@pytest.mark.parametrize(
    ("delivery", "command"),
    [
        ("at-least-once", WORKER),
        ("exactly-once", WORKER),
        ("exactly-once", (LATE, "sends")),
        ("exactly-once", (LATE, "offsets")),
    ],
    ids=["at-least-once", "exactly-once", "late-sends", "late-offsets"],
)
def test_a_dead_letter_topic_that_refuses_pauses_the_stream(
    apache_kafka: LocalApacheKafka,
    redis_server: LocalRedis,
    worker_of: WorkerOf,
    delivery: str,
    command: Sequence[str],
) -> None:
    kafka, topics = apache_kafka, fresh(apache_kafka)
    limit(kafka, topics.dead_letters, SMALL)
    worker = worker_of(kafka, topics, delivery=delivery, command=command)
    with Oracle(kafka.bootstrap, topics, redis_server, delivery=delivery) as oracle:
        bad: list[Event] = [inline("no-image", b"x" * SMALL, partition=0)]
        oracle.publish([*families(FAMILIES), *bad, *families(FAMILIES, first=FAMILIES)])
        until(
            lambda: worker.metric("dedup_kafka_errors_total", kind="MessageSizeTooLargeError") > 1,
            SECONDS,
            "an error that says what is wrong",
        )
        until(lambda: not worker.get("/readyz").json()["kafka"], SECONDS, "not ready")
        assert worker.get("/livez").status_code == 200
        assert not oracle.look()
        limit(kafka, topics.dead_letters, LARGE)
        oracle.wait_until_finished(SECONDS)
        oracle.judge()
    until(worker.ready, SECONDS, "ready again")


def limit(kafka: LocalApacheKafka, topic: str, size: int) -> None:
    """Set the largest message a topic takes."""
    resource = ConfigResource(ConfigResourceType.TOPIC, topic, {"max.message.bytes": str(size)})
    with KafkaAdminClient(bootstrap_servers=kafka.bootstrap) as admin:
        assert admin.alter_configs([resource]) == {"topic": {topic: "OK"}}


@deliveries(APACHE)  # on Tansu, too, as in test_clocks
def test_workers_replaced_one_by_one_do_no_work_twice(
    kafka_server: KafkaServer,
    topics: Topics,
    redis_server: LocalRedis,
    start_worker: StartWorker,
    delivery: str,
) -> None:
    """Each finishes what it has in work, commits and leaves; the others keep what they have.

    No event waits as long as the group would for one that left without a word; but on Tansu, which
    holds every join for half a session.
    """
    on_apache = isinstance(kafka_server, LocalApacheKafka)
    settings = SETTINGS | PATIENT
    if on_apache:
        settings |= {"session_timeout_seconds": SESSION_SECONDS}
    sent: dict[str, float] = {}
    workers = [start_worker(delivery=delivery, **settings) for _ in range(WORKERS)]
    for worker in workers:
        worker.wait_ready()
    with Oracle(kafka_server.bootstrap, topics, redis_server, delivery=delivery) as oracle:
        for round_, worker in enumerate(workers):
            events = families(FAMILIES, first=round_ * FAMILIES)
            sent |= {event.key: time.time() for event in events}
            oracle.publish(events)
            oracle.wait_for(oracle.outcomes + 5, SECONDS)
            assert worker.terminate() == 0
            worker.start()
            worker.wait_ready()
        oracle.wait_until_finished(SECONDS)
        oracle.judge()
        assert oracle.outcomes == len(oracle.sent), "something was done twice"
        waits = [
            datetime.fromisoformat(verdict["decided_at"]).timestamp() - sent[verdict["image_id"]]
            for verdict in oracle.verdicts()
        ]
        assert max(waits) < SESSION_SECONDS or not on_apache, "the stream stood still"
