"""The worker's settings, as the index takes them.

Owns that every limit of the index is a setting of the same name. It must not know what they mean.
"""

from dataclasses import fields

from worker.config import Settings
from worker.index.answers import IndexSettings


def index_settings(settings: Settings, threshold: float) -> IndexSettings:
    """The index's part; `threshold` apart, because the weights may have to say it."""
    names = {field.name for field in fields(IndexSettings)} - {"threshold"}
    return IndexSettings(threshold=threshold, **{name: getattr(settings, name) for name in names})
