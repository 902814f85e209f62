"""The tree of errors, and the two words of failure.

`EventError` is the event's own fault: it becomes a dead letter and the stream goes on.
`InfrastructureError` is the fault of Redis or Kafka: the worker pauses, retries and tells.
This module owns nothing else and imports nothing of the project.
"""

from enum import StrEnum


class DedupError(Exception):
    """The root of every error the project raises on purpose."""


class ConfigError(DedupError):
    """A setting is wrong; the message is one line for the person who set it."""


class ModelMismatch(ConfigError):
    """The index was filled by another model or preprocessing than the one loaded."""


class InfrastructureError(DedupError):
    """Redis or Kafka is away, full or slow; the same call may succeed later."""


class Reason(StrEnum):
    """Why an event became a dead letter: the value of its `dedup-reason` header."""

    BAD_MESSAGE = "bad_message"
    UNSUPPORTED_SCHEMA = "unsupported_schema"
    ID_CONFLICT = "id_conflict"
    SOURCE_GONE = "source_gone"
    SOURCE_DENIED = "source_denied"
    SOURCE_UNAVAILABLE = "source_unavailable"
    BLOCKED_SOURCE = "blocked_source"
    TOO_LARGE = "too_large"
    UNDECODABLE = "undecodable"
    UNSUPPORTED_FORMAT = "unsupported_format"


class EventError(DedupError):
    """The event itself cannot be decided, now or ever."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type["EventError"], tuple[Reason, str]]:
        # Exceptions pickle by their args; decoding happens in child processes.
        return (EventError, (self.reason, self.detail))
