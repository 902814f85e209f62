"""The address of Redis: every kind that may be set leads to a client, or to one line."""

from pathlib import Path
from urllib.parse import quote

import pytest
from redis import Redis

from deploy.process import free_port
from worker.connections import RedisSettings
from worker.errors import ConfigError, InfrastructureError
from worker.flags import load
from worker.storage import build, connect


@pytest.mark.parametrize("scheme", ["redis", "rediss", "unix"])
def test_a_server_that_is_not_there_is_waited_for(scheme: str, tmp_path: Path) -> None:
    address = f"{tmp_path}/no.sock" if scheme == "unix" else f"127.0.0.1:{free_port()}/0"
    settings = load(RedisSettings, {"redis_url": f"{scheme}://{address}", "redis_password": "x"})
    with pytest.raises(InfrastructureError):
        connect(settings)


@pytest.mark.parametrize("end", ["", "/", "/0", "?db=0", "/3?db=0"])
def test_a_cluster_that_is_not_there_is_waited_for(end: str) -> None:
    url = f"redis://127.0.0.1:{free_port()}{end}"
    with pytest.raises(InfrastructureError, match="cannot be connected"):
        connect(load(RedisSettings, {"redis_url": url, "redis_cluster": True}))


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("redis://h/1", "database 0"),
        ("rediss://h/?db=1", "database 0"),
        ("redis://h/0?db=1", "database 0"),
        ("redis://h?db=x", "database 0"),
        ("unix:///run/redis.sock", "redis:// or rediss://"),
    ],
)
def test_no_cluster_can_be_reached_so(url: str, says: str) -> None:
    with pytest.raises(ConfigError, match=f"^redis_cluster needs a redis_url .*{says}"):
        load(RedisSettings, {"redis_url": url, "redis_cluster": True})


@pytest.mark.parametrize("name", ["redis_ca_file", "redis_cert_file", "redis_key_file"])
def test_a_certificate_needs_tls_and_must_be_there(name: str, tmp_path: Path) -> None:
    file = tmp_path / "some.pem"
    with pytest.raises(ConfigError, match="no such file"):
        load(RedisSettings, {"redis_url": "rediss://localhost/0", name: file})
    file.touch()
    with pytest.raises(ConfigError, match="needs a rediss://"):
        load(RedisSettings, {name: file})


def test_a_password_in_the_address_is_not_shown() -> None:
    settings = load(RedisSettings, {"redis_url": "redis://:hush-1@h/0", "redis_password": "hush-2"})
    assert "hush" not in f"{settings!r} {settings}"
    with pytest.raises(ConfigError) as caught:
        load(RedisSettings, {"redis_url": "http://:hush-3@h"})
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["redis", "rediss", "unix"])
@pytest.mark.parametrize("special", ["/", "?", "#", "[", "]", "/?a=", "?db=", "\\#"])
@pytest.mark.parametrize("password", ["hush{}more-hush", "4711{}hush", "{}hush", "hush{}"])
def test_no_part_of_a_password_that_is_not_encoded_is_shown(
    scheme: str, special: str, password: str
) -> None:
    password = password.format(special)
    for user in ("", "user"):
        url = f"{scheme}://{user}:{password}@127.0.0.1:1/0"
        with pytest.raises(ConfigError) as caught:
            load(RedisSettings, {"redis_url": url})
        assert str(caught.value) == (
            "redis_url (DEDUP_REDIS_URL): cannot be read; percent-encode what is special in the"
            " password"
        )


@pytest.mark.parametrize("special", "/?#[]@:% ")
def test_a_password_that_is_encoded_is_taken_as_it_is_meant(special: str) -> None:
    url = f"redis://user:a{quote(special, safe='')}b@127.0.0.1:6379/3?protocol=2"
    client = build(load(RedisSettings, {"redis_url": url}))
    assert isinstance(client, Redis)
    options = client.connection_pool.connection_kwargs
    assert (options["password"], options["host"], options["db"]) == (f"a{special}b", "127.0.0.1", 3)


def test_a_socket_may_have_an_at_in_its_path() -> None:
    for url in ("unix:///run/redis@6380/x.sock", "unix://user:p%2Fw@/run/redis@6380/x.sock?db=1"):
        client = build(load(RedisSettings, {"redis_url": url}))
        assert isinstance(client, Redis)
        assert client.connection_pool.connection_kwargs["path"] == "/run/redis@6380/x.sock"
