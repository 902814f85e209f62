"""ResNet-18 cut after layer2, pooled to 128 unit-length numbers. Knows no files, no images.

683,072 parameters. Pixels are centred and scaled by their own picture's mean and deviation, which
takes brightness and contrast out before anything has to be learned. Pooling is the generalised mean
(GeM, Radenovic et al., 2018). Its direction is centred and scaled per dimension by stored
statistics, because features after a ReLU all point the same way and their cosines crowd together
near 1; the direction, not the raw features, since those grow with the light. A stored whitening
then evens out what the dimensions share. The network ends in its own normalisation, so similarity
is a dot product everywhere (as in SSCD).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

DIMENSIONS = 128
PARAMETER_COUNT = 683_072
POOLING_EXPONENT = 3.0
PER_IMAGE = "per image"  # pixels centred and scaled by their own picture's light
PER_DATASET = "imagenet"  # by ImageNet's statistics, as torchvision's weights want them
NEARLY_FLAT = 8.0  # levels; keeps a plain picture's noise from being blown up
TRUNK = ("conv1", "bn1", "layer1", "layer2")


class TruncatedResNet18(nn.Module):
    """uint8 pixels (n, S, S, 3) to float32 unit rows (n, 128)."""

    def __init__(self, normalisation: str = PER_IMAGE) -> None:
        super().__init__()
        if normalisation not in (PER_IMAGE, PER_DATASET):
            raise ValueError(f"unknown normalisation {normalisation!r}")
        self.per_image = normalisation == PER_IMAGE
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(_Block(64, 64, 1), _Block(64, 64, 1))
        self.layer2 = nn.Sequential(_Block(64, 128, 2), _Block(128, 128, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # as torchvision begins (He et al., 2015)
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.centring = nn.BatchNorm1d(DIMENSIONS, affine=False)  # statistics, no parameters
        self.register_buffer("whitening", torch.eye(DIMENSIONS))  # statistics too, see settling.py
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]) * 255, persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]) * 255, persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Embed; rows have unit length."""
        direction = nn.functional.normalize(self.pooled(pixels))
        centred = self.centring(direction * DIMENSIONS**0.5)
        # A matrix product adds up in another order for another number of rows: summed like this a
        # picture's vector is the same to the bit, whatever company it is embedded in.
        whitened = (centred[:, :, None] * self.get_buffer("whitening")).sum(1)
        return nn.functional.normalize(whitened)

    def pooled(self, pixels: Tensor) -> Tensor:
        """Features after pooling, before centring: float32 (n, 128), not negative."""
        values = self._normalised(pixels).to(self.conv1.weight.dtype)
        values = torch.relu(self.bn1(self.conv1(values.permute(0, 3, 1, 2))))
        values = self.layer2(self.layer1(self.maxpool(values)))
        return _generalised_mean(values.float())

    def _normalised(self, pixels: Tensor) -> Tensor:
        if not self.per_image:
            return (pixels - self.get_buffer("mean")) / self.get_buffer("std")
        values = pixels.float()
        std, mean = torch.std_mean(values, (1, 2, 3), correction=0, keepdim=True)
        return (values - mean) / (std + NEARLY_FLAT)


class _Block(nn.Module):
    """Two convolutions and a way around them (He et al., 2016), named as in torchvision.

    Written out, as importing torchvision's models takes as long as importing torch itself.
    """

    def __init__(self, entering: int, leaving: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(entering, leaving, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(leaving)
        self.conv2 = nn.Conv2d(leaving, leaving, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(leaving)
        self.downsample: nn.Sequential | None = None
        if stride != 1:
            around = nn.Conv2d(entering, leaving, 1, stride, bias=False)
            self.downsample = nn.Sequential(around, nn.BatchNorm2d(leaving))

    def forward(self, values: Tensor) -> Tensor:
        inner = nn.functional.relu(self.bn1(self.conv1(values)), inplace=True)
        inner = self.bn2(self.conv2(inner))
        inner += values if self.downsample is None else self.downsample(values)
        return nn.functional.relu(inner, inplace=True)


def cut(full: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keep of a full torchvision ResNet-18 state dict what the truncated network holds."""
    return {name: value for name, value in full.items() if name.split(".")[0] in TRUNK}


def _generalised_mean(features: Tensor) -> Tensor:
    powers = features.clamp(min=1e-6).pow(POOLING_EXPONENT)
    return powers.mean((2, 3)).pow(1 / POOLING_EXPONENT)
