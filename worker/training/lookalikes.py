"""Which photos look alike to the network as it is now: whom to train it against."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from worker.images import to_pixels
from worker.training.photos import Photo
from worker.training.run import Run

KNOWN = 64  # look-alikes remembered of each photo, of which some are taken already in an epoch
TWIN = 0.97  # more alike is one picture under other bytes, and nothing to tell apart
AT_ONCE = 64


@torch.no_grad()
def look_alikes(run: Run, photos: list[Photo]) -> NDArray[np.int32]:
    """(photos, KNOWN) indices of each photo's nearest others, nearest first, padded with -1."""
    run.network.eval()
    rows = torch.cat(
        [_embed(run, photos[at : at + AT_ONCE]) for at in range(0, len(photos), AT_ONCE)]
    )
    run.network.train()
    known = min(KNOWN, len(photos) - 1)
    near = []
    for at in range(0, len(rows), 1024):
        likeness = rows[at : at + 1024] @ rows.T
        likeness[likeness > TWIN] = -2  # the photo itself, too
        alike, places = likeness.topk(known, 1)
        near.append(places.masked_fill(alike == -2, -1).to(torch.int32).cpu().numpy())
    return np.concatenate(near)


def _embed(run: Run, photos: list[Photo]) -> Tensor:
    pixels = torch.from_numpy(np.stack([to_pixels(photo.image, run.size()) for photo in photos]))
    with torch.autocast(run.device.split(":")[0], torch.bfloat16):
        rows: Tensor = run.network(pixels.to(run.device))
    return rows.float()
