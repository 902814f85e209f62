"""A worker that dies at any step of upkeep leaves nothing broken, nor does a full server."""

import numpy as np
import pytest
import redis

from deploy.local import LocalRedis
from tests.contract.harness import Bench, earliest_ids, near, place_all, vectors
from tests.stream.harness import until
from worker.errors import InfrastructureError
from worker.index import Index
from worker.index.keys import CLUSTER

STEPS = (
    "locked",
    "planned",
    "swapped",
    "attract: locked",
    "attract: moved",
    "tidy: locked",
    "tidy: moved",
)


LOCK_SECONDS = 300  # longer than any pause of a busy machine


class Killed(BaseException):
    """What stands for SIGKILL: nothing catches it, nothing is cleaned up."""


def die_at(index: Index, step: str, after: int = 0) -> None:
    """Have the index's upkeep end at a step, the `after`-th time it comes there."""
    left = [after]

    def reached(name: str) -> None:
        if name == step:
            left[0] -= 1
            if left[0] < 0:
                raise Killed(step)

    vars(vars(index)["_maintainer"])["_step"] = reached


def run_out_of_time(bench: Bench) -> None:
    """Let the locks end by themselves, as they would, but at once."""
    store = bench.store()
    locks = [key for page in store.pages(bench.keys().prefix + "lock:") for key in page]
    for lock in locks:
        assert 0 < store.command("PTTL", lock) <= 1000 * LOCK_SECONDS
        store.command("PEXPIRE", lock, 1)
    until(lambda: not any(store.command("EXISTS", lock) for lock in locks), 60, "no locks")


@pytest.mark.parametrize("step", STEPS)
def test_a_death_in_a_split_leaves_nothing_broken(bench: Bench, step: str) -> None:
    # Upkeep picks among due clusters at random; a crowd of near-copies makes one split for sure.
    rows = np.concatenate([vectors(250), near(vectors(1).repeat(50, axis=0))])
    index, doomed = bench.index(), bench.index(lock_seconds=LOCK_SECONDS)
    place_all(index, bench.arrivals("p", rows[:250]))
    index.place(bench.arrivals("q", rows[250:]))
    doomed.open(bench.namespace)
    die_at(doomed, step)
    with pytest.raises(Killed):
        while doomed.maintain():
            pass
    bench.assert_whole()
    found = bench.index().place(
        [bench.arrival(f"c{at}", row, store=False) for at, row in enumerate(near(rows))]
    )
    assert None not in earliest_ids(found)
    survivor = bench.index()
    survivor.open(bench.namespace)
    run_out_of_time(bench)
    store, due = bench.store(), bench.keys().due
    until(lambda: not survivor.maintain() and not store.command("SCARD", due), 300, "all done")
    bench.assert_whole()


def test_a_worker_that_lost_its_lock_cannot_swap(bench: Bench) -> None:
    index, slow = bench.index(), bench.index()
    index.place(bench.arrivals("p", vectors(40)))
    slow.open(bench.namespace)
    store, keys = bench.store(), bench.keys()

    def lose_the_lock(name: str) -> None:
        if name == "planned":
            store.command("DEL", keys.lock(1))

    vars(vars(slow)["_maintainer"])["_step"] = lose_the_lock
    assert not slow.maintain()
    assert slow.stats()["splits"] == 0
    assert index.maintain()
    bench.assert_whole()


def test_records_appended_while_a_split_is_planned_are_not_lost(bench: Bench) -> None:
    index, other, rows = bench.index(), bench.index(), vectors(60)
    index.place(bench.arrivals("p", rows[:40]))
    other.open(bench.namespace)
    late = bench.arrivals("late", rows[40:])

    def insert(name: str) -> None:
        if name == "planned" and late:
            index.place([late.pop()])

    vars(vars(other)["_maintainer"])["_step"] = insert
    while other.maintain():
        pass
    assert other.stats()["splits"] >= 1
    bench.assert_whole()


def test_an_image_that_comes_to_a_dead_cluster_as_it_is_merged_away_is_not_lost(
    bench: Bench,
) -> None:
    """Where nothing lived, the plan names no cluster that takes anything."""
    index, other = bench.index(), bench.index()
    place_all(index, bench.arrivals("p", vectors(100)))
    other.open(bench.namespace)
    space = other._spaces[bench.namespace]
    dying, *_ = space.table.clusters()
    contents = other._maintainer.read(space, dying)
    assert contents is not None
    for sequence in contents.sequences[contents.living]:
        name = index.names(bench.namespace, [int(sequence)])[int(sequence)]
        assert index.forget(bench.namespace, name, bench.arrival("-").position)
    centroid = space.table.centroid(dying)
    late = [bench.arrival("late", centroid)]

    def insert(name: str) -> None:
        if name == "planned" and late:
            index.place([late.pop()])

    vars(vars(other)["_maintainer"])["_step"] = insert
    assert other.maintain()
    assert (late, dying in space.table) == ([], False)
    found = index.place([bench.arrival("copy", centroid, store=False)])
    assert earliest_ids(found) == ["late"]
    bench.assert_whole()


