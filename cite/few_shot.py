"""Baselines that adapt a CLIP with few labelled images, from the equations of their papers.

CLIP-Adapter (Gao et al. 2021, https://arxiv.org/abs/2110.04544), Tip-Adapter (Zhang et al. 2022,
https://arxiv.org/abs/2111.03930) and CoOp (Zhou et al. 2022, https://arxiv.org/abs/2109.01134).

Shapes: B images, C classes, D width, M context tokens, W width of word embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cite.text_encoder import GradientTextEncoder


class FeatureAdapter(nn.Module):
    """CLIP-Adapter's visual adapter: a bottleneck whose output is mixed with its input.

    `ratio * ReLU(f W1) W2 + (1 - ratio) * f`, without biases.

    Args:
        width: Width of the features D.
        reduction: Factor by which the hidden layer is narrower; 4 in the paper.
        ratio: Fraction of the adapter's output in the mixture.

    Raises:
        ValueError: If the ratio is not between 0 and 1, or the hidden layer would be empty.

    Example:
        >>> FeatureAdapter(512)(torch.ones(4, 512)).shape
        torch.Size([4, 512])
    """

    def __init__(self, width: int, reduction: int = 4, ratio: float = 0.2) -> None:
        super().__init__()
        if not 0 <= ratio <= 1:
            raise ValueError(f"ratio {ratio}: expected a number from 0 to 1")
        if not 1 <= reduction <= width:
            raise ValueError(f"reduction {reduction}: expected 1 to {width}, the width")
        self.down = nn.Linear(width, width // reduction, bias=False)
        self.up = nn.Linear(width // reduction, width, bias=False)
        self.ratio = ratio

    def forward(self, features: Tensor) -> Tensor:
        """Maps features `(B, D)` to features `(B, D)`."""
        adapted = self.up(F.relu(self.down(features)))
        return self.ratio * adapted + (1 - self.ratio) * features


class FeatureCache(nn.Module):
    """Tip-Adapter's cache: classes of training images, weighted by their similarity.

    `alpha * exp(-beta * (1 - f K^T)) V` for features f and keys K of length 1 and one-hot labels V.
    The scores are added to those of the texts. Keys are a parameter, which Tip-Adapter-F trains;
    they are empty until `fill`.

    Args:
        width: Width of the features D.
        num_classes: Number of classes C.
        alpha: Weight of the cache.
        beta: Sharpness: the higher, the more the nearest images dominate.
    """

    labels: Tensor

    def __init__(self, width: int, num_classes: int, alpha: float = 1.0, beta: float = 5.5) -> None:
        super().__init__()
        self.num_classes, self.alpha, self.beta = num_classes, alpha, beta
        self.keys = nn.Parameter(torch.empty(0, width))
        self.register_buffer("labels", torch.empty(0, dtype=torch.int64))

    def fill(self, features: Tensor, labels: Tensor) -> None:
        """Stores training images.

        Args:
            features: `(num_images, D)`.
            labels: int64 `(num_images,)`.
        """
        # The parameter stays the same object, because an optimizer may hold it already.
        self.keys.data = F.normalize(features.float(), dim=-1).to(self.keys.device)
        self.labels = labels.to(self.keys.device)

    def forward(self, features: Tensor) -> Tensor:
        """Maps features `(B, D)` to scores `(B, C)`.

        Raises:
            RuntimeError: If the cache is empty.
        """
        if not len(self.labels):
            raise RuntimeError(
                "the cache has no training images: train first, or load a checkpoint"
            )
        affinity = torch.exp(-self.beta * (1 - F.normalize(features, dim=-1) @ self.keys.T))
        return self.alpha * affinity @ F.one_hot(self.labels, self.num_classes).to(affinity.dtype)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # The number of keys is that of the training images.
        if (keys := state_dict.get(f"{prefix}keys")) is not None:
            self.keys.data = self.keys.data.new_empty(len(keys), self.keys.shape[1])
            self.labels = self.labels.new_empty(len(keys))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class LearnedContext(nn.Module):
    """CoOp's prompts: learned word embeddings before the name of each class.

    The text encoder reads `[V]_1 ... [V]_M name.` with its weights frozen; all classes share the
    context, and the class name comes last. The text contains placeholder words, whose word
    embeddings a hook replaces, so that any text encoder with word embeddings works.
    The encoder is not part of the state dict.

    Args:
        encoder: The text encoder.
        names: Names of the classes.
        num_context: Number of context tokens M; 16 in the paper.
        std: Standard deviation of their initial values; 0.02 in the paper.

    Raises:
        ValueError: If the tokenizer does not make one token of each placeholder.
    """

    def __init__(
        self,
        encoder: GradientTextEncoder,
        names: Sequence[str],
        num_context: int = 16,
        std: float = 0.02,
    ) -> None:
        super().__init__()
        self.texts = [" ".join(["x"] * num_context + [f"{name}."]) for name in names]
        self._encoder = (encoder,)  # in a tuple, modules are not registered
        words = _word_embeddings(encoder, self.texts, num_context)
        words.register_forward_hook(self._replace)
        self.context = nn.Parameter(torch.empty(num_context, words.embedding_dim).normal_(std=std))
        self._active = False

    def forward(self) -> Tensor:
        """Returns the embeddings of the classes `(C, D)`, differentiable in the context."""
        self._active = True
        try:
            return self._encoder[0].encode_with_gradients(self.texts, self.context)
        finally:
            self._active = False

    def _replace(self, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Any:
        if not self._active:
            return None
        context = self.context.to(output.dtype).expand(len(output), -1, -1)
        rest = output[:, 1 + context.shape[1] :]
        return torch.cat([output[:, :1], context, rest], dim=1)


def _word_embeddings(
    encoder: GradientTextEncoder, texts: Sequence[str], num_context: int
) -> nn.Embedding:
    """Finds the word embedding: the one whose input repeats one token after the first token.

    Position embeddings get different numbers there, and token type embeddings a single number.
    """
    seen: dict[nn.Embedding, Tensor] = {}
    modules = [m for m in encoder.module.modules() if isinstance(m, nn.Embedding)]
    hooks = [
        module.register_forward_hook(lambda m, ids, _: seen.__setitem__(m, ids[0]))
        for module in modules
    ]
    try:
        with torch.no_grad():
            encoder.encode_with_gradients(texts)
    finally:
        for hook in hooks:
            hook.remove()
    for module, ids in seen.items():
        placeholders = ids[:, 1 : num_context + 1]
        fits = placeholders.shape[1] == num_context
        if fits and bool((placeholders == ids[:, 1:2]).all() and (ids[:, 0] != ids[:, 1]).all()):
            return module
    raise ValueError(
        f"the tokenizer makes other than {num_context} equal tokens of as many placeholders, or "
        "they do not fit into the text encoder; use fewer context tokens"
    )
