"""Redis killed, restarted, slow, cut off and full: the stream pauses, and loses nothing."""

from collections.abc import Iterator

import pytest

from deploy.local import LocalKafka, LocalRedis
from tests.conftest import Topics
from tests.faults.oracle import Oracle
from tests.faults.proxy import Proxy
from tests.faults.workload import SETTINGS, families
from tests.stream.conftest import StartWorker
from tests.stream.harness import until

FAMILIES = 20
SECONDS = 180
DELAY_SECONDS = 0.3
TIMEOUT_SECONDS = 1.0


@pytest.fixture
def proxy(redis_server: LocalRedis) -> Iterator[Proxy]:
    with Proxy(redis_server.port) as proxy:
        yield proxy


def test_killed_restarted_slow_and_cut_off(
    kafka_server: LocalKafka,
    redis_server: LocalRedis,
    topics: Topics,
    start_worker: StartWorker,
    proxy: Proxy,
) -> None:
    """One fault after the other, always in the middle of the stream."""
    worker = start_worker(
        redis_url=f"redis://127.0.0.1:{proxy.port}/0",
        redis_timeout_seconds=TIMEOUT_SECONDS,
        **SETTINGS,
    ).wait_ready()
    with Oracle(kafka_server.bootstrap, topics, redis_server) as oracle:
        oracle.publish(families(FAMILIES))
        oracle.wait_for(5, SECONDS)
        redis_server.kill()  # in the middle of whatever it does; its file has what it answered
        until(lambda: not worker.ready(), SECONDS, "not ready")
        redis_server.start()
        oracle.wait_for(oracle.outcomes + 5, SECONDS)
        redis_server.restart()
        oracle.wait_for(oracle.outcomes + 5, SECONDS)
        proxy.delay_seconds = DELAY_SECONDS  # slower, within the worker's patience
        oracle.wait_for(oracle.outcomes + 5, SECONDS)
        proxy.delay_seconds = 2 * TIMEOUT_SECONDS  # slower than that: done, but never answered
        errors = worker.metric("dedup_redis_errors_total", kind="TimeoutError")
        until(
            lambda: worker.metric("dedup_redis_errors_total", kind="TimeoutError") > errors,
            SECONDS,
            "a time-out",
        )
        proxy.delay_seconds = 0.0
        oracle.wait_for(oracle.outcomes + 5, SECONDS)
        proxy.cut()
        until(lambda: not worker.ready(), SECONDS, "not ready")
        proxy.mend()
        oracle.publish(families(FAMILIES, first=FAMILIES))
        oracle.wait_until_finished(SECONDS)
        oracle.judge()
    until(worker.ready, SECONDS, "ready again")


def test_full_it_pauses_the_stream_and_dead_letters_nothing(
    kafka_server: LocalKafka, redis_server: LocalRedis, topics: Topics, start_worker: StartWorker
) -> None:
    worker = start_worker(**SETTINGS).wait_ready()
    client = redis_server.client()
    with Oracle(kafka_server.bootstrap, topics, redis_server) as oracle:
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
        assert worker.get("/livez").status_code == 200
        assert worker.metric("dedup_inflight_events") > 0
        client.config_set("maxmemory", "0")
        oracle.wait_until_finished(SECONDS)
        found = oracle.judge()
    assert len(found) == 2 * FAMILIES * 3
