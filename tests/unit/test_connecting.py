"""Clients of a Kafka that is not there."""

import gc
import logging
import os
import threading
from typing import Any

import pytest
from kafka import KafkaConsumer, KafkaProducer

from deploy.process import free_port
from worker.connecting import connect
from worker.errors import InfrastructureError

TRY_MS = 200


def held() -> tuple[int, list[str]]:
    """The process's descriptors and kafka-python's threads."""
    threads = [each.name for each in threading.enumerate() if each.name.startswith("kafka-io")]
    return len(os.listdir("/proc/self/fd")), threads  # noqa: PTH208


@pytest.mark.parametrize("kind", [KafkaConsumer, KafkaProducer])
def test_nothing_is_left_of_who_found_no_broker(
    kind: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker tries for as long as Kafka is away."""
    caplog.set_level(logging.CRITICAL, "kafka")  # as in a worker: what is logged would be kept
    before = held()
    for _ in range(3):
        with pytest.raises(InfrastructureError, match="bootstrap"):
            address = f"127.0.0.1:{free_port()}"
            connect(kind, bootstrap_servers=address, bootstrap_timeout_ms=TRY_MS)
    gc.collect()
    assert held() == before
