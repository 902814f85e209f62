"""The parts of the index that need no server."""

import hashlib
from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from redis import Redis

from tests.contract.harness import near, vectors
from worker.config import Settings
from worker.index import Arrival, IndexSettings, kernel
from worker.index.asking import PROBED, Asked, runs
from worker.index.cache import LAYOUT, Cache, Prefix
from worker.index.centroids import ROWS, Columns, Route, Table
from worker.index.comparing import Query, compare
from worker.index.index import LONGEST_PAUSE, PATIENCE, pause_before
from worker.index.keys import CLUSTER, LOAD, NEVER_READ, STATE, Keys, encode
from worker.index.planning import OUTPUTS, _outputs, two_means
from worker.index.settings import index_settings
from worker.index.store import Store
from worker.vectors import Vectors, directions_of, dots, similarity


def packed(rows: Vectors, first: int = 1) -> bytes:
    """Records of rows under consecutive sequences."""
    records = np.zeros(len(rows), LAYOUT)
    records["sequence"], records["vector"] = np.arange(first, first + len(rows)), rows
    return records.tobytes()


def state(epoch: int, length: int) -> bytes:
    return STATE.pack(epoch, length, length)


def prefix_of(rows: Vectors, first: int = 1) -> Prefix:
    prefix = Prefix(1)
    prefix.extend(state(1, len(rows)), 0, packed(rows, first))
    return prefix


@given(st.text(min_size=1).filter(lambda text: text.isprintable()))
def test_namespaces_are_encoded_one_to_one_and_without_braces(namespace: str) -> None:
    encoded = encode(namespace)
    assert unquote(encoded) == namespace
    assert not set(encoded) & set("{}: *?[]")


@given(st.integers(0, 10**7), st.binary(min_size=16, max_size=16), st.sampled_from([None, b"salt"]))
def test_a_lookup_bucket_exists_and_splits_in_place(
    sequences: int, digest: bytes, salt: bytes | None
) -> None:
    """Linear hashing: growing by one bucket moves entries of one bucket only, and only there."""
    keys = Keys("n", "g")

    def bucket(count: int) -> int:
        return int(keys.lookup("id:", digest, count, salt).rsplit(":", 1)[1])

    before, after = bucket(sequences), bucket(sequences + LOAD)
    assert 0 <= before <= sequences // LOAD
    new = (sequences + LOAD) // LOAD
    assert after in (before, new)
    if after == new and new:
        assert before == new - (1 << (new.bit_length() - 1))


def test_a_prefix_takes_tails_in_any_overlap() -> None:
    rows = vectors(10)
    prefix = Prefix(3)
    assert prefix.cluster == CLUSTER.pack(3)
    assert prefix.state == NEVER_READ
    prefix.extend(state(1, 4), 0, packed(rows[:4]))
    prefix.extend(state(1, 7), 2, packed(rows[2:7], 3))
    prefix.extend(state(1, 3), 0, packed(rows[:3]))
    assert prefix.sequences.tolist() == list(range(1, 8))
    assert (prefix.vectors == rows[:7]).all()
    assert prefix.state == state(1, 7)


def test_a_prefix_of_another_epoch_starts_over() -> None:
    rows = vectors(10)
    prefix = prefix_of(rows)
    prefix.extend(state(2, 3), 0, packed(rows[5:8], 6))
    assert prefix.sequences.tolist() == [6, 7, 8]
    assert prefix.state == state(2, 3)


def test_a_prefix_says_of_nothing_that_it_is_there_before_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = vectors(9)
    prefix = prefix_of(rows[:2])

    def no_room(self: Prefix, length: int) -> None:
        raise MemoryError

    monkeypatch.setattr(Prefix, "_make_room", no_room)
    for later in (state(1, 9), state(2, 9)):
        with pytest.raises(MemoryError):
            prefix.extend(later, 0, packed(rows))
        assert not prefix.covers(later)


