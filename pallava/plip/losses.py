"""Losses of PLIP pretraining: contrastive loss with soft targets, hard negative sampling.

Shapes: B pairs on this rank, M candidates, E embed_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_MIN_NEGATIVE_WEIGHT = 1e-4  # as in BLIP: every negative keeps a small probability


def contrastive_loss(
    feats: Tensor,
    feats_m: Tensor,
    candidates: Tensor,
    positive: Tensor,
    temperature: Tensor,
    alpha: float,
    ignored: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes one direction of ALBEF's ITC loss (arXiv:2107.07651, equation 6).

    The targets are uniform over a row's positives and mixed with the momentum model's predictions:
    `alpha * softmax(momentum similarities) + (1 - alpha) * positives`.

    Args:
        feats: `(B, E)` unit vectors.
        feats_m: `(B, E)` unit vectors of the momentum model.
        candidates: `(E, M)` unit vectors of the other modality.
        positive: `(B, M)`, True for positives; each row has at least one.
        temperature: Divisor of the similarities.
        alpha: Weight of the momentum model's predictions.
        ignored: `(M,)`, True for candidates to be excluded.

    Returns:
        The loss, and the similarities `(B, M)` without gradient.

    Example:
        >>> feats = F.normalize(torch.randn(4, 8), dim=-1)
        >>> loss, sim = contrastive_loss(feats, feats, feats.T, torch.eye(4).bool(),
        ...                              torch.tensor(0.07), alpha=0.4)
        >>> sim.shape
        torch.Size([4, 4])
    """
    # In half precision, a softmax over a long queue underflows for small probabilities.
    with torch.autocast(feats.device.type, enabled=False):
        sim = _similarity(feats, candidates, temperature, ignored)
        with torch.no_grad():
            target = positive / positive.sum(dim=1, keepdim=True)
            if alpha > 0:
                sim_m = _similarity(feats_m, candidates, temperature, ignored)
                target = alpha * sim_m.softmax(dim=1) + (1 - alpha) * target
        return F.cross_entropy(sim, target), sim.detach()


@torch.no_grad()
def hard_negatives(sim: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """Draws one negative per row, with probability increasing in similarity (ALBEF, section 3.2).

    Args:
        sim: `(B, M)` similarities.
        positive: `(B, M)`, True for candidates that are not negatives.

    Returns:
        Indices of candidates `(B,)`, and a mask `(B,)` of rows that have a negative at all.
    """
    weights = (sim.float().softmax(dim=1) + _MIN_NEGATIVE_WEIGHT).masked_fill(positive, 0)
    found = ~positive.all(dim=1)
    # A row without negatives draws an arbitrary candidate, which the caller masks in the loss.
    weights = torch.where(found[:, None], weights, torch.ones_like(weights))
    return torch.multinomial(weights, 1).squeeze(1), found


def ramped_alpha(alpha: float, step: int, ramp_steps: int) -> float:
    """Returns the weight of the soft targets: a linear ramp from 0 to `alpha`, then constant.

    ALBEF ramps it over the first epoch (arXiv:2107.07651, implementation details); the original
    PLIP code uses a constant weight.

    Args:
        alpha: Weight after the ramp.
        step: Number of completed steps.
        ramp_steps: Length of the ramp; 0 for none.

    Example:
        >>> [ramped_alpha(0.4, step, ramp_steps=4) for step in (0, 2, 4, 9)]
        [0.0, 0.2, 0.4, 0.4]
    """
    return alpha if ramp_steps <= 0 else alpha * min(1.0, step / ramp_steps)


def _similarity(
    feats: Tensor, candidates: Tensor, temperature: Tensor, ignored: Tensor | None
) -> Tensor:
    sim = feats @ candidates / temperature.float()
    if ignored is None:
        return sim
    # The lowest finite value, because -inf times a target of 0 is NaN.
    return sim.masked_fill(ignored, torch.finfo(sim.dtype).min)
