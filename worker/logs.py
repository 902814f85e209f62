"""Structured logs: one JSON object (or one plain line) a record, to standard error."""

import json
import logging
import sys
import time
from typing import Literal

REMIND_SECONDS = 60.0  # between two lines about one trouble that lasts
PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """`extra` fields become keys beside time, level, logger and message."""

    def format(self, record: logging.LogRecord) -> str:
        """One line of JSON."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, object] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in vars(record).items() if name not in PLAIN}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


class Sparing:
    """Decides when to say what lasts: at first, where it is another trouble, and now and then."""

    def __init__(self) -> None:
        self._said: dict[str, tuple[str, float]] = {}

    def due(self, name: str, trouble: str) -> bool:
        """Whether to say that `name` has this trouble; it is taken for said then."""
        now = time.monotonic()
        said = self._said.get(name)
        if said is not None and said[0] == trouble and now < said[1] + REMIND_SECONDS:
            return False
        self._said[name] = trouble, now
        return True

    def over(self, name: str) -> bool:
        """Whether `name` has had trouble that was said, which is over now."""
        return self._said.pop(name, None) is not None


class TextFormatter(logging.Formatter):
    """For people at a terminal: time, level, message, then `extra` fields as name=value."""

    def format(self, record: logging.LogRecord) -> str:
        """One line of text (more with a traceback)."""
        extra = "".join(
            f" {name}={value}" for name, value in vars(record).items() if name not in PLAIN
        )
        return super().format(record) + extra


def configure(level: str, shape: Literal["json", "text"]) -> None:
    """Send the project's logs at `level` and others' warnings to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonFormatter()
        if shape == "json"
        else TextFormatter("%(asctime)s %(levelname)-7s %(message)s")
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("worker").setLevel(level.upper())
    # kafka-python reports every lost connection as an error of its own; the loop says it once.
    logging.getLogger("kafka").setLevel(logging.CRITICAL if level != "debug" else logging.WARNING)
