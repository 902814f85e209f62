"""Random faults for as long as one likes: `python -m tests.faults.soak --minutes 30`.

Three workers, Valkey and Tansu, or with `--broker apache` Apache Kafka, and then with exactly-once;
every few seconds a worker is killed, frozen or replaced, or two are replaced at once, Redis is
killed or made slow, a link is cut, Apache Kafka is killed or frozen. At the end of each round the
oracle judges everything so far, so that a run may be stopped at any round; `--seed` repeats its
faults. Memory of the servers is not judged, that of the workers is: see `Memory`.
"""

import argparse
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import psutil

from deploy.local import LocalRedis
from tests.faults.conftest import fresh
from tests.faults.oracle import Oracle
from tests.faults.proxied import ProxiedApacheKafka, ProxiedTansu
from tests.faults.proxy import HOST, Proxy
from tests.faults.workload import SETTINGS, mixed
from tests.stream.harness import Worker

WORKERS = 3
FAMILIES = 40  # new ones a round
FAULTS = 4  # in a round
SECONDS = 600.0  # until everything of a round is answered
SESSION_SECONDS = 3
FROZEN_SECONDS = 6.0
DELAY_SECONDS = 0.2
PAUSE_SECONDS = 3.0
MOST_GROWTH = 1.2
SETTLED_ROUNDS = 3  # rounds after which a process has all it will ever load


class Memory:
    """Resident memory of worker processes that lived through several rounds.

    `judge` fails where one has grown by more than a fifth since it had settled.
    """

    def __init__(self) -> None:
        self._seen: dict[int, list[int]] = {}

    def look(self, workers: list[Worker]) -> None:
        """Note what each has now, in bytes."""
        for worker in workers:
            if worker.process is not None and worker.running:
                size = psutil.Process(worker.process.pid).memory_info().rss
                self._seen.setdefault(worker.process.pid, []).append(size)

    def judge(self) -> str:
        """One line that says how much they grew."""
        grown = [
            sizes[-1] / sizes[SETTLED_ROUNDS - 1]
            for sizes in self._seen.values()
            if len(sizes) > SETTLED_ROUNDS
        ]
        assert max(grown, default=1.0) < MOST_GROWTH, f"memory grew: {grown}"
        return f"{max(grown, default=1.0):.2f} of {len(grown)} workers that lived long enough"


