"""A whole system to measure: real broker and Redis on loopback, real worker processes.

Owns starting them, filling the topic, and draining it against the clock. What is measured lies
between two moments in which nothing is in work: workers are ready, warm and then stopped (SIGSTOP)
while the topic is filled, so that neither their start nor the filling is counted.
"""

import argparse
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self
from uuid import uuid4

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaException, TopicPartition

from deploy.apache_kafka import LocalApacheKafka
from deploy.kafka_archives import KafkaUnavailableError, fetch_archives
from deploy.local import LocalKafka, LocalRedis
from tests.bench.processes import Usage, usage
from tests.conftest import Topics
from tests.stream.harness import Event, Worker, by_uri, inline, publish, until

BROKERS: dict[str, type[LocalKafka] | type[LocalApacheKafka]] = {
    "apache": LocalApacheKafka,
    "tansu": LocalKafka,
}
PARTITIONS = 4
# Tansu holds the first join for half of it; a worker may be stopped for less than it.
SESSION_SECONDS = 16.0
DRAIN_SECONDS = 1_800.0
LOOK_SECONDS = 0.05
LOOKS_PER_MEMORY = 10
MOST = 1_000
REDELIVERIES = "dedup_redeliveries_total"


@dataclass(frozen=True)
class Drained:
    """What deciding one image cost; CPU in seconds an image."""

    images: int
    seconds: float
    worker_cpu: float
    by_thread: dict[str, float]
    broker_cpu: float
    redis_cpu: float
    rss_bytes: int  # most seen, of all workers and their decoders together
    verdicts: dict[str, int]

    @property
    def images_per_second(self) -> float:
        """On the wall."""
        return self.images / self.seconds


class Servers(NamedTuple):
    """What workers are started on."""

    kafka: LocalKafka | LocalApacheKafka
    redis: LocalRedis


@contextmanager
def serving(broker: str) -> Iterator[Servers]:
    """Start a broker, one of BROKERS, and a Redis."""
    with LocalRedis() as redis, BROKERS[broker]() as kafka:
        yield Servers(kafka, redis)


