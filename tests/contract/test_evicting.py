"""A Redis that may remove keys where it is full: it is told of, and so is what is missing then."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from deploy.local import LocalRedis
from tests.contract.harness import Bench, job, maintain, near, place_all, resolver, vectors
from tests.stream.harness import until
from worker.errors import InfrastructureError
from worker.index.cache import LAYOUT
from worker.index.fsck import check
from worker.index.keys import CLUSTER, RECORD, State, digest
from worker.messages import Verdict

SECONDS = 60.0


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


def test_a_match_whose_name_is_no_text_says_so(bench: Bench) -> None:
    index, rows = bench.index(), vectors(1)
    bench.index().place(bench.arrivals("p", rows))
    write(bench, 1, 1, b"\xff")
    with pytest.raises(InfrastructureError, match=NO_TEXT.format(1)):
        index.place([bench.arrival("c", near(rows)[0])])


def test_a_count_of_records_that_is_damaged_holds_up_nobody(bench: Bench) -> None:
    """One wrong bit: the script would look for two thousand million records."""
    index, rows = bench.index(), vectors(3)
    bench.index().place(bench.arrivals("p", rows[:2]))
    damaged = State(1, 2 + (1 << 31), 2)
    bench.store().command("HSET", bench.keys().clusters, CLUSTER.pack(1), damaged.pack())
    began = bench.sequences()
    with pytest.raises(InfrastructureError, match=DAMAGED):
        index.place([bench.arrival("c", rows[2])])
    assert bench.sequences() == began
    assert any("records" in line for line in check(bench.store(), bench.namespace))


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


def lack(bench: Bench, sequence: int, which: int) -> None:
    """Take the record (0) or the id (1) of a sequence away."""
    key, first = bench.keys().record(sequence)
    assert bench.store().command("HDEL", key, first + which)


def lack_the_way(bench: Bench) -> None:
    """An id's first life is gone, and was remembered by no version."""
    lack(bench, 1, 0)
    assert bench.store().command("DEL", bench.keys().past(digest("twice")))


NO_RECORD = "index is damaged: sequence {} has no record; see `python -m worker fsck`"
NO_ID = "index is damaged: sequence {} has no id; see `python -m worker fsck`"
NO_TEXT = "index is damaged: the id of sequence {} is no text; see `python -m worker fsck`"
NO_COUNT = "index is damaged: nothing tells how many images there are; see `python -m worker fsck`"


def write(bench: Bench, sequence: int, which: int, value: bytes) -> None:
    """Overwrite one field of a sequence."""
    key, first = bench.keys().record(sequence)
    bench.store().command("HSET", key, first + which, value)


def lose_count(bench: Bench) -> None:
    """Without it sequences would be handed out that are others' already."""
    bench.store().command("HDEL", bench.keys().meta, "sequence")


@pytest.mark.parametrize(
    ("breaking", "asking", "said"),
    [
        (lambda bench: lack(bench, 3, 1), "add copy", NO_ID.format(3)),
        (lambda bench: lack(bench, 3, 1), "check copy", NO_ID.format(3)),
        (lambda bench: lack(bench, 3, 1), "add heir", NO_ID.format(3)),
        (lambda bench: lack(bench, 3, 1), "add original", NO_ID.format(3)),
        (lambda bench: write(bench, 3, 1, b"\xff"), "check copy", NO_TEXT.format(3)),
        (lose_count, "add original", NO_COUNT),
        (lose_count, "delete original", NO_COUNT),
        (lambda bench: lack(bench, 3, 0), "add original", NO_RECORD.format(3)),
        (lambda bench: lack(bench, 3, 0), "delete original", NO_RECORD.format(3)),
        (lambda bench: lack(bench, 4, 0), "delete original", NO_RECORD.format(4)),
        (lambda bench: lack(bench, 1, 0), "add twice", NO_RECORD.format(1)),
        (lack_the_way, "add twice", NO_RECORD.format(1)),
        (lack_the_way, "delete twice", NO_RECORD.format(1)),
        (
            lambda bench: bench.store().command("DEL", bench.keys().chunk(1, 0)),
            "delete original",
            DAMAGED,
        ),
        (
            lambda bench: bench.store().command("DEL", bench.keys().clusters),
            "delete original",
            "index is damaged: cluster 1 is missing; see `python -m worker fsck`",
        ),
    ],
)
def test_an_event_of_what_is_missing_says_that_the_index_is_damaged(
    bench: Bench, breaking: Callable[[Bench], object], asking: str, said: str
) -> None:
    """As often as it is tried, and nothing is written."""
    index, rows = bench.index(), vectors(3)
    for offset, row in enumerate(rows[:2]):
        index.place([bench.arrival("twice", row, bytes=offset, position=(0, 10 * offset))])
        index.forget(bench.namespace, "twice", (0, 10 * offset + 1))
    index.place([bench.arrival("original", rows[2])])
    index.recognise([bench.arrival("heir", bytes="original")])
    verb, name = asking.split()
    breaking(bench)
    before = contents(bench)
    position = (0, 0) if name == "twice" else (0, 99)
    arrival = bench.arrival(name, bytes="original", position=position, store=verb == "add")
    for _ in range(2):
        with pytest.raises(InfrastructureError, match=said):
            if verb == "delete":
                index.forget(bench.namespace, name, position)
            else:
                index.recognise([arrival])
    assert contents(bench) == before


