"""What fsck sees: each of its checks fires where what it checks is broken."""

import hashlib
import uuid
from collections.abc import Callable

import pytest

from deploy.local import LocalRedis
from tests.contract.harness import Bench, place_all, vectors, verdict
from worker import __main__ as worker
from worker.decide import MICRO, Decision, Near, pack
from worker.index.fsck import check
from worker.index.keys import (
    CLUSTER,
    COPY,
    IMAGE,
    LIVE,
    NAMESPACES,
    RECORD,
    Keys,
    digest,
    encode,
)
from worker.index.store import Store
from worker.messages import VerdictKind

FIRST = CLUSTER.pack(1)


def record(sequence: int, kind: int = LIVE, home: int = 1) -> bytes:
    """The record of image p-(n-1), one thing or another about it changed."""
    sha = hashlib.sha256(b"p-%d" % (sequence - 1)).digest()[:16]
    return IMAGE.pack(kind, sha, 0, 0, sequence, 0, home)


def naming(sequence: int) -> bytes:
    """A verdict that names an image."""
    near = Near(sequence, MICRO)
    return pack(Decision(VerdictKind.EXACT, MICRO, 1, 1, False, near, near, (near,)))


@pytest.mark.parametrize(
    ("breaking", "said"),
    [
        (lambda keys: ("DEL", keys.chunk(1, 0)), "records"),
        (lambda keys: ("DEL", keys.clusters), "there is no cluster"),
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
        (lambda keys: ("HSET", *keys.record(3), b"x"), "record of sequence 3 is none: 1 bytes"),
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
        (lambda keys: ("HSET", keys.centroids, FIRST, b"1" * 128), "not what its log says"),
        (lambda keys: ("HSET", *keys.record(3), record(3, home=9)), "3 says cluster 9; it is in 1"),
        (lambda keys: ("HSET", *keys.record(3), record(3, COPY)), "3 is no living original but"),
        (lambda keys: ("SETRANGE", keys.chunk(1, 0), 0, b"\2"), "1 holds a sequence twice"),
        (lambda keys: ("SETRANGE", keys.chunk(1, 0), 0, b"\0"), "keeps the vector of a deleted"),
        (lambda keys: ("APPEND", keys.chunk(1, 0), b"x"), "1 has bytes behind its last record"),
        (lambda keys: ("HSET", keys.clusters, FIRST, b"y" * 13), "clusters has entries of a wrong"),
        (lambda keys: ("HSET", *keys.record(20), b"x"), "record of sequence 20 is none"),
        (lambda keys: ("HSET", *keys.record(3), b""), "record of sequence 3 is none"),
        (lambda keys: ("HSET", *keys.record(3), b"\3" * 33), "record of sequence 3 is none"),
        (lambda keys: ("HSET", *keys.record(3), b"\2" * 33), "record of sequence 3 is none"),
        (lambda keys: ("HDEL", *keys.record(20)), "last sequence handed out, 20, has no record"),
        (lambda keys: ("HSET", keys.meta, "sequence", "9" * 18), "has no record"),
        (lambda keys: ("HSET", keys.meta, "sequence", "9" * 5_000), "counter 'sequence'"),
        (lambda keys: ("HSET", keys.meta, "sequence", "zz"), "counter 'sequence'"),
        (lambda keys: ("HDEL", keys.meta, "sequence"), "counter 'sequence'"),
        (lambda keys: ("HSET", keys.meta, "version", "-1"), "counter 'version'"),
        (lambda keys: ("HDEL", keys.meta, "version"), "counter 'version'"),
        (lambda keys: ("HSET", keys.meta, "cluster", ""), "counter 'cluster'"),
        (lambda keys: ("HDEL", keys.meta, "cluster"), "counter 'cluster'"),
        (lambda keys: ("HSET", keys.meta, "cluster", 0), "'cluster' would hand out ids"),
        (lambda keys: ("HDEL", keys.meta, "salt"), "has no salt of 16 bytes"),
        (lambda keys: ("HSET", keys.meta, "salt", "x"), "has no salt of 16 bytes"),
        (lambda keys: ("DEL", keys.meta), "is empty: there is no"),
        (lambda keys: ("XADD", keys.log, "2-1", "retired", ""), "an entry that is none: '2-1'"),
        (lambda keys: ("XADD", keys.log, "2-1", *log("x", "")), "an entry that is none: '2-1'"),
        (lambda keys: ("XADD", keys.log, "2-1", *log("", "x")), "an entry that is none: '2-1'"),
        (lambda keys: ("XADD", keys.log, "1-2", *log("", "")), "an entry that is none: '1-2'"),
        (lambda keys: ("HSET", keys.root, "serving", b"\xff"), "which is no generation"),
        (lambda keys: ("HSET", keys.root, "building", b"\xff"), "which is no generation"),
        (lambda keys: ("HSET", keys.root, "serving", "other"), "generation other is empty"),
        (lambda keys: ("HSET", keys.root, "building", "other"), "generation other is empty"),
        (lambda keys: ("HDEL", keys.root, "serving"), "names no generation that answers"),
        (lambda keys: ("HDEL", keys.root, f"model:{keys.generation}"), "names no model of"),
        (lambda keys: ("HSET", keys.root, f"model:{keys.generation}", b"\xff"), "names no model"),
        (lambda keys: ("HDEL", keys.root, f"layout:{keys.generation}"), "names no record layout"),
        (
            lambda keys: ("HSET", keys.root, f"layout:{keys.generation}", 9),
            "has record layout b'9'",
        ),
        (lambda keys: ("HSET", keys.root, "topic:a", 0), "does not tell topics apart"),
        (lambda keys: ("HSET", keys.root, "topics", "x"), "does not tell topics apart"),
        (
            lambda keys: ("HSET", keys.root, "topics", 2, "topic:a", 1, "topic:b", 1),
            "does not tell topics apart",
        ),
        (lambda keys: ("DEL", keys.root), "does not exist"),
        (lambda keys: ("SREM", NAMESPACES, encode(keys.namespace)), "does not list"),
        (lambda keys: ("HSET", *verdict_of(keys, 3), b""), "verdict of sequence 3 cannot be read"),
        (lambda keys: ("HSET", *verdict_of(keys, 3), b"\xff" * 300), "cannot be read"),
        (lambda keys: ("HSET", *verdict_of(keys, 3), b"\x13"), "cannot be read"),
        (lambda keys: ("HSET", *verdict_of(keys, 3), b"\x03" * 20), "cannot be read"),
        (lambda keys: ("HSET", *verdict_of(keys, 3), verdict() + b"x"), "cannot be read"),
        (lambda keys: ("HSET", *verdict_of(keys, 3), verdict()[:-1]), "cannot be read"),
        (lambda keys: ("HSET", *verdict_of(keys, 3), naming(3)), "cannot be read"),
        (lambda keys: ("HSET", *verdict_of(keys, 3), naming(0)), "cannot be read"),
        (lambda keys: ("SET", keys.root, "x"), "root is a string, not a hash"),
        (lambda keys: ("SET", keys.meta, "x"), "meta is a string, not a hash"),
        (lambda keys: ("SET", keys.log, "x"), "log is a string, not a stream"),
        (lambda keys: ("SET", keys.due, "x"), "due is a string, not a set"),
        (lambda keys: ("SET", keys.record(3)[0], "x"), "rec:0 is a string, not a hash"),
        (lambda keys: ("SADD", keys.prefix + "copies:x", "x"), "copies:x is a set, not a zset"),
        (lambda keys: ("SADD", keys.lock(1), "x"), "lock:1 is a set, not a string"),
        (
            lambda keys: ("COPY", keys.log, keys.chunk(1, 0), "REPLACE"),
            "c:1:0 is a stream, not a s",
        ),
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
    told = capsys.readouterr().err
    assert said in told
    assert all(line.startswith(f"{bench.namespace}: ") for line in told.splitlines())


def id_of(keys: Keys, name: str) -> str:
    """The bucket of an id after 20 images."""
    return keys.lookup("id:", digest(name), 20, None)


def sha_of(keys: Keys, sha: bytes) -> str:
    """The bucket of some bytes after 20 images."""
    return keys.lookup("sha:", sha * 8, 20, None)


def verdict_of(keys: Keys, sequence: int) -> tuple[str, int]:
    """Where the verdict of a sequence is."""
    key, first = keys.record(sequence)
    return key, first + 2


def log(retired: str, added: str) -> tuple[str, ...]:
    """The fields of an entry of the log."""
    return "retired", retired, "added", added


def sha(name: str) -> bytes:
    """The digest that bytes are looked up by."""
    return hashlib.sha256(name.encode()).digest()[:16]


def in_two_clusters(store: Store, keys: Keys) -> None:
    """A sequence of one cluster is written over one of another, too."""
    first, second, *_ = (CLUSTER.unpack(each)[0] for each in store.command("HKEYS", keys.clusters))
    taken = store.command("GETRANGE", keys.chunk(first, 0), 0, 7)
    store.command("SETRANGE", keys.chunk(second, 0), 0, taken)


def in_another_bucket(store: Store, keys: Keys) -> None:
    """An entry of one bucket stands in the other, too."""
    ((name, value), *_) = store.command("HGETALL", keys.prefix + "id:1").items()
    store.command("HSET", keys.prefix + "id:0", name, value)


def behind_a_chunk_in_the_middle(store: Store, keys: Keys) -> None:
    """A whole record that no state counts."""
    number = next(iter(store.command("HKEYS", keys.clusters)))
    store.command("APPEND", keys.chunk(CLUSTER.unpack(number)[0], 0), b"x" * RECORD)


def of_copies(keys: Keys) -> bytes:
    """The list of the copies of p-4."""
    return f"{keys.prefix}copies:".encode() + sha("p-4")


@pytest.mark.parametrize(
    ("breaking", "said"),
    [
        (in_two_clusters, ", too"),
        (in_another_bucket, "id:0 holds an entry of another bucket"),
        (behind_a_chunk_in_the_middle, "has bytes behind its last record"),
        (lambda store, keys: store.command("DEL", of_copies(keys)), "copy 41 is not listed"),
        (
            lambda store, keys: store.command("ZADD", of_copies(keys), 99, 41),
            "copy 41 is not listed",
        ),
        (
            lambda store, keys: store.command("HSET", *original(store, keys), 41),
            "copy 41 has no original; its bytes lead to 41",
        ),
        (
            lambda store, keys: store.command("HSET", keys.meta, "cluster", 2),
            "the counter 'cluster' would hand out ids of clusters that there were",
        ),
    ],
)
def test_fsck_sees_what_is_broken_among_clusters_and_copies(
    bench: Bench, breaking: Callable[[Store, Keys], object], said: str
) -> None:
    index = bench.index()
    place_all(index, bench.arrivals("p", vectors(40)))
    index.place([bench.arrival("copy", vectors(5)[4], bytes="p-4")])
    bench.assert_whole()
    store = bench.store()
    breaking(store, bench.keys())
    assert [problem for problem in check(store, bench.namespace) if said in problem]


def original(store: Store, keys: Keys) -> tuple[str, bytes]:
    """Where the bytes of p-4 lead to their original, of 41."""
    salt = store.command("HGET", keys.meta, "salt")
    return keys.lookup("sha:", sha("p-4"), 41, salt), sha("p-4")


def test_fsck_sees_a_copy_whose_original_is_gone(bench: Bench) -> None:
    """As a delete would leave it that had not seen the copy: all else holds."""
    index, rows = bench.index(), vectors(2)
    index.place([bench.arrival("original", rows[0]), bench.arrival("other", rows[1])])
    store, keys = bench.store(), bench.keys()
    list_of_copies = f"{keys.prefix}copies:".encode() + sha("original")
    index.place([bench.arrival("copy", rows[0], bytes="original")])
    store.command("RENAME", list_of_copies, keys.prefix + "hidden")
    assert index.forget(bench.namespace, "original", (0, 99))
    store.command("RENAME", keys.prefix + "hidden", list_of_copies)
    assert check(store, bench.namespace) == ["copy 3 has no original; its bytes lead to None"]


def test_fsck_sees_the_entry_of_a_deleted_image(bench: Bench) -> None:
    index, row = bench.index(), vectors(1)
    index.place([first := bench.arrival("p", row[0])])
    index.forget(bench.namespace, "p", (0, 9))
    bench.assert_whole()
    entry = first.sha256[:16]
    bench.store().command("HSET", bench.keys().prefix + "sha:0", entry, 1)
    (said,) = check(bench.store(), bench.namespace)
    assert said.endswith("sha:0 leads to sequence 1, which is no living original of these bytes")
