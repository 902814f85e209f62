"""Pictures to unit vectors: weights, device, numeric mode. Knows nothing of events or indexes."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from worker import compiling, weightfile
from worker.errors import ConfigError
from worker.images import PREPROCESSING, ImageLimits, decode
from worker.network import DIMENSIONS, PER_DATASET, TruncatedResNet18, cut

DEFAULT_PATH = Path(__file__).parent / "weights" / "default.safetensors"
DEFAULT_SHA256 = "7cbed1f11ff2261fd8aef684e90977f121d7a34818bd36ce617260850ca1549c"
IMAGENET_SIZE = 224  # pixels, as its training had
MODES = ("auto", "fp32", "bf16", "compiled")
COMPILED = Path("~/.cache/image-dedup-stream")  # compiled networks, kept across starts
# Pictures at once, always so many: a short batch is filled up, for a vector must not depend on the
# company its picture is embedded in. On a processor few, because what lies between two layers then
# stays in its cache; compiled, one alone is nearly as cheap, so the rest of a batch goes alone.
CHUNK = 8
CUDA_CHUNK = 64
# Batches tried at the start, some 0.2 s: where sums are added up in another order for another
# number of rows, one picture in thirty or so shows it.
ALONE_TRIALS = 8

log = logging.getLogger(__name__)


class Embedder:
    """A loaded network. `load` makes one; `threads` of them may embed with it at once.

    `chunk` pictures are embedded together. Where it `fills`, fewer take as long.
    """

    def __init__(
        self,
        weights: weightfile.Weights,
        mode: str,
        device: str,
        compiled: Path = COMPILED,
        threads: int = 1,
    ) -> None:
        about = weights.description
        self.model_id, self.threshold = weights.model_id(), about.threshold
        self.input_size, self.description = about.input_size, about
        self.weights = weights
        self.device = device
        network = _network(weights)
        self.parameter_count = sum(parameter.numel() for parameter in network.parameters())
        mode = _fastest(device) if mode == "auto" else mode
        on_cuda = device.startswith("cuda")
        shape = (self.input_size, self.input_size, 3)
        self.chunk = CUDA_CHUNK if on_cuda else CHUNK
        self.threads = 1 if on_cuda else threads
        # One picture alone has a shape of its own: filling up would cost a chunk's work.
        examples = [
            torch.zeros((rows, *shape), dtype=torch.uint8, device=device)
            for rows in (1, self.chunk)
        ]
        folder = compiled.expanduser()
        self._forward, self.mode = _prepared(network, mode, examples, folder, self.threads)
        self.fills = on_cuda or self.mode != "compiled"
        self._alone = _same_alone(self._forward, examples[-1])
        if not (self.fills or self._alone):
            self.chunk = 1

    @classmethod
    def load(
        cls,
        weights: str | Path = "default",
        *,
        mode: str = "auto",
        device: str = "auto",
        compiled: Path = COMPILED,
        threads: int | None = None,
    ) -> "Embedder":
        """Load "default" (shipped), "imagenet" (fetched by torchvision) or a safetensors path.

        `mode`: "fp32", "bf16", "compiled" (bf16 through inductor, kept in the folder `compiled`;
        without a working C++ compiler it becomes "bf16", which `.mode` then says) or "auto", the
        fastest of them here. `device`: "cpu", "cuda", "cuda:1" or "auto". `threads`: how many may
        embed at once, each on one core, for torch is told to use no more in this process; None: one
        may, and torch uses as many cores as it likes. On a GPU it is one. Raises ConfigError for
        anything that does not exist or does not fit.
        """
        if mode not in MODES:
            raise ConfigError(f"embedding mode {mode!r} is not one of {', '.join(MODES)}")
        if threads is not None:
            torch.set_num_threads(1)
        return cls(read_weights(weights), mode, pick_device(device), compiled, threads or 1)

    def embed(self, images: Sequence[bytes]) -> NDArray[np.float32]:
        """Decode and embed encoded pictures: (n, 128) unit rows. Raises EventError by decoding."""
        limits = ImageLimits()
        pixels = [decode(data, self.input_size, limits) for data in images]
        empty = np.empty((0, self.input_size, self.input_size, 3), np.uint8)
        return self.embed_pixels(np.stack(pixels) if pixels else empty)

    def embed_pixels(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embed uint8 (n, S, S, 3) from `worker.images`: (n, 128) unit rows.

        Batches are cut and filled up to one shape, so a picture's vector does not depend on the
        company it is embedded in.
        """
        expected = (self.input_size, self.input_size, 3)
        if pixels.shape[1:] != expected or pixels.dtype != np.uint8:
            raise ValueError(
                f"pixels must be uint8 (n, {expected}), not {pixels.dtype} {pixels.shape}"
            )
        vectors = np.empty((len(pixels), DIMENSIONS), np.float32)
        start = 0
        while start < len(pixels):
            rows = self._rows(len(pixels) - start)
            chunk = pixels[start : start + rows]
            vectors[start : start + rows] = self._embed_chunk(chunk, rows)[: len(chunk)]
            start += rows
        return vectors

    def _rows(self, left: int) -> int:
        """Rows to compute at once where so many pictures are left, filled up or not."""
        if left >= self.chunk or (self.fills and not (left == 1 and self._alone)):
            return self.chunk
        return 1

    def _embed_chunk(self, chunk: NDArray[np.uint8], rows: int) -> NDArray[np.float32]:
        batch = torch.from_numpy(np.ascontiguousarray(chunk))
        if len(chunk) < rows:
            batch = torch.cat([batch, batch.new_zeros(rows - len(chunk), *chunk.shape[1:])])
        if self.device.startswith("cuda"):
            batch = batch.pin_memory().to(self.device, non_blocking=True)
        torch.get_num_threads()  # oneDNN heeds the number set elsewhere only once it was asked for
        with torch.inference_mode():
            vectors: NDArray[np.float32] = self._forward(batch).float().cpu().numpy()
        return vectors


