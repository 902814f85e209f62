"""Real Valkey servers for the contract of the index: one alone, and a cluster of three."""

import uuid
from collections.abc import Iterator

import pytest

from deploy.local import LocalRedis
from tests.contract.harness import Bench
from worker.index.store import Client


@pytest.fixture(scope="session")
def single() -> Iterator[LocalRedis]:
    """One Valkey."""
    with LocalRedis() as server:
        yield server


@pytest.fixture(scope="session")
def trio() -> Iterator[LocalRedis]:
    """A cluster of three primaries."""
    with LocalRedis(cluster=3) as server:
        yield server


@pytest.fixture(params=["single", "trio"])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """An empty namespace on each kind of server, and hands to work on it with."""
    server: LocalRedis = request.getfixturevalue(request.param)

    def connect() -> Client:
        return server.cluster_client() if server.clustered else server.client()

    yield Bench(connect, f"test {{{uuid.uuid4().hex}}} ü")
