"""Apache Kafka itself on free loopback ports, for what an imitation cannot show.

Owns getting its archives (from Maven Central, with `mvn`, once), its configuration in KRaft mode
(KIP-500), and the life of one broker or three; same interface as `LocalKafka`. Must not know the
tests. `python -m deploy.apache_kafka` fetches the archives and says whether that worked.
"""

import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from base64 import urlsafe_b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

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

VERSION = "4.1.1"
CACHE = Path(__file__).parents[1] / ".cache"
FETCH_SECONDS = 600.0
READY_SECONDS = 120.0
MESSAGE_BYTES = 33 * 1024 * 1024

# Quick to start rather than quick at its peak, and small: tests run three beside the workers.
JVM = (
    "-Xmx384m",
    "-Xshare:auto",
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
    "-Djava.net.preferIPv4Stack=true",
    "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
    "-Dorg.slf4j.simpleLogger.showDateTime=true",
)
POM = f"""\
<project>
  <modelVersion>4.0.0</modelVersion>
  <groupId>local</groupId><artifactId>kafka</artifactId><version>1</version>
  <packaging>pom</packaging>
  <dependencies>
    <dependency>
      <groupId>org.apache.kafka</groupId><artifactId>kafka_2.13</artifactId>
      <version>{VERSION}</version>
    </dependency>
    <dependency>
      <groupId>org.slf4j</groupId><artifactId>slf4j-simple</artifactId><version>1.7.36</version>
    </dependency>
  </dependencies>
</project>
"""


class KafkaUnavailableError(RuntimeError):
    """There is no java or mvn, or the archives could not be fetched."""


def fetch_archives(cache: Path = CACHE) -> Path:
    """The folder of Kafka's archives; fetches them the first time.

    Raises KafkaUnavailableError.
    """
    folder = cache / f"kafka-{VERSION}"
    for tool in ("java", "mvn"):
        if shutil.which(tool) is None:
            raise KafkaUnavailableError(f"{tool} is not installed")
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        pom, jars = Path(temporary, "pom.xml"), Path(temporary, "jars")
        pom.write_text(POM)
        goals = ["dependency:copy-dependencies", f"-DoutputDirectory={jars}"]
        command = [
            "mvn",
            "-q",
            "-B",
            "-Dstyle.color=never",
            "-f",
            str(pom),
            *goals,
            "-DincludeScope=runtime",
        ]
        try:
            subprocess.run(command, check=True, timeout=FETCH_SECONDS, stdin=subprocess.DEVNULL)
        except (subprocess.SubprocessError, OSError) as error:
            raise KafkaUnavailableError(f"the archives could not be fetched: {error}") from None
        if not folder.is_dir():  # another process may have been quicker
            jars.rename(folder)
    return folder


class KafkaNode(LocalServer):
    """One process that is broker and controller; its data survive `kill` and `restart`."""

    name = "kafka"

    def __init__(
        self, archives: Path, cluster_id: str, number: int, controllers: Mapping[int, int]
    ) -> None:
        """`controllers` maps each node's number to the port of its controller."""
        super().__init__()
        self.port = free_port()
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
            configuration.write_text(self._configuration())
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

    def _configuration(self) -> str:
        voters = ",".join(f"{n}@{HOST}:{port}" for n, port in self._controllers.items())
        copies = len(self._controllers)
        enough = min(2, copies)
        settings = {
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
            "offsets.topic.num.partitions": 4,
            "offsets.topic.replication.factor": copies,
            "transaction.state.log.num.partitions": 4,
            "transaction.state.log.replication.factor": copies,
            "transaction.state.log.min.isr": enough,
        }
        return "".join(f"{name}={value}\n" for name, value in settings.items())


class LocalApacheKafka:
    """Apache Kafka with one broker, or three that replicate; a context manager.

    What is called on it happens to every node; `nodes` are killed and restarted one by one.
    Entering raises KafkaUnavailableError without java, mvn or the archives.
    """

    def __init__(self, brokers: int = 1) -> None:
        self._brokers = brokers
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
    def pid(self) -> int:
        """The process id of the first node."""
        return self.nodes[0].pid

    def create_topics(self, topics: Mapping[str, int], replication: int | None = None) -> None:
        """Create topics, given as name → partitions, replicated to every broker."""
        create_topics(self.bootstrap, topics, replication or self._brokers)

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
            KafkaNode(archives, cluster_id, number, controllers) for number in controllers
        ]

    def _all_registered(self) -> bool:
        return all(kafka_answers(node.address, self._brokers) for node in self.nodes)


KafkaServer = LocalKafka | LocalApacheKafka


def main() -> int:
    """Fetch the archives; 0 when they are there."""
    try:
        print(fetch_archives())
    except KafkaUnavailableError as error:
        print(f"no Apache Kafka: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
