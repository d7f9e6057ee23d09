"""Every family of language models from training to answers: parts and export say the same.

Trains a few steps with XTuner's model class, saves what MMEngine saves, converts, exports, and
compares what the parts and the one folder compute and answer.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM
from xtuner.utils import PROMPT_TEMPLATE

from pallava.inference.loading import load_model
from pallava.model import LLaVAModel
from pallava.release.export import export
from pallava.release.merge import merge
from pallava.release.pth_to_hf import Recipe, convert_checkpoint
from tests.pallava import goldens
from tests.pallava.engine.tiny_run import save_encoder, save_image
from tests.pallava.release.test_model_matrix import FAMILIES, save_base

LORA = {"r": 4, "lora_alpha": 8, "bias": "none"}
QUESTION = "Is it red?"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("road")
    save_encoder(folder / "plip")
    for index in range(3):
        save_image(folder / f"{index}.png", index)
    return folder


def trained(base: Path, plip: Path) -> LLaVAModel:
    """A model after three steps that change every adapted weight."""
    torch.manual_seed(3)
    model = LLaVAModel(
        llm={
            "type": AutoModelForCausalLM.from_pretrained,
            "pretrained_model_name_or_path": str(base),
        },
        visual_encoder=str(plip),
        freeze_llm=True,
        freeze_visual_encoder=True,
        llm_lora=LoraConfig(**LORA, lora_dropout=0.0, task_type="CAUSAL_LM"),
        num_hidden_layers=1,
        use_activation_checkpointing=False,
    )
    io = goldens.read_tensors("model/crossattn/ref_io.safetensors")
    data: dict[str, Any] = {
        name: io[name] for name in ("input_ids", "attention_mask", "labels", "position_ids")
    }
    data["pixel_values"] = [io["pixel_values.0"], io["pixel_values.1"]]
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(weights, lr=2e-2)
    for _ in range(3):
        loss = model(data, mode="loss")["loss"]
        assert math.isfinite(float(loss))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def first_logits(assistant: Any, image: Path, model: Any = None) -> Tensor:
    """Logits of the first word of an answer."""
    prompt = torch.tensor([assistant.encode(QUESTION, has_image=True)])
    model = model or assistant.model
    inputs = model.prepare_inputs(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt, dtype=torch.bool),
        pixel_values=[assistant.pixel_values(image)],
    )
    with torch.no_grad():
        return model.llm(
            inputs_embeds=inputs.inputs_embeds, attention_mask=inputs.attention_mask
        ).logits[:, -1]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_parts_merged_and_exported_models_answer_alike(
    family: str, root: Path, tmp_path: Path
) -> None:
    vocabulary = len(goldens.tokenizer())
    base = save_base(family, tmp_path / "base", vocab_size=vocabulary)
    goldens.tokenizer().save_pretrained(base)
    model = trained(base, root / "plip")
    torch.save({"state_dict": model.state_dict(), "meta": {}}, tmp_path / "iter_3.pth")
    recipe = Recipe(
        base_model=str(base),
        lora=dict(LORA),
        visual_encoder=str(root / "plip"),
        prompt_template=dict(PROMPT_TEMPLATE.llama3_chat),
    )
    parts, merged, exported = tmp_path / "parts", tmp_path / "merged", tmp_path / "exported"
    convert_checkpoint(
        tmp_path / "iter_3.pth", recipe, parts, save_tokenizer=goldens.tokenizer().save_pretrained,
        fp32=True,
    )  # fmt: skip
    merge(base, [parts / "llm_adapter"], merged, progress=False)
    goldens.tokenizer().save_pretrained(merged)
    export(base, parts, exported, progress=False)
    readers = [
        load_model(base, parts, device="cpu"),
        load_model(merged, parts, device="cpu", use_adapter=False),
        load_model(exported, device="cpu"),
    ]
    images = [root / f"{index}.png" for index in range(3)]
    expected = first_logits(readers[0], images[0], model)
    for reader in readers:
        torch.testing.assert_close(first_logits(reader, images[0]), expected, rtol=1e-3, atol=1e-4)
    answers = [reader.answer_batch(images, [QUESTION] * 3, max_new_tokens=6) for reader in readers]
    assert answers[0] == answers[1] == answers[2]
