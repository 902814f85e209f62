"""What an evaluation and a calibration measure, and that they repeat themselves."""

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.unit.embedder_photos import encoded, tiles, write_tar
from worker.embedder import Embedder
from worker.errors import ConfigError
from worker.training import calibrate, evaluate
from worker.training.attacks import ATTACKS
from worker.training.calibrate import Nearest, nearest_strangers, propose
from worker.training.contestants import contestant
from worker.training.evaluate import arrange
from worker.training.photos import Photo, distinct, read_photos, without_pictures_of
from worker.training.reshots import LeftOut, without_reshots
from worker.training.trial import AT_ONCE, Pictures, describe, figures, run_trial
from worker.weightfile import read


def test_evaluation_reports_and_repeats_itself(trained: Path, tmp_path: Path) -> None:
    folder, archive = tmp_path, write_tar(tmp_path / "few.tar", list(tiles()[::5]))
    reports = []
    for name in ("first.json", "second.json"):
        command = (
            f"--photos {archive} --weights {trained}@fp32 --against phash,{trained}@float"
            f" --originals 8 --held-out 0.3 --json {folder / name} --out {folder / 'out'}"
        )
        pytest.importorskip("imagehash")
        assert evaluate.main(command.split()) == 0
        reports.append((folder / name).read_bytes())
    assert reports[0] == reports[1]
    found = json.loads(reports[0])
    assert found["pictures"]["originals"] == 8
    assert found["pictures"]["stored"] > 50
    assert set(found["results"]) == {f"{trained}@fp32", "phash", f"{trained}@float"}
    for result in found["results"].values():
        assert result["tiers"]["easy"]["micro_average_precision"] > 0.2
        assert result["recall_by_edit"]["jpeg 30"] >= result["recall_by_edit"]["crop 50 %"]
        for part in (result, *result["tiers"].values()):
            strict = part["recall_at_precision_0.999"]
            assert 0 <= strict <= part["recall_at_precision_0.99"] <= 1
            assert 0 <= part["recall_at_false_rate_1e-6"] <= 1
        for figure in ("recall_at_precision_0.999", "recall_at_false_rate_1e-6"):
            by_edit = list(result[f"{figure}_by_edit"].values())
            assert np.mean(by_edit) == pytest.approx(result[figure])
    drawn = {path.name for path in (folder / "out").iterdir()}
    assert drawn == {
        "recall-by-edit.png", "scores.png", "worst-misses.png", "worst-false-hits.png"
    }  # fmt: skip


def test_neither_names_nor_order_of_files_move_a_figure(trained: Path, tmp_path: Path) -> None:
    images = list(tiles()[::5])
    folder = tmp_path / "folder"
    folder.mkdir()
    for place, image in enumerate(images):
        (folder / f"{place * 37 % len(images)}-{place}.jpeg").write_bytes(encoded(image))
    (folder / "again.jpeg").write_bytes(encoded(images[0]))
    reports = []
    for source in (write_tar(tmp_path / "reversed.tar", images[::-1]), folder):
        written = tmp_path / f"{source.name}.json"
        command = (
            f"--photos {source} --weights {trained}@fp32 --originals 8 --held-out 0.3"
            f" --json {written} --out {tmp_path / source.stem}-out"
        )
        assert evaluate.main(command.split()) == 0
        sheet = (tmp_path / f"{source.stem}-out" / "worst-misses.png").read_bytes()
        reports.append((written.read_bytes(), sheet))
    assert reports[0] == reports[1]


def test_one_judge_leaves_out_what_is_stored_twice() -> None:
    once, again = (Photo(str(q), _recoded(tiles()[100], q), bytes([q])) for q in (90, 40))
    rest = [Photo(str(place), tiles()[place], bytes([place])) for place in range(0, 80, 10)]
    third = Photo("third", _recoded(rest[6].image, 40), b"third")
    pictures = Pictures([once, *rest[:3], again], [rest[3], third], rest[5:])
    judge = contestant("default@fp32")
    fair, told = without_reshots(pictures, judge, 0.9)
    assert told == LeftOut(2, 1, 0.9, "default@fp32", Embedder.load(mode="fp32").model_id)
    assert fair.left_out is not None
    assert np.argwhere(fair.left_out).tolist() == [[0, 4], [4, 0], [6, 6]]
    before, after = (figures(run_trial(judge, each, lambda: None)) for each in (pictures, fair))
    assert before["recall_at_precision_0.999"] < 0.7
    assert after["recall_at_precision_0.999"] > 0.9
    assert after["comparisons"] == before["comparisons"] - 2 * len(ATTACKS) - 1
    assert after["strangers_called_duplicates"] == before["strangers_called_duplicates"] == 0.5


