"""Clients of a Kafka that is not there, or is another than it should be."""

import gc
import logging
import os
import socket
import ssl
import threading
from pathlib import Path
from typing import Any

import pytest
import trustme
from kafka import KafkaConsumer, KafkaProducer

from deploy.process import free_port
from tests.unit.trick_server import TrickServer
from worker import receiving
from worker.connecting import Refused, connect
from worker.errors import InfrastructureError

TRY_MS = 500
HANDSHAKE_MS = 2_000  # a busy machine needs some


@pytest.fixture
def authority(tmp_path: Path) -> trustme.CA:
    """Its certificate is in `authority.pem`."""
    made = trustme.CA()
    made.cert_pem.write_to_path(str(tmp_path / "authority.pem"))
    return made


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


@pytest.mark.parametrize(
    ("wrong", "cause"),
    [
        ("authority", "CERTIFICATE_VERIFY_FAILED"),
        ("name", "IP address mismatch"),
        ("client", "CERTIFICATE_REQUIRED"),
        ("file", "NO_CERTIFICATE_OR_CRL_FOUND"),
    ],
)
def test_tls_that_does_not_come_about_is_a_setting_that_is_wrong(
    server: TrickServer, authority: trustme.CA, tmp_path: Path, wrong: str, cause: str
) -> None:
    server.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trusted = trustme.CA() if wrong == "authority" else authority
    name = "kafka.test" if wrong == "name" else "127.0.0.1"
    trusted.issue_cert(name).configure_cert(server.tls)
    if wrong == "client":
        server.tls.verify_mode = ssl.CERT_REQUIRED
    file = tmp_path / "authority.pem"
    if wrong == "file":
        file.write_text("nothing of that kind")
    options = {
        "bootstrap_servers": f"127.0.0.1:{server.port}",
        "security_protocol": "SSL",
        "ssl_cafile": str(file),
        "bootstrap_timeout_ms": HANDSHAKE_MS,
    }
    with pytest.raises(Refused, match=cause):
        connect(KafkaConsumer, **options)


def test_why_no_broker_was_found_is_said() -> None:
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(InfrastructureError, match=f"from {address}: .*ECONNREFUSED$"):
        connect(KafkaConsumer, bootstrap_servers=address, bootstrap_timeout_ms=TRY_MS)


def test_that_nobody_answers_has_no_cause(server: TrickServer) -> None:
    """Nor a text of its own for each try, which would be logged each time."""
    address = f"127.0.0.1:{server.port}"
    with pytest.raises(InfrastructureError, match=f"from {address}$"):
        connect(KafkaConsumer, bootstrap_servers=address, bootstrap_timeout_ms=TRY_MS)


def test_a_port_that_is_silent_about_tls_is_not_waited_for(
    authority: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del authority  # its certificate is all that is needed
    monkeypatch.setattr(receiving, "HANDSHAKE_SECONDS", TRY_MS / 1000)
    options = {
        "security_protocol": "SSL",
        "ssl_cafile": str(tmp_path / "authority.pem"),
        "bootstrap_timeout_ms": TRY_MS,
    }
    left = []
    with socket.create_server(("127.0.0.1", 0)) as listener:  # nobody accepts
        options["bootstrap_servers"] = f"127.0.0.1:{listener.getsockname()[1]}"
        for _ in range(3):
            with pytest.raises(InfrastructureError, match=r"failed: no answer within 0\.5 s"):
                connect(KafkaConsumer, **options)
            gc.collect()
            left.append(held())
    assert left[1] == left[2]
