"""Attention MIL: classifies a slide from the features of its tiles and says where it looked.

Shapes: N tiles of a slide, D features per tile, E embedding width, B attention branches, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BagOutput(NamedTuple):
    """Output of a bag model for one slide.

    Attributes:
        logits: `(K,)`.
        attention: `(B, N)`; each row sums to 1.
        branch_logits: `(B, K)` if each branch has its own classifier, else None.
    """

    logits: Tensor
    attention: Tensor
    branch_logits: Tensor | None = None


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns cross-entropy for class indices, binary cross-entropy for one 0/1 label per class.

    Args:
        logits: `(..., K)`.
        labels: `(...)` class indices, or `(..., K)` zeros and ones.
    """
    if labels.ndim == logits.ndim:
        return F.binary_cross_entropy_with_logits(logits, labels.float())
    return F.cross_entropy(logits, labels)


class MILModel(nn.Module):
    """Base class of models that classify one bag of tiles at a time.

    The trainer feeds it one slide after the other, so that slides need no padding, and draws heat
    maps from its attention.
    """

    def forward(self, features: Tensor) -> BagOutput:
        """Classifies a bag `(N, D)`."""
        raise NotImplementedError

    def loss(self, output: BagOutput, label: Tensor) -> Tensor:
        """Returns the training loss of one slide; see `classification_loss` for `label`."""
        return classification_loss(output.logits, label)


class GatedAttention(nn.Module):
    """Gated attention scores `w^T (tanh(V h) * sigm(U h))`, with one `w` per branch.

    Equation 9 of Ilse, Tomczak and Welling 2018 (https://arxiv.org/abs/1802.04712), without the
    softmax over tiles, because ACMIL masks scores before it.

    Args:
        embed_dim: E.
        hidden_dim: Rows of V and U.
        num_branches: B.
    """

    def __init__(self, embed_dim: int, hidden_dim: int, num_branches: int = 1) -> None:
        super().__init__()
        self.value = nn.Linear(embed_dim, hidden_dim)
        self.gate = nn.Linear(embed_dim, hidden_dim)
        self.weight = nn.Linear(hidden_dim, num_branches)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Maps embeddings `(N, E)` to scores `(B, N)`."""
        gated = torch.tanh(self.value(embeddings)) * torch.sigmoid(self.gate(embeddings))
        return self.weight(gated).T


class ABMIL(MILModel):
    """Attention-based MIL with gated attention (Ilse et al. 2018, equations 7 and 9).

    Example:
        >>> import torch
        >>> model = ABMIL(in_dim=1536, num_classes=3).eval()
        >>> output = model(torch.zeros(100, 1536))
        >>> output.logits.shape, output.attention.shape
        (torch.Size([3]), torch.Size([1, 100]))

    Args:
        in_dim: D.
        num_classes: K.
        embed_dim: E.
        hidden_dim: Width of the attention.
        dropout: Dropout of the embeddings.
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


class ACMIL(MILModel):
    """Attention-challenging MIL (Zhang et al. 2024, https://arxiv.org/abs/2311.07125).

    Several attention branches, each with its own classifier and pushed to attend to different tiles
    ("multiple branch attention"); in training, some of the tiles with the highest attention are
    masked at random ("stochastic top-k instance masking"). The attention of the slide is the mean
    over the branches.

    Args:
        in_dim: D.
        num_classes: K.
        embed_dim: E.
        hidden_dim: Width of the attention.
        num_branches: B; 5 in the paper.
        num_masked: Number of top tiles of each branch that may be masked; 10 in the paper.
        mask_probability: Fraction of these tiles that is masked; 0.6 in the paper.
        dropout: Dropout of the embeddings.
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
            raise ValueError(
                f"mask_probability: expected 0 <= mask_probability < 1, found {mask_probability}"
            )
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
        """Returns the loss of slide and branches, plus the branches' mean cosine similarity.

        `L = L_slide + L_branches + L_d` with `L_d = 2 / (B (B - 1)) sum_{i<j} cos(a_i, a_j)`, where
        `a_i` is the attention of branch i, as in the paper.
        """
        assert output.branch_logits is not None
        num_branches = len(output.branch_logits)
        slide = classification_loss(output.logits, label)
        branches = classification_loss(
            output.branch_logits, label.expand(num_branches, *label.shape)
        )
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


@dataclass(frozen=True)
class BagModel:
    """A model that is trained on the same bags and splits as the slide encoder.

    Attributes:
        build: Called as `build(input_dim, num_classes, **options)`; returns a `MILModel`, or a
            module called as `module(features, coords, lengths=...)` on a padded batch that returns
            logits `(num_slides, K)`.
        settings: Fields of `FinetuneSettings` that differ from those of the run.
        options: Keyword arguments of `build`.
    """

    build: Callable[..., nn.Module]
    settings: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


MIL_SETTINGS: Mapping[str, Any] = {
    "epochs": 50,
    "lr": 2e-4,
    "min_lr": 0.0,
    "warmup_epochs": 0.0,
    "optim_wd": 1e-5,
    "layer_decay": 1.0,
    "gc": 1,
    "batch_size": 1,
    "model_select": "val",
    "patience": 0,
}
"""Training settings of the bag models: one slide per step, as ABMIL and CLAM train."""

MODELS: Mapping[str, BagModel] = {
    "abmil": BagModel(ABMIL, MIL_SETTINGS),
    "acmil": BagModel(ACMIL, MIL_SETTINGS),
}
"""Bag models by method name."""
