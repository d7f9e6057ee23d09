"""Merging compared with PEFT: bitwise equal in fp32, one rounding step in half precision."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from pallava.folder_build import read_manifest
from pallava.release import merge as merging
from pallava.release.adapters import AdapterError
from pallava.release.base_model import BaseModel
from pallava.release.merge import Merger, OutputTensor, merge
from pallava.release.weights import SafetensorsFile
from pathcore.files import sha256_of
from pathcore.weights import CheckpointError
from tests.pallava.release.models import load, merged_by_peft, save_adapter, save_llama

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def read(folder: Path) -> dict[str, Tensor]:
    return {
        k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()
    }


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [
        name
        for name, tensor in expected.items()
        if found[name].dtype != tensor.dtype or not torch.equal(found[name], tensor)
    ]
    assert not different, f"{len(different)} of {len(expected)} differ: {different[:3]}"


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "half_adapter": {"dtype": torch.float16},
    "patterns": {
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 7},
        "alpha_pattern": {"k_proj": 3},
    },
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True, "target_modules": LINEAR},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "dora_embedding": {"use_dora": True, "target_modules": ["q_proj", "embed_tokens"]},
    "lm_head": {"target_modules": ["q_proj", "lm_head"]},
    "modules_to_save": {"modules_to_save": ["lm_head", "input_layernorm"]},
    "bin_adapter": {"safe_serialization": False},
}


@pytest.mark.parametrize("kind", KINDS)
def test_fp32_equals_peft_bit_for_bit(kind: str, tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", **KINDS[kind])
    merge(base, [adapter], tmp_path / "out", progress=False)
    assert_equal(read(tmp_path / "out"), merged_by_peft(base, adapter))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases(bias: str, tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base", attention_bias=True, mlp_bias=True)
    adapter = save_adapter(base, tmp_path / "adapter", bias=bias)
    merge(base, [adapter], tmp_path / "out", progress=False)
    assert_equal(read(tmp_path / "out"), merged_by_peft(base, adapter))


def test_bias_of_lora_itself(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base", attention_bias=True)
    adapter = save_adapter(base, tmp_path / "adapter", lora_bias=True, target_modules=["q_proj"])
    merge(base, [adapter], tmp_path / "out", progress=False)
    assert_equal(read(tmp_path / "out"), merged_by_peft(base, adapter))


def test_several_adapters_in_one_pass(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base")
    first = save_adapter(base, tmp_path / "first", target_modules=LINEAR)
    second = save_adapter(base, tmp_path / "second", seed=2, r=3, target_modules=LINEAR[:3])
    merge(base, [first, second], tmp_path / "out", progress=False)
    assert_equal(read(tmp_path / "out"), merged_by_peft(base, first, second))
    dora = save_adapter(base, tmp_path / "dora", seed=3, use_dora=True, target_modules=LINEAR[2:])
    merge(base, [first, dora], tmp_path / "out_dora", progress=False)
    found = read(tmp_path / "out_dora")
    for name, tensor in merged_by_peft(base, first, dora).items():
        # PEFT takes the first adapter out again for the norm, and so rounds once more
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


def test_transposed_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=16)
    config.tie_word_embeddings = False
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    for use_dora in (False, True):
        adapter = save_adapter(
            tmp_path / "base",
            tmp_path / f"adapter{use_dora}",
            target_modules=["c_attn", "c_proj"],
            fan_in_fan_out=True,
            use_dora=use_dora,
        )
        out = tmp_path / f"out{use_dora}"
        merge(tmp_path / "base", [adapter], out, progress=False)
        expected = merged_by_peft(tmp_path / "base", adapter)
        assert_equal(read(out), {k: v for k, v in expected.items() if k in read(out)})
        assert torch.equal(load(out).lm_head.weight, expected["lm_head.weight"])


def test_square_matrices_of_conv1d_are_transposed_whatever_the_flag_says(tmp_path: Path) -> None:
    """PEFT leaves `fan_in_fan_out` at the value of the last module, here that of the head."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=16)
    config.tie_word_embeddings = False
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    targets = ["c_proj", "lm_head"]
    adapter = save_adapter(tmp_path / "base", tmp_path / "adapter", target_modules=targets)
    merge(tmp_path / "base", [adapter], tmp_path / "out", progress=False)
    expected = merged_by_peft(tmp_path / "base", adapter)
    found = read(tmp_path / "out")
    assert_equal(found, {name: t for name, t in expected.items() if name in found})


