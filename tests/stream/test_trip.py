"""The whole trip of an event, through a real broker, a real worker process and a real Redis."""

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaAdminClient
from kafka.structs import TopicPartition

from deploy.local import LocalKafka
from tests.conftest import Topics
from tests.photos import jpeg, photos, scene
from tests.stream.conftest import StartWorker
from tests.stream.harness import (
    PATIENT,
    Event,
    Reader,
    Worker,
    by_uri,
    inline,
    publish,
    tombstone,
    until,
)

VERDICT_SECONDS = 300


def committed(kafka: LocalKafka, topics: Topics) -> dict[TopicPartition, int]:
    with_offsets = KafkaAdminClient(bootstrap_servers=kafka.bootstrap)
    try:
        found = with_offsets.list_group_offsets({topics.group: None})[topics.group]
        return {partition: value.offset for partition, value in found.items()}
    finally:
        with_offsets.close()


def test_every_kind_of_event(
    kafka_server: LocalKafka, topics: Topics, start_worker: StartWorker, tmp_path: Path
) -> None:
    """Add, near copy by uri, exact copy, check, delete, tombstone, conflict; in one partition."""
    cat, cup = photos()["chelsea"], photos()["coffee"]
    smaller = tmp_path / "smaller.jpg"
    smaller.write_bytes(jpeg(cat.resize((200, 133)), 70))
    cat_bytes = jpeg(cat)
    worker = start_worker(fetch_schemes="file", fetch_roots=tmp_path, **PATIENT).wait_ready()
    attributes = {"sku": "ü-1", "n": [1, 2.5, None, {"deep": True}]}
    events = [
        inline("cat", cat_bytes, partition=0, occurred_at="2026-01-02T03:04:05Z"),
        by_uri("small-cat", smaller.as_uri(), partition=0, attributes=attributes),
        inline("same-cat", cat_bytes, partition=0),
        inline("cup", jpeg(cup), partition=0),
        inline("cat", jpeg(cup, 50), partition=0),  # the same id with other bytes
        by_uri("checked", smaller.as_uri(), partition=0, op="check"),
        inline("cat", cat_bytes, partition=0, namespace="elsewhere"),
        tombstone("cup", partition=0),
        inline("late-cup", jpeg(cup, 60), partition=0),
        Event(
            "late-cup",
            json.dumps({"schema": 1, "image_id": "late-cup", "op": "delete"}).encode(),
            partition=0,
        ),
        inline("last-cup", jpeg(cup, 61), partition=0),
    ]
    publish(kafka_server.bootstrap, topics.images, events)
    with Reader(kafka_server.bootstrap, topics.verdicts, topics.dead_letters) as reader:
        reader.wait(
            lambda: len(reader.messages[topics.verdicts]) >= 8, VERDICT_SECONDS, "eight verdicts"
        )
        verdicts = reader.verdicts(topics.verdicts)
        dead = reader.messages[topics.dead_letters]
    by_place = {(v["namespace"], v["image_id"]): v for v in verdicts}
    kinds = {place: (v["verdict"], v["duplicate_of"]) for place, v in by_place.items()}
    assert kinds == {
        ("default", "cat"): ("unique", None),
        ("default", "small-cat"): ("duplicate", "cat"),
        ("default", "same-cat"): ("exact", "cat"),
        ("default", "cup"): ("unique", None),
        ("default", "checked"): ("exact", "small-cat"),
        ("elsewhere", "cat"): ("unique", None),
        ("default", "late-cup"): ("unique", None),
        ("default", "last-cup"): ("unique", None),
    }
    small = by_place["default", "small-cat"]
    assert small["attributes"] == attributes
    assert small["similarity"] >= small["threshold"]
    assert small["matches"][0]["image_id"] == "cat"
    assert by_place["default", "cat"]["occurred_at"] == "2026-01-02T03:04:05Z"
    assert len({v["verdict_id"] for v in verdicts}) == len(verdicts)
    assert [dict(message.headers)["dedup-reason"] for message in dead] == [b"id_conflict"]
    assert dead[0].value == events[4].value
    check_metrics(worker)
    check_build_info(labels(worker, "dedup_build_info"), verdicts)
    assert worker.terminate() == 0
    assert committed(kafka_server, topics)[TopicPartition(topics.images, 0)] == len(events)


def test_an_id_is_its_first_events_whatever_is_known_of_the_next_ones_bytes(
    kafka_server: LocalKafka, topics: Topics, start_worker: StartWorker
) -> None:
    """Known bytes are recognised before anything is decoded: not past an event of the same id."""
    known = jpeg(photos()["chelsea"])
    start_worker(**PATIENT).wait_ready()
    with Reader(kafka_server.bootstrap, topics.verdicts, topics.dead_letters) as reader:
        publish(kafka_server.bootstrap, topics.images, [inline("known", known, partition=0)])
        reader.wait(lambda: len(reader.messages[topics.verdicts]) == 1, VERDICT_SECONDS, "one")
        again = inline("twice", known, partition=0)
        new = inline("twice", jpeg(photos()["coffee"]), partition=0)
        publish(kafka_server.bootstrap, topics.images, [new, again])
        reader.wait(lambda: len(reader.messages[topics.verdicts]) == 2, VERDICT_SECONDS, "two")
        reader.wait(lambda: len(reader.messages[topics.dead_letters]) == 1, VERDICT_SECONDS, "it")
        verdict = reader.verdicts(topics.verdicts)[-1]
        (dead,) = reader.messages[topics.dead_letters]
    assert (verdict["image_id"], verdict["verdict"]) == ("twice", "unique")
    assert (dead.value, dict(dead.headers)["dedup-reason"]) == (known, b"id_conflict")


