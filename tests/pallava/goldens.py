"""Recorded outputs of the published code, and our modules with the recorded weights."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPVisionConfig

from pallava.modeling.folders import connector_config_of
from pallava.modeling.llava import PALLaVA, SubImageMask
from pallava.modeling.plip import PLIPVisionEncoder, published_names
from pallava.modeling.qformer import ScaleInvariantConnector, connector_state_dict
from pathcore.weights import load_strict, read_state_dict

GOLDEN = Path(__file__).parents[1] / "golden" / "pallava"
RELEASED_PTH = GOLDEN / "model" / "released" / "tiny_release.pth"
RELEASED_ZERO2 = GOLDEN / "model" / "released" / "deepspeed_zero2_dir" / "iter_1.pth"
CROSSATTN_STATE = GOLDEN / "model" / "crossattn" / "state_dict.safetensors"
TINY_LLAMA = GOLDEN / "model" / "tiny_llama"

ENCODER_ATOL = 2e-6
LOSS_ATOL = 1e-5
NORM_RTOL = 1e-4
"""Tolerances of the goldens' README."""


def read_json(name: str) -> Any:
    return json.loads((GOLDEN / name).read_text())


def read_tensors(name: str) -> dict[str, Tensor]:
    return load_file(str(GOLDEN / name))


@lru_cache(maxsize=1)
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY_LLAMA)


def encoder(size: str = "img32") -> PLIPVisionEncoder:
    """The recorded encoder, in evaluation mode and not frozen."""
    module = PLIPVisionEncoder(CLIPVisionConfig(**read_json(f"visual_encoder/{size}_config.json")))
    weights = published_names(read_tensors(f"visual_encoder/{size}_weights.safetensors"))
    load_strict(module, weights, what="encoder")
    return module.eval()


def connector(kind: str) -> ScaleInvariantConnector:
    """The recorded connector, `released` or `crossattn`, in evaluation mode."""
    return connector_with(read_tensors(f"projector/{kind}_A_h64_heads4_weights.safetensors"))


def connector_with(state_dict: dict[str, Tensor]) -> ScaleInvariantConnector:
    config = connector_config_of(state_dict, num_attention_heads=4)
    module = ScaleInvariantConnector(config)
    load_strict(module, state_dict, what="connector")
    return module.eval()


def llm(**lora: Any) -> nn.Module:
    """The recorded Llama; with LoRA of the recorded size unless `r=0`."""
    model = AutoModelForCausalLM.from_pretrained(TINY_LLAMA)
    if lora.get("r") == 0:
        return model
    return get_peft_model(model, lora_config(**lora))


def lora_config(**changes: Any) -> LoraConfig:
    fields = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return LoraConfig(**(fields | changes))


def model(checkpoint: Path, sub_image_mask: SubImageMask = "exact") -> PALLaVA:
    """The whole recorded model, its encoder frozen, in evaluation mode."""
    state_dict = read_state_dict(checkpoint)
    whole = PALLaVA(
        llm(),
        encoder().requires_grad_(False),
        connector_with(connector_state_dict(state_dict)),
        sub_image_mask=sub_image_mask,
    )
    result = whole.load_state_dict(state_dict, strict=False)
    assert not result.unexpected_keys
    missing = [name for name in result.missing_keys if "lora_" in name or "projector" in name]
    assert not missing
    return whole.eval()


def without_dropout(module: nn.Module) -> nn.Module:
    """Training mode with every dropout off, so that results can be compared."""
    module.train()
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return module


def gradient_norms(module: nn.Module) -> dict[str, float]:
    """L2 norm of every trained parameter's gradient, 0 where it has none."""
    return {
        name: 0.0 if parameter.grad is None else float(parameter.grad.norm())
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
