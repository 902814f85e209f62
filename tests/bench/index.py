"""How the index scales: recall, vectors compared, time and memory, from 10 thousand images up.

    make bench-index ARGS="--sizes 10000,100000 --photos DIR_OR_TAR… --json FILE --plot FILE.png"

One Redis is grown from size to size through the index's own calls, images arriving in batches,
clusters splitting as in service; at each size it is measured in batches of 64: storing
distractors, of which hardly one repeats anything, and checking the edits, which nearly all do, so
that ids of matches are looked up, too. Beside it, in one process: numpy brute force and faiss
IVF-Flat with four times the root of what is stored as lists and as many probes as it takes to the
same recall, both asked for the edits. Everything on one thread each, but for faiss' training.
Caveats: times are those of this machine with whatever else ran; the caches are warm; distractors
are drawn, not photographed (see index_data).
"""

import argparse
import atexit
import gc
import hashlib
import json
import shutil
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from threading import Event, Thread

import numpy as np
import redis

from deploy.local import LocalRedis
from tests.bench.index_data import Distractors, Real, likeness, real_vectors
from tests.bench.index_report import Measured, plot, table
from tests.bench.index_rivals import BATCH, brute_force, brute_force_time, faiss_lists
from worker.index import Answer, Arrival, Index, IndexSettings
from worker.index.keys import Keys, State
from worker.index.store import Store
from worker.memory import keep_freed
from worker.vectors import Vectors, quantize

FILLING = 512
PART = 50_000
"""Distractors made at once."""
TIMED = 20
"""Batches that are timed at each size, behind as many lookups as there are clusters: each looks
into several, so then nearly all are in the cache, as in a worker that has run for a while."""
LOADING = 512
"""Images given at once where 10,000 are decided, as when a catalogue is loaded."""
PAUSE = 0.005
"""Seconds between two looks for upkeep when there was none."""
NAMESPACE = "bench"
VERDICT = b"v" * 14  # what a unique image's decision takes


class Rig:
    """A server, a worker's index, and everything stored so far."""

    def __init__(self, server: LocalRedis, settings: IndexSettings) -> None:
        self.client: redis.Redis = server.client()
        self.settings = settings
        self.base = int(self.client.info("memory")["used_memory"])
        self.stored: Vectors = np.zeros((0, 128), np.int8)

    def fill(self, parts: Iterable[Vectors]) -> None:
        """Store rows as images with ids of 24 characters."""
        # Filling needs no neighbours; it looks at the home cluster only, and blocks nobody.
        settings = replace(self.settings, probes=1, least_probes=1, script_arrivals=FILLING)
        filler = Index(self.client, "bench", settings)
        for rows in parts:
            for start in range(0, len(rows), FILLING):
                part = rows[start : start + FILLING]
                self.insert(filler, self.arrivals(part, len(self.stored) + start))
            self.stored = np.concatenate([self.stored, rows])

    def insert(self, index: Index, arrivals: list[Arrival]) -> list[Answer]:
        """Place, settle, and do the upkeep that came of it."""
        answers = self.decide(index, arrivals)
        while index.maintain(NAMESPACE):
            pass
        return answers

    def decide(self, index: Index, arrivals: list[Arrival]) -> list[Answer]:
        """Place and settle."""
        answers = index.place(arrivals)
        index.settle(
            [
                (NAMESPACE, arrival.image_id, answer.sequence or 0, VERDICT)
                for arrival, answer in zip(arrivals, answers, strict=True)
            ]
        )
        return answers

    def arrivals(self, rows: Vectors, first: int, *, store: bool = True) -> list[Arrival]:
        """An arrival for each row."""
        return [
            Arrival(
                NAMESPACE,
                photo_id(first + at) if store else f"query-{first + at}",
                hashlib.sha256(b"%d %d" % (first + at, store)).digest(),
                store=store,
                position=(0, first + at),
                vector=row,
            )
            for at, row in enumerate(rows)
        ]

    def redis_cpu(self) -> float:
        """CPU seconds the server has used."""
        info = self.client.info("cpu")
        return float(info["used_cpu_user"]) + float(info["used_cpu_sys"])

    def bytes_per_image(self) -> float:
        """What the server holds more than when it was empty, an image."""
        return (int(self.client.info("memory")["used_memory"]) - self.base) / len(self.stored)

    def cluster_sizes(self) -> list[int]:
        """Living records of each cluster."""
        store = Store(self.client)
        serving = store.command("HGET", Keys(NAMESPACE, "").root, "serving").decode()
        states = store.command("HGETALL", Keys(NAMESPACE, serving).clusters)
        return [State.unpack(state).live for state in states.values()]


