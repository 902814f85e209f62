"""TLS and SASL to a real broker: let in with the right password, and nothing told without."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from kafka import KafkaConsumer

from deploy.apache_kafka import Access, LocalApacheKafka
from tests.conftest import require_apache_kafka
from worker.connections import KafkaSettings
from worker.flags import load

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
    settings = load(
        KafkaSettings,
        {
            "bootstrap_servers": secure_kafka.secure_bootstrap,
            "security_protocol": "SASL_SSL",
            "sasl_mechanism": mechanism,
            "sasl_username": USERNAME,
            "sasl_password": PASSWORD,
            "kafka_ca_file": access.certificate,
        },
    )
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
    assert PASSWORD.encode() not in done.stdout + done.stderr


def test_a_server_of_another_name_is_not_trusted(
    secure_kafka: LocalApacheKafka, access: Access
) -> None:
    elsewhere = secure_kafka.secure_bootstrap.replace("127.0.0.1", "localhost")
    assert elsewhere != secure_kafka.secure_bootstrap
    more = {"bootstrap-servers": elsewhere}
    done = publish(secure_kafka, access, "PLAIN", PASSWORD, access.certificate, more=more)
    assert done.returncode == 2
    assert PASSWORD.encode() not in done.stdout + done.stderr


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
