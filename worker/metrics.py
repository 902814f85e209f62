"""Every Prometheus metric, with its type, labels and meaning; docs are generated from here.

Names carry the prefix `dedup_`, values are in base units (seconds, bytes, ratios), and no label
holds an id.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from time import perf_counter
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info
from prometheus_client.metrics import MetricWrapperBase

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
VECTORS = (0, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000)
SIMILARITIES = (0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.99, 1.0)

Metric = TypeVar("Metric", Counter, Histogram)


class Metrics:
    """One worker's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._define_kafka()
        self._define_flow()
        self._define_matching()
        self._define_dependencies()

    def _define_kafka(self) -> None:
        self.consumer_lag = self._gauge(
            "consumer_lag_messages",
            "Messages between the committed offset and the newest one",
            "topic",
            "partition",
        )
        self.oldest_uncommitted_age = self._gauge(
            "oldest_uncommitted_age_seconds", "Age of the oldest event in work; 0 when idle"
        )
        self.commits = self._counter("commits", "Offset commits", "result")
        self.rebalances = self._counter("rebalances", "Times partitions were taken or given")
        self.assigned_partitions = self._gauge("assigned_partitions", "Partitions this worker has")
        self.backpressure_pauses = self._counter(
            "backpressure_pauses", "Times consuming was paused because enough was in work"
        )

    def _define_flow(self) -> None:
        self.events = self._counter("events", "Events consumed", "op")
        self.verdicts = self._counter("verdicts", "Verdicts acknowledged by Kafka", "verdict")
        self.redeliveries = self._counter(
            "redeliveries", "Events answered with the verdict they got before"
        )
        self.dead_letters = self._counter(
            "dead_letters", "Events that could not be decided", "reason"
        )
        self.inflight_events = self._gauge("inflight_events", "Events in work")
        self.batch_images = self._histogram("batch_images", "Images embedded at once", COUNTS)
        self.event_to_verdict = self._histogram(
            "event_to_verdict_seconds",
            "From the record's Kafka timestamp, if it has one, to its acknowledged verdict",
            SECONDS,
        )
        self.stage_seconds = self._histogram(
            "stage_seconds",
            "Time a batch spends in a stage; read and decode: an image",
            SECONDS,
            "stage",
        )

    def _define_matching(self) -> None:
        self.vectors_compared = self._histogram(
            "vectors_compared", "Stored vectors an image was compared with", VECTORS
        )
        self.clusters_probed = self._histogram(
            "clusters_probed", "Clusters looked into for an image", COUNTS
        )
        self.probes_truncated = self._counter(
            "probes_truncated", "Verdicts whose probing was cut short by the budget"
        )
        self.best_similarity = self._histogram(
            "best_similarity", "Similarity of the nearest earlier image", SIMILARITIES
        )
        self.cluster_records = self._histogram(
            "cluster_records", "Records of the cluster nearest to an image", COUNTS
        )
        self.clusters = self._gauge("clusters", "Clusters of all namespaces this worker follows")
        self.cluster_splits = self._counter("cluster_splits", "Clusters split by this worker")
        self.audit_recall = self._gauge(
            "audit_recall_ratio",
            "Sampled images whose match the index finds, of those with one; namespace audited last",
        )
        self.audit_recall.set(math.nan)  # not measured yet is not zero

    def _define_dependencies(self) -> None:
        self.redis_seconds = self._histogram(
            "redis_seconds", "Time of one call of the index", SECONDS, "op"
        )
        self.redis_errors = self._counter("redis_errors", "Failed calls of the index", "kind")
        self.redis_changes = self._counter(
            "redis_changes", "Times a namespace was found on a restarted or another Redis"
        )
        self.lost_images = self._counter(
            "lost_images",
            "Images Redis had acknowledged and then lost; their events are read again",
        )
        self.replays = self._counter("replays", "Partitions read again because Redis lost writes")
        self.kafka_errors = self._counter("kafka_errors", "Failed calls of Kafka", "kind")
        self.fetch = self._counter("fetch", "Fetches of uris", "scheme", "outcome")
        self.fetch_errors = self._counter(
            "fetch_errors", "Fetches this machine failed at; they are tried again", "kind"
        )
        self.build_info = Info(
            "dedup_build",
            "What runs here: version, model, threshold, device, embedding mode",
            registry=self.registry,
        )

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"dedup_{name}", text, labels, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return _quick(Counter(f"dedup_{name}", text, labels, registry=self.registry))

    def _histogram(
        self, name: str, text: str, buckets: tuple[float, ...], *labels: str
    ) -> Histogram:
        name = f"dedup_{name}"
        return _quick(Histogram(name, text, labels, buckets=buckets, registry=self.registry))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Observe the time a block takes as `stage_seconds{stage=name}`."""
        started = perf_counter()
        yield
        self.stage_seconds.labels(name).observe(perf_counter() - started)


def _quick(metric: Metric) -> Metric:
    """Keep what `labels` finds, which no event should have to look up again; never `clear` it."""
    metric.labels = cache(metric.labels)  # type: ignore[method-assign]
    return metric


def table() -> str:
    """The documentation's table of metrics, as Markdown."""
    metrics = [m for m in vars(Metrics()).values() if isinstance(m, MetricWrapperBase)]
    lines = ["| metric | type | labels | meaning |", "|---|---|---|---|"]
    for metric in metrics:
        described = next(iter(metric.describe()))
        suffix = {"counter": "_total", "info": "_info"}.get(described.type, "")
        labels = ", ".join(f"`{name}`" for name in metric._labelnames) or "–"
        lines.append(
            f"| `{described.name}{suffix}` | {described.type} | {labels} | "
            f"{described.documentation} |"
        )
    return "\n".join(lines[:2] + sorted(lines[2:]))
