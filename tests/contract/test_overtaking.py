"""Events of one partition are stored in their order, also where some have to be asked again."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from tests.contract.harness import Bench, earliest_ids, maintain, near, place_all, vectors
from worker.errors import InfrastructureError
from worker.index import Answer, Arrival, Index
from worker.index.asking import Asked, ask
from worker.index.cache import Prefix
from worker.vectors import Vectors

FEW: dict[str, Any] = {"probes": 2, "probe_margin": 2.0, "least_probes": 2}


def behind_the_splits(bench: Bench, rows: Vectors, **changes: int) -> Index:
    """A worker that has seen the first half of the rows, and not how clusters split since."""
    half = len(rows) // 2
    fast, slow = bench.index(), bench.index(**{**FEW, **changes})
    place_all(fast, bench.arrivals("old", rows[:half]))
    slow.place([bench.arrival("asked", rows[0], store=False)])
    place_all(fast, bench.arrivals("new", rows[half:]))
    return slow


def pairs(bench: Bench, rows: Vectors) -> list[Arrival]:
    """Each row as an image, and a near-copy of it right behind."""
    both = np.stack([rows, near(rows)], axis=1).reshape(-1, 128)
    return [bench.arrival(f"{'ab'[at % 2]}-{at // 2}", row) for at, row in enumerate(both)]


def order(arrivals: Sequence[Arrival], answers: Sequence[Answer], partition: int) -> list[int]:
    """The sequences that a partition's events were given, as they came."""
    return [
        answer.sequence
        for arrival, answer in zip(arrivals, answers, strict=True)
        if arrival.position[0] == partition and answer.sequence is not None
    ]


@pytest.mark.parametrize("most", [7, 64])
def test_none_overtakes_one_that_has_to_follow_a_split(bench: Bench, most: int) -> None:
    """Only a part of the clusters has moved: what is behind could be stored at once."""
    slow = behind_the_splits(bench, vectors(600), script_arrivals=most)
    asked = pairs(bench, vectors(60, seed=3))
    answers = slow.place(asked)
    assert order(asked, answers, 0) == sorted(order(asked, answers, 0))
    originals = [answer.earliest for answer in answers[::2]]
    assert originals == [None] * 60
    bench.assert_whole()


def test_one_partition_waits_for_no_other(bench: Bench) -> None:
    """The one that has to wait holds up what is behind it, not what another partition brings."""
    index, rows = bench.index(cluster_limit=8, place_attempts=2), vectors(34)
    index.place(bench.arrivals("p", rows[:32]))
    bench.store().command("SET", bench.keys().lock(1), "another worker")
    exact = bench.arrival("other", rows[0], bytes="p-0", position=(1, 1))
    late = [bench.arrival("late", rows[32]), bench.arrival("same", rows[1], bytes="p-1")]
    with pytest.raises(InfrastructureError, match=r"2 arrivals .* after 2 rounds"):
        index.place([*late, exact])
    assert bench.sequences() == 33
    bench.store().command("DEL", bench.keys().lock(1))
    answers = index.place([*late, exact])
    assert [answer.sequence for answer in answers] == [34, 35, 33]
    bench.assert_whole()


def test_a_check_sees_what_came_before_it_and_nothing_else(bench: Bench) -> None:
    """Each image is asked about before it is stored and after it."""
    slow = behind_the_splits(bench, vectors(600))
    rows = vectors(40, seed=4)
    asked: list[Arrival] = []
    for at, row in enumerate(rows):
        asked += [
            bench.arrival(f"early-{at}", row, store=False),
            bench.arrival(f"image-{at}", row),
            bench.arrival(f"late-{at}", row, store=False),
        ]
    answers = slow.place(asked)
    assert earliest_ids(answers[::3]) == [None] * 40
    assert earliest_ids(answers[2::3]) == [f"image-{at}" for at in range(40)]


def test_rounds_that_answer_some_are_no_trouble(bench: Bench) -> None:
    """One partition, and every few images a cluster is full that has to be split first."""
    index = bench.index(cluster_limit=8, script_arrivals=256, place_attempts=2)
    asked = bench.arrivals("p", vectors(256))
    answers = index.place(asked)
    assert order(asked, answers, 0) == list(range(1, 257))
    assert index.stats()["splits"] > 4
    maintain(index)
    bench.assert_whole()


def test_a_check_routed_by_an_old_log_is_asked_again_and_nothing_overtakes_it(bench: Bench) -> None:
    """What is stored may be compared later, by the sequence it has; a check has none."""
    index, rows = bench.index(), vectors(3)
    index.place([bench.arrival("old", rows[0])])
    space = index._spaces[bench.namespace]
    asked = [
        Asked(bench.arrival("before", rows[1]), (1,)),
        Asked(bench.arrival("check", rows[2], store=False), (1,)),
        Asked(bench.arrival("behind", rows[2]), (1,)),
        Asked(bench.arrival("elsewhere", rows[2], position=(1, 0)), (1,)),
    ]
    told = ask(bench.store(), space, bench.settings, [asked], {1: Prefix(1)}, version=0)[0]
    assert [each.outcome for each in told.replies] == ["placed", "moved", "held", "placed"]
    assert bench.sequences() == 3
