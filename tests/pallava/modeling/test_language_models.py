"""What is peculiar to single families of language models, and silent when it goes wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM

from pallava.model import LLaVAModel
from pallava.modeling.llava import PALLaVA, embedding_scale
from tests.pallava import goldens
from tests.pallava.engine.tiny_run import save_encoder
from tests.pallava.release.test_model_matrix import FAMILIES, SIZES, save_base

GRANITE = SIZES | {"embedding_multiplier": 3.0}
SCALES = {"gemma": 32**0.5, "gemma2": 32**0.5, "gemma3": 1.0, "llama": 1.0, "granite": 3.0}


@pytest.fixture(scope="module")
def plip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plip")
    save_encoder(folder)
    return folder


def language_model(family: str, **changes: Any) -> Any:
    name, sizes = FAMILIES.get(family, ("Granite", GRANITE))
    kind = "TextConfig" if name == "Gemma3" else "Config"
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}{kind}")(**(sizes | {"vocab_size": 340} | changes))
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", SCALES)
def test_the_first_layer_reads_what_the_connector_wrote(family: str) -> None:
    """Gemma 1 and 2 and Granite multiply the embeddings that they are passed."""
    llm = language_model(family)
    model = PALLaVA(llm, goldens.encoder(), _connector(llm)).eval()
    assert embedding_scale(llm) == pytest.approx(SCALES[family])
    read: list[torch.Tensor] = []
    llm.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: read.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    images = [torch.randn(3, 3, 32, 32)]
    with torch.no_grad():
        written = model.encode_images(images)[0]
        model(torch.tensor([[5, -200, 6]]), images)
        table = llm.get_input_embeddings()(torch.tensor([5]))[0] * SCALES[family]
    torch.testing.assert_close(read[0][0, 1:-1], written, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(read[0][0, 0], table, rtol=1e-5, atol=1e-6)


def _connector(llm: Any) -> Any:
    from pallava.modeling.qformer import ConnectorConfig, ScaleInvariantConnector

    width = goldens.encoder().config.hidden_size
    return ScaleInvariantConnector(
        ConnectorConfig(
            visual_hidden_size=width,
            llm_hidden_size=llm.get_input_embeddings().weight.shape[1],
            num_attention_heads=2,
            num_hidden_layers=1,
            intermediate_size=16,
        )
    )


def test_the_softcap_of_gemma2_is_applied() -> None:
    """PyTorch's fused attention has no cap, and transformers leaves it out without a word."""
    llm = language_model("gemma2", attn_logit_softcapping=0.01, query_pre_attn_scalar=1)
    for parameter in llm.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    ids = torch.arange(3, 15)[None]
    assert llm.config._attn_implementation == "sdpa"
    with torch.no_grad():
        without = llm(input_ids=ids).logits
        PALLaVA(llm, goldens.encoder(), _connector(llm))
        capped = llm(input_ids=ids).logits
        llm.set_attn_implementation("eager")
        eager = llm(input_ids=ids).logits
    assert torch.equal(capped, eager)
    assert (capped - without).abs().max() > 1e-2
    assert language_model("gemma3").config._attn_implementation == "sdpa"


def build(base: Path, plip: Path, **changes: Any) -> LLaVAModel:
    return LLaVAModel(
        llm={
            "type": AutoModelForCausalLM.from_pretrained,
            "pretrained_model_name_or_path": str(base),
        },
        visual_encoder=str(plip),
        freeze_llm=True,
        freeze_visual_encoder=True,
        num_hidden_layers=1,
        **changes,
    )


def test_training_caps_and_takes_no_sampling_from_the_base(plip: Path, tmp_path: Path) -> None:
    base = save_base("gemma2", tmp_path / "base")
    shipped = transformers.GenerationConfig(
        do_sample=True, temperature=0.6, top_p=0.9, repetition_penalty=1.05, eos_token_id=[1, 7]
    )
    shipped.save_pretrained(base)
    llm = build(base, plip).llm
    assert llm.config._attn_implementation == "eager"
    assert llm.generation_config.eos_token_id == [1, 7]
    assert llm.generation_config.repetition_penalty == 1.0 and not llm.generation_config.do_sample
    given = transformers.GenerationConfig(max_new_tokens=3)  # as XTuner's chat hook passes one
    used, _ = llm._prepare_generation_config(given)
    assert used.repetition_penalty == 1.0 and used.temperature == 1.0


def test_rope_scaling_of_the_model_is_not_replaced(plip: Path, tmp_path: Path) -> None:
    """XTuner writes linear scaling over that of Llama 3.1."""
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    base = save_base("llama", tmp_path / "base", rope_scaling=scaling)
    with pytest.raises(ValueError, match="comes with the scaling 'llama3' up to 64 positions"):
        build(base, plip, max_position_embeddings=128)
    assert build(base, plip).llm.config.rope_scaling["rope_type"] == "llama3"


def test_the_text_model_of_gemma3_is_extracted(tmp_path: Path) -> None:
    """As docs/pallava_models.md extracts it from the checkpoint with a vision tower."""
    text = FAMILIES["gemma3"][1]
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 32, "patch_size": 16}  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4
    )
    whole = transformers.Gemma3ForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path / "whole")
    model, report = Gemma3ForCausalLM.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    model.save_pretrained(tmp_path / "text")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "text").eval()
    assert type(read) is Gemma3ForCausalLM
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        assert torch.equal(read(input_ids=ids).logits, whole(input_ids=ids).logits)
