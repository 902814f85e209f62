"""Running real workers on real servers and reading what they publish.

A worker here is the process a user starts: `python -m worker` (or a script that breaks it on
purpose), told everything by its environment.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import httpx
from kafka import KafkaConsumer, KafkaProducer
from kafka.structs import TopicPartition

from tests.conftest import Topics

Key = TypeVar("Key")
READY_SECONDS = 300.0
# A worker on a busy machine may be silent for seconds; one that is expelled for it does its work
# twice. No longer, as Tansu holds the first join of a group for about half of it.
SESSION_SECONDS = 6.0
# Where a test counts what was done: nobody is expelled, however busy the machine.
PATIENT: dict[str, object] = {
    "session_timeout_seconds": 10,
    "revoke_timeout_seconds": 60,
    "shutdown_timeout_seconds": 60,
}
ANSWER_SECONDS = 30.0
PAUSE_SECONDS = 0.05


def until(done: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait for a condition; fails the test when it does not come true in time."""
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s: {what}")
        time.sleep(PAUSE_SECONDS)


class Worker:
    """One worker process. Its log is printed when the test that used it fails."""

    def __init__(
        self,
        bootstrap: str,
        redis_url: str,
        topics: Topics,
        log: Path,
        *,
        command: Sequence[str] = ("-m", "worker"),
        **settings: object,
    ) -> None:
        """`settings` become DEDUP_… variables; the rest keep their defaults."""
        values: dict[str, object] = {
            "bootstrap_servers": bootstrap,
            "redis_url": redis_url,
            "topic": topics.images,
            "verdict_topic": topics.verdicts,
            "dead_letter_topic": topics.dead_letters,
            "group_id": topics.group,
            "session_timeout_seconds": SESSION_SECONDS,
            "http_port": 0,
            "embed_mode": "fp32",  # the same numbers on every machine, and no compiler to wait for
            "decode_processes": 1,
            "log_level": "info",
            **settings,
        }
        self.log = log
        self._environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("DEDUP_")},
            **{f"DEDUP_{name.upper()}": str(value) for name, value in values.items()},
        }
        self._command = [sys.executable, *command]
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Worker":
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()
        if error is not None:
            self.print_log()

    def print_log(self) -> None:
        """Print the end of the log; in a fixture, for there pytest keeps it for failures."""
        print(f"--- {self.log.name}\n{self.log.read_text()[-20_000:]}")

    def start(self) -> None:
        """Start, appending to the same log."""
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                self._command, env=self._environment, stdout=out, stderr=out
            )

    @property
    def running(self) -> bool:
        """Whether the process is alive."""
        return self.process is not None and self.process.poll() is None

    @property
    def port(self) -> int:
        """The health server's port, as the latest start logged it."""
        ports = [line["http_port"] for line in self.lines() if line["message"] == "starting"]
        return int(ports[-1]) if ports else 0

    def lines(self) -> list[dict[str, Any]]:
        """Its log so far; lines that are no JSON (tracebacks of a crash) are left out."""
        found = []
        for line in self.log.read_text().splitlines():
            with suppress(json.JSONDecodeError):
                found.append(json.loads(line))
        return [line for line in found if isinstance(line, dict) and "message" in line]

    def get(self, path: str) -> httpx.Response:
        """Ask its health server."""
        url = f"http://127.0.0.1:{self.port}{path}"
        return httpx.get(url, timeout=ANSWER_SECONDS, trust_env=False)

    def ready(self) -> bool:
        """Whether /readyz says yes. A worker that has died fails the test."""
        assert self.running, f"worker died:\n{self.log.read_text()[-5_000:]}"
        try:
            return self.port != 0 and self.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def wait_ready(self) -> "Worker":
        """Wait until it takes part."""
        until(self.ready, READY_SECONDS, "worker ready")
        return self

    def metric(self, name: str, **labels: str) -> float:
        """The value of one sample on /metrics; 0 when there is none."""
        wanted = name + (
            "{" + ",".join(f'{k}="{v}"' for k, v in labels.items()) + "}" if labels else ""
        )
        for line in self.get("/metrics").text.splitlines():
            if line.startswith(wanted + " "):
                return float(line.rsplit(" ", 1)[1])
        return 0.0

    def kill(self) -> None:
        """SIGKILL. A worker that died before of its own accord fails the test."""
        assert self.running, f"worker died:\n{self.log.read_text()[-5_000:]}"
        self._end()

    def _end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def terminate(self, seconds: float = 120) -> int:
        """SIGTERM; its exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)


@dataclass
class Event:
    """One message to publish."""

    key: str
    value: bytes | None
    headers: list[tuple[str, bytes]] = field(default_factory=list)
    partition: int | None = None


def inline(image_id: str, data: bytes, *, partition: int | None = None, **fields: str) -> Event:
    """An event that carries the image."""
    headers = [("content-type", b"image/jpeg"), *((k, v.encode()) for k, v in fields.items())]
    return Event(image_id, data, headers, partition)


def by_uri(image_id: str, uri: str, *, partition: int | None = None, **fields: object) -> Event:
    """An event that names a uri."""
    body = {"schema": 1, "image_id": image_id, "uri": uri, **fields}
    return Event(image_id, json.dumps(body).encode(), partition=partition)


def tombstone(image_id: str, *, partition: int | None = None) -> Event:
    """An event that forgets an image."""
    return Event(image_id, None, partition=partition)


def publish(
    bootstrap: str, topic: str, events: Iterable[Event], most: int = 64 * 1024 * 1024
) -> list[tuple[int, int]]:
    """Publish in order and wait for every acknowledgement; (partition, offset) of each.

    `most`: bytes of the largest.
    """
    producer = KafkaProducer(bootstrap_servers=bootstrap, acks="all", max_request_size=most)
    try:
        futures = [
            producer.send(
                topic,
                event.value,
                key=event.key.encode(),
                headers=event.headers,
                partition=event.partition,
            )
            for event in events
        ]
        producer.flush(120)
        placed = [future.get(timeout=120) for future in futures]
    finally:
        producer.close(timeout=10)  # by itself it waits for ever for what was not acknowledged
    return [(metadata.partition, metadata.offset) for metadata in placed]


class Reader:
    """Everything published to some topics so far, read once and kept."""

    def __init__(self, bootstrap: str, *topics: str, isolation: str = "read_uncommitted") -> None:
        self.messages: dict[str, list[Any]] = {topic: [] for topic in topics}
        self._consumer = KafkaConsumer(
            bootstrap_servers=bootstrap,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            isolation_level=isolation,
            max_partition_fetch_bytes=64 * 1024 * 1024,
            fetch_max_wait_ms=50,
            retry_backoff_ms=20,
            reconnect_backoff_max_ms=1_000,  # by itself it waits half a minute for a broker back
        )
        self._consumer.assign(
            [
                TopicPartition(topic, number)
                for topic in topics
                for number in sorted(self._consumer.partitions_for_topic(topic))
            ]
        )

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *error: object) -> None:
        self._consumer.close()

    def read(self) -> int:
        """Take what has arrived: so many messages."""
        arrived = self._consumer.poll(timeout_ms=100)
        for partition, messages in arrived.items():
            self.messages[partition.topic].extend(messages)
        return sum(map(len, arrived.values()))

    def wait(self, done: Callable[[], bool], seconds: float, what: str) -> None:
        """Read until a condition holds; fails the test when it does not come true in time."""

        def check() -> bool:
            self.read()
            return done()

        until(check, seconds, what)

    def verdicts(self, topic: str) -> list[dict[str, Any]]:
        """The verdicts read, in no particular order between partitions."""
        return [json.loads(message.value) for message in self.messages[topic]]


def image_of(verdict: dict[str, Any]) -> str:
    """What most verdicts are about, for `distinct`."""
    return str(verdict["image_id"])


def distinct(
    verdicts: Iterable[dict[str, Any]], about: Callable[[dict[str, Any]], Key]
) -> dict[Key, dict[str, Any]]:
    """Verdicts by what they are about; fails where two of one differ in more than their time."""
    found: dict[Key, dict[str, Any]] = {}
    for verdict in verdicts:
        timeless = {k: v for k, v in verdict.items() if k != "decided_at"}
        assert found.setdefault(about(verdict), timeless) == timeless
    return found
