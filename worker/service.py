"""A running worker: its parts built from settings, its background threads, its start and end.

Owns the order of starting (health first, so that a worker that waits can be seen waiting) and of
stopping. The work itself is `pipeline` and `loop`.
"""

import gc
import logging
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from threading import Event, Thread
from time import monotonic
from typing import TypeVar

from worker.config import Settings, harmless_environment
from worker.decoding import DecoderPool
from worker.embedder import Embedder
from worker.errors import ConfigError, InfrastructureError
from worker.health import Check, HealthServer
from worker.images import ImageLimits
from worker.index import Index
from worker.index.auditing import Audit, AuditResult
from worker.index.settings import index_settings
from worker.logs import Sparing
from worker.loop import Loop
from worker.message_settings import message_limits
from worker.metrics import Metrics
from worker.pipeline import Pipeline, PipelineSettings
from worker.retrying import Closed
from worker.source_settings import source_policy
from worker.sources import Fetcher
from worker.storage import connect
from worker.threads import show_name

log = logging.getLogger(__name__)

Result = TypeVar("Result")
WATCH_SECONDS = 2.0  # between two looks at Redis, Kafka, lag and clusters
IDLE_SECONDS = 1.0  # between two looks for clusters to split, when there was none
START_PAUSE_SECONDS = 1.0  # between two tries of a service that is not there yet


class Auditor:
    """Audits the open namespaces in turn, one after each pause, a bounded step at a time."""

    def __init__(self, index: Index, settings: Settings, metrics: Metrics) -> None:
        self._index = index
        self._settings = settings
        self._metrics = metrics
        self._due = monotonic() + settings.audit_pause_seconds
        self._namespace = ""  # the one audited now, or last
        self._audit: Audit | None = None

    def step(self) -> None:
        """Do some of the audit under way, or begin one that is due. Raises InfrastructureError."""
        if self._audit is None:
            self._audit = self._begin()
        elif (result := self._audit.step()) is not None:
            self._audit = None
            self._due = monotonic() + self._settings.audit_pause_seconds
            self._tell(result)

    def _begin(self) -> Audit | None:
        images, names = self._settings.audit_images, sorted(self._index.namespaces())
        if not images or not names or monotonic() < self._due:
            return None
        self._namespace = next((name for name in names if name > self._namespace), names[0])
        return self._index.audit(self._namespace, images)

    def _tell(self, result: AuditResult) -> None:
        if result.duplicates:
            self._metrics.audit_recall.set(result.recall)
        log.info("audited", extra={"namespace": self._namespace, **asdict(result)})


