"""Settings of slide fine-tuning; names and defaults are the original's where it has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from gigapath.finetune.metrics import NUM_RESAMPLES
from gigapath.finetune.splits import METHODS as SPLIT_METHODS

_CHOICES = {
    "protocol": ("corrected", "published"),
    "optim": ("adamw", "adam"),
    "lr_scheduler": ("cosine", "fixed"),
    "model_select": ("last_epoch", "val"),
    "split_method": SPLIT_METHODS,
    "precision": ("fp32", "bf16"),
}
_AT_LEAST = {
    **dict.fromkeys(("epochs", "batch_size", "gc", "max_wsi_size"), 1),
    **dict.fromkeys(("warmup_epochs", "patience", "folds", "num_workers", "save_steps"), 0),
    **dict.fromkeys(("max_tiles", "optim_wd", "min_lr", "lr", "dropout", "drop_path_rate"), 0),
    **dict.fromkeys(("num_resamples", "tile_size", "input_dim", "bag_size"), 0),
}
_LR_BATCH = 256
"""Slides per step at which the rate is `blr`."""


@dataclass(frozen=True)
class FinetuneSettings:
    """How a slide classifier is trained.

    Attributes:
        protocol: `corrected`; or `published`: the embedding's projection escapes the layer decay,
            gradients that are left at the end of an epoch leak into the next, tiles come in the
            order of the file or at random, and of too many the first are taken.
        model_arch: Size of the slide encoder.
        pretrained: Its weights, as `gigapath.slide_encoder.create_model` takes them.
        encoder: Further arguments of the encoder.
        input_dim: Width of the tile embeddings; 0 takes the width that most files have.
        feat_layer: Layers whose vectors are joined: 0 the embedding, 12 the last of 12.
        global_pool: Mean of the tiles instead of the class token.
        freeze: Train the classifier alone.
        tile_size: Side of a cell of the encoder's grid in pixels at level 0; 0 for the side that
            the tiles of each file have there, 256 being what the original takes for any slide.
        max_wsi_size: Longest side of a slide in pixels at level 0; sets the segment lengths.
        dropout: Of the encoder.
        drop_path_rate: Of the encoder's last layer.
        grad_checkpointing: Compute layers again in the backward pass, to save memory.
        epochs: Passes over the training slides.
        warmup_epochs: Of the learning rate.
        batch_size: Slides that go through the model at once, without seeing each other.
        gc: Batches whose gradients make a step, over all processes.
        lr: Learning rate; 0 takes `blr * batch_size * gc / 256`.
        blr: Rate for 256 slides a step.
        min_lr: At the end of the cosine.
        lr_scheduler: `cosine` with warm-up, or `fixed`.
        optim: `adamw` or `adam`.
        optim_wd: Weight decay.
        layer_decay: Factor of the rate from a layer to the one below.
        weighted_sample: Draw slides so that classes are equally frequent; not of several labels.
        model_select: `last_epoch`, or `val`: the epoch with the best `monitor`.
        monitor: Score on the validation slides, or `loss`.
        patience: Epochs without a better `monitor` after which training stops; 0 for never.
        folds: How many; 0 for all tables of splits, or 10.
        split_method: `k_fold` or `published`, where no tables of splits are given.
        split_key: `slide_id` or `pat_id`; by default patients where they are known.
        val_r: Share of validation slides.
        test_r: Share of test slides, of `split_method` `published`.
        max_tiles: Maximum number of tiles per slide; 0 uses the task's.
        bag_size: Maximum number of tiles per training slide, drawn anew in each epoch; validation
            and test slides keep all tiles. 0 for no limit.
        precision: `bf16` computes products in bfloat16, `fp32` not.
        num_workers: Processes that read slides ahead.
        save_steps: Keep the state every so many steps too, not only after each epoch; 0 for not.
        seed: Of weights, order, tiles, dropout and k-fold.
        num_resamples: Of the bootstrap intervals.
    """

    protocol: str = "corrected"
    model_arch: str = "gigapath_slide_enc12l768d"
    pretrained: str = "hf_hub:prov-gigapath/prov-gigapath"
    encoder: Mapping[str, Any] = field(default_factory=dict)
    input_dim: int = 1536
    feat_layer: str = "11"
    global_pool: bool = False
    freeze: bool = False
    tile_size: int = 256
    max_wsi_size: int = 262144
    dropout: float = 0.1
    drop_path_rate: float = 0.1
    grad_checkpointing: bool = False
    epochs: int = 5
    warmup_epochs: float = 1.0
    batch_size: int = 1
    gc: int = 32
    lr: float = 0.0
    blr: float = 4e-3
    min_lr: float = 1e-6
    lr_scheduler: str = "cosine"
    optim: str = "adamw"
    optim_wd: float = 1e-5
    layer_decay: float = 0.95
    weighted_sample: bool = False
    model_select: str = "last_epoch"
    monitor: str = "auroc"
    patience: int = 0
    folds: int = 0
    split_method: str = "k_fold"
    split_key: str = ""
    val_r: float = 0.1
    test_r: float = 0.2
    max_tiles: int = 0
    bag_size: int = 0
    precision: str = "fp32"
    num_workers: int = 4
    save_steps: int = 0
    seed: int = 0
    num_resamples: int = NUM_RESAMPLES

    def __post_init__(self) -> None:
        for name, values in _CHOICES.items():
            if getattr(self, name) not in values:
                raise ValueError(
                    f"{name} {getattr(self, name)!r}: one of {', '.join(values)} expected"
                )
        for name, least in _AT_LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} {getattr(self, name)}: {least} or more expected")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay {self.layer_decay}: above 0, at most 1 expected")
        if self.val_r < 0 or self.test_r <= 0 or self.val_r + self.test_r >= 1:
            raise ValueError(f"val_r {self.val_r}, test_r {self.test_r}: shares below 1 expected")
        if self.lr == 0 and self.blr <= 0:
            raise ValueError(f"blr {self.blr}: more than 0 expected")

    @property
    def needs_val(self) -> bool:
        """Whether there must be validation slides."""
        return self.model_select == "val" or self.patience > 0

    @property
    def peak_lr(self) -> float:
        """Learning rate after the warm-up."""
        return self.lr or self.blr * self.batch_size * self.gc / _LR_BATCH

    def of_training(self) -> dict[str, Any]:
        """What another run must share to continue this one; neither speed nor data."""
        skipped = {"num_workers", "save_steps", "num_resamples", "folds", "grad_checkpointing"}
        skipped |= {"split_method", "split_key", "val_r", "test_r"}
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in skipped}
        return {**values, "encoder": dict(self.encoder)}
