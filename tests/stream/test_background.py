"""What a worker does beside the stream, in threads of their own, and how it ends when one dies."""

import math

import numpy as np
import pytest

from deploy.apache_kafka import KafkaServer
from deploy.local import LocalRedis, kafka_admin
from tests.conftest import PARTITIONS, Topics
from tests.contract.harness import Bench, near, place_all, vectors
from tests.photos import jpeg, scene
from tests.stream.conftest import StartWorker
from tests.stream.harness import inline, publish, until
from worker.embedder import Embedder
from worker.index import Index

END_SECONDS = 60.0


def test_a_switch_to_another_model_ends_an_idle_worker(
    redis_server: LocalRedis, start_worker: StartWorker
) -> None:
    """No event arrives: the threads beside the stream meet the other model first."""
    worker = start_worker().wait_ready()
    bench = Bench(redis_server.client, "default")
    Index(bench.connect(), "another", bench.settings, building=True).switch("default")
    assert worker.process is not None
    assert worker.process.wait(END_SECONDS) == 2
    last = worker.log.read_text().splitlines()[-1]
    assert last.startswith("error: namespace 'default' was filled by model another")
    assert "python -m worker rebuild --namespace default" in last
    assert "Traceback" not in worker.log.read_text()


def test_a_background_thread_that_dies_ends_an_idle_worker(
    redis_server: LocalRedis, start_worker: StartWorker
) -> None:
    """A due cluster whose name is none: upkeep fails on it, and nothing else would."""
    worker = start_worker().wait_ready()
    bench = Bench(redis_server.client, "default")
    bench.store().command("SADD", bench.keys().due, "?")
    assert worker.process is not None
    assert worker.process.wait(END_SECONDS) == 1
    assert "worker died" in [line["message"] for line in worker.lines()]


def test_a_damaged_namespace_stops_neither_upkeep_nor_audits_of_others(
    redis_server: LocalRedis, start_worker: StartWorker
) -> None:
    damaged, whole = (Bench(redis_server.client, name) for name in ("damaged", "whole"))
    index = damaged.index(model=Embedder.load(mode="fp32").model_id)
    for bench in (damaged, whole):
        index.place(bench.arrivals("p", vectors(40)))
    key, first = damaged.keys().record(3)
    damaged.store().command("HDEL", key, first)
    worker = start_worker(
        namespaces="damaged,whole",
        cluster_limit=32,
        first_cluster_limit=32,
        audit_images=10,
        audit_pause_seconds=1,
    ).wait_ready()
    store, due = whole.store(), whole.keys().due
    until(lambda: not store.command("SCARD", due), END_SECONDS, "upkeep of the other")
    waits = "maintenance waits"
    until(lambda: waits in {line["message"] for line in worker.lines()}, END_SECONDS, waits)

    def audited() -> set[str]:
        return {line["namespace"] for line in worker.lines() if line["message"] == "audited"}

    until(lambda: audited() == {"damaged", "whole"}, END_SECONDS, "an audit of each")
    assert worker.running
    whole.assert_whole()


# Tansu takes what is published to no topic.
@pytest.mark.parametrize(
    "kafka_server", [pytest.param("apache", marks=pytest.mark.apache_kafka)], indirect=True
)
def test_a_topic_that_is_not_there_is_named(
    kafka_server: KafkaServer, topics: Topics, start_worker: StartWorker
) -> None:
    """kafka-python says only that it waited; the worker goes on once the topic is made."""
    with kafka_admin(kafka_server.bootstrap) as admin:
        admin.delete_topics([topics.verdicts])
    worker = start_worker(publish_timeout_seconds=2).wait_ready()
    publish(kafka_server.bootstrap, topics.images, [inline("x", jpeg(scene(1)))])
    until(lambda: not worker.get("/readyz").json()["kafka"], END_SECONDS, "not ready")
    said = [line["error"] for line in worker.lines() if "publishing failed" in line["message"]]
    assert said and f"topic '{topics.verdicts}'" in said[0]
    kafka_server.create_topics({topics.verdicts: PARTITIONS})
    until(lambda: worker.get("/readyz").json()["kafka"], END_SECONDS, "ready")


def turn_away(bench: Bench) -> None:
    """Let every other cluster point the wrong way: what it holds is out of reach for routing."""
    store, keys = bench.store(), bench.keys()
    table = store.command("HGETALL", keys.centroids)
    for cluster in sorted(table)[::2]:
        centroid = (-np.frombuffer(table[cluster], np.int8)).tobytes()
        version = store.command("HINCRBY", keys.meta, "version", 1)
        store.command("HSET", keys.centroids, cluster, centroid)
        entry = ("retired", b"", "added", cluster + centroid)
        store.command("XADD", keys.log, f"{version}-1", *entry)


def test_an_audit_tells_of_records_out_of_reach(
    redis_server: LocalRedis, start_worker: StartWorker
) -> None:
    name = "dedup_audit_recall_ratio"
    worker = start_worker(threshold=0.8, audit_images=1000, audit_pause_seconds=1).wait_ready()
    assert math.isnan(worker.metric(name))
    bench, rows = Bench(redis_server.client, "default"), vectors(300)
    index = bench.index(model=Embedder.load(mode="fp32").model_id)
    place_all(index, [*bench.arrivals("p", rows), *bench.arrivals("c", near(rows))])
    until(lambda: worker.metric(name) == 1.0, END_SECONDS, "an audit that finds all")
    turn_away(bench)
    until(lambda: worker.metric(name) < 0.8, END_SECONDS, "an audit that finds less")
    assert worker.running
