"""An id that lives more than once: each event that comes again finds its own life."""

from random import Random
from typing import NamedTuple

import pytest

from tests.contract.harness import Bench, vectors, verdict
from worker.index import Index
from worker.index.fsck import check
from worker.index.keys import PAST, digest

Position = tuple[int, int]


class Told(NamedTuple):
    """What an add was told."""

    outcome: str
    sequence: int | None
    verdict: bytes | None


class Life:
    """Events of one id, one after the other, settled as a worker would."""

    def __init__(self, bench: Bench) -> None:
        self._bench, self._rows = bench, vectors(2)
        self.index: Index = bench.index()

    def add(self, position: Position, picture: int = 0) -> Told:
        """An add of one of two pictures."""
        arrival = self._bench.arrival(
            "x", self._rows[picture], bytes=f"picture {picture}", position=position
        )
        (answer,) = self.index.place([arrival])
        told = answer.verdict
        if answer.outcome in ("placed", "exact") and answer.sequence:
            own = verdict(answer.sequence)
            (told,) = self.index.settle([(self._bench.namespace, "x", answer.sequence, own)])
        return Told(answer.outcome, answer.sequence, told)

    def delete(self, position: Position) -> bool:
        """A delete."""
        return self.index.forget(self._bench.namespace, "x", position)


def seen(sequence: int) -> Told:
    """What the add that was stored as `sequence` is told when it comes again."""
    return Told("seen", sequence, verdict(sequence))


def contents(bench: Bench) -> dict[bytes, bytes]:
    """Everything the generation holds."""
    store = bench.store()
    names = [name for page in store.pages(bench.keys().prefix) for name in page]
    return dict(zip(names, store.commands([("DUMP", name) for name in names]), strict=True))


def test_an_add_finds_its_life_behind_one_of_other_bytes(bench: Bench) -> None:
    life = Life(bench)

    def deliver() -> list[Told]:
        told = [life.add((0, 1), 0)]
        life.delete((0, 2))
        told.append(life.add((0, 3), 1))
        life.delete((0, 4))
        return [*told, life.add((0, 5), 0)]

    assert [each.sequence for each in deliver()] == [1, 2, 3]
    before = contents(bench)
    assert deliver() == [seen(1), seen(2), seen(3)]
    assert contents(bench) == before
    bench.assert_whole()


def test_an_add_finds_its_life_behind_many(bench: Bench) -> None:
    life, lives = Life(bench), 200
    for at in range(lives):
        assert life.add((0, 2 * at)).outcome == "placed"
        assert life.delete((0, 2 * at + 1))
    before = contents(bench)
    assert [life.add((0, 2 * at)) for at in range(lives)] == [seen(n + 1) for n in range(lives)]
    assert contents(bench) == before
    bench.assert_whole()


@pytest.mark.parametrize("seed", range(8))
def test_whatever_comes_again_changes_nothing(bench: Bench, seed: int) -> None:
    """Adds of two pictures, conflicts among them, and deletes; then all again, then some."""
    life, random = Life(bench), Random(seed)

    def deliver(offset: int, picture: int) -> Told | bool:
        return life.delete((0, offset)) if picture == 2 else life.add((0, offset), picture)

    events = [(offset, random.randrange(3)) for offset in range(60)]
    first = {event: deliver(*event) for event in events}
    before = contents(bench)
    for event in events + random.sample(events, 30):
        told, again = first[event], deliver(*event)
        if isinstance(told, Told):
            assert isinstance(again, Told)
            assert again.outcome == ("conflict" if told.outcome == "conflict" else "seen")
            assert (again.sequence, again.verdict) == (told.sequence, told.verdict)
    assert contents(bench) == before
    bench.assert_whole()


