"""Redis killed, restarted, slow, cut off and full: the stream pauses, and loses nothing."""

import itertools
from collections.abc import Iterator

import pytest

from deploy.local import LocalKafka, LocalRedis
from tests.conftest import Topics
from tests.faults.conftest import deliveries
from tests.faults.oracle import Oracle
from tests.faults.proxy import Proxy
from tests.faults.workload import SETTINGS, families, living, mixed
from tests.stream.conftest import StartWorker
from tests.stream.harness import Event, until

FAMILIES = 8
SECONDS = 600
DELAY_SECONDS = 0.3
TIMEOUT_SECONDS = 2.0


@pytest.fixture
def proxy(redis_server: LocalRedis) -> Iterator[Proxy]:
    with Proxy(redis_server.port) as proxy:
        yield proxy


@deliveries()
def test_killed_restarted_slow_and_cut_off(
    kafka_server: LocalKafka,
    redis_server: LocalRedis,
    topics: Topics,
    start_worker: StartWorker,
    proxy: Proxy,
    *,
    delivery: str,
) -> None:
    """One fault after the other, always in the middle of the stream."""
    worker = start_worker(
        redis_url=f"redis://127.0.0.1:{proxy.port}/0",
        redis_timeout_seconds=TIMEOUT_SECONDS,
        delivery=delivery,
        **SETTINGS,
    ).wait_ready()
    supply = itertools.count(0, FAMILIES)

    def more() -> list[Event]:
        return mixed(FAMILIES, first=next(supply))

    with Oracle(kafka_server.bootstrap, topics, redis_server, delivery=delivery) as oracle:
        # Each fault gets events of its own, published when it begins: however fast the worker is,
        # there is work to disturb.
        oracle.publish(more())
        redis_server.kill()  # in the middle of whatever it does; its file has what it answered
        until(lambda: not worker.ready(), SECONDS, "not ready")
        redis_server.start()
        oracle.wait_until_finished(SECONDS)
        oracle.publish(more())
        redis_server.restart()
        oracle.wait_until_finished(SECONDS)
        proxy.delay_seconds = DELAY_SECONDS  # slower, within the worker's patience
        oracle.publish(more())
        oracle.wait_for(oracle.outcomes + 1, SECONDS)
        errors = worker.metric("dedup_redis_errors_total", kind="TimeoutError")
        proxy.delay_seconds = 2 * TIMEOUT_SECONDS  # slower than that: done, but never answered
        oracle.publish(more())
        until(
            lambda: worker.metric("dedup_redis_errors_total", kind="TimeoutError") > errors,
            SECONDS,
            "a time-out",
        )
        proxy.delay_seconds = 0.0
        oracle.wait_until_finished(SECONDS)
        oracle.publish(more())
        proxy.cut()
        until(lambda: not worker.ready(), SECONDS, "not ready")
        proxy.mend()
        oracle.wait_until_finished(SECONDS)
        assert oracle.judge().keys() == living(oracle.sent.values()).keys()
    until(worker.ready, SECONDS, "ready again")


@deliveries()
def test_full_it_pauses_the_stream_and_dead_letters_nothing(
    kafka_server: LocalKafka,
    redis_server: LocalRedis,
    topics: Topics,
    start_worker: StartWorker,
    delivery: str,
) -> None:
    worker = start_worker(delivery=delivery, **SETTINGS).wait_ready()
    client = redis_server.client()
    with Oracle(kafka_server.bootstrap, topics, redis_server, delivery=delivery) as oracle:
        oracle.publish(families(FAMILIES))
        oracle.wait_for(5, SECONDS)
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", "1mb")  # less than it holds by now
        oracle.publish(families(FAMILIES, first=FAMILIES))
        until(
            lambda: worker.metric("dedup_redis_errors_total", kind="OutOfMemoryError") > 0,
            SECONDS,
            "an error that says what is wrong",
        )
        until(lambda: not worker.get("/readyz").json()["redis"], SECONDS, "not ready")
        assert worker.get("/livez").status_code == 200
        assert worker.metric("dedup_inflight_events") > 0
        client.config_set("maxmemory", "0")
        oracle.wait_until_finished(SECONDS)
        found = oracle.judge()
    until(worker.ready, SECONDS, "ready again")
    assert len(found) == 2 * FAMILIES * 3
