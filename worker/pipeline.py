"""Events to outcomes: the line of stages every event passes, each in threads of its own.

    admit ──► read ──► recognise ──► decode ──► embed ──► resolve ──► outcomes
              parse,   id or bytes   pixels,    128-d     insert and compare in Redis,
              fetch    known?        killable   vectors   decide, store the verdict

Knows the index, the embedder and the decoders, but nothing of Kafka: it is given jobs and hands
back the same jobs with an outcome, in the order they came per partition. Stages work on whatever
is ready, so batches grow with the load and a lone event waits for nobody.
"""

import hashlib
import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import Queue
from threading import Event, Thread
from time import monotonic, perf_counter
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from worker.errors import ConfigError, EventError
from worker.index import Index
from worker.jobs import Job, Pixels
from worker.lanes import LULL, InLine, Lanes, Turns, gather
from worker.messages import MessageLimits, Op, parse
from worker.metrics import Metrics
from worker.reading import Reader
from worker.resolving import Resolver
from worker.retrying import Closed, Persistence
from worker.threads import show_name, take_long_turns
from worker.vectors import quantize

log = logging.getLogger(__name__)

SOON = 8  # pictures embedded before any is handed on, where one alone is nearly as cheap
MANY, BACKLOG = 32, 96  # the same where a backlog is on its way: one longer turn on warm caches
TOGETHER = 16  # resolved at once where as many are near: a trip to Redis or Kafka has its price
STOCK = 32  # pictures behind which the last one waits for longer than `SOON` take to come together


class Embeds(Protocol):
    """What the pipeline needs of `worker.embedder.Embedder`."""

    @property
    def model_id(self) -> str: ...
    @property
    def fills(self) -> bool: ...
    @property
    def threads(self) -> int: ...
    def embed_pixels(self, pixels: Pixels) -> NDArray[np.float32]: ...


class Decodes(Protocol):
    """What it needs of `worker.decoding.DecoderPool`."""

    def submit(self, data: bytes) -> "Future[Pixels]": ...


class Fetches(Protocol):
    """What it needs of `worker.sources.Fetcher`."""

    def fetch(self, uri: str) -> bytes: ...


@dataclass(frozen=True)
class PipelineSettings:
    """Sizes and waits of the stages; `worker.config` tells their meaning and bounds."""

    threshold: float
    batch_images: int = 64
    batch_wait_seconds: float = 0.02
    fetch_concurrency: int = 16
    fetched_bytes: int = 256 * 1024 * 1024
    max_image_bytes: int = 20 * 1024 * 1024
    limits: MessageLimits = field(default_factory=MessageLimits)


