"""Apache Kafka itself on free loopback ports, for what an imitation cannot show.

Owns its configuration in KRaft mode (KIP-500) and the life of one broker or three; same interface
as `LocalKafka`. Must not know the tests.
"""

import shutil
import subprocess
import time
import uuid
from base64 import urlsafe_b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from kafka.errors import InvalidReplicationFactorError

from deploy.kafka_archives import KafkaUnavailableError, fetch_archives
from deploy.local import (
    HOST,
    POLL_SECONDS,
    START_ATTEMPTS,
    LocalKafka,
    LocalServer,
    create_topics,
    kafka_answers,
)
from deploy.process import ChildFailedError, Deadline, free_port

READY_SECONDS = 120.0
MESSAGE_BYTES = 100 * 1024 * 1024

# Quick to start rather than quick at its peak, and small: tests run three beside the workers.
JVM = (
    "-Xmx768m",  # with half of it a broker was lost in collecting, given messages of 100 MB
    "-Xshare:auto",
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
    "-Djava.net.preferIPv4Stack=true",
    "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
    "-Dorg.slf4j.simpleLogger.showDateTime=true",
)


@dataclass(frozen=True)
class Access:
    """Who may come in by the secure listener, and the server's PEM certificate and key for it.

    With `clients`, the PEM certificate of their authority, they must show one of their own, too.
    """

    username: str
    password: str
    certificate: Path
    key: Path
    clients: Path | None = None


class KafkaNode(LocalServer):
    """One process that is broker and controller; its data survive `kill` and `restart`."""

    name = "kafka"

    def __init__(
        self,
        archives: Path,
        cluster_id: str,
        number: int,
        controllers: Mapping[int, int],
        access: Access | None,
    ) -> None:
        """`controllers` maps each node's number to the port of its controller."""
        super().__init__()
        self.port = free_port()
        self.secure_port = free_port()
        self._access = access
        self._archives = archives
        self._cluster_id = cluster_id
        self._number = number
        self._controllers = controllers

    @property
    def address(self) -> str:
        """`host:port` for clients."""
        return f"{HOST}:{self.port}"

    def launch(self) -> None:
        """Start without waiting: alone, a node of three does not answer."""
        configuration = self.directory / "server.properties"
        if not configuration.exists():
            lines = [f"{name}={value}\n" for name, value in self._settings().items()]
            configuration.write_text("".join(lines))
            self._format(configuration)
        self._launch()

    def wait(self, deadline: Deadline) -> None:
        """Wait until it answers."""
        self._wait_ready(self._running(), deadline)

    def start(self) -> None:
        """Start on the port it had before and wait until it answers."""
        self.launch()
        self.wait(Deadline(READY_SECONDS))

    def _format(self, configuration: Path) -> None:
        arguments = ["format", "-t", self._cluster_id, "-c", str(configuration)]
        if self._access is not None:
            who = f"name={self._access.username},password={self._access.password}"
            for mechanism in ("SCRAM-SHA-256", "SCRAM-SHA-512"):
                arguments += ["--add-scram", f"{mechanism}=[{who}]"]
        command = self._java("kafka.tools.StorageTool", *arguments)
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=READY_SECONDS
        )
        if done.returncode != 0:
            raise ChildFailedError(f"Kafka's storage was not formatted:\n{done.stderr}")

    def _java(self, main: str, *arguments: str) -> list[str]:
        java = shutil.which("java")
        if java is None:
            raise KafkaUnavailableError("java is not installed")
        return [java, *JVM, "-cp", f"{self._archives}/*", main, *arguments]

    def _arguments(self) -> list[str]:
        return self._java("kafka.Kafka", str(self.directory / "server.properties"))

    def _answers(self) -> bool:
        return kafka_answers(self.address)

    def _settings(self) -> dict[str, object]:
        """The server's properties."""
        voters = ",".join(f"{n}@{HOST}:{port}" for n, port in self._controllers.items())
        copies = len(self._controllers)
        enough = min(2, copies)
        settings: dict[str, object] = {
            "process.roles": "broker,controller",
            "node.id": self._number,
            "controller.quorum.voters": voters,
            "controller.listener.names": "CONTROLLER",
            "listeners": f"PLAINTEXT://{self.address},"
            f"CONTROLLER://{HOST}:{self._controllers[self._number]}",
            "advertised.listeners": f"PLAINTEXT://{self.address}",
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
            "log.dirs": self.directory / "data",
            "auto.create.topics.enable": "false",
            # A killed broker may come back only when its session is over.
            "broker.session.timeout.ms": 3_000,
            "broker.heartbeat.interval.ms": 500,
            "message.max.bytes": MESSAGE_BYTES,
            "replica.fetch.max.bytes": MESSAGE_BYTES,
            "min.insync.replicas": enough,
            "group.initial.rebalance.delay.ms": 0,
            "group.min.session.timeout.ms": 1_000,
            # How often transactions of the dead are looked for.
            "transaction.abort.timed.out.transaction.cleanup.interval.ms": 500,
            "offsets.topic.num.partitions": 4,
            "offsets.topic.replication.factor": copies,
            "transaction.state.log.num.partitions": 4,
            "transaction.state.log.replication.factor": copies,
            "transaction.state.log.min.isr": enough,
        }
        if self._access is not None:
            for name, value in self._secured(self._access).items():
                settings[name] = f"{settings[name]},{value}" if name in settings else value
        return settings

    def _secured(self, access: Access) -> dict[str, object]:
        """What a listener with TLS (KIP-651) and SASL needs beside the plain one."""
        store = self.directory / "server.pem"
        store.write_text(access.key.read_text() + access.certificate.read_text())
        address = f"SECURE://{HOST}:{self.secure_port}"
        modules, prefix = "org.apache.kafka.common.security", "listener.name.secure"
        scram = f"{modules}.scram.ScramLoginModule required;"
        mutual: dict[str, object] = {
            f"{prefix}.ssl.client.auth": "required",  # beside SASL, too (KIP-684)
            f"{prefix}.ssl.truststore.type": "PEM",
            f"{prefix}.ssl.truststore.location": access.clients,
        }
        return (mutual if access.clients else {}) | {
            "listeners": address,
            "advertised.listeners": address,
            "listener.security.protocol.map": "SECURE:SASL_SSL",
            "inter.broker.listener.name": "PLAINTEXT",
            f"{prefix}.ssl.keystore.type": "PEM",
            f"{prefix}.ssl.keystore.location": store,
            f"{prefix}.sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-256,SCRAM-SHA-512",
            f"{prefix}.plain.sasl.jaas.config": f"{modules}.plain.PlainLoginModule required "
            f'user_{access.username}="{access.password}";',
            f"{prefix}.scram-sha-256.sasl.jaas.config": scram,
            f"{prefix}.scram-sha-512.sasl.jaas.config": scram,
        }


