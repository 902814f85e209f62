"""The benches run and say what they promise. Nothing here looks at a time."""

import json
import math
import os
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pdqhash", reason="the bench extra is not installed")

from tests.bench import embed, endurance, pipeline
from tests.bench.pictures import pictures
from tests.bench.processes import CHILDREN, usage
from tests.bench.rig import pick_broker
from tests.photos import jpeg, scene

SUMMARY = {
    "images_per_second",
    "ideal_images_per_second",
    "cpu_ratio_to_ideal",
    "wall_ratio_to_ideal",
    "speedup_over_fp32",
    "speedup_over_fp32_alone",
    "ratio_to_pdq",
    "exact_copy_cost_ratio",
    "p50_seconds",
    "p99_seconds",
    "p50_seconds_by_uri",
    "p99_seconds_by_uri",
    "rss_bytes",
    "redelivered_events",
    "cpu_ratio_2_workers_to_1",
}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(16):
        (folder / f"{number}.jpg").write_bytes(jpeg(scene(number)))
    return folder


@pytest.mark.slow
def test_the_whole_trip_is_summed_up(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "ROUNDS", 1)
    monkeypatch.setattr(pipeline, "SCALING_ROUNDS", 1)
    summary, plot = tmp_path / "summary.json", tmp_path / "latency.svg"
    options = ["--images", "12", "--photos", str(photos), "--seconds", "2", "--workers", "1,2"]
    options += ["--embed-mode", "fp32", "--json", str(summary), "--plot", str(plot)]
    assert pipeline.main([*options, "--broker", "tansu"]) == 0
    found = json.loads(summary.read_text())
    assert found.pop("broker") == "tansu"
    assert found.keys() == SUMMARY
    assert all(math.isfinite(value) and value >= 0 for value in found.values())
    assert plot.read_text().startswith("<?xml")


@pytest.mark.slow
def test_endurance_is_summed_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endurance, "ROUND", 24)
    summary, plot = tmp_path / "endurance.json", tmp_path / "endurance.svg"
    options = ["--events", "72", "--embed-mode", "fp32", "--broker", "tansu"]
    assert endurance.main([*options, "--json", str(summary), "--plot", str(plot)]) == 0
    found = json.loads(summary.read_text())
    assert found.keys() == {
        "broker",
        "ready_seconds_cold",
        "ready_seconds_warm",
        "events",
        "rss_bytes",
        "peak_rss_bytes",
        "settled_low_to_high",
    }
    assert (found["events"], len(found["rss_bytes"])) == (72, 3)
    assert found["peak_rss_bytes"] == max(found["rss_bytes"])
    assert plot.read_text().startswith("<?xml")


def test_apache_kafka_is_measured_where_it_can_be_had(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pick_broker("tansu") == "tansu"
    monkeypatch.setattr("shutil.which", lambda tool: None)
    assert pick_broker("auto") == "tansu"
    assert "no Apache Kafka: java is not installed" in capsys.readouterr().out
    monkeypatch.setattr("tests.bench.rig.fetch_archives", lambda: None)
    assert pick_broker("auto") == "apache"


def test_the_embedding_modes_are_compared(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.compiling.has_compiler", lambda: False)  # minutes, where it is busy
    monkeypatch.setattr("worker.embedder.COMPILED", tmp_path)
    written = tmp_path / "modes.json"
    options = ["--images", "4", "--photos", str(photos), "--seconds", "0", "--json", str(written)]
    assert embed.main(options) == 0
    modes = {each["mode"]: each for each in json.loads(written.read_text())["modes"]}
    assert {"fp32", "bf16"} <= modes.keys()
    assert modes["fp32"]["most_moved"] == 0
    for each in modes.values():
        assert each["least_cosine"] >= embed.NEAR_ENOUGH
        assert (each["pairs"], each["verdicts"], each["verdicts_changed"]) == (16, 4, 0)
        assert each["images_per_second"].keys() == each["cpu_seconds"].keys() == {"1", "8", "64"}


def test_a_mode_that_changes_verdicts_is_told() -> None:
    """Three pictures and their copies; the first copy is as near to the threshold as can be."""
    exact = np.eye(6, 128, dtype=np.float32)
    exact[3:] = exact[:3]
    exact[3, :3] = 0.76, 0.0, 0.65
    other = exact.copy()
    other[3, :3] = 0.74, 0.0, 0.67
    found = embed._agreement(exact, other, 0.75)
    assert (found["verdicts"], found["verdicts_changed"], found["pairs_crossing"]) == (3, 1, 1)
    mode = partial(embed.Mode, "compiled", "cpu", 0.0, images_per_second={}, cpu_seconds={})
    found["least_cosine"] = 1.0
    assert not embed._near_enough(mode(**found))
    assert embed._near_enough(mode(**(found | {"verdicts_changed": 0})))


def test_photos_are_taken_as_they_are_where_there_are_enough(photos: Path) -> None:
    originals = {path.read_bytes() for path in photos.iterdir()}
    assert set(pictures(photos, 16)) == originals
    pieces = pictures(photos, 20)
    assert len({*pieces}) == 20
    assert pieces == pictures(photos, 20), "always the same ones"


def test_a_source_without_photos_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no JPEG"):
        pictures(tmp_path, 1)


def test_usage_adds_up_a_process_and_its_children() -> None:
    busy = "x = sum(range(3_000_000)); print(x, flush=True); input()"
    before = usage([os.getpid()])
    with subprocess.Popen(
        [sys.executable, "-c", busy], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        during = usage([os.getpid()])
        child.communicate(b"\n")
    assert isinstance(during.cpu, Counter)
    assert during.cpu[CHILDREN] > before.cpu[CHILDREN]
    assert during.rss_bytes > 0
    assert during.cpu_seconds > before.cpu_seconds
    assert usage([os.getpid()]).cpu[CHILDREN] >= during.cpu[CHILDREN], "its time is kept"


@pytest.mark.parametrize(("text", "counts"), [("1,2,4", (1, 2, 4)), ("none", ()), ("4", (4,))])
def test_numbers_of_workers(text: str, counts: tuple[int, ...]) -> None:
    assert pipeline._counts(text) == counts
