"""CLIP-Adapter, Tip-Adapter and CoOp for MMPreTrain and MMClassification; see `cite.few_shot`."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS, MODELS
from torch import Tensor

from cite.few_shot import FeatureAdapter, FeatureCache, LearnedContext
from cite.mm.feature_extraction import build_dataset, encode_batch
from cite.mm.heads import TextEmbeddingHead
from cite.text_encoder import build_text_encoder


@MODELS.register_module()
class AdapterNeck(FeatureAdapter):
    """Neck of CLIP-Adapter, for a `TextEmbeddingHead`; takes `width`, `reduction` and `ratio`."""

    def forward(self, features: Any) -> tuple[Tensor]:
        """Maps features, or a tuple that ends with them, to a tuple of one tensor `(batch, D)`."""
        return (super().forward(features[-1] if isinstance(features, tuple) else features),)


@MODELS.register_module()
class TipAdapterHead(TextEmbeddingHead):
    """Head of Tip-Adapter and Tip-Adapter-F; `TipAdapterHook` fills its cache.

    Args:
        *arguments: Arguments of `TextEmbeddingHead`.
        alpha: Weight of the cache.
        beta: Sharpness of the similarity to training images.
        fine_tune: Whether to train the keys, as Tip-Adapter-F does; otherwise nothing is trained.
        **named: Keyword arguments of `TextEmbeddingHead`.
    """

    def __init__(
        self,
        *arguments: Any,
        alpha: float = 1.0,
        beta: float = 5.5,
        fine_tune: bool = False,
        **named: Any,
    ) -> None:
        super().__init__(*arguments, **named)
        width = self.text_embeddings.shape[1]
        self.cache = FeatureCache(width, len(self.classes), alpha, beta)
        self.fine_tune = fine_tune

    def forward(self, features: Any) -> Tensor:
        """Maps features, or a tuple that ends with them, to scores `(batch, num_classes)`."""
        return super().forward(features) + self.cache(self.pre_logits(features).float())


@MODELS.register_module()
class CoOpHead(TextEmbeddingHead):
    """Head of CoOp: classes are texts with a learned context.

    Args:
        text_encoder: Arguments of `cite.text_encoder.build_text_encoder`.
        texts: One name of each class, as a list in the order of the labels.
        num_context: Number of context tokens.
        context_std: Standard deviation of their random start.
        **named: Further keyword arguments of `TextEmbeddingHead`.
    """

    def __init__(
        self,
        text_encoder: dict[str, Any],
        texts: list[str],
        num_context: int = 16,
        context_std: float = 0.02,
        **named: Any,
    ) -> None:
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"CoOpHead: expected one name of each class, found {texts}")
        super().__init__(text_encoder=text_encoder, texts=texts, **named)
        encoder: Any = build_text_encoder(**text_encoder)
        self.context = LearnedContext(encoder, texts, num_context, context_std)

    def forward(self, features: Any) -> Tensor:
        """Maps features, or a tuple that ends with them, to scores `(batch, num_classes)`."""
        texts = self.context() if self.training else self.text_embeddings
        return self.compare(self.pre_logits(features), texts)

    def train(self, mode: bool = True) -> CoOpHead:
        """Sets the mode; in evaluation, the texts are embedded once instead of in every batch."""
        if not mode and self.training:
            with torch.no_grad():
                self.text_embeddings = self.context()
        super().train(mode)
        return self


@HOOKS.register_module()
class TipAdapterHook(Hook):
    """Fills the cache of a `TipAdapterHead` with the training images before training.

    Features are those of the backbone without augmentation. Without `fine_tune` there is nothing to
    train: the loop ends before its first iteration, and `iter_0.pth` holds the cache.

    Args:
        batch_size: Number of images per batch.
    """

    def __init__(self, batch_size: int = 64) -> None:
        self.batch_size = batch_size

    @torch.no_grad()
    def before_train(self, runner: Any) -> None:
        """Fills the cache, unless it comes from a checkpoint."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        if not len(model.head.cache.labels):
            dataset = build_dataset(runner.cfg, "train")
            model.eval()
            features, labels = [], []
            for start in range(0, len(dataset), self.batch_size):
                rows = range(start, min(start + self.batch_size, len(dataset)))
                items = [dataset[row] for row in rows]
                features.append(encode_batch(model.backbone, model.data_preprocessor, items))
                labels += [int(dataset.get_data_info(row)["gt_label"]) for row in rows]
            model.head.cache.fill(torch.cat(features), torch.tensor(labels))
            model.train()
        if not model.head.fine_tune:
            runner.train_loop.stop_training = True
            runner.save_checkpoint(runner.work_dir, "iter_0.pth", by_epoch=False)