class Pipeline:
    """The stages and the queues between them; how much is inside, its user bounds."""

    def __init__(
        self,
        *,
        index: Index,
        embedder: Embeds,
        decoders: Decodes,
        fetcher: Fetches,
        metrics: Metrics,
        settings: PipelineSettings,
        on_step: Callable[[str], None] = lambda step: None,
    ) -> None:
        """`on_step` is told each step of the protocol once it is done; fault tests crash there."""
        self.outcomes: Queue[list[Job]] = Queue()
        self.failure: BaseException | None = None  # what a stage died of
        self.persist = Persistence("index", metrics.redis_errors, metrics.redis_seconds)
        self.persist_fetch = Persistence("fetching", metrics.fetch_errors)
        self._index = index
        self._embedder = embedder
        self._decoders = decoders
        self._fetcher = fetcher
        self._metrics = metrics
        self._settings = settings
        self._on_step = on_step
        self._resolver = Resolver(
            index=index,
            persist=self.persist,
            metrics=metrics,
            model_id=embedder.model_id,
            threshold=settings.threshold,
            on_step=on_step,
        )
        self._sourced: Lanes[Job] = Lanes(lambda job: job.partition, Job.source_ready)
        self._decoded: Lanes[Job] = Lanes(lambda job: job.partition, Job.pixels_ready)
        self._embedded: Queue[list[Job]] = Queue()
        self._turns: Turns[list[Job]] = Turns()
        # Each counter has one writing stage; the difference of two is what is between them.
        self._passed_to_decoders = self._passed_embedder = 0
        self._deletes: InLine[str] = InLine()  # by namespace
        self._ids: InLine[tuple[str, str]] = InLine()  # those of adds and checks, with namespace
        # By namespace, the bytes of checks: a copy that is recognised would be what they find.
        self._checks: InLine[tuple[str, bytes]] = InLine()
        self._stopping = Event()
        self._reader = Reader(
            self._fetch,
            settings.fetch_concurrency,
            settings.fetched_bytes,
            settings.max_image_bytes,
        )
        stages = (
            self._recognise_stage,
            *[self._embed_stage] * embedder.threads,
            self._resolve_stage,
        )
        self._threads = [
            Thread(target=self._guard, args=(stage,), name=stage.__name__.strip("_"), daemon=True)
            for stage in stages
        ]

    def start(self) -> None:
        """Start the stages."""
        for thread in self._threads:
            thread.start()

    def close(self, timeout: float) -> None:
        """Stop the stages within `timeout` seconds; jobs still inside are dropped, uncommitted."""
        self._stopping.set()
        self.persist.close()
        self.persist_fetch.close()
        self._sourced.close()
        self._decoded.close()
        self._embedded.put([])
        self._reader.close()
        deadline = monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, deadline - monotonic()))

    def lost(self) -> dict[int, int]:
        """By partition, the first event whose image the index had stored and has lost."""
        return self._index.lost()

    def replaying(self, first: dict[int, int]) -> None:
        """Events are read again from there."""
        self._index.replaying(first)

    def alive(self) -> bool:
        """Whether every stage still runs."""
        return self.failure is None and all(thread.is_alive() for thread in self._threads)

    def _guard(self, stage: Callable[[], None]) -> None:
        show_name()
        try:
            stage()
        except Closed:
            log.info("stopped while waiting for the index", extra={"stage": stage.__name__})
        except BaseException as error:
            # Of another model's namespace the words say what to do; where it was met does not.
            expected = isinstance(error, ConfigError)
            about = {"stage": stage.__name__, "error": str(error)}
            log.error("stage ended", extra=about, exc_info=not expected)
            self.failure = error

    def admit(self, jobs: list[Job]) -> None:
        """Parse, start fetching, and put in line. Never blocks."""
        for job in jobs:
            try:
                job.event = event = parse(job.record, self._settings.limits)
            except EventError as error:
                job.outcome = error
                self._metrics.events.labels("unknown").inc()
                continue
            self._metrics.events.labels(str(event.op)).inc()
            if event.data is not None:
                job.data = event.data
            elif event.uri is not None and not job.is_delete:
                job.source = self._reader.submit(event.uri)
                job.source.add_done_callback(lambda _: self._sourced.wake())
        self._sourced.put(jobs)

    def _fetch(self, uri: str) -> bytes:
        scheme = uri.partition(":")[0].lower()
        # The scheme is a stranger's text; a label must not be.
        labels = self._metrics.fetch.labels
        label = scheme if scheme in ("http", "https", "file", "s3") else "other"
        try:
            with self._metrics.stage("read"):
                data = self.persist_fetch("fetch", self._fetcher.fetch, uri)
        except EventError as error:
            labels(label, str(error.reason)).inc()
            raise
        labels(label, "fetched").inc()
        return data

    def _recognise_stage(self) -> None:
        while jobs := self._sourced.take(self._settings.batch_images):
            early = [job for job in jobs if self._take_source(job)]
            with self._metrics.stage("recognise"):
                self._resolver.recognise(early)
            self._passed_to_decoders += len(jobs)
            # Decoders may be busy with as many already: those done are handed on meanwhile.
            for at in range(0, len(jobs), SOON):
                for job in jobs[at : at + SOON]:
                    self._start_decoding(job)
                self._decoded.put(jobs[at : at + SOON])

    def _take_source(self, job: Job) -> bool:
        """Put it in line with its bytes; whether to ask early if it is known."""
        early = self._enter(job)
        if not job.live or job.is_delete:
            if job.source is not None:  # its partition is lost; its bytes may be on their way
                job.source.add_done_callback(self._abandon)
            return False
        if job.source is not None:
            try:
                job.data = job.source.result()
            except EventError as error:
                job.outcome = error
                return False
            job.fetched = len(job.data)
        job.sha256 = hashlib.sha256(job.data).digest()
        assert job.event is not None
        asked = job.event.namespace, job.sha256
        if job.event.op is Op.CHECK:
            self._checks.enter(asked)
            return early
        return early and asked not in self._checks

    def _enter(self, job: Job) -> bool:
        """Put it in line; whether nothing is before it that must be decided first.

        Past a delete still in line its image looks known yet. Past an earlier event of its id
        that brings a new image, its own bytes, if they are known, would take the id.
        """
        if job.event is None:
            return False
        namespace, identity = job.event.namespace, (job.event.namespace, job.event.image_id)
        if job.is_delete:
            self._deletes.enter(namespace)
            return False
        first = namespace not in self._deletes and identity not in self._ids
        self._ids.enter(identity)
        return first

    def _leave(self, job: Job) -> None:
        if job.event is None:
            return
        if job.is_delete:
            self._deletes.leave(job.event.namespace)
        else:
            self._ids.leave((job.event.namespace, job.event.image_id))
            if job.event.op is Op.CHECK and job.sha256:
                self._checks.leave((job.event.namespace, job.sha256))

    def _abandon(self, source: "Future[bytes]") -> None:
        if source.exception() is None:
            self._reader.release(len(source.result()))

    def _start_decoding(self, job: Job) -> None:
        if job.live and job.answer is None and not job.is_delete:
            self._decode(job)
        elif job.fetched:
            self._reader.release(job.fetched)
        job.data = b""  # the decoders have it; held on, it would double the bytes in flight

    def _decode(self, job: Job) -> None:
        started = perf_counter()
        job.pixels = self._decoders.submit(job.data)

        def done(_: object) -> None:
            self._metrics.stage_seconds.labels("decode").observe(perf_counter() - started)
            if job.fetched:
                self._reader.release(job.fetched)
            self._decoded.wake()

        job.pixels.add_done_callback(done)

    def _embed_stage(self) -> None:
        take_long_turns()
        while True:
            turn, jobs = self._turns.take(self._take_decoded)
            if not jobs:
                return
            self._embed([job for job in jobs if job.pixels is not None and job.live])
            with self._turns.wait_for(turn):
                self._passed_embedder += len(jobs)
                self._embedded.put(jobs)

    def _take_decoded(self) -> list[Job]:
        settings, fills = self._settings, self._embedder.fills
        most = embedded_together(self._coming(), settings, fills)
        return self._decoded.take(
            most, lambda coming: embedding_patience(coming, settings, fills, self._turns.open)
        )

    def _coming(self) -> int:
        """Events handed on to the decoders that have not passed the embedder."""
        return self._passed_to_decoders - self._passed_embedder

    def _embed(self, jobs: list[Job]) -> None:
        pixels: list[Pixels] = []
        decoded: list[Job] = []
        for job in jobs:
            assert job.pixels is not None
            try:
                pixels.append(job.pixels.result())
                decoded.append(job)
            except EventError as error:
                job.outcome = error
            job.pixels = None
        if not decoded:
            return
        with self._metrics.stage("embed"):
            vectors = quantize(self._embedder.embed_pixels(np.stack(pixels)))
        self._metrics.batch_images.observe(len(decoded))
        for job, vector in zip(decoded, vectors, strict=True):
            job.vector = vector
        self._on_step("embedded")

    def _resolve_stage(self) -> None:
        settings = self._settings
        most = settings.batch_images
        patience = 0.0 if self._embedder.fills else settings.batch_wait_seconds
        while not self._stopping.is_set() and (
            jobs := gather(self._embedded, TOGETHER, most, patience, self._coming)
        ):
            with self._metrics.stage("resolve"):
                self._resolver.resolve(jobs)
            for job in jobs:
                self._leave(job)
            self.outcomes.put(jobs)


def embedded_together(coming: int, settings: PipelineSettings, fills: bool) -> int:
    """Most pictures of one turn where so many images are on their way to the embedder or there.

    `fills`: whatever a batch holds, it costs as much as a full one.
    """
    if fills:
        return settings.batch_images
    return min(settings.batch_images, MANY if coming >= BACKLOG else SOON)


def embedding_patience(
    coming: int, settings: PipelineSettings, fills: bool, embedding: bool
) -> float:
    """Seconds to wait for a full batch where so many images are there or still to be decoded.

    `fills`: whatever a batch holds, it costs as much as a full one. `embedding`: so does another
    thread meanwhile.
    """
    wait = settings.batch_wait_seconds
    if coming >= (settings.batch_images if fills else STOCK):
        return wait * LULL
    # Only eight together are cheaper than each alone: worth a wait when as many are coming, and
    # while another thread embeds, which fewer had to wait for if there were no second one.
    return wait if fills or coming >= SOON or embedding else 0.0
