"""Conversion compared with XTuner's, and its folders loaded by their readers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, MistralConfig, MistralForCausalLM
from xtuner.utils import PROMPT_TEMPLATE

from pallava.modeling.folders import load_connector, load_vision_encoder
from pallava.modeling.qformer import connector_state_dict
from pallava.release.merge import merge
from pallava.release.pth_to_hf import Recipe, convert_checkpoint, read_conversion
from pathcore.weights import CheckpointError, read_state_dict
from tests.pallava.engine.tiny_run import CONFIGS, make_folder, run, save_encoder
from tests.pallava.goldens import (
    CROSSATTN_STATE,
    RELEASED_PTH,
    RELEASED_ZERO2,
    TINY_LLAMA,
    tokenizer,
)

LORA = {"r": 4, "lora_alpha": 8, "target_modules": None, "bias": "none"}


def recipe(folder: Path, **changes: object) -> Recipe:
    save_encoder(folder / "plip")
    values = {
        "base_model": str(TINY_LLAMA),
        "lora": LORA,
        "visual_encoder": str(folder / "plip"),
        "prompt_template": dict(PROMPT_TEMPLATE.llama3_chat),
    }
    return Recipe(**(values | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("checkpoint", [RELEASED_PTH, RELEASED_ZERO2])
def test_parts_load(checkpoint: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    convert_checkpoint(
        checkpoint, recipe(tmp_path), out, save_tokenizer=tokenizer().save_pretrained, fp32=True
    )
    state_dict = read_state_dict(checkpoint)
    connector = load_connector(out / "projector")
    assert connector.config.num_attention_heads == 4 and not connector.uses_sub_images
    for name, tensor in connector_state_dict(state_dict).items():
        assert torch.equal(connector.state_dict()[name], tensor)
    load_vision_encoder(out / "visual_encoder")
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(TINY_LLAMA), out / "llm_adapter"
    )
    found = {f"llm.{n}": t for n, t in model.state_dict().items() if "lora_" in n}
    assert found and all(torch.equal(t, state_dict[n].float()) for n, t in found.items())
    text = AutoTokenizer.from_pretrained(out).apply_chat_template(
        [{"role": "user", "content": "Is it red?"}], tokenize=False
    )
    assert text == PROMPT_TEMPLATE.llama3_chat.INSTRUCTION.format(input="Is it red?")
    assert read_conversion(out)[0].lora["r"] == 4
    assert json.loads((out / "processor_config.json").read_text())["sub_images"] is False


def test_a_connector_of_sub_images_that_saw_thumbnails(tmp_path: Path) -> None:
    for trained in (True, False):
        out = tmp_path / str(trained)
        convert_checkpoint(CROSSATTN_STATE, recipe(tmp_path, sub_images=trained), out)
        assert json.loads((out / "processor_config.json").read_text())["sub_images"] is trained
        assert read_conversion(out)[0].sub_images is trained


def test_a_checkpoint_without_lora(tmp_path: Path) -> None:
    state_dict = read_state_dict(RELEASED_PTH)
    torch.save({"llm.model.norm.weight": torch.ones(64)} | state_dict, tmp_path / "whole.pth")
    with pytest.raises(CheckpointError, match="not LoRA"):
        convert_checkpoint(tmp_path / "whole.pth", recipe(tmp_path, lora={}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 8}, "rank 4 and 4, but the training config says 8"),
        ({"rank_pattern": {"q_proj": 2}}, "q_proj.* says 2"),
        ({"use_dora": True}, "use_dora=True, which the tensors .* contradict"),
        ({"target_modules": ["q_proj"]}, "target_modules are q_proj"),
    ],
)
def test_a_checkpoint_of_another_lora_is_refused(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    values = recipe(tmp_path, lora=LORA | changes)
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(RELEASED_PTH, values, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["projector.", "lora_A"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_run_that_diverged_is_refused(part: str, value: float, tmp_path: Path) -> None:
    state_dict = read_state_dict(RELEASED_PTH)
    name = next(n for n, t in state_dict.items() if part in n and t.is_floating_point())
    state_dict[name] = state_dict[name].clone()
    state_dict[name].view(-1)[3] = value
    torch.save({"state_dict": state_dict}, tmp_path / "iter_4.pth")
    with pytest.raises(CheckpointError, match=rf"iter_4\.pth: {name} holds values .* not finite"):
        convert_checkpoint(tmp_path / "iter_4.pth", recipe(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_values_that_half_precision_cannot_hold(tmp_path: Path) -> None:
    state_dict = {n: t.float() for n, t in read_state_dict(RELEASED_PTH).items()}
    name = next(n for n in state_dict if "lora_B" in n)
    state_dict[name].view(-1)[0] = 1e5
    torch.save({"state_dict": state_dict}, tmp_path / "iter_4.pth")
    with pytest.raises(CheckpointError, match="--fp32"):
        convert_checkpoint(tmp_path / "iter_4.pth", recipe(tmp_path), tmp_path / "out")
    convert_checkpoint(tmp_path / "iter_4.pth", recipe(tmp_path), tmp_path / "out", fp32=True)


def test_the_base_is_recorded_beside_the_adapter(tmp_path: Path) -> None:
    """The base that an adapter names may be gone when it is merged."""
    base = shutil.copytree(TINY_LLAMA, tmp_path / "llama")
    convert_checkpoint(RELEASED_PTH, recipe(tmp_path, base_model=str(base)), tmp_path / "out")
    shutil.rmtree(base)
    config = AutoConfig.from_pretrained(TINY_LLAMA)
    fields = {k: v for k, v in config.to_dict().items() if k not in ("architectures", "model_type")}
    other = MistralForCausalLM(MistralConfig(**fields))
    other.save_pretrained(tmp_path / "llama")
    with pytest.raises(CheckpointError, match="model_type mistral, not llama"):
        merge(tmp_path / "llama", [tmp_path / "out" / "llm_adapter"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.slow
def test_same_tensors_as_xtuner(tmp_path: Path) -> None:
    """Both programs convert the released-form checkpoint with the same config."""
    folder = make_folder(tmp_path / "run", num_images=2)
    shutil.copytree(CONFIGS, folder / "configs")
    config = folder / "configs" / "golden.py"
    config.write_text(
        "from mmengine.config import read_base\n\n"
        "with read_base():\n    from .pallava_domain_alignment_tiny import *\n\n"
        'model["llm_lora"].update(r=4, lora_alpha=8)\n'
        'model.update(cross_attention=False, connector={"intermediate_size": 128})\n'
    )
    shutil.copy(RELEASED_PTH, folder / "release.pth")
    theirs, ours = folder / "theirs", folder / "ours"
    arguments = ("convert", "pth_to_hf", config, "release.pth", theirs, "--safe-serialization")
    result = run(folder, *arguments, program="xtuner")
    assert (theirs / "projector" / "config.json").is_file(), result.stdout[-3000:]
    result = run(folder, "pth-to-hf", config, "release.pth", ours)
    assert result.returncode == 0, result.stdout[-3000:]
    for name in ("llm_adapter/adapter_model.safetensors", "projector/model.safetensors"):
        left, right = load_file(theirs / name), load_file(ours / name)
        assert left.keys() == right.keys()
        for key, tensor in left.items():
            assert tensor.dtype == right[key].dtype and torch.equal(tensor, right[key]), key
    for name in ("r", "lora_alpha", "target_modules", "base_model_name_or_path", "lora_dropout"):
        left, right = (
            json.loads((path / "llm_adapter/adapter_config.json").read_text())[name]
            for path in (theirs, ours)
        )
        assert (sorted(left) if isinstance(left, list) else left) == right
    assert (ours / "visual_encoder" / "model.safetensors").is_file()
    assert "chat_template" in json.loads((ours / "tokenizer_config.json").read_text())
