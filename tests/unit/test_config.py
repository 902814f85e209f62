"""Settings: read from flags and environment, validated, explained."""

import argparse
import re

import pytest
from kafka.cluster import get_ip_port_afi

from worker.config import Settings
from worker.errors import ConfigError
from worker.flags import add_flags, from_flags
from worker.source_settings import source_policy

HERE = __file__  # a file that is there
SASL = ("--sasl-mechanism", "PLAIN", "--sasl-username", "x", "--sasl-password", "x")


def read(*flags: str) -> Settings:
    parser = argparse.ArgumentParser()
    add_flags(parser, Settings)
    return from_flags(Settings, parser.parse_args(flags))


def test_defaults_hold() -> None:
    settings = read()
    assert (settings.topic, settings.delivery) == ("images", "at-least-once")
    assert settings.fetch_schemes == settings.fetch_hosts == settings.fetch_roots == ()


def test_the_environment_is_read_and_flags_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEDUP_TOPIC", "from-environment")
    monkeypatch.setenv("DEDUP_FETCH_HOSTS", "a.example, *.b.example")
    monkeypatch.setenv("DEDUP_FETCH_ROOTS", "/srv/a@b,/srv/c")
    assert read().topic == "from-environment"
    assert read().fetch_roots == ("/srv/a@b", "/srv/c")
    assert read().fetch_hosts == ("a.example", "*.b.example")
    assert (read().namespaces, read("--namespaces", "a, b").namespaces) == ((), ("a", "b"))
    assert read("--topic", "from-flag").topic == "from-flag"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--matches", "0"), "DEDUP_MATCHES"),
        (("--http-port", "x"), "DEDUP_HTTP_PORT"),
        (("--threshold", "1.5"), "DEDUP_THRESHOLD"),
        (("--delivery", "perhaps"), "DEDUP_DELIVERY"),
        (("--fetch-schemes", "ftp"), "ftp"),
        (("--redis-url", "http://x"), "redis://"),
        (("--redis-url", "redis://localhost:6379/9x"), "the number of a database"),
        (("--topic", "same", "--verdict-topic", "same"), "must differ"),
        (("--security-protocol", "SASL_SSL"), "sasl_password"),
        (("--kafka-ca-file", "/no/such.pem"), "no such file"),
        (("--kafka-ca-file", HERE), "kafka_ca_file needs a security_protocol with SSL"),
        (("--kafka-cert-file", HERE), "kafka_cert_file needs a security_protocol with SSL"),
        (("--kafka-key-password", "x"), "kafka_key_password needs a security_protocol with SSL"),
        ((*SASL, "--security-protocol", "SASL_PLAINTEXT", "--kafka-ca-file", HERE), "not SASL_PLA"),
        (("--security-protocol", "SSL", "--kafka-key-file", HERE), "needs kafka_cert_file"),
        (SASL, "sasl_mechanism needs a security_protocol with SASL, not PLAINTEXT"),
        (("--sasl-password", "x"), "sasl_password needs a security_protocol"),
        (("--security-protocol", "SSL", "--sasl-username", "x"), "with SASL, not SSL"),
        (("--topic", "bad topic!"), "DEDUP_TOPIC"),
        (("--verdict-topic", ".."), "DEDUP_VERDICT_TOPIC"),
        (("--dead-letter-topic", "x" * 250), "DEDUP_DEAD_LETTER_TOPIC"),
        (("--bootstrap-servers", ""), "DEDUP_BOOTSTRAP_SERVERS"),
        (("--bootstrap-servers", "localhost:abc"), "'localhost:abc'"),
        (("--bootstrap-servers", "a:1, b:0"), "'b:0'"),
        (("--bootstrap-servers", "http://a:1"), "DEDUP_BOOTSTRAP_SERVERS"),
        (("--namespaces", "shop,a b"), "'a b'"),
    ],
)
def test_a_wrong_setting_is_one_line(flags: tuple[str, ...], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(*flags)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "brokers", ["a", "a:9092", "a.b-c_d:1, 10.0.0.1:65535", "[::1]:9092,[fe80::1]"]
)
def test_brokers_that_kafka_python_understands(brokers: str) -> None:
    servers = read("--bootstrap-servers", brokers).client_options()["bootstrap_servers"]
    assert servers == [each.strip() for each in brokers.split(",")]
    for server in servers:
        assert get_ip_port_afi(server)[0]