def test_a_prefix_refuses_records_with_a_gap() -> None:
    with pytest.raises(ValueError, match="do not join"):
        prefix_of(vectors(2)).extend(state(1, 9), 5, packed(vectors(4)))


def test_a_cache_drops_what_was_used_longest_ago() -> None:
    rows = vectors(8)
    cache = Cache(limit_bytes=3000)
    for cluster in range(4):
        cache.extend(cache.get("s", cluster), state(1, 8), 0, packed(rows))
    cache.get("s", 0)
    cache.trim()
    assert cache.size <= 3000
    assert cache.get("s", 0).length == 8
    assert cache.get("s", 1).length == 0


def test_both_kernels_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, queries = vectors(70), vectors(3, seed=1)
    wanted = dots(rows, queries)
    assert (kernel.product(rows, queries) == wanted).all()
    monkeypatch.setattr(kernel, "integer_kernel_is_exact", lambda: False)
    assert (kernel.product(rows, queries) == wanted).all()


def test_a_kernel_that_saturates_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = kernel._integer_product
    kernel.integer_kernel_is_exact.cache_clear()
    monkeypatch.setattr(
        kernel, "_integer_product", lambda left, right: exact(left, right).clip(-32768, 32767)
    )
    try:
        assert not kernel.integer_kernel_is_exact()
    finally:
        kernel.integer_kernel_is_exact.cache_clear()


@pytest.mark.parametrize("at_once", [1, 50])
def test_comparing_equals_brute_force(at_once: int) -> None:
    """Few queries are compared each alone, many that share clusters cluster by cluster."""
    rows = np.concatenate([vectors(50), near(vectors(50), 1, 0.5), near(vectors(50), 2, 0.9)])
    prefixes = [prefix_of(rows[:60], 1), prefix_of(rows[60:], 61)]
    queries = near(vectors(50), 3, 0.3)
    for before in (2, 60, 151):
        asked = [Query(q, prefixes, before) for q in queries]
        parts = [asked[at : at + at_once] for at in range(0, len(asked), at_once)]
        found = [each for part in parts for each in compare(part, 0.6, 3)]
        exact = similarity(queries, rows)[:, : before - 1]
        for answer, line in zip(found, exact, strict=True):
            order = sorted(range(len(line)), key=lambda at: (-line[at], at))
            reaching = [at for at in order if line[at] >= 0.6]
            assert answer.best is not None
            assert (answer.best.sequence, answer.best.similarity) == (order[0] + 1, line[order[0]])
            assert [match.sequence - 1 for match in answer.matches] == reaching[:3]
            assert (answer.earliest and answer.earliest.sequence - 1) == min(reaching, default=None)


@pytest.mark.parametrize("at_once", [1, 8])
def test_comparing_leaves_out_deleted_later_and_own_records(at_once: int) -> None:
    rows = np.repeat(vectors(1), 5, axis=0)
    rows[1] = 0
    records = np.frombuffer(packed(rows), LAYOUT).copy()
    records["sequence"][1] = 0
    prefix = Prefix(1)
    prefix.extend(state(1, 5), 0, records.tobytes())
    own, first = Query(rows[0], [prefix], before=5, without=1), Query(rows[0], [prefix], before=1)
    for found in compare([own] * at_once, 0.5, 9):
        assert [match.sequence for match in found.matches] == [3, 4]
    for found in compare([first] * at_once, 0.5, 9):
        assert (found.best, found.earliest, found.matches, found.compared) == (None, None, (), 5)
    *_, other, nothing = compare([own, first] * at_once + [Query(rows[0], [], 9)], 0.5, 9)
    assert (other.best, nothing.best, nothing.compared) == (None, None, 0)


@pytest.mark.parametrize("at_once", [1, 8])
def test_a_record_that_moved_meanwhile_is_listed_once(at_once: int) -> None:
    (row,) = vectors(1)
    from_here, to_there = Prefix(1), Prefix(2)
    for prefix in (from_here, to_there):
        prefix.extend(state(1, 1), 0, packed(row[None]))
    query = Query(row, [from_here, to_there], before=9)
    for found in compare([query] * at_once, 0.5, 9):
        assert [match.sequence for match in found.matches] == [1]


