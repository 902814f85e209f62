"""Compiled networks: as good as eager ones, kept on disk, trusted only where they are ours."""

import os
import shutil
import stat
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from worker import compiling
from worker.embedder import CHUNK, Embedder
from worker.images import PREPROCESSING
from worker.network import TruncatedResNet18
from worker.unlocked import CannotUnlock, Unlocked
from worker.weightfile import Description, Weights, save

SIZE = 32


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "untrained.safetensors"
    state = TruncatedResNet18().state_dict()
    save(path, Weights(state, Description(PREPROCESSING, SIZE, threshold=0.9)))
    return path


class Doubling(torch.nn.Module):
    """As little as can be compiled."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values * 2


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


@needs_compiler
def test_a_second_start_compiles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    example = torch.rand(2, 3)
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU()).eval()
    state, expected = network.state_dict(), network(example)
    first = compiling.compiled(network, [example], tmp_path)
    torch.testing.assert_close(first(example), expected)
    for package in tmp_path.iterdir():
        unlocked = Unlocked(package)
        for _ in range(3):
            answer = unlocked(example)
            torch.testing.assert_close(answer, expected)
            assert answer._use_count() == 1, "nothing else keeps it from being freed"
    monkeypatch.setattr("worker.compiling.has_compiler", lambda: False)
    linear = torch.nn.Linear(3, 4)
    same = torch.nn.Sequential(linear, torch.nn.ReLU()).eval()
    same.load_state_dict(state)
    torch.testing.assert_close(compiling.compiled(same, [example], tmp_path)(example), expected)
    with torch.no_grad():
        linear.weight[0, 0] += 1
    with pytest.raises(compiling.CompilingFailed, match="no C"):
        compiling.compiled(same, [example], tmp_path)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("torch_threads", "chunks"), [(1, {1, CHUNK}), (2, {1})])
def test_compiled_agrees_with_eager(
    weights: Path, tmp_path: Path, torch_threads: int, chunks: set[int]
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(torch_threads)
    eager = Embedder.load(weights, mode="bf16", device="cpu")
    compiled = Embedder.load(weights, mode="compiled", device="cpu", compiled=tmp_path)
    assert compiled.mode == "compiled"
    assert compiled.chunk in chunks
    pixels = np.random.default_rng(0).integers(0, 256, (11, SIZE, SIZE, 3), dtype=np.uint8)
    together = compiled.embed_pixels(pixels)
    for at in range(len(pixels)):
        np.testing.assert_array_equal(compiled.embed_pixels(pixels[at : at + 1])[0], together[at])
    torch.set_num_threads(before)
    agreement = (together * eager.embed_pixels(pixels)).sum(1)
    assert agreement.min() > 0.9995


@needs_compiler
@pytest.mark.slow
def test_threads_side_by_side_embed_as_one_does(weights: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        compiled = Embedder.load(
            weights, mode="compiled", device="cpu", compiled=tmp_path, threads=2
        )
        pixels = np.random.default_rng(0).integers(0, 256, (40, SIZE, SIZE, 3), dtype=np.uint8)
        batches = [pixels[at : at + CHUNK + at % 2] for at in range(30)]
        alone = [compiled.embed_pixels(batch) for batch in batches]
        with ThreadPoolExecutor(3) as pool:  # one more than fit
            beside = list(pool.map(compiled.embed_pixels, batches))
    finally:
        torch.set_num_threads(before)
    for one, other in zip(alone, beside, strict=True):
        np.testing.assert_array_equal(one, other)


def test_without_a_compiler_it_runs_eager_and_says_so(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("worker.compiling.shutil.which", lambda _name: None)
    loaded = Embedder.load(weights, mode="compiled", device="cpu", compiled=tmp_path)
    assert loaded.mode == "bf16"
    assert "no C++ compiler" in caplog.text


def test_a_compiler_that_fails_is_no_reason_to_stop(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_arguments: object, **_options: object) -> None:
        raise RuntimeError("ld returned 1\nand much more")

    monkeypatch.setattr("worker.compiling.has_compiler", lambda: True)
    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", broken)
    loaded = Embedder.load(weights, mode="compiled", device="cpu", compiled=tmp_path)
    assert loaded.mode == "bf16"
    assert "ld returned 1" in caplog.text
    assert "much more" not in caplog.text


def test_what_others_may_write_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[Path] = []

    def remember(_network: object, _example: object, path: Path, _threads: int) -> object:
        used.append(path.parent)
        return Doubling()

    monkeypatch.setattr("worker.compiling._package", remember)
    example = torch.ones(1, 2)
    tmp_path.chmod(stat.S_IRWXU)
    compiling.compiled(Doubling(), [example], tmp_path)
    tmp_path.chmod(stat.S_IRWXU | stat.S_IRWXO)
    compiling.compiled(Doubling(), [example], tmp_path)
    compiling.compiled(Doubling(), [example], tmp_path / "file" / "folder")
    assert used[0] == tmp_path
    assert used[1] != tmp_path
    assert not used[1].exists(), "a passing folder passes"


def test_what_is_no_package_cannot_be_unlocked(tmp_path: Path) -> None:
    empty = tmp_path / "empty.pt2"
    with zipfile.ZipFile(empty, "w"):
        pass
    with pytest.raises(CannotUnlock):
        Unlocked(empty)


def test_the_oldest_go(tmp_path: Path) -> None:
    for number in range(compiling.MOST_KEPT + 3):
        path = tmp_path / f"{number}.pt2"
        path.touch()
        os.utime(path, (number, number))
    compiling._drop_oldest(tmp_path)
    assert {int(path.stem) for path in tmp_path.iterdir()} == set(range(3, compiling.MOST_KEPT + 3))


def test_a_network_is_known_by_everything_that_shapes_its_code(tmp_path: Path) -> None:
    network, example = torch.nn.Linear(2, 2), torch.ones(1, 2)
    first = compiling._fingerprint(network, example)
    assert compiling._fingerprint(network, example) == first
    assert compiling._fingerprint(network, torch.ones(2, 2)) != first
    network.note = "another"  # type: ignore[assignment]
    assert compiling._fingerprint(network, example) != first
    del network.note
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    another = compiling._fingerprint(network, example)
    torch.set_num_threads(threads)
    assert another != first
    with torch.no_grad():
        network.weight[0, 0] += 1
    assert compiling._fingerprint(network, example) != first


@pytest.mark.parametrize(
    ("bf16", "compiler", "mode"),
    [(True, True, "compiled"), (True, False, "bf16"), (False, True, "fp32")],
)
def test_auto_is_the_fastest_there_is(
    bf16: bool, compiler: bool, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from worker.embedder import _fastest

    monkeypatch.setattr("worker.compiling.has_bf16", lambda: bf16)
    monkeypatch.setattr("worker.compiling.has_compiler", lambda: compiler)
    assert _fastest("cpu") == mode
    assert _fastest("cuda") == "bf16"