def test_help_explains_every_setting_its_variable_and_default() -> None:
    parser = argparse.ArgumentParser(
        formatter_class=lambda prog: argparse.HelpFormatter(prog, width=500)
    )
    add_flags(parser, Settings)
    text = parser.format_help()
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in text
        assert field.description and field.description in text
        assert f"DEDUP_{name.upper()}" in text


def test_every_number_is_bounded() -> None:
    for name, field in Settings.model_fields.items():
        numeric = field.annotation in (int, float, float | None)
        assert not numeric or field.metadata, name


def test_secrets_are_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "hunter2-very-secret"
    for name in ("SASL_PASSWORD", "REDIS_PASSWORD", "KAFKA_KEY_PASSWORD"):
        monkeypatch.setenv(f"DEDUP_{name}", secret)
    monkeypatch.setenv("DEDUP_SECURITY_PROTOCOL", "SASL_SSL")
    monkeypatch.setenv("DEDUP_SASL_MECHANISM", "PLAIN")
    monkeypatch.setenv("DEDUP_SASL_USERNAME", "user")
    monkeypatch.setenv("DEDUP_KAFKA_CERT_FILE", HERE)
    monkeypatch.setenv("DEDUP_REDIS_URL", f"redis://user:{secret}@localhost:6379/0")
    settings = read()
    assert secret not in repr(settings)
    assert secret not in str(settings)
    parser = argparse.ArgumentParser()
    add_flags(parser, Settings)
    assert secret not in parser.format_help()
    with pytest.raises(ConfigError) as caught:
        read("--redis-url", f"wrong://user:{secret}@localhost")
    assert not re.search(secret, str(caught.value))


PEM = f"-----BEGIN PRIVATE KEY-----\n{'/hunter2' * 200}\n-----END PRIVATE KEY-----"


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("bootstrap-servers", "SASL_SSL://user:hunter2@h:9092"),
        ("bootstrap-servers", "SASL_SSL://user:hunter2,with,commas@h:9092"),
        ("bootstrap-servers", "hunter2@h:9092"),
        ("bootstrap-servers", "user:hunter2,with,commas@h:9092"),
        ("redis-url", "redis://user:hunter2/@h"),
        ("fetch-s3-endpoint", "https://user:hunter2@h"),
        ("fetch-hosts", "https://user:hunter2@h"),
        ("fetch-hosts", "https://user:hunter2,with,commas@h"),
        ("fetch-hosts", "user:hunter2,with,commas@h"),
        ("fetch-hosts", "https://h/?signature=hunter2"),
        ("fetch-networks", "user:hunter2@10.0.0.0/8"),
        ("fetch-schemes", "https://user:hunter2@h"),
        ("fetch-buckets", "s3://user:hunter2@bucket"),
        ("namespaces", "user:hunter2@h"),
        ("topic", "kafka://user:hunter2@h/topic"),
        ("kafka-key-file", PEM),
        ("kafka-ca-file", PEM.replace("/", "+")),
        ("redis-key-file", PEM),
    ],
)
def test_no_error_shows_a_password_that_is_in_the_wrong_place(setting: str, value: str) -> None:
    redis = () if setting == "redis-url" else ("--redis-url", "rediss://h")
    with pytest.raises(ConfigError) as caught:
        source_policy(read(f"--{setting}", value, *redis))
    assert setting.replace("-", "_") in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)