def photo_id(place: int) -> str:
    """24 characters. Sequences tell no place: who is asked again comes behind his batch."""
    return f"image-{place:018d}"


def missing(rig: Rig, distractors: Distractors, size: int) -> Iterator[Vectors]:
    """Distractors, some at a time, until so many are stored."""
    while len(rig.stored) < size:
        count = min(size - len(rig.stored), PART)
        yield distractors.sample(count, seed=len(rig.stored))
        print(f"{len(rig.stored):,} stored", file=sys.stderr, flush=True)


def measure(rig: Rig, real: Real, distractors: Distractors) -> Measured:
    """All figures at the size the rig has now."""
    index = Index(rig.client, "bench", rig.settings)
    times, worker_cpu, redis_cpu = timed(rig, index, distractors)
    queries = quantize(real.edits)
    _, times_of_edits = checked(rig, index, queries)
    reaching, has_match = brute_force(rig.stored, queries, real, rig.settings.threshold)
    # To see whether the photo is among the matches, all of them are listed.
    listing = Index(rig.client, "bench", replace(rig.settings, matches=10**6))
    found, _ = checked(rig, listing, queries)
    at_original = [
        photo_id(int(real.original[at])) in {match.image_id for match in found[at].matches}
        for at in np.flatnonzero(reaching)
    ]
    verdicts = [found[at].earliest is not None for at in np.flatnonzero(has_match)]
    recall = float(np.mean(at_original))
    sizes = rig.cluster_sizes()
    del index, listing
    lists = faiss_lists(rig.stored, queries, real, reaching, recall=recall)
    compared = float(np.mean([answer.vectors_compared for answer in found]))
    return Measured(
        stored=len(rig.stored),
        clusters=len(sizes),
        largest_cluster=max(sizes),
        median_cluster=int(statistics.median(sizes)),
        threshold=rig.settings.threshold,
        planted=int(reaching.sum()),
        recall=recall,
        recall_of_verdicts=float(np.mean(verdicts)),
        compared=compared,
        compared_share=compared / len(rig.stored),
        probes=float(np.mean([answer.clusters_probed for answer in found])),
        truncated=float(np.mean([answer.truncated for answer in found])),
        p50_seconds=float(np.quantile(times, 0.5)),
        p99_seconds=float(np.quantile(times, 0.99)),
        p50_seconds_of_edits=float(np.quantile(times_of_edits, 0.5)),
        p99_seconds_of_edits=float(np.quantile(times_of_edits, 0.99)),
        worker_core_seconds=worker_cpu,
        redis_core_seconds=redis_cpu,
        redis_bytes_per_image=rig.bytes_per_image(),
        **lists,
        bruteforce_p50_seconds=brute_force_time(rig.stored, queries),
    )


def checked(rig: Rig, index: Index, queries: Vectors) -> tuple[list[Answer], list[float]]:
    """What the index says to the queries, storing nothing; and seconds an image of each batch."""
    answers: list[Answer] = []
    times = []
    for start in range(0, len(queries), BATCH):
        arrivals = rig.arrivals(queries[start : start + BATCH], start, store=False)
        began = time.perf_counter()
        answers += index.place(arrivals)
        times.append((time.perf_counter() - began) / len(arrivals))
    return answers, times


def timed(rig: Rig, index: Index, distractors: Distractors) -> tuple[list[float], float, float]:
    """Seconds an image of route, script and compare, in batches, storing; and the cores' share."""
    checked(rig, index, distractors.sample(len(rig.cluster_sizes()), seed=1))
    rows = distractors.sample(TIMED * BATCH, seed=len(rig.stored))
    times, cpu, redis_cpu = [], 0.0, 0.0
    for start in range(0, len(rows), BATCH):
        arrivals = rig.arrivals(rows[start : start + BATCH], len(rig.stored) + start)
        used, redis_used, began = time.process_time(), rig.redis_cpu(), time.perf_counter()
        answers = index.place(arrivals)
        times.append((time.perf_counter() - began) / BATCH)
        cpu += time.process_time() - used
        redis_cpu += rig.redis_cpu() - redis_used
        index.settle(
            [
                (NAMESPACE, arrival.image_id, answer.sequence or 0, VERDICT)
                for arrival, answer in zip(arrivals, answers, strict=True)
            ]
        )
        while index.maintain(NAMESPACE):
            pass
    rig.stored = np.concatenate([rig.stored, rows])
    return times, cpu / (len(times) * BATCH), redis_cpu / (len(times) * BATCH)


@contextmanager
def upkeep(index: Index) -> Iterator[None]:
    """Do the upkeep in a thread of its own meanwhile, as a worker does."""
    ended, errors = Event(), list[BaseException]()

    def work() -> None:
        try:
            while not ended.is_set():
                if not index.maintain(NAMESPACE):
                    ended.wait(PAUSE)
        except BaseException as error:
            errors.append(error)

    thread = Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    if errors:
        raise errors[0]


