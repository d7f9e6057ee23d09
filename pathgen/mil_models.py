"""Attention MIL: a slide's class from the features of its patches.

Shapes: N patches of a slide, D features of each, E after projection, B branches of attention, K
classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BagOutput(NamedTuple):
    """What a model says of a slide.

    Attributes:
        logits: `(K,)`.
        attention: `(B, N)`, each row sums to 1.
        branch_logits: `(B, K)`, or None where there are no branches of their own.
    """

    logits: Tensor
    attention: Tensor
    branch_logits: Tensor | None = None


class GatedAttention(nn.Module):
    """Scores of patches: `w^T (tanh(V h) * sigm(U h))`, one `w` per branch.

    Ilse, Tomczak and Welling 2018, equation 9 (https://arxiv.org/abs/1802.04712); the softmax over
    patches is left to the caller.

    Args:
        embed_dim: E.
        hidden_dim: Rows of U and V.
        num_branches: B.
    """

    def __init__(self, embed_dim: int, hidden_dim: int, num_branches: int = 1) -> None:
        super().__init__()
        self.value = nn.Linear(embed_dim, hidden_dim)
        self.gate = nn.Linear(embed_dim, hidden_dim)
        self.weight = nn.Linear(hidden_dim, num_branches)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Returns `(B, N)` of `(N, E)`."""
        gated = torch.tanh(self.value(embeddings)) * torch.sigmoid(self.gate(embeddings))
        return self.weight(gated).T


class ABMIL(nn.Module):
    """Attention-based MIL with gated attention (Ilse et al. 2018, equations 7 and 9).

    Args:
        in_dim: D.
        num_classes: K.
        embed_dim: E.
        hidden_dim: Of the attention.
        dropout: Of the embeddings.
    """

    def __init__(
        self,
        in_dim: int,
        num_classes: int,
        embed_dim: int = 512,
        hidden_dim: int = 256,
        dropout: float = 0.25,
    ) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.Linear(in_dim, embed_dim), nn.ReLU(), nn.Dropout(dropout))
        self.attention = GatedAttention(embed_dim, hidden_dim)
        self.classifier = nn.Linear(embed_dim, num_classes)

    def forward(self, features: Tensor) -> BagOutput:
        """Classifies a bag `(N, D)`."""
        embeddings = self.project(features)
        attention = self.attention(embeddings).softmax(dim=-1)
        return BagOutput(self.classifier(attention @ embeddings)[0], attention)

    def loss(self, output: BagOutput, label: Tensor) -> Tensor:
        """Cross entropy; `label` is a scalar."""
        return F.cross_entropy(output.logits, label)


class ACMIL(nn.Module):
    """Attention-challenging MIL (Zhang et al. 2024, https://arxiv.org/abs/2311.07125).

    Several attention branches, each with a classifier of its own and pushed to look elsewhere
    (its multiple branch attention), and random masking of the patches with the highest attention in
    training (its stochastic top-k instance masking). The slide's attention is the mean of the
    branches'.

    Args:
        in_dim: D.
        num_classes: K.
        embed_dim: E.
        hidden_dim: Of the attention.
        num_branches: B; the paper's 5.
        num_masked: Patches with the highest attention of a branch that may be masked; its 10.
        mask_probability: Share of them that is; its 0.6.
        dropout: Of the embeddings.
    """

    def __init__(
        self,
        in_dim: int,
        num_classes: int,
        embed_dim: int = 512,
        hidden_dim: int = 256,
        num_branches: int = 5,
        num_masked: int = 10,
        mask_probability: float = 0.6,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= mask_probability < 1:
            raise ValueError(f"mask_probability {mask_probability}: from 0 to below 1 expected")
        self.num_masked = num_masked
        self.mask_probability = mask_probability
        self.project = nn.Sequential(nn.Linear(in_dim, embed_dim), nn.ReLU(), nn.Dropout(dropout))
        self.attention = GatedAttention(embed_dim, hidden_dim, num_branches)
        self.branches = nn.ModuleList(
            nn.Linear(embed_dim, num_classes) for _ in range(num_branches)
        )
        self.classifier = nn.Linear(embed_dim, num_classes)

    def forward(self, features: Tensor) -> BagOutput:
        """Classifies a bag `(N, D)`."""
        embeddings = self.project(features)
        scores = self.attention(embeddings)
        if self.training:
            scores = self._mask(scores)
        attention = scores.softmax(dim=-1)
        pooled = attention @ embeddings
        branch_logits = torch.stack(
            [classify(row) for classify, row in zip(self.branches, pooled, strict=True)]
        )
        return BagOutput(self.classifier(pooled.mean(dim=0)), attention, branch_logits)

    def loss(self, output: BagOutput, label: Tensor) -> Tensor:
        """Cross entropy of slide and branches, plus the branches' mean cosine similarity.

        `L = L_slide + L_branches + L_d`, `L_d = 2 / (B (B - 1)) sum_{i<j} cos(a_i, a_j)` with the
        attention `a_i` of branch i, as in the paper. `label` is a scalar.
        """
        assert output.branch_logits is not None
        num_branches = len(output.branch_logits)
        slide = F.cross_entropy(output.logits, label)
        branches = F.cross_entropy(output.branch_logits, label.expand(num_branches))
        if num_branches == 1:
            return slide + branches
        similarity = F.normalize(output.attention, dim=-1)
        similarity = similarity @ similarity.T
        pairs = torch.triu_indices(num_branches, num_branches, offset=1)
        return slide + branches + similarity[pairs[0], pairs[1]].mean()

    def _mask(self, scores: Tensor) -> Tensor:
        num_top = min(self.num_masked, scores.shape[1])
        num_hidden = int(num_top * self.mask_probability)
        if not num_hidden:
            return scores
        top = scores.topk(num_top, dim=-1).indices
        chosen = torch.rand(top.shape, device=scores.device).argsort(dim=-1)[:, :num_hidden]
        return scores.scatter(-1, top.gather(-1, chosen), float("-inf"))


MODELS: dict[str, type[nn.Module]] = {"abmil": ABMIL, "acmil": ACMIL}