@pytest.mark.parametrize("at_once", [1, 8])
def test_a_deleted_record_does_not_hide_what_is_unlike(at_once: int) -> None:
    """Its product is 0, which is more than that of a record that points away."""
    (row,) = vectors(1)
    records = np.frombuffer(packed(np.stack([-row, row])), LAYOUT).copy()
    deleted = records.copy()
    deleted["sequence"][1], deleted["vector"][1] = 0, 0
    prefix = Prefix(1)
    prefix.extend(state(1, 1), 0, deleted[:1].tobytes())
    prefix.extend(state(1, 2), 1, deleted[1:].tobytes())
    query = Query(row, [prefix], before=9)
    for found in compare([query] * at_once, 0.5, 9):
        assert found.best is not None
        assert (found.best.sequence, found.best.similarity) == (1, -1.0)
    prefix.extend(state(2, 2), 0, records.tobytes())
    for found in compare([query] * at_once, 0.5, 9):
        assert found.best is not None
        assert (found.best.sequence, found.best.similarity) == (2, 1.0)


def test_two_means_separates_two_heaps() -> None:
    heaps = vectors(2)
    rows = directions_of(near(np.repeat(heaps, [30, 50], axis=0), noise=0.3))
    sides = two_means(rows, np.arange(80, dtype=np.uint64))
    assert len(set(sides[:30].tolist())) == len(set(sides[30:].tolist())) == 1
    assert sides[0] != sides[30]


@pytest.mark.parametrize("outliers", [0, 1, 3])
def test_two_means_cuts_what_does_not_separate_in_half(outliers: int) -> None:
    heap, far = vectors(2)
    rows = directions_of(np.stack([heap] * (100 - outliers) + [far] * outliers))
    sides = two_means(rows, np.arange(100, dtype=np.uint64)[::-1].copy())
    assert (sides == 0).sum() == 50


def test_a_plan_has_so_many_outputs_at_most() -> None:
    """One more cluster than fit is wanted, by fewer records than any other: those stay."""
    wanted = np.concatenate([np.arange(1, OUTPUTS + 1).repeat(2), [0, 900, 0]])
    clusters, places = _outputs(wanted)
    assert clusters == list(range(1, OUTPUTS + 1))
    assert places.tolist() == [*np.arange(1, OUTPUTS + 1).repeat(2), 0, 0, 0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"threshold": 1.5},
        {"cluster_limit": 4},
        {"first_cluster_limit": 0},
        {"matches": 0},
        {"cache_bytes": 0},
        {"tail_records": 0},
        {"script_arrivals": 0},
        {"open_namespaces": 0},
        {"lock_seconds": 0},
        {"recent_writes": 0},
        {"place_attempts": 0},
        {"least_probes": 0},
        {"probes": -1},
        {"probe_margin": -0.1},
        {"tidy_clusters": -1},
    ],
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        IndexSettings(**{"threshold": 0.8, **wrong})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("clusters", "due", "hard"),
    [
        (0, 4096, 8192),
        (4, 4096, 8192),
        (16, 2352, 4704),
        (100, 1130, 2260),
        (4056, 257, 1024),
        (4057, 256, 1024),
        (50_000, 256, 1024),
    ],
)
def test_clusters_may_be_larger_while_there_are_few(clusters: int, due: int, hard: int) -> None:
    limits = IndexSettings(threshold=0.8).limits(clusters)
    assert (limits.due, limits.hard, limits.unplanned) == (due, hard, 64)
    whole = IndexSettings(threshold=0.8, cluster_limit=4096).limits(clusters)
    assert (whole.due, whole.hard) == (4096, 16_384)


def test_every_limit_of_the_index_is_a_setting_with_the_same_default() -> None:
    assert index_settings(Settings(), 0.8) == IndexSettings(threshold=0.8)
    chosen = index_settings(Settings(tail_records=7, script_arrivals=9), 0.9)
    assert (chosen.threshold, chosen.tail_records, chosen.script_arrivals) == (0.9, 7, 9)


