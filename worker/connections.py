"""How Kafka and Redis are reached: settings that all commands share.

Owns addresses, TLS and credentials, and what of them can be told wrong before anything connects.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import parse_qs, urlsplit

from pydantic import AfterValidator, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from worker import wellformed

KIB, MIB, GIB = 1024, 1024**2, 1024**3
ENV_PREFIX = "DEDUP_"
Brokers = Annotated[str, AfterValidator(wellformed.brokers)]
Topic = Annotated[str, AfterValidator(wellformed.topic)]


class KafkaSettings(BaseSettings):
    """What every Kafka client of the project shares: the worker, the producer, the tests."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="ignore", frozen=True)

    bootstrap_servers: Brokers = Field("localhost:9092", description="Kafka brokers, host:port,…")
    topic: Topic = Field("images", description="topic of new-image events")
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT", description="how to talk to the brokers"
    )
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] | None = Field(
        None, description="SASL mechanism; needed with SASL_PLAINTEXT and SASL_SSL"
    )
    sasl_username: str | None = Field(None, description="SASL user")
    sasl_password: SecretStr | None = Field(None, description="SASL password")
    kafka_ca_file: Path | None = Field(None, description="PEM file of the brokers' authority")
    kafka_cert_file: Path | None = Field(None, description="PEM client certificate, for mTLS")
    kafka_key_file: Path | None = Field(None, description="PEM key of that certificate")
    kafka_key_password: SecretStr | None = Field(None, description="password of that key")
    max_message_bytes: int = Field(
        32 * MIB,
        ge=KIB,
        le=GIB,
        description="largest Kafka message sent or taken, in bytes, uncompressed;"
        " a larger event is a dead letter",
    )

    @model_validator(mode="after")
    def _sasl_is_complete(self) -> "KafkaSettings":
        if self.security_protocol.startswith("SASL"):
            missing = [
                name
                for name in ("sasl_mechanism", "sasl_username", "sasl_password")
                if getattr(self, name) is None
            ]
            if missing:
                raise ValueError(f"{self.security_protocol} needs {', '.join(missing)}")
        return self

    @model_validator(mode="after")
    def _files_exist(self) -> "KafkaSettings":
        for name, value in self:
            if isinstance(value, Path) and name.endswith("_file") and not _is_file(value):
                raise ValueError(f"{name}: no such file: {wellformed.shown(str(value))}")
        return self

    @model_validator(mode="after")
    def _nothing_is_set_in_vain(self) -> "KafkaSettings":
        protocol = self.security_protocol
        for name, value in self:
            if value is None:
                continue
            if name.startswith("sasl_") and not protocol.startswith("SASL"):
                raise ValueError(f"{name} needs a security_protocol with SASL, not {protocol}")
            if name.startswith("kafka_") and "SSL" not in protocol:
                raise ValueError(f"{name} needs a security_protocol with SSL, not {protocol}")
            if name.startswith("kafka_key_") and self.kafka_cert_file is None:
                raise ValueError(f"{name} needs kafka_cert_file")
        return self

    def client_options(self) -> dict[str, Any]:
        """The keyword arguments every kafka-python client takes: addresses, TLS, SASL."""
        options: dict[str, Any] = {
            "bootstrap_servers": [each.strip() for each in self.bootstrap_servers.split(",")],
            "security_protocol": self.security_protocol,
        }
        if "SSL" in self.security_protocol:
            options |= {
                "ssl_cafile": str(self.kafka_ca_file) if self.kafka_ca_file else None,
                "ssl_certfile": str(self.kafka_cert_file) if self.kafka_cert_file else None,
                "ssl_keyfile": str(self.kafka_key_file) if self.kafka_key_file else None,
                "ssl_password": _plain(self.kafka_key_password),
            }
        if self.security_protocol.startswith("SASL"):
            options |= {
                "sasl_mechanism": self.sasl_mechanism,
                "sasl_plain_username": self.sasl_username,
                "sasl_plain_password": _plain(self.sasl_password),
            }
        return options


class RedisSettings(BaseSettings):
    """How to reach Redis; shared by the worker and its maintenance commands."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="ignore", frozen=True)

    redis_url: str = Field(
        "redis://localhost:6379/0",
        description="redis://, rediss:// (TLS) or unix:// address of Redis or Valkey",
        repr=False,  # it may hold a password
    )
    redis_cluster: bool = Field(False, description="the address is a node of a Redis Cluster")
    redis_username: str | None = Field(None, description="ACL user")
    redis_password: SecretStr | None = Field(None, description="ACL password")
    redis_ca_file: Path | None = Field(None, description="PEM file of Redis' authority")
    redis_cert_file: Path | None = Field(None, description="PEM client certificate, for mTLS")
    redis_key_file: Path | None = Field(None, description="PEM key of that certificate")
    redis_key_password: SecretStr | None = Field(None, description="password of that key")
    redis_timeout_seconds: float = Field(
        5.0, gt=0, le=300, description="longest wait for one answer of Redis"
    )

    @field_validator("redis_url")
    @classmethod
    def _can_be_read(cls, value: str) -> str:
        if not value.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("must start with redis://, rediss:// or unix://")
        if not _ends_where_it_seems(value):
            raise ValueError("cannot be read; percent-encode what is special in the password")
        database = urlsplit(value).path.strip("/")
        if not value.startswith("unix://") and not (database.isdecimal() or not database):
            # redis-py would take the first database instead, without a word.
            raise ValueError("what follows the last / must be the number of a database")
        return value

    @model_validator(mode="after")
    def _certificates_are_asked(self) -> "RedisSettings":
        for name in ("redis_ca_file", "redis_cert_file", "redis_key_file"):
            file = getattr(self, name)
            if file is not None and not self.redis_url.startswith("rediss://"):
                raise ValueError(f"{name} needs a rediss:// address")
            if file is not None and not _is_file(file):
                raise ValueError(f"{name}: no such file: {wellformed.shown(str(file))}")
        return self

    @model_validator(mode="after")
    def _a_cluster_can_be_reached(self) -> "RedisSettings":
        # redis-py raises for these what it raises where no node answers, and that is waited for.
        if self.redis_cluster:
            url = urlsplit(self.redis_url)
            if url.scheme == "unix":
                raise ValueError("redis_cluster needs a redis_url with redis:// or rediss://")
            if parse_qs(url.query).get("db", [url.path.strip("/")])[0] not in ("", "0"):
                raise ValueError("redis_cluster needs a redis_url of database 0: it has no other")
        return self


def _is_file(file: Path) -> bool:
    """False, too, where it is no path at all, as a key in PEM: Path.is_file would raise."""
    return os.path.isfile(file)  # noqa: PTH113


def _ends_where_it_seems(url: str) -> bool:
    """Whether no part of a password is taken for the host, port, path or query of an address.

    An unencoded / ? or # ends the host too early; the @ is left behind it.
    """
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:  # a port that is none, a bracket left open
        return False
    if parts.scheme == "unix":  # the path of a socket may well hold an @
        return parts.netloc[-1:] in ("", "@")
    return "@" not in parts.path + parts.query + parts.fragment


def _plain(secret: SecretStr | None) -> str | None:
    return secret.get_secret_value() if secret is not None else None
