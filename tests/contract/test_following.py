"""Following the log of centroids: forty thousand of them, and then only what is new."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import redis

from deploy.local import LocalRedis
from tests.contract.harness import Bench, place_all, vectors
from worker.errors import InfrastructureError
from worker.index import centroids
from worker.index.centroids import LOG_PAGE, Columns, Table
from worker.index.keys import ADDED, CENTROID, CLUSTER, Keys
from worker.index.store import PIPELINE, Argument, Store
from worker.vectors import Vectors, quantize

CENTROIDS = 40_000
SMALL = 25


class Log:
    """Splits as the scripts write them: one cluster retired, two added, one version more."""

    def __init__(self, bench: Bench) -> None:
        self._store, self._keys = bench.store(), bench.keys()
        self._next = 2
        self.version = 1  # the first cluster's

    def split(self, times: int) -> None:
        """Split the oldest cluster, and so on."""
        rows = vectors(2 * times, seed=self.version)
        for start in range(0, times, PIPELINE):
            entries = range(start, min(start + PIPELINE, times))
            self._store.commands(
                [part for at in entries for part in self._entry(rows[2 * at : 2 * at + 2])]
            )

    def _entry(self, rows: Vectors) -> Iterator[tuple[str | bytes | int, ...]]:
        retired, self.version = CLUSTER.pack(self.version), self.version + 1
        added = [(CLUSTER.pack(self._next + at), row.tobytes()) for at, row in enumerate(rows)]
        self._next += len(rows)
        keys, packed = self._keys, b"".join(part for pair in added for part in pair)
        yield ("HDEL", keys.centroids, retired)
        yield ("HSET", keys.centroids, *(part for pair in added for part in pair))
        yield ("HINCRBY", keys.meta, "version", 1)
        yield ("XADD", keys.log, f"{self.version}-1", "retired", retired, "added", packed)


@pytest.fixture
def server() -> Iterator[LocalRedis]:
    with LocalRedis() as server:
        yield server


def traffic(client: redis.Redis) -> tuple[int, int]:
    """Commands executed and bytes answered so far."""
    stats = client.info("stats")
    return stats["total_commands_processed"], stats["total_net_output_bytes"]


def assert_same(table: Table, keys: Keys, store: Store) -> None:
    """The table holds the clusters that Redis has, each with its direction."""
    centroids = store.command("HGETALL", keys.centroids)
    stored = {CLUSTER.unpack(cluster)[0]: row for cluster, row in centroids.items()}
    assert set(table.clusters()) == stored.keys()
    wanted = np.stack([np.frombuffer(row, np.int8) for row in stored.values()]).astype(np.float32)
    wanted /= np.sqrt((wanted * wanted).sum(axis=1, keepdims=True))
    assert np.allclose(table.directions_of(list(stored)), wanted, atol=1e-6)


def opened(server: LocalRedis) -> tuple[Bench, Keys, Log, Table]:
    """A new namespace, its log, and the table of a worker that has seen its first cluster."""
    bench = Bench(server.client, "default")
    bench.index().open(bench.namespace)
    table = Table(bench.store(), bench.keys())
    table.refresh()
    return bench, bench.keys(), Log(bench), table


def test_forty_thousand_centroids_and_then_only_what_is_new(server: LocalRedis) -> None:
    bench, keys, log, table = opened(server)
    client = server.client()
    log.split(CENTROIDS - 1)

    table.refresh()
    assert (len(table), table.version) == (CENTROIDS, CENTROIDS)
    assert_same(table, keys, bench.store())
    replayed = Table(bench.store(), keys)
    replayed.refresh()
    assert sorted(replayed.clusters()) == sorted(table.clusters())
    probe = vectors(5, seed=9)
    assert replayed.route(probe, 8, 2.0) == table.route(probe, 8, 2.0)

    log.split(SMALL)
    before = traffic(client)
    table.refresh()
    commands, answered = (b - a for a, b in zip(before, traffic(client), strict=True))
    assert commands == 3  # a page, the end of the log, and INFO itself
    new = SMALL * (CLUSTER.size + 2 * ADDED)
    assert new < answered < 3 * new + 10_000  # with the names of fields and INFO's own text
    assert_same(table, keys, bench.store())


def test_a_log_cut_short_is_replaced_by_the_whole_table_once(server: LocalRedis) -> None:
    bench, keys, log, table = opened(server)
    client = server.client()
    log.split(CENTROIDS - 1)
    client.xtrim(keys.log, maxlen=SMALL, approximate=False)
    before = traffic(client)
    table.refresh()
    commands, answered = (b - a for a, b in zip(before, traffic(client), strict=True))
    assert_same(table, keys, bench.store())
    assert answered < 2 * CENTROIDS * (CENTROID + CLUSTER.size)
    assert commands < math.ceil(CENTROIDS / 500) + CENTROIDS / LOG_PAGE


class Watched(Store):
    """Has something done after each command, before its answer is used."""

    watch: Callable[[], object] = staticmethod(lambda: None)

    def command(self, *arguments: Argument) -> Any:
        reply = super().command(*arguments)
        self.watch()
        return reply


def cut_short(server: LocalRedis) -> tuple[Watched, Keys, Table]:
    """A table of one cluster whose log no longer reaches back, and its store."""
    bench, keys, log, _ = opened(server)
    store = Watched(bench.connect())
    table = Table(store, keys)
    table.refresh()
    log.split(2000)
    server.client().xtrim(keys.log, maxlen=SMALL, approximate=False)
    return store, keys, table


def test_others_route_while_the_whole_table_is_read(
    server: LocalRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what the table was, until all of it is there."""
    store, keys, table = cut_short(server)
    probe, seen = vectors(1), []

    def look() -> None:
        # In another thread, for the lock lets its owner in; it would wait for ever otherwise.
        seen.append(others.submit(lambda: (len(table), table.route(probe, 0, 0.0))).result(60))

    class Parsed(Columns):
        def __init__(self, version: int, packed: Mapping[bytes, bytes]) -> None:
            look()
            super().__init__(version, packed)
            look()

    with ThreadPoolExecutor(1) as others:
        before = [(len(table), table.route(probe, 0, 0.0))]
        monkeypatch.setattr(centroids, "Columns", Parsed)
        store.watch = look
        table.refresh()
    assert len(seen) > 5
    assert seen == before * len(seen)
    assert_same(table, keys, Store(server.client()))


