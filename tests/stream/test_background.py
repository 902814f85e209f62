"""What a worker does beside the stream, in threads of their own, and how it ends when one dies."""

from deploy.local import LocalRedis
from tests.contract.harness import Bench
from tests.stream.conftest import StartWorker
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
