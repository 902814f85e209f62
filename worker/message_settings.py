"""The worker's settings, as reading messages takes them."""

from worker.config import Settings
from worker.messages import MessageLimits


def message_limits(settings: Settings) -> MessageLimits:
    """The limits a worker's settings make."""
    return MessageLimits(
        settings.max_id_bytes, settings.max_attributes_bytes, settings.max_json_bytes
    )
