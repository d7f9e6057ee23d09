"""PLIP pretraining for `xtuner train`: model, dataset and hooks for configs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import HOOKS, LOOPS, MODELS, OPTIMIZERS
from mmengine.runner import EpochBasedTrainLoop
from torch import Tensor
from torch.optim import AdamW

from pallava.anyres import CLIP_MEAN, CLIP_STD
from pallava.engine.skipping import default_skip_log
from pallava.engine.tokenised import vocabulary_digest
from pallava.model import refuse_other_weights
from pallava.modeling.folders import save_vision_encoder
from pallava.pairs import PairDataset, collate_pairs
from pallava.plip.initialisation import (
    ENC_TOKEN,
    build_caption_tokenizer,
    build_text_encoder,
    build_vision_encoder,
)
from pallava.plip.losses import ramped_alpha
from pallava.plip.pretraining import PLIPPretrainingModel
from pallava.skipping import SkipLog
from pathcore.files import StrPath
from pathcore.weights import (
    CheckpointError,
    load_strict,
    read_state_dict,
    read_torch_file,
    recognise_container,
)

ENCODER_FOLDER = "plip_encoder"
"""Default output folder of `SaveEncoderHook`, inside the work directory."""

_VOCABULARY = "caption_vocabulary"
"""Entry of a checkpoint's `meta` that says with which ids the text encoder was trained."""

Spec = StrPath | Mapping[str, Any]


