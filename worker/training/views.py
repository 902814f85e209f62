"""The stream of training views, made in child processes while the network trains.

A view is a function of (seed, position in the stream, look-alikes known), whichever process makes
it, so a resumed run sees what an uninterrupted one would have seen.

Photos that look alike are brought into one batch, since only they teach telling them apart: a
stranger drawn at random is soon too far away to (after the hard negatives of FaceNet, Schroff et
al., 2015).
"""

from collections.abc import Iterator
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
    """Item i: uint8 (3, S, S, 3), a reference, a copy with one edit and one with several, with
    their photo's index.

    For the rotation objective: (1, S, S, 3) a turned mild view, with its number of quarter turns.
    """

    def __init__(
        self, photos: list[Photo], size: int, seed: int, objective: str, reshots: int = 0
    ) -> None:
        """Every `reshots`-th item is a re-shot of the one before, a photo of its own; 0: none."""
        self.photos, self.seed, self.objective, self.reshots = photos, seed, objective, reshots
        self._drawn: tuple[int, NDArray[np.int64]] | None = None
        self.bring_together(None, 1)
        self.resize(size)

    def bring_together(self, near: NDArray[np.int32] | None, group: int) -> None:
        """From now on follow each photo by up to `group` - 1 of its look-alikes.

        `near` is (photos, k), the nearest first and padded with -1, or None for a random order.
        """
        self._near, self._group, self._drawn = near, group, None

    def resize(self, size: int) -> None:
        """Make views of another size from now on, out of photos just large enough for it."""
        self.size = size
        self.images = [reduced(photo.image, round(SPARE * size)) for photo in self.photos]

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, item: int) -> tuple[NDArray[np.uint8], int]:
        rng = np.random.default_rng((self.seed, 1, item))
        again = self.reshots > 0 and item % self.reshots == self.reshots - 1
        epoch, place = divmod(item - again, len(self.images))
        photo = int(self._order(epoch)[place])
        image = self.images[photo]
        if again:
            image, photo = augment.reshot(image, rng), ~photo
        other = self.images[int(rng.integers(len(self.images)))]
        mild = augment.mild_view(image, rng)
        if self.objective == "rotation":
            turns = int(rng.integers(4))
            return np.ascontiguousarray(np.rot90(to_pixels(mild, self.size), turns))[None], turns
        copies = augment.slight_view(image, other, rng), augment.hard_view(image, other, rng)
        return np.stack([to_pixels(view, self.size) for view in (mild, *copies)]), photo

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """The photos of an epoch, each once."""
        if self._drawn is None or self._drawn[0] != epoch:
            rng = np.random.default_rng((self.seed, 0, epoch))
            order = rng.permutation(len(self.images))
            if self._near is not None:
                groups = grouped(order, self._near, self._group)
                order = np.concatenate([groups[at] for at in rng.permutation(len(groups))])
            self._drawn = epoch, order
        return self._drawn[1]


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


def grouped(order: NDArray[np.int64], near: NDArray[np.int32], size: int) -> list[list[int]]:
    """Cut an order of photos into groups of at most `size`, none of them in two.

    A group begins with the next photo left and takes of its look-alikes, nearest first, those left.
    """
    left = np.ones(len(order), bool)
    groups = []
    for first in order.tolist():
        if not left[first]:
            continue
        alike = [other for other in near[first].tolist() if other >= 0 and left[other]]
        groups.append([first, *alike[: size - 1]])
        left[groups[-1]] = False
    return groups


def _one_thread(_process: int) -> None:
    torch.set_num_threads(1)
