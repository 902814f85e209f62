"""The command fsck: what it looks at, beside workers too, and how it ends."""

import itertools
import os
import threading
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from deploy.local import LocalRedis
from tests.contract.harness import Bench, place_all, vectors
from worker import __main__ as worker
from worker.index import Index, fsck_images
from worker.index.fsck import check
from worker.index.fsck_clusters import AT_ONCE
from worker.index.fsck_roots import namespaces
from worker.index.keys import NAMESPACES, Keys, encode
from worker.index.store import PIPELINE, Argument, Store


def test_fsck_checks_the_generation_being_built(bench: Bench) -> None:
    bench.index().open(bench.namespace)
    building = Index(bench.connect(), "model-b", bench.settings, building=True)
    building.place(bench.arrivals("p", vectors(3)))
    bench.assert_whole()
    generation = bench.store().command("HGET", bench.keys().root, "building").decode()
    keys = Keys(bench.namespace, generation)
    bench.store().command("HDEL", keys.record(2)[0], keys.record(2)[1])
    said = check(bench.store(), bench.namespace)
    assert "being built: sequence 2 has no record" in said


def test_fsck_beside_workers_finds_nothing(bench: Bench) -> None:
    """Inserts, copies, deletes and splits go on while it reads."""
    index, done = bench.index(), threading.Event()
    index.open(bench.namespace)

    def work() -> None:
        for at in itertools.count():
            place_all(index, bench.arrivals(f"p{at}", vectors(64, at)))
            index.recognise([bench.arrival(f"c{at}-{n}", bytes=f"p{at}-{n}") for n in range(9)])
            index.forget(bench.namespace, f"p{at}-3", bench.arrival("-").position)
            if done.is_set():
                return

    with ThreadPoolExecutor(1) as pool:
        worked = pool.submit(work)
        try:
            found = [check(bench.store(), bench.namespace) for _ in range(20)]
        finally:
            done.set()
        worked.result()
    assert found == [[]] * 20
    bench.assert_whole()


def test_fsck_follows_an_id_through_all_its_lives_and_in_no_circle(bench: Bench) -> None:
    index, rows = bench.index(), vectors(3)
    for offset, row in enumerate(rows):
        index.place([bench.arrival("again", row, bytes=offset)])
        if offset < 2:
            assert index.forget(bench.namespace, "again", bench.arrival("-").position)
    bench.assert_whole()
    keys = bench.keys()
    bench.store().command("HSET", keys.record(3)[0], keys.record(3)[1] + 3, 3)
    said = check(bench.store(), bench.namespace)
    assert said == [f"the id of sequence {n} does not lead back to it" for n in (1, 2)]


