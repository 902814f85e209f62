"""A worker whose partition is another's by now stores and forgets nothing more."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from deploy.local import LocalRedis
from tests.contract.harness import Bench, job, near, resolver, vectors
from tests.faults.proxy import Proxy
from tests.stream.harness import until
from worker import retrying
from worker.messages import ImageEvent, Op

SECONDS = 60


@pytest.fixture
def proxy(single: LocalRedis) -> Iterator[Proxy]:
    with Proxy(single.port) as proxy:
        yield proxy


@pytest.mark.parametrize("op", [Op.ADD, Op.DELETE])
def test_what_waits_for_redis_is_dropped_once_its_partition_is_lost(
    proxy: Proxy, op: Op, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its next owner may have been told to forget the image; of that nothing may be left."""
    monkeypatch.setattr(retrying, "PAUSE_SECONDS", (2.0, 2.0))  # in which all happens
    once = Retry(NoBackoff(), 0)
    bench = Bench(lambda: redis.Redis(port=proxy.port, retry=once), f"lost while away {op}")
    index, (row,) = bench.index(), vectors(1)
    index.open(bench.namespace)
    if op is Op.DELETE:
        index.place([bench.arrival("x", row)])
    waiting = job(bench.arrival("x", row if op is Op.ADD else None))
    waiting.event = ImageEvent("x", op, bench.namespace)
    resolving, persist = resolver(index)
    with ThreadPoolExecutor(1) as thread:
        proxy.cut()
        resolved = thread.submit(resolving.resolve, [waiting])
        until(lambda: persist.trouble is not None, SECONDS, "Redis is away")
        waiting.lease.lost = True
        proxy.mend()
        resolved.result(SECONDS)
    assert (waiting.answer, waiting.outcome) == (None, None)
    (copy,) = index.place([bench.arrival("y", near(row[None])[0])])
    assert (copy.earliest is not None) == (op is Op.DELETE)
