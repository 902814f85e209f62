"""What texts of settings look like: brokers, topics, namespaces.

Each function returns its argument, or raises ValueError with what is wrong; `worker.config` says
which setting it was.
"""

import re

from worker.messages import NAMESPACE

TOPIC = re.compile(r"[A-Za-z0-9._-]{1,249}")
"""What Kafka takes, but for . and .. alone."""
BROKER = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^\s:,\[\]]+)(:(?P<port>[0-9]{1,5}))?")
"""A name or an address, IPv6 in brackets, and a port, 9092 where there is none."""


def shown(text: str) -> str:
    """A setting's text as an error may repeat it: not a url, or a part of one, nor a key in PEM."""
    secret = any(mark in text for mark in ("@", "//", "-----"))
    return "(not shown, it may hold a secret)" if secret else repr(text)


def brokers(text: str) -> str:
    """Brokers as host:port,…"""
    if "@" in text:  # where a password ends that may hold anything, commas too
        raise ValueError("not host:port: an @; user and password are settings of their own")
    for part in text.split(","):
        found = BROKER.fullmatch(part.strip())
        if found is None or not 0 < int(found["port"] or 9092) < 65_536:
            raise ValueError(f"not host:port: {shown(part.strip())}")
    return text


def topic(name: str) -> str:
    """The name of a topic."""
    if not TOPIC.fullmatch(name) or name in (".", ".."):
        raise ValueError(
            f"not 1 to 249 letters, digits, dots, dashes or underscores: {shown(name)}"
        )
    return name


def namespaces(names: tuple[str, ...]) -> tuple[str, ...]:
    """Namespaces as events may name them."""
    for name in names:
        if not NAMESPACE.fullmatch(name):
            raise ValueError(f"no event can name it: {shown(name)}")
    return names
