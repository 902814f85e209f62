"""The command that rebuilds namespaces: topic, file, refusals, and Redis away meanwhile."""

import hashlib
import io
import json
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from time import sleep

import numpy as np
import pytest
from PIL import Image

from deploy.local import LocalKafka, LocalRedis
from deploy.process import free_port
from tests.conftest import Topics
from tests.contract.harness import Bench, vectors
from tests.stream.harness import Event, by_uri, inline, publish, tombstone
from worker import __main__ as worker
from worker.embedder import Embedder
from worker.errors import InfrastructureError
from worker.index import Index
from worker.index.missing import Missing
from worker.index.store import Store

Rebuild = Callable[..., int]


def picture(seed: int) -> bytes:
    """A PNG of coloured blocks."""
    blocks = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(blocks).resize((200, 200)).save(file, "PNG")
    return file.getvalue()


def stored(bench: Bench, pictures: Mapping[str, bytes]) -> None:
    """Images in the generation of another model, of these bytes."""
    rows, index = vectors(len(pictures)), bench.index(model="old")
    index.open(bench.namespace)
    index.place(
        [
            bench.arrival(name, row, sha256=hashlib.sha256(data).digest())
            for (name, data), row in zip(pictures.items(), rows, strict=True)
        ]
    )


@pytest.fixture
def rebuild(
    redis_server: LocalRedis,
    kafka_server: LocalKafka,
    topics: Topics,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Rebuild:
    """Publish events, then run the command with these flags; its exit status."""
    monkeypatch.setattr("worker.logs.configure", lambda level, shape: None)  # logs are pytest's

    def run(events: list[Event], *flags: str) -> int:
        publish(kafka_server.bootstrap, topics.images, events)
        command = ["rebuild", "--redis-url", redis_server.url, "--to-model", "default"]
        command += ["--bootstrap-servers", kafka_server.bootstrap, "--topic", topics.images]
        command += ["--embed-mode", "fp32", "--decode-processes", "1"]
        command += ["--fetch-schemes", "file", "--fetch-roots", str(tmp_path), *flags]
        return worker.main(command)

    return run


def names(bench: Bench) -> list[str]:
    """Ids in the generation that answers, which is the one of the default weights."""
    serving = bench.index(model=Embedder.load(mode="fp32").model_id)
    return sorted(serving.names(bench.namespace, range(1, bench.sequences() + 1)).values())


def test_rebuild_from_the_topic(
    redis_server: LocalRedis, rebuild: Rebuild, capsys: pytest.CaptureFixture[str]
) -> None:
    """Adds, a check, a tombstone and another namespace's, in the order Kafka gave them."""
    bench = Bench(redis_server.client, "default")
    stored(bench, {"b": picture(2)})
    events = [inline("a", picture(1)), inline("b", picture(2)), tombstone("a")]
    events += [inline("c", picture(3), op="check"), inline("d", picture(4), namespace="other")]
    assert rebuild(events) == 0
    said = capsys.readouterr().out
    assert "3 events stored" in said and "failed; switched; " in said
    assert rebuild([]) == 0
    assert "failed; it answered before, so nothing was switched\n" in capsys.readouterr().out
    assert names(bench) == ["a", "b"]
    bench.assert_whole()


def test_a_rebuild_that_would_forget_images_is_refused(
    redis_server: LocalRedis, rebuild: Rebuild, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was built is kept: once the cause is mended the same command goes on with it."""
    bench, file = Bench(redis_server.client, "default"), tmp_path / "broken.png"
    stored(bench, {"a": picture(1), "broken": picture(2)})
    file.write_bytes(b"nothing")
    old = bench.keys()
    assert rebuild([inline("a", picture(1)), by_uri("broken", file.as_uri())]) == 1
    said = capsys.readouterr().err
    assert "could not be stored again: 1, such as broken (not switched" in said
    assert "broken: unsupported_format" in said
    assert bench.keys() == old
    assert bench.index(model="old").names("default", [1, 2]) == {1: "a", 2: "broken"}
    file.write_bytes(picture(2))
    assert rebuild([]) == 0
    assert names(bench) == ["a", "broken"]
    bench.assert_whole()


def test_images_may_be_given_up(redis_server: LocalRedis, rebuild: Rebuild) -> None:
    bench = Bench(redis_server.client, "default")
    stored(bench, {name: picture(seed) for seed, name in enumerate("abc")})
    assert rebuild([inline("a", picture(0))], "--allow-missing", "1") == 1
    assert rebuild([], "--allow-missing", "2") == 0
    assert names(bench) == ["a"]


def test_several_namespaces_are_moved_together(
    redis_server: LocalRedis, rebuild: Rebuild, capsys: pytest.CaptureFixture[str]
) -> None:
    """None of them is switched where one would forget images."""
    spaces = [Bench(redis_server.client, name) for name in ("default", "one", "two")]
    for seed, bench in enumerate(spaces[1:]):
        stored(bench, {"a": picture(seed)})
    stored(spaces[0], {})
    flags = [part for bench in spaces for part in ("--namespace", bench.namespace)]
    assert rebuild([inline("a", picture(0), namespace="one")], *flags) == 1
    assert "error: two: images" in capsys.readouterr().err
    assert spaces[1].index(model="old").names("one", [1]) == {1: "a"}
    assert rebuild([inline("a", picture(1), namespace="two")], *flags) == 0
    assert [names(bench) for bench in spaces] == [[], ["a"], ["a"]]


def test_a_rebuild_from_a_file_goes_on_with_the_topic(
    redis_server: LocalRedis, rebuild: Rebuild, tmp_path: Path
) -> None:
    """What came after the file was written is on the topic: an add, and a delete of what it has."""
    bench = Bench(redis_server.client, "default")
    stored(bench, {"a": picture(1), "c": picture(3)})
    lines = []
    for seed, name in ((1, "a"), (2, "b")):
        (tmp_path / name).write_bytes(picture(seed))
        lines.append({"schema": 1, "image_id": name, "uri": (tmp_path / name).as_uri()})
    file = tmp_path / "events.jsonl"
    file.write_text("".join(json.dumps(line) + "\n\n" for line in lines))
    assert rebuild([tombstone("b"), inline("c", picture(3))], "--events", str(file)) == 0
    assert names(bench) == ["a", "b", "c"]
    serving = bench.index(model=Embedder.load(mode="fp32").model_id)
    deleted = bench.arrival("b", sha256=hashlib.sha256(picture(2)).digest())
    assert serving.recognise([deleted]) == [None]
    bench.assert_whole()


def as_line(image_id: str, file: Path, data: bytes) -> str:
    """A line that adds a file of these bytes."""
    file.write_bytes(data)
    return json.dumps({"schema": 1, "image_id": image_id, "uri": file.as_uri()}) + "\n"


def test_a_file_that_came_to_hand_after_the_first_run(
    redis_server: LocalRedis, rebuild: Rebuild, tmp_path: Path
) -> None:
    """As the message of the first run says; then once more, when the new generation answers."""
    bench, file = Bench(redis_server.client, "default"), tmp_path / "events.jsonl"
    stored(bench, {"b": picture(2)})
    lines = [as_line(n, tmp_path / n, picture(at)) for at, n in enumerate("ab", 1)]
    file.write_text("".join(reversed(lines)))
    assert rebuild([by_uri("a", (tmp_path / "a").as_uri()), tombstone("a")]) == 1
    serving = bench.index(model=Embedder.load(mode="fp32").model_id)
    deleted = bench.arrival("q", sha256=hashlib.sha256(picture(1)).digest(), store=False)
    for _ in range(2):
        assert rebuild([], "--events", str(file)) == 0
        assert serving.recognise([deleted]) == [None]
        assert names(bench) == ["a", "b"]
        file.write_text("\n" + "".join(lines))
    bench.assert_whole()


def test_lines_that_are_no_events_are_told_before_anything_is_begun(
    redis_server: LocalRedis,
    rebuild: Rebuild,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One of them may be a delete. Namespaces that are not allowed are passed over."""
    bench, file = Bench(redis_server.client, "default"), tmp_path / "events.jsonl"
    stored(bench, {"b": picture(2)})
    good = as_line("b", tmp_path / "b", picture(2))
    file.write_text(good + "\n" + json.dumps([json.loads(good)], indent=1))
    assert rebuild([inline("c", picture(3))], "--events", str(file)) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --events: lines that are no events: 7, such as line 3: bad_mess")
    assert len(said.splitlines()) == 1
    assert not bench.store().command("HEXISTS", bench.keys().root, "building")
    other = json.dumps(json.loads(good) | {"namespace": "other"})
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO((good + other).encode())))
    assert rebuild([], "--events", "-", "--namespaces", "default") == 0
    assert names(bench) == ["b", "c"]