def _recoded(image: Image.Image, quality: int) -> Image.Image:
    return Image.open(io.BytesIO(encoded(image, quality))).convert("RGB")


def test_what_is_left_out_is_told(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few, written = write_tar(tmp_path / "few.tar", list(tiles()[:12])), tmp_path / "figures.json"
    command = f"--photos {few} --weights {trained}@fp32 --against rotation@fp32 --json {written}"
    assert evaluate.main([*command.split(), "--same-as", "0.2"]) == 0
    told = json.loads(written.read_text())["left_out"]
    assert told["judge"] == f"{trained}@fp32"
    assert told["model_id"] == read(trained).model_id()
    pairs = f"{told['pairs_of_originals']} pairs of originals and {told['pairs_of_strangers']} of"
    printed = " ".join(capsys.readouterr().out.split())
    assert f"without {pairs} strangers" in printed
    assert "6 originals, 26 edits of each, 6 strangers; 6 stored" in printed
    with pytest.raises(ConfigError, match="alike: none is left"):
        evaluate.main([*command.split(), "--same-as", "-0.999"])


@pytest.fixture(scope="module")
def unrounded(archive: Path) -> float:
    return _precision("default@float", archive)


def _precision(name: str, archive: Path) -> float:
    pictures = arrange(read_photos([archive]), [], originals=24, held_out=0.1)
    found = figures(run_trial(contestant(name), pictures, lambda: None))
    return float(found["micro_average_precision"])


@pytest.mark.parametrize("mode", ["fp32", "bf16", pytest.param("compiled", marks=pytest.mark.slow)])
def test_no_mode_loses_by_rounding(mode: str, archive: Path, unrounded: float) -> None:
    assert 0.5 < unrounded < 0.99, "neither hopeless nor too easy to lose anything"
    assert _precision(f"default@{mode}", archive) >= unrounded - 0.002


def test_roles_in_an_evaluation_do_not_mix(archive: Path) -> None:
    photos = read_photos([archive])
    pictures = arrange(photos, photos, originals=10, held_out=0.2)
    originals = {photo.sha256 for photo in pictures.originals}
    strangers = {photo.sha256 for photo in pictures.strangers}
    stored = {photo.sha256 for photo in pictures.distractors}
    assert len(originals) == 10
    assert not originals & strangers
    assert not (originals | strangers) & stored


@pytest.mark.parametrize("way", [None, *Image.Transpose])
def test_a_recoded_or_turned_twin_is_no_stranger(way: Image.Transpose | None) -> None:
    one, other = tiles()[100], tiles()[200]
    recoded = Image.open(io.BytesIO(encoded(one, 60)))
    twin = recoded if way is None else recoded.transpose(way)
    photos = [Photo("twin", twin, b"1"), Photo("other", other, b"2")]
    kept = without_pictures_of(photos, [Photo("one", one, b"3")])
    assert [photo.name for photo in kept] == ["other"]
    assert without_pictures_of(photos, []) == photos


def test_true_copies_among_the_originals_are_no_false_hits_of_each_other() -> None:
    once = [Photo(str(place), tiles()[place], bytes(31) + bytes([place])) for place in range(40)]
    turned = tiles()[3].transpose(Image.Transpose.ROTATE_90)
    twin = Photo("twin", _recoded(turned, 60), bytes(32) + bytes([3]))
    assert distinct([*once, twin])[3:5] == [once[3], twin]
    found, alone = (arrange(photos, [], 10, 1.0) for photos in ([*once, twin], once))
    assert alone.originals == distinct(once)[:10]
    assert found.originals == alone.originals[:9]
    assert len(found.strangers) == 31


def test_copies_are_made_as_they_are_described() -> None:
    """However many photos are asked about, the edited copies of few are held at once."""
    held = most = 0

    def copies() -> Iterator[Image.Image]:
        nonlocal held, most
        for number in range(3 * AT_ONCE + 1):
            held += 1
            most = max(most, held)
            yield Image.new("RGB", (1 + number, 1))

    class Widths:
        name = "widths"
        model_id: str | None = None
        threshold: float | None = None

        def describe(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
            nonlocal held
            held -= len(images)
            return np.array([[image.width] for image in images], np.float32)

    rows = describe(Widths(), copies())
    assert rows[:, 0].tolist() == list(range(1, 3 * AT_ONCE + 2))
    assert most == AT_ONCE


def test_nearest_strangers_by_hand() -> None:
    stored = np.zeros((3, 128), np.int8)
    stored[0, 0] = stored[1, 0] = stored[2, 1] = 100
    stored[1, 1] = 100
    nearest = nearest_strangers(stored)
    assert nearest.stranger.tolist() == [1, 0, 1]
    np.testing.assert_allclose(nearest.similarity, [0.5**0.5] * 3)


def _power_law(count: int) -> Nearest:
    """Distances that fall short of d with probability (d / 0.8) ** 6."""
    distance = 0.8 * np.random.default_rng(0).random(count) ** (1 / 6)
    return Nearest(1 - distance, np.zeros(count, np.int64))


def test_the_threshold_meets_the_wanted_rate_on_a_power_law() -> None:
    nearest = _power_law(100_000)
    for rate in (0.01, 0.001, 0.0001):
        threshold = propose(nearest, rate).threshold
        assert ((1 - threshold) / 0.8) ** 6 == pytest.approx(rate, rel=0.3)
    more = propose(nearest, 0.001, stored=1_000_000).threshold
    assert ((1 - more) / 0.8) ** 6 == pytest.approx(0.0001, rel=0.3)


def test_true_copies_at_the_top_hardly_move_the_threshold() -> None:
    nearest = _power_law(5000)
    clean = propose(nearest, 0.001).threshold
    nearest.similarity[:50] = 0.999
    assert abs(propose(nearest, 0.001).threshold - clean) < 0.03


def test_calibration_writes_weights_with_the_new_threshold(trained: Path, archive: Path) -> None:
    written, plot = archive.with_name("calibrated.safetensors"), archive.with_name("plot.png")
    command = (
        f"--photos {archive} --weights {trained} --mode fp32 --false-rate 0.01"
        f" --write {written} --plot {plot}"
    )
    assert calibrate.main(command.split()) == 0
    before, after = read(trained), read(written)
    assert after.model_id() == before.model_id()
    threshold, evaluation = after.description.threshold, after.description.evaluation
    assert threshold != before.description.threshold
    assert evaluation["calibration"]["threshold"] == threshold
    assert {"threshold", "recall_at_threshold"} <= before.description.evaluation.keys()
    assert not {"threshold", "recall_at_threshold"} & evaluation.keys()
    assert plot.stat().st_size > 1000


def test_training_and_calibration_agree_on_the_threshold(
    trained: Path, archive: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    set_aside = f"--photos {archive} --held-out 0.5 --stored 10000 --false-rate 0.001"
    assert calibrate.main(f"{set_aside} --weights {trained} --mode fp32".split()) == 0
    assert f"threshold {read(trained).description.threshold:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["phash", "dhash", "pdq", "efficientnet-lite0", "rotation@bf16"])
def test_rivals_recognise_a_recompressed_photo(name: str) -> None:
    packages = {"phash": "imagehash", "dhash": "imagehash", "pdq": "pdqhash"}
    if "@" not in name:
        pytest.importorskip(packages.get(name, "efficientnet_lite_pytorch"))
    rival = contestant(name)
    photos = list(tiles()[::60])
    copies = rival.describe([photo.resize((80, 80)) for photo in photos])
    stored = rival.describe(photos)
    np.testing.assert_allclose(np.linalg.norm(stored, axis=1), 1, atol=1e-5)
    assert ((copies @ stored.T).argmax(1) == np.arange(len(photos))).mean() >= 0.8
