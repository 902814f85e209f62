"""Files of a training that cannot be read or written, are another's, or were there before."""

import gzip
import os
import stat
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.unit.embedder_photos import tiles, write_tar
from worker.arguments import writing
from worker.embedder import DEFAULT_PATH
from worker.errors import ConfigError
from worker.images import ImageLimits
from worker.training import photos, train
from worker.training.photos import Photo, read_photos
from worker.training.run import Recipe, Run
from worker.training.views import Views
from worker.weightfile import Weights, read, save

TINY = Recipe(steps=1, batch=2, size=32, early_size=32, lanes=4, alike=1)
FULL = Path("/dev/full")


@pytest.fixture(scope="module")
def weights() -> Weights:
    return read(DEFAULT_PATH)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing whole files takes some bytes of them, then fails as on a full disk."""
    write = Path.write_bytes

    def fail(path: Path, data: bytes) -> int:
        write(path, data[:100])
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", fail)


def _forbidden(*_: Any) -> Any:
    raise PermissionError(13, "Permission denied", "secret")


def test_others_may_read_weights_if_the_umask_lets_them(tmp_path: Path, weights: Weights) -> None:
    path, before = tmp_path / "w.safetensors", os.umask(0o022)
    try:
        save(path, weights)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert read(path).model_id() == weights.model_id()
    assert list(tmp_path.iterdir()) == [path]


def test_weights_that_may_not_be_read_are_not_called_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Path, "open", _forbidden)
    with pytest.raises(ConfigError, match="cannot be read: Permission denied"):
        read(DEFAULT_PATH)


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_leaves_the_older_file_and_nothing_else(
    tmp_path: Path, weights: Weights
) -> None:
    path = tmp_path / "w"
    path.touch()
    for write in (partial(save, path, weights), partial(Run(TINY, "cpu").save, path)):
        with pytest.raises(ConfigError, match="w cannot be written: No space left"):
            write()
        assert list(tmp_path.iterdir()) == [path]
        assert path.stat().st_size == 0


def test_a_file_that_cannot_be_written_is_named() -> None:
    with (
        pytest.raises(ConfigError, match=r"/dev/full cannot be written: .*No space left"),
        writing(FULL),
    ):
        FULL.write_text("{}")


def test_a_curve_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "w.curve.jsonl").symlink_to(FULL)
    train._append(tmp_path / "w.curve.jsonl", "", "w")
    with pytest.raises(ConfigError, match=r"w.curve.jsonl cannot be written: .*No space left"):
        train._append(tmp_path / "w.curve.jsonl", "{}\n")


def test_an_archive_cut_short_is_told(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "whole.tar", list(tiles()[:3]))
    cut = tmp_path / "cut.tar"
    cut.write_bytes(archive.read_bytes()[:6000])
    with pytest.raises(ConfigError, match=r"cut.tar cannot be read: unexpected end of data"):
        read_photos([cut])
    cut.write_bytes(gzip.compress(archive.read_bytes())[:6000])
    with pytest.raises(ConfigError, match=r"cut.tar cannot be read"):
        read_photos([cut])


@pytest.mark.parametrize("what", ["open", "is_dir"])
def test_a_photo_that_may_not_be_read_is_told(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles()[0].save(tmp_path / "a.png")
    monkeypatch.setattr(Path, what, _forbidden)
    with pytest.raises(ConfigError, match=r"cannot be read: .*Permission denied: 'secret'"):
        read_photos([tmp_path])


def test_no_more_is_read_than_a_picture_may_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(photos, "LIMITS", ImageLimits(max_bytes=1000))
    (tmp_path / "video.mp4").write_bytes(bytes(5000))
    archive = write_tar(tmp_path / "a.tar", [Image.new("RGB", (500, 500))])
    for source in (tmp_path, archive):
        assert max(len(data) for _, data in photos._members(source)) == 1001


def test_a_folder_that_may_not_be_read_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles()[0].save(tmp_path / "a.png")
    (tmp_path / "deep").mkdir()
    scan = os.scandir
    monkeypatch.setattr(
        os, "scandir", lambda path: _forbidden() if str(path).endswith("deep") else scan(path)
    )
    with pytest.raises(ConfigError, match="Permission denied"):
        read_photos([tmp_path])


@pytest.mark.parametrize("held", [[1], {}, {"recipe": 7}, {"recipe": asdict(TINY)}, TINY])
def test_what_is_no_checkpoint_is_refused(held: object, tmp_path: Path) -> None:
    path, run = tmp_path / "w.checkpoint", Run(TINY, "cpu")
    torch.save(held, path)
    with pytest.raises(ConfigError, match=r"w.checkpoint is no checkpoint of this trainer"):
        run.load(path)


@pytest.mark.parametrize("flags", ["--out=w", "--out=w.safetensors"])
def test_a_checkpoint_is_not_overwritten_unasked(
    flags: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("w.checkpoint").touch()
    with pytest.raises(ConfigError, match=r"w.checkpoint .* --resume goes on .* remove it"):
        train.main(["--photos", "none.tar", "--steps", "1", flags])


def test_every_run_has_files_of_its_own() -> None:
    for out, wanted in {
        "a/model-1.0": "a/model-1.0.checkpoint",
        "a/model-1.1": "a/model-1.1.checkpoint",
        "a/model-1.1.safetensors": "a/model-1.1.checkpoint",
        "w": "w.checkpoint",
    }.items():
        assert train.beside(Path(out), ".checkpoint") == Path(wanted)


@pytest.mark.parametrize("batch", [2, 3])
def test_a_batch_smaller_than_the_lanes_trains(batch: int) -> None:
    run = Run(replace(TINY, batch=batch), "cpu")
    photos = [Photo(str(at), tile, bytes([at])) for at, tile in enumerate(tiles()[:4])]
    losses = [loss for loss, _ in train.steps(run, Views(photos, 32, 0, "contrastive"), 0)]
    assert len(losses) == 1
    assert np.isfinite(losses).all()


def test_a_run_that_fails_leaves_the_weights_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "w.safetensors"
    out.write_text("of an earlier run")
    with pytest.raises(ConfigError, match="too few"):
        train.finish(Run(TINY, "cpu"), [Photo("a", tiles()[0], b"a")], out)
    assert out.read_text() == "of an earlier run"
    assert list(tmp_path.iterdir()) == [out]
