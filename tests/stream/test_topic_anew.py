"""A topic is made anew while a worker runs, so that its offsets begin at 0 once more, or grows."""

import pytest
from kafka.admin import NewPartitions, NewTopic

from deploy.apache_kafka import KafkaServer
from deploy.local import kafka_admin
from tests.conftest import PARTITIONS, Topics
from tests.photos import jpeg, scene
from tests.stream.conftest import StartWorker
from tests.stream.harness import Event, Reader, Worker, inline, publish, tombstone, until

SECONDS = 120.0
BEFORE = 12


# Tansu goes on behind the end of the new log and says nothing.
@pytest.mark.parametrize(
    "kafka_server", [pytest.param("apache", marks=pytest.mark.apache_kafka)], indirect=True
)
@pytest.mark.parametrize("delivery", ["at-least-once", "exactly-once"])
def test_events_of_a_topic_made_anew_are_younger_than_all_before(
    kafka_server: KafkaServer, topics: Topics, start_worker: StartWorker, delivery: str
) -> None:
    worker = start_worker(threshold=0.999, delivery=delivery).wait_ready()
    many = [inline(f"p{number}", jpeg(scene(number)), partition=0) for number in range(BEFORE)]
    x, y = jpeg(scene(50)), jpeg(scene(51))
    old = [inline("x", x, partition=0), inline("y", y, partition=0), tombstone("y", partition=0)]
    publish(kafka_server.bootstrap, topics.images, [*many, *old])
    answered(worker, BEFORE + 2)

    make_anew(kafka_server, topics.images)
    new = [
        tombstone("x", partition=0),
        inline("copy of x", x, partition=0),
        inline("y", y, partition=0),
        inline("copy of y", y, partition=0),
    ]
    publish_when_there(kafka_server, topics.images, new)
    answered(worker, BEFORE + 5)
    with Reader(kafka_server.bootstrap, topics.verdicts) as reader:
        reader.wait(
            lambda: len(reader.messages[topics.verdicts]) >= BEFORE + 5, SECONDS, "verdicts"
        )
        told = reader.verdicts(topics.verdicts)
    assert sorted(
        (each["image_id"], each["verdict"], each["duplicate_of"] or "")
        for each in told
        if not each["image_id"].startswith("p")
    ) == [
        ("copy of x", "unique", ""),  # as x was deleted
        ("copy of y", "exact", "y"),
        ("x", "unique", ""),
        ("y", "unique", ""),
        ("y", "unique", ""),  # of the old topic and of the new one
    ]


# Tansu cannot add any.
@pytest.mark.parametrize(
    "kafka_server", [pytest.param("apache", marks=pytest.mark.apache_kafka)], indirect=True
)
def test_partitions_that_are_added_are_read(
    kafka_server: KafkaServer, topics: Topics, start_worker: StartWorker
) -> None:
    """Within half a minute, which is what a consumer's metadata may be old."""
    worker = start_worker(threshold=0.999).wait_ready()
    with kafka_admin(kafka_server.bootstrap) as admin:
        admin.create_partitions({topics.images: NewPartitions(PARTITIONS + 1)})
    added = inline("x", jpeg(scene(1)), partition=PARTITIONS)
    publish_when_there(kafka_server, topics.images, [added])
    answered(worker, 1)
    assert worker.metric("dedup_assigned_partitions") == PARTITIONS + 1


def answered(worker: Worker, count: int) -> None:
    """Wait for so many verdicts in all."""
    kinds = ("unique", "exact", "duplicate")
    until(
        lambda: sum(worker.metric("dedup_verdicts_total", verdict=kind) for kind in kinds) >= count,
        SECONDS,
        f"{count} verdicts",
    )


def make_anew(kafka: KafkaServer, topic: str) -> None:
    """Delete a topic and make it again, as soon as the brokers let it."""
    with kafka_admin(kafka.bootstrap) as admin:
        admin.delete_topics([topic])
        until(lambda: topic not in admin.list_topics(), SECONDS, "topic gone")
        admin.create_topics([NewTopic(topic, PARTITIONS, 1)])


def publish_when_there(kafka: KafkaServer, topic: str, events: list[Event]) -> None:
    with kafka_admin(kafka.bootstrap) as admin:
        until(lambda: topic in admin.list_topics(), SECONDS, "topic there")
    publish(kafka.bootstrap, topic, events)
