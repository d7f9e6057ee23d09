"""Pieces of PLIP's objectives: contrastive loss with soft targets, hard negatives.

Shapes: B pairs of this rank, M candidates, E embed_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_MIN_NEGATIVE_WEIGHT = 1e-4  # BLIP: no pair is wholly excluded as a hard negative


def contrastive_loss(
    feats: Tensor,
    feats_m: Tensor,
    candidates: Tensor,
    positive: Tensor,
    temperature: Tensor,
    alpha: float,
    ignored: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One direction of ALBEF's ITC (arXiv:2107.07651, equation 6).

    The target is spread evenly over a row's positives and mixed with what the momentum model
    thinks: `alpha * softmax(momentum similarities) + (1 - alpha) * positives`.

    Args:
        feats: `(B, E)` unit vectors.
        feats_m: `(B, E)` of the momentum model.
        candidates: `(E, M)` unit vectors of the other modality.
        positive: `(B, M)`, true where a candidate is right; at least one in every row.
        temperature: Divides the similarities.
        alpha: Weight of the momentum model.
        ignored: `(M,)`, true where a candidate does not count at all.

    Returns:
        The loss, and the similarities `(B, M)` without gradient.
    """
    # In half precision a softmax over a long queue loses the small probabilities.
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
    """Draws one negative for every row, the more similar the likelier (ALBEF, section 3.2).

    Args:
        sim: `(B, M)` similarities.
        positive: `(B, M)`, true where the candidate is no negative.

    Returns:
        Candidates `(B,)`, and `(B,)` whether the row has a negative at all.
    """
    weights = (sim.float().softmax(dim=1) + _MIN_NEGATIVE_WEIGHT).masked_fill(positive, 0)
    found = ~positive.all(dim=1)
    # A row without a negative draws any candidate; the caller leaves it out of the loss.
    weights = torch.where(found[:, None], weights, torch.ones_like(weights))
    return torch.multinomial(weights, 1).squeeze(1), found


def ramped_alpha(alpha: float, step: int, ramp_steps: int) -> float:
    """Weight of the soft targets at a step: from 0 to `alpha`, then constant.

    ALBEF raises it over the first epoch (arXiv:2107.07651, implementation details); the original
    of PLIP takes the weight as given.

    Args:
        alpha: The weight after the ramp.
        step: Steps done.
        ramp_steps: Length of the ramp; 0: none.
    """
    return alpha if ramp_steps <= 0 else alpha * min(1.0, step / ramp_steps)


def _similarity(
    feats: Tensor, candidates: Tensor, temperature: Tensor, ignored: Tensor | None
) -> Tensor:
    sim = feats @ candidates / temperature.float()
    if ignored is None:
        return sim
    # The lowest number, not -inf: times a target of 0 that would be NaN.
    return sim.masked_fill(ignored, torch.finfo(sim.dtype).min)
