"""Events that are large, in memory alone or on the wire, too, cost themselves at most."""

import gzip
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaProducer

from deploy.local import LocalKafka
from tests.conftest import Topics
from tests.photos import jpeg, scene
from tests.stream.conftest import StartWorker
from tests.stream.harness import PATIENT, Event, Reader, Worker, inline, publish, until

SECONDS = 300
KIB, MIB = 1 << 10, 1 << 20
MESSAGE = 900 * KIB  # with the headers of a dead letter less than a topic takes by default
SPACES = 110 * MIB
LARGEST = 101_000_000  # more than kafka-python takes at once if it is not told to
GROWTH_MIB = 64  # of which is no part in proportion to what is inflated

DELIVERIES = pytest.mark.parametrize("delivery", ["at-least-once", "exactly-once"])


def publish_as_one(kafka: LocalKafka, topic: str, events: list[Event]) -> None:
    """In one compressed batch of partition 0."""
    with closing(
        KafkaProducer(
            bootstrap_servers=kafka.bootstrap,
            compression_type="gzip",
            batch_size=1 << 30,
            linger_ms=60_000,  # until it is told to flush
            max_request_size=1 << 30,
        )
    ) as producer:
        for event in events:
            key = event.key.encode()
            producer.send(topic, event.value, key=key, headers=event.headers, partition=0)
        producer.flush(120)


def header(letter: Any, name: str) -> str | None:
    value = dict(letter.headers).get(f"dedup-{name}")
    return None if value is None else value.decode()


def held_mib(worker: Worker) -> float:
    """The most memory it has had so far."""
    assert worker.process is not None
    status = Path(f"/proc/{worker.process.pid}/status").read_text(encoding="ascii")
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / KIB


@DELIVERIES
def test_each_is_a_dead_letter_and_the_partition_goes_on(
    kafka_server: LocalKafka, topics: Topics, start_worker: StartWorker, delivery: str
) -> None:
    """The dead letters fit a topic that takes 64 KiB more than DEDUP_MAX_MESSAGE_BYTES."""
    settings = {"max_message_bytes": MESSAGE, "in_flight_bytes": 8 * MIB, "delivery": delivery}
    worker = start_worker(threshold=0.999, **settings, **PATIENT).wait_ready()
    good = [inline(f"good-{n}", jpeg(scene(n)), note="x") for n in range(4)]
    large = inline("large", b" " * (5 * MIB), note="x")
    fits = inline("fits", b" " * (MESSAGE - KIB))
    beyond = [inline(f"beyond-{n}", b" " * (MESSAGE - KIB)) for n in range(20)]
    batches = [[good[0], large, good[1], fits], [good[2], *beyond], [good[3]]]
    for batch in batches:
        publish_as_one(kafka_server, topics.images, batch)
    with Reader(kafka_server.bootstrap, topics.verdicts, topics.dead_letters) as reader:
        verdicts, dead = reader.messages[topics.verdicts], reader.messages[topics.dead_letters]
        reader.wait(lambda: len(verdicts) >= len(good), SECONDS, "the last verdict")
        until(lambda: worker.metric("dedup_inflight_events") == 0, SECONDS, "nothing in work")
        reader.read()
        assert {v["image_id"] for v in reader.verdicts(topics.verdicts)} == {e.key for e in good}
    assert worker.terminate() == 0
    by_key = {letter.key: letter for letter in dead}
    cut, whole, rest = by_key.pop(b"large"), by_key.pop(b"fits"), by_key.pop(None)
    assert (cut.value, header(cut, "omitted"), header(cut, "reason")) == (b"", "value", "too_large")
    assert list(cut.headers)[: len(large.headers)] == large.headers
    assert (header(cut, "offset"), header(cut, "last-offset")) == ("1", None)
    assert (whole.value, header(whole, "omitted")) == (fits.value, None)
    assert (rest.value, header(rest, "omitted")) == (b"", "key value headers")
    assert header(rest, "reason") == "too_large"
    last = sum(map(len, batches[:2])) - 1
    assert header(rest, "last-offset") == str(last)
    read = [int(header(letter, "offset") or -1) for letter in by_key.values()]
    assert sorted([*read, int(header(rest, "offset") or -1)]) == list(range(5, 5 + len(read) + 1))


def test_a_hundred_megabytes_of_spaces_take_no_memory(
    kafka_server: LocalKafka, topics: Topics, start_worker: StartWorker
) -> None:
    worker = start_worker(threshold=0.999, **PATIENT).wait_ready()
    good = [inline(f"good-{n}", jpeg(scene(n))) for n in range(40)]
    with Reader(kafka_server.bootstrap, topics.verdicts, topics.dead_letters) as reader:
        verdicts, dead = reader.messages[topics.verdicts], reader.messages[topics.dead_letters]
        publish_as_one(kafka_server, topics.images, good[:-1])
        reader.wait(lambda: len(verdicts) == len(good) - 1, SECONDS, "a warm worker")
        before = held_mib(worker)
        hostile = Event("spaces", b'"' + b" " * SPACES + b'"')
        assert len(gzip.compress(b" " * MIB)) < 2 * KIB
        for _ in range(3):
            publish_as_one(kafka_server, topics.images, [hostile])
        publish_as_one(kafka_server, topics.images, good[-1:])
        reader.wait(lambda: len(verdicts) == len(good), SECONDS, "the last verdict")
        reader.wait(lambda: len(dead) == 3, SECONDS, "the dead letters")
    assert held_mib(worker) < before + GROWTH_MIB
    assert {(letter.key, letter.value) for letter in dead} == {(b"spaces", b"")}
    assert {header(letter, "reason") for letter in dead} == {"too_large"}


def test_a_hundred_megabytes_on_the_wire_are_a_dead_letter(
    kafka_server: LocalKafka, topics: Topics, start_worker: StartWorker
) -> None:
    worker = start_worker(threshold=0.999, **PATIENT)
    before, after = (inline(name, jpeg(scene(0)), partition=0) for name in ("before", "after"))
    large = Event("large", bytes(LARGEST), partition=0)
    publish(kafka_server.bootstrap, topics.images, [before, large, after], most=2 * LARGEST)
    with Reader(kafka_server.bootstrap, topics.verdicts, topics.dead_letters) as reader:
        verdicts, dead = reader.messages[topics.verdicts], reader.messages[topics.dead_letters]
        reader.wait(lambda: len(verdicts) == 2 and len(dead) == 1, SECONDS, "what comes of them")
    assert [(letter.key, letter.value) for letter in dead] == [(b"large", b"")]
    assert [header(letter, "reason") for letter in dead] == ["too_large"]
    assert worker.terminate() == 0
