"""The connection to Redis: address, TLS, ACL user, time-outs. Knows nothing of what is stored."""

from typing import Any

from redis import Redis
from redis.backoff import NoBackoff
from redis.cluster import RedisCluster
from redis.exceptions import RedisClusterException, RedisError
from redis.retry import Retry

from worker.connections import RedisSettings
from worker.errors import ConfigError, InfrastructureError


def connect(settings: RedisSettings) -> "Redis | RedisCluster":
    """A client that answers bytes. Connects lazily, but for a cluster, whose nodes it asks for.

    Raises ConfigError for an address that cannot be read, and InfrastructureError when no node of
    a cluster answers.
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
    except (RedisError, RedisClusterException) as error:
        raise InfrastructureError(f"Redis: {error}") from error
