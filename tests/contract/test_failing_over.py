"""A server that takes over without the last writes: noticed, told, nothing mixed up."""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import redis

from deploy.local import LocalRedis
from tests.contract.harness import (
    Bench,
    earliest_ids,
    job,
    maintain,
    near,
    place_all,
    resolver,
    vectors,
    verdict,
)
from tests.stream.harness import until
from worker.errors import ConfigError
from worker.index import Index
from worker.index.recent import Write

WAIT_MS = 1_000
SECONDS = 120


@dataclass
class Pair:
    """A primary and its replica, and clients that can be led from one to the other."""

    primary: LocalRedis
    replica: LocalRedis

    def __post_init__(self) -> None:
        self._clients: list[redis.Redis] = []

    def connect(self) -> redis.Redis:
        client = self.primary.client()
        self._clients.append(client)
        return client

    def synchronise(self) -> None:
        """Wait until the replica has everything."""
        client = self.primary.client()
        client.set("synchronised", time.monotonic_ns())
        until(lambda: client.wait(1, WAIT_MS) == 1, SECONDS, "a replica that has everything")

    def cut_off(self) -> None:
        """From now on what the primary acknowledges is lost in a fail-over."""
        self.replica.client().replicaof("NO", "ONE")

    def fail_over(self) -> None:
        """The primary is gone; everybody is led to the replica."""
        self.primary.kill()
        for client in self._clients:
            client.connection_pool.connection_kwargs["port"] = self.replica.port
            client.connection_pool.reset()
        self.primary, self.replica = self.replica, self.primary


@pytest.fixture
def pair() -> Iterator[Pair]:
    with LocalRedis(config={"repl-diskless-sync-delay": "0"}) as primary, LocalRedis() as replica:
        replica.client().replicaof("127.0.0.1", primary.port)
        pair = Pair(primary, replica)
        pair.synchronise()
        yield pair


@pytest.fixture
def bench(pair: Pair) -> Bench:
    return Bench(pair.connect, "default")


def settle_all(index: Index, bench: Bench, prefix: str, first: int, count: int) -> None:
    entries = [(bench.namespace, f"{prefix}-{at}", first + at, verdict()) for at in range(count)]
    assert index.settle(entries) == [verdict()] * count


def test_nothing_is_lost_and_nothing_is_read_again(pair: Pair, bench: Bench) -> None:
    index, rows = bench.index(), vectors(40)
    place_all(index, bench.arrivals("p", rows))
    pair.synchronise()
    pair.cut_off()
    pair.fail_over()
    answer = index.place([bench.arrival("copy", near(rows)[7])])[0]
    assert (answer.sequence, earliest_ids([answer])) == (41, ["p-7"])
    assert index.lost() == {}
    assert (index.stats()["server_changes"], index.stats()["lost_images"]) == (1, 0)
    bench.assert_whole()


def test_lost_writes_are_told_and_can_be_repeated(pair: Pair, bench: Bench) -> None:
    index, rows = bench.index(), vectors(30)
    kept, lost = bench.arrivals("kept", rows[:20]), bench.arrivals("lost", rows[20:])
    index.place(kept)
    settle_all(index, bench, "kept", 1, 20)
    pair.synchronise()
    pair.cut_off()
    index.place(lost)
    settle_all(index, bench, "lost", 21, 10)
    assert index.lost() == {}
    pair.fail_over()
    index.ping()
    assert index.lost() == {0: lost[0].position[1]}
    assert (index.stats()["server_changes"], index.stats()["lost_images"]) == (1, 10)
    known = index.recognise([*kept, *lost])
    assert [answer.outcome if answer else None for answer in known] == ["seen"] * 20 + [None] * 10
    assert [answer.sequence for answer in index.place(lost)] == list(range(21, 31))
    index.replaying({0: lost[0].position[1]})
    index.ping()
    assert (index.lost(), index.stats()["server_changes"]) == ({}, 1)
    bench.assert_whole()


@pytest.mark.parametrize("command", ["FLUSHALL", "DEL {default}:root"])
def test_a_namespace_that_was_emptied_is_filled_again(
    pair: Pair, bench: Bench, command: str
) -> None:
    """The same server with the same history, as after an eviction of its root key, too."""
    index, rows = bench.index(), vectors(10)
    arrivals = bench.arrivals("p", rows)
    index.place(arrivals)
    bench.store().command(*command.split())
    copy = bench.arrival("copy", near(rows)[3])
    assert earliest_ids(index.place([copy])) == [None]
    assert index.lost() == {0: arrivals[0].position[1]}
    assert (index.stats()["server_changes"], index.stats()["lost_images"]) == (1, 10)
    index.replaying(index.lost())
    assert earliest_ids(index.place(arrivals))[:5] == [None, None, None, "copy", None]
    index.ping()
    assert (index.lost(), index.stats()["server_changes"]) == ({}, 1)


