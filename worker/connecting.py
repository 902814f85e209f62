"""Building kafka-python's clients, at once or not at all.

Owns what there is of one that could not be built, and why it could not be. Knows no settings, no
records.
"""

import ssl
from collections.abc import Callable
from typing import Any, TypeVar

from kafka.errors import (
    IllegalSaslStateError,
    KafkaError,
    KafkaTimeoutError,
    RequestTimedOutError,
    RetriableError,
    SaslAuthenticationFailedError,
    UnsupportedSaslMechanismError,
)
from kafka.net.compat import KafkaNetClient
from kafka.net.manager import KafkaConnectionManager
from kafka.net.selector import NetworkSelector

from worker.errors import ConfigError, InfrastructureError
from worker.receiving import receive_in_large_pieces

Result = TypeVar("Result")
BOOTSTRAP_MS = 5_000  # one try to find a broker; the worker tries again until told to stop


class Refused(ConfigError):
    """Kafka does not let us in, or is not whom we are to trust."""


def connect(kind: Callable[..., Result], **options: Any) -> Result:
    """Build a client of that kind, of which this process reads the sockets in large pieces.

    Raises InfrastructureError where no broker answers, Refused where one lets nobody in that has
    our settings, and ConfigError where it is of no use to us.
    """
    receive_in_large_pieces()
    begun: list[_Client] = []

    def begin(**told: Any) -> _Client:
        begun.append(_Client(**told))
        return begun[-1]

    try:
        return kind(**options, kafka_client=begin)
    except KafkaError as error:
        trouble = next((client.trouble for client in begun), None)
        for client in begun:  # or its thread and descriptors would stay, for each try
            client.close()
        told = f"Kafka: {error}" if trouble is None else f"Kafka: {error}: {trouble}"
        if _refuses(trouble):
            raise Refused(told) from error
        if isinstance(error, RetriableError):
            raise InfrastructureError(told) from error
        raise ConfigError(told) from error


def reconnect(kind: Callable[..., Result], **options: Any) -> Result:
    """The same for who was let in before: that it is refused now may end, as brokers restart."""
    try:
        return connect(kind, **options)
    except Refused as error:
        raise InfrastructureError(str(error)) from error


class _Client(KafkaNetClient):  # type: ignore[misc]
    """Knows why it has no connection, where kafka-python only says that it found no broker."""

    def __init__(self, **told: Any) -> None:
        net = NetworkSelector(**told)
        super().__init__(net, _Connections(net, **told))

    @property
    def trouble(self) -> Exception | None:
        """What ended the last connection, or one that was refused; silence is no trouble."""
        trouble: Exception | None = self._manager.trouble
        return trouble


class _Connections(KafkaConnectionManager):  # type: ignore[misc]
    trouble: Exception | None = None

    async def _connect(self, node: Any, conn: Any, *arguments: Any, **options: Any) -> None:
        conn.close_future.add_errback(self._note)
        await super()._connect(node, conn, *arguments, **options)

    def _note(self, trouble: Exception) -> None:
        silence = isinstance(trouble, KafkaTimeoutError | RequestTimedOutError)
        if not silence and not _refuses(self.trouble):
            self.trouble = trouble


def _refuses(trouble: Exception | None) -> bool:
    """Whether the trouble is with who we say we are, or with who a broker says it is.

    Brokers that have just started may say so of whom they do not know yet. But this is asked once
    a whole try is over, and whoever starts a worker may start it again.
    """
    if isinstance(
        trouble,
        SaslAuthenticationFailedError | UnsupportedSaslMechanismError | IllegalSaslStateError,
    ):
        return True
    # kafka-python hands on what TLS says as text, or wrapped. Its subclasses are about connections
    # that end, but for one.
    said = () if trouble is None else (trouble, trouble.__context__, *trouble.args)
    return any(type(each) in (ssl.SSLError, ssl.SSLCertVerificationError) for each in said)
