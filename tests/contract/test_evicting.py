"""A Redis that may remove keys where it is full: it is told of, and so is what is missing then."""

import numpy as np
import pytest

from deploy.local import LocalRedis
from tests.contract.harness import Bench, maintain, near, place_all, vectors
from worker.errors import InfrastructureError
from worker.index.cache import LAYOUT
from worker.index.keys import CLUSTER, RECORD, State


def test_a_server_that_may_evict_is_warned_of_once(
    redis_server: LocalRedis, caplog: pytest.LogCaptureFixture
) -> None:
    """Only where a limit is set, and keys are removed instead of writes refused at it."""
    client, names = redis_server.client(), iter("abcdef")

    def warned() -> list[str]:
        caplog.clear()
        bench = Bench(redis_server.client, next(names))
        bench.index().place(bench.arrivals("p", vectors(2)))
        return [vars(each)["maxmemory_policy"] for each in caplog.records]

    client.config_set("maxmemory-policy", "allkeys-lru")
    assert warned() == []
    client.config_set("maxmemory", "1gb")
    assert warned() == ["allkeys-lru"]
    assert "set maxmemory-policy noeviction" in caplog.text
    assert warned() == []
    client.config_set("maxmemory-policy", "volatile-ttl")
    assert warned() == ["volatile-ttl"]
    client.config_set("maxmemory-policy", "noeviction")
    assert warned() == []


def test_a_match_without_a_name_says_that_the_index_is_damaged(bench: Bench) -> None:
    """The worker, which stored neither, pauses and tells: nothing it is given is at fault."""
    index, rows = bench.index(), vectors(2)
    bench.index().place(bench.arrivals("p", rows))
    key, first = bench.keys().record(2)
    bench.store().command("HDEL", key, first + 1)
    copies = near(rows)
    assert index.place([bench.arrival("c", copies[0])])[0].outcome == "placed"
    for _ in range(2):
        with pytest.raises(InfrastructureError, match=r"index is damaged.*`python -m worker fsck`"):
            index.place([bench.arrival("d", copies[1])])


DAMAGED = r"index is damaged: records of cluster 1 are missing; see `python -m worker fsck`"


@pytest.mark.parametrize("lost", ["all", "one"])
def test_records_that_are_missing_say_that_the_index_is_damaged(bench: Bench, lost: str) -> None:
    """To a worker that knows none of the cluster's, and to one that lacks the last of them."""
    warm, rows = bench.index(), vectors(80)
    warm.place(bench.arrivals("a", rows[:60]))
    bench.index(cluster_limit=512).place(bench.arrivals("b", rows[60:70]))
    store, chunk = bench.store(), bench.keys().chunk(1, 1)
    if lost == "all":
        store.command("DEL", chunk)
    else:
        store.command("SET", chunk, store.command("GETRANGE", chunk, 0, 9 * RECORD - 1))
    for index in (warm, bench.index()):
        with pytest.raises(InfrastructureError, match=DAMAGED):
            index.place([bench.arrival(f"c-{lost}", rows[70], store=False)])


@pytest.mark.parametrize("retire", [0, 1])
def test_records_of_an_image_that_is_missing_are_not_moved(bench: Bench, retire: int) -> None:
    """Nor any other of the plan: everything is read before anything is written."""
    place_all(bench.index(cluster_limit=32), bench.arrivals("p", vectors(100)))
    store, keys = bench.store(), bench.keys()
    states = store.command("HGETALL", keys.clusters)
    source, target = sorted(states, key=lambda name: -State.unpack(states[name]).live)[:2]
    state, cluster = State.unpack(states[source]), CLUSTER.unpack(source)[0]
    store.command("SET", keys.lock(cluster), "token")
    records = np.frombuffer(store.command("GET", keys.chunk(cluster, 0)), LAYOUT)
    key, first = keys.record(int(records["sequence"].max()))
    store.command("HDEL", key, first)
    before = contents(bench)
    outputs, plan = target + bytes(128), b"\x01" * state.length
    arguments = (source, state.epoch, "token", retire, outputs, plan, 256, 1024, 64)
    with pytest.raises(InfrastructureError, match="an image that is missing; see `python -m"):
        store.script("rehome", keys, *arguments)
    assert contents(bench) == before


def test_upkeep_of_a_damaged_namespace_holds_up_no_other(bench: Bench) -> None:
    """What is wrong with it is raised once the others have nothing left to do."""
    other, index, rows = Bench(bench.connect, f"{bench.namespace} too"), bench.index(), vectors(40)
    for each in (bench, other):
        index.place(each.arrivals("p", rows))
    assert index.namespaces() == [bench.namespace, other.namespace]
    key, first = bench.keys().record(3)
    bench.store().command("HDEL", key, first)
    with pytest.raises(InfrastructureError, match="an image that is missing; see `python -m"):
        maintain(index)
    assert index.stats()["splits"] > 0
    assert not other.store().command("SCARD", other.keys().due)
    other.assert_whole()


def contents(bench: Bench) -> dict[str, bytes]:
    """Everything the namespace keeps."""
    store = bench.store()
    names = sorted(key.decode() for page in store.pages(bench.keys().prefix) for key in page)
    return dict(zip(names, store.commands([("DUMP", name) for name in names]), strict=True))
