"""Workers whose clocks jump: nothing but what they tell of the time depends on them."""

import signal
from pathlib import Path

import pytest

from deploy.apache_kafka import KafkaServer, LocalApacheKafka
from deploy.local import LocalRedis
from tests.conftest import Topics, require_apache_kafka
from tests.faults.conftest import APACHE, WorkerOf, deliveries, fresh
from tests.faults.oracle import Oracle
from tests.faults.workload import SETTINGS, families
from tests.stream.conftest import StartWorker
from tests.stream.harness import Reader, until

FAMILIES = 20
SECONDS = 240
ROUNDS = 20
HOUR = 3600
JUMPING = str(Path(__file__).with_name("jumping_worker.py"))
# Apache Kafka refuses messages of more than an hour later (message.timestamp.after.max.ms).
# A record refused alone bears the broker's error, records refused together the wider one.
REFUSALS = ("InvalidTimestampError", "InvalidRecordError")
ERRORS = "dedup_kafka_errors_total"
BACK_AND_FORTH = ("0", str(HOUR - 60), str(-HOUR), str(-24 * HOUR))


@deliveries(APACHE)  # on Tansu, too, but `make test` has to end in ten minutes
def test_clocks_that_jump_back_and_forth(
    kafka_server: KafkaServer,
    redis_server: LocalRedis,
    topics: Topics,
    start_worker: StartWorker,
    delivery: str,
) -> None:
    command = (JUMPING, *BACK_AND_FORTH)
    for _ in range(2):
        start_worker(command=command, delivery=delivery, **SETTINGS).wait_ready()
    with (
        Oracle(kafka_server.bootstrap, topics, redis_server, delivery=delivery) as oracle,
        Reader(kafka_server.bootstrap, topics.verdicts) as reader,
    ):

        def jumped() -> bool:
            reader.read()
            times = [message.timestamp for message in reader.messages[topics.verdicts]]
            return bool(times) and max(times) - min(times) > 1000 * HOUR

        # A round is over in less than a second, all of one clock: at times the next is of the same.
        for first in range(0, ROUNDS * FAMILIES, FAMILIES):
            oracle.publish(families(FAMILIES, first=first))
            oracle.wait_until_finished(SECONDS)
            if first and jumped():
                break
        until(jumped, SECONDS, "verdicts of different hours")
        assert len(oracle.judge()) == len(oracle.sent)


@pytest.mark.apache_kafka
@pytest.mark.parametrize("delivery", ["at-least-once", "exactly-once"])
def test_a_clock_hours_ahead_pauses_the_stream(
    redis_server: LocalRedis, worker_of: WorkerOf, delivery: str
) -> None:
    """The broker refuses its verdicts: nothing is lost, and all is well once it is set right."""
    require_apache_kafka()
    with LocalApacheKafka() as kafka:
        topics = fresh(kafka)
        worker = worker_of(kafka, topics, delivery=delivery, command=(JUMPING, str(2 * HOUR)))
        with Oracle(kafka.bootstrap, topics, redis_server, delivery=delivery) as oracle:
            oracle.publish(families(FAMILIES))
            until(
                lambda: sum(worker.metric(ERRORS, kind=kind) for kind in REFUSALS) > 1,
                SECONDS,
                "an error that says what is wrong",
            )
            until(lambda: not worker.get("/readyz").json()["kafka"], SECONDS, "not ready")
            assert worker.get("/livez").status_code == 200
            assert not oracle.look()
            assert worker.process is not None
            worker.process.send_signal(signal.SIGUSR1)
            oracle.wait_until_finished(SECONDS)
            oracle.judge()
        until(worker.ready, SECONDS, "ready again")
