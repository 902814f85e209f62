"""The commands around the index: audit, fsck."""

import itertools
import math
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from random import Random

import numpy as np
import pytest

from deploy.local import LocalRedis
from deploy.process import free_port
from tests.contract.harness import Bench, near, place_all, vectors
from worker import __main__ as worker
from worker import service
from worker.config import Settings
from worker.errors import InfrastructureError
from worker.index import Index
from worker.index.auditing import Audit
from worker.index.fsck import CLUSTERS, check
from worker.index.keys import NAMESPACES, Keys, digest
from worker.index.store import PIPELINE, Store
from worker.metrics import Metrics
from worker.service import Auditor


def test_an_audit_finds_what_probing_misses(bench: Bench) -> None:
    """Probing is led astray here: every cluster is given its neighbour's centroid."""
    rows = vectors(300)
    index = bench.index(probes=1)
    place_all(index, [*bench.arrivals("p", rows), *bench.arrivals("c", near(rows))])
    right = index.audit(bench.namespace, 80).run()
    assert right.sampled == 80
    assert right.found > 0.9 * right.duplicates > 10
    store, keys = bench.store(), bench.keys()
    table = store.command("HGETALL", keys.centroids)
    turned = dict(zip(table, [*list(table.values())[1:], *list(table.values())[:1]], strict=True))
    store.command("DEL", keys.log)
    store.command("HSET", keys.centroids, *(part for item in turned.items() for part in item))
    wrong = bench.index(probes=1).audit(bench.namespace, 80).run()
    assert wrong.duplicates > 10
    assert wrong.found < wrong.duplicates / 2


def test_an_audit_of_nothing_has_nothing_to_find(bench: Bench) -> None:
    index = bench.index()
    assert math.isnan(index.audit(bench.namespace, 10).run().recall)
    place_all(index, bench.arrivals("p", vectors(10)))
    result = index.audit(bench.namespace, 10).run()
    assert (result.sampled > 0, result.duplicates) == (True, 0)
    assert math.isnan(result.recall)


