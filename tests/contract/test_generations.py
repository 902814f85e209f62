"""Rebuilding a namespace with another model: a second generation, what it lacks, its order."""

from collections.abc import Iterable
from functools import partial
from itertools import count
from typing import Any

import pytest

from tests.contract.harness import MODEL, Bench, earliest_ids, near, place_all, vectors
from worker.errors import ConfigError, InfrastructureError, ModelMismatch
from worker.index import Index
from worker.index.keys import encode
from worker.index.missing import Image as StoredImage
from worker.index.missing import Missing
from worker.index.space import remove_retired
from worker.index.store import Argument, Store


def building(bench: Bench, model: str = "model-b") -> Index:
    """An index that fills the next generation."""
    return Index(bench.connect(), model, bench.settings, building=True)


def test_the_old_generation_answers_until_the_switch(bench: Bench) -> None:
    old, rows = bench.index(), vectors(40)
    old.place(bench.arrivals("p", rows))
    new = building(bench)
    new.place(bench.arrivals("p", near(rows)))
    answer = old.place([bench.arrival("c", near(rows)[0])])[0]
    assert (answer.sequence, earliest_ids([answer])) == (41, ["p-0"])
    new.switch(bench.namespace)
    new.switch(bench.namespace)
    with pytest.raises(ModelMismatch, match="model-b"):
        old.place([bench.arrival("d", near(rows)[1])])
    serving = bench.index(model="model-b")
    assert serving.place([bench.arrival("c", near(rows)[0])])[0].sequence == 41
    bench.assert_whole()


def test_an_interrupted_rebuild_goes_on(bench: Bench) -> None:
    bench.index().open(bench.namespace)
    arrivals = bench.arrivals("p", vectors(10))
    first = building(bench).place(arrivals[:5])
    again = building(bench).place(arrivals)
    assert [a.sequence for a in again[:5]] == [a.sequence for a in first]
    assert len(again) == 10


def test_a_rebuild_with_a_third_model_replaces_one_begun(bench: Bench) -> None:
    bench.index().open(bench.namespace)
    begun = building(bench)
    begun.place(bench.arrivals("p", vectors(5)))
    other = building(bench, "model-c")
    other.place(bench.arrivals("p", vectors(5)))
    other.switch(bench.namespace)
    with pytest.raises(ConfigError, match="someone else"):
        begun.switch(bench.namespace)
    assert remove_retired(bench.store(), bench.namespace).keys() == {MODEL, "model-b"}
    bench.assert_whole()


