"""With exactly-once, who reads committed verdicts sees each event once, whatever happened.

On Apache Kafka only: Tansu shows aborted transactions and fences nobody.
"""

import random
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaProducer

from deploy.apache_kafka import LocalApacheKafka
from deploy.local import LocalRedis
from tests.conftest import Topics
from tests.faults.oracle import Oracle
from tests.faults.workload import SETTINGS, families, mixed
from tests.stream.conftest import StartWorker
from tests.stream.harness import Reader, Worker, until

pytestmark = pytest.mark.apache_kafka

STEPS = ("recognised", "placed", "settled", "forgotten", "transacted", "published")
FAMILIES = 30
KILLS = 4
SECONDS = 600
SESSION_SECONDS, TRANSACTION_SECONDS = 3, 5
CRASHING = str(Path(__file__).parents[1] / "faults" / "crashing_worker.py")


@pytest.fixture(params=[pytest.param("apache", id="apache")], scope="session")
def kafka_server(request: pytest.FixtureRequest) -> Iterator[LocalApacheKafka]:
    """Apache Kafka, in place of every broker."""
    from tests.conftest import require_apache_kafka

    require_apache_kafka()
    with LocalApacheKafka() as server:
        yield server


class Run:
    """Workers with exactly-once, and the oracle that judges them."""

    def __init__(self, start_worker: StartWorker, oracle: Oracle) -> None:
        self._start_worker = start_worker
        self.oracle = oracle

    def worker(self, *fault: str, **settings: Any) -> Worker:
        """Start one; `fault` is (step, count, signal)."""
        command = (CRASHING, *fault) if fault else ("-m", "worker")
        wanted = {
            "delivery": "exactly-once",
            "session_timeout_seconds": SESSION_SECONDS,
            "transaction_timeout_seconds": TRANSACTION_SECONDS,
            **SETTINGS,
            **settings,
        }
        return self._start_worker(command=command, **wanted)

    def judged_once(self) -> bool:
        """Whether each event has one message; raises, as `Oracle.judge` does, for any rule."""
        self.oracle.judge()
        return self.oracle.outcomes == self.oracle.wanted

    def frozen(self, *fault: str, **settings: Any) -> Worker:
        """Start a worker that stops at a step, and wait until it has."""
        worker = self.worker(*fault, "SIGSTOP", **settings)
        until(lambda: stopped(worker), SECONDS, "frozen")
        return worker


@pytest.fixture
def run(
    kafka_server: LocalApacheKafka,
    redis_server: LocalRedis,
    topics: Topics,
    start_worker: StartWorker,
) -> Iterator[Run]:
    with ExitStack() as stack:
        oracle = Oracle(kafka_server.bootstrap, topics, redis_server, delivery="exactly-once")
        yield Run(start_worker, stack.enter_context(oracle))


def stopped(worker: Worker) -> bool:
    assert worker.process is not None
    state = Path(f"/proc/{worker.process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    assert state != "Z", "the worker died"
    return state == "T"


def wake(worker: Worker) -> None:
    assert worker.process is not None
    worker.process.send_signal(signal.SIGCONT)


def wait_for_aborted(kafka: LocalApacheKafka, topics: Topics, committed: int) -> None:
    """Wait for an outcome that only a reader of uncommitted messages sees."""
    with Reader(kafka.bootstrap, topics.verdicts) as reader:
        messages = reader.messages[topics.verdicts]
        reader.wait(lambda: len(messages) > committed, SECONDS, "a transaction cut short")


def test_killed_at_each_step(run: Run, kafka_server: LocalApacheKafka, topics: Topics) -> None:
    doomed = [run.worker(step, str(count % 3 + 1), "SIGKILL") for count, step in enumerate(STEPS)]
    run.oracle.feed_until_dead(doomed, SECONDS)
    run.worker()
    run.oracle.wait_until_finished(SECONDS)
    assert run.judged_once()
    wait_for_aborted(kafka_server, topics, run.oracle.outcomes)


def test_killed_at_random_under_load(run: Run) -> None:
    chance = random.Random(8)
    workers = [run.worker() for _ in range(2)]
    run.oracle.publish(mixed(FAMILIES))
    for _ in range(KILLS):
        run.oracle.wait_for(run.oracle.outcomes + chance.randint(1, FAMILIES // 2), SECONDS)
        victim = chance.choice(workers)
        victim.kill()
        victim.start()
    run.oracle.wait_until_finished(SECONDS)
    assert run.judged_once()


@pytest.mark.parametrize("step", ["settled", "transacted"])
def test_a_zombie_is_fenced(run: Run, step: str) -> None:
    """Frozen until another worker has done its work, it wakes up and finishes what it began."""
    run.oracle.publish(families(FAMILIES))
    zombie = run.frozen(step, "2")
    run.worker()
    run.oracle.wait_until_finished(SECONDS)
    wake(zombie)
    until(zombie.ready, SECONDS, "the zombie a member again")
    run.oracle.publish(families(FAMILIES, first=FAMILIES))
    run.oracle.wait_until_finished(SECONDS)
    assert run.judged_once()
    messages = {line["message"] for line in zombie.lines()}
    assert "publishing failed, retrying" in messages or step == "settled"


def test_a_sleeper_that_wakes_in_time_commits_and_nobody_repeats_it(run: Run) -> None:
    """Its membership is gone but its transaction is not: the next owner waits for the outcome."""
    run.oracle.publish(families(FAMILIES))
    sleeper = run.frozen("transacted", "2", transaction_timeout_seconds=SECONDS)
    heir = run.worker()
    until(lambda: owns_everything(heir), SECONDS, "the heir owns every partition")
    wake(sleeper)
    run.oracle.wait_until_finished(SECONDS)
    assert run.judged_once()


def test_events_of_an_aborted_transaction_are_none(
    run: Run, kafka_server: LocalApacheKafka, topics: Topics
) -> None:
    producer = KafkaProducer(
        bootstrap_servers=kafka_server.bootstrap, transactional_id=f"{topics.group}-shop"
    )
    producer.init_transactions()
    producer.begin_transaction()
    for event in families(2, first=FAMILIES):
        producer.send(topics.images, event.value, key=event.key.encode(), headers=event.headers)
    producer.flush()
    producer.abort_transaction()
    producer.close()
    run.worker()
    run.oracle.publish(families(2))
    run.oracle.wait_until_finished(SECONDS)
    assert run.judged_once()


def owns_everything(worker: Worker) -> bool:
    moves = [line for line in worker.lines() if "held" in line]
    return bool(moves) and len(moves[-1]["held"]) == 4
