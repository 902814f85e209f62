"""One network, a batch shared by threads: each lane embeds its part on a single core.

Splitting a batch once a step leaves the cores nothing to wait for inside it; splitting every
convolution (what torch does by itself) stalls all cores whenever one is busy with something else:
on two shared cores lanes were 2 to 3 times faster. Batch normalisation sees its lane's part only.
"""

import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

import torch
from torch import Tensor

from worker.network import TruncatedResNet18


class Lanes:
    """Replicas that share parameters and keep statistics of their own."""

    def __init__(self, network: TruncatedResNet18, count: int, device: str) -> None:
        shared = {id(parameter): parameter for parameter in network.parameters()}
        self.replicas = [copy.deepcopy(network, dict(shared)) for _ in range(count)]
        self.network, self.device = network, device
        self.pool = ThreadPoolExecutor(count, "lane", torch.set_num_threads, (1,))

    def forward(self, parts: Sequence[Tensor], *, pooled: bool = False) -> list[Tensor]:
        """Embed each part, uint8 (n, S, S, 3), in its lane: float32 (n, 128) with their graphs."""
        return list(self.pool.map(self._forward, self.replicas, parts, repeat(pooled)))

    def backward(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Carry the gradients of `forward`'s outputs to the parameters' `.grad`."""
        parameters = list(self.network.parameters())
        found = list(self.pool.map(_backward, outputs, gradients, repeat(parameters)))
        for parameter, *parts in zip(parameters, *found, strict=True):
            parameter.grad = torch.stack(parts).sum(0)
        self._average_statistics()

    def _forward(self, replica: TruncatedResNet18, part: Tensor, pooled: bool) -> Tensor:
        with torch.autocast(self.device.split(":")[0], torch.bfloat16):
            return (replica.pooled(part) if pooled else replica(part)).float()

    def adopt_statistics(self) -> None:
        """Give every replica the network's own statistics, after those were loaded."""
        for replica in self.replicas:
            for kept, own in zip(self.network.buffers(), replica.buffers(), strict=True):
                own.copy_(kept)

    def _average_statistics(self) -> None:
        every = [list(replica.buffers()) for replica in self.replicas]
        for kept, *theirs in zip(self.network.buffers(), *every, strict=True):
            kept.copy_(torch.stack(theirs).sum(0) / len(theirs))  # counters stay whole numbers
        self.adopt_statistics()


def deal(photos: int, views: int, lanes: int) -> list[Tensor]:
    """Deal the rows of a (views * photos) batch, view by view, to lanes.

    A photo's views go to different lanes, as far as there are any. Else they would carry the mark
    of their lane's batch statistics, and the network would learn to match marks (He et al., 2020,
    on MoCo).
    """
    rows = torch.arange(views * photos).reshape(views, photos)
    chunks = [row.tensor_split(lanes) for row in rows]
    return [
        torch.cat([chunks[view][(lane + view) % lanes] for view in range(views)])
        for lane in range(lanes)
    ]


def _backward(
    output: Tensor, gradient: Tensor, parameters: list[torch.nn.Parameter]
) -> tuple[Tensor, ...]:
    return torch.autograd.grad(output, parameters, gradient, materialize_grads=True)
