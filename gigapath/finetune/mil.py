"""Multiple instance learning: predicts for a slide from the features of its tiles.

All models are written from the equations of their papers and trained by one engine, with the same
splits, settings and scores. Most of them also say where they looked.

Shapes: N tiles of a slide, D features per tile, E embedding width, B attention branches, K classes,
S slides of a batch.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BagOutput(NamedTuple):
    """Output of a bag model for one slide.

    Attributes:
        logits: `(K,)`.
        attention: `(B, N)`; each row sums to 1. None for models without attention.
        branch_logits: `(B, K)` if each branch has its own classifier, else None.
        instance_logits: `(K, N, 2)`: for each class, whether a tile is evidence against it or for
            it, if the model learns that, else None.
    """

    logits: Tensor
    attention: Tensor | None = None
    branch_logits: Tensor | None = None
    instance_logits: Tensor | None = None


Criterion = Callable[[Tensor, Tensor], Tensor]
"""Maps logits `(S, K)` and labels `(S, ...)` to a loss."""


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
    """Base class of models that take one bag of tiles at a time.

    The trainer feeds it one slide after the other, so that slides need no padding, and draws heat
    maps from its attention.

    Attributes:
        has_attention: Whether outputs have attention over the tiles.
        attention_per_class: Whether row k of the attention belongs to class k.
    """

    has_attention = True
    attention_per_class = False

    def forward(self, features: Tensor) -> BagOutput:
        """Classifies a bag `(N, D)`."""
        raise NotImplementedError

    def loss(
        self,
        outputs: Sequence[BagOutput],
        labels: Tensor,
        criterion: Criterion = classification_loss,
    ) -> Tensor:
        """Returns the training loss of a batch of slides.

        Args:
            outputs: Output of each slide.
            labels: `(S, ...)`, as `criterion` takes them.
            criterion: Loss of the logits.
        """
        return criterion(torch.stack([output.logits for output in outputs]), labels)

    def heat(self, output: BagOutput) -> Tensor:
        """Returns the attention `(N,)` to draw: of the predicted class, or the mean over branches.

        Raises:
            ValueError: If the model has no attention.
        """
        if output.attention is None:
            raise ValueError(f"{type(self).__name__} has no attention over tiles")
        if self.attention_per_class:
            return output.attention[int(output.logits.argmax())]
        return output.attention.mean(dim=0)


def _projection(in_dim: int, embed_dim: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_dim, embed_dim), nn.ReLU(), nn.Dropout(dropout))


class MeanPool(MILModel):
    """Linear classifier of the mean over the embeddings of all tiles.

    The embedding-level pooling of Ilse et al. 2018, equation 5, with the mean.

    Args:
        in_dim: D.
        num_classes: K.
        embed_dim: E.
        dropout: Dropout of the embeddings.
    """

    has_attention = False

    def __init__(
        self, in_dim: int, num_classes: int, embed_dim: int = 512, dropout: float = 0.25
    ) -> None:
        super().__init__()
        self.project = _projection(in_dim, embed_dim, dropout)
        self.classifier = nn.Linear(embed_dim, num_classes)

    def forward(self, features: Tensor) -> BagOutput:
        """Classifies a bag `(N, D)`."""
        return BagOutput(self.classifier(self.pool(self.project(features))))

    def pool(self, embeddings: Tensor) -> Tensor:
        """Maps embeddings `(N, E)` to the vector of the slide `(E,)`."""
        return embeddings.mean(dim=0)


class MaxPool(MeanPool):
    """Like `MeanPool`, with the maximum over the tiles in each dimension of the embeddings."""

    def pool(self, embeddings: Tensor) -> Tensor:
        """Maps embeddings `(N, E)` to the vector of the slide `(E,)`."""
        return embeddings.amax(dim=0)


class GatedAttention(nn.Module):
    """Gated attention scores `w^T (tanh(V h) * sigm(U h))`, with one `w` per branch.

    Equation 9 of Ilse, Tomczak and Welling 2018 (https://arxiv.org/abs/1802.04712), without the
    softmax over tiles, because ACMIL masks scores before it.

    Args:
        embed_dim: E.
        hidden_dim: Rows of V and U.
        num_branches: B.
        dropout: Dropout of `tanh(V h)` and of `sigm(U h)`.
    """

    def __init__(
        self, embed_dim: int, hidden_dim: int, num_branches: int = 1, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.value = nn.Linear(embed_dim, hidden_dim)
        self.gate = nn.Linear(embed_dim, hidden_dim)
        self.weight = nn.Linear(hidden_dim, num_branches)
        self.dropout = nn.Dropout(dropout)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Maps embeddings `(N, E)` to scores `(B, N)`."""
        value, gate = torch.tanh(self.value(embeddings)), torch.sigmoid(self.gate(embeddings))
        return self.weight(self.dropout(value) * self.dropout(gate)).T


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
        self.project = _projection(in_dim, embed_dim, dropout)
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
        self.project = _projection(in_dim, embed_dim, dropout)
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

    def loss(
        self,
        outputs: Sequence[BagOutput],
        labels: Tensor,
        criterion: Criterion = classification_loss,
    ) -> Tensor:
        """Returns the loss of slides and branches, plus the branches' mean cosine similarity.

        `L = L_slide + L_branches + L_d` with `L_d = 2 / (B (B - 1)) sum_{i<j} cos(a_i, a_j)`, where
        `a_i` is the attention of branch i, as in the paper.
        """
        loss = super().loss(outputs, labels, criterion) + _branch_loss(outputs, labels, criterion)
        if len(self.branches) == 1:
            return loss
        pairs = torch.triu_indices(len(self.branches), len(self.branches), offset=1)
        similarities = []
        for output in outputs:
            assert output.attention is not None
            normalized = F.normalize(output.attention, dim=-1)
            similarities.append((normalized @ normalized.T)[pairs[0], pairs[1]].mean())
        return loss + torch.stack(similarities).mean()

    def _mask(self, scores: Tensor) -> Tensor:
        num_top = min(self.num_masked, scores.shape[1])
        num_hidden = int(num_top * self.mask_probability)
        if not num_hidden:
            return scores
        top = scores.topk(num_top, dim=-1).indices
        chosen = torch.rand(top.shape, device=scores.device).argsort(dim=-1)[:, :num_hidden]
        return scores.scatter(-1, top.gather(-1, chosen), float("-inf"))


def _branch_loss(outputs: Sequence[BagOutput], labels: Tensor, criterion: Criterion) -> Tensor:
    """Returns the mean over the branches of their loss."""
    logits = torch.stack([o.branch_logits for o in outputs if o.branch_logits is not None])
    return torch.stack([criterion(branch, labels) for branch in logits.unbind(dim=1)]).mean()


class CLAM(MILModel):
    """Clustering-constrained attention MIL (Lu et al. 2021, https://arxiv.org/abs/2004.09666).

    Gated attention as in `ABMIL`. In addition, each class has a linear classifier of tiles, which
    learns from the attention: of the slide's own class, the tiles with the highest attention are
    evidence for it and those with the lowest are evidence against it; of the other classes, which
    are assumed to exclude it, the tiles with the highest attention are evidence against them.

    Args:
        in_dim: D.
        num_classes: K.
        embed_dim: E.
        hidden_dim: Width of the attention.
        multi_branch: One attention branch and one-dimensional classifier per class (CLAM-MB)
            instead of one branch for all (CLAM-SB).
        num_instances: Number of tiles taken from each end of the attention; 8 in the paper.
        bag_weight: Weight of the slide's loss; the loss of the tiles has the rest. 0.7 in the
            paper.
        dropout: Dropout of embeddings and attention; 0.25 in the paper.
    """

    def __init__(
        self,
        in_dim: int,
        num_classes: int,
        embed_dim: int = 512,
        hidden_dim: int = 256,
        multi_branch: bool = False,
        num_instances: int = 8,
        bag_weight: float = 0.7,
        dropout: float = 0.25,
    ) -> None:
        super().__init__()
        if not 0 < bag_weight <= 1:
            raise ValueError(f"bag_weight: expected 0 < bag_weight <= 1, found {bag_weight}")
        self.attention_per_class = multi_branch
        self.num_instances, self.bag_weight = num_instances, bag_weight
        self.project = _projection(in_dim, embed_dim, dropout)
        self.attention = GatedAttention(
            embed_dim, hidden_dim, num_classes if multi_branch else 1, dropout
        )
        # With several branches, row k is applied to the vector of branch k only.
        self.classifier = nn.Linear(embed_dim, num_classes)
        self.instances = nn.ModuleList(nn.Linear(embed_dim, 2) for _ in range(num_classes))

    def forward(self, features: Tensor) -> BagOutput:
        """Classifies a bag `(N, D)`."""
        embeddings = self.project(features)
        attention = self.attention(embeddings).softmax(dim=-1)
        pooled = attention @ embeddings
        if self.attention_per_class:
            logits = (pooled * self.classifier.weight).sum(dim=-1) + self.classifier.bias
        else:
            logits = self.classifier(pooled[0])
        instance_logits = torch.stack([classify(embeddings) for classify in self.instances])
        return BagOutput(logits, attention, instance_logits=instance_logits)

    def loss(
        self,
        outputs: Sequence[BagOutput],
        labels: Tensor,
        criterion: Criterion = classification_loss,
    ) -> Tensor:
        """Returns the weighted sum of the slides' and the tiles' loss.

        The loss of the tiles is the smooth top-1 SVM, `log sum_j exp(1[j != y] + s_j - s_y)`
        (Berrada et al. 2018, https://arxiv.org/abs/1802.07595, with margin and temperature 1, as
        in the paper), averaged over the tiles of a class, the classes and the slides. A criterion
        other than `classification_loss` has no classes to sort tiles by; then it is the loss.
        """
        bags = super().loss(outputs, labels, criterion)
        if criterion is not classification_loss:
            return bags
        tiles = [self._instance_loss(o, label) for o, label in zip(outputs, labels, strict=True)]
        return self.bag_weight * bags + (1 - self.bag_weight) * torch.stack(tiles).mean()

    def _instance_loss(self, output: BagOutput, label: Tensor) -> Tensor:
        assert output.attention is not None and output.instance_logits is not None
        num_classes, num_tiles, _ = output.instance_logits.shape
        own = label if label.ndim else F.one_hot(label, num_classes)
        # A tile of a small slide must not be evidence for and against a class.
        num_top = min(self.num_instances, (num_tiles + 1) // 2)
        num_bottom = min(self.num_instances, num_tiles // 2)
        losses = []
        for k in range(num_classes):
            attention = output.attention[k if self.attention_per_class else 0]
            chosen = attention.topk(num_top).indices
            targets = torch.full_like(chosen, int(own[k]))
            if own[k]:
                bottom = attention.topk(num_bottom, largest=False).indices
                chosen = torch.cat([chosen, bottom])
                targets = torch.cat([targets, torch.zeros_like(bottom)])
            margin = 1 - F.one_hot(targets, 2)
            losses.append(F.cross_entropy(output.instance_logits[k, chosen] + margin, targets))
        return torch.stack(losses).mean()


class DSMIL(MILModel):
    """Dual-stream MIL (Li, Li and Eliceiri 2021, https://arxiv.org/abs/2011.08939).

    The first stream classifies each tile and takes the maximum of each class (equation 3). The
    second attends from the tile with that maximum, the critical one, to all tiles: with queries
    `q = W_q h` and values `v = W_v h`, tile i has the attention `softmax_i <q_i, q_m>` in class k
    with the critical tile m (equations 4 to 6), and a convolution over the K pooled values gives
    the logits. The output is the mean of both streams (equation 7). As in the authors' code, the
    queries pass a hidden layer and tanh, and the products are divided by the root of their width.

    `branch_logits` of the output holds the first and the second stream.

    Args:
        in_dim: D.
        num_classes: K.
        embed_dim: E.
        hidden_dim: Width of the queries; 128 in the authors' code.
        dropout: Dropout of the embeddings.
    """

    attention_per_class = True

    def __init__(
        self,
        in_dim: int,
        num_classes: int,
        embed_dim: int = 512,
        hidden_dim: int = 128,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.project = _projection(in_dim, embed_dim, dropout)
        self.instance_classifier = nn.Linear(embed_dim, num_classes)
        self.query = nn.Sequential(
            nn.Linear(embed_dim, hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.Tanh(),
        )
        self.value = nn.Linear(embed_dim, embed_dim)
        self.classifier = nn.Linear(num_classes * embed_dim, num_classes)

    def forward(self, features: Tensor) -> BagOutput:
        """Classifies a bag `(N, D)`."""
        embeddings = self.project(features)
        instance_logits, critical = self.instance_classifier(embeddings).max(dim=0)
        queries = self.query(embeddings)
        scores = queries[critical] @ queries.T / math.sqrt(queries.shape[-1])
        attention = scores.softmax(dim=-1)
        bag_logits = self.classifier((attention @ self.value(embeddings)).flatten())
        streams = torch.stack([instance_logits, bag_logits])
        return BagOutput(streams.mean(dim=0), attention, streams)

    def loss(
        self,
        outputs: Sequence[BagOutput],
        labels: Tensor,
        criterion: Criterion = classification_loss,
    ) -> Tensor:
        """Returns the mean of the losses of both streams, as in the authors' code."""
        return _branch_loss(outputs, labels, criterion)


def pseudo_inverse(matrix: Tensor, num_iterations: int = 6) -> Tensor:
    """Approximates the Moore-Penrose inverse of matrices `(..., M, M)` whose rows sum to 1.

    The iteration of Xiong et al. 2021 (https://arxiv.org/abs/2102.03902, equation 11):
    `Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4` from `Z = A^T / (|A|_1 |A|_inf)`.
    """
    eye = torch.eye(matrix.shape[-1], device=matrix.device, dtype=matrix.dtype)
    # Norms per matrix, so that the heads do not depend on each other.
    norms = matrix.abs().sum(-2).amax(-1) * matrix.abs().sum(-1).amax(-1)
    inverse = matrix.mT / norms[..., None, None]
    for _ in range(num_iterations):
        product = matrix @ inverse
        inner = 15 * eye - product @ (7 * eye - product)
        inverse = inverse @ (13 * eye - product @ inner) / 4
    return inverse


class NystromAttention(nn.Module):
    """Self-attention with cost linear in the number of tokens (Xiong et al. 2021).

    `softmax(Q K^T) V` is approximated by `F A^+ B V` with `F = softmax(Q K'^T)`,
    `A = softmax(Q' K'^T)` and `B = softmax(Q' K^T)`, all divided by `sqrt(d)` before the softmax,
    where landmarks Q' and K' are the means over M segments of the sequence
    (https://arxiv.org/abs/2102.03902, equation 13), plus a depthwise convolution of the values. It
    is exact if each token is a landmark. If M does not divide the length, segments share a token;
    common code instead pads the sequence with zeros, which then take part in the softmax.

    Args:
        embed_dim: E.
        num_heads: Number of heads; divides E.
        num_landmarks: M.
        kernel_size: Width of the convolution of the values; odd.
    """

    def __init__(
        self, embed_dim: int, num_heads: int = 8, num_landmarks: int = 256, kernel_size: int = 33
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim}: expected a multiple of {num_heads} heads")
        self.num_heads, self.num_landmarks = num_heads, num_landmarks
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=False)
        self.convolution = nn.Conv2d(
            num_heads, num_heads, (kernel_size, 1), padding=(kernel_size // 2, 0),
            groups=num_heads, bias=False,
        )  # fmt: skip
        self.out = nn.Linear(embed_dim, embed_dim)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Maps tokens `(L, E)` to outputs `(L, E)` and to the attention of the first token `(L,)`.

        The attention is the mean over the heads of a row of `F A^+ B`, which sums to about 1 and,
        being an approximation, may be slightly negative.
        """
        length, width = tokens.shape
        query, key, value = (
            part.view(length, self.num_heads, -1).transpose(0, 1)
            for part in self.qkv(tokens).chunk(3, dim=-1)
        )
        # The iteration for the inverse diverges in half precision.
        with torch.autocast(tokens.device.type, enabled=False):
            query, key, value = query.float(), key.float(), value.float()
            query = query / math.sqrt(query.shape[-1])
            few_queries, few_keys = self._landmarks(query), self._landmarks(key)
            from_all = (query @ few_keys.mT).softmax(dim=-1)
            inverse = pseudo_inverse((few_queries @ few_keys.mT).softmax(dim=-1))
            to_all = (few_queries @ key.mT).softmax(dim=-1)
            mixed = from_all @ (inverse @ (to_all @ value)) + self.convolution(value[None])[0]
            first = (from_all[:, :1] @ inverse @ to_all).mean(dim=0)[0]
        return self.out(mixed.transpose(0, 1).reshape(length, width)), first

    def _landmarks(self, values: Tensor) -> Tensor:
        """Maps `(heads, L, d)` to the means over M segments `(heads, M, d)`."""
        count = min(self.num_landmarks, values.shape[1])
        return F.adaptive_avg_pool1d(values.mT, count).mT


class PyramidPositions(nn.Module):
    """Positions by convolution (PPEG of TransMIL, algorithm 3 of the paper).

    The tokens, laid out row by row on a square, are added to depthwise convolutions of 7, 5 and 3
    tokens width.

    Args:
        embed_dim: E.
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(embed_dim, embed_dim, size, padding=size // 2, groups=embed_dim)
            for size in (7, 5, 3)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps tokens `(side * side, E)` to the same shape."""
        side = math.isqrt(len(tokens))
        square = tokens.T.view(1, -1, side, side)
        found = square + sum(convolve(square) for convolve in self.convolutions)
        return found.flatten(2)[0].T


class TransMIL(MILModel):
    """Transformer over the tiles of a slide (Shao et al. 2021, https://arxiv.org/abs/2106.00908).

    Class token and tiles pass two pre-norm blocks of Nystrom attention with positions by
    convolution between them; the class token is classified. The tiles are laid out on a square in
    their order in the file, whose end is filled with the first tiles, as in the paper; their
    coordinates are not used.

    The attention of the output is that of the class token in the second block: negative values of
    the approximation are set to 0, a repeated tile gets the sum, and the sum over tiles is scaled
    to 1.

    Args:
        in_dim: D.
        num_classes: K.
        embed_dim: E; a multiple of `num_heads`.
        num_heads: Number of attention heads; 8 in the authors' code.
        num_landmarks: Number of landmarks of the Nystrom attention; E / 2 in the authors' code.
        dropout: Dropout of the output of the attention; 0.1 in the authors' code.
    """

    def __init__(
        self,
        in_dim: int,
        num_classes: int,
        embed_dim: int = 512,
        num_heads: int = 8,
        num_landmarks: int = 256,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.project = _projection(in_dim, embed_dim, 0.0)
        self.class_token = nn.Parameter(torch.randn(1, embed_dim))
        self.norms = nn.ModuleList(nn.LayerNorm(embed_dim) for _ in range(2))
        self.attentions = nn.ModuleList(
            NystromAttention(embed_dim, num_heads, num_landmarks) for _ in range(2)
        )
        self.dropout = nn.Dropout(dropout)
        self.positions = PyramidPositions(embed_dim)
        self.norm = nn.LayerNorm(embed_dim)
        self.classifier = nn.Linear(embed_dim, num_classes)

    def forward(self, features: Tensor) -> BagOutput:
        """Classifies a bag `(N, D)`."""
        count = len(features)
        side = math.isqrt(count - 1) + 1
        tiles = torch.arange(side * side, device=features.device) % count
        tokens = torch.cat([self.class_token, self.project(features)[tiles]])
        tokens, _ = self._attend(tokens, 0)
        tokens = torch.cat([tokens[:1], self.positions(tokens[1:])])
        tokens, row = self._attend(tokens, 1)
        attention = row.new_zeros(count).index_add(0, tiles, row[1:].clamp(min=0))
        attention = attention / attention.sum().clamp(min=torch.finfo(row.dtype).tiny)
        return BagOutput(self.classifier(self.norm(tokens[0])), attention[None])

    def _attend(self, tokens: Tensor, block: int) -> tuple[Tensor, Tensor]:
        mixed, row = self.attentions[block](self.norms[block](tokens))
        return tokens + self.dropout(mixed), row


@dataclass(frozen=True)
class BagModel:
    """A model that is trained on the same bags and splits as the slide encoder.

    Attributes:
        build: Called as `build(input_dim, num_classes, **options)`; returns a `MILModel`, or a
            module called as `module(features, coords, lengths=...)` on a padded batch that returns
            logits `(num_slides, K)`.
        settings: Fields of `FinetuneSettings` that differ from those of the run.
        options: Keyword arguments of `build`.
        survival_settings: Like `settings`, for survival tasks only.
    """

    build: Callable[..., nn.Module]
    settings: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    survival_settings: Mapping[str, Any] = field(default_factory=dict)

    def takes(self, option: str) -> bool:
        """Returns whether `build` has an argument of this name."""
        return option in inspect.signature(self.build).parameters

    def draws_attention(self) -> bool:
        """Returns whether it builds a `MILModel` with attention over tiles."""
        build = self.build
        return isinstance(build, type) and issubclass(build, MILModel) and build.has_attention


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

MIL_SURVIVAL_SETTINGS: Mapping[str, Any] = {"batch_size": 32, "bag_size": 8192}
"""Cox's likelihood compares the slides of a batch, which are in memory at the same time."""

MODELS: Mapping[str, BagModel] = {
    name: BagModel(build, MIL_SETTINGS, options, MIL_SURVIVAL_SETTINGS)
    for name, build, options in (
        ("abmil", ABMIL, {}),
        ("acmil", ACMIL, {}),
        ("clam-sb", CLAM, {}),
        ("clam-mb", CLAM, {"multi_branch": True}),
        ("dsmil", DSMIL, {}),
        ("transmil", TransMIL, {}),
        ("mean", MeanPool, {}),
        ("max", MaxPool, {}),
    )
}
"""Bag models by method name."""