def test_a_rebuild_to_the_model_that_answers_gives_up_the_one_begun(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """All its keys go; who was filling it ends, and what answers goes on."""
    serving, rows = bench.index(), vectors(50)
    serving.place(bench.arrivals("p", rows))
    pages = bench.store().pages
    keys, before = bench.keys(), {name for page in pages(bench.keys().prefix) for name in page}
    begun = building(bench)
    begun.place(bench.arrivals("p", rows))
    for said in (["a rebuild that was begun is given up"], []):
        caplog.clear()
        building(bench, MODEL).open(bench.namespace)
        assert [each.message for each in caplog.records] == said
    with pytest.raises(ConfigError, match="someone else"):
        begun.place(bench.arrivals("q", vectors(3, 1)))
    with pytest.raises(ConfigError, match="someone else"):
        begun.switch(bench.namespace)
    removed = remove_retired(bench.store(), bench.namespace)
    assert removed.keys() == {"model-b"}
    root = f"{{{encode(bench.namespace)}}}:"
    assert {name for page in pages(root) for name in page} == before | {keys.root.encode()}
    assert set(bench.store().command("HKEYS", keys.root)) == {
        b"serving",
        f"model:{keys.generation}".encode(),
        f"layout:{keys.generation}".encode(),
    }
    assert serving.place([bench.arrival("c", near(rows)[0])])[0].sequence == 51
    bench.assert_whole()


def test_a_rebuild_that_has_switched_leaves_alone_one_begun_since(bench: Bench) -> None:
    """It opens its generation anew where Redis was restarted, say."""
    bench.index().open(bench.namespace)
    first = building(bench)
    first.place(bench.arrivals("p", vectors(3)))
    first.switch(bench.namespace)
    second = building(bench, "model-c")
    second.place(bench.arrivals("p", vectors(3)))
    vars(first)["_spaces"].forget(vars(first)["_spaces"][bench.namespace])
    first.place(bench.arrivals("q", vectors(3, 1)))
    second.switch(bench.namespace)
    bench.assert_whole()


def test_of_two_rebuilds_the_one_begun_first_ends(bench: Bench) -> None:
    """It does not begin anew, which would give up what the other has filled."""
    bench.index().open(bench.namespace)
    first, second, rows = building(bench), building(bench, "model-c"), vectors(10)
    arrivals = bench.arrivals("p", rows)
    first.place(arrivals[:5])
    second.place(arrivals[:5])
    for _ in range(2):
        with pytest.raises(ConfigError, match="being rebuilt by someone else"):
            first.place(arrivals[5:])
    second.place(arrivals[5:])
    second.switch(bench.namespace)
    fields = bench.store().command("HKEYS", bench.keys().root)
    assert len([name for name in fields if name.startswith(b"retired:")]) == 2
    assert bench.sequences() == 10


def test_a_rebuild_whose_generation_redis_has_lost_ends(bench: Bench) -> None:
    bench.index().open(bench.namespace)
    begun = building(bench)
    begun.place(bench.arrivals("p", vectors(3)))
    bench.store().command("HDEL", bench.keys().root, "building")
    with pytest.raises(ConfigError, match="Redis has lost what was built"):
        begun.place(bench.arrivals("q", vectors(3)))
    assert not bench.store().command("HEXISTS", bench.keys().root, "building")


def test_a_retired_generation_leaves_no_key(bench: Bench) -> None:
    bench.index().place(bench.arrivals("p", vectors(50)))
    old = bench.keys()
    new = building(bench)
    new.place(bench.arrivals("p", vectors(50)))
    new.switch(bench.namespace)
    remove_retired(bench.store(), bench.namespace)
    assert list(bench.store().pages(old.prefix)) == []
    assert len(next(iter(bench.store().pages(bench.keys().prefix)))) > 5
    bench.assert_whole()


def test_a_namespace_that_is_not_there_cannot_be_rebuilt(bench: Bench) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        building(bench).open(bench.namespace)


def test_what_a_generation_lacks_is_told(bench: Bench) -> None:
    """Living images only, by id and bytes; not those a younger event has replaced or deleted."""
    old, new, rows = bench.index(), building(bench), vectors(6)
    names = ("kept", "lost", "changed", "gone", "replaced", "dead")
    arrivals = {name: bench.arrival(name, row) for name, row in zip(names, rows, strict=True)}
    old.place(list(arrivals.values()))
    old.forget(bench.namespace, "dead", (0, 7))
    changed = bench.arrival("changed", rows[2], bytes="other", position=(0, 3))
    new.place([arrivals["kept"], changed, arrivals["gone"], arrivals["replaced"]])
    new.forget(bench.namespace, "gone", (0, 8))
    new.forget(bench.namespace, "replaced", (0, 9))
    new.place([bench.arrival("replaced", rows[4], bytes="newer", position=(0, 10))])
    missing = new.missing(bench.namespace)
    assert missing.stored() == 6
    missing.look(2)
    assert (missing.count, missing.some) == (1, ["lost"])
    missing.look(6)
    missing.look(6)
    assert (missing.count, missing.some) == (2, ["lost", "changed"])


def test_what_a_generation_lacks_is_told_of_many(bench: Bench) -> None:
    old, new, rows = bench.index(), building(bench), vectors(300)
    arrivals = bench.arrivals("p", rows)
    old.place(arrivals)
    new.place([each for at, each in enumerate(arrivals) if at % 3])
    missing = new.missing(bench.namespace)
    missing.look(missing.stored())
    assert (missing.count, missing.some) == (100, [f"p-{at}" for at in range(0, 30, 3)])
    new.switch(bench.namespace)
    missing.look(missing.stored())
    assert missing.count == 100
    again = building(bench).missing(bench.namespace)
    again.look(again.stored())
    assert again.count == 0


def test_an_image_whose_place_another_has_taken_is_missing(bench: Bench) -> None:
    """What answers refused the other one: its event is the younger one, and changed nothing."""
    old, new, rows = bench.index(), building(bench), vectors(2)
    first, second = (bench.arrival("a", row, bytes=str(at)) for at, row in enumerate(rows))
    assert [answer.outcome for answer in old.place([first]) + old.place([second])] == [
        "placed",
        "conflict",
    ]
    assert new.place([second])[0].outcome == "placed"
    missing = new.missing(bench.namespace)
    missing.look(missing.stored())
    assert (missing.count, missing.some) == (1, ["a"])


def test_an_earlier_life_of_the_same_bytes_does_not_stand_for_an_image(bench: Bench) -> None:
    """Added, deleted, added again, refused: only the second add could not be stored again."""
    old, new, rows = bench.index(), building(bench), vectors(2)
    lives = [bench.arrival("a", rows[0], position=(0, at)) for at in (1, 3)]
    refused = bench.arrival("a", rows[1], bytes="other", position=(0, 4))
    for index in (old, new):
        index.place(lives[:1])
        index.forget(bench.namespace, "a", (0, 2))
    old.place(lives[1:])
    assert old.place([refused])[0].outcome == "conflict"
    new.place([refused])
    missing = new.missing(bench.namespace)
    missing.look(missing.stored())
    assert missing.count == 1


def test_what_is_there_is_found_while_lookups_grow(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers of the new model insert between two reads of the comparison."""
    old, new, arrivals = bench.index(), building(bench), bench.arrivals("p", vectors(39))
    old.place(arrivals)
    new.place(arrivals[1:])
    missing = new.missing(bench.namespace)
    new.switch(bench.namespace)
    serving, ask, rounds = bench.index(model="model-b"), Store.commands, iter(range(2))

    def commands(store: Store, asked: Iterable[tuple[Argument, ...]]) -> list[Any]:
        asked = list(asked)
        if ":id:" in str(asked[:1]) and (seed := next(rounds, None)) is not None:
            place_all(serving, bench.arrivals(f"live-{seed}", vectors(400, seed)), 400)
        return ask(store, asked)

    monkeypatch.setattr(new._store, "commands", partial(commands, new._store))
    missing.look(missing.stored())
    assert (missing.count, missing.some) == (1, ["p-0"])


def test_a_comparison_goes_on_where_redis_failed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is counted twice."""
    monkeypatch.setattr("worker.index.missing.PAGE", 1)
    old, new = bench.index(), building(bench)
    old.place(bench.arrivals("p", vectors(100)))
    missing, compare, calls = new.missing(bench.namespace), Missing._compare, count(1)

    def fails_at_times(self: Missing, images: dict[bytes, StoredImage]) -> None:
        if next(calls) % 2 == 0:
            raise InfrastructureError("away")
        compare(self, images)

    monkeypatch.setattr(Missing, "_compare", fails_at_times)
    for _ in range(3):
        with pytest.raises(InfrastructureError):
            missing.look(100)
    missing.look(100)
    assert missing.count == 100


FILE, OTHER_FILE = 1 << 31, (1 << 31) + 7
"""Partitions of events that were read from files."""


def test_a_file_read_after_the_topic_changes_nothing_the_topic_told(bench: Bench) -> None:
    """A run without the file came before: what the topic deleted stays so, what it added lives."""
    index, rows = bench.index(), vectors(3)

    def add(name: str, row: int, position: tuple[int, int]) -> str:
        return index.place([bench.arrival(name, rows[row], position=position)])[0].outcome

    def topic() -> None:
        add("deleted", 0, (0, 60))
        index.forget(bench.namespace, "deleted", (0, 61))
        add("living", 1, (0, 70))

    topic()
    index.place([bench.arrival("never known", rows[2], position=(FILE, 0))])
    for file in (FILE, OTHER_FILE):
        add("deleted", 0, (file, 1))
        assert not index.forget(bench.namespace, "living", (file, 2))
        assert not index.forget(bench.namespace, "deleted", (file, 3))
        add("deleted", 0, (file, 4))
        add("living", 1, (file, 5))
        topic()
    assert bench.sequences() == 3
    asked = ("deleted", "living", "never known")
    checks = [bench.arrival("q", bytes=name, store=False) for name in asked]
    known = zip(asked, [index.recognise([check])[0] for check in checks], strict=True)
    assert [name for name, answer in known if answer is None] == ["deleted"]
    bench.assert_whole()


def test_events_of_a_file_have_an_order_and_come_before_the_topic(bench: Bench) -> None:
    """The file is read first, as it should be, and both again; then one whose lines have moved."""
    index, rows = bench.index(), vectors(1)

    def file(partition: int, first: int) -> None:
        for at, deletes in enumerate((False, True, False)):
            if deletes:
                index.forget(bench.namespace, "a", (partition, first + at))
            else:
                index.place([bench.arrival("a", rows[0], position=(partition, first + at))])

    file(FILE, 5)
    assert bench.sequences() == 2
    file(FILE, 5)
    assert bench.sequences() == 2
    file(OTHER_FILE, 0)
    assert bench.sequences() == 3
    asked = bench.arrival("q", bytes="a", store=False)
    assert index.recognise([asked]) != [None]
    assert index.forget(bench.namespace, "a", (0, 9))
    for partition, first in ((FILE, 5), (OTHER_FILE, 0), (OTHER_FILE + 1, 50)):
        file(partition, first)
        assert index.recognise([asked]) == [None]
    bench.assert_whole()
