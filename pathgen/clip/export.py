"""A trained CLIP as folders that other libraries load.

`open_clip/` is read by open_clip (`local-dir:FOLDER`) and by CITE's prompted encoders; `hf/` by
transformers' CLIP classes, where the architecture is CLIP's own: plain ViT with class token, text
transformer with causal mask (Radford et al. 2021, https://arxiv.org/abs/2103.00020).
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from pathcore.files import StrPath, fsync_path

CONFIG_NAME = "open_clip_config.json"
WEIGHTS_NAME = "open_clip_model.safetensors"

_BLOCK = (
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    ("attn.out_proj", "self_attn.out_proj"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
)
_SINGLE = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}
_TRANSPOSED = {
    "visual.proj": "visual_projection.weight",
    "text_projection": "text_projection.weight",
}
_PLAIN_VISION = {"image_size", "layers", "width", "head_width", "mlp_ratio", "patch_size"}
_PLAIN_TEXT = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}
_SAMPLE = "Invasive ductal carcinoma, grade 2 (H&E): nests of atypical cells."


class ExportError(ValueError):
    """A model that the other library has no class for."""


def model_config(model: str, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns the config of an architecture, changed by the trainer's `force_...` options.

    Args:
        model: Name, or JSON file.
        options: Of open_clip's trainer.

    Raises:
        ValueError: open_clip does not know it.
    """
    import open_clip

    options = options or {}
    if model.endswith(".json"):
        config = json.loads(Path(model).read_text(encoding="utf-8"))
    else:
        config = open_clip.get_model_config(model)
    if not isinstance(config, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= set(config):
        raise ValueError(
            f"model {model}: expected a name of open_clip.list_models(), or a JSON file with "
            "embed_dim, vision_cfg and text_cfg"
        )
    config = copy.deepcopy(config)
    if size := options.get("force_image_size"):
        size = size if isinstance(size, int) else list(size)
        config["vision_cfg"]["image_size"] = size[0] if size == [size] else size
    if length := options.get("force_context_length"):
        config["text_cfg"]["context_length"] = length
    if options.get("force_quick_gelu"):
        config["quick_gelu"] = True
    if options.get("force_custom_text"):
        config["custom_text"] = True
    if options.get("siglip"):
        config["init_logit_bias"] = -10
    return config


def export_open_clip(
    checkpoint: StrPath,
    out: StrPath,
    *,
    config: Mapping[str, Any],
    preprocessing: Mapping[str, Any],
) -> Path:
    """Writes the folder that `open_clip.create_model("local-dir:OUT")` loads.

    Args:
        checkpoint: Checkpoint of open_clip's trainer.
        out: Output folder; an existing one is replaced.
        config: Config of the architecture, as returned by `model_config`.
        preprocessing: `mean`, `std`, and `interpolation`, `resize_mode` where set.

    Raises:
        ValueError: If the checkpoint is not of this architecture, or contains NaN.
    """
    import open_clip
    import torch
    from open_clip.factory import load_state_dict
    from safetensors.torch import save_file

    weights = {k: v.contiguous() for k, v in load_state_dict(str(checkpoint)).items()}
    bad = [n for n, v in weights.items() if v.is_floating_point() and not torch.isfinite(v).all()]
    if bad:
        raise ValueError(f"{checkpoint}: infinities or NaN in {bad[:3]}: the training diverged")
    with whole_folder(out) as folder:
        described = {"model_cfg": dict(config), "preprocess_cfg": dict(preprocessing)}
        (folder / CONFIG_NAME).write_text(json.dumps(described, indent=2), encoding="utf-8")
        save_file(weights, folder / WEIGHTS_NAME)
        if config["text_cfg"].get("hf_tokenizer_name"):
            tokenizer = open_clip.tokenizer.HFTokenizer(config["text_cfg"]["hf_tokenizer_name"])
            tokenizer.save_pretrained(str(folder))
        # A folder that does not load must not appear: every name and shape is checked here.
        open_clip.create_model(f"local-dir:{folder}", precision="fp32", device="cpu")
    return Path(out)


def export_hugging_face(open_clip_folder: StrPath, out: StrPath) -> Path:
    """Writes the folder that transformers' `CLIPModel` and `CLIPProcessor` load.

    Raises:
        ExportError: If transformers has no class for the architecture; the message says why.
    """
    from safetensors.torch import load_file
    from transformers import CLIPImageProcessor, CLIPModel, CLIPProcessor

    source = Path(open_clip_folder)
    described = json.loads((source / CONFIG_NAME).read_text(encoding="utf-8"))
    config, preprocessing = described["model_cfg"], described["preprocess_cfg"]
    model = CLIPModel(hugging_face_config(config))
    model.load_state_dict(hugging_face_names(load_file(source / WEIGHTS_NAME)))
    size = config["vision_cfg"].get("image_size", 224)
    images = CLIPImageProcessor(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=list(preprocessing["mean"]),
        image_std=list(preprocessing["std"]),
    )
    with whole_folder(out) as folder:
        tokenizer = _tokenizer(folder, config["text_cfg"].get("context_length", 77))
        CLIPProcessor(images, tokenizer).save_pretrained(folder)
        model.save_pretrained(folder, safe_serialization=True)
    return Path(out)


def hugging_face_config(config: Mapping[str, Any]) -> Any:
    """Returns the `CLIPConfig` of an architecture of open_clip.

    Raises:
        ExportError: It has parts that transformers' CLIP has not.
    """
    from transformers import CLIPConfig

    vision, text = config["vision_cfg"], config["text_cfg"]
    others = sorted({*(set(vision) - _PLAIN_VISION), *(set(text) - _PLAIN_TEXT)})
    if others or not isinstance(vision.get("layers", 12), int):
        raise ExportError(
            f"no class of transformers' CLIP for this architecture: it has {others or 'a ResNet'}"
        )
    if config.get("init_logit_bias") is not None:
        raise ExportError("no class of transformers' CLIP for a logit bias")
    width, text_width = vision.get("width", 768), text.get("width", 512)
    act = "quick_gelu" if config.get("quick_gelu") else "gelu"
    return CLIPConfig(
        projection_dim=config["embed_dim"],
        vision_config={
            "hidden_size": width,
            "intermediate_size": int(width * vision.get("mlp_ratio", 4.0)),
            "num_hidden_layers": vision.get("layers", 12),
            "num_attention_heads": width // vision.get("head_width", 64),
            "image_size": vision.get("image_size", 224),
            "patch_size": vision.get("patch_size", 16),
            "projection_dim": config["embed_dim"],
            "hidden_act": act,
        },
        text_config={
            "vocab_size": text.get("vocab_size", 49408),
            "hidden_size": text_width,
            "intermediate_size": int(text_width * text.get("mlp_ratio", 4.0)),
            "num_hidden_layers": text.get("layers", 12),
            "num_attention_heads": text.get("heads", 8),
            "max_position_embeddings": text.get("context_length", 77),
            "projection_dim": config["embed_dim"],
            "hidden_act": act,
            "bos_token_id": 49406,
            "eos_token_id": 49407,
            "pad_token_id": 49407,
        },
    )


def hugging_face_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gives a CLIP of open_clip the names of transformers' `CLIPModel`.

    Raises:
        ExportError: A name that is none of a plain CLIP.
    """
    converted: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        name = re.sub(r"^text\.", "", name)  # of CustomTextCLIP
        if name in _SINGLE:
            converted[_SINGLE[name]] = tensor
        elif name in _TRANSPOSED:
            converted[_TRANSPOSED[name]] = tensor.t().contiguous()
        elif found := re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)", name):
            tower = "vision_model" if found[1] else "text_model"
            converted |= _block(f"{tower}.encoder.layers.{found[2]}", found[3], tensor)
        elif name != "attn_mask":
            raise ExportError(f"{name}: not a name of a plain CLIP")
    return converted


def _block(prefix: str, name: str, tensor: Tensor) -> dict[str, Tensor]:
    if found := re.fullmatch(r"attn\.in_proj_(weight|bias)", name):
        parts = tensor.chunk(3)
        return {
            f"{prefix}.self_attn.{kind}_proj.{found[1]}": part.clone()
            for kind, part in zip("qkv", parts, strict=True)
        }
    for ours, theirs in _BLOCK:
        if name in (f"{ours}.weight", f"{ours}.bias"):
            return {f"{prefix}.{theirs}.{name.removeprefix(ours + '.')}": tensor}
    raise ExportError(f"{prefix}.{name}: not a name of a plain CLIP")


def _tokenizer(folder: Path, context_length: int) -> Any:
    """Builds transformers' tokenizer from the byte pairs in open_clip's package."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizerFast

    theirs = SimpleTokenizer()
    vocab = {
        token.replace("<start_of_text>", "<|startoftext|>").replace(
            "<end_of_text>", "<|endoftext|>"
        ): number
        for token, number in theirs.encoder.items()
    }
    merges = sorted(theirs.bpe_ranks, key=theirs.bpe_ranks.__getitem__)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizerFast(
        vocab_file=str(folder / "vocab.json"),
        merges_file=str(folder / "merges.txt"),
        pad_token="<|endoftext|>",
        model_max_length=context_length,
    )
    ids = [theirs.sot_token_id, *theirs.encode(_SAMPLE), theirs.eot_token_id]
    found = tokenizer(_SAMPLE)["input_ids"]
    if found != ids[: len(found)] or len(found) != len(ids):
        raise ExportError(f"tokenizers differ: {found[:8]} instead of {ids[:8]}")
    return tokenizer


@contextmanager
def whole_folder(out: StrPath) -> Iterator[Path]:
    """Yields a temporary folder, then fsyncs its files and renames it over `out`."""
    out = Path(out)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        for file in partial.rglob("*"):
            fsync_path(file)
        if out.exists():
            os.replace(out, old)
        os.replace(partial, out)
        fsync_path(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
