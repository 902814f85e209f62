"""The local servers answer, keep or lose their data as promised, and never outlive their owner."""

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import redis
from kafka import KafkaConsumer, KafkaProducer

from deploy.apache_kafka import KafkaServer
from deploy.local import LocalRedis
from deploy.process import ChildFailedError, ChildProcess, Deadline

WAIT_SECONDS = 120.0


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A program of its own that starts both servers, prints their process ids, and sleeps."""
    program = """
        import time
        from deploy.local import LocalKafka, LocalRedis
        with LocalRedis() as redis, LocalKafka() as kafka:
            print(redis.pid, kafka.pid, redis.directory, kafka.directory, flush=True)
            time.sleep(600)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_servers_end_with_their_owner(owner: subprocess.Popen[str], number: signal.Signals) -> None:
    assert owner.stdout is not None
    *pids, redis_directory, kafka_directory = owner.stdout.readline().split()
    servers = [psutil.Process(int(pid)) for pid in pids]
    assert all(server.is_running() for server in servers)
    os.kill(owner.pid, number)
    owner.wait(WAIT_SECONDS)
    assert psutil.wait_procs(servers, timeout=WAIT_SECONDS)[1] == []
    if number == signal.SIGINT:
        assert not Path(redis_directory).exists()
        assert not Path(kafka_directory).exists()


def test_redis_with_aof_survives_a_crash(redis_server: LocalRedis) -> None:
    redis_server.client().set("kept", "1")
    redis_server.kill()
    with pytest.raises(redis.ConnectionError):
        redis_server.client().ping()
    redis_server.start()
    assert redis_server.client().get("kept") == b"1"


def test_redis_without_aof_forgets() -> None:
    with LocalRedis() as server:
        address = server.url
        server.client().set("kept", "1")
        server.restart()
        assert server.url == address
        assert server.client().get("kept") is None


def test_a_paused_redis_answers_nothing_until_it_resumes(redis_server: LocalRedis) -> None:
    impatient = redis.Redis.from_url(redis_server.url, socket_timeout=0.3, retry=None)
    redis_server.pause()
    with pytest.raises(redis.TimeoutError):
        impatient.ping()
    redis_server.resume()
    assert redis_server.client().ping()


def test_redis_listens_on_loopback_only(redis_server: LocalRedis) -> None:
    assert listening_hosts(redis_server.pid) == {"127.0.0.1"}


def test_a_cluster_spreads_keys_over_its_nodes() -> None:
    with LocalRedis(cluster=3) as server:
        client = server.cluster_client()
        for number in range(60):
            client.set(f"{{{number}}}:key", number)
        assert client.get("{59}:key") == b"59"
        held = [node.client().dbsize() for node in server.nodes]
        assert sum(held) == 60
        assert min(held) > 0


def test_a_wrong_directive_is_reported_with_the_server_log() -> None:
    with (
        pytest.raises(ChildFailedError, match="no-such-directive"),
        LocalRedis(config={"no-such-directive": "1"}),
    ):
        pass


def test_kafka_takes_and_gives_back_a_message(kafka_server: KafkaServer) -> None:
    kafka_server.create_topics({"there-and-back": 2})
    with KafkaProducer(bootstrap_servers=kafka_server.bootstrap) as producer:
        producer.send("there-and-back", b"value", b"key").get(WAIT_SECONDS)
    consumer = KafkaConsumer(
        "there-and-back",
        bootstrap_servers=kafka_server.bootstrap,
        auto_offset_reset="earliest",
        consumer_timeout_ms=int(WAIT_SECONDS * 1000),
    )
    with consumer:
        message = next(iter(consumer))
        assert (message.key, message.value) == (b"key", b"value")
        assert consumer.partitions_for_topic("there-and-back") == {0, 1}


def test_kafka_listens_on_loopback_only(kafka_server: KafkaServer) -> None:
    assert listening_hosts(kafka_server.pid) == {"127.0.0.1"}


def test_a_child_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    stubborn = "import signal,time; signal.signal(15, lambda *_: print('no', flush=True))"
    child = ChildProcess(
        [sys.executable, "-c", f"{stubborn}; print('up', flush=True)\nwhile True: time.sleep(9)"],
        tmp_path / "log.txt",
    )
    deadline = Deadline(WAIT_SECONDS)
    while "up" not in child.log_tail() and not deadline.passed:
        os.sched_yield()
    assert child.stop(seconds=0.5) == -signal.SIGKILL
    assert "no" in child.log_tail()


def listening_hosts(pid: int) -> set[str]:
    """The addresses a process listens on."""
    connections = psutil.Process(pid).net_connections("tcp")
    return {each.laddr.ip for each in connections if each.status == psutil.CONN_LISTEN}
