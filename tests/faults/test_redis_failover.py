"""Redis fails over to a replica that lacks the last writes: detected, counted, read again."""

from collections.abc import Iterator
from typing import NamedTuple

import pytest

from deploy.local import LocalKafka, LocalRedis
from tests.conftest import Topics
from tests.faults.oracle import Oracle
from tests.faults.proxy import Proxy
from tests.faults.workload import SETTINGS, families
from tests.stream.conftest import StartWorker
from tests.stream.harness import Worker, until

FAMILIES = 8
SECONDS = 180
WAIT_MS = 10_000


class Standby(NamedTuple):
    """A primary, its replica, and where the workers believe Redis to be."""

    primary: LocalRedis
    replica: LocalRedis
    proxy: Proxy

    @property
    def address(self) -> str:
        return f"redis://127.0.0.1:{self.proxy.port}/0"

    def cut_off(self) -> None:
        """Let the replica have everything, and nothing from here on."""
        assert self.primary.client().wait(1, WAIT_MS) == 1
        self.replica.client().replicaof("NO", "ONE")

    def fail_over(self) -> None:
        """The primary is gone; the replica is in its place."""
        self.primary.kill()
        self.proxy.redirect(self.replica.port)


@pytest.fixture
def standby(redis_server: LocalRedis) -> Iterator[Standby]:
    redis_server.client().config_set("repl-diskless-sync-delay", 0)
    with LocalRedis() as replica, Proxy(redis_server.port) as proxy:
        replica.client().replicaof("127.0.0.1", redis_server.port)
        yield Standby(redis_server, replica, proxy)


def total(workers: list[Worker], name: str) -> float:
    return sum(worker.metric(name) for worker in workers)


@pytest.mark.parametrize("at_work", [True, False], ids=["at work", "idle"])
def test_lost_writes_are_read_again(
    kafka_server: LocalKafka,
    standby: Standby,
    topics: Topics,
    start_worker: StartWorker,
    *,
    at_work: bool,
) -> None:
    workers = [start_worker(redis_url=standby.address, **SETTINGS).wait_ready() for _ in range(2)]
    with Oracle(kafka_server.bootstrap, topics, standby.replica, losing=True) as oracle:
        oracle.publish(families(FAMILIES))
        oracle.wait_until_finished(SECONDS)
        standby.cut_off()
        late = oracle.publish(families(FAMILIES, first=FAMILIES))
        if at_work:  # of the late ones: a verdict said twice proves no write that is lost
            oracle.wait_for_answers(late, 5, SECONDS)
        else:
            oracle.wait_until_finished(SECONDS)
        assert len(oracle.stored_ids()) == 3 * FAMILIES
        standby.fail_over()
        until(lambda: total(workers, "dedup_lost_images_total") > 0, SECONDS, "loss noticed")
        sent = {event.key for event in oracle.sent.values()}
        until(lambda: oracle.stored_ids() == sent, SECONDS, "everything stored again")
        oracle.wait_until_finished(SECONDS)
        assert len(oracle.judge()) == 2 * 3 * FAMILIES
        assert total(workers, "dedup_replays_total") > 0
