"""What training minimises. Tensors in, a scalar out; knows neither photos nor files.

Contrastive: InfoNCE (van den Oord et al., 2018) with the KoLeo entropy term of SSCD (Pizzi et
al., 2022). Strangers are those of the batch: a memory of past references (cross-batch memory, Wang
et al., 2020) was measured to do harm, since a network that begins at random moves away from them.

Rotation: which quarter turn was it (RotNet, Gidaris et al., 2018), for the comparison.
"""

import torch
from torch import Tensor, nn


def contrastive_loss(
    references: Tensor, copies: Tensor, photos: Tensor, temperature: float, entropy_weight: float
) -> Tensor:
    """Loss of n pairs: references and copies (n, 128) unit rows, photos (n,) their ids."""
    views, owners = torch.cat([references, copies]), torch.cat([photos, photos])
    strangers = (views @ views.T).masked_fill(owners[:, None] == owners[None, :], -2.0)

    positive = (references * copies).sum(1).repeat(2) / temperature
    negative = (strangers / temperature).logsumexp(1)
    attraction = nn.functional.softplus(negative - positive).mean()

    nearest = strangers.amax(1)
    entropy = -(2 - 2 * nearest).clamp(min=1e-4).sqrt().log().mean()
    return attraction + entropy_weight * entropy


def rotation_loss(pooled: Tensor, head: nn.Linear, turns: Tensor) -> Tensor:
    """Cross-entropy of the quarter turn: pooled (n, 128), turns (n,) in 0..3."""
    return nn.functional.cross_entropy(head(pooled), turns)
