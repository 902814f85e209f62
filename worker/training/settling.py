"""After the last step: exact statistics for the weights as they now are.

While weights move, running averages lag behind them; in the middle of a run that alone cost more
than 0.05 of average precision. The whitening (Jégou and Chum, 2012) makes the 128 dimensions of
untouched photos uncorrelated and equally strong, so that strangers fall further apart. Nothing is
learned here by gradient, and nothing is added to the parameters.
"""

from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

from worker.images import to_pixels
from worker.network import DIMENSIONS, TruncatedResNet18
from worker.training.photos import Photo
from worker.training.run import Run
from worker.training.views import Views, batches

BATCHES = 16  # whose statistics are averaged
PHOTOS = 4000  # at most, for the whitening
RIDGE = 0.1  # of the mean variance, added to each direction's: weak ones are mostly noise
AT_ONCE = 64


def settle(run: Run, views: Views, photos: list[Photo]) -> None:
    """Measure batch statistics on training views, then whiten by untouched training photos."""
    if views.size != run.recipe.size:
        views.resize(run.recipe.size)
    views.bring_together(run.near, run.recipe.alike)  # a run taken up at its end did not
    _measure_statistics(run, views)
    directions = _directions(
        run.network, photos[:: -(-len(photos) // PHOTOS)], run.recipe.size, run.device
    )
    whiten(run.network, directions)


def whiten(network: TruncatedResNet18, directions: Tensor) -> None:
    """Set centring and whitening from (n, 128) unit rows of the pooled network."""
    scaled = directions.double() * DIMENSIONS**0.5
    variance, mean = torch.var_mean(scaled, 0, correction=0)
    network.centring.running_mean, network.centring.running_var = mean.float(), variance.float()
    centred = (scaled - mean) / (variance + network.centring.eps).sqrt()
    strengths, axes = torch.linalg.eigh(centred.T @ centred / len(centred))
    gains = (strengths + RIDGE * strengths.mean()).rsqrt()
    network.get_buffer("whitening").copy_((axes * gains) @ axes.T)


@torch.no_grad()
def _measure_statistics(run: Run, views: Views) -> None:
    """Replace running averages by the plain average over some batches."""
    layers = [layer for layer in run.network.modules() if isinstance(layer, nn.BatchNorm2d)]
    usual = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = None  # torch's word for a plain average
        layer.reset_running_stats()
    run.network.train()
    # A stream of its own, far behind any step's views.
    for pixels, _ in islice(batches(views, AT_ONCE, 2**40, 0), BATCHES):
        run.network.pooled(pixels.to(run.device).flatten(0, 1))
    for layer, momentum in zip(layers, usual, strict=True):
        layer.momentum = momentum
    run.network.eval()


@torch.no_grad()
def _directions(network: TruncatedResNet18, photos: list[Photo], size: int, device: str) -> Tensor:
    rows = []
    for at in range(0, len(photos), AT_ONCE):
        pixels = np.stack([to_pixels(photo.image, size) for photo in photos[at : at + AT_ONCE]])
        rows.append(nn.functional.normalize(network.pooled(torch.from_numpy(pixels).to(device))))
    return torch.cat(rows).cpu()
