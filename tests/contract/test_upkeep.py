"""The commands around the index: rebuilding in a second generation, audit, fsck."""

import io
import json
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from kafka import KafkaProducer
from PIL import Image

from deploy.local import LocalKafka, LocalRedis
from tests.conftest import Topics
from tests.contract.harness import Bench, earliest_ids, near, place_all, vectors
from worker import __main__ as worker
from worker.embedder import Embedder
from worker.errors import ConfigError, ModelMismatch
from worker.index import Index
from worker.index.fsck import CLUSTERS, check
from worker.index.keys import Keys
from worker.index.space import remove_retired
from worker.index.store import PIPELINE, Store


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
    assert remove_retired(bench.store(), bench.namespace) > 0
    bench.assert_whole()


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
    assert index.audit(bench.namespace, 10).run().recall == 1.0


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
        (lambda keys: ("SET", keys.chunk(1, 1), b"x"), "beyond its length"),
        (lambda keys: ("SADD", keys.due, b"\0\0\0\x09"), "are due"),
        (lambda keys: ("DEL", keys.log), "log"),
        (lambda keys: ("HSET", keys.prefix + "id:0", b"x" * 16, 999), "leads to sequence 999"),
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


def test_rebuild_from_the_topic(
    redis_server: LocalRedis,
    kafka_server: LocalKafka,
    topics: Topics,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Adds, a check and a tombstone, in the order and with the positions Kafka gave them."""
    bench = Bench(redis_server.client, "default")
    bench.index(model="old").place(bench.arrivals("p", vectors(3)))
    producer = KafkaProducer(bootstrap_servers=kafka_server.bootstrap)
    inline = [("content-type", b"image/png")]
    for name, headers in (("a", inline), ("b", inline), ("c", [*inline, ("op", b"check")])):
        picture = io.BytesIO()
        noise(len(name) + ord(name)).save(picture, "PNG")
        producer.send(topics.images, picture.getvalue(), name.encode(), headers=headers)
    producer.send(topics.images, None, b"a")
    producer.close()
    command = ["rebuild", "--redis-url", redis_server.url, "--to-model", "default"]
    command += ["--bootstrap-servers", kafka_server.bootstrap, "--topic", topics.images]
    assert worker.main([*command, "--embed-mode", "fp32", "--decode-processes", "1"]) == 0
    assert "3 events stored" in capsys.readouterr().out
    serving = bench.index(model=Embedder.load(mode="fp32").model_id)
    assert sorted(serving.names("default", [1, 2, 3]).values()) == ["a", "b"]
    bench.assert_whole()


def noise(seed: int) -> Image.Image:
    """A picture of coloured blocks."""
    blocks = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    return Image.fromarray(blocks).resize((200, 200))


def test_rebuild_command(
    single: LocalRedis, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two photos, one of them deleted, and one broken file, from another model's namespace."""
    bench = Bench(single.client, f"rebuilt-{uuid.uuid4().hex}")
    bench.index(model="old").place(bench.arrivals("p", vectors(3)))
    for seed, name in enumerate(("a", "b")):
        noise(seed).save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes(b"nothing")
    plain = {"schema": 1, "namespace": bench.namespace}
    events = [
        *(
            {**plain, "image_id": name, "uri": (tmp_path / f"{name}.png").as_uri()}
            for name in ("a", "b", "broken")
        ),
        {**plain, "image_id": "b", "op": "delete"},
        {**plain, "namespace": "another", "image_id": "c", "uri": "file:///c"},
    ]
    lines = tmp_path / "events.jsonl"
    lines.write_text("".join(json.dumps(event) + "\n" for event in events))
    command = ["rebuild", "--redis-url", single.url, "--namespace", bench.namespace]
    command += ["--to-model", "default", "--events", str(lines), "--embed-mode", "fp32"]
    command += ["--fetch-schemes", "file", "--fetch-roots", str(tmp_path)]
    assert worker.main(command) == 1
    assert "3 events stored" in capsys.readouterr().out
    model = Embedder.load(mode="fp32").model_id
    serving = replace(bench).index(model=model)
    assert serving.names(bench.namespace, [1, 2, 3]) == {1: "a", 2: "b"}
    bench.assert_whole()
