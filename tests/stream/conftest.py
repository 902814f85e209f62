"""Workers for stream tests: started on the shared broker and the test's own Redis."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from deploy.local import LocalKafka, LocalRedis
from tests.conftest import Topics
from tests.stream.harness import Worker

StartWorker = Callable[..., Worker]


@pytest.fixture
def start_worker(
    kafka_server: LocalKafka, redis_server: LocalRedis, topics: Topics, tmp_path: Path
) -> Iterator[StartWorker]:
    """Start workers with `start_worker(setting=value, …)`; all are gone after the test."""
    with ExitStack() as stack:
        started = 0

        def start(**settings: Any) -> Worker:
            nonlocal started
            started += 1
            log = tmp_path / f"worker-{started}.log"
            # A test may send a worker another way, through a proxy say.
            bootstrap = settings.pop("bootstrap_servers", kafka_server.bootstrap)
            redis_url = settings.pop("redis_url", redis_server.url)
            worker = Worker(bootstrap, redis_url, topics, log, **settings)
            stack.callback(worker.print_log)
            return stack.enter_context(worker)

        yield start