def seconds_to_decide(
    rows: Vectors, settings: IndexSettings, binary: Path | None
) -> tuple[float, float]:
    """From the first vector given to the last verdict stored, in an empty namespace.

    Answers seconds on the clock and seconds of all cores.
    """
    with LocalRedis(binary=binary) as server:
        rig = Rig(server, settings)
        index = Index(rig.client, "bench", settings)
        index.open(NAMESPACE)
        batches = [
            rig.arrivals(rows[start : start + LOADING], start)
            for start in range(0, len(rows), LOADING)
        ]
        cores, began = rig.redis_cpu() + time.process_time(), time.perf_counter()
        with upkeep(index):
            for arrivals in batches:
                rig.decide(index, arrivals)
            seconds = time.perf_counter() - began
        return seconds, rig.redis_cpu() + time.process_time() - cores


def main(argv: Sequence[str]) -> int:
    """Measure every size and print the table."""
    parser = _parser()
    options = parser.parse_args(argv)
    keep_freed()  # as a worker does, and so the next two lines
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # likewise: else it is reported as leaked
    real = real_vectors(options.photos or [], options.edits, Path(".cache/bench-index"))
    if odd := unreachable(options.sizes, len(real.photos)):
        parser.error(f"--sizes: {odd}")
    distractors = Distractors(real.photos)
    settings = IndexSettings(threshold=options.threshold or real.threshold, cache_bytes=4 << 30)
    settings = _with(settings, options)
    alike = likeness(real.photos, distractors.floats(len(real.photos), seed=1))
    for name, values in alike.items():
        print(f"similarity to the nearest, 5 25 50 75 95 %: {name:20} {values}")
    decided = seconds_to_decide(distractors.sample(10_000, 7), settings, options.server)
    print("10,000 vectors inserted and decided in {:.2f} s, {:.2f} core-s".format(*decided))
    results: list[Measured] = []
    with LocalRedis(binary=options.server) as server:
        rig = Rig(server, settings)
        rig.fill([quantize(real.photos)])
        for size in sorted(options.sizes):
            began = time.perf_counter()
            rig.fill(missing(rig, distractors, size - TIMED * BATCH))
            filled = time.perf_counter() - began
            results.append(measure(rig, real, distractors))
            results[-1].seconds_to_fill = filled
            print(table(results[-1:]), flush=True)
            _write(options, results, decided, alike, real)
    return 0


def unreachable(sizes: Sequence[int], photos: int) -> str | None:
    """Why one of the sizes would not be what is measured; None when all would be."""
    stored = photos
    for size in sorted(sizes):
        if size < stored + TIMED * BATCH:
            return (
                f"{size:,} is too few: there are {stored:,} images before it, "
                f"and {TIMED * BATCH:,} are stored while it is timed"
            )
        stored = size
    return None


def _with(settings: IndexSettings, options: argparse.Namespace) -> IndexSettings:
    given = {
        name: getattr(options, name)
        for name in ("probes", "probe_margin", "cluster_limit")
        if getattr(options, name) is not None
    }
    return IndexSettings(**{**asdict(settings), **given})


def _write(
    options: argparse.Namespace,
    results: list[Measured],
    decided: tuple[float, float],
    alike: dict[str, list[float]],
    real: Real,
) -> None:
    if options.json:
        report = {
            "sizes": [asdict(result) for result in results],
            "seconds_to_decide_10000": decided[0],
            "core_seconds_to_decide_10000": decided[1],
            "nearest_similarity_quantiles": alike,
            "model_id": real.model_id,
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.plot:
        plot(results, options.plot)


def _sizes(text: str) -> list[int]:
    return [int(size) for size in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.index", description=__doc__)
    add = parser.add_argument
    add(
        "--sizes",
        type=_sizes,
        default=[10_000, 100_000],
        help="images stored: 10000,100000 (the photos are among them)",
    )
    add("--photos", type=Path, nargs="+", help="folders or tars; default: crops of shipped photos")
    add("--edits", type=int, default=2_000, help="edited photos asked about")
    add("--threshold", type=float, help="default: the weights' own")
    add("--probes", type=int, help="default: the index's own")
    add("--probe-margin", type=float, help="default: the index's own")
    add("--cluster-limit", type=int, help="default: the index's own")
    add("--json", type=Path, help="file for the figures")
    add("--plot", type=Path, help="file for the picture (PNG)")
    server = shutil.which("redis-server")
    add(
        "--server",
        type=Path,
        default=Path(server) if server else None,
        help="server binary; default: redis-server if there is one, for its allocator, or Valkey",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
