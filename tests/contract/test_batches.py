"""Many arrivals in one script: the same answers as one by one, in the same order."""

from collections.abc import Sequence
from typing import Any

import pytest
from pytest import MonkeyPatch

from tests.contract.harness import Bench, earliest_ids, near, vectors, verdict
from worker.index import Answer, names
from worker.index.keys import Keys
from worker.index.store import Argument, Store


class Counting(Store):
    """Counts the calls of each script."""

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench.connect())
        self.calls: list[str] = []

    def scripts(self, name: str, calls: Sequence[tuple[Keys, Sequence[Argument]]]) -> list[Any]:
        """Note the calls, and do them."""
        self.calls += [name] * len(calls)
        return super().scripts(name, calls)


def outline(answer: Answer) -> tuple[object, ...]:
    """All of an answer but how many clusters and vectors it took."""
    return (answer.outcome, answer.sequence, answer.exact_of, answer.earliest, answer.best)


@pytest.mark.parametrize("most", [1, 7, 64])
def test_a_batch_is_answered_as_one_by_one(bench: Bench, most: int) -> None:
    """New images, near-copies, the same bytes, the same id, other bytes under it, and checks."""
    index, rows = bench.index(script_arrivals=most), vectors(10)
    copies = near(rows)
    batch = [
        *bench.arrivals("p", rows),
        *bench.arrivals("copy", copies[:5]),
        bench.arrival("bytes", rows[3], bytes="p-3"),
        bench.arrival("p-4", rows[4]),
        bench.arrival("p-5", rows[5], bytes="others"),
        bench.arrival("asked", copies[7], store=False),
        bench.arrival("last", copies[8]),
    ]
    answers = index.place(batch)
    assert [answer.sequence for answer in answers[:15]] == list(range(1, 16))
    assert earliest_ids(answers[:15]) == [None] * 10 + [f"p-{at}" for at in range(5)]
    same, repeated, other, asked, last = answers[15:]
    assert (same.outcome, same.sequence) == ("exact", 16)
    assert same.exact_of is not None and same.exact_of.image_id == "p-3"
    assert (repeated.outcome, repeated.sequence, repeated.earliest) == ("placed", 5, None)
    assert other.outcome == "conflict"
    assert (asked.sequence, earliest_ids([asked])) == (None, ["p-7"])
    assert (last.sequence, earliest_ids([last])) == (17, ["p-8"])
    again = bench.index(script_arrivals=64).place(batch)
    assert list(map(outline, again)) == list(map(outline, answers))
    bench.assert_whole()


@pytest.mark.parametrize(("most", "scripts"), [(8, 8), (64, 1)])
def test_a_script_takes_so_many_arrivals_at_most(bench: Bench, most: int, scripts: int) -> None:
    index, store = bench.index(script_arrivals=most, cluster_limit=512), Counting(bench)
    index.open(bench.namespace)
    for user in (index, vars(index)["_placing"]):
        vars(user)["_store"] = store
    arrivals = bench.arrivals("p", vectors(64))
    assert index.recognise(arrivals) == [None] * 64
    assert store.calls.count("arrive") == scripts
    answers = index.place(arrivals)
    assert store.calls.count("arrive") == 2 * scripts
    index.settle([(bench.namespace, f"p-{at}", at + 1, verdict()) for at in range(64)])
    assert store.calls.count("settle") == scripts
    assert [answer.sequence for answer in answers] == list(range(1, 65))
    assert {answer.outcome for answer in index.recognise(arrivals) if answer} == {"seen"}


def test_who_stored_an_image_knows_its_name(bench: Bench, monkeypatch: MonkeyPatch) -> None:
    """Others ask for it, and then know it as well; so many names are kept, not more."""
    rows = vectors(40)
    checks = [bench.arrival(f"c-{at}", row, store=False) for at, row in enumerate(near(rows))]
    mine, other, store = bench.index(), bench.index(), Counting(bench)
    for index in (mine, other):
        vars(vars(index)["_names"])["_store"] = store
    mine.place(bench.arrivals("p", rows))
    for index, asked in ((mine, 0), (other, 1), (other, 1)):
        assert earliest_ids(index.place(checks)) == [f"p-{at}" for at in range(40)]
        assert store.calls.count("names") == asked
    monkeypatch.setattr(names, "NAMES", 30)
    assert earliest_ids(other.place(checks)) == [f"p-{at}" for at in range(40)]
    assert len(vars(other)["_names"]) == 30
    assert store.calls.count("names") == 2
    monkeypatch.setattr(names, "CHARACTERS", 20)
    assert earliest_ids(mine.place(checks)) == [f"p-{at}" for at in range(40)]
    assert len(vars(mine)["_names"]) <= 6


def test_a_batch_over_the_hard_limit_waits_for_its_splits(bench: Bench) -> None:
    """Lookups grow twice within a script, and a script is full before its last arrival."""
    index = bench.index(cluster_limit=8, script_arrivals=128)
    answers = index.place(bench.arrivals("p", vectors(128)))
    assert sorted(answer.sequence or 0 for answer in answers) == list(range(1, 129))
    assert index.stats()["splits"] >= 3
    bench.assert_whole()


def test_a_batch_behind_in_some_clusters_loads_them_first(bench: Bench) -> None:
    rows = vectors(300)
    fast, slow = bench.index(), bench.index(tail_records=20)
    for start in range(0, 150, 16):
        fast.place(bench.arrivals(f"first-{start}", rows[start : min(start + 16, 150)]))
        while fast.maintain():
            pass
    slow.place([bench.arrival("c", rows[0], store=False)])
    fast.place(bench.arrivals("p", rows[150:]))
    asked = near(rows[150:])
    found = slow.place([bench.arrival(f"c{at}", row, store=False) for at, row in enumerate(asked)])
    assert earliest_ids(found) == [f"p-{at}" for at in range(150)]
