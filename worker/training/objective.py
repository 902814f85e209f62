"""What training minimises. Tensors in, a scalar out; knows neither photos nor files.

Contrastive: InfoNCE (van den Oord et al., 2018) with the KoLeo entropy term of SSCD (Pizzi et
al., 2022). Strangers are those of the batch: a memory of past references (cross-batch memory, Wang
et al., 2020) was measured to do harm, since a network that begins at random moves away from them.

Rotation: which quarter turn was it (RotNet, Gidaris et al., 2018), for the comparison.
"""

from torch import Tensor, nn


def contrastive_loss(
    views: Tensor, photos: Tensor, temperature: float, entropy_weight: float
) -> Tensor:
    """Loss of n photos seen v times: views (v, n, 128) unit rows, photos (n,) their ids.

    The first views are the references, which each of the copies is to be close to.
    """
    rows, owners = views.flatten(0, 1), photos.repeat(len(views))
    strangers = (rows @ rows.T).masked_fill(owners[:, None] == owners[None, :], -2.0)

    positive = (views[0] * views[1:]).sum(2) / temperature
    negative = (strangers / temperature).logsumexp(1).reshape(views.shape[:2])
    asked = nn.functional.softplus(negative[:1] - positive).mean()
    answered = nn.functional.softplus(negative[1:] - positive).mean()

    nearest = strangers.amax(1)
    entropy = -(2 - 2 * nearest).clamp(min=1e-4).sqrt().log().mean()
    return (asked + answered) / 2 + entropy_weight * entropy


def rotation_loss(pooled: Tensor, head: nn.Linear, turns: Tensor) -> Tensor:
    """Cross-entropy of the quarter turn: pooled (n, 128), turns (n,) in 0..3."""
    return nn.functional.cross_entropy(head(pooled), turns)
