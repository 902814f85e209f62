"""The connection to Redis: address, TLS, ACL user, time-outs. Knows nothing of what is stored."""

import ssl
from collections.abc import Iterator
from typing import Any

from redis import Redis
from redis.backoff import NoBackoff
from redis.cluster import RedisCluster
from redis.exceptions import AuthenticationError, RedisClusterException, RedisError
from redis.retry import Retry

from worker.connections import RedisSettings
from worker.errors import ConfigError, InfrastructureError


def connect(settings: RedisSettings) -> "Redis | RedisCluster":
    """A client that answers bytes, and has been answered once.

    Raises ConfigError for an address that cannot be read, and where Redis does not let us in or is
    not whom we are to trust; InfrastructureError where it does not answer.
    """
    try:
        client = build(settings)
        if isinstance(client, Redis):  # a cluster's nodes have answered
            client.ping()
    except (RedisError, RedisClusterException, OSError) as error:
        raise _told(error) from error
    return client


def build(settings: RedisSettings) -> "Redis | RedisCluster":
    """The client, which connects lazily, but for a cluster, whose nodes it asks for.

    Raises ConfigError for an address that cannot be read, and what redis-py raises for a cluster
    of which no node answers.
    """
    options: dict[str, Any] = {
        "socket_timeout": settings.redis_timeout_seconds,
        "socket_connect_timeout": settings.redis_timeout_seconds,
        "health_check_interval": 15,
        # Trouble must be seen at once, in readiness and metrics: the worker retries, visibly,
        # where redis-py would hide ten tries behind one call.
        "retry": Retry(NoBackoff(), 1),
    }
    if not settings.redis_url.startswith("unix://"):
        options["socket_keepalive"] = True
    if settings.redis_username is not None:
        options["username"] = settings.redis_username
    if settings.redis_password is not None:
        options["password"] = settings.redis_password.get_secret_value()
    if settings.redis_ca_file is not None:
        options["ssl_ca_certs"] = str(settings.redis_ca_file)
    if settings.redis_cert_file is not None:
        options["ssl_certfile"] = str(settings.redis_cert_file)
    if settings.redis_key_file is not None:
        options["ssl_keyfile"] = str(settings.redis_key_file)
    if settings.redis_key_password is not None:
        options["ssl_password"] = settings.redis_key_password.get_secret_value()
    try:
        if settings.redis_cluster:
            return RedisCluster.from_url(settings.redis_url, **options)
        return Redis.from_url(settings.redis_url, **options)
    except ValueError as error:
        raise ConfigError(f"redis_url: {error}") from None


def _told(error: Exception) -> ConfigError | InfrastructureError:
    for each in _behind(error):
        if isinstance(each, AuthenticationError):
            return ConfigError(f"Redis: DEDUP_REDIS_USERNAME, DEDUP_REDIS_PASSWORD: {each}")
        if isinstance(each, ssl.SSLCertVerificationError):
            return ConfigError(f"Redis: {each}")
    return InfrastructureError(f"Redis: {error or type(error).__name__}")


def _behind(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those it was raised from: redis-py hands some on as text in another."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