@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_4", "olora"])
def test_adapters_that_changed_their_base_are_refused(kind: str, tmp_path: Path) -> None:
    """PEFT subtracts the initial adapter from the base, which is stored nowhere."""
    base = save_llama(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", init_lora_weights=kind)
    with pytest.raises(AdapterError, match=f"init_lora_weights '{kind}' changed the base model"):
        merge(base, [adapter], tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_base_is_refused_unless_forced(tmp_path: Path) -> None:
    """Adapted layers have the same shapes in Llama and Mistral, and in two tunings of one model."""
    base = save_llama(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter")
    torch.manual_seed(5)
    changed = {name: t + 0.01 * torch.randn_like(t) for name, t in load(base).state_dict().items()}
    other = load(base)
    other.load_state_dict(changed)
    other.save_pretrained(tmp_path / "tuned")
    with pytest.raises(AdapterError, match=r"whose weights are not those of .*tuned"):
        merge(tmp_path / "tuned", [adapter], tmp_path / "out", progress=False)
    config = json.loads((base / "config.json").read_text())
    fields = {k: v for k, v in config.items() if k not in ("architectures", "model_type")}
    MistralForCausalLM(MistralConfig(**fields | {"head_dim": 12})).save_pretrained(
        tmp_path / "mistral"
    )
    with pytest.raises(AdapterError, match="model_type"):
        merge(tmp_path / "mistral", [adapter], tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    digests = merge(
        tmp_path / "tuned", [adapter], tmp_path / "out", progress=False, force_base=True
    )
    assert "model.safetensors.index.json" in digests or "model.safetensors" in digests
    shutil.rmtree(base)
    with pytest.raises(AdapterError, match="which is not to be found here"):
        merge(tmp_path / "mistral", [adapter], tmp_path / "out2", progress=False)


def test_the_base_is_looked_up_in_the_revision_that_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    repository = hub / "models--lab--model"
    for number, revision in enumerate(("main", "v2")):
        base = repository / "snapshots" / f"{number:040}"
        save_llama(base, initializer_range=0.1 + number)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(f"{number:040}")
    adapter = save_adapter(base, tmp_path / "adapter")
    file = adapter / "adapter_config.json"
    named = {"base_model_name_or_path": "lab/model", "revision": "v2"}
    file.write_text(json.dumps(json.loads(file.read_text()) | named))
    merge(base, [adapter], tmp_path / "out", progress=False)
    with pytest.raises(AdapterError, match="whose weights are not those of"):
        merge(repository / "snapshots" / f"{0:040}", [adapter], tmp_path / "o", progress=False)


@pytest.mark.parametrize(
    "kind", [{}, {"modules_to_save": ["embed_tokens", "lm_head"]}, {"modules_to_save": ["lm_head"]}]
)
@pytest.mark.parametrize("size", [104, 80])
def test_resized_embeddings(size: int, kind: dict[str, Any], tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", resize=size, **kind)
    merge(base, [adapter], tmp_path / "out", progress=False)
    assert_equal(read(tmp_path / "out"), merged_by_peft(base, adapter, resize=size))
    assert load(tmp_path / "out").config.vocab_size == size


@pytest.mark.parametrize("saved", ["lm_head", "mlp"])
def test_lora_for_what_another_adapter_holds_in_full_is_refused(saved: str, tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base")
    whole = save_adapter(
        base, tmp_path / "whole", target_modules=["q_proj"], modules_to_save=[saved]
    )
    lora = save_adapter(base, tmp_path / "lora", target_modules=["lm_head", "up_proj"])
    for adapters in ([whole, lora], [lora, whole]):
        with pytest.raises(AdapterError, match="merge that one first"):
            merge(base, adapters, tmp_path / "out", progress=False, probe=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["plain", "half_adapter", "dora", "dora_embedding", "embedding"])
def test_half_precision_is_rounded_once(
    kind: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(merging.BLOCK_NUMEL, "cpu", 1000)  # weights in several blocks
    base = save_llama(tmp_path / "base", dtype)
    adapter = save_adapter(base, tmp_path / "adapter", **KINDS[kind])
    merge(base, [adapter], tmp_path / "out", progress=False)
    # The exact result: the half-precision base, widened, merged in fp32.
    load(base).float().save_pretrained(tmp_path / "wide")
    exact = merged_by_peft(tmp_path / "wide", adapter)
    found = read(tmp_path / "out")
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    for name, tensor in exact.items():
        step = torch.finfo(dtype).eps * tensor.abs().clamp(min=torch.finfo(dtype).tiny)
        assert ((found[name].float() - tensor).abs() <= 0.5001 * step).all(), name
    if "dora" not in kind and "embedding" not in kind:  # there PEFT itself rounds more than once
        for name, tensor in merged_by_peft(base, adapter).items():
            wide = tensor.float()
            step = torch.finfo(dtype).eps * wide.abs().clamp(min=torch.finfo(dtype).tiny)
            assert ((found[name].float() - wide).abs() <= step).all(), name


def test_bin_base_and_pickle_in_it(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base", safe_serialization=False)
    if not (base / "pytorch_model.bin.index.json").is_file():  # newer versions write safetensors
        as_bin(base)
    adapter = save_adapter(base, tmp_path / "adapter")
    merge(base, [adapter], tmp_path / "out", progress=False)
    assert_equal(read(tmp_path / "out"), merged_by_peft(base, adapter))
    shard = next(base.glob("*.bin"))
    torch.save({"model.norm.weight": torch.ones(48), "evil": Path("/etc/passwd")}, shard)
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        merge(base, [adapter], tmp_path / "other", progress=False)


def as_bin(folder: Path) -> None:
    weight_map = {}
    for index, file in enumerate(sorted(folder.glob("*.safetensors"))):
        name = f"pytorch_model-{index}.bin"
        tensors = load_file(file)
        torch.save(tensors, folder / name)
        weight_map |= dict.fromkeys(tensors, name)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    (folder / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def test_tied_embeddings_stay_tied_unless_one_side_changed(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base", tie_word_embeddings=True)
    plain = save_adapter(base, tmp_path / "plain", target_modules=["q_proj"])
    merge(base, [plain], tmp_path / "tied", progress=False)
    assert_equal(read(tmp_path / "tied"), without_head(merged_by_peft(base, plain)))
    assert load(tmp_path / "tied").config.tie_word_embeddings

    one = save_adapter(
        base, tmp_path / "one", modules_to_save=["lm_head"], target_modules=["q_proj"]
    )
    merge(base, [one], tmp_path / "untied", progress=False)
    assert_equal(read(tmp_path / "untied"), merged_by_peft(base, one))
    # In training LoRA on the head left the embeddings as they were; PEFT's merge changes both.
    head = save_adapter(base, tmp_path / "head", target_modules=["lm_head"])
    merge(base, [head], tmp_path / "lora_head", progress=False)
    model, original = load(tmp_path / "lora_head"), load(base)
    assert not model.config.tie_word_embeddings
    assert torch.equal(model.model.embed_tokens.weight, original.model.embed_tokens.weight)
    assert torch.equal(model.lm_head.weight, merged_by_peft(base, head)["lm_head.weight"])

    resized = save_adapter(base, tmp_path / "resized", resize=104, target_modules=["q_proj"])
    merge(base, [resized], tmp_path / "both", progress=False)
    assert_equal(read(tmp_path / "both"), without_head(merged_by_peft(base, resized, resize=104)))


def without_head(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state_dict.items() if name != "lm_head.weight"}


def test_split_and_digests(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base", torch.bfloat16)
    digests = merge(base, [], tmp_path / "out", one_tensor_per_shard=True, progress=False)
    assert_equal(read(tmp_path / "out"), read(base))
    assert all(len(load_file(file)) == 1 for file in (tmp_path / "out").glob("*.safetensors"))
    load(tmp_path / "out")
    assert digests == {name: sha256_of(tmp_path / "out" / name) for name in digests}
    assert read_manifest(tmp_path / "out")[1].keys() == digests.keys()


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_shards_at_a_time_give_the_same_files(
    dtype: torch.dtype, tmp_path: Path, four_threads: None
) -> None:
    base = save_llama(tmp_path / "base", dtype, num_hidden_layers=8)
    adapter = save_adapter(base, tmp_path / "adapter")
    at_a_time = merge(base, [adapter], tmp_path / "several", progress=False)
    assert torch.get_num_threads() == 4
    torch.set_num_threads(1)
    assert merge(base, [adapter], tmp_path / "one", progress=False) == at_a_time
    assert len(at_a_time) > 8


def test_one_bad_shard_stops_the_others(
    tmp_path: Path, four_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_llama(tmp_path / "base", torch.float16, num_hidden_layers=24)
    adapter = save_adapter(base, tmp_path / "adapter")
    message = broken("overflow", base, adapter)
    begun: list[str] = []

    def blocks(self: Merger, tensor: OutputTensor) -> Iterator[torch.Tensor]:
        begun.append(tensor.info.name)
        yield from original(self, tensor)

    original = Merger.blocks
    monkeypatch.setattr(Merger, "blocks", blocks)
    with pytest.raises(AdapterError, match=message):
        merge(base, [adapter], tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    assert torch.get_num_threads() == 4
    assert len(begun) < len(read(base))


DAMAGED_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"r": 16}, "says 16"),
    "ia3": ({"peft_type": "IA3"}, "only LoRA"),
    "alora": ({"alora_invocation_tokens": [1]}, "cannot be merged"),
    "regex": ({"rank_pattern": {"q_proj(": 2}}, "not a regular expression"),
    "pattern_list": ({"rank_pattern": ["q_proj"]}, "expected names of modules with numbers"),
    "pattern_text": ({"alpha_pattern": {"q_proj": "eight"}}, "'eight'; expected a number"),
}


def broken(kind: str, base: Path, adapter: Path) -> str:
    """Damages a folder; returns what the error must say."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    first = next(name for name in tensors if "lora_A" in name)
    if kind in DAMAGED_CONFIGS:
        changes, message = DAMAGED_CONFIGS[kind]
        config |= changes
    elif kind == "nan":
        tensors[first][0, 0] = math.nan
        message = "infinities or NaN"
    elif kind == "half":
        del tensors[first]
        message = "lacks"
    elif kind == "other_base":
        tensors = {name.replace("layers.1", "layers.7"): tensor for name, tensor in tensors.items()}
        message = "right base model"
    elif kind == "width":
        tensors[first] = torch.zeros(4, 7)
        message = "is it the right base model"
    elif kind == "overflow":
        tensors[first] *= 1e38
        message = "cannot hold"
    elif kind == "training_names":
        tensors = {n.replace(".weight", ".default.weight"): t for n, t in tensors.items()}
        message = "pth-to-hf"
    elif kind == "int8":
        tensors = {n: t.to(torch.int8) for n, t in tensors.items()}
        message = "stored as torch.int8"
    elif kind == "fp8":
        tensors = {n: t.to(torch.float8_e4m3fn) for n, t in tensors.items()}
        message = "stored as torch.float8_e4m3fn"
    elif kind == "fp8_base":
        for shard in base.glob("*.safetensors"):
            eighth = {n: t.to(torch.float8_e4m3fn) for n, t in load_file(shard).items()}
            save_file(eighth, shard, metadata={"format": "pt"})
        message = "quantised"
    else:
        (base / "config.json").write_text(
            json.dumps(
                json.loads((base / "config.json").read_text()) | {"quantization_config": {"b": 4}}
            )
        )
        message = "unquantised"
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, file)
    return message


BREAKAGES = ["nan", "half", "rank", "other_base", "width", "overflow", "ia3", "alora", "quantised"]
BREAKAGES += ["training_names", "regex", "pattern_list", "pattern_text", "int8", "fp8", "fp8_base"]


@pytest.mark.parametrize("kind", BREAKAGES)
def test_broken_adapters_are_refused(kind: str, tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base", torch.float16)
    adapter = save_adapter(base, tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=broken(kind, base, adapter)):
        merge(base, [adapter], tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_damaged_safetensors(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base", max_shard_size="1GB")
    file = base / "model.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[:-100], b"\xff" * 8 + whole[8:], whole[:4], whole[:8] + b"[" + whole[9:]):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="no safetensors file"):
            merge(base, [], tmp_path / "out", progress=False)


def safetensors_bytes(header: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


F32 = {"dtype": "F32", "shape": [2]}


@pytest.mark.parametrize(
    "header",
    [
        {"a": F32 | {"data_offsets": [0, 8]}, "b": F32 | {"data_offsets": [4, 12]}},
        {"a": F32 | {"data_offsets": [0, 8]}, "b": F32 | {"data_offsets": [0, 8]}},
        {"a": F32 | {"data_offsets": [0, 8]}, "b": F32 | {"data_offsets": [12, 20]}},
        {"a": F32 | {"data_offsets": [0.0, 8.0]}, "b": F32 | {"data_offsets": [8, 16]}},
        {"a": F32 | {"data_offsets": [0, 8], "shape": "2"}, "b": F32 | {"data_offsets": [8, 16]}},
        {"a": F32 | {"data_offsets": [0, 8], "shape": [2**62, 8]}},
        {"a": F32 | {"data_offsets": [0, 8]}},
    ],
    ids=["overlap", "alias", "gap", "floats", "text", "huge", "trailing"],
)
def test_what_the_safetensors_library_refuses_is_refused(
    header: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(safetensors_bytes(header, bytes(20)))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: no safetensors file"):
        SafetensorsFile(file)


def test_deeply_nested_json(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter")
    deep = "[" * 200_000
    (base / "model.safetensors.index.json").unlink()
    (base / "model.safetensors").write_bytes(len(deep).to_bytes(8, "little") + deep.encode())
    with pytest.raises(CheckpointError, match="no safetensors file"):
        merge(base, [adapter], tmp_path / "out", progress=False)
    (adapter / "adapter_config.json").write_text(deep)
    with pytest.raises(CheckpointError, match="no adapter config"):
        merge(save_llama(tmp_path / "other"), [adapter], tmp_path / "out", progress=False)
    (base / "config.json").write_text(deep)
    with pytest.raises(CheckpointError, match=r"config\.json: no JSON"):
        merge(base, [adapter], tmp_path / "out", progress=False)


def test_a_compressed_bin_is_refused(tmp_path: Path) -> None:
    """torch maps compressed tensors, too, and returns the compressed bytes as their values."""
    base = save_llama(tmp_path / "base")
    as_bin(base)
    for file in base.glob("*.bin"):
        with zipfile.ZipFile(file) as archive:
            entries = {entry: archive.read(entry) for entry in archive.namelist()}
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in entries.items():
                archive.writestr(name, content)
    with pytest.raises(CheckpointError, match=r"\.bin: the tensors are compressed"):
        merge(base, [], tmp_path / "out", one_tensor_per_shard=True, progress=False)
    assert not (tmp_path / "out").exists()


def test_weights_that_are_none_are_named(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base", max_shard_size="1GB")
    file = base / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CheckpointError, match="Git LFS pointer"):
        merge(base, [], tmp_path / "out", progress=False)


def test_names_and_shapes_are_checked_without_reading_weights(tmp_path: Path) -> None:
    config = MistralConfig(
        vocab_size=2_000_000,
        hidden_size=1024,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = MistralForCausalLM(config)
    header, end = {}, 0
    for name, tensor in model.state_dict().items():
        span = [end, end + 4 * tensor.numel()]
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": span}
        end = span[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)  # 16 GB that take no space on the disk
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    base = BaseModel(tmp_path)
    assert set(base) == set(header)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 1 << 20


@pytest.mark.parametrize("dangling", [False, True])
def test_through_a_link_the_folder_itself_is_written(dangling: bool, tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base")
    target = tmp_path / "disk" / "model"
    if not dangling:
        target.mkdir(parents=True)
    (tmp_path / "out").symlink_to(target)
    merge(base, [], tmp_path / "out", progress=False)
    assert_equal(read(target), read(base))
    assert (tmp_path / "out").is_symlink() and not list(tmp_path.glob("**/*.partial"))


def test_a_kill_before_the_renaming_leaves_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_llama(tmp_path / "base")
    replace = os.replace

    def killed(source: Any, target: Any) -> None:
        replace(source, target)
        if Path(target) == tmp_path / "out":
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        merge(base, [], tmp_path / "out", progress=False)
    assert (tmp_path / "out" / "config.json").is_file()
    assert not list(tmp_path.glob("**/.lock"))


def test_shards_outside_the_folder(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base")
    index = base / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = "../secret.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="outside the folder"):
        merge(base, [], tmp_path / "out", progress=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_gives_the_same_within_one_rounding(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base", torch.bfloat16)
    adapter = save_adapter(base, tmp_path / "adapter")
    for device in ("cpu", "cuda"):
        merge(base, [adapter], tmp_path / device, device=device, progress=False)
    left, right = read(tmp_path / "cpu"), read(tmp_path / "cuda")
    for name, tensor in left.items():
        torch.testing.assert_close(right[name], tensor, rtol=2**-7, atol=1e-6)


def test_lora_config_is_as_peft_reads_it() -> None:
    """The settings that are refused here still exist there under these names."""
    from pallava.release.adapters import _UNSUPPORTED

    known = set(LoraConfig.__dataclass_fields__)
    assert set(_UNSUPPORTED) <= known, sorted(set(_UNSUPPORTED) - known)