def test_routing_multiplies_so_many_rows_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table, rows = Table(Store(Redis()), Keys("n", "g")), vectors(300)
    columns = {CLUSTER.pack(at + 1): row.tobytes() for at, row in enumerate(vectors(50, 1))}
    vars(table)["_columns"] = Columns(1, columns)
    taken: list[int] = []

    def product(left: Vectors, right: Vectors) -> NDArray[Any]:
        taken.append(len(left))
        return kernel.product(left, right)

    one_by_one = [route for row in rows for route in table.route(row[None], 8, 0.2, 4)]
    monkeypatch.setattr("worker.index.centroids.product", product)
    assert table.route(rows, 8, 0.2, 4) == one_by_one
    assert taken == [ROWS] * (300 // ROWS) + [300 % ROWS]
    assert table.route(rows[:0], 8, 0.2, 4) == []


@pytest.mark.parametrize("probes", [0, 1, 3, 8])
@pytest.mark.parametrize("clusters", [1, 3, 40])
def test_routes_are_those_of_a_plain_search(probes: int, clusters: int) -> None:
    """Few centroids, many of them equal: near ones first, the older of two equals before."""
    rng = np.random.default_rng(clusters)
    centroids = rng.integers(-2, 3, (clusters, 128), np.int8)
    centroids[clusters // 2 :] = centroids[: clusters - clusters // 2]
    table, rows, margin, least = Table(Store(Redis()), Keys("n", "g")), vectors(20), 0.02, 2
    columns = {CLUSTER.pack(at + 1): row.tobytes() for at, row in enumerate(centroids)}
    vars(table)["_columns"] = Columns(1, columns)
    for row, route in zip(rows, table.route(rows, probes, margin, least), strict=True):
        near = similarity(row[None], centroids)[0]
        order = sorted(range(clusters), key=lambda at: (-round(near[at], 6), at))
        within = sum(near[at] >= near[order[0]] - margin for at in order) if probes else clusters
        wanted = max(within, min(least, clusters))
        taken = min(wanted, probes) if probes else wanted
        assert route == Route(tuple(at + 1 for at in order[:taken]), bool(taken < within))


def _asked(image_id: str, content: str = "", probes: Sequence[int] = (1,)) -> Asked:
    sha256 = hashlib.sha256((content or image_id).encode()).digest()
    return Asked(Arrival("n", image_id, sha256, store=True, position=(0, 0)), probes)


@pytest.mark.parametrize(
    ("asked", "most", "sizes"),
    [
        ([], 4, []),
        ([_asked(str(at)) for at in range(9)], 4, [4, 4, 1]),
        ([_asked("a"), _asked("b"), _asked("a"), _asked("c")], 4, [2, 2]),
        ([_asked("a"), _asked("b", "a"), _asked("c", "a")], 4, [1, 1, 1]),
        (
            [_asked(str(at), probes=range(at * 1500, at * 1500 + 1500)) for at in range(3)],
            4,
            [2, 1],
        ),
        ([_asked("a", probes=range(2 * PROBED)), _asked("b", probes=range(2 * PROBED))], 4, [1, 1]),
    ],
)
def test_a_script_takes_no_id_and_no_bytes_twice_and_bounded_work(
    asked: list[Asked], most: int, sizes: list[int]
) -> None:
    parts = list(runs(asked, most))
    assert [len(part) for part in parts] == sizes
    assert [one for part in parts for one in part] == asked


def test_rounds_wait_longer_and_longer_up_to_a_limit() -> None:
    most = Settings(place_attempts=10_000).place_attempts
    pauses = [pause_before(attempt) for attempt in range(PATIENCE, most)]
    assert pauses[:3] == [0.001, 0.002, 0.004]
    assert pauses == sorted(pauses)
    assert pauses[-1] == LONGEST_PAUSE
