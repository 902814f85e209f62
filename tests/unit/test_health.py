"""The three paths, and log lines a machine can read."""

import json
import logging
import socket

import httpx
import pytest

from tests.conftest import missing
from worker import logs
from worker.health import HealthServer
from worker.metrics import Metrics


def test_paths_answer_what_their_checks_say() -> None:
    metrics = Metrics()
    metrics.inflight_events.set(3)
    ready = {"redis": True, "kafka": False}
    server = HealthServer(
        "127.0.0.1",
        0,
        metrics.registry,
        live={"loop": lambda: True},
        ready={"redis": lambda: ready["redis"], "kafka": lambda: ready["kafka"]},
    )
    address = f"http://127.0.0.1:{server.port}"
    with server, httpx.Client(base_url=address, trust_env=False) as client:
        assert client.get("/livez").status_code == 200
        refused = client.get("/readyz")
        assert (refused.status_code, refused.json()) == (503, ready)
        ready["kafka"] = True
        assert client.get("/readyz?verbose").status_code == 200
        assert "dedup_inflight_events 3.0" in client.get("/metrics").text
        assert client.get("/").status_code == 404


def test_only_the_address_that_is_set_is_listened_on() -> None:
    server = HealthServer("127.0.0.2", 0, Metrics().registry, {}, {})
    with server:
        url = f"http://127.0.0.2:{server.port}/livez"
        assert httpx.get(url, trust_env=False).status_code == 200
        with pytest.raises(httpx.ConnectError):
            httpx.get(url.replace("127.0.0.2", "127.0.0.1"), trust_env=False)


@pytest.mark.parametrize("host", ["::1", "[::1]", "::"])
def test_it_listens_at_ipv6(host: str) -> None:
    if not _has_ipv6():
        missing("ipv6", "this machine has no ::1")
    with HealthServer(host, 0, Metrics().registry, {}, {}) as server:
        url = f"http://[::1]:{server.port}/livez"
        assert httpx.get(url, trust_env=False).status_code == 200
        assert host == "::" or not _answers("127.0.0.1", server.port), "it listens elsewhere, too"


def test_a_name_of_both_kinds_is_listened_at_by_ipv4(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `localhost` may be: what asks 127.0.0.1 goes on finding it."""
    four = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))
    six = (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", 0, 0, 0))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [six, four])
    with HealthServer("both.test", 0, Metrics().registry, {}, {}) as server:
        monkeypatch.undo()
        assert _answers("127.0.0.1", server.port)


def _answers(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=10).close()
    except OSError:
        return False
    return True


def _has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def test_a_port_in_use_is_an_error_at_once() -> None:
    metrics = Metrics()
    server = HealthServer("127.0.0.1", 0, metrics.registry, {}, {})
    with server, pytest.raises(OSError, match="in use"):
        HealthServer("127.0.0.1", server.port, metrics.registry, {}, {})


def test_a_json_line_carries_extras_and_exceptions() -> None:
    record = logging.makeLogRecord(
        {"name": "worker.x", "levelname": "INFO", "msg": "did %s", "args": ("it",), "offset": 7}
    )
    line = json.loads(logs.JsonFormatter().format(record))
    assert (line["message"], line["level"], line["offset"]) == ("did it", "info", 7)
    try:
        raise ValueError("odd\nthing")
    except ValueError as error:
        record.exc_info = (ValueError, error, error.__traceback__)
    text = logs.JsonFormatter().format(record)
    assert "\n" not in text
    assert "ValueError: odd" in json.loads(text)["exception"]