def test_what_a_former_topic_held_is_not_read_again(pair: Pair, bench: Bench) -> None:
    """Its offsets mean others in the topic of now; that it is lost is counted all the same."""
    index, rows = bench.index(), vectors(20)
    index.place(bench.arrivals("kept", rows[:1]))
    pair.synchronise()
    pair.cut_off()
    former = [bench.arrival(f"f{at}", row, topic="a") for at, row in enumerate(rows[1:10])]
    latter = [bench.arrival(f"l{at}", row, topic="b") for at, row in enumerate(rows[10:])]
    index.place(former)
    index.place(latter)
    pair.fail_over()
    index.ping()
    assert index.lost() == {0: latter[0].position[1]}
    assert index.stats()["lost_images"] == 19


def test_what_was_cached_is_not_taken_for_what_grew_there_since(pair: Pair, bench: Bench) -> None:
    """As many records as before, in the same clusters, under the same sequences: others."""
    index, rows = bench.index(), vectors(120)
    place_all(index, bench.arrivals("kept", rows[:40]))
    pair.synchronise()
    pair.cut_off()
    place_all(index, bench.arrivals("lost", rows[40:80]))
    pair.fail_over()
    other = bench.index()
    place_all(other, bench.arrivals("new", rows[80:]))
    copies = near(rows[[50, 90]])
    answers = index.place(bench.arrivals("copy", copies))
    assert earliest_ids(answers) == [None, "new-10"]
    fresh = bench.index().place(bench.arrivals("again", near(rows[[50, 90]], 3)))
    assert [answer.best.sequence if answer.best else 0 for answer in fresh][1] == 51
    assert index.names(bench.namespace, [41, 80]) == {41: "new-0", 80: "new-39"}
    assert index.stats()["lost_images"] == 40
    bench.assert_whole()


def test_the_other_worker_has_lost_nothing(pair: Pair, bench: Bench) -> None:
    """What survives of a worker's last writes proves that all before them do."""
    mine, yours, rows = bench.index(), bench.index(), vectors(20)
    mine.place(bench.arrivals("mine", rows[:10]))
    pair.synchronise()
    pair.cut_off()
    yours.place(bench.arrivals("yours", rows[10:]))
    pair.fail_over()
    for index in (mine, yours):
        index.ping()
    assert (mine.lost(), yours.lost()) == ({}, {0: 11})


def test_a_verdict_for_a_lost_image_is_not_kept(pair: Pair, bench: Bench) -> None:
    index, rows = bench.index(), vectors(2)
    index.place([bench.arrival("kept", rows[0])])
    pair.synchronise()
    pair.cut_off()
    index.place([bench.arrival("lost", rows[1])])
    pair.fail_over()
    entries = [(bench.namespace, "kept", 1, verdict(1)), (bench.namespace, "lost", 2, verdict(2))]
    assert index.settle(entries) == [verdict(1), None]
    assert index.lost() == {0: 2}


def test_an_event_whose_verdict_names_what_is_lost_is_read_again(pair: Pair, bench: Bench) -> None:
    """It was lost, too: known as its event was recognised, and not as its verdict was told."""
    first, index, rows = bench.index(), bench.index(), vectors(2)
    first.place([bench.arrival("kept", rows[0])])
    pair.synchronise()
    pair.cut_off()
    first.place([bench.arrival("lost", rows[1])])
    copy = bench.arrival("copy", near(rows)[1])
    resolver(first)[0].resolve([job(copy)])
    resolve, again = resolver(index)[0], job(replace(copy, vector=None))
    resolve.recognise([again])
    pair.fail_over()
    resolve.resolve([again])
    assert (again.outcome, again.lease.lost) == (None, True)
    assert index.lost() == {0: copy.position[1]}


def test_deletes_that_are_lost_are_told_and_those_that_are_not_are_not(
    pair: Pair, bench: Bench
) -> None:
    index = bench.index()
    index.place(bench.arrivals("p", vectors(2)))
    assert index.forget(bench.namespace, "p-0", (1, 50))
    pair.synchronise()
    pair.cut_off()
    assert index.forget(bench.namespace, "p-1", (1, 51))
    pair.fail_over()
    index.ping()
    assert (index.lost(), index.stats()["lost_images"]) == ({1: 51}, 0)
    assert index.forget(bench.namespace, "p-1", (1, 51))