def read_weights(weights: str | Path) -> weightfile.Weights:
    if weights == "imagenet":
        return _imagenet()
    if weights == "default":
        found = weightfile.read(DEFAULT_PATH, DEFAULT_SHA256)
    else:
        found = weightfile.read(Path(weights))
    trained_for = found.description.preprocessing
    if trained_for != PREPROCESSING:
        raise ConfigError(f"weights need preprocessing {trained_for!r}, this is {PREPROCESSING!r}")
    return found


def _imagenet() -> weightfile.Weights:
    from torchvision.models import ResNet18_Weights

    try:
        full = ResNet18_Weights.IMAGENET1K_V1.get_state_dict(
            progress=False, check_hash=True, weights_only=True
        )
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"torchvision could not fetch the ImageNet weights: {error}") from error
    return from_full_network(full)


def from_full_network(full: dict[str, Tensor]) -> weightfile.Weights:
    """Cut a whole ResNet-18's state dict (torchvision's names); nothing is centred.

    Its threshold is 1: nothing but equal vectors match until `calibrate` has measured one.
    """
    tensors = cut(full)
    tensors["centring.running_mean"] = torch.zeros(DIMENSIONS)
    tensors["centring.running_var"] = torch.ones(DIMENSIONS)
    tensors["whitening"] = torch.eye(DIMENSIONS)
    about = weightfile.Description(
        PREPROCESSING, IMAGENET_SIZE, threshold=1.0, normalisation=PER_DATASET
    )
    return weightfile.Weights(tensors, about)


def _network(weights: weightfile.Weights) -> TruncatedResNet18:
    network = TruncatedResNet18(weights.description.normalisation).eval()
    wanted = {name: v.shape for name, v in network.state_dict().items() if v.is_floating_point()}
    found = {name: v.shape for name, v in weights.tensors.items() if v.is_floating_point()}
    if wanted != found:
        odd = sorted(
            name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)
        )
        raise ConfigError(f"weights do not fit the network: {odd[0]} and {len(odd) - 1} more")
    network.load_state_dict(weights.tensors, strict=False)
    return network


def pick_device(wanted: str) -> str:
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device {wanted!r} is not usable: {str(error).splitlines()[0]}"
        ) from error
    return wanted


def _fastest(device: str) -> str:
    """The mode "auto" stands for."""
    if device.startswith("cuda"):
        return "bf16"
    if not compiling.has_bf16():  # emulated, it is slower than float32
        return "fp32"
    return "compiled" if compiling.has_compiler() else "bf16"


def _prepared(
    network: TruncatedResNet18, mode: str, examples: list[Tensor], folder: Path, threads: int
) -> tuple[Callable[[Tensor], Tensor], str]:
    """Fold, cast, move and maybe compile; returns the forward pass and the mode really in use."""
    network = _folded(network).to(examples[0].device).to(memory_format=torch.channels_last)
    if mode == "fp32":
        return network, mode
    for part in (network.conv1, network.layer1, network.layer2):
        part.to(torch.bfloat16)
    if mode == "bf16":
        return network, mode
    try:
        return compiling.compiled(network, examples, folder, threads), mode
    except compiling.CompilingFailed as error:  # eager computes the same
        log.warning("embedding runs uncompiled: %s", error)
        return network, "bf16"


def _same_alone(forward: Callable[[Tensor], Tensor], example: Tensor) -> bool:
    """Whether this machine computes the same to the bit for a picture alone and in company."""
    # Threads share the sums, and a GPU chooses its kernels, by the number of rows.
    if example.is_cuda or torch.get_num_threads() > 1:
        return False
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for _ in range(ALONE_TRIALS):
            batch = torch.randint(0, 256, example.shape, generator=generator, dtype=torch.uint8)
            alone = [forward(batch[at : at + 1]) for at in range(len(batch))]
            if not torch.equal(forward(batch), torch.cat(alone)):
                return False
    return True


def _folded(network: TruncatedResNet18) -> TruncatedResNet18:
    """Fold every batch normalisation into the convolution before it, in float32."""
    network.conv1, network.bn1 = _fold(network.conv1, network.bn1)
    for block in (*network.layer1, *network.layer2):
        block.conv1, block.bn1 = _fold(block.conv1, block.bn1)
        block.conv2, block.bn2 = _fold(block.conv2, block.bn2)
        if block.downsample is not None:
            block.downsample[0], block.downsample[1] = _fold(*block.downsample)
    return network


def _fold(convolution: nn.Conv2d, normalisation: nn.BatchNorm2d) -> tuple[nn.Conv2d, Any]:
    return fuse_conv_bn_eval(convolution, normalisation), nn.Identity()
