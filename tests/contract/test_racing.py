"""Many workers at once: one of each pair is first, whatever else happens meanwhile."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.contract.harness import Bench, near, vectors
from worker.index import Answer, Arrival, Index
from worker.index.asking import ARRIVAL, LENGTH
from worker.index.keys import Keys
from worker.index.store import Argument, Store

PAIRS = 240
BATCH = 8


class ReadsFirst(Store):
    """A broken store: reads in one step, and inserts in another when both workers have read."""

    together = threading.Barrier(2, timeout=30)

    def scripts(self, name: str, calls: Sequence[tuple[Keys, Sequence[Argument]]]) -> list[Any]:
        """Run `arrive` as a check, wait for the other worker, insert, answer what was read."""
        if name != "arrive":
            return super().scripts(name, calls)
        looks = [(keys, [*given[:2], _as_checks(given[2])]) for keys, given in calls]
        read = super().scripts(name, looks)
        self.together.wait()
        inserted = super().scripts(name, calls)
        return [[*after[:2], before[2]] for before, after in zip(read, inserted, strict=True)]


def _as_checks(arrivals: Argument) -> bytes:
    assert isinstance(arrivals, bytes)
    packed, at = bytearray(arrivals), 0
    while at < len(packed):
        packed[at] = 0
        at += ARRIVAL.size - LENGTH.size
        for _ in ("image id", "vector", "probes"):
            at += LENGTH.size + LENGTH.unpack_from(packed, at)[0]
    return bytes(packed)


def race(indexes: Sequence[Index], sides: Sequence[Sequence[Arrival]]) -> list[list[Answer]]:
    """Each index places one side of the pairs, all starting each batch at the same moment."""
    start = threading.Barrier(len(indexes), timeout=60)

    def run(index: Index, arrivals: Sequence[Arrival]) -> list[Answer]:
        answers: list[Answer] = []
        for at in range(0, len(arrivals), BATCH):
            start.wait()
            answers += index.place(arrivals[at : at + BATCH])
        return answers

    with ThreadPoolExecutor(len(indexes)) as pool:
        return list(pool.map(run, indexes, sides))


def firsts(answers: Sequence[Sequence[Answer]]) -> list[int]:
    """For each pair, how many of its two images found nothing before them."""
    return [sum(answer.earliest is None for answer in pair) for pair in zip(*answers, strict=True)]


def sides_of(bench: Bench, pairs: int = PAIRS) -> list[list[Arrival]]:
    rows = vectors(pairs)
    return [bench.arrivals("left", rows), bench.arrivals("right", near(rows))]


def test_exactly_one_of_each_pair_is_first(bench: Bench) -> None:
    """Clusters split meanwhile: inline at the hard limit, and in a thread of their own."""
    indexes = [bench.index(), bench.index()]
    with upkeep(bench.index()):
        answers = race(indexes, sides_of(bench))
    assert firsts(answers) == [1] * PAIRS
    bench.assert_whole()


def test_the_race_catches_a_store_that_reads_first(bench: Bench) -> None:
    indexes = [bench.index(cluster_limit=4096), bench.index(cluster_limit=4096)]
    for index in indexes:
        index.open(bench.namespace)
        vars(vars(index)["_placing"])["_store"] = ReadsFirst(bench.connect())
    assert 2 in firsts(race(indexes, sides_of(bench, 40)))


class upkeep:  # noqa: N801 — reads as a statement
    """Do upkeep in the background for the length of a `with` block."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._stop = threading.Event()
        self._errors: list[BaseException] = []
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._errors:
            raise self._errors[0]

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                if not self._index.maintain():
                    self._stop.wait(0.002)
        except BaseException as error:
            self._errors.append(error)


def test_upkeep_of_several_workers_is_fenced(bench: Bench) -> None:
    index = bench.index()
    index.open(bench.namespace)
    helpers = [bench.index() for _ in range(3)]
    for helper in helpers:
        helper.open(bench.namespace)
    with upkeep(helpers[0]), upkeep(helpers[1]), upkeep(helpers[2]):
        arrivals = bench.arrivals("p", vectors(4000))
        for at in range(0, len(arrivals), BATCH):
            index.place(arrivals[at : at + BATCH])
            # As many as it takes: helpers that come late find that inserts have split themselves.
            if at > 400 and sum(helper.stats()["splits"] for helper in helpers) > 5:
                break
    bench.assert_whole()
    assert sum(helper.stats()["splits"] for helper in helpers) > 5


def test_a_worker_splits_in_two_threads_at_once(bench: Bench) -> None:
    """What upkeep plans with is changed by inserts that find a full cluster and split it."""
    index = bench.index()
    index.open(bench.namespace)
    arrivals = bench.arrivals("p", vectors(3000))
    with upkeep(index):
        for at in range(0, len(arrivals), 128):
            index.place(arrivals[at : at + 128])
    bench.assert_whole()


def test_deletes_among_inserts_and_splits_really_delete(bench: Bench) -> None:
    rows = vectors(400)
    index, deleter = bench.index(), bench.index()
    arrivals = bench.arrivals("p", rows)
    index.place(arrivals[:200])

    def delete() -> None:
        for at in range(0, 200, 2):
            assert deleter.forget(bench.namespace, f"p-{at}", (0, 10_000 + at))

    def insert() -> None:
        for at in range(200, 400, BATCH):
            index.place(arrivals[at : at + BATCH])

    with upkeep(bench.index()):
        run_together(delete, insert)
    bench.assert_whole()
    copies = [bench.arrival(f"c{at}", row, store=False) for at, row in enumerate(near(rows))]
    found = {
        at for at, answer in enumerate(bench.index().place(copies)) if answer.earliest is not None
    }
    assert found == set(range(400)) - set(range(0, 200, 2))


def run_together(*works: Callable[[], None]) -> None:
    with ThreadPoolExecutor(len(works)) as pool:
        for done in [pool.submit(work) for work in works]:
            done.result()


@pytest.mark.parametrize("repeated", [True, False])
def test_a_replay_after_more_inserts_answers_the_same(bench: Bench, repeated: bool) -> None:
    index, rows = bench.index(), vectors(150)
    arrivals = [*bench.arrivals("p", rows[:50]), *bench.arrivals("c", near(rows[:50]))]
    first = index.place(arrivals)
    index.place(bench.arrivals("later", near(rows, seed=9)))
    while index.maintain():
        pass
    again = (index if repeated else bench.index()).place(arrivals)
    for one, two in zip(first, again, strict=True):
        assert (one.sequence, one.earliest, one.best, one.matches) == (
            two.sequence,
            two.earliest,
            two.best,
            two.matches,
        )
