"""Everything delivered three times, offsets reset, workers killed: the verdicts are the same."""

import random
import uuid
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from kafka import KafkaConsumer
from kafka.structs import OffsetAndMetadata, TopicPartition

from deploy.local import LocalKafka, LocalRedis
from tests.conftest import PARTITIONS, Topics
from tests.contract.harness import Bench
from tests.photos import jpeg, near_copy, scene
from tests.stream.conftest import StartWorker
from tests.stream.harness import Event, Reader, Worker, distinct, image_of, inline, publish, until

FAMILIES = 40
DELIVERIES = 3
KILLS = 4
SECONDS = 900
PAUSE_SECONDS = 60
THRESHOLD = 0.9


def families() -> list[Event]:
    """Originals, near copies and exact copies; a family stays in one partition, so in one order."""
    events = []
    for number in range(FAMILIES):
        original = scene(number)
        place = number % PARTITIONS
        events += [
            inline(f"{number}-original", jpeg(original), partition=place),
            inline(f"{number}-copy", jpeg(near_copy(original), 80), partition=place),
            inline(f"{number}-exact", jpeg(original), partition=place),
        ]
    return events


class Run:
    """Topics, a Redis and two workers of their own."""

    def __init__(self, kafka: LocalKafka, stack: ExitStack, folder: Path) -> None:
        own = uuid.uuid4().hex[:8]
        self.kafka = kafka
        self.topics = Topics(f"i-{own}", f"v-{own}", f"d-{own}", f"g-{own}")
        self.ends: dict[TopicPartition, int] = {}
        self.published: set[str] = set()
        kafka.create_topics(dict.fromkeys(self.topics[:3], PARTITIONS))
        redis = stack.enter_context(LocalRedis())
        self.workers = [
            stack.enter_context(
                Worker(
                    kafka.bootstrap,
                    redis.url,
                    self.topics,
                    folder / f"{own}-{number}.log",
                    threshold=THRESHOLD,
                    commit_interval_seconds=0.2,
                )
            )
            for number in range(2)
        ]
        self.reader = stack.enter_context(
            Reader(kafka.bootstrap, self.topics.verdicts, self.topics.dead_letters)
        )

    def consumer(self) -> KafkaConsumer:
        """A client that speaks for the group while the group is empty."""
        return KafkaConsumer(
            bootstrap_servers=self.kafka.bootstrap,
            group_id=self.topics.group,
            enable_auto_commit=False,
        )

    def publish(self, events: list[Event]) -> None:
        """Publish, and remember where each partition ends: Tansu does not say it reliably."""
        for partition, offset in publish(self.kafka.bootstrap, self.topics.images, events):
            self.ends[TopicPartition(self.topics.images, partition)] = offset + 1
        self.published.update(event.key for event in events)

    def finished(self) -> bool:
        """Whether the group has committed everything there is."""
        self.reader.read()
        consumer = self.consumer()
        try:
            return all(consumer.committed(p) == end for p, end in self.ends.items())
        finally:
            consumer.close()

    def wait_for_more(self, count: int) -> None:
        """Wait for `count` more verdicts, or for the end."""
        verdicts = self.reader.messages[self.topics.verdicts]
        wanted = len(verdicts) + count
        until(lambda: self.finished() or len(verdicts) >= wanted, SECONDS, "some progress")

    def reset_offsets(self) -> None:
        """Make the group read everything again."""
        consumer = self.consumer()
        try:
            consumer.commit({p: OffsetAndMetadata(0, "", -1) for p in self.ends})
        finally:
            consumer.close()

    def outcome(self) -> dict[str, tuple[str, str | None]]:
        """What each image was found to be; each must have got one verdict, however often."""
        verdicts: dict[str, Any] = {}

        def read_to_the_end() -> bool:
            arrived = self.reader.read()
            verdicts.update(distinct(self.reader.verdicts(self.topics.verdicts), image_of))
            return not arrived and set(verdicts) == self.published

        until(read_to_the_end, SECONDS, "a verdict of each image")
        assert self.reader.messages[self.topics.dead_letters] == []
        return {name: (v["verdict"], v["duplicate_of"]) for name, v in verdicts.items()}


def clean_outcome(run: Run, events: list[Event]) -> dict[str, Any]:
    run.publish(events)
    until(run.finished, SECONDS, "the clean run")
    return run.outcome()


def faulty_outcome(run: Run, events: list[Event]) -> dict[str, Any]:
    chance = random.Random(7)
    for _ in range(DELIVERIES):
        run.publish(events)
    for _ in range(KILLS):
        run.wait_for_more(chance.randint(1, 80))
        victim = chance.choice(run.workers)
        victim.kill()
        victim.start()
    until(run.finished, SECONDS, "the faulty run")
    for worker in run.workers:
        assert worker.wait_ready().terminate() == 0
    run.reset_offsets()
    for worker in run.workers:
        worker.start()
    until(run.finished, SECONDS, "the run after the reset")
    return run.outcome()


def test_the_verdicts_equal_a_clean_runs(kafka_server: LocalKafka, tmp_path: Path) -> None:
    events = families()
    with ExitStack() as stack:
        clean = Run(kafka_server, stack, tmp_path)
        expected = clean_outcome(clean, events)
        for worker in clean.workers:
            assert worker.terminate() == 0
        assert {kind for kind, _ in expected.values()} == {"unique", "duplicate", "exact"}
        faulty = Run(kafka_server, stack, tmp_path)
        found = faulty_outcome(faulty, events)
        redelivered = sum(w.wait_ready().metric("dedup_redeliveries_total") for w in faulty.workers)
    assert found == expected
    assert len(found) == len(events)
    assert redelivered >= len(events)


def test_a_verdict_that_cannot_be_told_again_is_a_pause_that_readiness_shows(
    kafka_server: LocalKafka, redis_server: LocalRedis, topics: Topics, start_worker: StartWorker
) -> None:
    """An image that it names has no id any more, and is not read again for it."""
    copy = inline("copy", jpeg(near_copy(scene(1)), 80), partition=0)
    with Reader(kafka_server.bootstrap, topics.verdicts) as reader:
        verdicts = reader.messages[topics.verdicts]

        def deliver(event: Event) -> None:
            publish(kafka_server.bootstrap, topics.images, [event])

        first = start_worker(threshold=THRESHOLD).wait_ready()
        deliver(inline("original", jpeg(scene(1)), partition=0))
        deliver(copy)
        reader.wait(lambda: len(verdicts) >= 2, SECONDS, "a verdict of each")
        assert first.terminate() == 0
        bench = Bench(redis_server.client, "default")
        key, field = bench.keys().record(1)
        bench.store().command("HDEL", key, field + 1)
        worker = start_worker(threshold=THRESHOLD).wait_ready()
        deliver(copy)
        until(lambda: not worker.ready(), PAUSE_SECONDS, "a pause")
        said = [line for line in worker.lines() if line["message"] == "index unavailable, retrying"]
        assert len(said) == 1
        assert "the index is damaged: sequence 1 has no id" in said[0]["error"]
        bench.store().command("HSET", key, field + 1, "original")
        reader.wait(lambda: len(verdicts) >= 3, SECONDS, "the verdict")
        worker.wait_ready()
        assert worker.metric("dedup_replays_total") == 0
        told = distinct(reader.verdicts(topics.verdicts), image_of)
    assert told["copy"]["duplicate_of"] == "original"
