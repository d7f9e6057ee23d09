"""Settings of slide fine-tuning, with the original's names and defaults where it has them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
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
"""Number of slides per step for which `blr` is the learning rate."""


def check_settings(
    settings: object, choices: Mapping[str, Collection[str]], at_least: Mapping[str, float]
) -> None:
    """Checks the fields of a dataclass.

    Args:
        settings: The dataclass.
        choices: Possible values by field.
        at_least: Least values by field.

    Raises:
        ValueError: If a field has another value.
    """
    for name, values in choices.items():
        if (value := getattr(settings, name)) not in values:
            raise ValueError(f"{name} {value!r}: expected one of {', '.join(values)}")
    for name, least in at_least.items():
        if (value := getattr(settings, name)) < least:
            raise ValueError(f"{name} {value}: expected {least} or more")


@dataclass(frozen=True)
class FinetuneSettings:
    """Settings of the training of a slide classifier.

    Attributes:
        protocol: `corrected`, or `published` with the defects of the original: the projection of
            the embedding escapes the layer decay, gradients left at the end of an epoch leak into
            the next, tiles keep the order of the file or are shuffled, and the first ones are used
            if there are too many.
        model_arch: Architecture of the slide encoder.
        pretrained: Its weights; see `gigapath.slide_encoder.create_model`.
        encoder: Further arguments of the slide encoder.
        input_dim: Width of the tile embeddings; 0 takes the width that most files have.
        feat_layer: Layers whose embeddings are concatenated: 0 is the input embedding, 12 the last
            of 12 layers.
        global_pool: Whether to pool the mean of the tiles instead of the class token.
        freeze: Whether to train only the classifier.
        tile_size: Side of a cell of the encoder's grid in level-0 pixels; 0 for the size of the
            tiles in each file. The original uses 256 for every slide.
        max_wsi_size: Longest side of a slide in level-0 pixels; determines the segment lengths.
        dropout: Dropout of the encoder.
        drop_path_rate: Drop path probability of the encoder's last layer.
        grad_checkpointing: Whether to recompute layers in the backward pass to save memory.
        epochs: Number of passes over the training slides.
        warmup_epochs: Length of the warm-up of the learning rate.
        batch_size: Slides per forward pass; they do not attend to each other.
        gc: Batches whose gradients are accumulated per step, over all processes.
        lr: Learning rate; 0 for `blr * batch_size * gc / 256`.
        blr: Learning rate for 256 slides per step.
        min_lr: Learning rate at the end of the cosine schedule.
        lr_scheduler: `cosine` with warm-up, or `fixed`.
        optim: `adamw` or `adam`.
        optim_wd: Weight decay.
        layer_decay: Factor of the learning rate from each layer to the one below.
        weighted_sample: Whether to draw slides so that classes are equally frequent; ignored for
            multi-label tasks.
        model_select: `last_epoch`, or `val` for the epoch with the best `monitor`.
        monitor: Score on the validation slides, or `loss`; for survival, the default is `c_index`.
        patience: Number of epochs without a better `monitor` after which training stops; 0 never
            stops.
        folds: Number of folds; 0 for all tables of splits, or 10 if splits are made.
        split_method: `k_fold` or `published`; used if no tables of splits are given.
        split_key: `slide_id` or `pat_id`; by default patients if they are known.
        val_r: Fraction of validation slides.
        test_r: Fraction of test slides, for `split_method="published"`.
        max_tiles: Maximum number of tiles per slide; 0 uses the task's.
        bag_size: Maximum number of tiles per training slide, redrawn in each epoch; validation
            and test slides keep all tiles. 0 for no limit.
        precision: `fp32`, or `bf16` for autocast to bfloat16.
        num_workers: Number of processes that read slides ahead.
        save_steps: Number of steps after which the state is saved in addition to the end of each
            epoch; 0 for never.
        seed: Seed of weights, order, tiles, dropout and k-fold splits.
        num_resamples: Number of resamples of the bootstrap intervals.
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
        check_settings(self, _CHOICES, _AT_LEAST)
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay {self.layer_decay}: expected above 0 and at most 1")
        if self.val_r < 0 or self.test_r <= 0 or self.val_r + self.test_r >= 1:
            raise ValueError(
                f"val_r {self.val_r}, test_r {self.test_r}: expected fractions that sum to below 1"
            )
        if self.lr == 0 and self.blr <= 0:
            raise ValueError(f"blr {self.blr}: expected more than 0")

    @property
    def needs_val(self) -> bool:
        """Whether the training needs validation slides."""
        return self.model_select == "val" or self.patience > 0

    @property
    def peak_lr(self) -> float:
        """Learning rate after the warm-up."""
        return self.lr or self.blr * self.batch_size * self.gc / _LR_BATCH

    def of_training(self) -> dict[str, Any]:
        """Returns the settings that a run must share with the one it continues."""
        skipped = {"num_workers", "save_steps", "num_resamples", "folds", "grad_checkpointing"}
        skipped |= {"split_method", "split_key", "val_r", "test_r"}
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in skipped}
        return {**values, "encoder": dict(self.encoder)}
