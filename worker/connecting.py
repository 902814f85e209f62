"""Building kafka-python's clients, at once or not at all.

Owns what there is of one that could not be built. Knows no settings, no records.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from kafka.errors import KafkaError, RetriableError
from kafka.net.compat import KafkaNetClient

from worker.errors import ConfigError, InfrastructureError
from worker.receiving import receive_in_large_pieces

Result = TypeVar("Result")
BOOTSTRAP_MS = 5_000  # one try to find a broker; the worker tries again until told to stop


def connect(kind: Callable[..., Result], **options: Any) -> Result:
    """Build a client of that kind, of which this process reads the sockets in large pieces.

    Raises InfrastructureError where no broker answers and ConfigError where it refuses us.
    """
    receive_in_large_pieces()
    begun: list[KafkaNetClient] = []

    def begin(**told: Any) -> KafkaNetClient:
        begun.append(KafkaNetClient(**told))
        return begun[-1]

    try:
        return kind(**options, kafka_client=begin)
    except KafkaError as error:
        for client in begun:  # or its thread and descriptors would stay, for each try
            client.close()
        if isinstance(error, RetriableError):
            raise InfrastructureError(f"Kafka: {error}") from error
        raise ConfigError(f"Kafka: {error}") from error