def test_an_audit_samples_old_and_young_images_alike(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secrets.randbelow", Random(0).randrange)
    index = bench.index()
    place_all(index, bench.arrivals("p", vectors(400)))
    drawn = [index.audit(bench.namespace, 10)._sequences for _ in range(30)]
    assert {len(each) for each in drawn} == {10}
    assert 180 < np.concatenate(drawn).mean() < 220


def test_an_audit_that_was_interrupted_leaves_nothing_out(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, rows = bench.index(), vectors(20)
    place_all(index, [*bench.arrivals("p", rows), *bench.arrivals("c", near(rows))])
    audit = index.audit(bench.namespace, 40)
    with monkeypatch.context() as broken:
        broken.setattr(Store, "command", away)
        broken.setattr(Store, "commands", away)
        with pytest.raises(InfrastructureError):
            audit.step()
    assert audit.run().duplicates > 10


def away(*arguments: object) -> None:
    """A server that does not answer."""
    raise InfrastructureError("away")


def test_namespaces_are_audited_in_turn_after_a_pause_each(
    single: LocalRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gauge is not a number until something was there to find."""
    clock = [0.0]
    monkeypatch.setattr(service, "monotonic", lambda: clock[0])
    first, second = (Bench(single.client, f"{name}-{uuid.uuid4().hex}") for name in "ab")
    index, rows, metrics = first.index(), vectors(20), Metrics()
    place_all(index, first.arrivals("p", rows))
    place_all(index, [*second.arrivals("p", rows), *second.arrivals("c", near(rows))])
    auditor = Auditor(index, Settings(audit_images=100, audit_pause_seconds=10), metrics)
    audited: list[str] = []
    recalls: list[float] = []

    def audit(namespace: str, sample: int) -> Audit:
        audited.append(namespace)
        return Index.audit(index, namespace, sample)

    monkeypatch.setattr(index, "audit", audit)
    for clock[0] in range(35):
        auditor.step()
        recalls.append(metrics.audit_recall._value.get())
    assert audited == [first.namespace, second.namespace, first.namespace]
    assert list(dict.fromkeys(map(str, recalls))) == ["nan", "1.0"]


@pytest.mark.parametrize(
    ("breaking", "said"),
    [
        (lambda keys: ("DEL", keys.chunk(1, 0)), "records"),
        (lambda keys: ("HDEL", keys.centroids, b"\0\0\0\1"), "without a state or centroid"),
        (lambda keys: ("HDEL", keys.record(3)[0], keys.record(3)[1]), "has no record"),
        (lambda keys: ("HDEL", keys.record(3)[0], keys.record(3)[1] + 1), "has no id"),
        (lambda keys: ("DEL", keys.prefix + "id:0"), "does not lead back"),
        (lambda keys: ("DEL", keys.prefix + "sha:0"), "lead to None"),
        (lambda keys: ("SETRANGE", keys.chunk(1, 0), 0, b"\0" * 136), "living records"),
        (lambda keys: ("SETRANGE", keys.chunk(1, 0), 0, b"\xff"), "never handed out"),
        (lambda keys: ("SET", keys.chunk(1, 1), b"x"), "belongs to nothing"),
        (lambda keys: ("SADD", keys.due, b"\0\0\0\x09"), "upkeep is due"),
        (lambda keys: ("DEL", keys.log), "log"),
        (lambda keys: ("HSET", keys.prefix + "id:0", b"x" * 16, 999), "leads to sequence 999"),
        (lambda keys: ("HSET", id_of(keys, "no"), digest("no"), 3), "has another id"),
        (lambda keys: ("HSET", id_of(keys, "p-4"), digest("p-4"), 3), "has another id"),
        (lambda keys: ("HSET", sha_of(keys, b"no"), b"no" * 8, 3), "no living original"),
        (lambda keys: ("HSET", sha_of(keys, b"\0"), b"\0" * 16, 0), "leads to sequence 0"),
        (lambda keys: ("HSET", id_of(keys, "p-4"), digest("p-4"), b"x"), "leads to sequence x"),
        (lambda keys: ("HSET", *keys.record(3), b"x"), "record of sequence 3 has 1 bytes"),
        (lambda keys: ("HSET", keys.record(3)[0], keys.record(3)[1] + 1, b"\xff"), "not lead back"),
        (lambda keys: ("HSET", keys.record(0)[0], 0, b"x"), "field b'0' of no sequence"),
        (lambda keys: ("HSET", keys.record(0)[0], 21 * 4, b"x"), "field b'84' of no sequence"),
        (lambda keys: ("HSET", keys.record(0)[0], "x", b"x"), "field b'x' of no sequence"),
        (lambda keys: ("HSET", keys.record(32)[0], 0, b"x"), "rec:1 belongs to nothing"),
        (lambda keys: ("SET", keys.chunk(9, 0), b"x"), "c:9:0 belongs to nothing"),
        (lambda keys: ("SET", keys.prefix + "c:01:0", b"x"), "c:01:0 belongs to nothing"),
        (lambda keys: ("SET", keys.prefix + "what", b"x"), "what belongs to nothing"),
        (lambda keys: ("HSET", keys.prefix + "sha:1", b"x", 1), "sha:1 belongs to nothing"),
        (lambda keys: ("ZADD", keys.prefix + "copies:x", 0, 0), "sequence 0 is listed as a copy"),
        (lambda keys: ("ZADD", keys.prefix + "copies:x", 3, 3), "sequence 3 is listed as a copy"),
        (lambda keys: ("ZADD", keys.prefix + "copies:x", 33, 33), "sequence 33 is listed"),
        (lambda keys: ("ZADD", keys.prefix + "copies:x", 0, "x"), "sequence x is listed"),
        (lambda keys: ("HINCRBY", keys.meta, "version", 1), "another version"),
        (lambda keys: ("HSET", keys.clusters, b"x", b"y" * 12), "clusters has entries of a wrong"),
        (lambda keys: ("HSET", keys.centroids, b"\0\0\0\1", b"y"), "centroids has entries of a"),
        (lambda keys: ("SADD", keys.due, b"x"), "due for what is no cluster"),
    ],
)
def test_fsck_sees_what_is_broken(
    single: LocalRedis,
    breaking: Callable[[Keys], tuple[str, ...]],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bench = Bench(single.client, f"broken-{uuid.uuid4().hex}")
    bench.index().place(bench.arrivals("p", vectors(20)))
    command = ["fsck", "--redis-url", single.url, "--namespace", bench.namespace]
    assert worker.main(command) == 0
    bench.store().command(*breaking(bench.keys()))
    assert worker.main(command) == 1
    assert said in capsys.readouterr().err


def id_of(keys: Keys, name: str) -> str:
    """The bucket of an id after 20 images."""
    return keys.lookup("id:", digest(name), 20, None)


def sha_of(keys: Keys, sha: bytes) -> str:
    """The bucket of some bytes after 20 images."""
    return keys.lookup("sha:", sha * 8, 20, None)


def test_fsck_sees_the_entry_of_a_deleted_image(bench: Bench) -> None:
    index, row = bench.index(), vectors(1)
    index.place([first := bench.arrival("p", row[0])])
    index.forget(bench.namespace, "p", (0, 9))
    bench.assert_whole()
    entry = first.sha256[:16]
    bench.store().command("HSET", bench.keys().prefix + "sha:0", entry, 1)
    (said,) = check(bench.store(), bench.namespace)
    assert said.endswith("sha:0 leads to sequence 1, which is no living original of these bytes")


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
    clusters = -(-len(bench.store().command("HKEYS", bench.keys().clusters)) // CLUSTERS)
    # Buckets of records, of ids and of bytes; then for each image a lookup by id and one by bytes.
    most = 3 + 2 * -(-1100 // PIPELINE) + 2 * clusters + 20
    assert len(trips) < most


def test_audit_command(single: LocalRedis, capsys: pytest.CaptureFixture[str]) -> None:
    bench = Bench(single.client, f"audited-{uuid.uuid4().hex}")
    place_all(bench.index(), [*bench.arrivals("p", vectors(50)), *bench.arrivals("c", vectors(50))])
    command = ["audit", "--redis-url", single.url, "--namespace", bench.namespace]
    command += ["--threshold", "0.8", "--sample", "20", "--at-least", "0.99"]
    assert worker.main(command) == 0
    assert "recall 1.0000" in capsys.readouterr().out
    assert worker.main([*command[:3], "--namespace", "nowhere", "--threshold", "0.8"]) == 2
    capsys.readouterr()
    others = Bench(single.client, f"audited-{uuid.uuid4().hex}")
    others.index().place(others.arrivals("p", vectors(9)))
    assert worker.main([*command, "--namespace", others.namespace]) == 0
    assert "there was nothing to find" in capsys.readouterr().out


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


@pytest.mark.parametrize("arguments", [["--namespace", ""], ["--sample", "0"], ["--sample", "x"]])
def test_odd_arguments_are_told(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        worker.main(["audit", "--threshold", "0.8", *arguments])
    assert ended.value.code == 2
    assert f"argument {arguments[0]}" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["fsck"], ["audit", "--threshold", "0.8"]])
def test_a_command_says_in_one_line_that_redis_is_away(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert worker.main([*command, "--redis-url", f"redis://127.0.0.1:{free_port()}/0"]) == 3
    assert capsys.readouterr().err.startswith("error: Redis: ")


def test_a_node_of_a_cluster_is_not_taken_for_a_server_alone(
    trio: LocalRedis, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"audited-{number}" for number in range(16)]  # some of them on other nodes
    command = ["audit", "--redis-url", trio.url, "--threshold", "0.8", "--namespace"]
    assert {worker.main([*command, name]) for name in names} == {2, 3}
    assert "set DEDUP_REDIS_CLUSTER=true" in capsys.readouterr().err
