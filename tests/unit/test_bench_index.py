"""The bench of the index measures the sizes it is asked for, and says all it promises of each."""

import json
import math
from pathlib import Path

import pytest

pytest.importorskip("faiss", reason="the bench extra is not installed")

from tests.bench import index
from tests.photos import jpeg, scene
from worker.index import IndexSettings
from worker.vectors import Vectors

SIZE = {  # of the index's bench: what every size must tell, then what explains it
    "stored",
    "recall",
    "compared_share",
    "p50_seconds",
    "p99_seconds",
    "redis_bytes_per_image",
    "clusters",
    "faiss_p50_seconds",
    "bruteforce_p50_seconds",
} | {
    "compared",
    "faiss_lists",
    "faiss_probes",
    "faiss_recall",
    "largest_cluster",
    "median_cluster",
    "p50_seconds_of_edits",
    "p99_seconds_of_edits",
    "planted",
    "probes",
    "recall_of_verdicts",
    "redis_core_seconds",
    "seconds_to_fill",
    "threshold",
    "truncated",
    "worker_core_seconds",
}


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sixteen of them, in the folder that the vectors are kept in, too."""
    monkeypatch.setattr("worker.compiling.has_compiler", lambda: False)  # minutes, where it is busy
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(16):
        (folder / f"{number}.jpg").write_bytes(jpeg(scene(number)))
    return folder


def test_the_index_is_measured_at_each_size(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "TIMED", 2)
    decide, given = index.seconds_to_decide, list[int]()

    def decide_some(
        rows: Vectors, settings: IndexSettings, binary: Path | None
    ) -> tuple[float, float]:
        given.append(len(rows))
        return decide(rows[:600], settings, binary)

    monkeypatch.setattr(index, "seconds_to_decide", decide_some)
    written, plot = tmp_path / "index.json", tmp_path / "index.png"
    options = ["--sizes", "400,800", "--photos", str(photos), "--edits", "16"]
    options += ["--threshold", "0.3", "--json", str(written), "--plot", str(plot)]
    assert index.main(options) == 0
    found = json.loads(written.read_text())
    assert found.keys() == {
        "sizes",
        "seconds_to_decide_10000",
        "core_seconds_to_decide_10000",
        "nearest_similarity_quantiles",
        "model_id",
    }
    assert (given, found["seconds_to_decide_10000"] > 0) == ([10_000], True)
    assert [each["stored"] for each in found["sizes"]] == [400, 800]
    for each in found["sizes"]:
        assert each.keys() == SIZE
        assert all(math.isfinite(value) and value >= 0 for value in each.values())
        assert each["clusters"] >= 1 and 0 < each["recall"] <= 1
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_sizes_that_would_not_be_measured_are_refused(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        index.main(["--sizes", "1295", "--photos", str(photos), "--edits", "16"])
    assert ended.value.code == 2
    assert "--sizes: 1,295 is too few: there are 16 images before it" in capsys.readouterr().err
    assert index.unreachable([3000, 1296], 16) is None
    assert index.unreachable([3000, 4279], 16) is not None
    assert index.unreachable([3000, 4280], 16) is None
