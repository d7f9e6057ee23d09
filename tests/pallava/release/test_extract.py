from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, Qwen2Config

from pallava.release.extract import extract_adapter
from pallava.release.merge import check_merge, merge
from pathcore.weights import CheckpointError
from tests.pallava.release.models import load, save_adapter, save_llama


def test_check_finds_one_changed_number(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base", torch.bfloat16)
    adapter = save_adapter(base, tmp_path / "adapter")
    merge(base, [adapter], tmp_path / "out", progress=False)
    whole = check_merge(base, [adapter], tmp_path / "out", progress=False)
    assert (whole.num_equal, whole.roundings) == (whole.num_tensors, 0.0)
    shard = sorted((tmp_path / "out").glob("*.safetensors"))[1]
    tensors = load_file(shard)
    name = next(name for name, tensor in tensors.items() if tensor.dim() == 2)
    tensors[name][0, 0] += 1
    save_file(tensors, shard)
    changed = check_merge(base, [adapter], tmp_path / "out", progress=False)
    assert changed.worst == name and changed.roundings > 1


def edit_config(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_bytes()) | fields
    file.write_text(json.dumps({name: v for name, v in config.items() if v is not ...}))


def add_tensor(folder: Path, name: str, tensor: Tensor | None = None) -> None:
    """Adds a tensor, or a copy of the embeddings."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[name] = tensors["model.embed_tokens.weight"] if tensor is None else tensor
    save_file({n: t.clone() for n, t in tensors.items()}, file, metadata={"format": "pt"})


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "copy": (lambda out: add_tensor(out, "lm_head.weight", torch.randn(97, 48)), "lm_head.weight"),
    "junk": (lambda out: add_tensor(out, "model.junk", torch.ones(2)), "model.junk"),
    "rope_theta": (lambda out: edit_config(out, rope_theta=5.0), "rope_theta is 5.0, expected 10"),
    "rope_scaling": (
        lambda out: edit_config(out, rope_scaling={"rope_type": "linear", "factor": 2.0}),
        "rope_scaling is {",
    ),
    "heads": (
        lambda out: edit_config(out, num_attention_heads=2, num_key_value_heads=1, head_dim=24),
        "head_dim is 24",
    ),
    "type": (lambda out: edit_config(out, model_type="mistral"), "model_type is 'mistral'"),
    "quantised": (
        lambda out: edit_config(out, quantization_config={"quant_method": "bitsandbytes"}),
        "before it is quantised",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_check_finds_what_makes_equal_tensors_another_model(change: str, tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base", tie_word_embeddings=True, max_shard_size="1GB")
    adapter = save_adapter(base, tmp_path / "adapter")
    merge(base, [adapter], tmp_path / "out", progress=False)
    make_wrong, message = CHANGES[change]
    make_wrong(tmp_path / "out")
    with pytest.raises(CheckpointError, match=re.escape(message)):
        check_merge(base, [adapter], tmp_path / "out", progress=False)


def test_check_finds_untied_embeddings_that_are_tied_again(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base", tie_word_embeddings=True)
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["lm_head"])
    merge(base, [adapter], tmp_path / "out", progress=False)
    check_merge(base, [adapter], tmp_path / "out", progress=False)
    edit_config(tmp_path / "out", tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match="ties the output layer"):
        check_merge(base, [adapter], tmp_path / "out", progress=False)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("safe", [True, False])
def test_check_accepts_what_peft_saves(
    tied: bool, dtype: torch.dtype, safe: bool, tmp_path: Path
) -> None:
    base = save_llama(tmp_path / "base", tie_word_embeddings=tied, max_shard_size="1GB")
    adapter = save_adapter(base, tmp_path / "adapter")
    # As the config of an older release, and with a buffer of one.
    edit_config(base, dtype=..., torch_dtype="float32", head_dim=..., mlp_bias=..., use_cache=False)
    add_tensor(base, "model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(6))
    model = PeftModel.from_pretrained(load(base), adapter).merge_and_unload()
    model.config.pad_token_id = 0
    model.to(dtype).save_pretrained(tmp_path / "out", safe_serialization=safe)
    found = check_merge(base, [adapter], tmp_path / "out", progress=False)
    assert found.roundings <= 1
    if safe and tied:
        add_tensor(tmp_path / "out", "lm_head.weight")
        edit_config(tmp_path / "out", tie_word_embeddings=False)
        assert check_merge(base, [adapter], tmp_path / "out", progress=False) == found


def test_extracted_adapter_leads_to_the_tuned_model(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", modules_to_save=["input_layernorm"])
    merge(base, [adapter], tmp_path / "tuned", progress=False)
    lost = extract_adapter(base, tmp_path / "tuned", tmp_path / "found", rank=4, progress=False)
    assert lost < 1e-4
    merge(base, [tmp_path / "found"], tmp_path / "again", progress=False)
    again = load(tmp_path / "again").state_dict()
    for name, tensor in load(tmp_path / "tuned").state_dict().items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-4, atol=1e-5)
    assert (
        extract_adapter(base, tmp_path / "tuned", tmp_path / "less", rank=1, progress=False) > 0.1
    )


SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 100}
QWEN2 = Qwen2Config(**SIZES, hidden_size=32, intermediate_size=64, num_key_value_heads=1)
GPT2 = GPT2Config(**SIZES, hidden_size=32, n_positions=64)  # transposed square matrices, tied


@pytest.mark.parametrize("kind", ["biases", "all", "tied", "transposed"])
@pytest.mark.parametrize("rank", [16, 32])
def test_peft_and_merge_give_what_the_tuned_model_computes(
    kind: str, rank: int, tmp_path: Path
) -> None:
    config = copy.deepcopy(GPT2 if kind == "transposed" else QWEN2)
    config.tie_word_embeddings = kind in ("tied", "transposed")
    part = {"biases": r"(q_proj\.(weight|bias)|v_proj\.bias)$"}.get(kind, "")
    generator = torch.Generator().manual_seed(0)
    tuned = AutoModelForCausalLM.from_config(config).eval()
    for tensor in tuned.parameters():  # the initial values hardly depend on biases and positions
        tensor.data = torch.randn(tensor.shape, generator=generator) * 0.3
    tuned.save_pretrained(tmp_path / "base")
    for name, tensor in tuned.named_parameters():
        if re.search(part, name):
            noise = torch.randn(tensor.shape, generator=generator)
            is_narrow = tensor.dim() == 2 and not re.search("embed|wte|wpe", name)
            if is_narrow:  # of a rank that the adapter can hold
                noise = noise[:, :8] @ torch.randn((8, tensor.shape[1]), generator=generator) / 8
            tensor.data += noise * 0.3
    tuned.save_pretrained(tmp_path / "tuned")
    extract_adapter(
        tmp_path / "base", tmp_path / "tuned", tmp_path / "found", rank=rank, progress=False
    )
    ids = torch.arange(20)[None]
    expected = tuned(ids).logits
    peft = PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "found").eval()
    torch.testing.assert_close(peft(ids).logits, expected, rtol=1e-3, atol=1e-3)
    merge(tmp_path / "base", [tmp_path / "found"], tmp_path / "merged", progress=False)
    merged = load(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-3, atol=1e-3)


def test_nothing_to_extract(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base")
    with pytest.raises(CheckpointError, match="does not differ"):
        extract_adapter(base, base, tmp_path / "found", rank=4, progress=False)


def test_without_a_linear_layer_peft_loads_nothing(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base", max_shard_size="1GB")
    tuned = load(base)
    tuned.model.norm.weight.data += 1
    tuned.save_pretrained(tmp_path / "tuned")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*no weight of a linear layer"):
        extract_adapter(base, tmp_path / "tuned", tmp_path / "found", rank=4, progress=False)
