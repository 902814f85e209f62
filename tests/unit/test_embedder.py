"""The embedder: weights in, unit vectors out, in every mode."""

import hashlib
import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import ResNet18_Weights, resnet18

from tests.unit.embedder_photos import encoded, tiles
from worker import embedder as embedder_module
from worker.embedder import CHUNK, DEFAULT_PATH, DEFAULT_SHA256, Embedder, from_full_network
from worker.errors import ConfigError, EventError
from worker.images import PREPROCESSING
from worker.network import PARAMETER_COUNT, TruncatedResNet18, cut
from worker.training import edits
from worker.weightfile import Description, Weights, read, save


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Embedder.load(mode="fp32", device="cpu")


@pytest.fixture
def untrained(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    path = tmp_path / "untrained.safetensors"
    state = TruncatedResNet18().state_dict()
    save(path, Weights(state, Description(PREPROCESSING, 64, threshold=0.9)))
    return path


def test_default_weights_are_small_pinned_and_complete(embedder: Embedder) -> None:
    assert DEFAULT_PATH.stat().st_size <= 1_500_000
    assert hashlib.sha256(DEFAULT_PATH.read_bytes()).hexdigest() == DEFAULT_SHA256
    assert embedder.parameter_count == PARAMETER_COUNT == 683_072
    assert 0 < embedder.threshold < 1
    parents = embedder.description.training["average_of"].values()
    assert [parent["objective"] for parent in parents] == ["contrastive"] * 2


def test_vectors_are_unit_rows_and_repeatable(embedder: Embedder) -> None:
    images = [encoded(tile) for tile in tiles()[:5]]
    vectors = embedder.embed(images)
    assert vectors.shape == (5, 128)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(vectors, embedder.embed(images))


def test_a_vector_does_not_depend_on_its_company(embedder: Embedder) -> None:
    images = [encoded(tile) for tile in tiles()[: CHUNK + 3]]
    together = embedder.embed(images)
    np.testing.assert_array_equal(embedder.embed(images[:7]), together[:7])
    np.testing.assert_array_equal(embedder.embed(images[:1]), together[:1])


def test_a_copy_is_closer_than_every_stranger(embedder: Embedder) -> None:
    photos = tiles()[::12]
    copies = [encoded(edits.brightness(photo, 1.2), 40) for photo in photos]
    similarity = embedder.embed(copies) @ embedder.embed([encoded(p) for p in photos]).T
    nearest = similarity.argmax(axis=1)
    assert np.mean(nearest == np.arange(len(photos))) > 0.95


def test_light_and_contrast_hardly_move_a_vector(untrained: Path) -> None:
    embedder = Embedder.load(untrained, mode="fp32", device="cpu")
    pixels = np.random.default_rng(0).integers(60, 200, (4, 64, 64, 3)).astype(np.uint8)
    darker = np.rint(pixels * 0.6 + 20).astype(np.uint8)
    agreement = (embedder.embed_pixels(pixels) * embedder.embed_pixels(darker)).sum(1)
    assert agreement.min() > 0.97


def test_no_images_give_no_rows(embedder: Embedder) -> None:
    assert embedder.embed([]).shape == (0, 128)


def test_a_broken_image_is_the_events_fault(embedder: Embedder) -> None:
    with pytest.raises(EventError):
        embedder.embed([b"\xff\xd8 not really"])


def test_pixels_of_another_size_are_refused(embedder: Embedder) -> None:
    with pytest.raises(ValueError, match="pixels must be"):
        embedder.embed_pixels(np.zeros((1, 10, 10, 3), np.uint8))


def test_half_precision_hardly_moves_a_vector(embedder: Embedder) -> None:
    images = [encoded(tile) for tile in tiles()[:8]]
    half = Embedder.load(mode="bf16", device="cpu")
    assert half.mode == "bf16"
    assert half.model_id == embedder.model_id
    assert (half.embed(images) * embedder.embed(images)).sum(1).min() >= 0.9995


def test_with_threads_of_its_own_it_asks_torch_for_no_more(untrained: Path) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert Embedder.load(untrained, mode="fp32", device="cpu").threads == 1
        assert torch.get_num_threads() == 2
        assert Embedder.load(untrained, mode="fp32", device="cpu", threads=3).threads == 3
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_imagenet_is_cut_from_the_full_network(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    full = resnet18(weights=None).eval()
    monkeypatch.setattr(
        type(ResNet18_Weights.IMAGENET1K_V1), "get_state_dict", lambda *_a, **_o: full.state_dict()
    )
    loaded = Embedder.load("imagenet", mode="fp32", device="cpu")
    assert loaded.parameter_count == PARAMETER_COUNT
    pixels = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.inference_mode():
        values = ((torch.from_numpy(pixels) / 255 - mean) / std).permute(0, 3, 1, 2)
        values = full.maxpool(full.relu(full.bn1(full.conv1(values))))
        values = full.layer2(full.layer1(values)).clamp(min=1e-6)
        pooled = values.pow(3).mean((2, 3)).pow(1 / 3)
        expected = torch.nn.functional.normalize(pooled).numpy()
    np.testing.assert_allclose(loaded.embed_pixels(pixels), expected, atol=1e-4)


def test_a_failing_download_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_arguments: object, **_options: object) -> None:
        raise OSError("name resolution failed")

    monkeypatch.setattr(type(ResNet18_Weights.IMAGENET1K_V1), "get_state_dict", away)
    with pytest.raises(ConfigError, match="could not fetch"):
        Embedder.load("imagenet")


def test_the_cut_keeps_nothing_behind_layer2() -> None:
    kept = cut(resnet18(weights=None).state_dict())
    assert {name.split(".")[0] for name in kept} == {"conv1", "bn1", "layer1", "layer2"}
    parameters = {name for name, _ in TruncatedResNet18().named_parameters()}
    assert sum(v.numel() for name, v in kept.items() if name in parameters) == PARAMETER_COUNT


def test_the_model_id_follows_weights_size_and_preprocessing() -> None:
    state = {name: torch.full((2,), 1.0) for name in ("a", "b")}
    plain = Weights(state, Description("p", 64, 0.5))
    same = Weights(dict(reversed(state.items())), Description("p", 64, 0.9))
    assert plain.model_id() == same.model_id(), "neither order nor threshold moves a vector"
    others = [
        Weights({**state, "a": torch.full((2,), 1.5)}, Description("p", 64, 0.5)),
        Weights(state, Description("p", 96, 0.5)),
        Weights(state, Description("q", 64, 0.5)),
        Weights(state, Description("p", 64, 0.5, pooling="mean")),
        Weights(state, Description("p", 64, 0.5, normalisation="imagenet")),
    ]
    assert len({each.model_id() for each in (plain, *others)}) == 6


def test_weights_survive_the_file(untrained: Path) -> None:
    weights = read(untrained)
    again = untrained.with_name("again.safetensors")
    save(again, weights)
    assert read(again).model_id() == weights.model_id()
    assert again.read_bytes() == untrained.read_bytes()


def test_a_changed_default_is_refused(
    tmp_path: Path, untrained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedder_module, "DEFAULT_PATH", untrained)
    with pytest.raises(ConfigError, match="SHA-256 differs"):
        Embedder.load()


def _one_line(path: Path | str, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        Embedder.load(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_wrong_files_are_one_line_errors(tmp_path: Path, untrained: Path) -> None:
    assert "no weights file" in _one_line(tmp_path / "missing.safetensors")
    garbage = tmp_path / "garbage.safetensors"
    garbage.write_bytes(b"\x80\x04pickle" * 100)
    assert "does not hold embedder weights" in _one_line(garbage)
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(untrained.read_bytes()[:-100])
    assert "does not hold embedder weights" in _one_line(truncated)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"a": torch.zeros(1)}, foreign)
    assert "does not hold embedder weights" in _one_line(foreign)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    state = TruncatedResNet18().state_dict()
    save(path, Weights(state, Description("another preprocessing", 64, 0.5)))
    assert "preprocessing" in _one_line(path)
    del state["conv1.weight"]
    save(path, Weights(state, Description(PREPROCESSING, 64, 0.5)))
    assert "do not fit the network: conv1.weight" in _one_line(path)
    about = {"embedder": json.dumps({"format": 99})}
    save_file({"a": torch.zeros(1)}, path, about)
    assert "unknown format" in _one_line(path)


def test_unknown_modes_and_devices_are_refused() -> None:
    assert "not one of" in _one_line("default", mode="fp8")
    assert "not usable" in _one_line("default", device="cuda:77")


def test_imagenet_starts_uncalibrated() -> None:
    weights = from_full_network(resnet18(weights=None).state_dict())
    assert weights.description.threshold == 1.0


@pytest.mark.parametrize("torch_threads", [1, 2])
@pytest.mark.parametrize("mode", ["fp32", "bf16"])
def test_a_picture_alone_gets_the_vector_it_has_in_company(mode: str, torch_threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(torch_threads)
    try:
        eager = Embedder.load(mode=mode, device="cpu")
        shape = (11, eager.input_size, eager.input_size, 3)
        pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        together = eager.embed_pixels(pixels)
        eager._forward = forward = Mock(wraps=eager._forward)
        alone = np.concatenate([eager.embed_pixels(pixels[at : at + 1]) for at in range(11)])
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(alone, together)
    # Threads share the sums by the number of rows, whether or not it shows on this machine.
    rows = {len(call.args[0]) for call in forward.call_args_list}
    assert rows <= ({1, CHUNK} if torch_threads == 1 else {CHUNK})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_agrees_with_the_cpu(embedder: Embedder) -> None:
    images = [encoded(tile) for tile in tiles()[:8]]
    on_gpu = Embedder.load(device="cuda")
    vectors = on_gpu.embed(images)
    assert (vectors * embedder.embed(images)).sum(1).min() > 0.998
    alone = np.concatenate([on_gpu.embed([image]) for image in images])
    np.testing.assert_array_equal(alone, vectors)
