"""TLS and SASL to a real broker: let in with the right password, and nothing told without."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaConsumer

from deploy.apache_kafka import Access, LocalApacheKafka
from deploy.local import LocalRedis
from tests.conftest import NOBODY, require_apache_kafka
from tests.stream.harness import Worker
from worker.config import Settings
from worker.connections import KafkaSettings
from worker.errors import InfrastructureError
from worker.flags import load
from worker.publishing import Outgoing, Publisher

USERNAME, PASSWORD, KEY_PASSWORD = "producer", "not-for-the-log-7391", "key-hush-4410"
WAIT_SECONDS = 120.0
EVENT = json.dumps({"image_id": "1", "op": "delete"}).encode()

pytestmark = pytest.mark.apache_kafka


@pytest.fixture(scope="module")
def access(tmp_path_factory: pytest.TempPathFactory) -> Access:
    """A self-signed certificate for loopback, which clients take as its own authority."""
    folder = tmp_path_factory.mktemp("certificate")
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = [
        *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
        *("-subj", "/CN=loopback", "-addext", "subjectAltName=IP:127.0.0.1"),
        *("-keyout", str(key), "-out", str(certificate)),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return Access(USERNAME, PASSWORD, certificate, key)


@pytest.fixture(scope="module")
def secure_kafka(access: Access) -> Iterator[LocalApacheKafka]:
    require_apache_kafka()
    with LocalApacheKafka(access=access) as kafka:
        kafka.create_topics({"images": 1})
        yield kafka


def secured(kafka: LocalApacheKafka, access: Access, **changes: object) -> dict[str, Any]:
    """Settings that let in."""
    return {
        "bootstrap_servers": kafka.secure_bootstrap,
        "security_protocol": "SASL_SSL",
        "sasl_mechanism": "SCRAM-SHA-256",
        "sasl_username": USERNAME,
        "sasl_password": PASSWORD,
        "kafka_ca_file": access.certificate,
        **changes,
    }


def publish(
    kafka: LocalApacheKafka,
    access: Access,
    mechanism: str,
    password: str,
    authority: Path,
    *,
    more: Mapping[str, object] | None = None,
) -> subprocess.CompletedProcess[bytes]:
    flags: dict[str, object] = {
        "bootstrap-servers": kafka.secure_bootstrap,
        "security-protocol": "SASL_SSL",
        "sasl-mechanism": mechanism,
        "sasl-username": access.username,
        "sasl-password": password,
        "kafka-ca-file": str(authority),
        **(more or {}),
    }
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    return subprocess.run(
        [sys.executable, "-m", "producer", "-", *arguments],
        input=EVENT,
        capture_output=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"])
def test_the_right_password_lets_in(
    secure_kafka: LocalApacheKafka, access: Access, mechanism: str
) -> None:
    done = publish(secure_kafka, access, mechanism, PASSWORD, access.certificate)
    assert done.returncode == 0, done.stderr
    settings = load(KafkaSettings, secured(secure_kafka, access, sasl_mechanism=mechanism))
    consumer = KafkaConsumer(
        "images",
        **settings.client_options(),
        auto_offset_reset="earliest",
        consumer_timeout_ms=int(WAIT_SECONDS * 1000),
    )
    with consumer:
        assert next(consumer).key == b"1"


def test_a_wrong_password_is_refused_and_not_shown(
    secure_kafka: LocalApacheKafka, access: Access
) -> None:
    wrong = PASSWORD[::-1]
    done = publish(secure_kafka, access, "SCRAM-SHA-512", wrong, access.certificate)
    assert done.returncode == 2
    shown = done.stdout + done.stderr
    assert b"Traceback" not in shown
    assert b"SaslAuthenticationFailed" in shown
    assert wrong.encode() not in shown


def test_a_server_of_another_authority_is_not_trusted(
    secure_kafka: LocalApacheKafka, access: Access, tmp_path: Path
) -> None:
    other = tmp_path / "other.pem"
    command = [
        *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"),
        *("-keyout", str(tmp_path / "key.pem"), "-out", str(other)),
    ]
    subprocess.run(command, check=True, capture_output=True)
    done = publish(secure_kafka, access, "PLAIN", PASSWORD, other)
    assert done.returncode == 2
    assert b"certificate verify failed" in done.stderr
    assert PASSWORD.encode() not in done.stdout + done.stderr


def test_a_server_of_another_name_is_not_trusted(
    secure_kafka: LocalApacheKafka, access: Access
) -> None:
    elsewhere = secure_kafka.secure_bootstrap.replace("127.0.0.1", "localhost")
    assert elsewhere != secure_kafka.secure_bootstrap
    more = {"bootstrap-servers": elsewhere}
    done = publish(secure_kafka, access, "PLAIN", PASSWORD, access.certificate, more=more)
    assert done.returncode == 2
    assert b"Hostname mismatch" in done.stderr
    assert PASSWORD.encode() not in done.stdout + done.stderr


def test_a_worker_that_is_refused_says_why_and_ends(
    secure_kafka: LocalApacheKafka, access: Access, redis_server: LocalRedis, tmp_path: Path
) -> None:
    wrong = secured(secure_kafka, access, sasl_password=PASSWORD[::-1])
    bootstrap, log = wrong.pop("bootstrap_servers"), tmp_path / "worker.log"
    with Worker(bootstrap, redis_server.url, NOBODY, log, **wrong) as worker:
        assert worker.process is not None
        assert worker.process.wait(WAIT_SECONDS) == 2
    last = log.read_text().splitlines()[-1]
    assert last.startswith("error: Kafka: ")
    assert "SaslAuthenticationFailed" in last
    assert PASSWORD[::-1] not in log.read_text()


def test_who_publishes_waits_where_it_is_refused(
    secure_kafka: LocalApacheKafka, access: Access
) -> None:
    """It runs, so it was let in before."""
    wrong = secured(secure_kafka, access, sasl_password=PASSWORD[::-1])
    publisher = Publisher(load(Settings, wrong))
    with pytest.raises(InfrastructureError, match="SaslAuthenticationFailed"):
        publisher.publish([Outgoing("images", b"k", b"v")])


def test_a_client_certificate_that_is_asked_for_must_be_shown(
    access: Access, tmp_path: Path
) -> None:
    """Mutual TLS; the client's key has a password of its own."""
    require_apache_kafka()
    shown = {"kafka-cert-file": tmp_path / "client.pem", "kafka-key-file": tmp_path / "key.pem"}
    command = [
        *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-passout", f"pass:{KEY_PASSWORD}"),
        *("-days", "2", "-subj", "/CN=client"),
        *("-keyout", str(shown["kafka-key-file"]), "-out", str(shown["kafka-cert-file"])),
    ]
    subprocess.run(command, check=True, capture_output=True)
    mutual = replace(access, clients=shown["kafka-cert-file"])
    with LocalApacheKafka(access=mutual) as kafka:
        kafka.create_topics({"images": 1})
        scram, authority = "SCRAM-SHA-512", access.certificate
        locked = {**shown, "kafka-key-password": KEY_PASSWORD}
        done = publish(kafka, mutual, scram, PASSWORD, authority, more=locked)
        assert done.returncode == 0, done.stderr
        refused = publish(kafka, mutual, scram, PASSWORD, authority)
        assert refused.returncode == 2
        assert PASSWORD.encode() not in refused.stdout + refused.stderr
