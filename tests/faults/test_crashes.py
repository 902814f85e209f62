"""Workers killed at every step of the protocol and at random, with at-least-once delivery.

What exactly-once adds is in `tests/stream/test_exactly_once.py`.
"""

import random
from pathlib import Path

from deploy.local import LocalKafka, LocalRedis
from tests.conftest import Topics
from tests.faults.conftest import deliveries
from tests.faults.oracle import Oracle, isolation
from tests.faults.workload import SETTINGS, living, mixed
from tests.photos import jpeg, scene
from tests.stream.conftest import StartWorker
from tests.stream.harness import Event, Reader, inline, publish, tombstone, until

STEPS = ("recognised", "embedded", "placed", "settled", "forgotten", "published", "committed")
FAMILIES = 30
KILLS = 4
SECONDS = 900
CRASHING = str(Path(__file__).with_name("crashing_worker.py"))


def test_killed_at_each_step_nothing_is_lost_and_no_verdict_changes(
    kafka_server: LocalKafka, redis_server: LocalRedis, topics: Topics, start_worker: StartWorker
) -> None:
    doomed = [
        start_worker(command=(CRASHING, step, str(count % 3 + 1), "SIGKILL"), **SETTINGS)
        for count, step in enumerate(STEPS)
    ]
    with Oracle(kafka_server.bootstrap, topics, redis_server) as oracle:
        oracle.feed_until_dead(doomed, SECONDS)
        start_worker(**SETTINGS)
        oracle.wait_until_finished(SECONDS)
        oracle.judge()
        assert oracle.outcomes > oracle.wanted, "no crash led to a verdict said twice"


@deliveries()
def test_killed_in_a_delete_the_image_stays_deleted(
    kafka_server: LocalKafka,
    redis_server: LocalRedis,
    topics: Topics,
    start_worker: StartWorker,
    delivery: str,
) -> None:
    """Redelivered, the add keeps its verdict and the delete is not done to what came later."""
    first, again = jpeg(scene(1)), jpeg(scene(1), 80)
    events: list[Event] = [
        inline("a", first, partition=0),
        tombstone("a", partition=0),
        inline("b", again, partition=0),
    ]
    wanted = {"delivery": delivery, **SETTINGS}
    doomed = start_worker(command=(CRASHING, "forgotten", "1", "SIGKILL"), **wanted)
    publish(kafka_server.bootstrap, topics.images, events)
    until(lambda: not doomed.running, SECONDS, "dead")
    start_worker(**wanted)
    with Reader(kafka_server.bootstrap, topics.verdicts, isolation=isolation(delivery)) as reader:
        verdicts = reader.messages[topics.verdicts]
        reader.wait(lambda: any(m.key == b"b" for m in verdicts), SECONDS, "both verdicts")
        kinds = [(v["image_id"], v["verdict"]) for v in reader.verdicts(topics.verdicts)]
    assert set(kinds) == {("a", "unique"), ("b", "unique")}
    assert delivery == "at-least-once" or len(kinds) == 2


def test_killed_at_random_under_load(
    kafka_server: LocalKafka, redis_server: LocalRedis, topics: Topics, start_worker: StartWorker
) -> None:
    chance = random.Random(6)
    workers = [start_worker(**SETTINGS) for _ in range(2)]
    with Oracle(kafka_server.bootstrap, topics, redis_server) as oracle:
        oracle.publish(mixed(FAMILIES))
        for _ in range(KILLS):
            oracle.wait_for(oracle.outcomes + chance.randint(1, FAMILIES // 2), SECONDS)
            victim = chance.choice(workers)
            victim.kill()
            victim.start()
        oracle.wait_until_finished(SECONDS)
        assert oracle.judge().keys() == living(oracle.sent.values()).keys()
