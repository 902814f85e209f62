"""A worker whose partition is another's by now stores and forgets nothing more."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis

from deploy.local import LocalRedis
from tests.contract.harness import MODEL, Bench, near, vectors
from tests.faults.proxy import Proxy
from tests.stream.harness import until
from worker.jobs import Job, Lease
from worker.messages import ImageEvent, Op, Record
from worker.metrics import Metrics
from worker.resolving import Resolver
from worker.retrying import Persistence

SECONDS = 60


@pytest.fixture
def proxy(single: LocalRedis) -> Iterator[Proxy]:
    with Proxy(single.port) as proxy:
        yield proxy


@pytest.mark.parametrize("op", [Op.ADD, Op.DELETE])
def test_what_waits_for_redis_is_dropped_once_its_partition_is_lost(
    single: LocalRedis, proxy: Proxy, op: Op
) -> None:
    """Its next owner may have been told to forget the image; of that nothing may be left."""
    bench = Bench(lambda: redis.Redis(port=proxy.port), f"lost while away {op}")
    index, metrics = bench.index(), Metrics()
    index.open(bench.namespace)
    if op is Op.DELETE:
        index.place([bench.arrival("x", vectors(1)[0])])
    persist = Persistence("index", metrics.redis_errors)
    resolver = Resolver(
        index=index,
        persist=persist,
        metrics=metrics,
        model_id=MODEL,
        threshold=0.8,
        on_step=lambda step: None,
    )
    job = Job(
        Record("images", 0, 10, 0, b"x", b"x"),
        Lease(("images", 0)),
        event=ImageEvent("x", op, bench.namespace),
        sha256=hashlib.sha256(b"x").digest(),
        vector=vectors(1)[0] if op is Op.ADD else None,
    )
    with ThreadPoolExecutor(1) as thread:
        proxy.cut()
        resolving = thread.submit(resolver.resolve, [job])
        until(lambda: persist.trouble is not None, SECONDS, "Redis is away")
        job.lease.lost = True
        proxy.mend()
        resolving.result(SECONDS)
    assert (job.answer, job.outcome) == (None, None)
    (copy,) = index.place([bench.arrival("y", near(vectors(1))[0])])
    assert (copy.earliest is not None) == (op is Op.DELETE)
