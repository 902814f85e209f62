"""Photos in an archive, weights trained on them for a moment, and a web server of tricks.

What takes seconds to import is imported by those who ask for it.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.trick_server import BODY, TrickServer, answer


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.unit.embedder_photos import tiles, write_tar

    return write_tar(tmp_path_factory.mktemp("photos") / "tiles.tar", list(tiles()))


@pytest.fixture(scope="session")
def trained(archive: Path) -> Path:
    from worker.training import train

    out = archive.with_name("trained.safetensors")
    small = "--batch 8 --size 48 --early-size 32 --held-out 0.5 --processes 0"
    command = f"--photos {archive} --out {out} --steps 4 --start default --device cpu {small}"
    assert train.main(command.split()) == 0
    return out


@pytest.fixture
def server() -> Iterator[TrickServer]:
    """One that has a picture at /a.jpg."""
    server = TrickServer()
    server.paths["/a.jpg"] = answer(200, BODY)
    yield server
    server.close()
