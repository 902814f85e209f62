"""`python -m producer` against a real broker: what arrives, and what the exit status says."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from kafka import KafkaConsumer, TopicPartition

import producer.__main__ as command
from deploy.apache_kafka import KafkaServer
from deploy.local import LocalKafka
from producer.events import Outgoing
from producer.publisher import Publisher
from tests.conftest import Topics
from worker.connections import KafkaSettings
from worker.errors import InfrastructureError
from worker.flags import load

WAIT_SECONDS = 120.0
LINK = "https://images.example/"


def publish(
    kafka: KafkaServer, topic: str, *arguments: str, stdin: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    """Run the producer as a user would."""
    return subprocess.run(
        producer_command(kafka, topic, arguments),
        input=stdin,
        capture_output=True,
        timeout=300,
        check=False,
    )


def producer_command(kafka: KafkaServer, topic: str, arguments: Sequence[str]) -> list[str]:
    flags = ["--bootstrap-servers", kafka.bootstrap, "--topic", topic]
    return [sys.executable, "-m", "producer", *arguments, *flags]


def settings(kafka: KafkaServer, topic: str) -> KafkaSettings:
    return load(KafkaSettings, {"bootstrap_servers": kafka.bootstrap, "topic": topic})


def consume(kafka: KafkaServer, topic: str, count: int) -> list[Any]:
    """The records of a topic, of which there must be `count` and no more."""
    with KafkaConsumer(bootstrap_servers=kafka.bootstrap, auto_offset_reset="earliest") as consumer:
        consumer.assign([TopicPartition(topic, p) for p in consumer.partitions_for_topic(topic)])
        records: list[Any] = []
        while polled := consumer.poll(
            timeout_ms=1_000 if len(records) >= count else int(WAIT_SECONDS * 1000)
        ):
            records += [record for batch in polled.values() for record in batch]
    assert len(records) == count
    return records


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "photos" / "sub").mkdir(parents=True)
    for name, data in {
        "a.jpg": b"jpeg",
        "sub/b.png": b"png",
        "notes.txt": b"text",
        "0": b"",
    }.items():
        (tmp_path / "photos" / name).write_bytes(data)
    return tmp_path / "photos"


def test_a_folder_arrives_inline(kafka_server: KafkaServer, topics: Topics, folder: Path) -> None:
    done = publish(kafka_server, topics.images, str(folder), "--inline")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"4 of 4 events acknowledged")
    arrived = {record.key.decode(): record for record in consume(kafka_server, topics.images, 4)}
    assert {key: record.value for key, record in arrived.items()} == {
        "a.jpg": b"jpeg",
        "sub/b.png": b"png",
        "notes.txt": b"text",
        "0": b"",  # empty, not null: null would delete the image
    }
    assert ("content-type", b"image/png") in arrived["sub/b.png"].headers


def test_a_terminal_gets_a_progress_bar(
    kafka_server: KafkaServer, topics: Topics, folder: Path
) -> None:
    terminal, end = os.openpty()
    command = producer_command(kafka_server, topics.images, [str(folder)])
    with subprocess.Popen(command, stderr=end, stdout=subprocess.DEVNULL) as process:
        process.wait(300)
    os.close(end)
    shown = os.read(terminal, 65_536)
    os.close(terminal)
    assert b"publishing" in shown
    assert b"4/4" in shown


def test_publishing_twice_gives_the_same_ids(
    kafka_server: KafkaServer, topics: Topics, folder: Path
) -> None:
    for _ in range(2):
        assert publish(kafka_server, topics.images, str(folder)).returncode == 0
    events = [json.loads(record.value) for record in consume(kafka_server, topics.images, 8)]
    ids = sorted(event["image_id"] for event in events)
    assert ids == sorted(["0", "a.jpg", "notes.txt", "sub/b.png"] * 2)
    uris = {event["image_id"]: event["uri"] for event in events}
    assert uris["sub/b.png"] == (folder / "sub" / "b.png").as_uri()


def test_a_csv_with_bad_rows_publishes_the_good_ones_and_says_so(
    kafka_server: KafkaServer, topics: Topics, tmp_path: Path
) -> None:
    source = tmp_path / "links.csv"
    source.write_text(f"a,b\n{LINK}1,{LINK}2\nnonsense,{LINK}3\n{LINK}1,\nonly-one-field\n")
    arguments = [str(source), "--column", "a", "--column", "b", "--namespace", "shop"]
    done = publish(kafka_server, topics.images, *arguments, "--key-prefix", "p-")
    assert done.returncode == 1
    assert b"line 3, column a: not a link: 'nonsense'" in done.stderr
    assert b"line 5: 1 fields, the header has 2" in done.stderr
    assert b"4 of 4 events acknowledged" in done.stdout
    assert b"2 not sent" in done.stdout
    records = consume(kafka_server, topics.images, 4)
    assert len({record.key for record in records}) == 3
    events = [json.loads(record.value) for record in records]
    assert {event["namespace"] for event in events} == {"shop"}
    assert all(event["image_id"].startswith("p-") for event in events)


def test_json_lines_from_standard_input(kafka_server: KafkaServer, topics: Topics) -> None:
    lines = [{"image_id": "1", "uri": LINK}, {"image_id": "2", "op": "delete"}]
    stdin = "\n".join(map(json.dumps, lines)).encode()
    done = publish(kafka_server, topics.images, "-", "--op", "check", stdin=stdin)
    assert done.returncode == 0
    ops = {
        record.key: json.loads(record.value)["op"]
        for record in consume(kafka_server, topics.images, 2)
    }
    assert ops == {b"1": "check", b"2": "delete"}


def test_escape_sequences_of_a_source_do_not_reach_the_terminal(
    kafka_server: KafkaServer, topics: Topics
) -> None:
    done = publish(kafka_server, topics.images, "-", stdin=b'{"uri":"x\\u001b[31m"}\n[/red]\n')
    assert done.returncode == 1
    assert b"\x1b" not in done.stderr


def test_a_missing_topic_is_one_line_and_status_2(
    kafka_server: KafkaServer, folder: Path, request: pytest.FixtureRequest
) -> None:
    if isinstance(kafka_server, LocalKafka):
        known = "Tansu creates topics that are merely asked about"
        request.applymarker(pytest.mark.xfail(strict=True, reason=known))
    done = publish(kafka_server, "no-such-topic", str(folder))
    assert done.returncode == 2
    assert b"no topic 'no-such-topic'" in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("source", ["missing", "picture.jpg", "two-columns.csv"])
def test_an_unusable_source_is_one_line_and_status_2(
    kafka_server: KafkaServer, topics: Topics, tmp_path: Path, source: str
) -> None:
    (tmp_path / "picture.jpg").write_bytes(b"x")
    (tmp_path / "two-columns.csv").write_text("a,b\n1,2\n")
    done = publish(kafka_server, topics.images, str(tmp_path / source))
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1


def test_sigterm_ends_with_a_summary(kafka_server: KafkaServer, topics: Topics) -> None:
    process = subprocess.Popen(
        producer_command(kafka_server, topics.images, ["-"]),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        assert process.stdin is not None
        process.stdin.write(json.dumps({"image_id": "1", "uri": LINK}).encode() + b"\n")
        process.stdin.flush()
        assert consume_one(kafka_server, topics.images).key == b"1"
        os.kill(process.pid, signal.SIGTERM)
        assert process.stdout is not None
        assert b"1 of 1 events acknowledged" in process.stdout.read()
    assert process.returncode == 130


def consume_one(kafka: KafkaServer, topic: str) -> Any:
    consumer = KafkaConsumer(
        topic,
        bootstrap_servers=kafka.bootstrap,
        auto_offset_reset="earliest",
        consumer_timeout_ms=int(WAIT_SECONDS * 1000),
    )
    with consumer:
        return next(iter(consumer))


def test_a_broker_that_dies_is_counted_and_ends_the_run() -> None:
    with LocalKafka() as kafka:
        kafka.create_topics({"images": 1})
        publisher = Publisher(settings(kafka, "images"), delivery_seconds=6.0)
        publisher.send(Outgoing("1", b"1", b"first"))
        assert wait_until_acknowledged(publisher) == 1
        kafka.kill()
        publisher.send(Outgoing("2", b"2", b"second"))
        publisher.close()
    assert (publisher.tally.sent, publisher.tally.acknowledged, publisher.tally.failed) == (2, 1, 1)
    assert publisher.unreachable
    assert publisher.tally.failures[0].startswith("2: ")


def wait_until_acknowledged(publisher: Publisher) -> int:
    with publisher._settled:
        publisher._settled.wait_for(lambda: publisher.tally.waiting == 0, WAIT_SECONDS)
    return publisher.tally.acknowledged


def test_unacknowledged_bytes_are_bounded() -> None:
    with LocalKafka() as kafka:
        kafka.create_topics({"images": 1})
        publisher = Publisher(settings(kafka, "images"), max_waiting_bytes=1_000)
        publisher.send(Outgoing("0", b"0", b"first"))
        assert wait_until_acknowledged(publisher) == 1
        kafka.pause()
        publisher.send(Outgoing("1", b"1", b"a" * 5_000))  # one may always wait
        threading.Timer(0.5, kafka.resume).start()
        publisher.send(Outgoing("2", b"2", b"a" * 500))  # has no room until the broker goes on
        assert publisher.tally.acknowledged >= 2
        publisher.close()
    assert publisher.tally.acknowledged == 3


def test_the_rate_spaces_events_out(
    kafka_server: KafkaServer, topics: Topics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    naps: list[float] = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(command, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    source = tmp_path / "links.csv"
    source.write_text("link\n" + "".join(f"{LINK}{n}\n" for n in range(11)))
    arguments = [str(source), "--rate", "4", "--topic", topics.images]
    assert command.main([*arguments, "--bootstrap-servers", kafka_server.bootstrap]) == 0
    assert len(naps) == 11
    assert sum(naps) == pytest.approx(2.5)


def test_no_kafka_is_an_infrastructure_error() -> None:
    with LocalKafka() as kafka:
        kafka.kill()
        with pytest.raises(InfrastructureError, match="no Kafka at 127"):
            Publisher(settings(kafka, "images"), connect_seconds=1.0)