def test_a_kept_verdict_that_names_nobody_is_a_pause_until_the_name_is_back(bench: Bench) -> None:
    """Reading its event again would not help: nothing was lost since it was written."""
    first, index, rows = bench.index(), bench.index(), vectors(1)
    first.place([bench.arrival("original", rows[0])])
    copy = bench.arrival("copy", near(rows)[0])
    told, again = job(copy), job(replace(copy, vector=None))
    resolver(first)[0].resolve([told])
    lack(bench, 1, 1)
    resolve, persist = resolver(index)
    resolve.recognise([again])
    with ThreadPoolExecutor(1) as pool:
        resolved = pool.submit(resolve.resolve, [again])
        until(lambda: persist.trouble is not None, SECONDS, "a pause")
        said = persist.trouble
        key, field = bench.keys().record(1)
        bench.store().command("HSET", key, field + 1, "original")
        resolved.result(SECONDS)
    assert said is not None and said.startswith("the index is damaged: sequence 1 has no id")
    assert isinstance(again.outcome, Verdict) and isinstance(told.outcome, Verdict)
    assert again.outcome.duplicate_of == told.outcome.duplicate_of == "original"
    assert (index.lost(), again.lease.lost) == ({}, False)


def test_what_waits_for_a_name_is_dropped_with_its_partition(bench: Bench) -> None:
    """Its next owner waits for it; here the others go on."""
    first, rows = bench.index(), vectors(1)
    first.place([bench.arrival("original", rows[0])])
    copy = bench.arrival("copy", near(rows)[0])
    resolver(first)[0].resolve([job(copy)])
    lack(bench, 1, 1)
    index, again = bench.index(), job(replace(copy, vector=None))
    resolve, persist = resolver(index)
    resolve.recognise([again])
    with ThreadPoolExecutor(1) as pool:
        resolved = pool.submit(resolve.resolve, [again])
        until(lambda: persist.trouble is not None, SECONDS, "a pause")
        again.lease.lost = True
        resolved.result(SECONDS)
    assert (again.outcome, index.lost()) == (None, {})


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


def contents(bench: Bench) -> dict[bytes, bytes]:
    """Everything the namespace keeps."""
    store = bench.store()
    names = sorted(key for page in store.pages(bench.keys().prefix) for key in page)
    return dict(zip(names, store.commands([("DUMP", name) for name in names]), strict=True))


def test_a_namespace_without_a_cluster_waits(bench: Bench) -> None:
    place_all(bench.index(), bench.arrivals("p", vectors(3)))
    keys = bench.keys()
    bench.store().command("DEL", keys.clusters, keys.centroids, keys.log)
    with pytest.raises(InfrastructureError, match="the index is damaged: it has no cluster"):
        bench.index().place([bench.arrival("q", vectors(1, seed=1)[0])])