def test_a_lost_namespace_is_made_anew(pair: Pair, bench: Bench) -> None:
    pair.cut_off()
    index, rows = bench.index(), vectors(3)
    index.place(bench.arrivals("p", rows))
    pair.fail_over()
    assert index.place([bench.arrival("copy", near(rows)[0])])[0].sequence == 1
    assert index.lost() == {0: 1}
    bench.assert_whole()


def test_a_worker_says_when_it_may_have_forgotten_more(
    pair: Pair, bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    index = bench.index(recent_writes=5)
    pair.synchronise()
    pair.cut_off()
    index.place(bench.arrivals("p", vectors(8)))
    pair.fail_over()
    with caplog.at_level(logging.ERROR):
        index.ping()
    assert index.lost() == {0: 4}
    assert [record.__dict__["may_be_more"] for record in caplog.records] == [True]


def test_upkeep_planned_on_the_old_server_is_not_done_on_the_new(pair: Pair, bench: Bench) -> None:
    index, rows = bench.index(), vectors(60)
    index.place(bench.arrivals("p", rows[:40]))
    pair.synchronise()
    pair.cut_off()
    space = index._spaces[bench.namespace]
    contents = index._maintainer.read(space, 1)
    pair.fail_over()
    assert contents is not None and len(contents.sequences) == 40
    assert index._maintainer.read(space, 1) is None
    index.maintain()
    place_all(index, bench.arrivals("q", rows[40:]))
    assert index.stats()["splits"] > 0
    bench.assert_whole()


def test_a_namespace_that_is_lost_whole_is_noticed_by_a_delete(pair: Pair, bench: Bench) -> None:
    index = bench.index()
    pair.synchronise()
    pair.cut_off()
    index.place([bench.arrival("p", vectors(1)[0], position=(0, 4))])
    pair.fail_over()
    assert not index.forget(bench.namespace, "x", (0, 9))
    assert index.lost() == {0: 4}


def test_a_restart_that_keeps_everything_changes_nothing(redis_server: LocalRedis) -> None:
    def connect() -> redis.Redis:
        return redis_server.client()

    bench = Bench(connect, "default")
    index, rows = bench.index(), vectors(20)
    index.place(bench.arrivals("p", rows))
    redis_server.restart()
    index._store._client.connection_pool.disconnect()  # type: ignore[union-attr]
    answer = index.place([bench.arrival("copy", near(rows)[7])])[0]
    assert (answer.sequence, earliest_ids([answer])) == (21, ["p-7"])
    assert (index.lost(), index.stats()["server_changes"]) == ({}, 1)


def test_upkeep_that_is_due_on_another_server_ends(redis_server: LocalRedis) -> None:
    """And does not find the same cluster due for ever, to which its script does nothing."""
    bench = Bench(redis_server.client, "default")
    index = bench.index()
    index.place(bench.arrivals("p", vectors(40)))
    redis_server.restart()
    index._store._client.connection_pool.disconnect()  # type: ignore[union-attr]
    assert not index.maintain()
    index.ping()
    maintain(index)
    assert index.stats()["splits"] > 0
    bench.assert_whole()


def test_a_restart_that_keeps_the_last_delete_changes_nothing(redis_server: LocalRedis) -> None:
    bench = Bench(redis_server.client, "default")
    index = bench.index()
    index.place(bench.arrivals("p", vectors(3)))
    index.forget(bench.namespace, "p-1", (0, 9))
    redis_server.restart()
    index._store._client.connection_pool.disconnect()  # type: ignore[union-attr]
    index.ping()
    assert (index.lost(), index.stats()["server_changes"]) == ({}, 1)


def test_a_rebuild_that_lost_something_is_not_switched_to(pair: Pair, bench: Bench) -> None:
    bench.index().open(bench.namespace)
    building = Index(pair.connect(), "model-b", bench.settings, building=True)
    building.open(bench.namespace)
    pair.synchronise()
    pair.cut_off()
    building.place(bench.arrivals("p", vectors(3)))
    pair.fail_over()
    with pytest.raises(ConfigError, match="run the rebuild again"):
        building.switch(bench.namespace)


def test_a_write_told_after_the_new_server_was_found_is_looked_for(
    pair: Pair, bench: Bench
) -> None:
    index, rows = bench.index(), vectors(40)
    place_all(index, bench.arrivals("p", rows))
    old = index._space(bench.namespace)
    pair.synchronise()
    pair.cut_off()
    pair.fail_over()
    index.ping()
    assert index.lost() == {}
    new = index._space(bench.namespace)
    # Two threads: one had its answer from the old server, the other is at work on the new one.
    index._recent.wrote(old, [Write(bench.namespace, "late", 41, (3, 99))])
    index._recent.wrote(new, [])
    index.ping()
    index.refresh()
    index.open(bench.namespace)
    assert index.lost() == {3: 99}
