"""Links are fetched under guard and in order."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from producer.inline import FETCHES_AT_ONCE, link_fetcher, make_ahead
from producer.sources import Found, Item
from worker.errors import EventError, Reason


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.path.encode())

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_link_gives_its_bytes(server: ThreadingHTTPServer) -> None:
    with link_fetcher(100, networks=("127.0.0.0/8",)) as fetch:
        assert fetch(f"http://127.0.0.1:{server.server_port}/a.jpg") == b"/a.jpg"


def test_what_is_larger_than_a_message_is_refused(server: ThreadingHTTPServer) -> None:
    with link_fetcher(3, networks=("127.0.0.0/8",)) as fetch, pytest.raises(EventError) as caught:
        fetch(f"http://127.0.0.1:{server.server_port}/a.jpg")
    assert caught.value.reason is Reason.TOO_LARGE


def test_a_list_cannot_reach_local_files_or_services(
    server: ThreadingHTTPServer, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    for link in (secret.as_uri(), f"http://127.0.0.1:{server.server_port}/"):
        with link_fetcher(100) as fetch, pytest.raises(EventError) as caught:
            fetch(link)
        assert caught.value.reason is Reason.BLOCKED_SOURCE


def test_items_are_made_ahead_but_not_all_and_come_in_order() -> None:
    taken: list[int] = []

    def items() -> Iterator[Item]:
        for number in range(1_000):
            taken.append(number)
            yield Found(str(number), str(number), None)

    made = make_ahead(lambda item: item.place, items())
    assert [next(made) for _ in range(3)] == ["0", "1", "2"]
    assert len(taken) <= 3 + 2 * FETCHES_AT_ONCE
    made.close()  # type: ignore[attr-defined]
    assert list(make_ahead(lambda item: item.place, iter(list(items())))) == [
        str(number) for number in range(1_000)
    ]