def test_a_rebuild_waits_for_redis(
    redis_server: LocalRedis, rebuild: Rebuild, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each thing it asks of the index fails the first time."""
    bench = Bench(redis_server.client, "default")
    stored(bench, {"a": picture(1)})
    failed: list[str] = []

    def fail_once(owner: type, name: str) -> None:
        ask = getattr(owner, name)

        def asked(self: object, *arguments: object) -> object:
            if name not in failed:
                failed.append(name)
                raise InfrastructureError("Redis: away")
            return ask(self, *arguments)

        monkeypatch.setattr(owner, name, asked)

    for name in ("missing", "maintain", "switch"):
        fail_once(Index, name)
    for name in ("stored", "look"):
        fail_once(Missing, name)
    fail_once(Store, "pages")
    assert rebuild([inline("a", picture(1))]) == 0
    assert failed == ["missing", "maintain", "stored", "look", "switch", "pages"]
    assert names(bench) == ["a"]


def test_a_rebuild_goes_on_when_redis_was_killed_in_the_middle(
    redis_server: LocalRedis, rebuild: Rebuild, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It works on in the generation it began, though the server is another one by its history."""
    bench, maintain, batches = Bench(redis_server.client, "default"), Index.maintain, count(1)
    stored(bench, {f"{at}": picture(at) for at in range(8)})

    middle, killed = threading.Event(), threading.Event()

    def wait_in_the_middle(index: Index, namespace: str | None = None) -> bool:
        if next(batches) == 4:
            middle.set()
            assert killed.wait(60)
        return maintain(index, namespace)

    monkeypatch.setattr(Index, "maintain", wait_in_the_middle)
    monkeypatch.setattr("worker.index.rebuild.IN_FLIGHT", 1)
    events = [inline(f"{at}", picture(at)) for at in range(8)]
    with ThreadPoolExecutor(1) as pool:  # the server ends with the thread that starts it
        status = pool.submit(rebuild, events)
        assert middle.wait(60)
        redis_server.kill()
        killed.set()
        sleep(1)
        redis_server.start()
        assert status.result() == 0
    assert next(batches) > 8
    assert names(bench) == [f"{at}" for at in range(8)]
    bench.assert_whole()


def test_a_rebuild_that_another_one_has_replaced_ends(
    redis_server: LocalRedis,
    rebuild: Rebuild,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench(redis_server.client, "default")
    stored(bench, {"a": picture(1)})
    maintain = Index.maintain

    def begin_another(index: Index, namespace: str | None = None) -> bool:
        Index(bench.connect(), "model-b", bench.settings, building=True).open("default")
        return maintain(index, namespace)

    monkeypatch.setattr(Index, "maintain", begin_another)
    many = [inline(f"{at}", picture(at)) for at in range(2)]
    monkeypatch.setattr("worker.index.rebuild.IN_FLIGHT", 1)
    assert rebuild(many) == 2
    assert "is being rebuilt by someone else" in capsys.readouterr().err.splitlines()[-1]


def test_a_rebuild_can_be_given_up(
    redis_server: LocalRedis, rebuild: Rebuild, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a rebuild to the model that answers."""
    bench = Bench(redis_server.client, "default")
    model = Embedder.load(mode="fp32").model_id
    bench.index(model=model).open("default")
    serving = bench.keys()
    begun = Index(bench.connect(), "model-b", bench.settings, building=True)
    begun.place(bench.arrivals("p", vectors(3)))
    assert rebuild([]) == 0
    assert capsys.readouterr().out.rstrip().endswith("keys of model model-b removed")
    assert bench.keys() == serving
    assert not bench.store().command("HEXISTS", serving.root, "building")
    bench.assert_whole()


def test_a_rebuild_needs_its_file_and_its_topic(
    redis_server: LocalRedis, rebuild: Rebuild, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = Bench(redis_server.client, "default")
    stored(bench, {"a": picture(1)})
    assert rebuild([], "--events", "/no/such/file") == 2
    assert rebuild([], "--topic", "nowhere") == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: --events: [Errno 2] No such file or directory: '/no/such/file'",
        "error: topic 'nowhere' does not exist",
    ]


def test_without_kafka_it_ends_with_one_line(
    redis_server: LocalRedis, rebuild: Rebuild, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = Bench(redis_server.client, "default")
    stored(bench, {"a": picture(1)})
    assert rebuild([], "--bootstrap-servers", f"127.0.0.1:{free_port()}") == 3
    assert capsys.readouterr().err.startswith("error: Kafka: ")
    bench.index(model="old").open(bench.namespace)  # raises where another generation answers
