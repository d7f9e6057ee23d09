"""Names and shapes of the published files at full size, built without memory for the weights."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from peft import get_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CLIPVisionConfig, LlamaConfig

from pallava.model import LLaVAModel
from pallava.modeling.folders import connector_config_of
from pallava.modeling.plip import PUBLISHED_TO_HF, PLIPVisionEncoder
from pallava.modeling.qformer import ConnectorConfig, ScaleInvariantConnector
from pathcore.weights import CheckpointError, load_strict
from tests.pallava import goldens

CONNECTOR_FILES = {
    False: "state_dict_contract/projector_only.json",
    True: "state_dict_contract/NOT_RELEASED_projector_with_cross_attention.json",
}


def contract(name: str) -> dict[str, list[int]]:
    names: dict[str, list[int]] = goldens.read_json(name)
    return names


def shapes(state_dict: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in state_dict.items()}


def plip() -> PLIPVisionEncoder:
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
    sizes |= {"num_attention_heads": 12, "image_size": 224, "patch_size": 16}
    with torch.device("meta"):
        return PLIPVisionEncoder(CLIPVisionConfig(**sizes))


def llama3_8b() -> nn.Module:
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rope_theta=500000.0,
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="module", params=[False, True], ids=["released", "scale_invariant"])
def whole(request: pytest.FixtureRequest) -> LLaVAModel:
    lora = goldens.lora_config(r=128, lora_alpha=256, lora_dropout=0.05, target_modules=None)
    with torch.device("meta"):
        return LLaVAModel(
            llm=llama3_8b(),
            visual_encoder=plip(),
            freeze_llm=True,
            freeze_visual_encoder=True,
            llm_lora=lora,
            cross_attention=request.param,
        )


def test_encoder_has_the_200_published_tensors() -> None:
    expected = contract("state_dict_contract/visual_encoder.json")
    assert len(expected) == 200
    assert shapes(plip().state_dict()) == expected


def test_encoder_renaming_is_the_published_one() -> None:
    rename = goldens.read_json("state_dict_contract/visual_encoder_to_hf_clip_rename.json")
    ((ours, theirs),) = PUBLISHED_TO_HF.items()
    assert {ours + end: theirs + end for end in ("weight", "bias")} == rename["rename"]


@pytest.mark.parametrize(("cross_attention", "count"), [(False, 101), (True, 161)])
def test_connector_has_the_published_tensors(cross_attention: bool, count: int) -> None:
    expected = contract(CONNECTOR_FILES[cross_attention])
    with torch.device("meta"):
        connector = ScaleInvariantConnector(ConnectorConfig(cross_attention=cross_attention))
    assert len(expected) == count
    assert shapes(connector.state_dict()) == expected
    assert connector.state_dict()["model.bert.embeddings.position_ids"].dtype == torch.int64


@pytest.mark.parametrize("cross_attention", [False, True])
def test_sizes_and_mode_are_read_from_the_names(cross_attention: bool) -> None:
    names = contract(CONNECTOR_FILES[cross_attention])
    tensors = {name: torch.empty(shape, device="meta") for name, shape in names.items()}
    assert connector_config_of(tensors) == ConnectorConfig(cross_attention=cross_attention)


def test_a_training_checkpoint_has_the_published_tensors(whole: LLaVAModel) -> None:
    expected = contract("state_dict_contract/pth_state_dict.json")
    adapters = {name: shape for name, shape in expected.items() if name.startswith("llm.")}
    assert (len(expected), len(adapters)) == (549, 448)
    crossed = whole.projector.uses_sub_images
    connector = contract(CONNECTOR_FILES[crossed])
    expected = adapters | {f"projector.{name}": shape for name, shape in connector.items()}
    assert shapes(whole.state_dict()) == expected
    if not crossed:
        trained = sum(p.numel() for p in whole.parameters() if p.requires_grad)
        assert trained == pytest.approx(381.2e6, rel=1e-3)


def test_the_adapter_has_the_published_tensors(whole: LLaVAModel) -> None:
    expected = contract("state_dict_contract/llm_adapter_after_convert.json")
    found = shapes(get_peft_model_state_dict(whole.llm))
    assert len(found) == 448
    assert found == expected


def test_a_file_of_another_mode_names_the_cross_attention(whole: LLaVAModel) -> None:
    other = contract(CONNECTOR_FILES[not whole.projector.uses_sub_images])
    tensors = {name: torch.empty(shape, device="meta") for name, shape in other.items()}
    with pytest.raises(CheckpointError, match=r"(?s)60 .*crossattention\.self\.query\.weight"):
        load_strict(whole.projector, tensors, what="connector")