def test_a_table_that_cannot_be_read_stays_what_it_was(server: LocalRedis) -> None:
    store, keys, table = cut_short(server)
    answered = 0

    def fail_at_the_fourth() -> None:
        nonlocal answered
        answered += 1
        if answered == 4:
            raise InfrastructureError("away")

    store.watch = fail_at_the_fourth
    with pytest.raises(InfrastructureError):
        table.refresh()
    assert (table.clusters(), table.version) == ([1], 1)
    table.refresh()
    assert_same(table, keys, store)


def test_a_worker_looks_where_others_have_split_since(bench: Bench) -> None:
    """Its table is old, and the cluster it would look into is alive: nothing of it has moved."""
    left, right, apart = np.eye(3, 128)
    tilt = np.deg2rad(40)
    one, other = (np.cos(tilt) * left + sign * np.sin(tilt) * right for sign in (1, -1))
    between = quantize((0.72 * one + 0.69 * apart)[None])
    late, early = (
        bench.index(probes=64, probe_margin=0.0, least_probes=1, first_cluster_limit=32)
        for _ in range(2)
    )
    late.open(bench.namespace)

    def fill(prefix: str, counts: Iterable[int]) -> None:
        for number, (axis, count) in enumerate(zip((apart, one, other), counts, strict=True)):
            noise = np.random.default_rng(number).normal(scale=0.01, size=(count, 128))
            place_all(early, bench.arrivals(f"{prefix}-{number}", quantize(axis + noise)))

    fill("before", (20, 10, 10))
    late.refresh()
    assert late.stats()["clusters"] == early.stats()["clusters"] == 2
    fill("since", (0, 12, 12))
    assert early.stats()["clusters"] == 3
    early.place([bench.arrival("first", between[0])])
    assert late.stats()["clusters"] == 2
    (answer,) = late.place([bench.arrival("second", between[0])])
    assert answer.earliest is not None
    assert (answer.earliest.image_id, answer.truncated) == ("first", False)
