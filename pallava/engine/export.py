"""Saves a trained model as the folders that `xtuner convert merge` and evaluation read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from mmengine import print_log
from torch import Tensor
from xtuner.registry import BUILDER

from pallava.engine.prompts import trained_template
from pallava.engine.recipe import trained_preparation
from pallava.inference.loading import CONVERSION_NAME
from pallava.modeling.folders import (
    connector_config_of,
    save_connector,
    save_slide_encoder,
    save_vision_encoder,
)
from pallava.modeling.llava import BagEncoder
from pathcore.files import write_json
from pathcore.weights import load_strict


@runtime_checkable
class SavableEncoder(Protocol):
    """Vision encoder that writes the folder from which it is loaded."""

    def save(self, folder: Path) -> None:
        """Saves configuration and weights."""
        ...


def save_trained_parts(
    model: Any, cfg: Any, save_dir: Path, fp32: bool, save_pretrained_kwargs: dict[str, Any]
) -> None:
    """Saves the adapter or language model, the connector and, if it was trained, the encoder.

    XTuner builds the model on the meta device and loads only the tensors of the checkpoint; only
    these are written.

    Args:
        model: `pallava.model.LLaVAModel` with the checkpoint's tensors loaded.
        cfg: Training config with `tokenizer` and `image_processor`. None if the model needs
            neither; nothing is recorded then.
        save_dir: Output folder for `llm_adapter/` (or the language model itself), `projector/` and
            `visual_encoder/`.
        fp32: Whether to save the language model's part in fp32 instead of fp16.
        save_pretrained_kwargs: Keyword arguments for Hugging Face's `save_pretrained`.
    """
    if not fp32:
        model.llm.half()
    save_dir.mkdir(parents=True, exist_ok=True)
    # Inference prepares questions and images by this file; see `pallava.inference.loading`.
    if cfg is not None:
        record = {
            "prompt_template": trained_template(cfg).fields(),
            **trained_preparation(cfg),
            "visual_select_layer": model.visual_select_layer,
        }
        write_json(save_dir / CONVERSION_NAME, record)
    if model.use_llm_lora:
        _say("LLM adapter", save_dir / "llm_adapter")
        model.llm.save_pretrained(save_dir / "llm_adapter", **save_pretrained_kwargs)
    elif not model.freeze_llm:
        _say("LLM and tokenizer", save_dir)
        BUILDER.build(cfg.tokenizer).save_pretrained(save_dir)
        model.llm.save_pretrained(save_dir, **save_pretrained_kwargs)
    _say("connector", save_dir / "projector")
    save_connector(_filled_connector(model.projector), save_dir / "projector")
    if isinstance(model.visual_encoder, BagEncoder):  # has no image processor
        _say("slide token encoder", save_dir / "visual_encoder")
        save_slide_encoder(model.visual_encoder, save_dir / "visual_encoder")
    elif not model.freeze_visual_encoder and isinstance(model.visual_encoder, SavableEncoder):
        _say("visual encoder", save_dir / "visual_encoder")
        model.visual_encoder.save(save_dir / "visual_encoder")
    elif not model.freeze_visual_encoder:
        _say("visual encoder", save_dir / "visual_encoder")
        processor = BUILDER.build(cfg.image_processor)
        save_vision_encoder(
            model.visual_encoder,
            save_dir / "visual_encoder",
            processor.image_mean,
            processor.image_std,
        )


def _filled_connector(projector: Any) -> Any:
    """Returns the checkpoint's connector; its keys decide the mode rather than the config."""
    tensors: dict[str, Tensor] = projector.state_dict()
    filled = {name: tensor for name, tensor in tensors.items() if not tensor.is_meta}
    if len(filled) == len(tensors):
        return projector
    config = connector_config_of(filled, num_attention_heads=projector.config.num_attention_heads)
    connector = type(projector)(config)
    load_strict(connector, filled, what="connector", source="checkpoint")
    return connector


def _say(what: str, path: Path) -> None:
    print_log(f"Saving {what} to {path}", "current")