def test_an_add_that_never_lived_is_not_put_before_a_life_that_does(bench: Bench) -> None:
    """Its first delivery was a dead letter, say; the second comes after those behind it."""
    life = Life(bench)
    life.add((0, 1), 0)
    life.delete((0, 2))
    life.add((0, 9), 0)
    before = contents(bench)
    assert life.add((0, 5), 0) == seen(2)
    assert life.add((0, 5), 1).outcome == "conflict"
    assert contents(bench) == before
    bench.assert_whole()


def test_each_partition_has_an_order_of_its_own(bench: Bench) -> None:
    """The topic got more partitions: the id's events go to another one than before."""
    life = Life(bench)
    assert life.add((0, 70)).sequence == 1
    assert life.delete((1, 5))
    assert life.add((1, 9)).sequence == 2
    before = contents(bench)
    assert life.add((0, 70)) == seen(1)
    assert not life.delete((1, 5))
    assert life.add((1, 9)) == seen(2)
    assert contents(bench) == before
    bench.assert_whole()


def test_a_delete_of_another_partition_is_done_once(bench: Bench) -> None:
    life = Life(bench)
    life.add((0, 1))
    assert life.delete((1, 50))
    assert life.add((0, 9)).sequence == 2
    before = contents(bench)
    assert not life.delete((1, 50))
    assert life.add((0, 1)) == seen(1)
    assert contents(bench) == before
    assert life.delete((1, 51))
    bench.assert_whole()


def test_a_delete_that_found_nothing_is_done_once_too(bench: Bench) -> None:
    life = Life(bench)
    life.add((0, 1))
    assert life.delete((0, 2))
    for offset in range(50):
        assert not life.delete((1, offset))
        assert not life.delete((0, 3 + offset))
    (past,) = bench.store().commands([("ZCARD", bench.keys().past(digest("x")))])
    assert past <= 2, "one entry a partition is enough"
    assert life.add((1, 90)).sequence == 2
    before = contents(bench)
    for offset in range(50):
        assert not life.delete((1, offset))
        assert not life.delete((0, 2 + offset))
    assert life.add((0, 1)) == seen(1)
    assert contents(bench) == before
    bench.assert_whole()


def test_one_life_costs_nothing_beyond_it(bench: Bench) -> None:
    life = Life(bench)
    life.add((0, 1))
    life.add((0, 2))
    life.delete((0, 3))
    life.delete((0, 4))
    assert life.add((0, 1)) == seen(1)
    assert not bench.store().command("EXISTS", bench.keys().past(digest("x")))


def test_lives_that_only_lead_back_are_remembered_when_one_is_asked_for(bench: Bench) -> None:
    """As an earlier version left them."""
    life = Life(bench)
    for at in range(20):
        life.add((0, 2 * at), at % 2)
        life.delete((0, 2 * at + 1))
    before = contents(bench)
    bench.store().command("DEL", bench.keys().past(digest("x")))
    bench.assert_whole()
    assert not life.delete((0, 1))
    assert [life.add((0, 2 * at), at % 2) for at in range(20)] == [seen(n + 1) for n in range(20)]
    assert contents(bench) == before
    bench.assert_whole()


def test_fsck_sees_what_is_wrong_with_former_lives(bench: Bench) -> None:
    life = Life(bench)
    for at in range(3):
        life.add((0, 2 * at))
        life.delete((0, 2 * at + 1))
    life.index.place([bench.arrival("y", vectors(3)[2])])
    bench.assert_whole()
    store, past = bench.store(), bench.keys().past(digest("x"))
    first = PAST.pack(0, 0, 1, 1)
    store.command("ZREM", past, first)
    said = check(store, bench.namespace)
    assert said == ["the event sequence 1 began with does not lead to it"]
    store.command("ZADD", past, 0, first)
    bench.assert_whole()
    for member, sequence in ((PAST.pack(1, 0, 1, 4), 4), (PAST.pack(1, 0, 2, 99), 99), (b"x", 0)):
        store.command("ZADD", past, 0, member)
        said = check(store, bench.namespace)
        assert said == [f"an id's event leads to sequence {sequence}, which has another id"]
        store.command("ZREM", past, member)
    bench.assert_whole()
