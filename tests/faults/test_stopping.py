"""A worker that is stopped in the middle of a rebalance."""

import signal
import time
from contextlib import ExitStack, closing
from socket import socket
from threading import Event

import pytest
from kafka import KafkaAdminClient

from deploy.apache_kafka import LocalApacheKafka
from tests.conftest import PARTITIONS, Topics
from tests.faults.workload import SETTINGS
from tests.photos import jpeg, photos
from tests.stream.conftest import StartWorker
from tests.stream.harness import PATIENT, Reader, by_uri, publish, until
from tests.stream.member import SECONDS, SHORT_POLL_SECONDS, Member
from tests.unit.trick_server import TrickServer, answer

HEARTBEAT_SECONDS = 1.0  # a tenth of the session: how often a member hears of a rebalance
PATH = "/slow.jpg"

pytestmark = pytest.mark.apache_kafka


@pytest.mark.parametrize("kafka_server", ["apache"], indirect=True)
@pytest.mark.parametrize("delivery", ["at-least-once", "exactly-once"])
def test_it_publishes_and_commits_what_it_has_in_work(
    kafka_server: LocalApacheKafka, topics: Topics, start_worker: StartWorker, delivery: str
) -> None:
    """It goes on joining until it is done, for without a group nothing can be committed."""
    picture, fetched = jpeg(next(iter(photos().values()))), Event()

    def slowly(connection: socket, _: int) -> None:
        assert fetched.wait(SECONDS)
        connection.sendall(answer(200, picture))

    with ExitStack() as stack:
        server = stack.enter_context(closing(TrickServer()))
        server.paths[PATH] = slowly
        allowed = SETTINGS | {
            "fetch_schemes": "http",
            "fetch_hosts": f"127.0.0.1:{server.port}",
            "fetch_networks": "127.0.0.0/8",
            "fetch_timeout_seconds": 300,
        }
        worker = start_worker(delivery=delivery, **allowed, **PATIENT).wait_ready()
        stays, comes = (Member(kafka_server, topics, 10 * HEARTBEAT_SECONDS) for _ in range(2))
        for member in (stays, comes):
            stack.callback(member.consumer.close, 2.0)
        stack.callback(fetched.set)

        def shared() -> bool:
            stays.consumer.poll(SHORT_POLL_SECONDS, 1)
            return len(stays.owner.held) == PARTITIONS / 2 and stays.consumer.joined()

        until(shared, SECONDS, "half of the partitions each")
        (partition, *_) = set(range(PARTITIONS)) - {number for _, number in stays.owner.held}
        uri = f"http://127.0.0.1:{server.port}{PATH}"
        publish(kafka_server.bootstrap, topics.images, [by_uri("slow", uri, partition=partition)])
        until(lambda: server.asked[PATH] > 0, SECONDS, "fetched")

        comes.consumer.poll(SHORT_POLL_SECONDS, 1)  # the group waits for all to join; one does not
        admin = stack.enter_context(KafkaAdminClient(bootstrap_servers=kafka_server.bootstrap))

        def rebalancing() -> bool:
            comes.consumer.poll(SHORT_POLL_SECONDS, 1)
            state = admin.describe_groups([topics.group])[topics.group]["group_state"]
            return bool(state == "PreparingRebalance")

        until(rebalancing, SECONDS, "a rebalance")
        time.sleep(3 * HEARTBEAT_SECONDS)  # the worker has heard of it, and asked to join
        assert worker.process is not None
        worker.process.send_signal(signal.SIGTERM)
        until(lambda: "stopping" in {line["message"] for line in worker.lines()}, SECONDS, "heard")
        fetched.set()

        def ended() -> bool:
            for member in (stays, comes):
                member.consumer.poll(SHORT_POLL_SECONDS, 1)
            return not worker.running

        until(ended, SECONDS, "stopped")
        assert worker.terminate() == 0
        where = {(topics.images, partition)}
        assert comes.consumer.committed(where, SECONDS) == dict.fromkeys(where, 1)
    with Reader(kafka_server.bootstrap, topics.verdicts, isolation="read_committed") as reader:
        reader.wait(lambda: bool(reader.messages[topics.verdicts]), SECONDS, "a verdict")
