"""How a worker starts, or says why it does not, and how it ends before it has."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from deploy.apache_kafka import KafkaServer
from deploy.local import LocalRedis
from deploy.process import free_port
from tests.conftest import NOBODY, Topics
from tests.stream.harness import Worker, until
from worker.threads import interrupt_nobody

END_SECONDS = 60.0


@pytest.fixture
def waiting(redis_server: LocalRedis, tmp_path: Path) -> Iterator[Worker]:
    """A worker all of whose parts are there, but Kafka."""
    bootstrap = f"127.0.0.1:{free_port()}"
    with Worker(bootstrap, redis_server.url, NOBODY, tmp_path / "worker.log") as worker:
        waits = "waiting for kafka"
        until(lambda: waits in {line["message"] for line in worker.lines()}, END_SECONDS, waits)
        yield worker
        worker.print_log()


def test_signals_close_together_end_a_worker_that_waits_for_kafka(waiting: Worker) -> None:
    """The handler of one signal is often interrupted by the next, with whatever lock it holds."""
    assert waiting.process is not None
    for _ in range(50):
        waiting.process.send_signal(signal.SIGINT)
        waiting.process.send_signal(signal.SIGTERM)
    assert waiting.process.wait(END_SECONDS) == 0
    last = waiting.lines()[-1]
    assert (last["message"], last["waited_for"]) == ("stopped", "kafka")
    assert "Traceback" not in waiting.log.read_text()


def test_who_waits_at_the_start_shows_it_in_the_metrics(waiting: Worker) -> None:
    lines = waiting.get("/metrics").text.splitlines()
    errors = [line for line in lines if line.startswith("dedup_kafka_errors_total{")]
    assert sum(float(line.split()[-1]) for line in errors) > 0
    assert "dedup_assigned_partitions 0.0" in lines


@pytest.mark.skipif(sys.platform != "linux", reason="these are Linux's")
def test_neither_the_worker_nor_a_decoder_interrupts_others(waiting: Worker) -> None:
    assert waiting.process is not None
    decoders = psutil.Process(waiting.process.pid).children(recursive=True)
    assert decoders
    with ThreadPoolExecutor(1, initializer=interrupt_nobody) as asked:  # may be refused here
        policy = asked.submit(os.sched_getscheduler, 0).result()
    for pid in (waiting.process.pid, *(decoder.pid for decoder in decoders)):
        assert os.sched_getscheduler(pid) == policy


@pytest.mark.parametrize("mode", ["fp32", pytest.param("compiled", marks=pytest.mark.slow)])
def test_its_log_is_lines_of_json_from_the_first_to_the_last(
    kafka_server: KafkaServer, redis_server: LocalRedis, topics: Topics, tmp_path: Path, mode: str
) -> None:
    """What native libraries say at the very end, of what they take for leaked, would be others."""
    log = tmp_path / "worker.log"
    with Worker(kafka_server.bootstrap, redis_server.url, topics, log, embed_mode=mode) as worker:
        worker.wait_ready()
        assert worker.terminate() == 0
    messages = [json.loads(line)["message"] for line in log.read_text().splitlines()]
    assert "stopped" in messages


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--http-port", "{taken}"], "error: http_host, http_port: cannot listen at 127.0.0.1:"),
        (["--http-host", "192.0.2.1"], "error: http_host, http_port: cannot listen at 192.0.2.1:"),
        (["--http-port", "0", "--fetch-networks", "foo"], "error: "),
        (["--http-port", "0", "--fetch-schemes", "file"], "error: fetch_roots: "),
        (["--http-port", "0", "--fetch-schemes", "http", "--fetch-hosts", "http://a"], "error: "),
        (["--http-port", "0", "--fetch-schemes", "file", "--fetch-roots", "here"], "error: "),
    ],
)
def test_a_setting_that_cannot_work_is_one_line_before_anything_is_loaded(
    flags: list[str], says: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        given = [flag.format(taken=taken.getsockname()[1]) for flag in flags]
        ended = subprocess.run(
            [sys.executable, "-m", "worker", *given],
            capture_output=True,
            text=True,
            timeout=END_SECONDS,
            check=False,
        )
    assert ended.returncode == 2
    assert ended.stderr.startswith(says)
    assert len(ended.stderr.splitlines()) == 1