@pytest.mark.parametrize("step", STEPS)
def test_a_call_of_redis_that_fails_in_a_split_leaves_no_lock(bench: Bench, step: str) -> None:
    """Only of a worker that died has anybody to wait for the end of a lock's life."""
    index, rows = bench.index(tidy_clusters=1000), vectors(400)

    def fail(name: str) -> None:
        if name == step:
            raise InfrastructureError("Redis: Timeout reading from socket")

    place_all(index, bench.arrivals("p", rows))
    vars(vars(index)["_maintainer"])["_step"] = fail
    more = bench.arrivals("q", vectors(400, seed=1))
    with pytest.raises(InfrastructureError, match="Timeout"):
        place_all(index, more)
    assert [*bench.store().pages(bench.keys().prefix + "lock:")] == []
    vars(vars(index)["_maintainer"])["_step"] = lambda name: None
    place_all(index, more)
    bench.assert_whole()


@pytest.mark.parametrize("tidied", [0, 1000])
def test_a_lock_whose_answer_was_lost_is_had(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tidied: int
) -> None:
    """redis-py asks again, and is refused what the first try was given."""
    index = bench.index(tidy_clusters=tidied)
    place_all(index, bench.arrivals("p", vectors(20)))
    for at in range(200):
        index.place([bench.arrival(f"q{at}", vectors(1, seed=at)[0])])
    store, keys = bench.store(), bench.keys()
    monkeypatch.setattr("secrets.token_hex", lambda _: "mine")
    for cluster in store.command("HKEYS", keys.clusters):
        store.command("SET", keys.lock(CLUSTER.unpack(cluster)[0]), "mine", "PX", 600_000)
    before = store.command("HLEN", keys.clusters)
    while index.maintain():
        pass
    assert store.command("HLEN", keys.clusters) > before
    assert store.command("SCARD", keys.due) == 0
    bench.assert_whole()


def test_a_full_server_stops_inserts_whole() -> None:
    with LocalRedis(config={"maxmemory": "2mb", "maxmemory-policy": "noeviction"}) as small:
        bench = Bench(small.client, "full")
        index, rows = bench.index(cluster_limit=256, probes=4), vectors(8000)
        arrivals = bench.arrivals("p", rows)
        placed = 0
        with pytest.raises(InfrastructureError, match="maxmemory"):
            while placed < len(arrivals):
                index.place(arrivals[placed : placed + 16])
                placed += 16
        assert 0 < placed < len(arrivals)
        small.client().config_set("maxmemory", "64mb")
        answers = index.place(arrivals[placed : placed + 16])
        # Some of the batch may have found room before; each has its sequence, whichever it is.
        sequences = {answer.sequence for answer in answers}
        assert sequences == set(range(placed + 1, placed + 17))
        bench.assert_whole()


def test_a_server_that_is_away_is_an_infrastructure_error() -> None:
    with LocalRedis() as server:
        bench = Bench(lambda: redis.Redis(port=server.port, socket_timeout=30), "away")
        index, arrival = bench.index(), bench.arrival("a", vectors(1)[0])
        index.place([arrival])
        server.kill()
        for call in (index.ping, lambda: index.place([arrival]), index.maintain):
            with pytest.raises(InfrastructureError):
                call()


def test_a_restarted_server_goes_on_where_it_was() -> None:
    with LocalRedis(aof=True) as server:
        bench = Bench(server.client, "restarted")
        index, rows = bench.index(), vectors(40)
        index.place(bench.arrivals("p", rows))
        server.kill()
        server.start()
        answer = index.place([bench.arrival("c", near(rows)[0])])[0]
        assert (answer.sequence, earliest_ids([answer])) == (41, ["p-0"])
        bench.assert_whole()


def test_a_server_that_lost_its_data_starts_over() -> None:
    with LocalRedis() as server:
        bench = Bench(server.client, "lost")
        index, rows = bench.index(), vectors(40)
        index.place(bench.arrivals("p", rows))
        server.kill()
        server.start()
        answer = index.place([bench.arrival("c", near(rows)[0])])[0]
        assert (answer.sequence, answer.earliest) == (1, None)
        bench.assert_whole()
