"""Workers for fault tests are those of the stream tests."""

from tests.stream.conftest import start_worker

__all__ = ["start_worker"]
