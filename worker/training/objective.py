"""What training minimises. Tensors in, a scalar out; knows neither photos nor files.

Contrastive: InfoNCE (van den Oord et al., 2018) with a memory of past references (cross-batch
memory, Wang et al., 2020) and the KoLeo entropy term of SSCD (Pizzi et al., 2022).

Rotation: which quarter turn was it (RotNet, Gidaris et al., 2018), for the comparison.
"""

import torch
from torch import Tensor, nn

TEMPERATURE = 0.05
ENTROPY_WEIGHT = 2.0


class Memory(nn.Module):
    """The last `capacity` reference embeddings and the photos they came from."""

    vectors: Tensor
    photos: Tensor
    cursor: Tensor

    def __init__(self, capacity: int, dimensions: int) -> None:
        super().__init__()
        self.register_buffer("vectors", torch.zeros(capacity, dimensions))
        self.register_buffer("photos", torch.full((capacity,), -1))
        self.register_buffer("cursor", torch.zeros((), dtype=torch.long))

    def add(self, vectors: Tensor, photos: Tensor) -> None:
        """Overwrite the oldest entries."""
        slots = (self.cursor + torch.arange(len(photos), device=photos.device)) % len(self.photos)
        self.vectors[slots] = vectors.detach().float()
        self.photos[slots] = photos
        self.cursor.copy_((self.cursor + len(photos)) % len(self.photos))


def contrastive_loss(references: Tensor, copies: Tensor, photos: Tensor, memory: Memory) -> Tensor:
    """Loss of n pairs: references and copies (n, 128) unit rows, photos (n,) their ids."""
    views, owners = torch.cat([references, copies]), torch.cat([photos, photos])
    candidates = torch.cat([views, memory.vectors])
    theirs = torch.cat([owners, memory.photos])
    similarity = views @ candidates.T
    stranger = (owners[:, None] != theirs[None, :]) & (theirs[None, :] >= 0)
    strangers = similarity.masked_fill(~stranger, -2.0)

    positive = (references * copies).sum(1).repeat(2) / TEMPERATURE
    negative = (strangers / TEMPERATURE).logsumexp(1)
    attraction = nn.functional.softplus(negative - positive).mean()

    nearest = strangers.amax(1)
    entropy = -(2 - 2 * nearest).clamp(min=1e-4).sqrt().log().mean()
    return attraction + ENTROPY_WEIGHT * entropy


def rotation_loss(pooled: Tensor, head: nn.Linear, turns: Tensor) -> Tensor:
    """Cross-entropy of the quarter turn: pooled (n, 128), turns (n,) in 0..3."""
    return nn.functional.cross_entropy(head(pooled), turns)
