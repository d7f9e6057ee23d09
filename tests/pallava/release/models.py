"""Small models and adapters for the converters, and PEFT's own answer to compare with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


def save_llama(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A Llama with two layers, in several shards unless `max_shard_size` says otherwise."""
    saving = {
        key: changes.pop(key) for key in ("safe_serialization", "max_shard_size") if key in changes
    }
    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 97,
            "tie_word_embeddings": False,
            **changes,
        }
    )
    model = LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder, **({"max_shard_size": "60KB"} | saving))
    return folder


def load(folder: Path) -> nn.Module:
    """A model in the types it was saved in."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def save_adapter(
    base: Path, folder: Path, dtype: torch.dtype = torch.float32, seed: int = 1, **changes: Any
) -> Path:
    """Trains nothing: sets every trained tensor to noise and saves as PEFT does."""
    resize = changes.pop("resize", None)
    safe = changes.pop("safe_serialization", True)
    fields = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = load(base)
    if resize:
        model.resize_token_embeddings(resize)
    model = get_peft_model(model, LoraConfig(**(fields | changes)))
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.named_parameters():
        if tensor.requires_grad or "magnitude" in name:
            noise = torch.randn(tensor.shape, generator=generator) * 0.1
            # DoRA's magnitudes are lengths
            tensor.data = ((noise.abs() + 0.5) if "magnitude" in name else noise).to(dtype)
    model.save_pretrained(folder, safe_serialization=safe)
    return folder


def merged_by_peft(base: Path, *adapters: Path, resize: int | None = None) -> dict[str, Tensor]:
    """The weights after PEFT's `merge_and_unload`."""
    model = load(base)
    if resize:
        model.resize_token_embeddings(resize)
    names = [f"adapter{index}" for index in range(len(adapters))]
    peft = PeftModel.from_pretrained(model, adapters[0], adapter_name=names[0])
    for name, adapter in zip(names[1:], adapters[1:], strict=True):
        peft.load_adapter(adapter, adapter_name=name)
    merged = peft.merge_and_unload(adapter_names=names)
    return {name: tensor.clone() for name, tensor in merged.state_dict().items()}