def test_a_check_is_not_told_of_a_copy_that_came_after_it(
    kafka_server: LocalKafka, topics: Topics, start_worker: StartWorker
) -> None:
    """The copy's bytes are known, so it might be stored before the check is decoded."""
    known = jpeg(photos()["chelsea"])
    start_worker(**PATIENT).wait_ready()
    with Reader(kafka_server.bootstrap, topics.verdicts) as reader:
        publish(kafka_server.bootstrap, topics.images, [inline("known", known, partition=0)])
        reader.wait(lambda: len(reader.messages[topics.verdicts]) == 1, VERDICT_SECONDS, "one")
        asked = inline("known", known, partition=0, op="check")
        publish(kafka_server.bootstrap, topics.images, [asked, inline("b", known, partition=0)])
        reader.wait(lambda: len(reader.messages[topics.verdicts]) == 3, VERDICT_SECONDS, "three")
        said = sorted((v["image_id"], v["verdict"]) for v in reader.verdicts(topics.verdicts))
    assert said == [("b", "exact"), ("known", "unique"), ("known", "unique")]


def check_build_info(info: dict[str, str], verdicts: list[dict[str, Any]]) -> None:
    """It says what runs, as the verdicts do."""
    assert {info["model_id"]} == {verdict["model_id"] for verdict in verdicts}
    assert {float(info["threshold"])} == {verdict["threshold"] for verdict in verdicts}
    assert info["version"] == version("image-dedup-stream")
    assert (info["device"], info["embed_mode"]) == ("cpu", "fp32")


def labels(worker: Worker, metric: str) -> dict[str, str]:
    """Those of a metric's one sample."""
    lines = worker.get("/metrics").text.splitlines()
    (line,) = (line for line in lines if line.startswith(metric + "{"))
    return dict(re.findall(r'(\w+)="([^"]*)"', line))


def check_metrics(worker: Any) -> None:
    """The counters agree with what the test published."""
    until(lambda: worker.metric("dedup_events_total", op="delete") == 2, VERDICT_SECONDS, "metrics")
    assert worker.metric("dedup_verdicts_total", verdict="unique") == 5
    assert worker.metric("dedup_verdicts_total", verdict="exact") == 2
    assert worker.metric("dedup_dead_letters_total", reason="id_conflict") == 1
    assert worker.metric("dedup_event_to_verdict_seconds_count") == 8
    assert worker.metric("dedup_batch_images_sum") >= 6
    assert worker.get("/livez").json() == {"loop": True}
    assert all(worker.get("/readyz").json().values())
    assert worker.get("/nothing").status_code == 404
    assert not [line for line in worker.lines() if line["level"] == "error"]


def test_a_second_worker_goes_on_where_the_first_stopped(
    kafka_server: LocalKafka, topics: Topics, start_worker: StartWorker
) -> None:
    """Nothing is answered twice, and what the first one stored is matched."""
    first = start_worker(threshold=0.9, **PATIENT).wait_ready()
    scenes = {f"scene-{number}": scene(number) for number in range(6)}
    originals = [inline(name, jpeg(image)) for name, image in scenes.items()]
    publish(kafka_server.bootstrap, topics.images, originals)
    with Reader(kafka_server.bootstrap, topics.verdicts) as reader:
        reader.wait(lambda: len(reader.messages[topics.verdicts]) == 6, VERDICT_SECONDS, "six")
        assert first.terminate() == 0
        second = start_worker(threshold=0.9, **PATIENT).wait_ready()
        copies = [inline(f"copy-{name}", jpeg(image, 60)) for name, image in scenes.items()]
        publish(kafka_server.bootstrap, topics.images, copies)
        reader.wait(lambda: len(reader.messages[topics.verdicts]) == 12, VERDICT_SECONDS, "twelve")
        verdicts = reader.verdicts(topics.verdicts)
    assert second.metric("dedup_redeliveries_total") == 0
    found = {v["image_id"]: v["duplicate_of"] for v in verdicts if v["verdict"] == "duplicate"}
    assert found == {f"copy-{name}": name for name in scenes}


@pytest.mark.parametrize("flags", [("--matches", "0"), ("--weights", "/no/such.safetensors")])
def test_a_wrong_setting_ends_with_one_line_and_status_2(
    flags: tuple[str, str], tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "worker", *flags, "--http-port", "0", "--log-level", "error"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_events_longer_than_one_answer_of_kafka_still_come(
    kafka_server: LocalKafka, topics: Topics, start_worker: StartWorker
) -> None:
    start_worker(poll_bytes=1024, **PATIENT)
    padding = b"\0" * 3_000_000  # behind the end of a JPEG, and ignored
    pictures = [jpeg(scene(number)) + padding * (number == 1) for number in range(3)]
    assert min(map(len, pictures)) > 1024
    events = [inline(str(number), data, partition=0) for number, data in enumerate(pictures)]
    publish(kafka_server.bootstrap, topics.images, events)
    with Reader(kafka_server.bootstrap, topics.verdicts, topics.dead_letters) as reader:
        reader.wait(
            lambda: len(reader.verdicts(topics.verdicts)) == len(events),
            VERDICT_SECONDS,
            "verdicts",
        )
        found = [verdict["verdict"] for verdict in reader.verdicts(topics.verdicts)]
    assert found == ["unique"] * len(events)
