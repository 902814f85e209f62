"""`python -m worker rebuild`: fill namespaces again with another model, then switch to it.

Owns the second reading of the events. They pass the same pipeline as ever; only its index is the
generation being built, and nobody is told the verdicts. The order: read everything, switch, read
what came until the switch. Workers of the old model cannot write after it, so nothing is left out.
Interrupted, it is started again: what is stored already is recognised. The pipeline's threads, the
decoders and the embedder are used as a worker uses them; Redis is waited for as it does, too.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from queue import Empty

from kafka import KafkaConsumer
from kafka.errors import KafkaError
from kafka.structs import TopicPartition

from worker import flags, logs
from worker.arguments import Parser, nonempty, whole
from worker.broker import consumer_options, of_all, record_of
from worker.config import Settings, harmless_environment
from worker.connecting import connect as connect_kafka
from worker.decoding import DecoderPool
from worker.embedder import Embedder
from worker.errors import ConfigError, DedupError, EventError, InfrastructureError
from worker.images import ImageLimits
from worker.index.event_file import read_events
from worker.index.index import Index
from worker.index.missing import Missing
from worker.index.settings import index_settings
from worker.index.space import remove_retired
from worker.index.store import Store
from worker.inflating import Bounds, bound
from worker.jobs import Job, Lease
from worker.message_settings import message_limits
from worker.messages import Op, Record, parse
from worker.metrics import Metrics
from worker.pipeline import Pipeline, PipelineSettings
from worker.prefetched import Prefetched
from worker.source_settings import source_policy
from worker.sources import Fetcher
from worker.storage import connect
from worker.topics import TopicId

IN_FLIGHT = 256
"""Events in work at once; fewer where they come to DEDUP_IN_FLIGHT_BYTES."""
POLL_MS = 500
FAILURES = 10
"""Failed events told of."""


class ImagesMissing(DedupError):
    """Images that answer, or did until the switch, are not in the generation that was built."""


def main(argv: list[str]) -> int:
    """Rebuild namespaces; exit status 1 when images were missing, and so it did not switch."""
    args = _parser().parse_args(argv)
    settings = flags.from_flags(Settings, args)
    logs.configure(settings.log_level, settings.log_format)
    events = () if args.events is None else read_events(args.events, message_limits(settings))
    embedder = Embedder.load(args.to_model, mode=settings.embed_mode, device=settings.device)
    client = connect(settings)
    threshold = settings.threshold or embedder.threshold
    index = Index(client, embedder.model_id, index_settings(settings, threshold), building=True)
    namespaces = args.namespace or ["default"]
    with _pipeline(settings, embedder, index) as pipeline:
        rebuild = Rebuild(pipeline, index, namespaces, settings, args.allow_missing)
        try:
            rebuild.run(events)
        except ImagesMissing as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except KafkaError as error:
            raise InfrastructureError(f"Kafka: {error!r}") from error
        finally:
            for failure in rebuild.failures:
                print(failure, file=sys.stderr)
        store, persist = Store(client), pipeline.persist
        removed = Counter[str]()
        for each in namespaces:
            removed += persist("remove", remove_retired, store, each)
    gone = [f"; {count} keys of model {model} removed" for model, count in removed.items()]
    done = "switched" if rebuild.switched else "it answered before, so nothing was switched"
    print(
        f"{', '.join(namespaces)}: {rebuild.done} events stored with model {embedder.model_id}, "
        f"{rebuild.failed} failed; {done}{''.join(gone)}"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m worker rebuild",
        description="Fill namespaces again with another model while the old one answers, from the "
        "event topic, then switch to it in one step each. It does not switch where an image that "
        "answers now could not be stored again.",
    )
    parser.add_argument(
        "--namespace",
        action="append",
        type=nonempty,
        help="which one; again for each that the same workers serve [default]",
    )
    parser.add_argument(
        "--to-model", required=True, help="weights to fill it with: default, imagenet or a file"
    )
    parser.add_argument(
        "--events",
        metavar="FILE",
        help="JSON lines of events that the topic no longer holds, in their order, or -: they are "
        "read before the topic, and count as older than all of it",
    )
    parser.add_argument(
        "--allow-missing",
        type=whole(0),
        default=0,
        metavar="N",
        help="switch although up to N images that answer now could not be stored again [0]",
    )
    flags.add_flags(parser, Settings)
    return parser


class Rebuild:
    """Feeds the events of some namespaces to a pipeline whose index is the generations built."""

    def __init__(
        self,
        pipeline: Pipeline,
        index: Index,
        namespaces: Sequence[str],
        settings: Settings,
        allowed: int,
    ) -> None:
        """`allowed`: how many images of a namespace may be missing where it is switched."""
        self._pipeline, self._persist, self._index = pipeline, pipeline.persist, index
        self._namespaces, self._settings = namespaces, settings
        self._allowed = allowed
        self._limits = message_limits(settings)
        self._leases: dict[int, Lease] = {}
        self._waiting = self._held = 0  # events in work, and their bytes
        self.done = self.failed = 0
        self.failures: list[str] = []  # the first of them, in words
        self.switched = False  # else all of them answered with this model before

    def run(self, events: Iterable[Record]) -> None:
        """Read events and the topic to its end; switch; read to its end then.

        Raises ImagesMissing, before the switch or for what came during it, and ConfigError where
        there is no such namespace or topic, or somebody else rebuilds.
        """
        missing = {
            each: self._persist("open", self._index.missing, each) for each in self._namespaces
        }
        with _reading(self._settings) as unread:
            self.feed(events)
            self.feed(unread())
            # All that is stored now was on the topic before, so then it has been read here, too.
            stored = {
                namespace: self._persist("stored", each.stored)
                for namespace, each in missing.items()
            }
            self.feed(unread())
            for namespace, upto in stored.items():
                self._refuse(
                    missing[namespace], namespace, upto, "not switched: what answered goes on"
                )
            for namespace in self._namespaces:
                self._persist("switch", self._index.switch, namespace)
            self.switched = not all(each.same for each in missing.values())
            self.feed(unread())
        for namespace, each in missing.items():
            upto = self._persist("stored", each.stored)
            self._refuse(each, namespace, upto, "switched; these came meanwhile")

    def _refuse(self, missing: Missing, namespace: str, upto: int, state: str) -> None:
        """Raise ImagesMissing when more than is allowed is missing of what is stored `upto`."""
        self._persist("compare", missing.look, upto)
        if missing.count > self._allowed:
            raise ImagesMissing(
                f"{namespace}: images that could not be stored again: {missing.count}, such as "
                f"{', '.join(missing.some)} ({state}). What was built is kept: mend the cause "
                "and run this command again, with --events for what the topic no longer holds; or "
                f"give them up with --allow-missing {missing.count}. {self.failed} events failed."
            )

    def feed(self, records: Iterable[Record]) -> None:
        """Pass the namespaces' adds and deletes through the pipeline, to the last outcome."""
        for record in records:
            if self._is_wanted(record):
                lease = self._leases.setdefault(record.partition, Lease(("", record.partition)))
                self._pipeline.admit([Job(record, lease)])
                self._waiting += 1
                self._held += record.size
            while self._waiting >= IN_FLIGHT or self._held >= self._settings.in_flight_bytes:
                self._take()
        while self._waiting:
            self._take()

    def _is_wanted(self, record: Record) -> bool:
        try:
            event = parse(record, self._limits)
        except EventError:
            return False  # it has its dead letter since it was first read
        return event.namespace in self._namespaces and event.op is not Op.CHECK

    def _take(self) -> None:
        """Wait for finished jobs."""
        while True:
            try:
                jobs = self._pipeline.outcomes.get(timeout=POLL_MS / 1000)
            except Empty:
                if not self._pipeline.alive():
                    raise _cause(self._pipeline.failure) from None
                continue
            failed = [job for job in jobs if isinstance(job.outcome, EventError)]
            self.failed += len(failed)
            self.done += len(jobs) - len(failed)
            for job in failed[: FAILURES - len(self.failures)]:
                self.failures.append(f"{job.event.image_id if job.event else '?'}: {job.outcome}")
            self._maintain({job.event.namespace for job in jobs if job.event})
            self._waiting -= len(jobs)
            self._held -= sum(job.record.size for job in jobs)
            return

    def _maintain(self, namespaces: set[str]) -> None:
        """Do the upkeep that is due; where Redis is away it can wait for the next batch."""
        for namespace in namespaces:
            with suppress(InfrastructureError):
                while self._index.maintain(namespace):
                    pass


