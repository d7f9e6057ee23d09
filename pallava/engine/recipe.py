"""Extracts from a training config what a release needs, without building any model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmengine.config import Config
from xtuner.registry import BUILDER

from pallava.anyres import CLIP_MEAN, CLIP_STD, TRAINING_TIES
from pallava.engine.prompts import disagreeing_templates, trained_template, training_datasets
from pallava.engine.runtime import prepare_host
from pallava.modeling.slide_tokens import SlideTokenConfig
from pallava.named_encoder import PREFIX
from pallava.release.pth_to_hf import Recipe
from pathcore.config_file import read_config
from pathcore.files import StrPath
from pathcore.names import WrongArgumentError

_logger = logging.getLogger(__name__)

_LORA_FIELDS = (
    *("r", "lora_alpha", "lora_dropout", "bias", "task_type", "use_rslora", "use_dora"),
    *("rank_pattern", "alpha_pattern", "modules_to_save", "target_modules", "fan_in_fan_out"),
    *("lora_bias", "init_lora_weights"),
)


def read_recipe(
    config_file: StrPath,
    *,
    visual_encoder: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> tuple[Recipe, Callable[[Path], None]]:
    """Reads a config of `pallava.model.LLaVAModel`, either ours or a published one.

    Args:
        config_file: Path of the config.
        visual_encoder: Folder to use instead of the config's.
        options: Settings that override the config's, as `--cfg-options`.

    Returns:
        The recipe, and a function that writes the tokenizer's files into a folder.

    Raises:
        WrongArgumentError: If the config cannot be read, or is for another kind of model.
    """
    prepare_host()
    cfg = read_config(Config.fromfile, config_file, options)
    model = cfg.get("model") or {}
    if "llm" not in model or "visual_encoder" not in model:
        raise WrongArgumentError(
            f"{config_file}: expected a config with model.llm and model.visual_encoder"
        )
    dataset = (cfg.get("train_dataloader") or {}).get("dataset") or {}
    slide_tokens = _slide_tokens(model["visual_encoder"], dataset)
    if slide_tokens:
        if visual_encoder:
            raise ValueError(
                f"{config_file}: a model of slides, whose encoder is in the checkpoint; leave "
                "--visual-encoder out"
            )
        encoder, statistics = slide_tokens["tile_encoder"], {}
    else:
        _refuse_names(model["visual_encoder"], config_file)
        encoder = visual_encoder or _encoder_folder(model["visual_encoder"])
        statistics = _image_statistics(cfg, encoder)
    template = trained_template(cfg)
    for difference in disagreeing_templates(cfg, template):
        _logger.warning("%s: %s, which is the one recorded", config_file, difference)
    recipe = Recipe(
        base_model=str(model["llm"]["pretrained_model_name_or_path"]),
        lora=_lora(model.get("llm_lora")),
        visual_encoder=encoder,
        freeze_visual_encoder=bool(model.get("freeze_visual_encoder", False)),
        visual_select_layer=int(model.get("visual_select_layer", -2)),
        sub_image_mask=str(model.get("sub_image_mask", "exact")),
        prompt_template=template.fields(),
        **trained_preparation(cfg),
        training=_training_settings(cfg, dataset, Path(config_file)),
        slide_tokens=slide_tokens,
        **statistics,
    )

    def save_tokenizer(folder: Path) -> None:
        BUILDER.build(cfg.tokenizer).save_pretrained(folder)

    return recipe, save_tokenizer


def trained_preparation(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Returns how training prepared images, which inference repeats; the keys are `Recipe`'s.

    Raises:
        ValueError: If the datasets prepare them differently, since a model records only one way.
    """
    return {
        "ties": str(_shared(cfg, "grid_ties", TRAINING_TIES)),
        "pad_to_square": bool(_shared(cfg, "pad_image_to_square", False)),
        "sub_images": bool(_shared(cfg, "anyres_image", True)),
    }


def _shared(cfg: Mapping[str, Any], field: str, default: Any) -> Any:
    """Returns a field that all training datasets must have in common."""
    values = {where: dataset.get(field, default) for where, dataset in training_datasets(cfg)}
    if len(set(values.values())) > 1:
        found = ", ".join(f"{where}: {value!r}" for where, value in values.items())
        raise ValueError(f"{field}: expected the same for all data sets, found {found}")
    return next(iter(values.values()), default)


def _lora(lora: Any) -> dict[str, Any]:
    """Reads the LoRA settings with PEFT's own class, which fills in its defaults."""
    if lora is None:
        return {}
    from peft import LoraConfig

    config = BUILDER.build(dict(lora)) if isinstance(lora, Mapping) else lora
    if not isinstance(config, LoraConfig):
        raise ValueError(f"model.llm_lora: expected a LoraConfig, found {type(config).__name__}")
    values = asdict(config)
    kept = {name: values[name] for name in _LORA_FIELDS if name in values}
    return {name: sorted(v) if isinstance(v, set) else v for name, v in kept.items()}


def _slide_tokens(encoder: Any, dataset: Mapping[str, Any]) -> dict[str, Any]:
    """Returns all fields of the slide token encoder's config; empty for a model of images."""
    if "features_folder" not in dataset or not isinstance(encoder, Mapping):
        return {}
    return asdict(SlideTokenConfig(**{k: v for k, v in encoder.items() if k != "type"}))


def _refuse_names(value: Any, config_file: object) -> None:
    name = value.get("encoder") if isinstance(value, Mapping) else str(value)
    if (isinstance(value, Mapping) and name) or str(name).startswith(PREFIX):
        name = str(name).removeprefix(PREFIX)
        raise ValueError(
            f"{config_file}: its vision encoder {name} has a network that cannot travel with an "
            "exported model, which carries CLIP's alone; use `xtuner-add convert pth_to_hf`, and "
            f"`xtuner-add answer --llava FOLDER --visual-encoder {PREFIX}{name}`"
        )


def _encoder_folder(value: Any) -> str:
    if isinstance(value, Mapping):
        return str(value["pretrained_model_name_or_path"])
    name, separator, folder = str(value).partition(":")
    return folder if separator and name and not Path(str(value)).exists() else str(value)


def _image_statistics(cfg: Any, encoder: str) -> dict[str, Any]:
    from transformers import CLIPImageProcessor

    named = (cfg.get("image_processor") or {}).get("pretrained_model_name_or_path") or encoder
    for folder in (str(named), encoder):
        if (Path(folder) / "preprocessor_config.json").is_file():
            processor = CLIPImageProcessor.from_pretrained(folder)
            return {
                "image_mean": list(processor.image_mean),
                "image_std": list(processor.image_std),
            }
    return {"image_mean": list(CLIP_MEAN), "image_std": list(CLIP_STD)}


def _training_settings(cfg: Any, dataset: Mapping[str, Any], config_file: Path) -> dict[str, Any]:
    optimizer = (cfg.get("optim_wrapper") or {}).get("optimizer") or {}
    loader = cfg.get("train_dataloader") or {}
    return {
        "config": config_file.name,
        "data": str(dataset.get("data_path") or ""),
        "max_epochs": (cfg.get("train_cfg") or {}).get("max_epochs"),
        "learning_rate": optimizer.get("lr"),
        "weight_decay": optimizer.get("weight_decay"),
        "batch_size_per_device": loader.get("batch_size"),
        "accumulative_counts": (cfg.get("optim_wrapper") or {}).get("accumulative_counts"),
        "max_length": dataset.get("max_length"),
    }