class LocalApacheKafka:
    """Apache Kafka with one broker, or three that replicate; a context manager.

    What is called on it happens to every node; `nodes` are killed and restarted one by one.
    With `access` there is a second listener, which wants TLS and a password.
    Entering raises KafkaUnavailableError without java, mvn or the archives.
    """

    node: type[KafkaNode] = KafkaNode  # a subclass may set its servers up in another way

    def __init__(self, brokers: int = 1, access: Access | None = None) -> None:
        self._brokers = brokers
        self._access = access
        self.nodes: Sequence[KafkaNode] = ()

    def __enter__(self) -> Self:
        archives = fetch_archives()
        # A free port may be taken before the server binds it.
        for attempt in range(1, START_ATTEMPTS + 1):
            try:
                self._create(archives)
                self.start()
            except BaseException as error:
                self.close()
                if attempt == START_ATTEMPTS or not isinstance(error, ChildFailedError):
                    raise
            else:
                break
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def bootstrap(self) -> str:
        """`host:port,…` for clients."""
        return ",".join(node.address for node in self.nodes)

    @property
    def secure_bootstrap(self) -> str:
        """`host:port,…` of the listeners with TLS and SASL, where `access` was given."""
        return ",".join(f"{HOST}:{node.secure_port}" for node in self.nodes)

    @property
    def pid(self) -> int:
        """The process id of the first node."""
        return self.nodes[0].pid

    def create_topics(self, topics: Mapping[str, int], replication: int | None = None) -> None:
        """Create topics, given as name → partitions, replicated to every broker.

        On a busy machine the controller may take a broker for dead, and has too few for a moment.
        """
        deadline = Deadline(READY_SECONDS)
        while True:
            try:
                return create_topics(self.bootstrap, topics, replication or self._brokers)
            except InvalidReplicationFactorError:
                if deadline.passed:
                    raise
                time.sleep(POLL_SECONDS)

    def start(self) -> None:
        """Start every node with the data it had and wait until all answer."""
        for node in self.nodes:
            node.launch()
        deadline = Deadline(READY_SECONDS)
        for node in self.nodes:
            node.wait(deadline)
        while self._brokers > 1 and not self._all_registered():
            if deadline.passed:
                raise ChildFailedError("the brokers did not find each other")
            time.sleep(POLL_SECONDS)

    def stop(self) -> None:
        """Let every node shut down in order."""
        for node in self.nodes:
            node.stop()

    def kill(self) -> None:
        """SIGKILL every node."""
        for node in self.nodes:
            node.kill()

    def restart(self) -> None:
        """Stop and start every node; messages, offsets and transactions are kept."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """Freeze every node."""
        for node in self.nodes:
            node.pause()

    def resume(self) -> None:
        """Let every node go on."""
        for node in self.nodes:
            node.resume()

    def close(self) -> None:
        """End every node and remove the data."""
        for node in self.nodes:
            node.close()

    def _create(self, archives: Path) -> None:
        cluster_id = urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        controllers = {number: free_port() for number in range(1, self._brokers + 1)}
        self.nodes = [
            self.node(archives, cluster_id, number, controllers, self._access)
            for number in controllers
        ]

    def _all_registered(self) -> bool:
        return all(kafka_answers(node.address, self._brokers) for node in self.nodes)


KafkaServer = LocalKafka | LocalApacheKafka