def _cause(failure: BaseException | None) -> DedupError:
    """Why the pipeline died; what is for whoever runs the command stays as it was said."""
    if isinstance(failure, ConfigError):
        return failure
    return DedupError(f"the pipeline died: {failure}")


@contextmanager
def _reading(settings: Settings) -> Iterator[Callable[[], Iterator[Record]]]:
    """Read the event topic from its start: each call answers what was not read, to its end then.

    Raises ConfigError when there is no such topic.
    """
    bound(Bounds(settings.max_message_bytes, settings.batch_bytes, settings.max_headers))
    consumer = connect_kafka(KafkaConsumer, **consumer_options(settings))
    prefetched = Prefetched(consumer, settings.poll_bytes)
    topic = settings.topic
    partitions = [TopicPartition(topic, p) for p in consumer.partitions_for_topic(topic) or ()]
    if not partitions:
        raise ConfigError(f"topic {topic!r} does not exist")
    consumer.assign(partitions)
    consumer.seek_to_beginning(*partitions)
    try:
        yield lambda: _until_end(consumer, prefetched, partitions)
    finally:
        consumer.close()


def _until_end(
    consumer: KafkaConsumer, prefetched: Prefetched, partitions: list[TopicPartition]
) -> Iterator[Record]:
    """Records up to where the partitions end now. Raises as `of_all` does."""
    ends = of_all(consumer.end_offsets, partitions)
    topic_id = TopicId(consumer, partitions[0].topic)
    topic_id.look()
    while any(consumer.position(each) < ends[each] for each in partitions):
        prefetched.before_poll()
        for messages in consumer.poll(timeout_ms=POLL_MS).values():
            yield from (record_of(message, topic_id.now) for message in messages)


@contextmanager
def _pipeline(settings: Settings, embedder: Embedder, index: Index) -> Iterator[Pipeline]:
    limits = ImageLimits(settings.max_image_bytes, settings.max_image_pixels)
    fetcher = Fetcher(source_policy(settings))
    with DecoderPool(
        settings.decode_processes,
        embedder.input_size,
        limits,
        settings.decode_timeout_seconds,
        settings.decode_memory_bytes,
        environment=harmless_environment(),
    ) as decoders:
        pipeline = Pipeline(
            index=index,
            embedder=embedder,
            decoders=decoders,
            fetcher=fetcher,
            metrics=Metrics(),
            settings=PipelineSettings(
                threshold=settings.threshold or embedder.threshold,
                batch_images=settings.batch_images,
                fetch_concurrency=settings.fetch_concurrency,
                fetched_bytes=settings.in_flight_bytes,
                max_image_bytes=settings.max_image_bytes,
                limits=message_limits(settings),
            ),
        )
        pipeline.start()
        try:
            yield pipeline
        finally:
            pipeline.close(POLL_MS / 1000)
            fetcher.close()