def test_fsck_follows_each_of_many_lives_once(
    single: LocalRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where they are spread over many pages, of other images each."""
    bench, count = Bench(single.client, f"lives-{uuid.uuid4().hex}"), 100
    index, rows = bench.index(), vectors(2 * count)
    for at in range(count):
        index.place([bench.arrival("again", rows[at], bytes=at)])
        index.place([bench.arrival(f"p-{at}", rows[count + at])])
        assert index.forget(bench.namespace, "again", bench.arrival("-").position)
    asked: list[tuple[Argument, ...]] = []
    commands = Store.commands

    def counted(self: Store, those: Iterable[tuple[Argument, ...]]) -> list[Any]:
        asked.extend(those := list(those))
        return commands(self, those)

    monkeypatch.setattr(Store, "commands", counted)
    monkeypatch.setattr(fsck_images, "PAGE", 1)
    bench.assert_whole()
    ways_back = [each for each in asked if each[0] == "HGET" and "rec:" in str(each[1])]
    assert len(ways_back) == count


def test_fsck_asks_for_many_at_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    place_all(bench.index(), bench.arrivals("p", vectors(1000)), batch=250)
    bench.index().place(bench.arrivals("copy", vectors(100)))
    trips = []
    call = Store.call

    def counted(self: Store, action: Callable[[], object]) -> object:
        trips.append(action)
        return call(self, action)

    monkeypatch.setattr(Store, "call", counted)
    bench.assert_whole()
    clusters = -(-len(bench.store().command("HKEYS", bench.keys().clusters)) // AT_ONCE)
    # Buckets of records, of ids and of bytes; then for each image a lookup by id and one by bytes,
    # for each copy one in its list; of clusters their records, and how long their chunks are.
    most = 3 + 2 * -(-1100 // PIPELINE) + 1 + 3 * clusters + 30
    assert len(trips) < most


def test_all_namespaces_are_checked_but_one_whose_making_was_cut_short(
    redis_server: LocalRedis, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["fsck", "--redis-url", redis_server.url]
    assert worker.main(command) == 0
    assert capsys.readouterr().out == "no namespace is known\n"
    bench = Bench(redis_server.client, "whole")
    bench.index().place(bench.arrivals("p", vectors(2)))
    bench.store().command("SADD", NAMESPACES, "half")
    assert worker.main(command) == 0
    assert capsys.readouterr().out == "whole: no problems\n"
    assert worker.main([*command, "--namespace", "half"]) == 1


def test_namespaces_that_are_not_listed_are_found(
    redis_server: LocalRedis, capsys: pytest.CaptureFixture[str]
) -> None:
    """The set may be lost alone: it is a key like any other. Keys of others only look alike."""
    command = ["fsck", "--redis-url", redis_server.url]
    bench = Bench(redis_server.client, "one")
    bench.index().place(bench.arrivals("p", vectors(2)))
    store = bench.store()
    store.command("DEL", NAMESPACES)
    store.command("SET", "{theirs}:root", "x")
    store.command("HSET", "{theirs too}:root", "serving", "x")
    store.command("HSET", "{theirs}:as well:root", "serving", "x")
    assert worker.main(command) == 1
    told = capsys.readouterr()
    assert told.out == "one: 1 problem\n"
    assert told.err == "one: dedup:namespaces does not list 'one'\n"
    store.command("SET", NAMESPACES, "x")
    assert worker.main(command) == 1
    assert capsys.readouterr().err == "one: dedup:namespaces is a string, not a set\n"


def test_namespaces_are_looked_for_on_every_node(bench: Bench) -> None:
    others = [Bench(bench.connect, f"{uuid.uuid4().hex}-{at}") for at in range(8)]
    for each in others:
        each.index().open(each.namespace)
        each.store().command("SREM", NAMESPACES, encode(each.namespace))
    assert {each.namespace for each in others} <= set(namespaces(bench.store())[0])
    for each in others:
        assert check(each.store(), each.namespace) == [
            f"dedup:namespaces does not list {each.namespace!r}"
        ]
        each.index().open(each.namespace)  # lists it again
        each.assert_whole()


def test_what_is_listed_is_a_namespace_with_a_root(
    redis_server: LocalRedis, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["fsck", "--redis-url", redis_server.url]
    bench = Bench(redis_server.client, "rootless")
    bench.index().place(bench.arrivals("p", vectors(2)))
    store, names = bench.store(), [b"", b"\xff", b"%ff", b"a b"]
    store.command("SADD", NAMESPACES, *names)
    store.command("DEL", bench.keys().root)
    assert worker.main(command) == 1
    said = [f"dedup:namespaces holds {name!r}, which is no namespace" for name in sorted(names)]
    said.append("namespace 'rootless' has keys, but no root")
    assert capsys.readouterr().err.splitlines() == said


@pytest.mark.parametrize("command", ["fsck", "audit", "rebuild"])
def test_a_namespace_is_utf_8(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--namespace", os.fsdecode(b"\xff\xfe")]
    with pytest.raises(SystemExit) as ended:
        worker.main([command, *arguments])
    assert ended.value.code == 2
    assert r"argument --namespace: b'\xff\xfe' is not UTF-8" in capsys.readouterr().err