@MODELS.register_module()
class PLIPPretraining(PLIPPretrainingModel, BaseModel):
    """`PLIPPretrainingModel` for MMEngine, with uint8 images and text captions as inputs.

    Args:
        visual_encoder: Folder of a CLIP or PLIP, name on the Hugging Face Hub, or
            `CLIPVisionConfig` fields for random initialisation.
        text_encoder: Folder of a BERT, name on the Hub, or `BertConfig` fields.
        tokenizer: Folder or Hub name of a BERT tokenizer, or `dict(pairs_file=..., vocab_size=...)`
            to build one from the words of the captions. Defaults to the tokenizer of
            `text_encoder`.
        max_length: Maximum number of tokens per caption; longer ones are truncated.
        image_mean: Channel means in 0..1.
        image_std: Channel standard deviations in 0..1.
        pretrained_pth: Checkpoint of an earlier run, with the same vocabulary, from which all
            weights are initialised.
        gradient_checkpointing: Whether to recompute the image encoder in the backward pass, which
            saves memory.
        options: Further arguments of `PLIPPretrainingModel`.
    """

    image_mean: Tensor
    image_std: Tensor

    def __init__(
        self,
        visual_encoder: Spec,
        text_encoder: Spec,
        tokenizer: Spec | None = None,
        *,
        max_length: int = 30,
        image_mean: Sequence[float] = CLIP_MEAN,
        image_std: Sequence[float] = CLIP_STD,
        pretrained_pth: StrPath | None = None,
        gradient_checkpointing: bool = False,
        **options: Any,
    ) -> None:
        if tokenizer is None:
            if isinstance(text_encoder, Mapping):
                raise ValueError(
                    "PLIPPretraining: a text encoder from scratch needs a tokenizer, for instance "
                    "tokenizer=dict(pairs_file='pairs.jsonl', vocab_size=8000)"
                )
            tokenizer = text_encoder
        caption_tokenizer = build_caption_tokenizer(tokenizer)
        vision = build_vision_encoder(visual_encoder)
        text = build_text_encoder(
            text_encoder,
            vocab_size=len(caption_tokenizer),
            image_hidden_size=vision.config.hidden_size,
        )
        enc_token_id = caption_tokenizer.convert_tokens_to_ids(ENC_TOKEN)
        super().__init__(vision, text, enc_token_id=enc_token_id, **options)
        self.tokenizer = caption_tokenizer
        self.max_length = max_length
        for name, values in (("image_mean", image_mean), ("image_std", image_std)):
            buffer = torch.tensor(list(values)).view(1, -1, 1, 1)
            self.register_buffer(name, buffer, persistent=False)
        if gradient_checkpointing:
            vision.gradient_checkpointing_enable()
        if pretrained_pth is not None:
            state_dict, file = read_state_dict(pretrained_pth), Path(pretrained_pth)
            if file.is_file() and recognise_container(file) == "zip":  # other formats have no meta
                check_vocabulary(read_torch_file(file), caption_tokenizer, file)
            load_strict(self, state_dict, what="PLIP pretraining", source=str(pretrained_pth))
        self.register_load_state_dict_pre_hook(refuse_other_weights)

    def init_weights(self) -> None:
        """Does nothing: the constructor already initialised or loaded all weights."""

    def forward(
        self,
        images: Tensor,
        captions: Sequence[str],
        caption_ids: Tensor | None = None,
        mode: str = "loss",
    ) -> dict[str, Tensor]:
        """Computes losses, or features for retrieval.

        Args:
            images: uint8 `(B, 3, S, S)`.
            captions: B texts.
            caption_ids: `(B,)` ids, equal for equal captions.
            mode: `loss`, or `predict` for unit vectors of images and captions.

        Raises:
            ValueError: If `mode` is neither.
        """
        pixel_values = self.normalise(images)
        text = self.tokenise(captions)
        if mode == "predict":
            return {
                "image_feats": self.encode_image(pixel_values),
                "text_feats": self.encode_text(**text),
            }
        if mode != "loss":
            raise ValueError(f"mode {mode!r}: expected 'loss' or 'predict'")
        output = PLIPPretrainingModel.forward(self, pixel_values, **text, caption_ids=caption_ids)
        return {
            "loss_ita": output.loss_ita,
            "loss_itm": output.loss_itm,
            "itm_accuracy": output.itm_accuracy,
            "itc_accuracy": output.itc_accuracy,
            "temperature": self.temp.detach().float(),
        }

    def normalise(self, images: Tensor) -> Tensor:
        """Converts uint8 images to normalised input of the image encoder, `(B, 3, S, S)`."""
        return (images.float() / 255 - self.image_mean) / self.image_std

    def tokenise(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Returns `input_ids` and `attention_mask` `(B, T)`, padded to the longest caption."""
        encoded = self.tokenizer(
            list(captions),
            padding="longest",
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        device = self.temp.device
        return {name: encoded[name].to(device) for name in ("input_ids", "attention_mask")}

    def save_encoder(self, folder: StrPath) -> None:
        """Saves the image encoder for `load_vision_encoder` and `CLIPVisionModel`."""
        save_vision_encoder(
            self.visual_encoder,
            folder,
            self.image_mean.flatten().tolist(),
            self.image_std.flatten().tolist(),
        )


class PLIPPairDataset(PairDataset):
    """`PairDataset` that records unusable samples beside the log of the run.

    Args:
        pairs_file: Path of `pairs.jsonl`.
        image_folder: Folder that image paths are relative to. Defaults to the folder of the file.
        image_size: Side of the square output images in pixels.
        skip_log: File that records unusable samples.
        options: Further arguments of `PairDataset`.
    """

    def __init__(
        self,
        pairs_file: StrPath,
        image_folder: StrPath | None = None,
        *,
        image_size: int,
        skip_log: StrPath | None = None,
        **options: Any,
    ) -> None:
        log = SkipLog(skip_log) if skip_log else default_skip_log()
        super().__init__(pairs_file, image_folder, image_size=image_size, skip_log=log, **options)


@OPTIMIZERS.register_module()
class MatrixDecayAdamW(AdamW):
    """AdamW without weight decay for biases, norms and the temperature.

    This is the rule of timm's optimizers, which ALBEF uses, except that ALBEF's temperature decays
    as well. MMEngine's `paramwise_cfg` can express it, but warns about every frozen parameter, and
    XTuner drops it under DeepSpeed.

    Args:
        params: Parameters; frozen ones are skipped.
        weight_decay: Weight decay of parameters with two or more dimensions.
        options: Further arguments of `torch.optim.AdamW`.
    """

    def __init__(
        self, params: Iterable[Tensor], *, weight_decay: float = 0.01, **options: Any
    ) -> None:
        trained = [parameter for parameter in params if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
        ]
        super().__init__(groups, **options)


@LOOPS.register_module()
class PairTrainLoop(EpochBasedTrainLoop):
    """MMEngine's epoch-based loop with checks before training starts.

    Args:
        runner: Runner of the loop.
        dataloader: Data loader or its config.
        options: Further arguments of `EpochBasedTrainLoop`.

    Raises:
        ValueError: If the data does not fill a batch, or DeepSpeed is used.
    """

    def __init__(self, runner: Any, dataloader: Any, **options: Any) -> None:
        if "DeepSpeed" in type(getattr(runner, "strategy", None)).__name__:
            # DeepSpeed cannot broadcast zero-dimensional parameters such as the temperature.
            raise ValueError(
                "PLIP pretraining runs without --deepspeed, which cannot hold the learned "
                "temperature: several processes train data-parallel, in mixed precision; "
                "model.gradient_checkpointing=True saves memory"
            )
        super().__init__(runner, dataloader, **options)
        if len(self.dataloader) == 0:
            raise ValueError(
                f"{len(self.dataloader.dataset)} pairs do not fill a batch on {get_world_size()} "
                f"device(s); set train_dataloader.batch_size {self.dataloader.batch_size} lower"
            )
        runner.register_hook(CaptionVocabularyHook())  # before the runner loads a checkpoint


@HOOKS.register_module()
class AlphaRampHook(Hook):
    """Ramps the weight of the soft targets linearly from 0 to its full value.

    Args:
        ramp_epochs: Length of the ramp in epochs; ALBEF uses one.
    """

    def __init__(self, ramp_epochs: float = 1.0) -> None:
        self.ramp_epochs = ramp_epochs
        self._alpha: float | None = None

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Sets the weight of this iteration, which also works after resuming."""
        del batch_idx, data_batch
        model = _unwrapped(runner.model)
        if self._alpha is None:
            self._alpha = model.alpha
        ramp_steps = math.ceil(self.ramp_epochs * len(runner.train_dataloader))
        model.alpha = ramped_alpha(self._alpha, runner.iter, ramp_steps)


@HOOKS.register_module()
class CaptionVocabularyHook(Hook):
    """Stops a training that continues a checkpoint with another vocabulary.

    A tokenizer that is built from the captions gives other ids to other captions, while all shapes
    may fit. `PairTrainLoop` adds this hook.
    """

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Writes the digest of the vocabulary into the checkpoint."""
        digest = vocabulary_digest(_unwrapped(runner.model).tokenizer)
        checkpoint.setdefault("meta", {})[_VOCABULARY] = digest

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Compares the vocabularies, for `--resume` and `load_from`.

        Raises:
            CheckpointError: If they differ.
        """
        check_vocabulary(checkpoint, _unwrapped(runner.model).tokenizer, "the checkpoint")


def check_vocabulary(checkpoint: Any, tokenizer: Any, source: StrPath) -> None:
    """Compares the vocabulary of a checkpoint with a tokenizer, if the checkpoint records it.

    Args:
        checkpoint: Content of the file.
        tokenizer: The tokenizer of the captions.
        source: Name of the checkpoint, for the message.

    Raises:
        CheckpointError: If they differ.
    """
    meta = checkpoint.get("meta") if isinstance(checkpoint, Mapping) else None
    before = meta.get(_VOCABULARY) if isinstance(meta, Mapping) else None
    if before is not None and before != vocabulary_digest(tokenizer):
        raise CheckpointError(
            f"{source} was trained with another vocabulary than model.tokenizer gives, in which "
            "its text encoder would read other words; set model.tokenizer as it was then (a "
            "tokenizer built from captions needs the same model.tokenizer.pairs_file, whatever "
            "the training reads)"
        )


@HOOKS.register_module()
class SaveEncoderHook(Hook):
    """Saves the image encoder as a folder with every checkpoint and at the end of training.

    Args:
        folder: Output folder. Defaults to `plip_encoder` in the work directory.
    """

    def __init__(self, folder: StrPath | None = None) -> None:
        self.folder = folder

    def before_save_checkpoint(self, runner: Any, checkpoint: Mapping[str, Any]) -> None:
        """Overwrites the folder."""
        del checkpoint
        self._save(runner)

    def after_train(self, runner: Any) -> None:
        """Overwrites the folder and logs its path."""
        self._save(runner)
        runner.logger.info(f"image encoder: {self._target(runner)}")

    def _target(self, runner: Any) -> Path:
        return Path(self.folder) if self.folder else Path(runner.work_dir) / ENCODER_FOLDER

    def _save(self, runner: Any) -> None:
        if is_main_process():
            _unwrapped(runner.model).save_encoder(self._target(runner))


def _unwrapped(model: Any) -> PLIPPretraining:
    """Returns the model inside its wrappers."""
    while not isinstance(model, PLIPPretraining):
        model = model.module
    return model


__all__ = [
    "AlphaRampHook",
    "CaptionVocabularyHook",
    "MatrixDecayAdamW",
    "PLIPPairDataset",
    "PLIPPretraining",
    "PairTrainLoop",
    "SaveEncoderHook",
    "collate_pairs",
]