class Soak:
    """The servers, the workers, and what may happen to them."""

    def __init__(
        self, stack: ExitStack, folder: Path, chance: random.Random, broker: str, delivery: str
    ) -> None:
        self._chance = chance
        self._redis = stack.enter_context(LocalRedis(aof=True))
        self._proxy = stack.enter_context(Proxy(self._redis.port))
        self._kafka: ProxiedTansu | ProxiedApacheKafka
        if broker == "apache":
            self._kafka = stack.enter_context(ProxiedApacheKafka())
        else:
            self._kafka = stack.enter_context(ProxiedTansu())
        assert self._kafka.proxy is not None
        self._way = self._kafka.proxy
        topics = fresh(self._kafka)
        bootstrap = f"{HOST}:{self._way.port}"
        # The first is left alone but for what happens to the servers: its memory is watched.
        self.workers = [
            stack.enter_context(
                Worker(
                    bootstrap,
                    f"redis://{HOST}:{self._proxy.port}/0",
                    topics,
                    folder / f"worker-{number}.log",
                    **settings(delivery),  # type: ignore[arg-type]
                )
            )
            for number in range(WORKERS)
        ]
        for worker in self.workers:
            worker.wait_ready()
        self.oracle = stack.enter_context(Oracle(bootstrap, topics, self._redis, delivery=delivery))
        self._faults: list[Callable[[], None]] = [
            self._kill_worker,
            self._freeze_worker,
            self._replace_worker,
            self._replace_workers,
            self._kill_redis,
            self._slow_redis,
            self._cut_redis,
            self._cut_kafka,
        ]
        if broker == "apache":  # Tansu forgets everything
            self._faults += [self._kill_kafka, self._freeze_kafka]

    def round(self, number: int) -> None:
        """Publish, let things happen, wait for the end, judge."""
        self.oracle.publish(mixed(FAMILIES, first=number * FAMILIES))
        for fault in self._chance.choices(self._faults, k=FAULTS):
            time.sleep(self._chance.uniform(0, PAUSE_SECONDS))
            print(f"  {fault.__name__.strip('_')}", flush=True)
            fault()
        self.oracle.wait_until_finished(SECONDS)
        self.oracle.judge()

    def _another(self) -> Worker:
        return self._chance.choice(self.workers[1:])

    def _kill_worker(self) -> None:
        worker = self._another()
        worker.kill()
        worker.start()

    def _freeze_worker(self) -> None:
        process = self._another().process
        assert process is not None
        process.send_signal(signal.SIGSTOP)
        time.sleep(FROZEN_SECONDS)
        process.send_signal(signal.SIGCONT)

    def _replace_worker(self) -> None:
        self._replace([self._another()])

    def _replace_workers(self) -> None:
        self._replace(self.workers[1:])

    def _replace(self, workers: list[Worker]) -> None:
        ready = [worker for worker in workers if worker.ready()]  # others have nothing to hand over
        for worker in ready:
            assert worker.process is not None
            worker.process.send_signal(signal.SIGTERM)
        for worker in ready:
            assert worker.process is not None
            assert worker.process.wait(SECONDS) == 0
            worker.start()

    def _kill_redis(self) -> None:
        self._redis.kill()
        time.sleep(self._chance.uniform(0, PAUSE_SECONDS))
        self._redis.start()

    def _slow_redis(self) -> None:
        self._proxy.delay_seconds = self._chance.uniform(0, DELAY_SECONDS)
        time.sleep(PAUSE_SECONDS)
        self._proxy.delay_seconds = 0.0

    def _cut_redis(self) -> None:
        self._proxy.cut()
        time.sleep(self._chance.uniform(0, PAUSE_SECONDS))
        self._proxy.mend()

    def _cut_kafka(self) -> None:
        self._way.cut()
        time.sleep(self._chance.uniform(0, PAUSE_SECONDS))
        self._way.mend()

    def _kill_kafka(self) -> None:
        self._kafka.kill()
        time.sleep(self._chance.uniform(0, PAUSE_SECONDS))
        self._kafka.start()

    def _freeze_kafka(self) -> None:
        self._kafka.pause()
        time.sleep(self._chance.uniform(0, FROZEN_SECONDS))
        self._kafka.resume()


def settings(delivery: str) -> dict[str, object]:
    """Of the workers: quick to notice, patient when they stop."""
    return {
        "delivery": delivery,
        "session_timeout_seconds": SESSION_SECONDS,
        "redis_timeout_seconds": 1.0,
        "publish_timeout_seconds": 10,
        "shutdown_timeout_seconds": 60,
        **SETTINGS,
    }


def soak(
    minutes: float, seed: int, broker: str = "tansu", delivery: str = "at-least-once"
) -> tuple[int, str]:
    """Run rounds until the time is over; how many were judged, and a line that says what they were.

    Raises AssertionError where a rule does not hold.
    """
    memory = Memory()
    deadline = time.monotonic() + minutes * 60
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dedup-soak-")))
        run = Soak(stack, folder, random.Random(seed), broker, delivery)
        number = 0
        while time.monotonic() < deadline:
            print(f"round {number}: {len(run.oracle.sent)} events so far", flush=True)
            run.round(number)
            memory.look(run.workers)
            number += 1
        events = len(run.oracle.sent)
        return number, f"{number} rounds, {events} events; memory at most {memory.judge()}"


def main(argv: list[str]) -> int:
    """Exit status 0: every rule held all the time."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--broker", choices=["tansu", "apache"], default="tansu")
    parser.add_argument("--delivery", choices=["at-least-once", "exactly-once"])
    options = parser.parse_args(argv)
    best = "exactly-once" if options.broker == "apache" else "at-least-once"
    print(soak(options.minutes, options.seed, options.broker, options.delivery or best)[1])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