class Rig:
    """Topics on some servers and `workers` workers, each told `settings`. A context manager.

    `command` is what starts one: this project's worker, or one that is compared with it.
    """

    def __init__(
        self,
        directory: Path,
        servers: Servers,
        workers: int,
        *,
        command: Sequence[str] = ("-m", "worker"),
        **settings: object,
    ) -> None:
        self._directory, self._count, self._settings = directory, workers, settings
        self._command = command
        self.kafka, self.redis = servers.kafka, servers.redis
        self._stack = ExitStack()
        self.workers: list[Worker] = []
        self.ready_seconds = 0.0  # from the start of the workers until all were ready

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            own = uuid4().hex[:8]
            self.topics = Topics(f"images-{own}", f"verdicts-{own}", f"dead-{own}", f"group-{own}")
            self.kafka.create_topics(dict.fromkeys(self.topics[:3], PARTITIONS))
            outcomes = Outcomes(self.kafka.bootstrap, self.topics[1:3])
            self.outcomes = stack.enter_context(outcomes)
            started = time.monotonic()
            for number in range(self._count):
                self.workers.append(stack.enter_context(self._worker(number)))
            for worker in self.workers:
                worker.wait_ready()
            self.ready_seconds = time.monotonic() - started
            until(self._spread, 60, "partitions spread over the workers")
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def _worker(self, number: int) -> Worker:
        settings: dict[str, Any] = {
            "session_timeout_seconds": SESSION_SECONDS,
            "fetch_schemes": "file",
            "fetch_roots": self._directory,
            **self._settings,
        }
        log = self._directory / f"worker-{uuid4().hex[:8]}-{number}.log"
        where = (self.kafka.bootstrap, self.redis.url, self.topics, log)
        return Worker(*where, command=self._command, **settings)

    def _spread(self) -> bool:
        held = [worker.metric("dedup_assigned_partitions") for worker in self.workers]
        return min(held) == PARTITIONS // self._count

    def pids(self) -> list[int]:
        """Of the workers."""
        return [worker.process.pid for worker in self.workers if worker.process is not None]

    def fill(self, events: Sequence[Event]) -> None:
        """Publish, spread evenly over the partitions."""
        for number, event in enumerate(events):
            event.partition = number % PARTITIONS
        publish(self.kafka.bootstrap, self.topics.images, events)

    def drain(self, events: Sequence[Event]) -> Drained:
        """Fill the topic, then let the workers loose until every event has its outcome."""
        wanted, kinds = self.outcomes.seen + len(events), self._verdicts()
        repeated = self.redelivered()
        with self.stopped():
            self.fill(events)
            before = self._usages()
        begun, most = time.monotonic(), 0
        while self.outcomes.seen < wanted:
            most = max(most, usage(self.pids()).rss_bytes)
            self._read_a_while(wanted, begun)
        seconds, after = time.monotonic() - begun, self._usages()
        until(lambda: (self._verdicts() - kinds).total() >= len(events), 30, "a verdict each")
        if again := self.redelivered() - repeated:
            # Their outcomes were counted, too, so that the clock stopped before all was done.
            print(f"NOT VALID: {again} events were delivered twice meanwhile", flush=True)
        costs = [
            (late.cpu_seconds - early.cpu_seconds) / len(events)
            for early, late in zip(before, after, strict=True)
        ]
        threads = after[0].cpu - before[0].cpu
        return Drained(
            images=len(events),
            seconds=seconds,
            worker_cpu=costs[0],
            by_thread={name: spent / len(events) for name, spent in threads.most_common()},
            broker_cpu=costs[1],
            redis_cpu=costs[2],
            rss_bytes=most,
            verdicts=dict(self._verdicts() - kinds),
        )

    def _read_a_while(self, wanted: int, begun: float) -> None:
        """Count until all are answered, or until the memory is to be looked at again."""
        for _ in range(LOOKS_PER_MEMORY):
            self.outcomes.read(LOOK_SECONDS)
            time.sleep(LOOK_SECONDS / 2)  # or the counting would take part in the race
            if self.outcomes.seen >= wanted:
                return
        if time.monotonic() - begun > DRAIN_SECONDS:
            missing = wanted - self.outcomes.seen
            raise TimeoutError(f"{missing} events are without an outcome")

    def _usages(self) -> tuple[Usage, Usage, Usage]:
        return usage(self.pids()), usage([self.kafka.pid]), usage([self.redis.pid])

    def redelivered(self) -> int:
        """Events that came a second time so far; with any, no figure is to be trusted."""
        return int(sum(worker.metric(REDELIVERIES) for worker in self.workers))

    def _verdicts(self) -> "Counter[str]":
        found: Counter[str] = Counter()
        for worker in self.workers:
            for kind in ("unique", "duplicate", "exact"):
                found[kind] += int(worker.metric("dedup_verdicts_total", verdict=kind))
        return found

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Let the workers stand still; for less than SESSION_SECONDS."""
        for pid in self.pids():
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in self.pids():
                os.kill(pid, signal.SIGCONT)


def add_broker(parser: argparse.ArgumentParser) -> None:
    """The option `--broker`, for `pick_broker`."""
    about = "the broker; auto: Apache Kafka where java, mvn and Maven Central are at hand"
    parser.add_argument("--broker", choices=("auto", *BROKERS), default="auto", help=about)


def pick_broker(wanted: str) -> str:
    """One of BROKERS; says which, and why not Apache Kafka."""
    if wanted == "auto":
        try:
            fetch_archives()
            wanted = "apache"
        except KafkaUnavailableError as error:
            print(f"no Apache Kafka: {error}", flush=True)
            wanted = "tansu"
    print(f"broker: {wanted}", flush=True)
    return wanted


class Outcomes:
    """Counts what some topics receive. Reading, because Tansu's end offsets count batches."""

    def __init__(self, bootstrap: str, topics: Sequence[str]) -> None:
        self.seen = 0
        self._consumer = Consumer(
            {
                "bootstrap.servers": bootstrap,
                "group.id": "outcomes",  # wanted by the library; nothing is committed
                "enable.auto.commit": False,
                # Asked for two topics, Tansu answers late in this time although one has something.
                "fetch.wait.max.ms": 20,
            }
        )
        self._consumer.assign(
            [
                TopicPartition(topic, number, OFFSET_BEGINNING)
                for topic in topics
                for number in range(PARTITIONS)
            ]
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._consumer.close()

    def read(self, seconds: float) -> list[str]:
        """Image ids of what has arrived, waiting for the first at most so long."""
        found = self._consumer.consume(MOST, 0)
        if not found and (first := self._consumer.poll(seconds)) is not None:
            found = [first, *self._consumer.consume(MOST, 0)]
        keys = []
        for message in found:
            if error := message.error():
                raise KafkaException(error)
            keys.append((message.key() or b"").decode())
        self.seen += len(keys)
        return keys


def inline_events(run: str, files: Sequence[bytes], ids: str = "image") -> list[Event]:
    """Events that carry the pictures, in the namespace `run`: there, none is known before."""
    return [inline(f"{ids}-{n}", data, namespace=run) for n, data in enumerate(files)]


def file_events(run: str, files: Sequence[bytes], folder: Path) -> list[Event]:
    """Events that name the pictures, which are written into `folder`."""
    paths = [folder / f"{number}.jpg" for number in range(len(files))]
    for path, data in zip(paths, files, strict=True):
        path.write_bytes(data)
    return [by_uri(f"image-{n}", path.as_uri(), namespace=run) for n, path in enumerate(paths)]