class Service:
    """One worker process."""

    def __init__(self, settings: Settings, release: str) -> None:
        self._settings = settings
        self._release = release
        self._stopping = Event()
        self._pipeline: Pipeline | None = None
        self._loop: Loop | None = None
        self._index: Index | None = None
        self._redis_up = self._kafka_up = self._begun = False
        self._splits_seen = self._changes_seen = self._lost_seen = 0.0
        self._sparing = Sparing()
        self.metrics = Metrics()

    def stop(self) -> None:
        """Finish what is in flight and end. Safe from any thread, but not in a signal handler."""
        self._stopping.set()
        if self._loop is not None:
            self._loop.stop()

    def run(self) -> int:
        """Serve until stopped; the exit status. Raises ConfigError where a setting is wrong."""
        settings = self._settings
        fetcher = Fetcher(source_policy(settings))
        live = {"loop": self._live}
        ready = {
            "model": lambda: self._index is not None,
            "group": lambda: self._loop is not None and self._loop.consumer.joined(),
            "redis": lambda: self._redis_up,
            "kafka": lambda: self._kafka_up,
            "sources": self._can_fetch,
        }
        with self._health(live, ready) as health:
            log.info("starting", extra={"version": self._release, "http_port": health.port})
            embedder = Embedder.load(
                settings.weights,
                mode=settings.embed_mode,
                device=settings.device,
                compiled=settings.compiled_folder,
                threads=settings.embed_threads,
            )
            threshold = settings.threshold or embedder.threshold
            self._describe(embedder, threshold)
            try:
                with closing(fetcher), self._decoders(embedder.input_size) as decoders:
                    return self._work(embedder, threshold, decoders, fetcher)
            except Closed as waited:
                log.info("stopped", extra={"unfinished": 0, "waited_for": str(waited)})
                return 0

    def _health(self, live: dict[str, Check], ready: dict[str, Check]) -> HealthServer:
        host, port = self._settings.http_host, self._settings.http_port
        try:
            return HealthServer(host, port, self.metrics.registry, live, ready)
        except OSError as error:
            raise ConfigError(
                f"http_host, http_port: cannot listen at {host}:{port}: {error.strerror or error}"
            ) from error

    def _live(self) -> bool:
        # While the parts are being built there is no loop to turn yet.
        return self._loop is None or self._loop.live()

    def _can_fetch(self) -> bool:
        # Fetches that this machine fails at are waited for: a folder that is gone, no credentials.
        return self._pipeline is None or self._pipeline.persist_fetch.trouble is None

    def _describe(self, embedder: Embedder, threshold: float) -> None:
        facts = {
            "version": self._release,
            "model_id": embedder.model_id,
            "threshold": f"{threshold:.4f}",
            "device": embedder.device,
            "embed_mode": embedder.mode,
        }
        self.metrics.build_info.info(facts)
        log.info("model loaded", extra=facts)

    def _decoders(self, size: int) -> DecoderPool:
        settings = self._settings
        return DecoderPool(
            settings.decode_processes,
            size,
            ImageLimits(settings.max_image_bytes, settings.max_image_pixels),
            settings.decode_timeout_seconds,
            settings.decode_memory_bytes,
            queue=settings.decode_queue,
            environment=harmless_environment(),
        )

    def _work(
        self, embedder: Embedder, threshold: float, decoders: DecoderPool, fetcher: Fetcher
    ) -> int:
        settings = self._settings
        client = self._until_there("redis", lambda: connect(settings))
        index = Index(
            client,
            embedder.model_id,
            index_settings(settings, threshold),
        )
        # A namespace of another model must stop the worker now, not at its first event.
        for namespace in settings.namespaces or ("default",):
            self._until_there("redis", partial(index.open, namespace))
        pipeline = Pipeline(
            index=index,
            embedder=embedder,
            decoders=decoders,
            fetcher=fetcher,
            metrics=self.metrics,
            settings=PipelineSettings(
                threshold=threshold,
                batch_images=settings.batch_images,
                batch_wait_seconds=settings.batch_wait_seconds,
                fetch_concurrency=settings.fetch_concurrency,
                fetched_bytes=settings.in_flight_bytes,
                max_image_bytes=settings.max_image_bytes,
                limits=replace(message_limits(settings), namespaces=settings.namespaces),
            ),
        )
        loop = self._until_there(
            "kafka",
            lambda: Loop(
                settings=settings, pipeline=pipeline, metrics=self.metrics, version=self._release
            ),
        )
        self._index, self._pipeline, self._loop = index, pipeline, loop
        if self._stopping.is_set():
            loop.stop()
        threads = [
            Thread(target=self._guard, args=(work,), name=work.__name__.strip("_"), daemon=True)
            for work in (self._watch, self._maintain)
        ]
        # What torch and the others have made so far lives as long as the worker: walking all of it
        # now and then, as the collector would, stops every thread for some 140 ms.
        gc.collect()
        gc.freeze()
        for thread in threads:
            thread.start()
        try:
            return loop.run()
        finally:
            self._stopping.set()
            gc.unfreeze()  # or what is left of it at the end is reported as leaked, below our logs

    def _until_there(self, name: str, build: Callable[[], Result]) -> Result:
        """Build a part that needs a service; a service that is not there yet is waited for.

        Raises Closed when the worker is stopped meanwhile.
        """
        while True:
            try:
                return build()
            except InfrastructureError as error:
                errors = {"redis": self.metrics.redis_errors, "kafka": self.metrics.kafka_errors}
                errors[name].labels(type(error.__cause__ or error).__name__).inc()
                if self._sparing.due(name, str(error)):
                    log.warning("waiting for %s", name, extra={"error": str(error)})
                if self._stopping.wait(START_PAUSE_SECONDS):
                    raise Closed(name) from error

    def _guard(self, work: Callable[[], None]) -> None:
        """Do a background thread's work; what it dies of ends the worker, event or none."""
        assert self._loop is not None
        show_name()
        try:
            work()
        except BaseException as error:
            if self._loop.ended():  # Kafka does not answer any more what was asked of it before
                return
            # Of another model's namespace the words say what to do; where it was met does not.
            expected = isinstance(error, ConfigError)
            about = {"work": work.__name__.strip("_"), "error": str(error)}
            log.error("background work ended", extra=about, exc_info=not expected)
            self._loop.fail(error)

    def _watch(self) -> None:
        """Keep readiness, lag and the cluster figures current."""
        while not self._stopping.is_set():
            self._redis_up = self._answers("redis", self._look_at_redis)
            self._kafka_up = self._answers("kafka", self._look_at_kafka)
            self._say_once_that_it_consumes()
            self._stopping.wait(WATCH_SECONDS)

    def _say_once_that_it_consumes(self) -> None:
        assert self._loop is not None
        if self._begun or not (self._redis_up and self._kafka_up and self._loop.consumer.joined()):
            return
        self._begun = True
        log.info("ready: consuming", extra={"topic": self._settings.topic})

    def _answers(self, name: str, look: Callable[[], None]) -> bool:
        try:
            look()
        except InfrastructureError as error:
            if self._sparing.due(name, str(error)):
                log.warning("%s is not ready", name, extra={"error": str(error)})
            return False
        if self._sparing.over(name):
            log.info("%s is ready again", name)
        return True

    def _look_at_redis(self) -> None:
        assert self._index is not None
        assert self._pipeline is not None
        self._index.ping()
        if trouble := self._pipeline.persist.trouble:  # it answers, but may be full
            raise InfrastructureError(trouble)
        stats = self._index.stats()
        self.metrics.clusters.set(stats["clusters"])
        self.metrics.cluster_splits.inc(stats["splits"] - self._splits_seen)
        self._splits_seen = stats["splits"]
        self.metrics.redis_changes.inc(stats["server_changes"] - self._changes_seen)
        self._changes_seen = stats["server_changes"]
        self.metrics.lost_images.inc(stats["lost_images"] - self._lost_seen)
        self._lost_seen = stats["lost_images"]

    def _look_at_kafka(self) -> None:
        assert self._loop is not None
        if not self._loop.consumer.topic_exists():
            raise InfrastructureError(f"there is no topic {self._settings.topic!r}")
        lags = self._loop.consumer.lag(WATCH_SECONDS)
        self.metrics.consumer_lag.clear()
        for (topic, partition), lag in lags.items():
            self.metrics.consumer_lag.labels(topic, str(partition)).set(lag)
        if not self._loop.publishing():
            raise InfrastructureError("publishing fails")

    def _maintain(self) -> None:
        """Split, merge and compact clusters, a bounded piece at a time, beside the stream."""
        assert self._index is not None
        auditor = Auditor(self._index, self._settings, self.metrics)
        while not self._stopping.is_set():
            started = monotonic()
            busy = self._unless_it_waits("maintenance", self._index.maintain)
            self._unless_it_waits("audit", auditor.step)
            if busy:
                self.metrics.stage_seconds.labels("maintain").observe(monotonic() - started)
            else:
                self._stopping.wait(IDLE_SECONDS)

    def _unless_it_waits(self, name: str, work: Callable[[], Result]) -> Result | None:
        """Do some of a work that can wait; None where Redis, or what it holds, is in trouble."""
        try:
            return work()
        except InfrastructureError as error:
            if self._sparing.due(name, str(error)):
                log.info("%s waits", name, extra={"error": str(error)})
            return None
