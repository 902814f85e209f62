"""Deleting really deletes, and every older event still gets its first answer."""

from dataclasses import replace

import pytest

from tests.contract.harness import Bench, earliest_ids, maintain, near, place_all, vectors, verdict


def test_a_near_copy_of_a_deleted_image_is_unique(bench: Bench) -> None:
    index, rows = bench.index(), vectors(1)
    index.place([bench.arrival("a", rows[0])])
    assert index.forget(bench.namespace, "a", (0, 50))
    answer = index.place([bench.arrival("b", near(rows)[0])])[0]
    assert answer.earliest is None and answer.best is None
    assert index.recognise([bench.arrival("c", bytes="a")]) == [None]
    bench.assert_whole()


def test_an_unknown_image_is_nothing_to_delete(bench: Bench) -> None:
    assert not bench.index().forget(bench.namespace, "a", (0, 1))


def test_a_copy_inherits_the_vector_of_a_deleted_original(bench: Bench) -> None:
    index, rows = bench.index(), vectors(1)
    index.place([bench.arrival("original", rows[0], bytes="same")])
    for name in ("copy-1", "copy-2"):
        index.recognise([bench.arrival(name, bytes="same")])
    assert index.forget(bench.namespace, "original", (0, 50))
    bench.assert_whole()
    near_copy = index.place([bench.arrival("near", near(rows)[0], store=False)])
    assert earliest_ids(near_copy) == ["copy-1"]
    third = index.recognise([bench.arrival("copy-3", bytes="same")])[0]
    assert third is not None and third.exact_of is not None
    assert third.exact_of.image_id == "copy-1"
    for name in ("copy-1", "copy-2", "copy-3"):
        assert index.forget(bench.namespace, name, (0, 60))
        bench.assert_whole()
    assert index.place([bench.arrival("last", near(rows)[0])])[0].best is None


def test_an_older_redelivered_add_replays_its_verdict(bench: Bench) -> None:
    index, rows = bench.index(), vectors(1)
    add = bench.arrival("a", rows[0])
    index.place([add])
    index.settle([(bench.namespace, "a", 1, verdict(1))])
    index.forget(bench.namespace, "a", (0, 50))
    again = index.recognise([add])[0]
    assert again is not None and (again.outcome, again.verdict) == ("seen", verdict(1))
    assert bench.sequences() == 1


def test_an_unsettled_deleted_add_is_answered_but_not_stored_again(bench: Bench) -> None:
    index, rows = bench.index(), vectors(2)
    index.place([bench.arrival("b", rows[0])])
    add = bench.arrival("a", near(rows[:1])[0])
    index.place([add])
    index.forget(bench.namespace, "a", (0, 50))
    answer = bench.index().place([add])[0]
    assert (answer.sequence, earliest_ids([answer])) == (2, ["b"])
    assert bench.sequences() == 2
    bench.assert_whole()


def test_a_later_add_is_a_new_image_and_each_event_keeps_its_own_verdict(bench: Bench) -> None:
    index, rows = bench.index(), vectors(1)
    first = bench.arrival("a", rows[0], position=(0, 10))
    second = replace(first, position=(0, 30))
    index.place([first])
    index.settle([(bench.namespace, "a", 1, verdict(1))])
    assert index.forget(bench.namespace, "a", (0, 20))
    assert index.place([second])[0].sequence == 2
    index.settle([(bench.namespace, "a", 2, verdict(2))])
    replayed = index.recognise([first, second])
    assert [answer and answer.verdict for answer in replayed] == [verdict(1), verdict(2)]
    bench.assert_whole()


def test_a_redelivered_delete_does_not_delete_a_later_add(bench: Bench) -> None:
    index, rows = bench.index(), vectors(1)
    index.place([bench.arrival("a", rows[0], position=(0, 10))])
    assert index.forget(bench.namespace, "a", (0, 20))
    assert index.forget(bench.namespace, "a", (0, 20))
    index.place([bench.arrival("a", rows[0], position=(0, 30))])
    assert not index.forget(bench.namespace, "a", (0, 20))
    assert earliest_ids(index.place([bench.arrival("b", near(rows)[0])])) == ["a"]
    bench.assert_whole()


def test_a_later_add_may_have_other_bytes(bench: Bench) -> None:
    index, rows = bench.index(), vectors(2)
    index.place([bench.arrival("a", rows[0], position=(0, 10), bytes="one")])
    index.forget(bench.namespace, "a", (0, 20))
    later = bench.arrival("a", rows[1], position=(0, 30), bytes="two")
    assert index.place([later])[0].outcome == "placed"
    bench.assert_whole()


@pytest.mark.parametrize("limit", [8, 16, 32])
def test_clusters_that_fall_empty_merge_away(bench: Bench, limit: int) -> None:
    index = bench.index(cluster_limit=limit)
    place_all(index, bench.arrivals("p", vectors(200)))
    assert clusters(bench) > 200 // (2 * limit)
    for at in range(200):
        index.forget(bench.namespace, f"p-{at}", (0, 1000 + at))
        maintain(index)
    assert clusters(bench) == 1
    bench.assert_whole()


def test_two_workers_do_not_merge_the_last_clusters_into_each_other(bench: Bench) -> None:
    index, other = bench.index(), bench.index()
    place_all(index, bench.arrivals("p", vectors(100)))
    other.open(bench.namespace)
    for at in range(100):
        index.forget(bench.namespace, f"p-{at}", (0, 1000 + at))
    met: list[str] = []

    def meanwhile(step: str) -> None:
        if step == "planned" and clusters(bench) == 2 and not met:
            met.append(step)
            maintain(other)

    vars(vars(index)["_maintainer"])["_step"] = meanwhile
    maintain(index)
    assert met
    assert clusters(bench) == 1
    bench.assert_whole()
    assert index.place([bench.arrival("q", vectors(1)[0])])[0].earliest is None


def clusters(bench: Bench) -> int:
    return int(bench.store().command("HLEN", bench.keys().clusters))


def test_zeroed_records_are_reclaimed(bench: Bench) -> None:
    index, rows = bench.index(), vectors(200)
    place_all(index, bench.arrivals("p", rows))
    before = bench.lengths()
    for at in range(180):
        assert index.forget(bench.namespace, f"p-{at}", (0, 1000 + at))
    assert bench.lengths() == before
    while index.maintain():
        pass
    assert bench.lengths() < before / 4
    bench.assert_whole()
    found = index.place(
        [bench.arrival(f"c{at}", row, store=False) for at, row in enumerate(near(rows))]
    )
    assert earliest_ids(found) == [None] * 180 + [f"p-{at}" for at in range(180, 200)]
