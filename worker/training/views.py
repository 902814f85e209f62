"""The stream of training views, made in child processes while the network trains.

A view is a function of (seed, position in the stream), whichever process makes it, so a resumed
run sees what an uninterrupted one would have seen.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from worker.images import to_pixels
from worker.training import augment
from worker.training.photos import Photo, reduced

SPARE = 1.4  # a photo's short side over the view's: crops enlarge, but edits cost by the pixel


class Views(Dataset[tuple[NDArray[np.uint8], int]]):
    """Item i: uint8 (2, S, S, 3) reference and copy, with their photo's index.

    For the rotation objective: (1, S, S, 3) a turned mild view, with its number of quarter turns.
    """

    def __init__(self, photos: list[Photo], size: int, seed: int, objective: str) -> None:
        self.photos, self.seed, self.objective = photos, seed, objective
        self.resize(size)

    def resize(self, size: int) -> None:
        """Make views of another size from now on, out of photos just large enough for it."""
        self.size = size
        self.images = [reduced(photo.image, round(SPARE * size)) for photo in self.photos]

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, item: int) -> tuple[NDArray[np.uint8], int]:
        rng = np.random.default_rng((self.seed, 1, item))
        epoch, place = divmod(item, len(self.images))
        photo = int(_order(self.seed, epoch, len(self.images))[place])
        image = self.images[photo]
        mild = to_pixels(augment.mild_view(image, rng), self.size)
        if self.objective == "rotation":
            turns = int(rng.integers(4))
            return np.ascontiguousarray(np.rot90(mild, turns))[None], turns
        other = self.images[int(rng.integers(len(self.images)))]
        hard = to_pixels(augment.hard_view(image, other, rng), self.size)
        return np.stack([mild, hard]), photo


def batches(views: Views, batch: int, first_step: int, processes: int) -> Iterator[list[Tensor]]:
    """Batches from a step on, without end: [uint8 (batch, views, S, S, 3), int64 (batch,)]."""

    def positions() -> Iterator[list[int]]:
        start = first_step * batch
        while True:
            yield list(range(start, start + batch))
            start += batch

    options: dict[str, Any] = {"prefetch_factor": 4} if processes else {}
    return iter(
        DataLoader(
            views,
            batch_sampler=positions(),
            num_workers=processes,
            worker_init_fn=_one_thread,
            pin_memory=torch.cuda.is_available(),
            **options,
        )
    )


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, 0, epoch)).permutation(count)


def _one_thread(_process: int) -> None:
    torch.set_num_threads(1)
