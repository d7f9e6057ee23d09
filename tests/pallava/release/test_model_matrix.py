"""Language models of every family with every kind of adapter, merged and exported.

The adapters are written by PEFT and the bases by transformers. The reference is PEFT's own model:
base and adapter, not merged.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CLIPVisionConfig

from pallava.modeling.folders import save_connector, save_vision_encoder
from pallava.modeling.hf import PALLaVAForConditionalGeneration
from pallava.modeling.plip import PLIPVisionEncoder
from pallava.modeling.qformer import ConnectorConfig, ScaleInvariantConnector
from pallava.release.export import export
from pallava.release.merge import merge
from pathcore.files import write_json
from tests.pallava.goldens import tokenizer
from tests.pallava.release.models import save_adapter

WIDTH = 32
VOCABULARY = 96
SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 3,  # one more than the probe looks at
    "num_attention_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = SIZES | {"num_key_value_heads": 1}
GEMMA = GROUPED | {"head_dim": 16}
GPT2 = {"n_embd": WIDTH, "n_layer": 3, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": 64}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", GROUPED | {"tie_word_embeddings": False}),
    "llama_tied": ("Llama", GROUPED | {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", GROUPED),
    "qwen3": ("Qwen3", GROUPED | {"head_dim": 16, "tie_word_embeddings": True}),
    "mistral": ("Mistral", GROUPED | {"head_dim": 16, "sliding_window": 4}),
    "mixtral": ("Mixtral", GROUPED | {"num_local_experts": 3, "num_experts_per_tok": 2}),
    "gemma": ("Gemma", GEMMA),
    "gemma2": ("Gemma2", GEMMA),
    "gemma3": ("Gemma3", GEMMA),
    "phi": ("Phi", SIZES),
    "phi3": ("Phi3", GROUPED),
    "opt": ("OPT", SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 16}),
    "gpt2": ("GPT2", GPT2 | {"bos_token_id": 1, "eos_token_id": 2}),
    "gpt_neox": ("GPTNeoX", SIZES),
    "olmo2": ("Olmo2", GROUPED),
    "smollm3": ("SmolLM3", GROUPED),
}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "modules_to_save": {"modules_to_save": ["EMBEDDINGS", "HEAD"]},
    "embeddings": {"target_modules": ["EMBEDDINGS", "HEAD"]},
    "resized": {"resize": VOCABULARY + 8},
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `pth-to-hf` writes beside the adapter."""
    root = tmp_path_factory.mktemp("parts")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision = CLIPVisionConfig(num_attention_heads=2, image_size=32, patch_size=16, **sizes)
    save_vision_encoder(PLIPVisionEncoder(vision), root / "visual_encoder")
    connector = {"visual_hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    for width in (16, WIDTH):
        config = ConnectorConfig(llm_hidden_size=width, intermediate_size=16, **connector)
        save_connector(ScaleInvariantConnector(config), root / f"projector{width}")
    tokenizer().save_pretrained(root)
    recipe = {"base_model": "base", "lora": {}, "visual_encoder": "plip"}
    write_json(root / "conversion.json", recipe)
    return root


def save_base(family: str, folder: Path, **changes: Any) -> Path:
    name, sizes = FAMILIES[family]
    suffix = "TextConfig" if name == "Gemma3" else "Config"
    config = getattr(transformers, f"{name}{suffix}")(**(sizes | changes))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(1)
    for tensor in model.parameters():  # biases and norms too, so that a lost one shows
        tensor.data += 0.1 * torch.randn(tensor.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


def module_names(base: Path) -> dict[str, str]:
    model = AutoModelForCausalLM.from_pretrained(base)
    layers = {"EMBEDDINGS": model.get_input_embeddings(), "HEAD": model.get_output_embeddings()}
    return {
        key: name.rpartition(".")[2]
        for key, layer in layers.items()
        for name, module in model.named_modules()
        if module is layer
    }


def logits(model: nn.Module) -> Tensor:
    ids = torch.arange(3, 51).view(4, 12)
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits[..., :VOCABULARY]


def trained_model(base: Path, adapter: Path, resize: int | None) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(base)
    if resize:
        model.resize_token_embeddings(resize)
    return PeftModel.from_pretrained(model, adapter)


def load_whole(model_class: Any, folder: Path) -> Any:
    model, report = model_class.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_and_exported_models_compute_what_peft_computes(
    family: str, parts: Path, tmp_path: Path
) -> None:
    base = save_base(family, tmp_path / "base")
    names = module_names(base)
    width = AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().weight.shape[1]
    converted = tmp_path / "converted"
    shutil.copytree(parts, converted)
    (converted / f"projector{width}").rename(converted / "projector")
    for kind, changes in KINDS.items():
        changes = {
            key: [names.get(name, name) for name in value] if isinstance(value, list) else value
            for key, value in changes.items()
        }
        adapter = save_adapter(base, converted / "llm_adapter", seed=2, **changes)
        merged, exported = tmp_path / kind, tmp_path / f"{kind}_exported"
        expected = logits(trained_model(base, adapter, changes.get("resize")))
        merge(base, [adapter], merged, progress=False)
        found = logits(load_whole(AutoModelForCausalLM, merged))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg=kind)
        # Merging has compared the same tensors with PEFT already, except for their names.
        export(base, converted, exported, probe=kind == "lora", progress=False)
        whole = load_whole(PALLaVAForConditionalGeneration, exported)
        torch.testing.assert_close(logits(whole.llm), expected, rtol=1e-4, atol=1e-4, msg=kind)
        shutil.rmtree(adapter)
